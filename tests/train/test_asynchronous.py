"""The asynchronous schedule: two ranks learn while servers in processes of their own sample."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from q3mega.io import whole_records
from q3mega.train.ledger import FILE, Ledger

HELPERS = Path(__file__).parents[1] / "helpers"
SERVER = HELPERS / "token_server.py"
STEPS, UPDATES, A_STEP, STALENESS = 6, 2, 12, 2
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def urls():
    """Two servers that take 60 ms a token, so that the weights change under what they sample."""
    servers = [
        subprocess.Popen(
            [sys.executable, str(SERVER), "sglang", str(seed), "0.06"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for seed in (6, 7)
    ]  # fmt: skip
    try:
        yield [server.stdout.readline().strip() for server in servers]
    finally:
        for server in servers:
            server.kill()
            server.wait()


def learn(folder: Path, urls: list[str], kill: int = 0) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [str(HELPERS / "async_rl_ranks.py"), str(folder), str(STALENESS), str(kill), *urls]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory, urls):
    folder = tmp_path_factory.mktemp("beside")
    done = learn(folder, urls)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def rows(folder: Path) -> list[tuple]:
    with sqlite3.connect(folder / FILE) as connection:
        return connection.execute(
            "SELECT step, problem, versions, state FROM rollouts ORDER BY step, position"
        ).fetchall()


def test_no_token_is_learnt_from_with_another_versions_log_probability(run):
    _, found = run
    assert found["apart"] < 1e-4
    assert all(sum(n for _, n in r["weights"]) == r["length"] for r in found["rollouts"])


def test_what_is_under_way_goes_on_under_new_weights(run):
    folder, found = run
    assert any(len(r["weights"]) > 1 for r in found["rollouts"])
    known = {}
    for step, _, versions, _ in rows(folder):
        known.setdefault(step, []).append(json.loads(versions))
    for step in range(1, STEPS + 1):
        said = [
            sorted({v for v, _ in r["weights"]}) for r in found["rollouts"] if r["step"] == step
        ]
        assert known[step] == said


def test_weights_are_as_old_as_allowed_and_some_are_old(run):
    folder, found = run
    for r in found["rollouts"]:
        oldest = min(version for version, _ in r["weights"])
        assert UPDATES * max(0, r["step"] - 1 - STALENESS) <= oldest <= UPDATES * (r["step"] - 1)
    stale = [row["staleness"] for row in whole_records(folder / "metrics.jsonl")]
    assert len(stale) == STEPS and stale[0] == 0
    assert all(0 < s <= UPDATES * STALENESS for s in stale[2:])


def balanced(folder: Path) -> None:
    """Every prompt of every step once, all of it used or dropped."""
    found = Ledger(folder / FILE, writes=False).balance()
    assert found.drawn == STEPS * A_STEP == found.used + sum(found.dropped.values())
    assert found.pending == found.in_flight == 0
    problems = [(step, problem) for step, problem, *_ in rows(folder)]
    assert problems == [
        (s, f"{s}-{g}") for s in range(1, STEPS + 1) for g in range(3) for _ in range(4)
    ]
    assert [row["step"] for row in whole_records(folder / "metrics.jsonl")] == list(
        range(1, STEPS + 1)
    )


def test_the_ledger_balances(run):
    balanced(run[0])


def test_a_killed_run_goes_on_and_its_ledger_balances(tmp_path, urls):
    """Before the second update of the fourth step; the checkpoint is the second's."""
    killed = learn(tmp_path, urls, kill=8)
    assert killed.returncode != 0 and f"exitcode  : -{signal.SIGKILL.value}" in killed.stderr
    left = Ledger(tmp_path / FILE, writes=False)
    with sqlite3.connect(left.path) as connection:
        under_way = connection.execute("SELECT step, problem FROM in_flight").fetchall()
    # those ahead, of which the fifth batch may have come to its end
    assert under_way[-3:] == [(6, f"6-{g}") for g in range(3)]
    assert left.balance().in_flight == len(under_way) in (3, 6)
    done = learn(tmp_path, urls)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["apart"] < 1e-4
    balanced(tmp_path)
