"""Copies and near copies among a million documents, in bounded memory: the first of each stays.

Every document leaves a MinHash signature of its word n-grams on disk. Those that agree in one of 32
bands of four rows are candidates: a band's keys are sorted, a band at a time, and equal neighbours
are compared by the share of the 128 rows that agree, an estimate of the Jaccard similarity with a
standard error below 0.05. A document goes when it is near an earlier one that stays, so that no
chain of small changes drops what resembles nothing that is kept.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from q3mega.curate.document import Document
from q3mega.data.ngrams import Words, mixed

ROWS, BANDS = 128, 32
REASONS = ("", "copy", "near_copy")
# What a document leaves for the search: 520 bytes.
SKETCH = np.dtype([("identity", "<u8"), ("signature", "<u4", (ROWS,))])
# A document is compared with so many before it in a run of equal keys, and with the run's first.
_BACK = 4
_CHUNK = 1 << 14  # documents, or pairs, at once
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def identify(documents: Sequence[Document]) -> None:
    """Set each document's 64-bit hash: of a million texts two share one with probability 3e-8."""
    for d in documents:
        d.identity = int.from_bytes(hashlib.blake2b(d.text.encode(), digest_size=8).digest())


def sketch(documents: Sequence[Document], n: int) -> NDArray[np.void]:
    """(D,) SKETCH of the word n-grams of documents that have their identity."""
    words = Words([d.text for d in documents])
    grams, offsets = words.grams(n)
    sketches = np.zeros(len(documents), SKETCH)
    sketches["identity"] = [d.identity for d in documents]
    short = np.flatnonzero(np.diff(offsets) == 0)
    # A text of fewer words is one gram, one without any word is its own.
    singles = [
        words.whole(i) if words.offsets[i] < words.offsets[i + 1] else sketches["identity"][i]
        for i in short.tolist()
    ]
    grams = np.insert(grams, offsets[short], np.array(singles, np.uint64))
    offsets = offsets + np.concatenate([[0], np.cumsum(np.diff(offsets) == 0)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.tolist(), ROWS, 42)
    if documents:
        sketches["signature"] = matrix.to_rows()
    return sketches


def find(files: Sequence[Path], threshold: float, work: Path) -> NDArray[np.uint8]:
    """(D,) places in REASONS, for all documents of the sketch files in their order.

    work: a file for the keys, 256 bytes a document, removed afterwards.
    """
    sizes = [file.stat().st_size // SKETCH.itemsize for file in files]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    verdict = np.zeros(starts[-1], np.uint8)
    if not len(verdict):
        return verdict
    identity = np.concatenate([np.array(_sketches(file)["identity"]) for file in files])
    _, first, group = np.unique(identity, return_index=True, return_inverse=True)
    verdict[first[group] != np.arange(len(identity))] = REASONS.index("copy")
    del identity, group
    near = _near(_Signatures(files, starts), np.flatnonzero(verdict == 0), threshold, work)
    # In the order of the later one, so that what is said of the earlier one is said for good.
    for later, earlier in zip((near >> _HALF).tolist(), (near & _LOW).tolist(), strict=True):
        if not verdict[earlier]:
            verdict[later] = REASONS.index("near_copy")
    return verdict


def _sketches(file: Path) -> NDArray[np.void]:
    if not file.stat().st_size:
        return np.zeros(0, SKETCH)
    return np.memmap(file, SKETCH, mode="r")


class _Signatures:
    """The signatures of all shards by number, read from disk as they are asked for.

    A file is open for as long as it is read: there may be more of them than a process may open.
    """

    def __init__(self, files: Sequence[Path], starts: NDArray[np.int64]) -> None:
        self.files, self.starts = files, starts

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint32]:
        block = np.empty((len(numbers), ROWS), np.uint32)
        shard = np.searchsorted(self.starts, numbers, side="right") - 1
        for s in np.unique(shard):
            here = shard == s
            sketches = _sketches(self.files[s])
            block[here] = sketches["signature"][numbers[here] - self.starts[s]]
        return block


def _near(
    signatures: _Signatures, numbers: NDArray[np.int64], threshold: float, work: Path
) -> NDArray[np.uint64]:
    """Near pairs among the documents `numbers`, later << 32 | earlier, in order."""
    similar = np.zeros(0, np.uint64)
    if not len(numbers):
        return similar
    keys = np.memmap(work, np.uint64, mode="w+", shape=(BANDS, len(numbers)))
    for i in range(0, len(numbers), _CHUNK):
        keys[:, i : i + _CHUNK] = _keys(signatures[numbers[i : i + _CHUNK]])
    for band in range(BANDS):
        pairs = _candidates(np.array(keys[band]))
        later, earlier = numbers[pairs >> _HALF], numbers[pairs & _LOW]
        pairs = np.setdiff1d(later.astype(np.uint64) << _HALF | earlier.astype(np.uint64), similar)
        for i in range(0, len(pairs), _CHUNK):
            some = pairs[i : i + _CHUNK]
            one, two = (
                signatures[(some >> _HALF).view(np.int64)],
                signatures[(some & _LOW).view(np.int64)],
            )
            similar = np.union1d(similar, some[(one == two).mean(1) >= threshold])
    del keys
    work.unlink()
    return similar


def _keys(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """(BANDS, D): one number for the four rows of each band."""
    pairs = np.ascontiguousarray(signatures).view(np.uint64).reshape(len(signatures), BANDS, 2)
    return mixed(mixed(pairs[..., 0]) + pairs[..., 1]).T


def _candidates(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pairs of equal keys, later << 32 | earlier: with the run's first and those just before."""
    order = np.argsort(keys, kind="stable").astype(np.uint64)
    rows = np.arange(len(keys))
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[order[1:]] != keys[order[:-1]]
    first = np.maximum.accumulate(np.where(begins, rows, 0))
    pairs = []
    for partner in (first, *(rows - back for back in range(1, _BACK + 1))):
        some = np.flatnonzero((partner >= first) & (partner < rows))
        pairs.append(order[some] << _HALF | order[partner[some]])
    return np.unique(np.concatenate(pairs))
