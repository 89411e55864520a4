"""What the compilers make of the kernels for an H100, without one.

    python benchmarks/compiled.py > docs/benchmarks/compiled.md

Compiles every Triton kernel for sm_90a at the settings that the launchers use, and the CUDA kernels
where there is an nvcc; reads registers, spills, stack and shared memory from ptxas, tensor-core and
local-memory instructions from the disassembly. The other tools are those that Triton brings along.
The warpgroups of a CUDA attention kernel start with 168 registers a thread and then trade them.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from cubin import Compiled, cuda_kernels, read, run, tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from q3mega.kernels import (
    DIVERGENCES,
    MAX_BLOCK_COLUMNS,
    distill_loss,
    dual_chunk_attention,
    linear_logprob,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Case(NamedTuple):
    kernel: Any
    types: dict[str, str]  # of the arguments that are not i32
    constants: dict[str, Any]
    warps: int = 8
    stages: int = 2


def cases() -> dict[str, Case]:
    pointers = dict.fromkeys(("Z", "S", "T", "STATS", "SUMS", "LSE", "ENTROPY"), "*fp32")
    pointers |= dict.fromkeys(("G", "G_ENTROPY", "LSE_S", "LSE_T", "STUDENT_PART"), "*fp32")
    pointers |= {"COLUMN": "*i64", "beta": "fp32"}
    block = {"BLOCK": MAX_BLOCK_COLUMNS}
    compiled_cases = {
        "row_stats": Case(
            linear_logprob.row_stats_kernel,
            pointers,
            block | {"MASKED": linear_logprob.MASKED},
            8,
            3,
        ),
        "row_gradient": Case(
            linear_logprob.row_gradient_kernel, pointers, block | {"WITH_ENTROPY": True}, 8, 3
        ),
    }
    for kind, number in DIVERGENCES.items():
        for kernel in (
            distill_loss.divergence_sums_kernel,
            distill_loss.divergence_gradient_kernel,
        ):
            name = kernel.__name__.removesuffix("_kernel")
            compiled_cases[f"{name} {kind}"] = Case(
                kernel, pointers, block | {"KIND": number}, 8, 3
            )
    for short in ("bf16", "fp32"):
        types = dict.fromkeys(("DZ", "LOGITS", "D_HIDDEN", "D_WEIGHT"), "*fp32")
        types |= {"PICKED": "*i64", "HIDDEN": f"*{short}", "WEIGHT": f"*{short}"}
        for kernel in (
            distill_loss.picked_logits_kernel,
            distill_loss.picked_d_hidden_kernel,
            distill_loss.picked_d_weight_kernel,
        ):
            constants = {"PICKS": distill_loss.PICKS, "LANES": distill_loss.LANES}
            constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
            name = kernel.__name__.removesuffix("_kernel")
            compiled_cases[f"{name} {short}"] = Case(kernel, types, constants, 4)
    rows = {"COS": "*fp32", "SIN": "*fp32", "TILES": "*i32", "LSE": "*fp32", "DELTA": "*fp32"}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        operands = dict.fromkeys(("Q", "K", "V", "OUT", "D_OUT", "D_V"), f"*{short}")
        types = rows | operands | {"D_K": "*fp32", "D_Q": "*fp32", "scale": "fp32"}
        for kernel, tiles in (
            (dual_chunk_attention.forward_kernel, dual_chunk_attention.forward_tiles(dtype)),
            (dual_chunk_attention.query_gradient_kernel, dual_chunk_attention.tiles(dtype)),
            (dual_chunk_attention.key_gradient_kernel, dual_chunk_attention.tiles(dtype)),
        ):
            name = kernel.__name__.removesuffix("_kernel")
            constants = {"HALF": 64, "M": tiles.queries, "N": tiles.keys}
            compiled_cases[f"attention {name} {short}"] = Case(
                kernel, types, constants, tiles.warps, tiles.stages
            )
    return compiled_cases


def compiled(case: Case) -> Compiled:
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    aligned = {  # what the launcher finds true of the arguments at the models' sizes
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n][0] == "*" or n in ("half", "stride", "width")
    }
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(binary.asm["ptx"])
        ptxas_output = run(TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", "-o", cubin, ptx)
        sass = run(TOOLS / "nvdisasm", "-c", cubin)
    return read(ptxas_output, sass, binary.metadata.shared)


def rows() -> Iterator[tuple[str, int, Compiled]]:
    """(name, warps, what was compiled_cases)"""
    for name, case in cases().items():
        if chosen(name):
            yield name, case.warps, compiled(case)
    if tool("nvcc"):
        for name, kernel in cuda_kernels().items():
            if chosen(name):
                yield f"CUDA {name}", 12 if kernel.shared else 16, kernel


def chosen(name: str) -> bool:
    return not sys.argv[1:] or sys.argv[1] in name


def main() -> None:
    nvcc = tool("nvcc")
    version = re.findall(r"\bV([\d.]+)", run(nvcc, "--version"))[0] if nvcc else "not found"
    print("# The kernels as compiled for Hopper\n\n`python benchmarks/compiled.py`, without a GPU.")
    print(f"Triton {triton.__version__}, nvcc {version}, sm_90a\n")
    print("| kernel | warps | registers | spilled B | stack B | shared B | HGMMA | local |")
    print("|---|---|---|---|---|---|---|---|")
    for name, warps, c in rows():
        row = c.registers, c.spilled, c.stack, c.shared, c.hgmma, c.local
        print(f"| {name} | {warps} |", *(f"{x} |" for x in row), flush=True)


if __name__ == "__main__":
    main()
