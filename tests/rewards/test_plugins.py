"""Rewards from files of the user's."""

from pathlib import Path

import pytest

from q3mega.errors import UserError
from q3mega.rewards import plugins, score

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward.py"


def test_the_example_registers_and_scores():
    plugins.load([str(EXAMPLE)])
    row = {"documents": ["a", "b"]}
    assert score("cites", "It is so [1], and so [2].", row).score == 1.0
    assert score("cites", "<think>\n[1]\n</think>\n\nIt is so [7] [2].", row).score == 0.5
    assert score("cites", "It is so.", row).reason == "no citation"
    assert score("cites", "<think>\n[1]", row).score == 0.0
    assert score("cites", f"[{'9' * 5000}]", row).score == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a Python file that is there"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemError('broken')", "SystemError: broken"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"mine.py: .*{message}"):
        plugins.load([str(file)])
