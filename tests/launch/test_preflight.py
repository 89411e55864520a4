"""What is refused before a stage computes."""

import json
from pathlib import Path

import pytest

from q3mega.config.recipe import Recipe
from q3mega.errors import UserError
from q3mega.launch.preflight import LONGEST, check_files

TINY = Path(__file__).parents[1] / "helpers" / "tiny.yaml"
ROWS = [{"question": f"{i}+1?", "answer": i + 1, "reward": ["answer", "length"]} for i in range(40)]


def check(tmp_path: Path, *more: dict) -> None:
    text = "".join(json.dumps(row) + "\n" for row in [*ROWS, *more])
    (tmp_path / "rows.jsonl").write_text(text)
    rows = f"{{'{tmp_path}/rows.jsonl': 1}}"
    check_files(Recipe.load(TINY, [f"general_rl.problems={rows}"]))


def test_a_factor_of_the_length_needs_nothing_of_a_row(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?", "reward": ["answer", "length"]}, "rows.jsonl:41.*answer='' must be"),
        ({"question": "1 " * (LONGEST + 1), "answer": "1", "reward": "answer"},
         rf"rows.jsonl:41\) is {LONGEST + 1} tokens long or more"),
        ({"question": "39+1?", "answer": "41", "reward": "answer"}, "rows.jsonl:40"),
    ],
)  # fmt: skip
def test_rows_that_no_stage_could_use_are_named(tmp_path: Path, row: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(tmp_path, row)
