from pathlib import Path

import pytest

from q3mega.errors import UserError
from q3mega.rewards import registry, score

PAGE = Path(__file__).parents[2] / "docs/rewards/README.md"
BUILT_IN = [
    name
    for name, (fn, _) in registry._REWARDS.items()
    if fn.__module__.startswith("q3mega.rewards.")
]


def test_the_documented_table_is_the_registry():
    table = PAGE.read_text().split("\n## The rewards\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "name" and rows[1:] == sorted(BUILT_IN)


@pytest.mark.parametrize(("old", "new"), registry.RENAMED.items())
def test_an_old_name_is_answered_with_the_new_one(old, new):
    assert new in BUILT_IN
    with pytest.raises(UserError, match=f"reward='{old}' is called {new} now"):
        score(old, "x", {})
