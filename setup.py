"""Build the C++ extension; everything else about the package stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension("q3mega._data", ["csrc/data/index_helpers.cpp"], cxx_std=17)
    ],
    cmdclass={"build_ext": build_ext},
)
