"""The whole pipeline: what comes out, what is refused, and that a cut run comes out the same."""

import gzip
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import numpy as np
import psutil
import pytest
import tokenizers
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from tokenizers import pre_tokenizers

from q3mega import cli
from q3mega.corpus import documents
from q3mega.curate import dataset
from q3mega.curate.config import Config, Lengths, TokenizerFolder
from q3mega.curate.dataset import Curated, Encoder, Pieces, _by_length, _cut
from q3mega.curate.pipeline import curate
from q3mega.data import package_text
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.errors import UserError
from q3mega.problems import generate

QUESTIONS = [p.question for p in generate("chain_sum", 20, seed=0, heldout=True)]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Real text in three files, with what must go planted among it, and a tokenizer."""
    folder = tmp_path_factory.mktemp("material")
    names = ["python_reference", "sympy_docs", "numpy_docs", "stdlib"]
    real = [(name, d) for name in names for d in package_text.documents(name)]
    random.Random(0).shuffle(real)
    real = real[:1500]
    rows = [{"text": d, "from": name} for name, d in real]
    rows += [{"text": d} for _, d in real[:50]]  # copies
    rows += [{"text": f"{d}\nAn end of its own."} for _, d in real[50:100]]  # near copies
    asked = zip(QUESTIONS, real[100:120], strict=True)
    rows += [{"text": f"{d}\n\n**{q.upper()}**"} for q, (_, d) in asked]
    random.Random(1).shuffle(rows)
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:1200]) + b"not JSON\n")
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        file.write(b"".join(lines[1200:]))
    (folder / "c.txt").write_text("\n".join(package_text.documents("year_2889")), encoding="utf-8")
    train_tokenizer((d for _, d in real[:300]), 2000, folder / "tokenizer")
    return folder


def config(material: Path, **changes) -> Config:
    raw = {
        "sources": [
            {"name": "lines", "glob": f"{material}/*.jsonl*", "licence": "mixed"},
            {"name": "books", "glob": f"{material}/*.txt", "licence": "public domain"},
        ],
        "tokenizer": {"path": f"{material}/tokenizer"},
        "shard_mb": 1,
        "heldout": 0.05,
        "mixture": [{"domain": "code", "weight": 2}, {"quality": "low", "weight": 0.5}],
    }
    return Config.model_validate(raw | changes)


@pytest.fixture(scope="module")
def curated(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    return out, curate(config(material), out)


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file() and p.name not in ("timings.json", ".lock"))
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def texts(out: Path, material: Path, name: str = "train") -> list[str]:
    tokenizer = tokenizers.Tokenizer.from_file(f"{material}/tokenizer/tokenizer.json")
    data = IndexedDataset(str(out / "dataset" / name))
    return [tokenizer.decode(d[:-1].tolist(), skip_special_tokens=False) for d in data]


def test_megatron_reads_the_documents_that_were_left(curated, material):
    out, manifest = curated
    kept = {
        d for i in range(manifest["shards"])
        for d in parquet.read_table(out / "documents" / f"{i:05d}.parquet")["text"].to_pylist()
    }  # fmt: skip
    train, held = texts(out, material), texts(out, material, "heldout")
    assert set(train) | set(held) < kept
    assert not set(train) & set(held) and len(held) == len(set(held)) > 20
    data = IndexedDataset(str(out / "dataset" / "train"))
    assert {d[-1] for d in data} == {Encoder(config(material).tokenizer).end}
    assert manifest["written"]["train"]["tokens"] == data.sequence_lengths.sum()


def test_what_was_planted_is_gone(curated, material):
    out, manifest = curated
    every = texts(out, material) + texts(out, material, "heldout")
    assert not [q for q in QUESTIONS if any(q.upper() in d for d in every)]
    steps = manifest["steps"]
    assert steps["read"]["dropped"] == {"no_json": 1}
    # Some of the planted ones fall to the quality rules first.
    assert 25 <= steps["duplicates"]["dropped"]["copy"] <= 50
    assert steps["duplicates"]["dropped"]["near_copy"] >= 25
    ended = [d for d in every if d.endswith("An end of its own.")]
    assert not {d.removesuffix("\nAn end of its own.") for d in ended} & set(every)


def test_labels_stand_beside_the_documents_and_weigh_them(curated, material):
    out, manifest = curated
    table = parquet.read_table(out / "dataset" / "train.parquet").to_pylist()
    train = texts(out, material)
    data = IndexedDataset(str(out / "dataset" / "train"))
    assert [row["tokens"] for row in table] == data.sequence_lengths.tolist()
    copies = Counter(train)
    by_label = {(r["domain"], r["quality"], copies[d]) for r, d in zip(table, train, strict=True)}
    assert {n for domain, quality, n in by_label if quality != "low"} == {1, 2}
    assert all((n == 2) == (domain == "code") for domain, q, n in by_label if q != "low")
    assert {row["licence"] for row in table} == {"mixed", "public domain"}
    domains = manifest["written"]["train"]["domain"]
    assert domains["code"] == sum(r["tokens"] for r in table if r["domain"] == "code") > 0
    assert sum(domains.values()) == manifest["written"]["train"]["tokens"]


def test_the_books_of_the_steps_add_up(curated, material):
    _, manifest = curated
    steps = list(manifest["steps"].values())
    for row in steps:
        dropped = sum(row["dropped"].values())
        assert row["in"]["documents"] - dropped == row["out"]["documents"]
    for before, after in itertools.pairwise(steps):
        assert before["out"]["documents"] == after["in"]["documents"]
    raw = sum(
        len(json.loads(line).get("text", ""))
        for line in [
            *(material / "a.jsonl").read_bytes().splitlines()[:-1],
            *gzip.decompress((material / "b.jsonl.gz").read_bytes()).splitlines(),
        ]
    )
    assert steps[0]["in"]["bytes"] >= raw


def test_the_number_of_workers_changes_nothing_and_a_second_run_does_nothing(
    curated, material, tmp_path
):
    out, manifest = curated
    assert curate(config(material), tmp_path / "other", workers=1) == manifest
    assert contents(tmp_path / "other") == contents(out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    assert curate(config(material, malformed=0.5), out) == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == times


def start(material: Path, out: Path, dies_at: str = "nowhere") -> subprocess.Popen:
    """The command; it kills itself when it is about to give a file the name `dies_at`."""
    path = out.parent / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(config(material).model_dump_json())))
    command = [sys.executable, "-c", COMMAND, dies_at, "curate", str(path), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


COMMAND = """
import os, signal, sys
def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
from q3mega.cli import main
sys.exit(main(sys.argv[2:]))
"""
# Files at whose sight the run is killed, while its workers are at work.
SIGHTS = ("documents/*.partial", "documents/*.json", "tokens/*.partial", "tokens/*.json")
RENAMES = (
    "plan.json",
    "duplicates.npy",
    "dataset/train.bin",
    "dataset/heldout.idx",
    "manifest.json",
)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(curated, material, tmp_path):
    out = tmp_path / "out"
    moments = [(RENAMES[0], ""), *(("nowhere", s) for s in SIGHTS[:2]), (RENAMES[1], "")]
    moments += [*(("nowhere", s) for s in SIGHTS[2:]), *((name, "") for name in RENAMES[2:])]
    for dies_at, sight in moments:
        process = start(material, out, dies_at)
        workers: set[psutil.Process] = set()
        while process.poll() is None:
            workers.update(psutil.Process(process.pid).children(recursive=True))
            if sight and list(out.glob(sight)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run ended before {dies_at} {sight}"
        assert not psutil.wait_procs(workers, timeout=60)[1]  # they do not outlive it
        assert not (out / "manifest.json").exists()
    process = start(material, out)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "heldout" in stdout
    assert contents(out) == contents(curated[0])


def test_one_run_at_a_time(material, tmp_path):
    process = start(material, tmp_path / "out")
    while not (tmp_path / "out" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match="another run is at work there"):
        curate(config(material), tmp_path / "out")
    process.kill()
    process.communicate()


def test_another_config_or_input_is_refused_by_name(material, tmp_path):
    for name in ("a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes((material / name).read_bytes())
    settings = {"tokenizer": {"path": f"{material}/tokenizer"}}
    out = tmp_path / "out"
    curate(config(tmp_path, **settings), out, workers=1)
    for changes, message in [
        ({"seed": 3}, r"another config: seed=3, was 0"),
        ({"rules": {"min_words": 9}}, r"another config: rules\.min_words=9, was 50"),
        ({"mixture": [{"weight": 1}]}, r"another config: mixture="),
        ({"lengths": {"tokens": 9}}, r"another config: lengths="),
    ]:
        with pytest.raises(UserError, match=message):
            curate(config(tmp_path, **settings, **changes), out)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"other inputs: shards\.0\.bytes="):
        curate(config(tmp_path, **settings), out)


def test_too_many_bad_rows_stop_the_run_in_one_line(material, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"body": "no"}\n')
    given = {
        "sources": [{"name": "bad", "glob": f"{tmp_path}/*.jsonl", "licence": "none"}],
        "tokenizer": {"path": f"{material}/tokenizer"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert cli.main(["curate", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl row 2 has no field 'text'; 1 of 2 rows" in error
    path.write_text(yaml.safe_dump(given | {"malformed": 0.5}))
    assert cli.main(["curate", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "no document is left to train on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, r"sources=\[\] is not allowed"),
        ({"seeds": 1}, "seeds=1 is not a field, the nearest is seed"),
        ({"rules": {"min_word": 3}}, r"rules\.min_word=3 is not a field, .*rules\.min_words"),
        ({"mixture": [{"domain": "poems", "weight": 1}]}, r"mixture\.0\.domain='poems'"),
        ({"mixture": [{"source": "web", "weight": 1}]}, r"mixture\.0\.source='web' is none of x"),
        ({"mixture": [{"language": "English", "weight": 1}]}, r"mixture\.0\.language='English'"),
        ({"mixture": [{"weight": -1}]}, r"mixture\.0\.weight=-1"),
        ({"duplicates": {"threshold": 0.2}}, r"duplicates\.threshold=0\.2"),
        ({"decontamination": {"words": 3}}, r"shortest=4 must not exceed words=3"),
        ({"lengths": {"tokens": 5, "bands": [{"share": 0.5, "shortest": 1, "longest": 2}]}},
         "shares must add up to 1"),
        ({"lengths": {"tokens": 5, "bands": [{"share": 0.5, "shortest": 1, "longest": 2},
                                             {"share": 0.5, "shortest": 2, "longest": 3}]}},
         "bands overlap"),
        ({"tokenizer": {"path": "nowhere"}}, r"tokenizer\.path=nowhere: no readable"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_one_line_that_names_the_field(tmp_path, changes, message, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "config.yaml"
    sources = [{"name": "x", "glob": f"{tmp_path}/x.jsonl", "licence": "CC0"}]
    path.write_text(yaml.safe_dump({"sources": sources, "tokenizer": {"path": "."}} | changes))
    with pytest.raises(UserError, match=message) as caught:
        curate(Config.load(path), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("examples/curate/*.yaml")))
def test_the_examples_load(path):
    assert Config.load(path).sources


def test_special_tokens_in_a_text_are_text(material):
    folder = TokenizerFolder(path=f"{material}/tokenizer")
    (ids,) = Encoder(folder)(["a <|im_start|> b"])
    assert Tokenizer(folder.path).id("<|im_start|>") not in ids[:-1]
    with pytest.raises(UserError, match="document_end='<eos>' is no token"):
        Encoder(TokenizerFolder(path=folder.path, document_end="<eos>"))


QWEN = (  # the released tokenizer's words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("words", ["ours", QWEN])
def test_a_long_text_has_the_tokens_that_it_has_at_once(material, tmp_path, monkeypatch, words):
    path = material / "tokenizer"
    if words == QWEN:
        whole = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        whole.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        whole.save(f"{tmp_path}/tokenizer.json")
        path = tmp_path
    texts = ["\n\n \n".join(package_text.documents(name)) for name in ("stdlib", "django_ja")]
    encoder = Encoder(TokenizerFolder(path=str(path)))
    at_once = [encoder([t[:200_000]])[0].tolist() for t in texts]
    monkeypatch.setattr(dataset, "_PART", 700)
    assert [len(list(dataset._parts(t[:200_000]))) > 20 for t in texts] == [True, True]
    assert [ids.tolist() for ids in encoder([t[:200_000] for t in texts])] == at_once


BANDS = {
    "tokens": 60_000,
    "bands": [
        {"share": 0.75, "shortest": 1024, "longest": 2048},
        {"share": 0.25, "shortest": 256, "longest": 1023},
    ],
}


def test_long_text_has_its_shares_of_the_tokens(material, tmp_path):
    given = config(material, lengths=BANDS)
    manifest = curate(given, tmp_path / "out")
    data = IndexedDataset(str(tmp_path / "out" / "dataset" / "train"))  # lengths are a view of it
    lengths = data.sequence_lengths
    long, short = (lengths[(lengths >= b.shortest) & (lengths <= b.longest)]
                   for b in given.lengths.bands)  # fmt: skip
    assert 45_000 <= long.sum() < 45_000 + 2048 and 15_000 <= short.sum() < 15_000 + 1024
    assert long.sum() + short.sum() == lengths.sum() == manifest["written"]["train"]["tokens"]


def test_too_little_long_text_is_said_and_may_be_asked_for_less(material, tmp_path):
    with pytest.raises(
        UserError, match=r"lengths\.bands\.0: documents of 1024 to 2048 tokens have \d+ .*75000000"
    ):
        curate(config(material, lengths=BANDS | {"tokens": 100_000_000}), tmp_path / "out")
    curate(config(material, lengths=BANDS), tmp_path / "out")


def test_the_reports_bands_on_made_up_lengths():
    rng = np.random.default_rng(0)
    size = rng.integers(1, 80_000, 3000)
    zeros = np.zeros(3000, np.int64)
    start = np.cumsum(size) - size
    pieces = _cut(Pieces(zeros, np.arange(3000), start, size), 32_768)
    assert pieces.length.max() == 32_768 and pieces.length.sum() == size.sum()
    assert (pieces.start[1:] == (pieces.start + pieces.length)[:-1]).all()  # nothing is left out
    order = rng.integers(0, 2**63, len(size) * 3).astype(np.uint64)
    lengths = Lengths(tokens=20_000_000)
    chosen = pieces.length[_by_length(pieces.length, np.arange(len(pieces.length)), order, lengths)]
    assert chosen.min() >= 4096
    assert chosen[chosen >= 16_384].sum() / chosen.sum() == pytest.approx(0.75, abs=0.002)
    assert chosen.sum() == pytest.approx(20_000_000, abs=2 * 32_768)


def test_a_recipe_reads_a_curated_dataset(curated, material, tmp_path):
    out, _ = curated
    kind, tokenizer = f"curated:{out}", Tokenizer(material / "tokenizer")
    mixture = {kind: 0.5, "facts": 0.5}
    documents.build(mixture, 20_000, 128, tokenizer, 0, tmp_path)
    blend = documents.Mixture(mixture, tmp_path, 10, 2000, seed=1)
    samples = [tuple(sample.tokens) for step in range(1, 11) for sample in blend(step)]
    assert max(map(len, samples)) <= 128
    data = IndexedDataset(str(out / "dataset" / "train"))
    pieces = {tuple(d[i : i + 128].tolist()) for d in data for i in range(0, len(d), 128)}
    shared = sum(len(s) for s in samples if s in pieces)
    assert shared / sum(map(len, samples)) == pytest.approx(0.5, abs=0.1)
    held = texts(out, material, "heldout")
    drawn = documents.documents(kind, 0, heldout=True)
    assert sorted(next(drawn) for _ in held) == sorted(held)


def test_a_dataset_of_another_tokenizer_is_refused(curated, material, tmp_path):
    train_tokenizer(["a b c"] * 10, 265, tmp_path / "tokenizer")
    kind = f"curated:{curated[0]}"
    with pytest.raises(UserError, match="made with another tokenizer"):
        documents.build({kind: 1.0}, 100, 64, Tokenizer(tmp_path / "tokenizer"), 0, tmp_path)
    with pytest.raises(UserError, match=r"curated:.*nothing has no manifest\.json"):
        Curated(tmp_path / "nothing")
