"""A worker's two passes over a shard, each step in its turn.

The first reads raw rows and writes labelled documents and their sketches; between the two passes
near copies are looked for among all sketches; the second writes tokens. What a pass has done it
notes last, in a .json, so that a run that is cut does it again, and does it no second time.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from q3mega.curate import duplicates, labels, mixture
from q3mega.curate.config import Config, TokenizerFolder
from q3mega.curate.contamination import EvalNgramIndex
from q3mega.curate.dataset import TOKENISED, Encoder, tokenised
from q3mega.curate.document import LABELS, Document, DropCounts, size
from q3mega.curate.sources import MalformedRow, Row, Shard, rows
from q3mega.data import package_text
from q3mega.data.language import identify
from q3mega.io import atomic_write, write_json

BATCH = 1 << 20  # characters that go through the steps together
_ROWS = 1024  # and documents, at most
DOCUMENTS = pa.schema(
    [("text", pa.string()), ("language_probability", pa.float32()), ("identity", pa.uint64())]
    + [(n, pa.float32() if n == "education" else pa.string()) for n in LABELS]
)


def normalise(documents: Sequence[Document]) -> list[str]:
    """Step: clean the text; drop what is empty then."""
    for d in documents:
        d.text = package_text.clean(d.text)
    return ["" if d.text else "empty" for d in documents]


def tell_language(documents: Sequence[Document]) -> list[str]:
    """Step: label the language; drop nothing."""
    for d in documents:
        d.language, d.language_probability = identify(d.text)
    return [""] * len(documents)


def label_shard(config: Config, out: Path, number: int, shard: Shard) -> dict[str, float]:
    """The first pass: documents/N.parquet and sketches/N.bin. Returns seconds by step."""
    books = DropCounts()
    (source,) = [s for s in config.sources if s.name == shard.source]
    malformed = MalformedRow(shard, source.text, config.malformed)
    stem = f"{number:05d}"
    table_path, sketch_path = (
        out / "documents" / f"{stem}.parquet",
        out / "sketches" / f"{stem}.bin",
    )
    with atomic_write(table_path) as table_file, atomic_write(sketch_path) as sketch_file:
        with (
            parquet.ParquetWriter(table_file, DOCUMENTS, compression="zstd") as table,
            sketch_file.open("wb") as sketches,
        ):
            for batch in _read(rows(shard, source.text), books, malformed):
                documents = [Document(t, source.name, source.licence) for t in batch]
                documents = books.run("normalise", normalise, documents)
                documents = books.run("language", tell_language, documents)
                documents = books.run("label", labels.label, documents)
                documents = books.run("quality", partial(labels.reject, config.rules), documents)
                began = perf_counter()
                duplicates.identify(documents)
                duplicates.sketch(documents, config.duplicates.words).tofile(sketches)
                books.spend("sketch", perf_counter() - began)
                began = perf_counter()
                table.write_table(_table(documents))
                books.spend("write", perf_counter() - began)
        malformed.check()
    write_json(out / "documents" / f"{stem}.json", books.steps)
    return books.seconds


def _read(stream: Iterator[Row], books: DropCounts, malformed: MalformedRow) -> Iterator[list[str]]:
    """Texts in batches; rows without one are entered by their reason."""
    batch: list[str] = []
    characters, began = 0, perf_counter()
    bad: list[str] = []
    for row in stream:
        malformed.count(row)
        if row.text is None:
            bad.append(row.reason)
            continue
        batch.append(row.text)
        characters += len(row.text)
        if characters >= BATCH or len(batch) == _ROWS:
            yield _entered(batch, bad, books, began)
            batch, bad, characters, began = [], [], 0, perf_counter()
    if batch or bad:
        yield _entered(batch, bad, books, began)


def _entered(batch: list[str], bad: list[str], books: DropCounts, began: float) -> list[str]:
    total = sum(map(size, batch))
    books.add("read", (len(batch) + len(bad), total), (len(batch), total), bad)
    books.spend("read", perf_counter() - began)
    return batch


def _table(documents: Sequence[Document]) -> pa.Table:
    columns = {n: [getattr(d, n) for d in documents] for n in DOCUMENTS.names}
    return pa.table(columns, DOCUMENTS)


def _known(verdicts: Sequence[int], documents: Sequence[Document]) -> list[str]:
    return [duplicates.REASONS[v] for v in verdicts]


@lru_cache(maxsize=1)
def _encoder(folder: TokenizerFolder) -> Encoder:
    """A worker's, which takes longer to load than a small file to tokenise."""
    return Encoder(folder)


def token_shard(config: Config, out: Path, number: int, first: int) -> dict[str, float]:
    """The second pass: tokens/N.bin and tokens/N.parquet. Returns seconds by step.

    first: the number of the shard's first document among all.
    """
    books, encoder = DropCounts(), _encoder(config.tokenizer)
    forbidden = EvalNgramIndex.read(out / "evaluation.npz")
    verdict = np.load(out / "duplicates.npy", mmap_mode="r")
    stem = f"{number:05d}"
    draw = partial(mixture.draw, config.mixture, config.seed, config.heldout)
    path = out / "tokens" / f"{stem}.parquet"
    with (
        atomic_write(path) as table_file,
        atomic_write(path.with_suffix(".bin")) as token_file,
        parquet.ParquetFile(out / "documents" / f"{stem}.parquet") as stored,
        parquet.ParquetWriter(table_file, TOKENISED, compression="zstd") as table,
        token_file.open("wb") as bins,
    ):
        for group in range(stored.num_row_groups):
            began = perf_counter()
            documents = [Document(**row) for row in stored.read_row_group(group).to_pylist()]
            books.spend("read back", perf_counter() - began)
            judged = verdict[first : first + len(documents)]
            first += len(documents)
            known = partial(_known, judged.tolist())
            documents = books.run("duplicates", known, documents)
            documents = books.run("decontaminate", forbidden.step, documents)
            documents = books.run("mixture", draw, documents)
            began = perf_counter()
            tokens = encoder([d.text for d in documents])
            for t in tokens:
                t.tofile(bins)
            table.write_table(tokenised(documents, tokens))
            books.spend("tokenise", perf_counter() - began)
    write_json(path.with_suffix(".json"), books.steps)
    return books.seconds
