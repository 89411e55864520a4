"""Problems from files: domains, one in ten held out, and what is wrong with a file."""

import json

import pytest

from q3mega.errors import UserError
from q3mega.problems import generate, problem
from q3mega.problems.pool import Pool


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def names(tmp_path):
    rows = [
        {"question": f"What is {n}+1?", "reward": "answer", "answer": n + 1} for n in range(300)
    ]
    code = [
        {
            "messages": [{"role": "user", "content": f"Print {n}."}],
            "reward": "code",
            "tests": {"cases": [["", str(n)]]},
            "domain": "programs",
            "difficulty": n,
        }
        for n in range(50)
    ]
    return [write(tmp_path / "sums.jsonl", [*rows, rows[0]]), write(tmp_path / "c.jsonl", code)]


def test_without_files_the_families_are_drawn_as_ever():
    pool = Pool()
    assert pool.generated and pool.domains == ("chain_sum", "modular_product", "number_sorting")
    assert pool.draw("chain_sum", 5, seed=3) == generate("chain_sum", 5, seed=3)
    assert list(pool) == []


def test_files_make_domains_without_duplicates(names):
    pool = Pool(names)
    assert pool.domains == ("sums", "programs") and not pool.generated
    assert len(list(pool)) == 350 and len({p.id for p in pool}) == 350
    (program,) = [p for p in pool if p.question == "Print 7."]
    assert program.row["tests"] == {"cases": [["", "7"]]} and program.difficulty == 7
    assert program.row["reward"] == "code" and program.row["messages"] == program.messages
    assert next(iter(pool)).answer == "1"


def test_the_sides_of_the_split_never_meet(names):
    pool = Pool(names)
    train = pool.draw("sums", 1000, seed=1)
    held = pool.draw("sums", 1000, seed=1, heldout=True)
    assert len(train) + len(held) == 300 and 10 < len(held) < 60
    assert not {p.id for p in train} & {p.id for p in held}
    assert pool.draw("sums", 20, seed=2) == pool.draw("sums", 20, seed=2) != train[:20]


def test_held_out_problems_take_the_domains_in_turn(names):
    pool = Pool(names)
    some = pool.held_out(6)
    assert [p.family for p in some[:2]] == ["sums", "programs"] and len(some) == 6
    every = pool.held_out(1000)
    assert every[:6] == some and all(p.heldout for p in every)
    assert len(every) == sum(p.heldout for p in pool)


def test_too_few_problems_are_refused(tmp_path):
    texts = [f"q {n}" for n in range(9)]
    texts = [t for t in texts if not problem("few", "reasoning", t, "1", 0).heldout][:3]
    rows = [{"question": text, "reward": "answer", "answer": "1"} for text in texts]
    with pytest.raises(UserError, match="none of 3 is held out"):
        Pool([write(tmp_path / "few.jsonl", rows)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "1"}, "few.jsonl:1: reward=None must name a reward"),
        ({"reward": "answer"}, "few.jsonl:1: messages=None must be a list"),
        ({"question": "q", "reward": "answer", "difficulty": "hard"}, "difficulty='hard' must be"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        Pool([write(tmp_path / "few.jsonl", [row])])
