"""What a run shows while it goes: one line a stage, from the stages' own records."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from q3mega.config.recipe import Recipe

_PLAIN_LINE_SECONDS = 15.0


def _at_work(folder: Path) -> Path:
    """The stage's folder, or that part of it (a student, a comparison) whose record is newest."""
    written = [p for p in (folder, *folder.iterdir()) if (p / "metrics.jsonl").exists()]
    return max(written, key=lambda p: (p / "metrics.jsonl").stat().st_mtime_ns, default=folder)


def recent_metrics(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl that count steps, at most twenty, oldest first."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines[-21:]:
        with suppress(ValueError):  # cut at either end
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def _speed(records: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second over the steps between the first and the last record."""
    try:
        seconds = records[-1]["seconds"] - records[0]["seconds"]
        tokens = sum(record["tokens"] for record in records[1:])
    except (IndexError, KeyError):
        return ""
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""  # < 0: resumed in between


class Progress:
    """One line a stage: a live table on a terminal, a line now and then elsewhere."""

    def __init__(self, recipe: Recipe) -> None:
        self.rows = {stage: ["waiting"] for stage in recipe.stages}
        self.started: dict[str, float] = {}
        self.state: dict[str, str] = {}
        self.printed = 0.0
        console = Console()
        # What rich takes for a terminal may be a file, into which FORCE_COLOR wants colour.
        terminal = sys.stdout.isatty() and not console.is_dumb_terminal
        # No refresh thread: forking with threads about is asking for trouble.
        self.live = Live(console=console, auto_refresh=False) if terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def tell(self, text: str) -> None:
        """One line beside the table."""
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def show(self, stage: str, folder: Path, state: str) -> None:
        """Show what a stage does now; `state` is a word for it."""
        now = time.monotonic()
        elapsed = now - self.started.setdefault(stage, now)
        part = _at_work(folder)
        records = recent_metrics(part)
        last = records[-1] if records else {}
        name = "" if part == folder else f"{part.name} "
        row = [f"{name}{last['step']}/{last.get('total', '?')}" if last else ""]
        for key in ("reward", "loss"):
            if isinstance(value := last.get(key), int | float):
                row.append(f"{key} {value:.4f}")
                break
        else:
            row.append("")
        row.append(_speed(records))
        row.append("" if state == "done before" else f"{elapsed:.0f} s")
        self.rows[stage] = [state, *row]
        if self.live:
            self.live.update(self._table(), refresh=True)
        elif state != self.state.get(stage) or now - self.printed > _PLAIN_LINE_SECONDS:
            self.printed = now
            print(f"{stage}:", *filter(None, self.rows[stage]), sep="  ", flush=True)
        self.state[stage] = state

    def _table(self) -> Table:
        table = Table("stage", "state", "step", "last", "speed", "time", box=None)
        for stage, row in self.rows.items():
            table.add_row(stage, *row)
        return table
