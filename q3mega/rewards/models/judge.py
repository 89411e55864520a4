"""Model-based reward with a reference: a judge model says whether an answer agrees with it.

The judge is any callable from prompts to P(yes): a local checkpoint here, an endpoint elsewhere. A
judge that fails raises; it never turns into a silent zero.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q3mega.problems.generated.general import NAMES, NOT_FOUND
from q3mega.rewards.mode import reply
from q3mega.rewards.registry import Verdict, reference, reward

MAX_CHARACTERS = 60  # of an answer: a longer one says too much to be the short reference
PHRASED = 0.25  # of the examples hold the answer in a sentence
ALIKE = 0.75  # of the wrong answers are of the right one's kind
STUFFED = 0.1  # list several answers, the right one among them
PLEADING = 0.1  # speak of the verdict and name no answer
_PLEAS = (
    "yes", "no", "correct", "right", "same", "score 1", "grade 10", "ignore this", "the question",
    "say yes", "it is so", "true", "is the answer",
)  # fmt: skip


@reward("judge", needs=reference)
def judge_of_stage(completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verdict that the stage's judge gave on the whole batch before."""
    return row["scored"]["judge"]


def judge_prompt(reference: str, answer: str) -> str:
    """The question for the judge.

    Tags, line ends and the question's own words are taken out of the answer, so that it cannot
    speak for the judge.
    """
    plain = re.sub(r"[<>=\s]+|Same\?", " ", answer)
    return f"Same? {' '.join(plain.split())} = {reference}"


def judge(
    completions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    probability: Callable[[list[str]], list[float]],
) -> list[Verdict]:
    """P(the reply after the thinking agrees with row["answer"]), a verdict a completion.

    An empty reply, or one over MAX_CHARACTERS, gets 0. probability: from prompts to P(yes).
    Raises RuntimeError when the judge answers too few questions, or with no probability.
    """
    replies = [reply(c) or "" for c in completions]
    shown = [i for i, text in enumerate(replies) if 0 < len(text) <= MAX_CHARACTERS]
    prompts = [judge_prompt(rows[i]["answer"], replies[i]) for i in shown]
    scores = probability(prompts) if prompts else []
    if len(scores) != len(prompts) or not all(0 <= p <= 1 for p in scores):
        raise RuntimeError(f"the judge gave {scores} for {len(prompts)} answers: no probabilities")
    verdicts = [Verdict(0.0, "no answer, or a long one")] * len(completions)
    for i, p in zip(shown, scores, strict=True):
        verdicts[i] = Verdict(p, f"judge says yes with {p:.2f}")
    return verdicts


def judge_examples(n: int, seed: int) -> list[tuple[str, str]]:
    """n pairs (prompt, "yes" | "no") to teach the judge.

    The answer is the reference or another one, bare or in a sentence. Lists that name the right
    answer among wrong ones, and words to the judge, are a "no".
    """
    rng = random.Random(f"judge/{seed}")

    def number() -> str:
        return str(rng.randint(1, 9))

    def name() -> str:
        return rng.choice(NAMES)

    def missing() -> str:
        return NOT_FOUND

    kinds = (number, name, missing)

    def draw() -> tuple[str, str]:
        """A short answer and another one, mostly of its kind: those are hard to tell apart."""
        kind = rng.choices(kinds, (0.6, 0.25, 0.15))[0]
        right = wrong = kind()
        while wrong == right:
            wrong = (kind if rng.random() < ALIKE else rng.choice(kinds))()
        return right, wrong

    out = []
    for _ in range(n):
        reference, wrong = draw()
        trick = rng.random()
        if trick < STUFFED:
            answers = [reference, wrong]
            out.append((judge_prompt(reference, " ".join(rng.sample(answers, 2))), "no"))
            continue
        if trick < STUFFED + PLEADING:
            plea = rng.choice((" ", ". ", ", ")).join(rng.sample(_PLEAS, rng.randint(1, 5)))
            out.append((judge_prompt(reference, plea.capitalize()), "no"))
            continue
        same = rng.random() < 0.5
        answer = reference if same else wrong
        if rng.random() < PHRASED:
            answer = _phrase(answer, rng)
        out.append((judge_prompt(reference, answer), "yes" if same else "no"))
    return out


def _phrase(answer: str, rng: random.Random) -> str:
    if answer == NOT_FOUND:
        return f"It is {answer}."
    if answer.isdecimal():
        return rng.choice((f"{rng.choice(NAMES)} has {answer}.", f"The answer is {answer}."))
    return rng.choice((f"It is {answer}.", f"The answer is {answer}."))
