"""The packages and the C++ extension; everything else stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["q3mega", "q3mega.*"]), "q3mega.kernels"],
    package_dir={"q3mega.kernels": "kernels"},
    ext_modules=[Pybind11Extension("q3mega._data", sorted(glob("csrc/data/*.cpp")), cxx_std=17)],
    cmdclass={"build_ext": build_ext},
)
