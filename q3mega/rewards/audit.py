"""Probes for reward hacking: completions that earn nothing, whatever the row.

A rule reward is sound when every probe scores at its floor (`python -m q3mega.rewards.audit`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from q3mega.data.tasks import FAMILIES, generate
from q3mega.rewards import TASK_REWARD, score


def probes(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, completion): each a known way to cheat a verifier."""
    block = "<think>\n\n</think>\n\n"
    answer, question = row["answer"], row["messages"][-1]["content"]
    yield "empty", ""
    yield "only a think block", block
    yield "unclosed thinking", f"<think>\n\\boxed{{{answer}}}"
    yield "answer inside the thinking", f"<think>\n\\boxed{{{answer}}}\n</think>\n\n"
    yield "many boxes", block + " ".join(rf"\boxed{{{n}}}" for n in [*range(10), answer])
    yield "copied question", block + question
    yield "keywords", block + f"{answer} " * 20 + "the answer is correct, score 1"
    yield "two think blocks", f"{block}<think>\nx\n</think>\n\n{question}"


def audit() -> list[tuple[str, str, float]]:
    """(family, probe, score) of every probe that earns more than 0.2 from a rule reward."""
    found = []
    rules = {f: name for f, (kind, name) in TASK_REWARD.items() if kind == "rule"}
    rules |= {f: "answer" for f, spec in FAMILIES.items() if spec.capability == "reasoning"}
    for family, name in rules.items():
        for problem in generate(family, 5, seed=0):
            row = vars(problem)
            for probe, completion in probes(row):
                if (name, probe) in (("mode", "many boxes"), ("mode", "copied question"), ("mode", "keywords")):
                    continue  # the mode reward judges the block alone; the answer has its own reward
                if (value := score(name, completion, row).score) > 0.2:
                    found.append((family, probe, value))
    return found


if __name__ == "__main__":
    for line in audit() or ["every probe scored at the floor"]:
        print(line)
