"""The stages on problems of one's own; teacher and judge are scripts behind a real server."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.chat_endpoint import served

from q3mega.cli import main
from q3mega.config.recipe import Recipe
from q3mega.data.batch import Sample
from q3mega.data.tokenizer import Tokenizer

RECIPE = Path(__file__).parents[1] / "helpers" / "own_problems.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.dist]

THINKING = (
    "The user wants a word that has the letter in it, so I look for a short one, and then I check "
    "that the letter is there before I say it."
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


MINE = """
from q3mega.rewards import Verdict, reward

@reward("short")
def short(completion, row):
    return Verdict(float(len(completion) < 200), "short?")
"""


def write_files(folder):
    (folder / "mine.py").write_text(MINE)
    letter = [{"kind": "letter", "letter": "e", "at_least": 1}]
    rule = {"reward": "constraints_strict", "constraints": letter}
    lines(
        folder / "problems.jsonl",
        [{"question": f"Say word {n} with an e.", "domain": "letters"} | rule for n in range(150)]
        + [{"question": f"Write number {n}.", "domain": "numbers"} | rule for n in range(60)]
        + [{"question": f"Say {n}? And {n + 1}?", "domain": "numbers"} | rule for n in range(20)],
    )
    lines(
        folder / "chats.jsonl",
        [
            {"question": f"Greet person {n}.", "response": "Hello there!" if n % 3 else "No."}
            | ({"checklist": ["It greets."]} if n % 2 else {})
            for n in range(30)
        ],
    )
    judged = {"reward": {"judge": 0.7, "short": 0.3}, "answer": "seven", "mode": "no_think"}
    lines(folder / "tasks.jsonl", [{"question": f"Task {n}"} | judged for n in range(60)])
    lines(
        folder / "open.jsonl",
        [{"question": f"Tell me about {n}", "reward": "preference"} for n in range(60)],
    )
    lines(
        folder / "judged.jsonl",
        [
            {"question": f"Task {n}", "answer": "seven", "response": r, "right": r == "seven"}
            for n in range(20)
            for r in ("seven", "eight")
        ],
    )
    lines(
        folder / "pairs.jsonl",
        [
            {"question": f"Tell me about {n}", "chosen": "With pleasure.", "rejected": "No."}
            for n in range(80)
        ],
    )


def last_part(prompt):
    fence = re.search(r"^=== [0-9a-f]{16} ===$", prompt, re.M).group()
    return prompt.split(f"\n{fence}")[-2]


def script(request, number):
    """A teacher that answers well with one candidate and badly with the other, and a judge."""
    prompt = request["messages"][-1]["content"]
    if request["model"] == "teacher":
        good = {"reasoning_content": THINKING, "content": "tree"}
        bad = {"reasoning_content": THINKING, "content": "oak"}
        return [bad, good][: request["n"]]
    if "how many separate questions" in prompt:
        word = re.search(r"word (\d+)", prompt)
        open_ended = bool(word) and int(word[1]) % 10 == 3
        domain = "letters" if "word" in prompt else "numbers"
        return [json.dumps({"questions": 1, "open_ended": open_ended, "domain": domain})]
    if "is a guess" in prompt:
        return ['{"guess": false, "agrees": true, "consistent": true}']
    if "Write a checklist" in prompt:
        return ['{"items": ["It greets.", "It is short."]}']
    if "for each statement" in prompt:
        met = "Hello" in last_part(prompt)
        items = len(re.findall("^- ", prompt, re.M))
        return [json.dumps({"met": [met] * items})]
    if "Grade how well" in prompt:
        return [json.dumps({"score": 9 if prompt.count("\nseven\n") == 2 else 1})]
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    return ["the" if prompt.endswith("5 with an e.") else "a thought"]  # answered at once


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_files(folder)
    with served(script, models=("teacher", "judge")) as server:
        (folder / "own.yaml").write_text(RECIPE.read_text().replace("URL", server.url))
        command = [sys.executable, "-m", "q3mega", "run", "own.yaml", "--run-dir", "run"]
        process = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=600, env=os.environ
        )
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return folder, server.requests


def data(folder, stage, name):
    recipe = Recipe.load(folder / "own.yaml")
    path = recipe.stage_dir(folder / "run", stage) / name
    return json.loads(path.read_text())


def test_the_cold_start_filters_queries_and_responses(ran):
    folder, requests = ran
    drops = data(folder, "cold_start", "data/drops.json")
    assert set(drops) == {
        "query: several_questions", "query: judged open-ended", "query: answered without thinking",
        "response: wrong_answer",
    }  # fmt: skip
    filter_report = data(folder, "cold_start", "data/filter_report.json")
    queries = data(folder, "cold_start", "data/queries.json")
    assert filter_report["queries"] == 100 and filter_report["samples"] == 40
    assert len(queries) == filter_report["queries of balanced domains"]
    assert len(set(Counter(q["family"] for q in queries).values())) == 1
    assert filter_report["responses"] == 2 * len(queries) == 2 * drops["response: wrong_answer"]
    samples = data(folder, "cold_start", "data/samples.json")
    assert {(s["thinking"], s["response"]) for s in samples} == {(THINKING, "tree")}
    dropped = Recipe.load(folder / "own.yaml").stage_dir(folder / "run", "cold_start")
    rows = [json.loads(row) for row in (dropped / "data/dropped.jsonl").read_text().splitlines()]
    assert Counter(row["rule"] for row in rows) == drops
    assert all(row["response"] == "oak" for row in rows if "wrong_answer" in row["rule"])
    asked = [r for r in requests if r["model"] == "teacher"]
    assert len(asked) == len(queries) and all(r["n"] == 2 for r in asked)  # two ranks, asked once


def test_held_out_problems_are_in_no_stage(ran):
    folder, _ = ran
    queries = data(folder, "cold_start", "data/queries.json")
    problems = data(folder, "reasoning_rl", "data/problems.json")
    assert not {q["id"] for q in queries} & {p["id"] for p in problems}
    assert not any(int(p["id"], 16) % 10 == 0 for p in (*queries, *problems))
    assert set(data(folder, "reasoning_rl", "eval.json")) >= {
        "think_accuracy", "think_accuracy/letters", "think_accuracy/numbers",
    }  # fmt: skip


def test_selection_keeps_to_its_band(ran):
    folder, _ = ran
    filter_report = data(folder, "reasoning_rl", "data/filter_report.json")
    bands = [n for step, n in filter_report.items() if step.startswith("right in")]
    drops = data(folder, "reasoning_rl", "data/drops.json")
    assert sum(bands) == filter_report["problems"] - drops["problem: used in the cold start"]
    assert drops.get("problem: not learnable", 0) == bands[0]
    assert drops.get("problem: too easy", 0) == bands[-1]


def test_fusion_holds_chats_to_checklists(ran):
    folder, _ = ran
    assert data(folder, "mode_fusion", "data/drops.json")["chat: misses its checklist"] == 10
    tokenizer = Tokenizer(folder / "run/tokenizer")
    samples = [Sample(**row) for row in data(folder, "mode_fusion", "data/samples.json")]
    texts = [tokenizer.decode(s.tokens) for s in samples]
    greetings = [t for t in texts if "Hello there!" in t]
    assert len(greetings) == 20 and not any("No." in t for t in texts)
    for sample, text in zip(samples, texts, strict=True):
        if "Hello there!" in text:
            learnt = tokenizer.decode(
                [t for t, w in zip(sample.tokens, sample.weights, strict=True) if w]
            )
            # The block is learned where a flag asks for it, and not where it is pre-filled.
            assert learnt.startswith("<think>\n\n</think>") == ("/no_think" in text), text


def test_general_rl_scores_by_judge_preference_and_rules(ran):
    folder, _ = ran
    found = data(folder, "general_rl", "eval.json")
    assert found["judge_accuracy"]["value"] == found["judge_auc"]["value"] == 1.0
    assert found["judge_disagreement"]["value"] == 0.0
    assert found["preference_pairwise_accuracy"]["n"] > 3
    assert {"score/tasks", "score/open"} <= set(found)
    audit = data(folder, "general_rl", "data/audit.json")
    assert {(task, row["reward"]) for task, row in audit.items()} >= {
        ("tasks", "judge"), ("open", "preference"), ("letters", "rule"),
    }  # fmt: skip
    assert {"reward/tasks", "reward/letters"} <= logged(folder, "general_rl")
    names = {"reward/letters", "reward_part/constraints_strict", "reward_std/constraints_strict"}
    assert names <= logged(folder, "reasoning_rl")


def logged(folder, stage):
    folder = Recipe.load(folder / "own.yaml").stage_dir(folder / "run", stage)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name for row in rows for name in row}


def test_the_report_shows_funnels_and_scores(ran, monkeypatch, capsys):
    folder, _ = ran
    text = (folder / "run/report.html").read_text()
    for word in (
        "answered without thinking",
        "queries of balanced domains",
        "score/tasks",
        "standard deviation",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("problems=[none.jsonl]", "none.jsonl cannot be read"),
        ("rewards=[none.py]", "none.py: must be a Python file that is there"),
        ("cold_start.teacher=null", "stages.cold_start.teacher answers the problems of files"),
        ("mode_fusion.direct=5", "stages.mode_fusion.direct=5"),
        ("mode_fusion.non_thinking={problems.jsonl: 3}", "problems.jsonl:1: response=None"),
        ("problems=[tasks.jsonl]", "reward=judge of 'Task 0' asks a model"),
        ("problems=[agent_sql]", "has tools to run, and reasoning RL samples one turn"),
        ("general_rl.problems={agent_go: 1.0}", "'agent_go' holds no problems: use one of"),
        ("general_rl.judge_model=null", "general_rl.judge_model: reward=judge of 'Task 0'"),
        ("general_rl.preference.file=chats.jsonl", "chats.jsonl:1: chosen and rejected"),
        ("general_rl.judge_examples=chats.jsonl", "a row needs answer, the reference, and right"),
    ],
)
def test_bad_files_are_refused_before_anything_is_computed(
    tmp_path, monkeypatch, capsys, change, message
):
    write_files(tmp_path)
    (tmp_path / "own.yaml").write_text(RECIPE.read_text().replace("URL", "http://127.0.0.1:9/v1"))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "own.yaml", change, "--run-dir", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/0*"))
