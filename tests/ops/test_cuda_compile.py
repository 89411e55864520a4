"""The CUDA kernels as nvcc compiles them for Hopper: nothing spilt, tensor cores at work.

Skipped without nvcc; without a disassembler (Triton brings one) the instructions go unseen.
"""

import cubin
import pytest

SHARED_LIMIT = 232_448  # bytes that a block can have on an H100
PRODUCTS = {"forward", "query_gradient", "key_gradient"}


@pytest.mark.slow
def test_compiled_for_hopper() -> None:
    if cubin.tool("nvcc") is None:
        pytest.skip("no nvcc in CUDA_HOME, on the PATH or among the installed packages")
    kernels = cubin.cuda_kernels()
    assert {name.split()[0] for name in kernels} > PRODUCTS
    for name, found in kernels.items():
        assert (found.spilled, found.stack) == (0, 0), name
        assert found.shared <= SHARED_LIMIT, name
        assert not found.serialised, name
        if cubin.tool("nvdisasm"):
            assert found.local == 0, name
            assert bool(found.hgmma) == (name.split()[0] in PRODUCTS), name
