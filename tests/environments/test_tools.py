import json
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.tool_schemas import SCHEMAS
from q3mega.environments.calculator import calculate
from q3mega.environments.environment import LATE, OVER, TOOLS, Environment, environment_of
from q3mega.environments.sql import tool as sql_tool
from q3mega.environments.tool import CUT
from q3mega.errors import UserError
from q3mega.problems import Problem, files, generate
from q3mega.problems.generated.general import call, tool

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
    assert ask("python", "print('x' * 2000)") == "x" * 2000
    printed = ask("python", "print('x' * 100_000)")
    assert len(printed) == 2000 and printed.endswith(CUT)
    failed = ask("python", "print('x' * 100_000)\n1/0")
    assert len(failed) == 2000
    assert failed.endswith(f"{CUT}\nerror: exit 1: ZeroDivisionError: division by zero")


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


LONG = "with recursive c(n) as (select 1 union all select n + 1 from c where n < 100000000) select "
MEGABYTE = "hex(zeroblob(120000 + 0 * n))"


@pytest.mark.parametrize(
    "query",
    [
        f"{LONG} max(instr({MEGABYTE}, hex(zeroblob(60000 + 0 * n)) || '1')) from c",
        f"{LONG} sum({MEGABYTE} like '%0%0%0%0%0%0%1') from c",
    ],
)
def test_sql_ends_within_its_seconds_whatever_the_query(query, monkeypatch):
    monkeypatch.setattr(sql_tool._WORKER, "_seconds", 1.0)
    world = Environment(problem_with("sql", script=CITIES), max_steps=3)
    (message,) = world.step(call("sql", "query", query))
    assert message["content"].startswith("error: ")
    monkeypatch.setattr(sql_tool._WORKER, "_seconds", 60.0)
    (after,) = world.step(call("sql", "query", "select count(*), sum(people) from city"))
    assert after["content"] == "3 | 1007000"


@given(st.text(max_size=80))
def test_any_query_has_an_answer(text):
    assert ask("sql", text, script=CITIES)
    assert ask("search", text, documents=CORPUS)


def row_with(*tools, **fields):
    """The problem of a row that names its tools."""
    row = {"messages": [{"role": "user", "content": "?"}], "reward": "answer", "answer": "1"}
    return files.as_problem(row | {"tools": list(tools)} | fields, "rows")


def test_tools_by_name_get_full_schemas_and_eight_steps():
    problem = row_with("calculator", "python", "search", "sql", documents=CORPUS, script=CITIES)
    world = Environment(problem)
    assert list(problem.tools) == list(SCHEMAS.values()) and world.steps_left == 8
    for schema in SCHEMAS.values():
        assert set(schema) == {"type", "function"} and schema["type"] == "function"
        parameters = schema["function"]["parameters"]
        (argument,) = parameters["properties"]
        assert parameters["type"] == "object" and parameters["required"] == [argument]
        assert all(schema["function"]["description"] for schema in SCHEMAS.values())
    turn = call("calculator", "expression", "6*7") + call("sql", "query", "select max(1, 2)")
    turn += call("search", "query", "Stockholm") + call("sql", "code", "select 1")
    contents = [m["content"] for m in world.step(turn)]
    assert contents == ["42", "2", CORPUS[1], "error: give query as a string"]


def test_a_schema_of_one_s_own_names_the_argument():
    schema = {"type": "function", "function": {"name": "search", "parameters": {
        "type": "object", "properties": {"q": {"type": "string"}}}}}  # fmt: skip
    problem = row_with(schema, documents=CORPUS)
    assert problem.tools == (schema,) and "max_steps" not in problem.meta
    (message,) = environment_of(problem).step(call("search", "q", "Stockholm"))
    assert message["content"] == CORPUS[1]


@pytest.mark.parametrize(
    ("tools", "fields"),
    [
        ([], {}),
        ([tool("weather", "town")], {}),
        ([tool("search", "query")], {}),  # without documents
        ([{"name": "calculator", "parameters": {"a": "string", "b": "string"}}], {}),
        (["calculator", tool("weather", "town")], {}),
        (["calculator"], {"reward": "tool_calls"}),
        (["calculator"], {"reward": {"tool_call": 1.0, "mode": 1.0}}),
    ],
)
def test_tools_that_cannot_be_run_have_no_environment(tools, fields):
    assert environment_of(row_with(*tools, **fields)) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": "python"}, "tools='python' must be a list"),
        ({"tools": ["pyhton"]}, "'pyhton' is unknown: use some of calculator, python, search, sql"),
        ({"tools": [7]}, "tools=7 must be a tool's name or a function schema"),
        ({"tools": [{"name": "x"}]}, "must be a tool's name or a function schema"),
        ({"tools": [{"function": {"name": 7}}]}, "must be a tool's name or a function schema"),
        ({"tools": ["search"]}, "documents is missing, which the tool search works on: add it"),
        ({"tools": ["python", SCHEMAS["python"]]}, "tools names 'python' twice"),
        ({"max_steps": 65}, "max_steps=65 must be a whole number from 1 to 64"),
        ({"max_steps": True}, "max_steps=True must be a whole number"),
        ({"tool_seconds": "1"}, "tool_seconds='1' must be a number of seconds above 0"),
        ({"tool_seconds": float("nan")}, "tool_seconds=nan must be a number"),
    ],
)
def test_wrong_tools_and_limits_are_named(fields, says):
    with pytest.raises(UserError, match=says):
        row_with(**{"tools": ["calculator"]} | fields)


@given(st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "function", "parameters", "properties"]), inner),
    max_leaves=8,
))  # fmt: skip
def test_any_tools_of_a_file_are_refused_or_can_be_shown(tools):
    try:
        problem = row_with(tools=tools)
    except UserError:
        return
    world = environment_of(problem)
    assert world is None or problem.tools


def test_steps_and_seconds_that_are_over_are_told_and_end_the_episode():
    world = Environment(row_with("calculator", max_steps=2))
    replies = [world.step(turn) for turn in (SUM, SUM + PRODUCT, SUM)]
    assert [m["content"] for m in replies[0]] == ["2"]
    assert [m["content"] for m in replies[1]] == ["2", "6", OVER]
    assert replies[2] is None
    world = Environment(row_with("calculator", tool_seconds=1e-9))  # the first call takes them
    assert [m["content"] for m in world.step(SUM + PRODUCT)] == ["2", LATE, OVER]
    assert world.step(SUM) is None


def test_a_tool_that_breaks_is_an_error_text():
    world = Environment(row_with("calculator", "search", documents=CORPUS))

    class Broken:
        def call(self, arguments):
            raise RecursionError(arguments)

    world.tools["calculator"] = Broken()
    (broken, found) = world.step(SUM + call("search", "query", "Stockholm"))
    assert broken["content"] == "error: the tool failed (RecursionError)"
    assert found["content"] == CORPUS[1]


@pytest.mark.parametrize("documents", ["one text", [1], {"a": "b"}, ["a", None]])
def test_documents_are_a_list_of_texts(documents):
    with pytest.raises(UserError, match=r"documents=.* must be a list of texts"):
        Environment(row_with("search", documents=documents))


def test_long_results_are_cut_where_one_sees_it():
    world = Environment(row_with("search", documents=[f"goat {'hay ' * 300}"] * 3))
    (message,) = world.step(call("search", "query", "goat"))
    assert len(message["content"]) == 2000 and message["content"].endswith(CUT)


@pytest.mark.parametrize(
    "script",
    [
        "create tabel x", "attach '{}/x.db' as x", "vacuum into '{}/x.db'", "pragma user_version=1",
        "select load_extension('x')", "\x00", "\ud800", ["create table x (y)"],
        "create table x as with recursive r(n) as (select 1 union all select n + 1 from r) "
        "select n from r",
    ],
)  # fmt: skip
def test_a_script_makes_a_database_in_memory_and_nothing_else(tmp_path, script):
    if isinstance(script, str):
        script = script.replace("{}", str(tmp_path))
    with pytest.raises(UserError, match=r"script=.* makes no database"):
        Environment(row_with("sql", script=script))
    assert not list(tmp_path.iterdir())
