"""The ledger: every rollout's end, also when the trainer is killed on the way there."""

import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from q3mega.errors import UserError
from q3mega.io import whole_records
from q3mega.problems import generate
from q3mega.rollout import Completion
from q3mega.train.ledger import FILE, Balance, Ledger
from q3mega.train.rollouts import Rollout

DRILL = Path(__file__).parents[1] / "helpers" / "rl_ranks.py"
STEPS, A_STEP = 5, 16
# two updates a step: within the second, and between rollout and update of the fourth
KILLS = [["after", 3], ["before", 7]]
SCHEDULES = {"synchronous": {}, "one_step_off": {"staleness": 1}}


def batch(n: int, problem: str = "p") -> list[Rollout]:
    return [
        Rollout([1], Completion([2], [-0.5], [1], "stop"), i // 2, i / 7, problem=f"{problem}{i}")
        for i in range(n)
    ]


def rows(path: Path) -> list[tuple]:
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM rollouts ORDER BY step, position").fetchall()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / FILE, writes=True)


def test_every_rollout_is_in_one_state(ledger: Ledger) -> None:
    ledger.drawn(1, batch(6))
    assert ledger.balance() == Balance(6, 0, {}, 6)
    ledger.dropped(1, {0: "equal rewards", 1: "equal rewards", 4: "over-long"})
    ledger.used(1, 1, [2, 3])
    assert ledger.balance() == Balance(6, 2, {"equal rewards": 2, "over-long": 1}, 1)


def test_a_rollout_that_cannot_be_judged_has_no_reward(ledger: Ledger) -> None:
    (rollout,) = batch(1)
    ledger.drawn(1, [replace(rollout, reward=None)])
    ledger.resume(0, {1: [replace(rollout, reward=None)]})
    ledger.dropped(1, {0: "unjudged: refused"})
    assert [row[6] for row in rows(ledger.path)] == [None]
    assert ledger.balance().dropped == {"unjudged: refused": 1}


def test_a_prompt_is_in_flight_until_its_rollouts_are_drawn(ledger: Ledger) -> None:
    problems = generate("chain_sum", 3, seed=0)
    ledger.begun(1, problems)
    ledger.begun(2, problems)
    assert ledger.balance() == Balance(0, 0, {}, 0, in_flight=6)
    ledger.drawn(1, batch(6))
    assert ledger.balance() == Balance(6, 0, {}, 6, in_flight=3)
    with sqlite3.connect(ledger.path) as connection:
        left = connection.execute("SELECT problem, task FROM in_flight WHERE step = 2").fetchall()
    assert left == [(p.id, p.family) for p in problems]
    ledger.resume(1, {})  # a cut run draws them again
    assert ledger.balance() == Balance(6, 0, {}, 6)


@pytest.mark.parametrize("places", [[0, 1], [1, 7]])
def test_what_is_not_pending_is_not_used_and_nothing_else_changes(
    ledger: Ledger, places: list[int]
) -> None:
    ledger.drawn(1, batch(3))
    ledger.used(1, 1, [0])
    before = rows(ledger.path)
    with pytest.raises(AssertionError, match="1 of 2 rollouts of step 1"):
        ledger.used(1, 2, places)
    assert rows(ledger.path) == before


def test_a_resume_goes_back_to_what_the_checkpoint_knows(ledger: Ledger) -> None:
    ahead = batch(2, "ahead")
    for step in (1, 2):
        ledger.drawn(step, batch(4))
        ledger.used(step, step, [0, 1])
        ledger.dropped(step, {2: "over-long", 3: "over-long"})
    known = rows(ledger.path)
    ledger.drawn(3, ahead)
    ledger.used(3, 3, [0, 1])
    ledger.resume(2, {})
    assert rows(ledger.path) == known
    ledger.resume(2, {3: ahead})
    ledger.resume(2, {3: ahead})  # a cut between this and the first step changes nothing
    assert ledger.balance() == Balance(10, 4, {"over-long": 4}, 2)
    assert [row[3] for row in rows(ledger.path)[-2:]] == ["ahead0", "ahead1"]
    ledger.resume(0, {})
    assert ledger.balance() == Balance(0, 0, {}, 0)


def test_only_the_writing_rank_writes(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "none.sqlite", writes=False)
    other.drawn(1, batch(2))
    other.used(1, 1, [0])
    other.resume(0, {})
    assert not other.path.exists()


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(UserError, match=f"{FILE} cannot be read or written"):
        Ledger(tmp_path / FILE, writes=True)


FULL = """
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
from q3mega.errors import UserError
from q3mega.train.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), writes=True)
batch = [SimpleNamespace(group=0, problem="p", task="", versions=[0], reward=0.0)] * 500
ledger.drawn(1, batch)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size,) * 2)
try:
    ledger.drawn(2, batch)
except UserError as error:
    print(error)
"""


def test_a_full_disk_takes_back_the_whole_change_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "free some disk space" in done.stdout and done.returncode == 0, done.stderr
    assert Ledger(tmp_path / FILE, writes=False).balance() == Balance(500, 0, {}, 500)


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each schedule an uncut run, one killed twice and resumed, and what a kill has left."""
    folder = tmp_path_factory.mktemp("drill")
    plan = [("uncut", None), *(("cut", kill) for kill in KILLS), ("cut", None), ("left", KILLS[1])]
    cases = [
        [str(folder / f"{name}-{end}"), STEPS, settings, kill]
        for name, settings in SCHEDULES.items()
        for end, kill in plan
    ]
    done = subprocess.run(
        [sys.executable, str(DRILL), json.dumps(cases)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-signal.SIGKILL if kill else 0 for *_, kill in cases]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "ahead"), [("synchronous", 0), ("one_step_off", 1)])
def test_a_kill_between_rollout_and_update_leaves_batches_pending(
    drilled: Path, schedule: str, ahead: int
) -> None:
    found = Ledger(drilled / f"{schedule}-left" / FILE, writes=False).balance()
    assert found.drawn == (4 + ahead) * A_STEP
    # of the fourth batch the prompt without a signal is dropped already
    assert found.pending == A_STEP - 4 + ahead * A_STEP
    assert found.drawn == found.used + sum(found.dropped.values()) + found.pending


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_that_sampled_are_those_that_the_schedule_says(
    drilled: Path, schedule: str
) -> None:
    """Two updates a step, all of them with a signal: a batch is one step's updates old, or none."""
    late = schedule == "one_step_off"
    for step, _, _, _, _, versions, *_, used_by, _ in rows(drilled / f"{schedule}-cut" / FILE):
        assert json.loads(versions) == [2 * max(0, step - 1 - late)]
        assert used_by is None or used_by in (2 * step - 1, 2 * step)
    gaps = [
        row["logprob_mismatch"]
        for row in whole_records(drilled / f"{schedule}-cut" / "metrics.jsonl")
    ]
    assert gaps[0] < 1e-5  # the behaviour's log-probabilities stay those of the older weights
    assert all((gap > 1e-3) == late for gap in gaps[1:])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kills_change_neither_weights_nor_ledger(drilled: Path, schedule: str) -> None:
    uncut, cut = (drilled / f"{schedule}-{end}" for end in ("uncut", "cut"))
    weights = "hf/model.safetensors"
    assert (uncut / weights).read_bytes() == (cut / weights).read_bytes()
    assert rows(uncut / FILE) == rows(cut / FILE)
    found = Ledger(cut / FILE, writes=False).balance()
    assert found.drawn == STEPS * A_STEP and found.pending == 0
    assert found.drawn == found.used + sum(found.dropped.values())
    assert found.dropped["equal rewards"] >= STEPS * 4
    # each rollout under its own problem's name, each step's share once
    problems = [(row[0], row[3]) for row in rows(cut / FILE)]
    assert problems == [(s, f"{s}-{g}") for s in range(1, 6) for g in range(4) for _ in range(4)]
