"""The GPU kernels as they are compiled for Hopper: nothing spilt, tensor cores at work.

docs/benchmarks/compiled.md has the table of what is asserted here.
"""

import compiled
import cubin
import pytest

SHARED_LIMIT = 232_448  # bytes that a block can have on an H100
PRODUCTS = {"forward", "query_gradient", "key_gradient"}


def sound(found: cubin.Compiled) -> bool:
    return (found.spilled, found.stack, found.local) == (0, 0, 0) and found.shared <= SHARED_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.cases())
def test_triton(name: str) -> None:
    found = compiled.compiled(compiled.cases()[name])
    assert sound(found), found
    assert bool(found.hgmma) == (name.startswith("attention") and name.endswith("bf16"))


@pytest.mark.slow
def test_cuda() -> None:
    kernels = cubin.cuda_kernels()
    assert {name.split()[0] for name in kernels} > PRODUCTS
    for name, found in kernels.items():
        assert sound(found) and not found.serialised, (name, found)
        assert bool(found.hgmma) == (name.split()[0] in PRODUCTS), name
