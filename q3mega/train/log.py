"""A stage's record: one JSON line a step, samples to read, points of curves.

A resume cuts all three back to the step that it goes on from, so a run that was killed leaves the
record of one that was not.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from q3mega.data.batch import Sample
from q3mega.io import to_json, whole_records


class Log:
    """metrics.jsonl, samples.jsonl and points.jsonl of one stage; only rank 0 writes."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.started = time.monotonic()
        self.writes = dist.get_rank() == 0

    def resume(self, step: int) -> None:
        """Drop lines after `step`: the steps behind them will run again."""
        if self.writes:
            for name in ("metrics.jsonl", "samples.jsonl", "points.jsonl"):
                path = self.folder / name
                kept = [row for row in whole_records(path) if row.get("step", math.inf) <= step]
                path.write_text("".join(to_json(row) + "\n" for row in kept), encoding="utf-8")

    def step(self, step: int, **metrics: float) -> None:
        """One line of metrics.jsonl."""
        seconds = round(time.monotonic() - self.started, 2)
        values = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        self._write(
            "metrics.jsonl", {"step": step, "total": self.total, "seconds": seconds, **values}
        )

    def sample(self, step: int, **fields: Any) -> None:
        """One line of samples.jsonl."""
        self._write("samples.jsonl", {"step": step, **fields})

    def point(self, step: int, **fields: Any) -> None:
        """One line of points.jsonl: an evaluation on the way."""
        self._write("points.jsonl", {"step": step, **fields})

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self.writes:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(to_json(row) + "\n")


def size(samples: Sequence[Sample], prefix: str = "") -> dict[str, float]:
    """tokens, and pairs of a query and a key it sees: a forward pass's cost is linear in both."""
    return {
        f"{prefix}tokens": float(sum(map(len, samples))),
        f"{prefix}pairs": sum(len(s) ** 2 for s in samples) / 2,
    }
