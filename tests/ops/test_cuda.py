"""The CUDA kernels on a CPU, emulated, against the reference in float64.

The sources of csrc/cuda are compiled for the host against tests/ops/cuda_emulation, where threads
are fibers and the tensor cores, the copy engine and their barriers do what the PTX ISA says; the
backend of q3mega.ops calls them through ctypes. What a GPU would add to this is time, and what the
ISA leaves out.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from q3mega import ops
from q3mega.ops import dispatch, fused_attention
from q3mega.ops.backends import KERNELS

ROOT = Path(__file__).parents[2]
C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulation")
    folder = tmp_path_factory.mktemp("cuda")
    include = [f"-I{ROOT / place}" for place in ("csrc/cuda", "tests/ops/cuda_emulation")]
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wno-unknown-pragmas", "-DQ3MEGA_EMULATE", *include]
    target, sources = folder / "emulated.so", sorted((ROOT / "csrc/cuda").glob("*.cu"))
    command = [compiler, *flags, "-shared", "-o", target, "-x", "c++", *sources]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def bound(library: ctypes.CDLL) -> ModuleType:
    """What csrc/cuda/bindings.cpp makes of the launchers that kernels.h declares."""
    module = ModuleType("q3mega._cuda")
    header = re.sub(r"//.*", "", (ROOT / "csrc/cuda/kernels.h").read_text())
    for name, parameters in re.findall(r"cudaError_t (\w+)\(([^)]*)\)", header):
        launcher = getattr(library, name)
        launcher.argtypes = [
            ctypes.c_void_p if "*" in p or "cudaStream_t" in p else C_TYPES[p.split()[0]]
            for p in parameters.split(",")
        ]

        def call(*arguments, launcher=launcher, name=name) -> None:
            if error := launcher(*arguments):
                raise RuntimeError(f"{name}: error {error}")

        setattr(module, name, call)
    return module


@pytest.fixture(params=["early reads", "late reads"])
def emulated(library, request, monkeypatch) -> None:
    """backend="cuda" is the emulation, on CPU tensors."""
    library.emulate_late_reads(request.param == "late reads")
    monkeypatch.setitem(sys.modules, "q3mega._cuda", bound(library))
    monkeypatch.delitem(sys.modules, "q3mega.ops.backends.cuda", raising=False)
    backend = import_module("q3mega.ops.backends.cuda")
    monkeypatch.setattr(backend, "_stream", lambda x: nullcontext(0))
    monkeypatch.setitem(KERNELS, "cuda", backend)
    monkeypatch.setattr(dispatch, "_BACKENDS", dict(dispatch._BACKENDS))
    attention = partial(fused_attention._dual_chunk_attention, "cuda")
    dispatch.register("dual_chunk_attention", "cuda")(attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "chunk_size", "local_size", "offset"),
    [
        ([1], 1, 1, 64, 8, 2, 0),  # one token
        ([130], 2, 1, 128, 1 << 40, 1, 0),  # one chunk: plain rotary attention
        ([90, 1, 0, 89, 33], 2, 2, 128, 90, 1, 0),  # a chunk and a token, packed
        ([300], 2, 1, 64, 100, 0, 250),  # a continued sequence that looks back
    ],
)
def test_attention(
    emulated, lengths, heads, kv_heads, dim, chunk_size, local_size, offset, dtype
) -> None:
    torch.manual_seed(0)
    n = sum(lengths)
    q = torch.randn(n - offset, heads, dim).to(dtype)
    k, v = (torch.randn(n, kv_heads, dim).to(dtype) for _ in range(2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    where = {"q_offset": offset} if offset else {"cu_seqlens": cu_seqlens}

    def attend(backend: str, dtype: torch.dtype) -> torch.Tensor:
        return ops.dual_chunk_attention(
            *(x.to(dtype) for x in (q, k, v)), chunk_size=chunk_size, local_size=local_size,
            rope_theta=100.0, backend=backend, **where,
        )  # fmt: skip

    exact = attend("reference", torch.float64)
    assert (attend("cuda", dtype) - exact).norm() < torch.finfo(dtype).eps * exact.norm()
