"""The packages and the extensions; everything else stands in pyproject.toml."""

import os
import platform
import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

# AVX2 is on every x86 server of the last ten years, AVX-512 on most: one build each, of which
# q3mega.ops.backends.cpu takes one. Elsewhere the compiler vectorises what it can.
# OpenMP without a runtime of our own: torch has loaded its libgomp before this is imported.
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2, AVX512 = "-mavx2 -mfma", "-march=x86-64-v4 -mprefer-vector-width=512"
CONFINE = "csrc/sandbox/confine.cpp"
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")


def cpu_kernels(name: str, simd: str) -> Pybind11Extension:
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", *simd.split()]
    return Pybind11Extension(
        f"q3mega.{name}",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=glob("csrc/cpu/*.h"),
        cxx_std=17,
        define_macros=[("Q3MEGA_MODULE", name)],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


class Build(build_ext):
    """With nvcc for the CUDA kernels: it finds its own headers and runtime, which it links in. And
    with the launcher of the sandbox, a program of its own, beside the extensions."""

    def run(self) -> None:
        if NVCC is None:
            print("no nvcc in CUDA_HOME or on the PATH: q3mega._cuda is not built")
            self.extensions = [e for e in self.extensions if e.name != "q3mega._cuda"]
        super().run()
        if sys.platform == "linux":
            folder = Path(self.get_ext_fullpath("q3mega._data")).parent
            flags = ["-std=c++17", "-O2"]
            objects = self.compiler.compile([CONFINE], self.build_temp, extra_postargs=flags)
            self.compiler.link_executable(
                objects, "confine", output_dir=str(folder), target_lang="c++"
            )

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "q3mega._cuda":
            return super().build_extension(extension)
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", "--threads", "0"]
        flags += [f"-I{path}" for path in (*extension.include_dirs, *self.include_dirs)]
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", "-shared"]
        flags += [f"-L{Path(NVCC).parents[1] / 'lib'}"]  # of the toolkit that pip installs
        self.spawn([NVCC, *flags, *extension.sources, "-o", str(target)])


setup(
    packages=[*find_packages(include=["q3mega", "q3mega.*"]), "q3mega.kernels"],
    package_dir={"q3mega.kernels": "kernels/triton"},
    ext_modules=[
        Pybind11Extension("q3mega._data", sorted(glob("csrc/data/*.cpp")), cxx_std=17),
        cpu_kernels("_cpu", AVX2 if X86 else ""),
        *([cpu_kernels("_cpu_avx512", AVX512)] if X86 else []),
        Pybind11Extension(
            "q3mega._cuda",
            ["csrc/cuda/bindings.cpp", *sorted(glob("csrc/cuda/*.cu"))],
            depends=glob("csrc/cuda/*.h"),
            optional=True,  # an nvcc that fails, being too old, is like none
        ),
    ],
    cmdclass={"build_ext": Build},
)
