"""Raw text in: JSON lines, Parquet, Arrow and plain text, compressed or not, as rows of shards.

A shard is a piece of one file that a worker reads alone: a range of bytes of plain JSON lines, some
row groups of a Parquet file, and the whole of any other file. A row that cannot be read is counted
by its reason; a file that is broken ends the run, since nobody knows what it held.
"""

import bz2
import codecs
import glob
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from q3mega.config.section import one_line, short
from q3mega.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LONGEST = 8 << 20  # bytes of a row: the steps need some fifty times as much memory
FORMATS = (".jsonl", ".txt", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_LONG_WINDOW: dict[int, int] = {
    zstd.DecompressionParameter.window_log_max: 31
}  # of zstd --long: 2 GiB at most
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, pa.ArrowException)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Shard:
    """A piece of a file: bytes [start, stop) of plain JSON lines, or row groups of Parquet."""

    source: str
    path: str
    bytes: int  # of the file, which must stay as it is
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """A text, or why there is none. place: the line or row number, from 1, in the shard."""

    place: int
    text: str | None
    reason: str = ""


def shards(name: str, pattern: str, field: str, shard_mb: int) -> list[Shard]:
    """The files of a glob, in order of their names, cut up; UserError where one cannot be read."""
    paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    files = [f for p in paths for f in (sorted(p.rglob("*.arrow")) if p.is_dir() else [p])]
    if not files:
        raise UserError(f"{name}: glob={pattern!r} finds no file here: check it")
    return [shard for file in files for shard in _cut(name, file, field, shard_mb << 20)]


def format_of(path: Path) -> tuple[str, str]:
    """(format, compression) by the name; UserError for any other."""
    *_, before, last = ["", "", *map(str.lower, path.suffixes)]
    kind, packed = (before, last) if last in _COMPRESSED else (last, "")
    kind = ".jsonl" if kind in (".ndjson", ".json") else kind
    if kind not in FORMATS or (packed and kind in (".parquet", ".arrow")):
        raise UserError(
            f"{path}: unknown format: use {', '.join(FORMATS)}; the first two may end in "
            f"{', '.join(_COMPRESSED)}"
        )
    return kind, packed


def _cut(source: str, path: Path, field: str, most: int) -> Iterator[Shard]:
    kind, packed = format_of(path)
    size = path.stat().st_size
    if kind == ".parquet":
        with _readable(path), parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, field)
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        start = 0
        for i in range(len(sizes)):
            if sum(sizes[start : i + 1]) >= most or i + 1 == len(sizes):
                yield Shard(source, str(path), size, start, i + 1)
                start = i + 1
    elif kind == ".jsonl" and not packed:
        for start in range(0, size, most):
            yield Shard(source, str(path), size, start, min(size, start + most))
    else:
        yield Shard(source, str(path), size, 0, size)


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _check_column(path: Path, schema: pa.Schema, field: str) -> None:
    if field not in schema.names:
        raise UserError(f"{path} has no column {field!r}, only {', '.join(schema.names)}")
    if schema.names.count(field) > 1:
        raise UserError(f"{path} has several columns {field!r}: rename all but one")
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(test(kind) for test in _STRINGS):
        raise UserError(f"{path}: column {field!r} holds {kind}, not strings")


class _readable:
    """Turns what the libraries raise about a broken file into one line; `place` says how far."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, 0

    def __enter__(self) -> "_readable":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, _BROKEN):
            where = f" after line {self.place}" if self.place else ""
            why = one_line(str(error)) or kind.__name__
            raise UserError(f"{self.path}{where} is broken or cut short ({why})") from None


def rows(shard: Shard, field: str) -> Iterator[Row]:
    """The rows of a shard, in order; those that cannot be read with their reason."""
    path = Path(shard.path)
    kind, packed = format_of(path)
    with _readable(path) as reading, _unchanged(path, shard.bytes):
        if kind == ".txt":
            yield _whole_file(path, packed)
        elif kind == ".jsonl":
            with _open(path, packed) as file:
                for number, line in _lines(file, shard, packed):
                    reading.place = number
                    yield _from_json(number, line, field)
        else:
            for number, value in enumerate(_column(path, kind, shard, field), 1):
                yield _from_value(number, value)


@contextmanager
def _unchanged(path: Path, size: int) -> Iterator[None]:
    """A shard is bytes or row groups of the file as it was: of another it would be other text."""

    def check() -> None:
        if (now := path.stat().st_size) != size:
            raise UserError(
                f"{path} has {now} bytes, and had {size} when the run began: "
                "let nothing write to it, and begin in a new folder"
            )

    check()
    yield
    check()


def _open(path: Path, packed: str) -> BinaryIO:
    if packed == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if packed == ".xz":
        return lzma.open(path)  # type: ignore[return-value]
    if packed == ".bz2":
        return bz2.open(path)  # type: ignore[return-value]
    if packed == ".zst":
        return zstd.open(path, options=_LONG_WINDOW)  # type: ignore[return-value]
    return path.open("rb")


def _whole_file(path: Path, packed: str) -> Row:
    with _open(path, packed) as file:
        raw = file.read(LONGEST + 1)
    if len(raw) > LONGEST:
        raise UserError(f"{path}: a .txt file is one document, of {LONGEST >> 20} MiB at most")
    try:
        return _from_value(1, raw.decode("utf-16" if raw.startswith(_UTF16) else "utf-8"))
    except UnicodeDecodeError:
        return Row(1, None, "invalid_utf8")


def _lines(file: BinaryIO, shard: Shard, packed: str) -> Iterator[tuple[int, bytes | None]]:
    """Lines that begin in the shard; None for one that is longer than LONGEST."""
    at = shard.start
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1  # the line that began before is another shard's
    number = 0
    while packed or at < shard.stop:
        line = file.readline(LONGEST)
        if not line:
            return
        at += len(line)
        piece, number, long = line, number + 1, False
        while len(piece) == LONGEST and not piece.endswith(b"\n"):
            piece = file.readline(LONGEST)
            at += len(piece)
            long = long or bool(piece)
        if number == 1 and not shard.start:
            line = line.removeprefix(codecs.BOM_UTF8)
        if long:
            yield number, None
        elif line.strip():
            yield number, line


def _from_json(number: int, line: bytes | None, field: str) -> Row:
    if line is None:
        return Row(number, None, "too_long")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Row(number, None, "invalid_utf8")
    except (ValueError, RecursionError):
        return Row(number, None, "no_json")
    if not isinstance(row, dict) or field not in row:
        return Row(number, None, "no_field")
    return _from_value(number, row[field])


def _from_value(number: int, value: Any) -> Row:
    if isinstance(value, UnicodeDecodeError):
        return Row(number, None, "invalid_utf8")
    if not isinstance(value, str):
        return Row(number, None, "no_text")
    return Row(number, value)


def _column(path: Path, kind: str, shard: Shard, field: str) -> Iterator[Any]:
    """Values of one column; a string that is no UTF-8 as the error about it."""
    if kind == ".parquet":
        with parquet.ParquetFile(path) as file:
            groups = list(range(shard.start, shard.stop))
            for batch in file.iter_batches(64, row_groups=groups, columns=[field]):
                yield from _strings(batch.column(0))
    else:
        with pa.memory_map(str(path)) as mapped:
            for batch in _batches(path, mapped, field):
                yield from _strings(batch.column(field))


def _batches(path: Path, mapped: pa.MemoryMappedFile, field: str) -> Iterator[pa.RecordBatch]:
    """Of Arrow's two formats: the stream that `datasets` saves, and the file, which Feather is."""
    magic = mapped.read(6)
    mapped.seek(0)
    if magic == b"ARROW1":
        with pa.ipc.open_file(mapped) as file:
            _check_column(path, file.schema, field)
            yield from map(file.get_batch, range(file.num_record_batches))
    else:
        with pa.ipc.open_stream(mapped) as stream:
            _check_column(path, stream.schema, field)
            yield from stream


def _strings(column: pa.Array) -> Iterator[Any]:
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield error


class MalformedRow:
    """Counts a shard's rows and stops the run when too many of them cannot be read."""

    def __init__(self, shard: Shard, field: str, share: float) -> None:
        self.shard, self.field, self.share = shard, field, share
        self.rows, self.bad, self.first = 0, 0, Row(0, None)

    def count(self, row: Row) -> None:
        """Count a row, and keep the first one without text."""
        self.rows += 1
        if row.text is None:
            self.bad += 1
            self.first = self.first if self.bad > 1 else row

    def check(self) -> None:
        """Raise UserError with the first bad row's file and line."""
        book = format_of(Path(self.shard.path))[0] == ".txt"  # of one row there is no share
        if (book and self.share) or self.bad <= self.share * self.rows:
            return
        number = self.first.place
        if format_of(Path(self.shard.path)) == (".jsonl", ""):
            with open(self.shard.path, "rb") as file:
                left = max(0, self.shard.start - 1)
                while chunk := file.read(min(left, 1 << 20)):
                    number += chunk.count(b"\n")
                    left -= len(chunk)
                number += bool(self.shard.start and file.readline())
        why = {
            "no_json": "is not JSON",
            "no_field": f"has no field {short(self.field)}",
            "no_text": f"has no string in {short(self.field)}",
            "invalid_utf8": "is not UTF-8",
            "too_long": f"is longer than {LONGEST >> 20} MiB",
        }[self.first.reason]
        raise UserError(
            f"{self.shard.path} row {number} {why}; {self.bad} of {self.rows} rows cannot be read, "
            f"more than malformed={self.share}"
        )
