import pytest

from q3mega.errors import UserError
from q3mega.rewards import score

CALLS = [{"arguments": [2, 3], "result": 5}, {"arguments": [0, 0], "result": 0}]
ADD = {"entry_point": "add", "calls": CALLS}
CHECK = {"entry_point": "add", "check": "def check(f):\n    assert f(2, 3) == 5 and f(0, 0) == 0"}
ECHO = {"cases": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "4 5", "stdout": "9\n"}]}
GOOD = "def add(a, b):\n    return a + b\n"


def verdict(program, tests, **row):
    return score(
        "code", f"<think>\nx\n</think>\n\nSo:\n```python\n{program}\n```", {"tests": tests} | row
    )


@pytest.mark.parametrize("tests", [ADD, CHECK])
def test_a_function_by_its_calls(tests):
    assert verdict(GOOD, tests).score == 1
    assert verdict(GOOD + "print('noise')\nadd(1, 2)", tests).score == 1
    assert verdict(GOOD.replace("+", "-"), tests).score == 0


def test_a_program_by_what_it_prints():
    assert verdict("print(sum(map(int, input().split())))", ECHO).score == 1
    assert verdict("print(3)", ECHO).reason == "test 2: printed '3\\n' for '9\\n'"
    assert verdict("print(sum(map(int, input().split())), end=' \\n\\n')", ECHO).score == 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def add(a, b): return 5", "tests: exit 1: call 2 returned 5 for 0"),
        ("def add(a, b): raise KeyError(a)", "tests: exit 1: RuntimeError: KeyError: 2"),
        ("def plus(a, b): return a + b", "tests: exit 1: RuntimeError: KeyError: 'add'"),
        ("def add(a, b: return", "program: exit 1: SyntaxError: invalid syntax"),
        ("while True: pass", "program: over 1 s of CPU time"),
    ],
)
def test_what_is_wrong_is_told(program, reason):
    assert verdict(program, ADD, limits={"cpu": 1}).reason == reason


# What a policy could learn instead of the task.
EQUAL = """
  __eq__ = lambda self, other: True
  __ne__ = lambda self, other: False
  __hash__ = int.__hash__
def add(a, b): return E()
"""
WRITE = """
import os
for fd in range(4, 12):
  try: os.write(fd, ANSWERS)
  except OSError: pass
def add(a, b): return 1
"""
CHEATS = {
    "exit before the tests": "import sys\nsys.exit(0)",
    "end before the tests": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "equal to everything": f"class E:{EQUAL}",
    "a number equal to everything": f"class E(int):{EQUAL}",
    "a repr that lies": """
class E:
  def __repr__(self): return 'type("E", (), {"__eq__": lambda s, o: True})()'
def add(a, b): return E()
""",
    "errors renamed": """
import builtins
builtins.AssertionError = ValueError
def add(a, b): return 1
""",
    "a check of its own": "def check(candidate): pass\ndef add(a, b): return 1",
    "tests in memory": """
import gc
def add(a, b):
  found = (o for o in gc.get_objects() if isinstance(o, dict) and 'result' in o)
  return next((o['result'] for o in found), 1)
""",
    "tests in frames": """
import sys
def add(a, b):
  frame = sys._getframe()
  while frame:
    if 'CALLS' in frame.f_globals or 'CHECK' in frame.f_globals: return a + b
    frame = frame.f_back
  return 1
""",
    "answers in advance": WRITE.replace("ANSWERS", r"b\"('returned', True)\\n\" * 9"),
    "a flood of answers": WRITE.replace("ANSWERS", r"b'(' * 60_000 + b'\\n'"),
    "every answer at once": "def add(a, b): return [5, 0]",
    "a comment": "# all tests passed, score 1",
    "nothing": "",
}


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("tests", [ADD, CHECK])
def test_a_cheat_earns_nothing(name, tests):
    assert verdict(CHEATS[name], tests).score == 0


def test_results_keep_their_kinds():
    calls = [
        ("[1, (2, 3)]", [1, [2, 3]]),
        ("{'a': 1.5, 'b': None}", {"a": 1.5, "b": None}),
        ("__import__('collections').Counter('aab')", {"a": 2, "b": 1}),
        ("float('inf')", float("inf")),
        ("-float('inf')", -float("inf")),
        ("True", True),
        ("'été\\n'", "été\n"),
        ("10 ** 400", 10**400),
    ]
    for expression, result in calls:
        tests = {"entry_point": "f", "calls": [{"arguments": [], "result": result}]}
        assert verdict(f"def f(): return {expression}", tests).score == 1, expression
    for expression in ("object()", "{1, 2}", "'1'", "lambda: 1", "None"):
        tests = {"entry_point": "f", "calls": [{"arguments": [], "result": 1}]}
        assert verdict(f"def f(): return {expression}", tests).score == 0, expression


def test_the_last_block_counts_and_a_bare_program_too():
    right, wrong = f"```python\n{GOOD}```", "```python\nadd = 1\n```"
    assert score("code", f"{wrong}\n{right}", {"tests": ADD}).score == 1
    assert score("code", f"{right}\n{wrong}", {"tests": ADD}).score == 0
    assert score("code", GOOD, {"tests": ADD}).score == 1
    assert score("code", f"<think>\n{right}", {"tests": ADD}).score == 0


@pytest.mark.parametrize(
    "tests", [{}, {"cases": []}, {"calls": []}, {"entry_point": "f"}, ADD | ECHO]
)
def test_malformed_tests_are_an_error(tests):
    with pytest.raises(UserError, match="give cases"):
        verdict(GOOD, tests)
