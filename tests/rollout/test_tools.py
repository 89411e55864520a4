import json
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.tasks import Problem, generate
from q3mega.data.tasks.general import call, tool
from q3mega.rollout.tools import TOOLS, Environment, calculate

MALFORMED = "error: a call is a JSON object with name and arguments"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*12", "444"),
        (" 2 + 3 * 4 ", "14"),
        ("(2+3)*-4", "-20"),
        ("7/2", "3.5"),
        ("6/3", "2"),
        ("1/3", "0.333333"),
        ("1/3*3", "1"),
        ("0/5", "0"),
        ("999999*1000000", "999999000000"),
    ],
)
def test_calculate(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "1/0", "2**9", "9//2", "2(3)", "()", "1,2", "1 2", "7%2", "1.5", "1e9", "0x10",
        "True", "x", "__import__('os')", "1 if 1 else 2", "1\n+1", "1#", "١+١", "\x00", "\ud800",
        "9" * 61, "999999*999999*999999", "(" * 60, "-" * 60, "1+" * 29,
    ],
)  # fmt: skip
def test_what_is_no_expression_is_an_error_text(expression):
    assert calculate(expression).startswith("error: ")


def _joined(parts):
    """(text, exact value, None if undefined) of two such joined by an operator, in parentheses."""
    (a, x), sign, (b, y) = parts
    text = f"({a}{sign}{b})"
    if x is None or y is None or (sign == "/" and y == 0):
        return text, None
    return text, {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[sign]


LEAVES = st.integers(0, 99).map(lambda n: (str(n), Fraction(n)))


@given(
    st.recursive(
        LEAVES,
        lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(_joined),
        max_leaves=8,
    )
)
def test_calculate_agrees_with_fractions(expression):
    text, value = expression
    result = calculate(text)
    if value is None:
        assert result == "error: division by zero"
    elif len(text) > 60:
        assert result.startswith("error: use up to 60")
    elif not result.startswith("error: the numbers are too large"):
        assert abs(Fraction(result) - value) <= Fraction(1, 10**6) * max(1, abs(value))
        assert ("." in result) <= (value.denominator != 1)


@given(st.text(max_size=70) | st.text(alphabet="0123456789+-*/() ", max_size=62))
def test_calculate_never_raises_and_stays_short(text):
    assert len(calculate(text)) < 60


@given(st.text(max_size=100) | st.text(max_size=60).map(lambda t: f"<tool_call>{t}</tool_call>"))
def test_any_turn_has_an_answer(text):
    (problem,) = generate("lookup", 1, seed=0)
    for message in Environment(problem).step(text) or []:
        assert message["role"] == "tool"
        assert isinstance(message["content"], str)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=3))
def test_any_arguments_get_text(arguments):
    for problem in (*generate("lookup", 1, seed=0), *generate("calculator", 1, seed=0)):
        (schema,) = problem.tools
        turn = json.dumps({"name": schema["name"], "arguments": arguments}, ensure_ascii=True)
        (message,) = Environment(problem).step(f"<tool_call>\n{turn}\n</tool_call>") or [None]
        assert message["content"].startswith("error: ")


def test_tools_carry_the_schema_that_the_prompt_shows():
    for problem in (*generate("lookup", 1, seed=0), *generate("calculator", 1, seed=0)):
        for schema in problem.tools:
            tool = TOOLS[schema["name"]](problem)
            assert (tool.name, tool.schema) == (schema["name"], schema)


def test_lookup_knows_its_table_only():
    (problem,) = generate("lookup", 1, seed=0)
    table = problem.meta["table"]
    for key, value in table.items():
        assert Environment(problem).step(call("lookup", "key", key))[0]["content"] == value
    unknown = Environment(problem).step(call("lookup", "key", "Nobody"))
    assert unknown == [{"role": "tool", "content": "error: no such key"}]


SUM, PRODUCT = (call("calculator", "expression", e) for e in ("1+1", "2*3"))


@pytest.mark.parametrize(
    ("turn", "replies"),
    [
        ("444", None),
        (f"<think>\n{SUM}\n</think>\n\n2", None),
        (f"<think>\n{SUM}", None),
        (SUM, ["2"]),
        (SUM + PRODUCT, ["2", "6"]),
        (SUM * 9, ["2"] * 4),
        (call("lookup", "key", "Ann"), ["error: no such tool"]),
        (call("calculator", "x", "1+1"), ["error: give expression as a string"]),
        ("<tool_call>\n{1+1}\n</tool_call>", [MALFORMED]),
        (f"{SUM}<tool_call>", ["2", MALFORMED]),
    ],
)
def test_a_turn_and_what_the_environment_says(turn, replies):
    (problem,) = generate("calculator", 1, seed=0)
    answer = Environment(problem).step(turn)
    assert answer == (replies and [{"role": "tool", "content": r} for r in replies])


def test_an_episode_ends_after_its_steps():
    (problem,) = generate("calculator", 1, seed=0)
    environment = Environment(problem, max_steps=2)
    assert [bool(environment.step(SUM)) for _ in range(4)] == [True, True, False, False]


def test_without_tools_there_is_nothing_to_call():
    (problem,) = generate("repeat_digit", 1, seed=0)
    assert Environment(problem).step(SUM) == [{"role": "tool", "content": "error: no such tool"}]


def problem_with(name, **meta):
    return Problem("p", name, "agent", [], "", 1, meta=meta, tools=[tool(name, ARGUMENT[name])])


ARGUMENT = {"python": "code", "search": "query", "sql": "query"}
CITIES = """
create table city (name text, people integer);
insert into city values ('Oslo', 700000), ('Bergen', 290000), ('Kiruna', 17000);
"""
CORPUS = [
    "Oslo is the capital of Norway.",
    "The capital of Sweden is Stockholm. Its old town lies on an island.",
    "Reindeer graze in the north of Norway.",
    "木曜日に会議があります。",
]


def ask(name, argument, **meta):
    (message,) = Environment(problem_with(name, **meta)).step(call(name, ARGUMENT[name], argument))
    return message["content"]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox stands on Linux")
def test_python_is_run_in_the_sandbox():
    assert ask("python", "print(sum(range(10)))") == "45"
    assert ask("python", "print(1)\n1/0") == (
        "1\nerror: exit 1: ZeroDivisionError: division by zero"
    )
    assert ask("python", "open('/etc/passwd')").startswith("error: exit 1: FileNotFoundError")
    assert len(ask("python", "print('x' * 100_000)")) == 2000


def test_search_finds_what_fits_best_first():
    hits = ask("search", "capital of Norway?", documents=CORPUS).split("\n\n")
    assert hits[0] == CORPUS[0] and set(hits) == set(CORPUS[:3])
    assert ask("search", "stockholm", documents=CORPUS) == CORPUS[1]
    assert ask("search", "penguins", documents=CORPUS) == "nothing found"
    assert ask("search", '" OR text: * NEAR(', documents=CORPUS) == "nothing found"
    assert ask("search", "?!", documents=CORPUS) == "error: give words to search for"


def test_sql_reads_the_task_s_database():
    assert ask("sql", "select name from city where people > 100000", script=CITIES) == (
        "Oslo\nBergen"
    )
    assert ask("sql", "select count(*), max(people) from city", script=CITIES) == "3 | 700000"
    assert ask("sql", "select 1 where 0", script=CITIES) == "no rows"
    assert ask("sql", "select printf('%1000000000d', 1)", script=CITIES) == "None"  # too long


@pytest.mark.parametrize(
    "query",
    [
        "", "select", "delete from city", "insert into city values ('x', 1)", "drop table city",
        "update city set people = 0", "create table x (y)", "attach '/tmp/x.db' as x",
        "vacuum into '/tmp/x.db'", "pragma writable_schema = 1", "select load_extension('x')",
        "select writefile('/tmp/x', 'y')", "select readfile('/etc/passwd')",
        "select * from city; drop table city", "begin", "select * from sqlite_dbpage", "\x00",
        "\ud800", "select zeroblob(1 << 30)",
        "select replace(hex(zeroblob(400000)), '0', 'xxxxxxxx')",
        "with recursive r(n) as (select 1 union all select n + 1 from r) select count(*) from r",
        "select count(*) from city a, city b, city c, city d, city e, city f, city g, city h, "
        "city i, city j, city k, city l, city m, city n, city o, city p, city q, city r, city s",
    ],
)  # fmt: skip
def test_sql_does_nothing_else(query):
    environment = Environment(problem_with("sql", script=CITIES), max_steps=3)
    (message,) = environment.step(call("sql", "query", query))
    assert message["content"].startswith("error: ")
    (after,) = environment.step(call("sql", "query", "select count(*), sum(people) from city"))
    assert after["content"] == "3 | 1007000"


@given(st.text(max_size=80))
def test_any_query_has_an_answer(text):
    assert ask("sql", text, script=CITIES)
    assert ask("search", text, documents=CORPUS)
