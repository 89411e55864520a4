import re

import pytest

from q3mega.errors import UserError
from q3mega.rewards import score
from q3mega.rewards.programs.code import check_tests, same_output
from q3mega.rewards.programs.row_tests import Tolerance

CALLS = [{"arguments": [2, 3], "result": 5}, {"arguments": [0, 0], "result": 0}]
ADD = {"entry_point": "add", "calls": CALLS}
CHECK = {"entry_point": "add", "check": "def check(f):\n    assert f(2, 3) == 5 and f(0, 0) == 0"}
ECHO = {"cases": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "4 5", "stdout": "9\n"}]}
SUM = "a, b = map(int, input().split())\nprint(a + b)"
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


def test_a_demonstration_beside_the_function_does_no_harm():
    ended = GOOD + "n = int(input())\nprint(add(n, n))"  # input ends, the function is there
    assert verdict(ended, ADD).score == 1
    assert verdict(GOOD + "print(add(2, 3))\nexit()", ADD).score == 1
    assert verdict(GOOD + "if __name__ == '__main__':\n    1 / 0", ADD).score == 1


@pytest.mark.parametrize("end", ["exit()", "quit(0)", "import sys; sys.exit()", "raise SystemExit"])
def test_a_program_may_end_itself(end):
    assert verdict(f"{SUM}\n{end}\nprint('more')", ECHO).score == 1
    assert verdict(f"{SUM}\nexit(3)", ECHO).reason == "test 1: exit 3"


@pytest.mark.parametrize(
    "read",
    ["input()", "open(0).read()", "open('/dev/stdin').read()", "__import__('sys').stdin.read()"],
)
def test_the_ways_to_read_the_input(read):
    assert verdict(f"print(sum(map(int, {read}.split())))", ECHO).score == 1


SOLUTION = """
class Solution:
    def add(self, a: Optional[int], b: List[int]) -> Dict[str, int]:
        queue = deque([a, *b])
        return [heapq.nsmallest(1, queue)[0], bisect_left(b, a), math.gcd(*b), inf]
"""


@pytest.mark.parametrize("entry", ["add", "Solution().add", "Solution.add"])
def test_a_class_solution_with_the_usual_names(entry):
    calls = [{"arguments": {"b": [4, 6], "a": 5}, "result": [4, 1, 2, float("inf")]}]
    assert verdict(SOLUTION, {"entry_point": entry, "calls": calls}).score == 1
    check = "def check(f):\n    assert f(5, b=[4, 6])[:2] == [4, 1]"
    assert verdict(SOLUTION, {"entry_point": entry, "check": check}).score == 1


def test_a_prompt_gives_what_the_program_may_count_on():
    tests = {"entry_point": "f", "calls": [{"arguments": [], "result": 7}], "prompt": "SEVEN = 7"}
    assert verdict("def f(): return SEVEN", tests).score == 1


def test_results_are_what_json_makes_of_them():
    for expression, result, right in [
        ("{3, 1, 2}", [1, 2, 3], 1),
        ("{3, 1}", [1, 2, 3], 0),
        ("{1: (2, 3)}", {"1": [2, 3]}, 1),
        ("0.1 + 0.2", 0.3, 1),
        ("[1 / 3, {'a': 2 / 3}]", [0.3333333333, {"a": 0.6666666667}], 1),
        ("5.0", 5, 1),
        ("5.0000001", 5, 0),
        ("0.35", 1 / 3, 0),
        ("10 ** 5000 + 1", 10**5000 + 1, 1),
        ("10 ** 5000", 0.5, 0),
    ]:
        tests = {"entry_point": "f", "calls": [{"arguments": [], "result": result}]}
        assert verdict(f"def f(): return {expression}", tests).score == right, expression
    near = {"entry_point": "f", "calls": [{"arguments": [], "result": 5}], "tolerance": 0.1}
    assert verdict("def f(): return 5.05", near).score == 1
    exact = {"entry_point": "f", "calls": [{"arguments": [], "result": 0.3}], "tolerance": 0}
    assert verdict("def f(): return 0.1 + 0.2", exact).score == 0


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("0.3333333333333333\n", "0.333333", None, True),
        ("0.3334", "0.333333", None, False),
        ("1 0.5\nx", "1 0.50\nx \n\n", None, True),
        ("5.0", "5", None, True),
        ("5.0000001", "5", None, False),
        ("123456789.1", "123456789", None, False),
        ("5", "5.0", None, True),
        ("6", "5", None, False),
        ("007", "7", None, False),
        ("1e-3", "0.001", None, True),
        ("nan", "0.5", None, False),
        ("a  b", "a b", None, False),
        ("v1.2.0", "v1.2", None, False),
        ("7", "6", Tolerance(1, 0), True),
        ("0.50", "0.5", Tolerance(0, 0), False),
        ("1\r\n2", "1\n2\n", None, True),
        ("1\n\n2", "1\n2", None, False),
        ("1" * 5000 + ".0", "1" * 5000, None, True),
    ],
)
def test_outputs_that_are_the_same(printed, expected, tolerance, same):
    assert same_output(printed, expected, tolerance) == same


def test_a_row_s_own_checker_sees_what_was_printed():
    checker = "def check(stdin, printed, expected):\n    return int(stdin) % int(printed) == 0"
    tests = {"cases": [{"stdin": "6"}, ["9", "3"]], "checker": checker}
    assert verdict("n = int(input())\nprint(n // 3)", tests).score == 1
    assert verdict("print(4)", tests).reason == "test 1: the checker refuses '4\\n'"
    assert verdict("print('x')", tests).reason.startswith("ValueError: invalid literal")
    assert verdict("1 / 0", tests).reason.startswith("test 1: exit 1: ZeroDivisionError")


def test_right_output_has_room_beyond_the_limit():
    lines = "".join(f"{n}\n" for n in range(200_000))  # 1.3 MB
    loop = "for n in range(200_000): print(n)"
    assert verdict(loop, {"cases": [["", lines]]}).score == 1
    assert verdict(loop, {"cases": [["", "1"]]}).reason.startswith("test 1: over 1048576 bytes")


def test_a_row_s_limits_reach_the_program():
    deep = "import functools, sys\nsys.setrecursionlimit(10**6)\n@functools.cache\n"
    deep += "def f(n): return n and 1 + f(n - 1)\nprint(f(100_000))"
    tests = {"cases": [["", "100000"]]}
    assert verdict(deep, tests).reason == "test 1: ended by SIGSEGV"
    assert verdict(deep, tests, limits={"stack": 512 << 20}).score == 1


CASE = {"stdin": "1", "stdout": "2"}
CHECKER = "def check(stdin, printed, expected): return True"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "tests is missing"),
        ({"tests": "x"}, "tests='x' must be an object: give cases"),
        ({"tests": {"cases": ["1 2"]}}, "tests.cases[0]='1 2' must hold stdin and stdout"),
        ({"tests": {"cases": [CASE, {"stdin": "1"}]}}, "tests.cases[1].stdout=None must be a text"),
        ({"tests": {"cases": [["1", 2]]}}, "tests.cases[0].stdout=2 must be a text"),
        ({"tests": {"cases": [{"stdout": "1"}]}}, "tests.cases[0].stdin=None must be a text"),
        ({"tests": {"cases": "1"}}, "tests.cases='1' must be a list"),
        ({"tests": {"cases": [CASE], "tolerence": 1}}, "tests.tolerence is no field beside"),
        ({"tests": {"cases": [CASE], "tolerance": -1}}, "tests.tolerance=-1 must be a number"),
        ({"tests": {"cases": [CASE], "tolerance": {"abs": "1"}}}, "tests.tolerance={'abs': '1'}"),
        ({"tests": {"cases": [CASE], "checker": "x ="}}, "tests.checker is no Python"),
        ({"tests": {"cases": [CASE], "checker": "x = 1"}}, "tests.checker must define check(stdin"),
        ({"tests": {"entry_point": "f(x)", "calls": CALLS}}, "tests.entry_point='f(x)' must be"),
        ({"tests": {"entry_point": "f", "calls": [[1, 2]]}}, "tests.calls[0]=[1, 2] must hold"),
        (
            {"tests": {"entry_point": "f", "calls": [{"arguments": 1, "result": 2}]}},
            "tests.calls[0].arguments=1 must be a list",
        ),
        (
            {"tests": {"entry_point": "f", "calls": [{"arguments": [], "result": object}]}},
            "tests.calls[0].result: <class 'object'> is no plain data",
        ),
        ({"tests": {"entry_point": "f", "check": "assert 1"}}, "tests.check must define check(ca"),
        ({"tests": ECHO, "limits": {"cpu": "5"}}, "limits.cpu='5' must be a whole number"),
    ],
)
def test_what_is_wrong_in_a_row_is_named_before_anything_runs(row, says):
    with pytest.raises(UserError, match=re.escape(says)):
        check_tests(row)


@pytest.mark.parametrize(
    "tests",
    [ADD, CHECK, ECHO, {"cases": [("1", "2")], "checker": CHECKER, "tolerance": {"rel": 1e-9}}],
)
def test_rows_that_can_be_judged_pass_the_check(tests):
    check_tests({"tests": tests, "limits": {"cpu": 2, "stack": 1 << 29}})
