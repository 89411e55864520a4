"""Triton kernels, one file an operator, and what other backends share with them; installed as
q3mega.kernels.

They take and return tensors on one device, contiguous, and check nothing: `q3mega.ops` does.
"""

DIVERGENCES = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
}  # of divergence, as every kernel counts them
MAX_BLOCK_COLUMNS = 4096  # columns of a row that a program of eight warps holds at once


def block_columns(columns: int) -> int:
    """Columns a block: a power of two, no more than a program holds."""
    return max(16, min(MAX_BLOCK_COLUMNS, 1 << (columns - 1).bit_length()))
