"""A stage's record: one JSON line a step, samples to read, both cut back to where a resume begins."""

import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Log:
    """metrics.jsonl and samples.jsonl of one stage; only rank 0 writes."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total
        self.started = time.monotonic()
        self.writes = dist.get_rank() == 0

    def resume(self, step: int) -> None:
        """Drop lines after `step`: the steps behind them will run again."""
        if self.writes:
            for name in ("metrics.jsonl", "samples.jsonl"):
                path = self.folder / name
                lines = path.read_text().splitlines() if path.exists() else []
                kept = [line for line in lines if _step(line) <= step]
                path.write_text("".join(line + "\n" for line in kept))

    def step(self, step: int, **metrics: float) -> None:
        seconds = round(time.monotonic() - self.started, 2)
        values = {k: float(f"{v:.6g}") for k, v in metrics.items()}
        self._write("metrics.jsonl", {"step": step, "total": self.total, "seconds": seconds, **values})

    def sample(self, step: int, **fields: Any) -> None:
        self._write("samples.jsonl", {"step": step, **fields})

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self.writes:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # half-written by a process that was killed
