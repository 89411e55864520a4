"""Raw text in every format, whole and broken, cut anywhere."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from q3mega.curate import sources
from q3mega.curate.sources import MalformedRow, Row, Shard, rows, shards, zstd
from q3mega.errors import UserError

TEXTS = ["one", "zwei\nZeilen", "三 \u2028", "", "last \\ one"]
LINES = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(pattern: Path | str, field: str = "text") -> list[str | None]:
    return [row.text for s in shards("s", str(pattern), field, 64) for row in rows(s, field)]


def write(path: Path) -> Path:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    match path.suffix.lower():
        case ".jsonl":
            path.write_bytes(LINES)
        case ".gz":
            path.write_bytes(gzip.compress(LINES))
        case ".xz":
            path.write_bytes(lzma.compress(LINES))
        case ".bz2":
            path.write_bytes(bz2.compress(LINES))
        case ".zst":
            path.write_bytes(pa.compress(LINES, "zstd", asbytes=True))
        case ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table, 2)
    return path


FORMATS = [
    "x.jsonl",
    "x.JSONL",
    "x.jsonl.gz",
    "x.jsonl.zst",
    "x.jsonl.xz",
    "x.jsonl.bz2",
    "x.parquet",
    "x.arrow",
]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_texts(tmp_path, name):
    assert read(write(tmp_path / name)) == TEXTS


def test_a_glob_reads_files_by_name_and_a_folder_stands_for_its_arrow_files(tmp_path):
    (tmp_path / "saved").mkdir()
    write(tmp_path / "saved" / "data-00000-of-00001.arrow")
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "b.txt").write_text("plain\n\ntext", encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"packed")
    assert read(tmp_path / "*") == ["packed", "plain\n\ntext", *TEXTS]


PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_members_of_a_compressed_file_are_read_one_after_the_other(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES[:40]) + PACK[suffix](LINES[40:]))
    assert read(path) == TEXTS


def test_zstd_may_have_a_long_window(tmp_path):
    long = {zstd.CompressionParameter.window_log: 28}
    path = tmp_path / "x.jsonl.zst"
    packer = zstd.ZstdCompressor(options=long)  # a stream, whose frame does not tell its size
    path.write_bytes(packer.compress(LINES) + packer.flush())
    assert read(path) == TEXTS


def test_a_text_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))
    assert read(tmp_path / "a.jsonl") == TEXTS
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf\n")
    assert read(tmp_path / "b.jsonl") == []
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "c.txt").write_bytes("\ufeffzwei 三".encode(encoding))
        assert read(tmp_path / "c.txt") == ["zwei 三"]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_strings_come_in_several_types(tmp_path, kind):
    column = pa.array(["a", None, "a"]).cast(pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    table = pa.table({"text": column})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as w:
        w.write_table(table)
    parquet.write_table(table, tmp_path / "x.parquet")
    for name in ("x.arrow", "x.parquet"):
        assert read(tmp_path / name) == ["a", None, "a"]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.binary(), pa.null()])
def test_a_column_without_strings_is_named(tmp_path, kind):
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": pa.array([None], kind)}), path)
    with pytest.raises(UserError, match=r"x\.parquet: column 'text' holds .*, not strings"):
        read(path)


@pytest.mark.parametrize("more", [b"{}\n", b""])
def test_a_file_that_changes_while_it_is_read_ends_the_run(tmp_path, more):
    path = write(tmp_path / "x.jsonl")
    (shard,) = shards("s", str(path), "text", 64)
    stream = rows(shard, "text")
    next(stream)
    path.write_bytes(LINES + more if more else LINES[:-9])
    with pytest.raises(UserError, match=rf"x\.jsonl has .* bytes, and had {len(LINES)}"):
        list(stream)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=12), max_size=8), st.integers(1, 40), st.booleans())
def test_each_line_is_in_one_shard_wherever_the_cuts_fall(tmp_path_factory, texts, most, ends):
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    raw = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode(
        "utf-8", "surrogatepass"
    )
    path.write_bytes(raw + b"\n" * ends)
    size = path.stat().st_size
    pieces = [Shard("s", str(path), size, at, min(size, at + most)) for at in range(0, size, most)]
    assert [r.text for piece in pieces for r in rows(piece, "text")] == texts


def test_parquet_is_cut_by_row_groups(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet")
    pieces = list(sources._cut("s", path, "text", 1))
    assert [(p.start, p.stop) for p in pieces] == [(0, 1), (1, 2), (2, 3)]
    assert [r.text for p in pieces for r in rows(p, "text")] == TEXTS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "no_json"),
        (b"[" * 100_000, "no_json"),
        (b'"text"', "no_field"),
        (b'{"txt": "a"}', "no_field"),
        (b'{"text": null}', "no_text"),
        (b'{"text": 3}', "no_text"),
        (b'{"text": "\xff"}', "invalid_utf8"),
    ],
)
def test_a_bad_row_is_counted_by_its_reason(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    (shard,) = shards("s", str(path), "text", 1)
    found = list(rows(shard, "text"))
    assert found == [Row(1, "good"), Row(3, None, reason), Row(4, "good")]
    lenient, strict = MalformedRow(shard, "text", 0.34), MalformedRow(shard, "text", 0.3)
    for row in found:
        lenient.count(row)
        strict.count(row)
    lenient.check()
    with pytest.raises(UserError, match=r"x\.jsonl row 3 .*; 1 of 3 .*malformed=0\.3"):
        strict.check()


def test_a_bad_row_is_found_in_the_file_from_any_shard(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10 + b"bad\n")
    size = path.stat().st_size
    for start in (0, 1, 13, 14, 15, 100, 140):
        shard = Shard("s", str(path), size, start, size)
        strict = MalformedRow(shard, "text", 0.0)
        for row in rows(shard, "text"):
            strict.count(row)
        with pytest.raises(UserError, match="row 11 is not JSON"):
            strict.check()


@pytest.mark.parametrize(
    "name", ["x.jsonl.gz", "x.jsonl.zst", "x.jsonl.xz", "x.jsonl.bz2", "x.parquet", "x.arrow"]
)
@pytest.mark.parametrize("how", ["cut", "garbled"])
def test_a_broken_file_ends_the_run_by_name(tmp_path, name, how):
    path = write(tmp_path / name)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if how == "cut" else b"garble" * (len(raw) // 6))
    with pytest.raises(UserError, match=rf"{name}.* is broken or cut short"):
        read(path)


def test_a_row_that_is_too_long_is_a_bad_one_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 50)
    path = tmp_path / "x.jsonl"
    long = json.dumps({"text": "x" * 200}).encode()
    path.write_bytes(long + b'\n{"text": "good"}\n')
    assert read(path) == [None, "good"]
    (shard,) = shards("s", str(path), "text", 1)
    assert next(rows(shard, "text")) == Row(1, None, "too_long")
    (tmp_path / "x.txt").write_text("x" * 51)
    with pytest.raises(UserError, match=r"x\.txt: a \.txt file is one document"):
        read(tmp_path / "x.txt")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"web: glob='.*/none.*' finds no file"):
        shards("web", str(tmp_path / "none*"), "text", 64)
    (tmp_path / "x.csv").write_text("text")
    with pytest.raises(UserError, match=r"x\.csv: unknown format"):
        read(tmp_path / "x.csv")
    write(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has no column 'body', only id, text"):
        read(tmp_path / "x.parquet", "body")
    with pytest.raises(UserError, match=r"x\.parquet: column 'id' holds int64, not strings"):
        read(tmp_path / "x.parquet", "id")
