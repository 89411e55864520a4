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
from contextlib import nullcontext
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

import q3mega
from q3mega import ops
from q3mega.kernels import DIVERGENCES
from q3mega.ops import dispatch
from q3mega.ops.backends import KERNELS
from q3mega.ops.fused import distill_loss, dual_chunk_attention, grpo_loss, linear_logprob

ROOT = Path(__file__).parents[2]
C_TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "Divergence": ctypes.c_int,
}
MODULES = {
    "dual_chunk_attention": dual_chunk_attention,
    "linear_logprob": linear_logprob,
    "grpo_loss": grpo_loss,
    "distill_loss": distill_loss,
}


def compiled(folder: Path, sources: Path = ROOT / "csrc/cuda") -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulation")
    target, include = folder / "emulated.so", (sources, ROOT / "tests/ops/cuda_emulation")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-DQ3MEGA_EMULATE"]
    flags += ["-fno-gnu-unique", *(f"-I{folder}" for folder in include)]  # libraries side by side
    command = [compiler, *flags, "-o", target, "-x", "c++", *sorted(sources.glob("*.cu"))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("cuda"))


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


def emulate(library: ctypes.CDLL, late_reads: bool, monkeypatch) -> None:
    """backend="cuda" is the emulation, on CPU tensors."""
    library.emulate_late_reads(late_reads)
    monkeypatch.setattr(q3mega, "_cuda", bound(library), raising=False)
    spec = spec_from_file_location("emulated", ROOT / "q3mega/ops/backends/cuda.py")
    backend = module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.setattr(backend, "_stream", lambda x: nullcontext(0))
    monkeypatch.setitem(KERNELS, "cuda", backend)
    monkeypatch.setattr(dispatch, "_BACKENDS", dict(dispatch._BACKENDS))
    for op, module in MODULES.items():
        dispatch.register(op, "cuda")(partial(getattr(module, f"_{op}"), "cuda"))


@pytest.fixture(params=["early reads", "late reads"])
def emulated(library, request, monkeypatch) -> None:
    emulate(library, request.param == "late reads", monkeypatch)


BF16, FP16 = torch.bfloat16, torch.float16


CASES = [  # dtype, lengths, heads, kv_heads, dim, chunk_size, local_size, offset
    (BF16, [1], 1, 1, 64, 8, 2, 0),  # one token
    (FP16, [130], 2, 1, 128, 1 << 40, 1, 0),  # one chunk: plain rotary attention
    (BF16, [90, 1, 0, 89, 33], 2, 2, 128, 90, 1, 0),  # packed; a chunk and a token
    (FP16, [9], 2, 2, 64, 70, 69, 0),  # chunks of one token
    (BF16, [300], 4, 1, 128, 140, 3, 0),  # three distances, grouped heads
    (BF16, [300], 2, 1, 64, 100, 0, 250),  # a continued sequence that looks back
]


def worst(case: tuple, device: str = "cpu") -> float:
    """Largest error of output and three gradients, over the norm of each and the dtype's eps."""
    dtype, lengths, heads, kv_heads, dim, chunk_size, local_size, offset = case
    torch.manual_seed(0)
    n = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    where = {"q_offset": offset} if offset else {"cu_seqlens": cu_seqlens}
    operands = torch.randn(n, heads, dim)[offset:], *torch.randn(2, n, kv_heads, dim)
    seed = torch.randn(n - offset, heads, dim)

    def attend(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).to(device, wide).requires_grad_() for x in operands]
        out = ops.dual_chunk_attention(
            *leaves, chunk_size=chunk_size, local_size=local_size, rope_theta=100.0,
            backend=backend, **where,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(dtype).to(out))]

    pairs = zip(attend("cuda", dtype), attend("reference", torch.double), strict=True)
    errors = [(ours - exact).norm() / (exact.norm() + 1e-9) for ours, exact in pairs]
    return float(torch.stack(errors).max()) / torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_attention(emulated, case) -> None:
    assert worst(case) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (BF16, [3000, 70], 8, 2, 128, 1024, 100, 0)])
def test_attention_on_a_card(case) -> None:
    pytest.importorskip("q3mega._cuda")
    assert worst(case, "cuda") < 1


@pytest.mark.parametrize("keys", [0, 3])
def test_attention_without_queries(emulated, keys: int) -> None:
    q, k, v = (torch.randn(n, 1, 64, dtype=BF16, requires_grad=True) for n in (0, keys, keys))
    kw = {"chunk_size": 8, "local_size": 2, "q_offset": keys, "backend": "cuda"}
    out = ops.dual_chunk_attention(q, k, v, **kw)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert not any(g.any() for g in gradients)


# Mistakes that a GPU might hide for long: (what the source says, what is said instead).
MISTAKES = {
    "operands stored without a proxy fence": ("  fence_async();\n", ""),
    "keys not awaited": ("wait(shared.key_full[keys.stage], keys.parity);", ""),
    "query rotated while a warp still reads it": (
        "sync_threads(1 + warpgroup, kWarpgroup);  // no warp still multiplies the old one",
        "",
    ),
    "values given back before they are used": (
        "wgmma_wait<0>(o);\n      release(shared.value_empty[values.stage], thread);",
        "release(shared.value_empty[values.stage], thread);\n      wgmma_wait<0>(o);",
    ),
    "octets of rows misplaced": ("kOctet = 8 * 128", "kOctet = 4 * 128"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulation_sees_mistakes(mistake: str, tmp_path, monkeypatch) -> None:
    sources = shutil.copytree(ROOT / "csrc/cuda", tmp_path / "csrc")
    kernels = sources / "dual_chunk_attention.cu"
    right, wrong = MISTAKES[mistake]
    assert right in kernels.read_text()
    kernels.write_text(kernels.read_text().replace(right, wrong))
    library = compiled(tmp_path, sources)

    def survives(late_reads: bool) -> bool:
        emulate(library, late_reads, monkeypatch)
        try:
            return worst((BF16, [300], 1, 1, 64, 140, 3, 0)) < 1
        except RuntimeError:  # a barrier that is used wrongly fails the launch
            return False

    assert not (survives(False) and survives(True))


def both(run, *leaves: torch.Tensor) -> None:
    """run(backend, *leaves) gives (scalar, other outputs): fp32 kernels are the fp64 reference."""
    results = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.double)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        scalar, *others = run(backend, *inputs)
        results.append([scalar.detach(), *others, *torch.autograd.grad(scalar, inputs)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), atol=2e-6, rtol=1e-5)


def losses_agree(v: int, valid: int, device: str = "cpu") -> None:
    torch.manual_seed(0)
    n, h = 5, 6
    hidden, weight, teacher, head = (torch.randn(m, h).to(device) for m in (n, v, n, v))
    targets, w = torch.randint(valid, (n,)).to(device), torch.rand(n).to(device)
    old = torch.randn(n).to(device) - 4

    def logprob(backend: str, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        actual = ops.linear_logprob(
            hidden, weight, targets, temperature=0.7, valid_vocab=valid, backend=backend
        )
        return [sum((x * w).sum() for x in actual), *(x.detach() for x in actual)]

    def grpo(backend: str, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        rows = {"advantages": old + 4, "old_logprobs": old, "loss_weights": w}
        out = ops.grpo_loss(
            hidden, weight, targets, **{name: x.to(hidden.dtype) for name, x in rows.items()},
            valid_vocab=valid, entropy_coef=0.1, backend=backend,
        )  # fmt: skip
        return [out.loss, out.logprobs, out.entropy]

    def distill(kind: str, backend: str, hidden: torch.Tensor, weight: torch.Tensor):
        dtype = hidden.dtype
        out = ops.distill_loss(
            hidden, weight, teacher_hidden=teacher.to(dtype), teacher_weight=head.to(dtype),
            divergence=kind, beta=0.3, loss_weights=w.to(dtype), valid_vocab=valid,
            backend=backend,
        )  # fmt: skip
        return [out.loss, out.per_token]

    for run in (logprob, grpo, *(partial(distill, kind) for kind in DIVERGENCES)):
        both(run, hidden, weight)


# Vocabularies that four divides or not, whole or cut, of one pass of a block's threads and more.
VOCABULARIES = [(37, 33), (1, 1), (4103, 4103), (2052, 2049)]


@pytest.mark.parametrize("sizes", VOCABULARIES)
@pytest.mark.parametrize("emulated", ["early reads"], indirect=True)
def test_losses(emulated, sizes) -> None:
    losses_agree(*sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*VOCABULARIES, (151_936, 151_669)])
def test_losses_on_a_card(sizes) -> None:
    pytest.importorskip("q3mega._cuda")
    losses_agree(*sizes, device="cuda")


def test_rows_of_unlike_alignment(emulated) -> None:
    torch.manual_seed(0)
    student, shifted = torch.randn(3, 70), torch.randn(211)[1:].view(3, 70)
    actual = []
    for teacher in (shifted, shifted.clone()):
        pair = student.logsumexp(1), teacher.logsumexp(1), "jsd", 0.3
        sums = KERNELS["cuda"].divergence_sums(student, teacher, 66, *pair)
        dz = student.clone()
        student_part, g = sums.T.contiguous()
        KERNELS["cuda"].divergence_gradient(dz, teacher, 66, *pair, student_part, g)
        actual.append([sums, dz])
    torch.testing.assert_close(*actual)
