"""Megabytes a second and memory of every step of `q3mega curate`, on mixed text made here.

    python benchmarks/curate.py [--megabytes 100] [--workers 2] [--folder DIR]

The text: sentences, code and translations of q3mega.data.package_text, put together anew with
words exchanged, as plain and compressed JSON lines and Parquet; among it copies, near copies (3 %
of the words exchanged), documents that hold an evaluation question, pages that the rules should
drop.
Seconds are of the worker that spends them, so a step's speed is that of one core, as loaded as the
machine is; memory is the highest sum of the processes' proportional set sizes.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import yaml
from pyarrow import parquet

from q3mega.data import package_text
from q3mega.data.tokenizer import train_tokenizer
from q3mega.problems import generate

VOCABULARY = 16_384
FILES = ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
COPIES, NEAR, PLANTED, JUNK = 0.04, 0.06, 0.002, 0.05  # shares of the documents
RECENT = 2000  # documents that a copy is taken from
Row = dict[str, str]


def pools() -> dict[str, list[str]]:
    """Lines to make documents of: one pool a language, and code in pieces of some lines."""
    texts: dict[str, list[str]] = {}
    for source in package_text.sources().values():
        for document in package_text.documents(source.name):
            if source.kind == "code":
                pieces = document.split("\n\n")
            else:
                pieces = [p.strip() for p in document.replace(". ", ".\n").split("\n")]
            texts.setdefault(source.language, []).extend(p for p in pieces if len(p) > 20)
    return texts


def documents(rng: random.Random, counts: Counter[str]) -> Iterator[str]:
    """Mixed documents without end; what was planted is counted."""
    lines = pools()
    words = {name: [w for line in pool for w in line.split()] for name, pool in lines.items()}
    names = list(lines)
    weights = [12 if n == "English" else 4 if n == "Python" else 1 for n in names]
    questions = [p.question for p in generate("chain_sum", 100, seed=0, heldout=True)]
    recent: list[str] = []
    while True:
        chance = rng.random()
        (name,) = rng.choices(names, weights)
        if chance < COPIES and recent:
            counts["copies"] += 1
            yield rng.choice(recent)
        elif chance < COPIES + NEAR and recent:
            counts["near copies"] += 1
            yield exchanged(rng.choice(recent), words[name], rng, 0.03)
        elif chance < COPIES + NEAR + JUNK:
            counts["junk"] += 1
            yield "Log in. Sign up! Click here... " * rng.randint(1, 30)
        else:
            size = int(min(60_000, rng.lognormvariate(7.6, 0.9)))
            part: list[str] = []
            while sum(map(len, part)) < size:
                part.append(exchanged(rng.choice(lines[name]), words[name], rng, 0.15))
            if chance > 1 - PLANTED:
                counts["evaluation texts"] += 1
                part.insert(rng.randrange(len(part)), rng.choice(questions).upper())
            made = ("\n\n" if name == "Python" else "\n").join(part)
            if chance < 0.5 and chance <= 1 - PLANTED:
                recent = [*recent[-RECENT + 1 :], made] if len(made) > 500 else recent
            yield made


def exchanged(line: str, words: list[str], rng: random.Random, share: float) -> str:
    """The line with a share of its words exchanged; spaces and line ends stay."""
    parts = line.split(" ")
    for _ in range(round(len(parts) * share + rng.random() - 0.5)):
        parts[rng.randrange(len(parts))] = rng.choice(words)
    return " ".join(parts)


def make(folder: Path, megabytes: int) -> dict[str, int]:
    """Write the files, as many bytes of text in each; how much was planted."""
    counts: Counter[str] = Counter()
    source = documents(random.Random(0), counts)
    size = 0
    for name in FILES:
        write, close = writer(folder / name)
        limit = size + megabytes * 1_000_000 // len(FILES)
        while size < limit:
            document = next(source)
            size += len(document.encode())
            counts["documents"] += 1
            write(document)
        close()
    sample = (d for d, _ in zip(documents(random.Random(1), Counter()), range(1500), strict=False))
    train_tokenizer(sample, VOCABULARY, folder / "tokenizer")
    config = {
        "sources": [
            {"name": n.split(".")[0], "glob": str(folder / n), "licence": "mixed"} for n in FILES
        ],
        "tokenizer": {"path": str(folder / "tokenizer")},
        "mixture": [
            {"domain": "code", "weight": 1.5},
            {"quality": "low", "weight": 0.5},
            {"domain": "mathematics", "quality": "high", "weight": 2},
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return dict(counts)


def writer(path: Path) -> tuple[Callable[[str], object], Callable[[], object]]:
    """How to write a document to a file, and how to close it."""
    if path.suffix == ".parquet":
        schema = pa.schema([("text", pa.string())])
        table, pending = parquet.ParquetWriter(path, schema), list[str]()

        def flush() -> None:
            table.write_table(pa.table({"text": pending}, schema))
            pending.clear()

        def add(document: str) -> None:
            pending.append(document)
            if len(pending) == 5000:
                flush()

        return add, lambda: (flush(), table.close())
    if path.suffix == ".zst":
        file = pa.output_stream(str(path), compression="zstd")
    elif path.suffix == ".gz":
        file = gzip.GzipFile(path, "wb", 4)
    else:
        file = path.open("wb")

    def line(document: str) -> None:
        file.write(json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n")

    return line, file.close


def run(folder: Path, workers: int) -> tuple[float, float]:
    """(seconds, peak GiB) of the command."""
    command = [sys.executable, "-m", "q3mega", "curate", str(folder / "config.yaml")]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [*command, "--out", str(folder / "out"), "--workers", str(workers)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - began, peak / 2**30


def resident(pid: int) -> int:
    """Bytes of the process and its children, shared pages counted once."""
    try:
        process = psutil.Process(pid)
        return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        planted = make(folder, arguments.megabytes)
        print("planted:", planted)
        seconds, peak = run(folder, arguments.workers)
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        timings = json.loads((folder / "out" / "timings.json").read_text())
    steps = manifest["steps"]
    size = steps["read"]["in"]["bytes"] / 1e6
    print(
        "| step | documents in | out | MB in | seconds | MB/s a core |\n|---|---|---|---|---|---|"
    )
    for name, spent in timings.items():
        row = steps.get(name)
        shown = (row["in"]["documents"], row["out"]["documents"]) if row else ("", "")
        # Passes without books of their own take what the step before left.
        came = row["in"]["bytes"] / 1e6 if row else size
        print(
            "|",
            name,
            *(f"| {n}" for n in shown),
            f"| {came:.0f} | {spent:.1f} | {came / spent:.1f} |",
        )
        size = row["out"]["bytes"] / 1e6 if row else size
    total = steps["read"]["in"]["bytes"] / 1e6
    print(f"{total:.0f} MB in {seconds:.0f} s: {total / seconds:.2f} MB/s; peak {peak:.2f} GiB")
    print("dropped:", {name: row["dropped"] for name, row in steps.items() if row["dropped"]})


if __name__ == "__main__":
    main()
