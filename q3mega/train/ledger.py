"""The ledger of an RL stage: what became of every rollout, from draw to gradient, in SQLite.

A prompt is in flight while it is sampled. Its rollouts are pending when they are sampled and
scored, then used (by which optimizer update) or dropped (why): their reward reaches no gradient.
One that could not be judged has no reward.
Every change is one durable transaction that comes before the checkpoint that knows of it, so a
resume only has to take back what came after.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from q3mega.errors import UserError

if TYPE_CHECKING:  # the report reads ledgers without torch
    from q3mega.problems import Problem
    from q3mega.train.rollouts import Rollout

FILE = "ledger.sqlite"
# The default journal with a sync a commit: unlike a write-ahead log it also works on NFS.
_IN_FLIGHT = """
CREATE TABLE IF NOT EXISTS in_flight (
  step INTEGER NOT NULL, prompt INTEGER NOT NULL, problem TEXT NOT NULL, task TEXT NOT NULL,
  PRIMARY KEY (step, prompt)
) WITHOUT ROWID
"""
_ROLLOUTS = """
CREATE TABLE IF NOT EXISTS rollouts (
  step INTEGER NOT NULL, position INTEGER NOT NULL,  -- of the rollout batch, in the batch
  prompt INTEGER NOT NULL, problem TEXT NOT NULL, task TEXT NOT NULL,
  versions TEXT NOT NULL,  -- JSON: updates before each set of weights that sampled it
  reward REAL,
  state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'used', 'dropped')),
  used_by INTEGER, why TEXT,
  PRIMARY KEY (step, position),
  CHECK ((state = 'used') = (used_by IS NOT NULL) AND (state = 'dropped') = (why IS NOT NULL))
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Balance:
    """Numbers of rollouts: drawn = used + sum(dropped) + pending. dropped: reason -> how many.
    in_flight: prompts that are being sampled, or were when the run was cut."""

    drawn: int
    used: int
    dropped: Mapping[str, int]
    pending: int
    in_flight: int = 0


class Ledger:
    """One stage's ledger at `path`, made if missing; without `writes` every change does nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes
        if writes:
            with self._transaction() as table:
                table.execute(_ROLLOUTS)
                table.execute(_IN_FLIGHT)

    def resume(self, step: int, ahead: "Mapping[int, Sequence[Rollout]]") -> None:
        """Back to the checkpoint of `step`, which holds the batches of later steps in `ahead`."""
        if self.writes:
            with self._transaction() as table:
                table.execute("DELETE FROM in_flight")
                table.execute("DELETE FROM rollouts WHERE step > ?", (step,))
                for later, rollouts in ahead.items():
                    _insert(table, later, rollouts)

    def begun(self, step: int, problems: "Sequence[Problem]") -> None:
        """The batch of `step` is being sampled, a prompt for each problem."""
        if self.writes:
            with self._transaction() as table:
                table.executemany(
                    "INSERT INTO in_flight VALUES (?, ?, ?, ?)",
                    ((step, i, p.id, p.family) for i, p in enumerate(problems)),
                )

    def drawn(self, step: int, rollouts: "Sequence[Rollout]") -> None:
        """The batch of `step` is pending; a rollout's position in it is its name from here on."""
        if self.writes:
            with self._transaction() as table:
                table.execute("DELETE FROM in_flight WHERE step = ?", (step,))
                _insert(table, step, rollouts)

    def used(self, step: int, update: int, positions: Sequence[int]) -> None:
        """Optimizer update number `update` of the stage, from 1, has learnt from these."""
        self._settle("used", step, dict.fromkeys(positions, update), "used_by")

    def dropped(self, step: int, why: Mapping[int, str]) -> None:
        """These, by position, teach nothing, and why."""
        self._settle("dropped", step, why, "why")

    def balance(self) -> Balance:
        """What stands in the file now."""
        with self._transaction() as table:
            states = table.execute(
                "SELECT state, why, COUNT(*) FROM rollouts GROUP BY 1, 2 ORDER BY 2"
            )
            counts = {(state, why): n for state, why, n in states}
            ((in_flight,),) = table.execute("SELECT COUNT(*) FROM in_flight")
        return Balance(
            drawn=sum(counts.values()),
            used=counts.get(("used", None), 0),
            dropped={why: n for (state, why), n in counts.items() if state == "dropped"},
            pending=counts.get(("pending", None), 0),
            in_flight=in_flight,
        )

    def _settle(self, state: str, step: int, values: Mapping[int, int | str], column: str) -> None:
        if not self.writes:
            return
        change = (
            f"UPDATE rollouts SET state = '{state}', {column} = ? WHERE step = ? AND position = ?"
        )
        with self._transaction() as table:
            rows = ((value, step, position) for position, value in values.items())
            changed = table.executemany(f"{change} AND state = 'pending'", rows).rowcount
            if values and changed != len(values):  # one was never drawn, or already has its end
                raise AssertionError(
                    f"{changed} of {len(values)} rollouts of step {step} were pending"
                )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; a connection each, so that none is open while others read or copy."""
        try:
            connection = sqlite3.connect(self.path, timeout=60)
            try:
                connection.execute("PRAGMA synchronous = FULL")
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"ledger {self.path} cannot be read or written ({error}): free some disk space, or "
                "move a damaged file away; the stage then counts from its checkpoint on"
            ) from None


def _insert(table: sqlite3.Connection, step: int, rollouts: "Sequence[Rollout]") -> None:
    table.executemany(
        "INSERT INTO rollouts (step, position, prompt, problem, task, versions, reward) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (step, position, r.group, r.problem, r.task, json.dumps(r.versions), r.reward)
            for position, r in enumerate(rollouts)
        ),
    )
