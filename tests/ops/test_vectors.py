"""The C++ kernels' loops are vectorised, which compilers give up silently."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/cpu/*.cpp"))
COMPILER = shutil.which("g++")


def builds() -> dict[str, list[str]]:
    """The flags of the AVX2 and the AVX-512 build, from setup.py."""
    for line in ast.parse((ROOT / "setup.py").read_text()).body:
        match line:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=flags):
                named = zip((x.id for x in names), ast.literal_eval(flags), strict=True)
                return {name: simd.split() for name, simd in named}
    raise AssertionError("setup.py has no flags of builds")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("build", builds())
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_simd_loop_is_vectorised(source: Path, build: str) -> None:
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    command = [COMPILER, *flags, *builds()[build], "-fopt-info-vec-all", "-c", source.name]
    done = subprocess.run(
        [*command, "-o", "/dev/null"], cwd=source.parent, capture_output=True, text=True
    )
    if "unrecognized" in done.stderr:  # another architecture, or a clang by that name
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr
    width = {"AVX2": 32, "AVX512": 64}[build]
    where = rf"^{source.name}:(\d+):.*"
    vectors = rf"{where} vectorized using {width} byte"
    done_at, missed = (
        {int(line) for line in re.findall(report, done.stderr, re.MULTILINE)}
        for report in (vectors, rf"{where} couldn't vectorize loop")
    )
    lines = source.read_text().splitlines()
    marked = [i for i, line in enumerate(lines, 1) if line.startswith("#pragma omp simd")]
    scalar = [i for i in marked if not done_at & set(range(i, i + 5)) or missed & {i, i + 1}]
    assert marked and not scalar, f"{source.name}: the loops at {scalar}"
