"""`q3mega curate`: raw text -> labels -> no copies, no evaluation text -> a mixture -> tokens.

Shards are the unit of work, and of what is kept of a run that is cut: whoever starts it again in
the same folder gets, byte for byte, what it would have written at once.

    OUT/config.json plan.json       what was asked for, and the inputs it was asked of
    OUT/documents/N.parquet, .json  text and labels of shard N, and what its first pass dropped
    OUT/sketches/N.bin              MinHash signatures
    OUT/duplicates.npy              which documents go, of all shards
    OUT/evaluation.npz              hashes of what training must not hold
    OUT/tokens/N.*                  tokens of shard N, and what its second pass dropped
    OUT/dataset/{train,heldout}.*   .bin and .idx for megatron-core, labels as .parquet
    OUT/manifest.json               counts of every step, checksums; written last
    OUT/timings.json                seconds by step, of the last run alone
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from pyarrow import parquet

from q3mega.curate import duplicates
from q3mega.curate.config import Config, changed
from q3mega.curate.contamination import EvalNgramIndex, evaluation_texts
from q3mega.curate.dataset import Encoder, assemble
from q3mega.curate.document import total
from q3mega.curate.files import alone, sha256
from q3mega.curate.progress import followed
from q3mega.curate.sources import Shard, shards
from q3mega.curate.steps import label_shard, token_shard
from q3mega.errors import UserError
from q3mega.io import atomic_write, read_json, write_json

Seconds = defaultdict[str, float]  # by step
LABELS = ("source", "language", "domain", "quality")  # that the manifest counts tokens by


def curate(config: Config, out: Path, workers: int = 2) -> dict[str, Any]:
    """Run what is not done yet of a curation and return its manifest."""
    with alone(out):
        plan = _plan(config, out)
        if (out / "manifest.json").exists():
            return read_json(out / "manifest.json")
        seconds: Seconds = defaultdict(float)
        pieces = [Shard(**shard) for shard in plan["shards"]]
        with _Pool(workers) as pool:
            todo = [(config, out, i, piece) for i, piece in enumerate(pieces)]
            _add(seconds, pool.each("label", label_shard, out / "documents", todo))
            with _timed(seconds, "near copies"):
                starts = _duplicates(config, out, len(pieces))
            jobs = [(config, out, i, start) for i, start in enumerate(starts)]
            _add(seconds, pool.each("tokenise", token_shard, out / "tokens", jobs))
        with _timed(seconds, "assemble"):
            tokens = out / "tokens"
            assemble(tokens, len(pieces), out / "dataset", config.lengths, config.seed)
        with _timed(seconds, "manifest"):
            manifest = _manifest(config, out, plan, len(pieces))
        write_json(out / "timings.json", dict(seconds))
        write_json(out / "manifest.json", manifest)
        return manifest


def _plan(config: Config, out: Path) -> dict[str, Any]:
    """The shards, and hashes of what else is read; UserError if OUT was begun with other ones."""
    encoder = Encoder(config.tokenizer)
    tokenizer = Path(config.tokenizer.path) / "tokenizer.json"
    cut = [
        s
        for each in config.sources
        for s in shards(each.name, each.glob, each.text, config.shard_mb)
    ]
    texts = evaluation_texts(config.decontamination, config.shard_mb)
    limits = config.decontamination
    forbidden, short = EvalNgramIndex.of(texts, limits.words, limits.shortest)
    plan = {
        "shards": [asdict(s) for s in cut],
        "tokenizer": {
            "sha256": sha256(tokenizer),
            "vocab_size": encoder.vocab_size,
            "end": encoder.end,
        },
        "evaluation": {
            "texts": len(texts),
            "too_short": short,
            "sha256": hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest(),
        },
    }
    settled = config.settled()
    if (out / "plan.json").exists():
        before = read_json(out / "config.json")
        if not (out / "manifest.json").exists():  # the last step's, which may find too little text
            before["lengths"] = settled["lengths"]
        if difference := changed(before, settled):
            raise UserError(
                f"--out {out} was begun with another config: {difference}; use a new folder"
            )
        if difference := changed(read_json(out / "plan.json"), plan):
            raise UserError(
                f"--out {out} was begun with other inputs: {difference}; use a new folder"
            )
    write_json(out / "config.json", settled)
    with atomic_write(out / "evaluation.npz") as partial:
        forbidden.write(partial)
    write_json(out / "plan.json", plan)
    return plan


def _duplicates(config: Config, out: Path, shards: int) -> list[int]:
    """Look for near copies in all shards; the numbers of the shards' first documents."""
    files = [out / "sketches" / f"{i:05d}.bin" for i in range(shards)]
    if not (out / "duplicates.npy").exists():
        with atomic_write(out / "duplicates.npy") as partial:
            verdict = duplicates.find(files, config.duplicates.threshold, out / "keys.partial")
            with partial.open("wb") as file:
                np.save(file, verdict)
    sizes = [f.stat().st_size // duplicates.SKETCH.itemsize for f in files]
    return np.cumsum([0, *sizes])[:-1].tolist()


def _manifest(config: Config, out: Path, plan: dict[str, Any], shards: int) -> dict[str, Any]:
    """What went in, what each step left and dropped, what came out."""
    books = [
        read_json(out / folder / f"{i:05d}.json")
        for folder in ("documents", "tokens")
        for i in range(shards)
    ]
    written = {}
    for name in ("train", "heldout"):
        table = parquet.read_table(out / "dataset" / f"{name}.parquet", columns=[*LABELS, "tokens"])
        written[name] = {"documents": len(table), "tokens": sum(table["tokens"].to_pylist())} | {
            label: {
                row[label]: row["tokens_sum"]
                for row in table.group_by(label)
                .aggregate([("tokens", "sum")])
                .sort_by(label)
                .to_pylist()
            }
            for label in LABELS
        }
    files = sorted(p for p in (out / "dataset").iterdir() if not p.name.startswith("."))
    settled = json.dumps(config.settled(), sort_keys=True)
    return {
        "config_sha256": hashlib.sha256(settled.encode()).hexdigest(),
        "tokenizer": plan["tokenizer"],
        "evaluation": plan["evaluation"],
        "shards": shards,
        "steps": total(books),
        "written": written,
        "files": {
            str(f.relative_to(out)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files
        },
    }


def table(manifest: dict[str, Any]) -> str:
    """The steps of a manifest as lines of text."""
    lines = [f"{'step':<14}{'documents':>12}{'MB':>10}  dropped"]
    for name, row in manifest["steps"].items():
        if row["dropped"] or name == "read":
            dropped = ", ".join(f"{reason} {n}" for reason, n in row["dropped"].items())
            left, size = row["out"]["documents"], row["out"]["bytes"] / 1e6
            lines.append(f"{name:<14}{left:>12}{size:>10.1f}  {dropped}")
    for name, row in manifest["written"].items():
        lines.append(f"{name:<14}{row['documents']:>12}  {row['tokens']} tokens")
    return "\n".join(lines)


def _add(seconds: Seconds, more: dict[str, float]) -> None:
    for name, value in more.items():
        seconds[name] += value


@contextmanager
def _timed(seconds: Seconds, name: str) -> Iterator[None]:
    began = perf_counter()
    yield
    seconds[name] += perf_counter() - began


class _Pool:
    """Processes that do a pass, a shard each at a time, and end with this one."""

    def __init__(self, workers: int) -> None:
        # Spawned: a fork of a process whose libraries have threads may hang.
        context = multiprocessing.get_context("spawn")
        self._others = set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(workers, context, initializer=_begin)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind:  # what it is about should be read now, and not when the last shard is done
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.terminate()
        self._executor.shutdown(cancel_futures=True)

    def each(
        self,
        what: str,
        work: Callable[..., dict[str, float]],
        folder: Path,
        arguments: Sequence[tuple[Any, ...]],
    ) -> dict[str, float]:
        """Seconds by step of the shards that were not done."""
        todo = [a for i, a in enumerate(arguments) if not (folder / f"{i:05d}.json").exists()]
        seconds: Seconds = defaultdict(float)
        futures = [self._executor.submit(work, *a) for a in todo]
        try:
            for future in followed(what, as_completed(futures), len(futures)):
                _add(seconds, future.result())
        except BrokenProcessPool:
            raise UserError(
                f"a worker of the step {what} was killed, of memory perhaps: start again, "
                "with fewer --workers"
            ) from None
        return seconds


def _begin() -> None:
    """In a new worker: one thread each, no life after the parent's, which answers a Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
