"""The GPU kernels as they are compiled for Hopper: nothing spilt, tensor cores at work.

docs/benchmarks/compiled.md has the table of what is asserted here.
"""

import compiled
import cubin
import pytest

SHARED_LIMIT = 232_448  # bytes that a block can have on an H100
PRODUCTS = {"forward", "query_gradient", "key_gradient"}


def sound(actual: cubin.Compiled) -> bool:
    return (actual.spilled, actual.stack, actual.local) == (
        0,
        0,
        0,
    ) and actual.shared <= SHARED_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", compiled.cases())
def test_triton(name: str) -> None:
    actual = compiled.compiled(compiled.cases()[name])
    assert sound(actual), actual
    assert bool(actual.hgmma) == (name.startswith("attention") and name.endswith("bf16"))


@pytest.mark.slow
def test_cuda() -> None:
    kernels = cubin.cuda_kernels()
    assert {name.split()[0] for name in kernels} > PRODUCTS
    for name, actual in kernels.items():
        assert sound(actual) and not actual.serialised, (name, actual)
        assert bool(actual.hgmma) == (name.split()[0] in PRODUCTS), name
