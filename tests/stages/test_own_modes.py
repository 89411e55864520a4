"""In which mode general RL asks a problem of one's own, and what it writes into the prompt."""

import pytest

from q3mega import device  # noqa: F401

# isort: split
from q3mega.problems import problem
from q3mega.problems.files import problems
from q3mega.stages.general_rl import _in_mode, _own_mode


def made(text="q", **meta):
    return problem("t", "reasoning", text, "a", 0, meta=meta)


@pytest.mark.parametrize(
    ("one", "mode"),
    [
        (made(reward="answer"), None),
        (made(reward="answer", mode="no_think"), "no_think"),
        (made("q /no_think", reward=["mode", "answer"]), "no_think"),
        (made("q", reward={"mode": 1, "answer": 1}), "think"),
    ],
)
def test_the_mode_that_a_problem_asks_for(one, mode):
    assert _own_mode(one) == mode


def test_a_flag_is_added_unless_the_problem_is_about_flags():
    assert _in_mode(made(reward="answer"), "think").question == "q /think"
    assert _in_mode(made(reward="answer"), "think", flag=False).question == "q"
    for row in problems("think_flags")[:50]:
        asked = _in_mode(row, _own_mode(row))
        assert asked.messages == row.messages
        assert asked.meta["mode"] in ("think", "no_think")
