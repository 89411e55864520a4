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


def c_type(declaration: str) -> type:
    if "*" in declaration or "cudaStream_t" in declaration:
        return ctypes.c_void_p
    return C_TYPES[declaration.split()[0]]


def bound(library: ctypes.CDLL) -> ModuleType:
    """What csrc/cuda/bindings.cpp makes of what kernels.h declares."""
    module = ModuleType("q3mega._cuda")
    header = re.sub(r"//.*", "", (ROOT / "csrc/cuda/kernels.h").read_text())
    (members,) = re.findall(r"struct Attention {(.*?)};", header, re.DOTALL)
    fields = [
        (name.strip(" *"), c_type(line))
        for line in members.split(";")[:-1]
        for name in re.sub(r"^\s*(const )?\w+", "", line).split(",")
    ]
    C_TYPES["Attention"] = module.Attention = type(
        "Attention", (ctypes.Structure,), {"_fields_": fields}
    )
    for name, parameters in re.findall(r"cudaError_t (\w+)\(([^)]*)\)", header):
        launcher = getattr(library, name)
        launcher.argtypes = [c_type(parameter) for parameter in parameters.split(",")]

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


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "lengths", "heads", "kv_heads", "dim", "chunk_size", "local_size", "offset"),
    [
        (BF16, [1], 1, 1, 64, 8, 2, 0),  # one token
        (FP16, [130], 2, 1, 128, 1 << 40, 1, 0),  # one chunk: plain rotary attention
        (BF16, [90, 1, 0, 89, 33], 2, 2, 128, 90, 1, 0),  # packed; a chunk and a token
        (FP16, [20], 2, 2, 64, 70, 69, 0),  # chunks of one token
        (BF16, [300], 4, 1, 128, 140, 3, 0),  # three distances, grouped heads
        (BF16, [300], 2, 1, 64, 100, 0, 250),  # a continued sequence that looks back
    ],
)
def test_attention(
    emulated, dtype, lengths, heads, kv_heads, dim, chunk_size, local_size, offset
) -> None:
    torch.manual_seed(0)
    n = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    where = {"q_offset": offset} if offset else {"cu_seqlens": cu_seqlens}
    operands = torch.randn(n, heads, dim)[offset:], *torch.randn(2, n, kv_heads, dim)
    seed = torch.randn(n - offset, heads, dim)

    def attend(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).to(wide).requires_grad_() for x in operands]
        out = ops.dual_chunk_attention(
            *leaves, chunk_size=chunk_size, local_size=local_size, rope_theta=100.0,
            backend=backend, **where,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(dtype).to(wide))]

    for ours, exact in zip(attend("cuda", dtype), attend("reference", torch.double), strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= torch.finfo(dtype).eps * exact.norm() + 1e-9
