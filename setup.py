"""The packages and the C++ extensions; everything else stands in pyproject.toml."""

import platform
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# AVX2 is on every x86 server of the last ten years; elsewhere the compiler vectorises what it can.
# OpenMP without a runtime of our own: torch has loaded its libgomp before this is imported.
SIMD = ["-mavx2", "-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", *SIMD]

setup(
    packages=[*find_packages(include=["q3mega", "q3mega.*"]), "q3mega.kernels"],
    package_dir={"q3mega.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension("q3mega._data", sorted(glob("csrc/data/*.cpp")), cxx_std=17),
        Pybind11Extension(
            "q3mega._cpu",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=glob("csrc/cpu/*.h"),
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
