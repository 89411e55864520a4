"""The agent and RAG sets: what their rows are, and what policies earn that play them for real."""

import inspect
import json
import random
import re
import sys
from collections import Counter

import pytest

from q3mega.data.tool_schemas import SCHEMAS
from q3mega.environments import agent_problems
from q3mega.environments.environment import environment_of
from q3mega.environments.python.computations import COMPUTATIONS
from q3mega.errors import UserError
from q3mega.problems import files
from q3mega.problems.generated import synthetic_documents
from q3mega.problems.generated.general import call
from q3mega.problems.generated.synthetic_documents import NOT_FOUND, RELATIONS, World, question
from q3mega.rewards import score_problem

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox stands on Linux")
SHORT = {"town": "the town", "company": "the company"}


def final(answer):
    return "<think>\nSo it is.\n</think>\n\n" + rf"The answer is \boxed{{{answer}}}."


def play(row, policy):
    """The score of a policy, a generator of turns that is sent the tools' replies to each."""
    problem = files.as_problem(row, "rows")
    world, moves = environment_of(problem), policy(row)
    turn = next(moves)
    while world and (messages := world.step(turn)):
        turn = moves.send([m["content"] for m in messages])
    return score_problem(problem, turn).score


def mean(scores):
    scores = list(scores)
    return sum(scores) / len(scores)


def read(texts, name, relation):
    """What the document that begins with `name` states, if one does."""
    about = RELATIONS[relation]
    short = SHORT.get(about.kind, name.split()[-1])
    for text in texts:
        for statement in about.statements if text.startswith(f"{name} ") else ():
            pattern = re.escape(statement).replace(" a\\ ", " an?\\ ").replace(r"\ a\ ", r"\ an?\ ")
            pattern = pattern.replace(r"\{s\}", f"(?:{re.escape(name)}|{short})")
            pattern = pattern.replace(r"\{v\}", "([^.]+?)")
            if found := re.search(rf"\. {pattern}", text, re.IGNORECASE):
                return found[1].strip()
    return None


def searcher(row):
    name = row["subject"]
    for relation in row["path"]:
        for statement in RELATIONS[relation].statements:
            query = f"{name} {statement.format(s='', v='')}"
            (hits, *_) = yield call("search", "query", query)
            if found := read(hits.split("\n\n"), name, relation):
                break
        name = found
        if name is None:
            break
    yield final(name or NOT_FOUND)


def reader(row):
    name = row["subject"]
    texts = re.findall(r"^\[\d+\] (.+)$", row["messages"][0]["content"], re.MULTILINE)
    for relation in row["path"]:
        name = name and read(texts, name, relation)
    yield final(name or NOT_FOUND)


def querier(row):
    (found,) = yield call("sql", "query", row["gold"])
    yield final(found.split("\n")[0].split(" | ")[0])


def programmer(row):
    solve = COMPUTATIONS[row["group"]].solve
    program = "from collections import Counter\nfrom datetime import date, timedelta\n"
    program += f"{inspect.getsource(solve)}\nprint({solve.__name__}(**{row['given']!r}))"
    (printed,) = yield call("python", "code", program)
    yield final(printed)


ORACLES = {
    "agent_search": searcher,
    "agent_sql": querier,
    "agent_python": programmer,
    "rag": reader,
}
N = {"agent_search": 100, "agent_sql": 60, "agent_python": 34, "rag": 60}


@pytest.fixture(scope="module")
def rows():
    return {name: agent_problems.make(name, n) for name, n in N.items()}


@pytest.mark.parametrize("name", ORACLES)
def test_who_works_with_the_tools_gets_it_all(rows, name):
    assert [play(row, ORACLES[name]) for row in rows[name]] == [1.0] * N[name]


@pytest.mark.parametrize("name", ["agent_search", "rag"])
def test_always_refusing_earns_the_unanswerable_share(rows, name):
    assert mean(play(row, lambda _: iter([final(NOT_FOUND)])) for row in rows[name]) == 0.25
    bare = [play(row, lambda _: iter([NOT_FOUND])) for row in rows[name]]
    assert bare == [0.0] * N[name]  # not in the form that was asked for


@pytest.mark.parametrize("name", ["agent_search", "rag"])
def test_a_list_of_all_candidates_earns_nothing(rows, name):
    for row in rows[name]:
        kinds = ("town", "person", "company")
        texts = row.get("documents") or [row["messages"][0]["content"]]
        words = sorted({*re.findall(r"[A-ZÖ]\w+(?: [A-Z]\w+)?|\d[\d,]*", " ".join(texts))})
        assert len(words) > len(kinds)
        for reply in (
            ", ".join(words),
            final(", ".join([*words, NOT_FOUND])),
            " ".join(rf"\boxed{{{w}}}" for w in words),
        ):
            assert play(row, lambda _, reply=reply: iter([reply])) == 0.0


@pytest.mark.parametrize("name", ["agent_search", "agent_sql", "agent_python", "rag"])
def test_a_guess_without_tools_is_scored_as_any_answer(rows, name):
    right = [play(row, lambda row: iter([final(row["answer"])])) for row in rows[name]]
    assert right == [1.0] * N[name]
    rng = random.Random(0)
    answers = [r["answer"] for r in rows[name] if r["answer"] != NOT_FOUND]
    guessed = mean(play(r, lambda _: iter([final(rng.choice(answers))])) for r in rows[name])
    assert guessed < 0.15


@pytest.mark.parametrize("name", ORACLES)
def test_rows_are_distinct_seeded_and_in_varied_words(rows, name):
    found = rows[name]
    assert agent_problems.make(name, 5) == found[:5] != agent_problems.make(name, 5, seed=1)
    problems = [files.as_problem(row, "rows") for row in found]
    assert len({p.id for p in problems}) == N[name]
    assert {p.family for p in problems} == {name}
    assert json.loads(json.dumps(found)) == found  # a line of a file each
    openings = Counter(" ".join(p.question.split()[:4]) for p in problems)
    assert len(openings) >= (2 if name == "rag" else 4)
    for problem in problems:
        assert all(schema in SCHEMAS.values() for schema in problem.tools)
        assert not re.search(r"\{(?!\}|not found)\w*\}", problem.question)  # an unfilled slot


def test_documents_are_of_their_size(rows):
    for row in rows["agent_search"]:
        assert 20 <= len(row["documents"]) <= 60
        assert all(40 <= len(text.split()) <= 120 for text in row["documents"])
        assert len(set(row["documents"])) == len(row["documents"])
        assert row["answer"] == NOT_FOUND or any(row["answer"] in t for t in row["documents"])
    assert {row["group"] for row in rows["agent_search"]} == {"1 fact", "2 facts", NOT_FOUND}


def test_distractors_share_the_words_of_the_question(rows):
    """The names are among many that share a word, and others' facts of the same kind are told."""
    for row in rows["agent_search"]:
        word = row["subject"].split()[-1][:3]
        assert sum(word in text for text in row["documents"]) >= 2


def test_a_hidden_fact_is_nowhere_and_the_others_are():
    rng = random.Random(5)
    world = World.draw(rng, 15)
    name, relation = "", "charter"
    name = world.names["town"][0]
    told, without = world.documents(rng, 3), world.documents(rng, 3, (name, relation))
    assert read(told, name, relation) == world.facts[name, relation]
    assert read(without, name, relation) is None
    others = [slot for slot in world.slots() if slot != (name, relation)]
    assert all(read(without, *slot) == world.facts[slot] for slot in others)


def test_two_relations_make_one_question():
    texts = {question(random.Random(i), "Esk Mills", ("seat", "river")) for i in range(20)}
    assert texts == {
        "Which river flows through the town where Esk Mills has its head office?",
        "On which river does the town where Esk Mills has its head office lie?",
    }
    assert ("seat", "river") in synthetic_documents.paths("company")
    assert ("teacher", "teacher") not in synthetic_documents.paths("person")


def test_databases_are_of_their_size_and_ask_for_more_than_a_row(rows):
    for row in rows["agent_sql"]:
        tables = re.findall(r"insert into \w+ values (.*);", row["script"])
        assert len(tables) == 3 and 20 <= tables[-1].count("(") <= 200
        assert re.search(r"join|group by|count", row["gold"])
    assert len({row["answer"] for row in rows["agent_sql"]}) > 30


@pytest.mark.parametrize(
    ("kind", "given", "answer"),
    [  # known values
        ("sum_of_multiples", {"a": 3, "b": 5, "n": 1000}, 233168),
        ("digit_sum_of_power", {"a": 2, "n": 1000}, 1366),
        ("primes_between", {"low": 2, "high": 100}, 25),
        ("longest_collatz", {"n": 30}, 27),
        ("modular_recurrence", {"a": 1, "b": 1, "start": 2, "m": 100, "n": 3}, 77),
        ("days_between", {"first": "2000-02-28", "last": "2000-03-01"}, 2),
        ("date_after", {"first": "1999-12-31", "n": 60}, "2000-02-29"),
        ("fridays_the_13th", {"low": 2026, "high": 2026}, 3),
        ("last_in_circle", {"n": 41, "k": 3}, 31),
        ("commonest_letter_count", {"text": "abba cab"}, 3),
        ("shifted_and_turned", {"word": "xyz", "shift": 3}, "cba"),
        ("read_aloud", {"start": 1, "n": 5}, 6),
        ("longest_rise", {"numbers": [3, 1, 4, 1, 5, 9, 2, 6]}, 4),
        ("squares_sum_of_middle", {"numbers": [9, 1, 2, 3, 0], "k": 1}, 14),
        ("rabbits", {"young": 2, "pairs": 3, "years": 3, "every": 3, "sold": 1}, 13),
        ("visited_cells", {"a": 1, "c": 1, "m": 8, "start": 0, "n": 4}, 4),
        ("ways_to_pay", {"amount": 100, "coins": [1, 5, 10, 25, 50]}, 292),
    ],
)
def test_computations_of_known_value(kind, given, answer):
    assert COMPUTATIONS[kind].solve(**given) == answer


def test_the_sets_are_named_like_files():
    assert all(files.named(name) for name in ORACLES)
    assert len(files.rows("agent_python")) == files.DRAWN
    assert files.rows("rag", 3) == agent_problems.make("rag", 3)
    with pytest.raises(UserError, match="'agent_go' holds no problems: use one of counterfactual"):
        files.rows("agent_go")
    with pytest.raises(UserError, match="name='agent_go' is unknown: use one of agent_search"):
        agent_problems.make("agent_go", 1)
