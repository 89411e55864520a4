"""Tokens out: megatron-core indexed datasets, for training and for held-out losses.

Workers tokenise shards into plain arrays; one process then puts them together with megatron-core's
builder, chooses by length for the long-context step, and writes each piece's labels beside it.
`Curated` reads a finished dataset for a recipe's mixture (`curated:FOLDER`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray
from pyarrow import parquet

from q3mega.curate.config import Lengths, TokenizerFolder
from q3mega.curate.document import LABELS, Document
from q3mega.curate.files import sha256
from q3mega.data.ngrams import mixed
from q3mega.data.tokenizer import text_encoder
from q3mega.errors import UserError
from q3mega.io import atomic_write, read_json

_LABEL_TYPES = [(n, pa.float32() if n == "education" else pa.string()) for n in LABELS]
# What the tokenised shards keep of each document.
TOKENISED = pa.schema(
    [*_LABEL_TYPES, ("identity", pa.uint64()), ("copies", pa.int32()), ("heldout", pa.bool_()),
     ("tokens", pa.int64())]
)  # fmt: skip
_WRITTEN = pa.schema([*_LABEL_TYPES, ("tokens", pa.int64())])
_PART = 1 << 18  # characters of a text that are tokenised at once
_SHARE = 1 << 16  # pieces whose labels are written at once


class Encoder:
    """Token ids of documents, each with its end. The spelling of a control token is text.

    Raises UserError when the folder holds no readable tokenizer.json, or that lacks the end token.
    """

    def __init__(self, folder: TokenizerFolder) -> None:
        self._tokenizer = text_encoder(folder.path)
        end = self._tokenizer.token_to_id(folder.document_end)
        if end is None:
            raise UserError(f"tokenizer.document_end={folder.document_end!r} is no token of it")
        self.end = end

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer has."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if len(texts) == 1 and len(texts[0]) > _PART:
            parts = [self._ids([part])[0] for part in _parts(texts[0])]
            return [np.concatenate([*parts, [self.end]]).astype(np.int32)]
        if any(len(text) > _PART for text in texts):
            return [self([text])[0] for text in texts]
        return [np.append(ids, np.int32(self.end)) for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]


def _parts(text: str) -> Iterator[str]:
    """A long text in parts, since the library takes 300 bytes a token while it is at work.

    They end with a line that another one follows directly: there no pre-tokenizer of the GPT-2
    and Qwen kind has a word, so the tokens are those of the whole text.
    """
    start = 0
    for line in re.finditer(r"\S\n(?=\S)", text):
        if line.end() - start >= _PART:
            yield text[start : line.end()]
            start = line.end()
    yield text[start:]


def tokenised(documents: Sequence[Document], tokens: Sequence[NDArray[np.int32]]) -> pa.Table:
    """The TOKENISED rows of documents."""
    columns = {n: [getattr(d, n) for d in documents] for n in TOKENISED.names if n != "tokens"}
    return pa.table(columns | {"tokens": [len(t) for t in tokens]}, TOKENISED)


@dataclass
class Pieces:
    """Pieces of documents in the order of the shards: their document, place and length in tokens.

    shard, row, start, length: (P,) int64; start counts from the shard's first token.
    """

    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Pieces":
        """The pieces at these indices."""
        return Pieces(self.shard[index], self.row[index], self.start[index], self.length[index])


def assemble(folder: Path, shards: int, out: Path, lengths: Lengths | None, seed: int) -> None:
    """Write out/train.{bin,idx,parquet} and out/heldout.* from the tokenised shards in `folder`.

    Raises UserError where nothing is left, or too little of a length that `lengths` asks for.
    """
    columns = ["tokens", "copies", "heldout", "identity"]
    tables = [
        parquet.read_table(folder / f"{i:05d}.parquet", columns=columns) for i in range(shards)
    ]
    count, heldout, identity = (
        np.concatenate([t[name].to_numpy() for t in tables])
        for name in ("copies", "heldout", "identity")
    )
    documents = _documents([t["tokens"].to_numpy() for t in tables])
    pieces = (
        documents if lengths is None else _cut(documents, max(b.longest for b in lengths.bands))
    )
    first = np.cumsum([0, *(len(t) for t in tables)])
    of = first[pieces.shard] + pieces.row  # the document's number
    train = np.flatnonzero(~heldout[of])
    train = np.repeat(train, count[of[train]])
    held = np.flatnonzero(heldout[of])
    if lengths:
        order = mixed(identity[of] ^ mixed(np.array([seed], np.uint64)))
        train = _by_length(pieces.length, train, order, lengths)
        inside = [
            (pieces.length >= b.shortest) & (pieces.length <= b.longest) for b in lengths.bands
        ]
        held = held[np.any(inside, axis=0)[held]]
    if not len(train):
        raise UserError("no document is left to train on: OUT/documents/*.json count why")
    for name, index in (("train", train), ("heldout", held)):
        _write(folder, pieces.take(index), out / name)


def _documents(tokens: Sequence[NDArray[np.int64]]) -> Pieces:
    length = np.concatenate(tokens)
    shard = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
    row = np.concatenate([np.arange(len(t)) for t in tokens])
    start = np.concatenate([np.cumsum(t) - t for t in tokens])
    return Pieces(shard, row, start, length)


def _cut(documents: Pieces, longest: int) -> Pieces:
    """Documents of more than `longest` tokens as several pieces, the last one shorter."""
    parts = -(-documents.length // longest)
    index = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    pieces = documents.take(index)
    pieces.start = pieces.start + part * longest
    pieces.length = np.minimum(pieces.length - part * longest, longest)
    return pieces


def _by_length(
    length: NDArray[np.int64],
    train: NDArray[np.int64],
    order: NDArray[np.uint64],
    lengths_wanted: Lengths,
) -> NDArray[np.int64]:
    """Of the pieces `train`, a draw that has each band's share of the tokens."""
    chosen = []
    for index, band in enumerate(lengths_wanted.bands):
        n = length[train]
        here = train[(n >= band.shortest) & (n <= band.longest)]
        here = here[np.argsort(order[here], kind="stable")]
        need, total = int(band.share * lengths_wanted.tokens), np.cumsum(length[here])
        if not len(total) or total[-1] < need:
            raise UserError(
                f"lengths.bands.{index}: documents of {band.shortest} to {band.longest} tokens "
                f"have {total[-1] if len(total) else 0} tokens in all, {need} are needed: "
                "lower lengths.tokens or add long text"
            )
        chosen.append(here[: np.searchsorted(total, need) + 1])
    return np.sort(np.concatenate(chosen))


def _write(folder: Path, pieces: Pieces, prefix: Path) -> None:
    """One indexed dataset, and a row of labels for each of its documents."""
    from q3mega import device  # noqa: F401

    # isort: split
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    bin_path, idx_path, labels_path = (
        prefix.with_suffix(suffix) for suffix in (".bin", ".idx", ".parquet")
    )
    with (
        atomic_write(bin_path) as bins,
        atomic_write(idx_path) as idx,
        atomic_write(labels_path) as labels,
    ):
        builder = IndexedDatasetBuilder(str(bins), dtype=np.int32)
        with parquet.ParquetWriter(labels, _WRITTEN, compression="zstd") as table:
            for shard in np.unique(pieces.shard):
                selected = pieces.take(np.flatnonzero(pieces.shard == shard))
                stem = folder / f"{shard:05d}"
                tokens = np.memmap(stem.with_suffix(".bin"), np.int32, mode="r")
                for start, length in zip(
                    selected.start.tolist(), selected.length.tolist(), strict=True
                ):
                    piece = torch.from_numpy(tokens[start : start + length].copy())
                    builder.add_document(piece, [length])
                rows = parquet.read_table(stem.with_suffix(".parquet")).select(LABELS)
                for i in range(0, len(selected.row), _SHARE):
                    some = rows.take(selected.row[i : i + _SHARE])
                    column = pa.array(selected.length[i : i + _SHARE])
                    table.write_table(some.append_column("tokens", column))
        builder.finalize(str(idx))


class Curated:
    """A finished curation, as a recipe's mixture reads it.

    Raises UserError for a folder without one, or without the texts that are asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise UserError(f"curated:{folder} has no manifest.json: run q3mega curate to its end")
        self.tokenizer = read_json(self.folder / "manifest.json")["tokenizer"]

    def check_tokenizer(self, path: Path) -> None:
        """Raise UserError unless the folder `path` holds the tokenizer of this curation."""
        if sha256(path / "tokenizer.json") != self.tokenizer["sha256"]:
            raise UserError(
                f"curated:{self.folder} was made with another tokenizer than {path}: "
                "give the recipe that one as tokenizer.path"
            )

    def data(self, heldout: bool = False) -> Any:
        """megatron-core's IndexedDataset of the documents, each with its end token."""
        from q3mega import device  # noqa: F401

        # isort: split
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        data = IndexedDataset(str(self.folder / "dataset" / ("heldout" if heldout else "train")))
        if not len(data):
            raise UserError(f"curated:{self.folder} holds out no document: curate with heldout > 0")
        return data

    def token_documents(self, seed: int, heldout: bool = False) -> Iterator[list[int]]:
        """The documents in another order each time round, without end."""
        data, rng = self.data(heldout), np.random.default_rng(seed)
        while True:
            for i in rng.permutation(len(data)):
                yield data[i].tolist()

    def documents(self, seed: int, heldout: bool = False) -> Iterator[str]:
        """The same as text."""
        spec = read_json(self.folder / "config.json")["tokenizer"]
        tokenizer = tokenizers.Tokenizer.from_file(f"{spec['path']}/tokenizer.json")
        for ids in self.token_documents(seed, heldout):
            text = ids[:-1] if ids[-1] == self.tokenizer["end"] else ids
            yield tokenizer.decode(text, skip_special_tokens=False)
