"""Triton kernels, one file an operator, and tables that other backends share with them; installed
as q3mega.kernels.

A kernel takes and returns contiguous tensors on one device and checks nothing: `q3mega.ops` does.
"""

# Divergence -> its number in every kernel: `enum Divergence` in csrc, KIND in Triton.
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
MAX_BLOCK_COLUMNS = 4096  # columns of a row that a program of eight warps holds at once


def block_columns(columns: int) -> int:
    """Columns of a block: a power of two that a program can hold."""
    return max(16, min(MAX_BLOCK_COLUMNS, 1 << (columns - 1).bit_length()))
