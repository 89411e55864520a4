"""`q3mega eval` on an untrained checkpoint: every kind of task, read back from what it prints."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.cli import main
from q3mega.data import package_text
from q3mega.data.chat import EMPTY_THINKING
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.engine import Engine
from q3mega.evaluation.answers import graded
from q3mega.problems import files
from q3mega.rollout import Completion, SamplingParams

LINE = re.compile(r"(\S.*?) +([01]\.\d{3})  \[([01]\.\d{3}), ([01]\.\d{3})\] +(\d+)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    train_tokenizer(package_text.documents("year_2889"), 512, folder)
    tokenizer = Tokenizer(folder)
    engine = Engine(replace(SHAPES["tied"], vocab=512), LAYOUT(), seed=0)
    engine.save_hf(folder, {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eod})
    return folder


def test_a_chat_ends_with_its_input_or_an_empty_line(checkpoint, monkeypatch, capsys, caplog):
    for typed, turns in (("hi\n", 1), ("hi\nyou\n\nnever\n", 2), ("", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["chat", str(checkpoint), "--max-tokens", "2"]) == 0
        assert capsys.readouterr().out.count("you> ") == turns + 1
        assert caplog.text.count("cut at 2 tokens") == turns
        caplog.clear()


def test_a_prompt_that_is_no_text_is_one_line(checkpoint, monkeypatch, capsys):
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")  # as the system hands it over
    assert main(["generate", str(checkpoint), "--prompt", latin]) == 2
    assert "--prompt='caf\\udce9' is not UTF-8" in capsys.readouterr().err
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", str(checkpoint)]) == 2
    assert "the line is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_eval_prints_each_set_and_its_groups(checkpoint, mode, capsys):
    tasks = [*files.SETS, "ruler:2048"]
    words = ["--max-tokens", "8", "--problems", "10", "--mode", mode, "--batch", "20"]
    assert main(["eval", str(checkpoint), "--tasks", *tasks, "--tries", "2", *words]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["value", "95", "%", "interval", "problems"]
    found = {m[1]: (*map(float, m.groups()[1:4]), int(m[5])) for m in map(LINE.fullmatch, lines)}
    assert len(found) == len(lines)
    for task in tasks:
        value, low, high, n = found[f"{task} score"]
        assert 0 <= low <= value <= high <= 1 and n == 10
        groups = [found[name][3] for name in found if name.startswith(f"{task}/")]
        assert len(groups) > 1 and sum(groups) == 10
        assert found[f"{task} pass@2"][3] == 10
    # One that is untrained calls no tool, and does not think of the boxed answer either.
    assert found["tool_use/nested"][0] == found["think_flags score"][0] == 0


def test_several_budgets_and_a_file_of_the_numbers(checkpoint, capsys, tmp_path):
    words = ["--max-tokens", "8", "--problems", "3", "--out", str(tmp_path / "found.json")]
    command = ["eval", str(checkpoint), "--tasks", "chain_sum", "--budget", "1", "4", *words]
    assert main(command) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["chain_sum pass@1 at 1", "chain_sum pass@1 at 4"]
    assert all(name in capsys.readouterr().out for name in list(found)[:1])
    words[-1] = str(tmp_path / "none" / "found.json")
    assert main([*command[:4], *words]) == 2 and "is no folder" in capsys.readouterr().err


class Obedient:
    """Knows the answers and opens a reply in the wanted mode, unless the prompt has done so."""

    def __init__(self, tokenizer: Tokenizer, rows: list[files.Row]) -> None:
        self.tokenizer, self.rows = tokenizer, rows

    def generate(self, prompts, params):
        return [[self.reply(*pair)] for pair in zip(prompts, self.rows, strict=True)]

    def reply(self, prompt: list[int], row: files.Row) -> Completion:
        asked = self.tokenizer.decode(prompt)
        flags = re.findall(r"/(think|no_think)\b(?!>)", asked.replace("</think>", ""))
        block = EMPTY_THINKING if flags and flags[-1] == "no_think" else "<think>\nx\n</think>\n\n"
        begun = asked.endswith(EMPTY_THINKING)
        said = f"{'' if begun else block}\\boxed{{{row['answer']}}}"
        tokens = [*self.tokenizer.encode(said), self.tokenizer.eos]
        return Completion(tokens, [0.0] * len(tokens), [1] * len(tokens), "stop")


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_who_obeys_the_flags_is_let_choose_the_mode(checkpoint, mode):
    tokenizer = Tokenizer(checkpoint)
    rows = files.rows("think_flags", 60, tokenizer)
    scores = graded(Obedient(tokenizer, rows), tokenizer, rows, SamplingParams(32), mode)
    assert scores == [[1.0]] * 60


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tool_use", "nonsense"], "--tasks nonsense is unknown: use some of .*ruler:LENGTH"),
        (["tool_use", "ruler:9x"], "LENGTH is a number of tokens"),
        (["tool_use", "ruler:60"], "ruler:60 is too short for the task single"),
        (["tool_use", "none.jsonl"], "none.jsonl cannot be read"),
        (["tool_use", "--problems", "0"], "n=0 problems"),
        (["tool_use", "--batch", "0"], "--batch=0 must be 1 or more"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sampled(checkpoint, words, says, capsys):
    assert main(["eval", str(checkpoint), "--tasks", *words]) == 2
    out, err = capsys.readouterr()
    assert re.search(says, err) and "tool_use score" not in out
