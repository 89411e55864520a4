"""What ptxas and the disassembler say of a kernel, and the CUDA kernels compiled to hear it.

The tools are looked for in CUDA_HOME, on the PATH and in what pip installs: nvidia-cuda-nvcc has
the compiler, Triton the disassembler.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

from q3mega.kernels import DIVERGENCES

ROOT = Path(__file__).parents[1]


class Compiled(NamedTuple):
    """Registers a thread; bytes spilt and of stack; shared bytes a block; counts of SASS.

    `serialised`: ptxas makes each wgmma wait for the one before. Without a disassembler the counts
    are None.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    hgmma: int | None
    local: int | None
    serialised: bool


def tool(name: str) -> str | None:
    """Where a tool is, or None."""
    folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", *os.get_exec_path()]
    folders += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    if (triton := find_spec("triton")) is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).with_name("backends") / "nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def run(*command: str | Path) -> str:
    """What a command says, on either stream."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read(ptxas_output: str, sass: str | None, shared: int) -> Compiled:
    """Of one kernel: ptxas -v, the disassembly, bytes of shared memory a block."""

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, ptxas_output)))

    def count(pattern: str) -> int | None:
        return None if sass is None else len(re.findall(pattern, sass))

    return Compiled(
        number(r"Used (\d+) registers"), number(r"(\d+) bytes spill"),
        number(r"(\d+) bytes stack frame"), shared, count(r"\bHGMMA\b"),
        count(r"\b(?:LDL|STL)\b"), "wgmma.mma_async instructions are serialized" in ptxas_output,
    )  # fmt: skip


def cuda_kernels() -> dict[str, Compiled]:
    """The kernels of csrc/cuda, compiled for sm_90a by the nvcc that `tool` finds."""
    nvcc, disassembler = tool("nvcc"), tool("nvdisasm")
    assert nvcc is not None
    kernels_by_name, shared = {}, _shared_bytes()
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            cubin = Path(folder, f"{source.stem}.cubin")
            hopper = "-gencode", "arch=compute_90a,code=sm_90a"
            ptxas_output = run(
                nvcc, "-O3", "-std=c++17", *hopper, "-Xptxas", "-v", "-cubin", source, "-o", cubin
            )
            sass = run(disassembler, "-c", cubin) if disassembler else ""
            notes, *kernels = re.split(r"Compiling entry function '(\w+)'", ptxas_output)
            code = re.split(r"\.section\s+\.text\.(\w+),", sass)
            text = dict(zip(code[1::2], code[2::2], strict=True))
            for symbol, block in zip(kernels[::2], kernels[1::2], strict=True):
                about = [line for line in notes.splitlines() if symbol in line]
                name = _name(symbol)
                kernels_by_name[name] = read(
                    "\n".join([*about, block]), text.get(symbol), shared.get(name, 0)
                )
    return kernels_by_name


def _name(symbol: str) -> str:
    """A kernel's name and template arguments, from its mangled name."""
    (name,) = re.findall(r"\d([a-z_]+)_kernel", symbol)
    element, dim = re.findall(r"Bf16|Fp16", symbol)[:1], re.findall(r"Li(\d+)E", symbol)
    kind = [list(DIVERGENCES)[int(number)] for number in re.findall(r"DivergenceE(\d)E", symbol)]
    return " ".join([name, *kind, *element, *dim])


def _shared_bytes() -> dict[str, int]:
    """Dynamic shared memory of the attention kernels: their structures' sizes, which g++ knows."""
    kernels = {
        "forward": "Forward",
        "query_gradient": "QueryGradient",
        "key_gradient": "KeyGradient",
    }
    cases = list(product(kernels, (64, 128)))
    sizes = [f"sizeof(q3mega::cuda::{kernels[name]}Shared<{dim}>)" for name, dim in cases]
    prints = "".join(f'std::printf("%zu ", {size});' for size in sizes)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "sizes.cpp"), Path(folder, "sizes")
        source.write_text(f'#include "dual_chunk_attention.cu"\nint main() {{ {prints} }}\n')
        include = f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/ops/cuda_emulation'}"
        run("g++", "-std=c++17", "-w", "-DQ3MEGA_EMULATE", *include, source, "-o", binary)
        sizes_by_case = zip(cases, map(int, run(binary).split()), strict=True)
        return {
            f"{name} {t} {dim}": size
            for (name, dim), size in sizes_by_case
            for t in ("Bf16", "Fp16")
        }
