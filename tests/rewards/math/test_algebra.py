"""The worker: cut, killed, shared by threads, left alone by forks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from q3mega.errors import UserError
from q3mega.rewards.math import algebra, equality
from q3mega.rewards.math.algebra import Algebra
from q3mega.sandbox import WorkerProgram, confined

PYTHON = confined.interpreter(), "-S", "-c"
RUNAWAY = "9^{9^{9^{9}}}x"  # a power in one C call, which no signal handler interrupts


@pytest.fixture
def worker():
    started = Algebra()
    yield started
    started.close()


def ask(worker, reference="2x+2", given="2(x+1)"):
    with worker.session() as same:
        return same(reference, given)


def python(worker):
    """The process that has read the text: under its launcher, and that one's keeper."""
    return psutil.Process(worker.pid).children(recursive=True)[-1]


def test_the_worker_is_kept(worker):
    assert worker.pid is None
    assert ask(worker) and not ask(worker, given="2(x+2)")
    first = worker.pid
    assert ask(worker) and worker.pid == first


def test_a_runaway_is_cut_and_the_next_call_is_right():
    worker = Algebra(seconds=2)
    assert ask(worker, "x", "x")
    first = worker.pid
    assert not ask(worker, "x", RUNAWAY)
    assert worker.pid is None  # the parent's limit killed it; nothing else ends it that soon
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert ask(worker) and worker.pid != first
    worker.close()


def test_one_session_shares_one_limit():
    worker = Algebra(seconds=2)
    with worker.session() as same:
        assert same("x", "x")
        assert not same("x", RUNAWAY)
        assert not same("x", "x")  # nothing is left
    assert ask(worker)
    worker.close()


def test_a_killed_worker_is_replaced(worker):
    assert ask(worker)
    for whom in (python, python, lambda worker: psutil.Process(worker.pid)):
        first, process = worker.pid, whom(worker)
        process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE:  # or it may still answer
                time.sleep(0.01)
        assert ask(worker) and worker.pid != first


def test_a_worker_killed_while_it_works_is_asked_again(worker):
    assert ask(worker)
    first, process = worker.pid, python(worker)
    process.suspend()
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    assert ask(worker) and worker.pid != first
    killer.join()


def test_memory_and_processor_time_are_limited(worker):
    assert ask(worker)
    lines = Path(f"/proc/{python(worker).pid}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert soft["Max address space"] == str(2 << 30)
    assert 20 <= int(soft["Max cpu time"]) <= 30  # of the question it was asked, and its start
    assert soft["Max core file size"] == "1"  # of 0 a handler of the host's would get its dump


def test_eight_threads_at_once(worker):
    wrong = []

    def work(n):
        for i in range(5):
            if not ask(worker, f"{n}x+{i}", f"{i}+{n}x") or ask(worker, f"{n}x+{i}", f"{n}x"):
                wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # x*n+0 is x*n: one of five per thread is "wrong" on purpose, so that a dead check would show
    assert sorted(wrong) == [(n, 0) for n in range(1, 9)]


def test_a_forked_child_has_a_worker_of_its_own(worker):
    assert ask(worker)
    mine = worker.pid
    child = os.fork()
    if child == 0:
        right = ask(worker) and not ask(worker, given="3x") and worker.pid != mine
        worker.close()
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert ask(worker) and worker.pid == mine


def test_a_fork_while_the_worker_is_busy(worker):
    with worker.session() as same:  # the lock is held, and the child must not wait for it
        assert same("x", "x")
        child = os.fork()
        if child == 0:
            right = ask(worker)
            worker.close()
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert same("2x", "x+x")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/nonexistent/python"], "No such file"),
        ([*PYTHON, "raise ImportError('no math here')"], "no math here"),
        ([*PYTHON, ""], "no reply"),
        ([*PYTHON, "print('hello')"], "no reply"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error(monkeypatch, command, said):
    monkeypatch.setattr(equality, "ALGEBRA", Algebra(lambda: WorkerProgram(tuple(command), ())))
    assert equality.equal("8", "8.0")  # needs no worker
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"cannot start: .*{re.escape(said)}"):
            equality.equal("2x+2", "2(x+1)")


def test_the_worker_sees_no_secrets_and_loads_no_torch(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    worker = Algebra()
    assert ask(worker)
    process = python(worker)
    assert set(process.environ()) == {"LANG", "HOME", "PATH", "PYTHONHASHSEED"}
    assert process.environ()["PYTHONHASHSEED"] == "0"
    assert not any("torch" in part.path for part in process.memory_maps())
    worker.close()


# What a parser that evaluates could be made to run, in place of a comparison.
HOSTILE = """
import runpy, sys
worker = sys.argv.pop(1)
space = runpy.run_path(worker)
def same(reference, given):
    try:
        exec(given, {})
    except OSError as error:
        return bool(error.errno)
    return False
space["main"].__globals__["same"] = same
space["main"]()
"""


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_what_gets_out_of_the_parsers_is_shut_in(level, tmp_path):
    """Each deed ends in an error of the system where the worker is confined, and not where not."""
    try:
        confined.run("", level=level)
    except RuntimeError as error:
        pytest.skip(str(error))
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    script, *folders = algebra.math_verify().read
    deeds = (
        f"open({str(kept)!r}, 'w').write('theirs')",
        f"open({str(kept)!r}).read()",
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "import os; os.fork()",
        "import os; os.kill(os.getppid() or 2, 9)",
        f"import os; os.unlink({script!r})",
        "open('big', 'w').write('x' * (1 << 16))",
    )
    program = WorkerProgram((*PYTHON, HOSTILE, script, *folders), (script, *folders))
    worker = Algebra(lambda: program, level=level)
    for deed in deeds:
        assert ask(worker, given=deed), deed
    assert not ask(worker, given="1 + 1")  # who does no harm meets no error
    assert kept.read_text() == "mine"
    worker.close()


def test_without_confinement_nothing_is_parsed(monkeypatch):
    def refused():
        raise UserError("nothing here confines what a model writes")

    monkeypatch.setattr(confined, "confinement", refused)
    worker = Algebra()
    with pytest.raises(UserError, match="nothing here confines"):
        ask(worker)
    assert worker.pid is None


def test_the_worker_ends_with_its_parent():
    code = (
        "import os\nfrom q3mega.rewards.math.algebra import ALGEBRA\n"
        "with ALGEBRA.session() as same:\n    assert same('2x', 'x+x')\n"
        "print(ALGEBRA.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    pid = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":  # an orphan's death is seen by whoever adopted it
            return
        threading.Event().wait(0.1)
    pytest.fail("the worker outlived its parent")


def test_its_command_is_this_python_and_nothing_of_the_package():
    command = algebra.math_verify().command
    assert command[0] == os.path.realpath(sys.executable)
    [script] = [word for word in command if word.endswith(".py")]
    assert "q3mega" not in Path(script).read_text()
