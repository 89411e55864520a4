"""Lists of tiles for dual-chunk attention: what a program or block does, none across a chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _cut(start: int, stop: int, chunk: int, size: int) -> list[tuple[int, int]]:
    """(first, count) pieces of tokens [start, stop), of at most `size`, none across a chunk."""
    pieces = []
    while start < stop:
        end = min(start + size, (start // chunk + 1) * chunk, stop)
        pieces.append((start, end - start))
        start = end
    return pieces


def query_tiles(
    cu_q: Sequence[int], cu_k: Sequence[int], offset: int, chunk: int, size: int
) -> Tensor:
    """(tiles, 4) int32: first row of q, rows, first token, the sequence's first row of k.

    The last tiles see the most keys and come first.
    """
    tiles = [
        (q + token - offset, rows, token, k)
        for q, end, k in zip(cu_q, cu_q[1:], cu_k, strict=False)
        for token, rows in _cut(offset, offset + end - q, chunk, size)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)


def key_tiles(
    cu_q: Sequence[int], cu_k: Sequence[int], offset: int, chunk: int, size: int
) -> Tensor:
    """(tiles, 6) int32: first row of k, rows, first token, the sequence's first row of q, the token
    of that row, queries. The first tiles are seen by the most queries."""
    tiles = [
        (k + token, rows, token, q, offset, q_end - q)
        for q, q_end, k, k_end in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
        for token, rows in _cut(0, k_end - k, chunk, size)
    ]
    tiles.sort(key=lambda tile: tile[2])
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 6)
