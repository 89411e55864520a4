"""Model-based reward with a reference: a judge model says whether an answer agrees with it.

The judge is any callable from prompts to P(yes): a local checkpoint here, an endpoint elsewhere. A
judge that fails raises; it never turns into a silent zero.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q3mega.data.chat import parse
from q3mega.data.tasks.general import NAMES, NOT_FOUND
from q3mega.rewards import Verdict

MAX_CHARACTERS = 60  # of an answer: what is longer is cut before the judge sees it


def judge_prompt(reference: str, answer: str) -> str:
    """The question put to the judge; tags in the answer are taken out, so it cannot speak for it."""
    plain = answer.replace("<", " ").replace(">", " ").replace("\n", " ").strip()
    return f"Reference: {reference} Answer: {plain[:MAX_CHARACTERS]} Same?"


def judge(
    completions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    probability: Callable[[list[str]], list[float]],
) -> list[Verdict]:
    """P(the reply after the thinking agrees with row["answer"]); empty or unclosed replies get 0."""
    messages = [parse(c) for c in completions]
    asked = [i for i, m in enumerate(messages) if m.closed and m.content.strip()]
    prompts = [judge_prompt(rows[i]["answer"], messages[i].content) for i in asked]
    scores = probability(prompts) if prompts else []
    if len(scores) != len(prompts):
        raise RuntimeError(f"the judge gave {len(scores)} scores for {len(prompts)} answers")
    verdicts = [Verdict(0.0, "no answer")] * len(completions)
    for i, p in zip(asked, scores, strict=True):
        verdicts[i] = Verdict(p, f"judge says yes with {p:.2f}")
    return verdicts


def judge_examples(n: int, seed: int) -> list[tuple[str, str]]:
    """n (prompt, "yes" | "no") to teach the judge: the same short answer, or another one."""
    rng = random.Random(f"judge/{seed}")

    def answer() -> str:
        kind = rng.random()
        if kind < 0.2:
            return NOT_FOUND
        return str(rng.randint(10, 99)) if kind < 0.6 else rng.choice(NAMES)

    out = []
    for _ in range(n):
        reference = answer()
        same = rng.random() < 0.5
        other = reference
        while not same and other == reference:
            other = answer()
        out.append((judge_prompt(reference, other), "yes" if same else "no"))
    return out
