"""Model-based reward with a reference, at real size: a judge grades an answer against it.

The judge is asked in both orders, reference first and answer first, and the two grades are
averaged, since judges favour a place. What a grade is worth is measured: `calibrate` fits, on
examples whose truth is known, a monotone map from grades to the probability that an answer is
right.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q3mega.chat_models.judge_prompts import Ask, Count, grades
from q3mega.errors import NoReply, UserError
from q3mega.rewards import Verdict
from q3mega.rewards.mode import reply

MAX_ANSWER_CHARACTERS = 20_000  # of an answer that is shown to the judge
MIN_EXAMPLES = 20  # examples of a calibration
Example = tuple[Mapping[str, Any], str, bool]  # (row, completion, right)


class ReferenceJudge:
    """ask, count: a judge model in text (`data.opinions`). Rows need messages and answer.

    disagreement: the mean difference of the two orders' grades so far, in [0, 1].
    """

    def __init__(self, ask: Ask, count: Count | None = None) -> None:
        self.ask, self.count = ask, count
        self.grades: NDArray[np.float64] = np.array([0.0, 1.0])  # raw grade -> probability:
        self.right: NDArray[np.float64] = np.array([0.0, 1.0])  # as it is, until calibrated
        self._differences: list[float] = []

    @property
    def disagreement(self) -> float:
        return float(np.mean(self._differences)) if self._differences else 0.0

    def __call__(
        self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[Verdict]:
        """The probability that each completion's reply, after the thinking, is right; None where
        the judge gave no grade.

        Raises JudgeFailed for a judge that gave none where nobody counts those.
        """
        replies = [reply(text) for text in completions]
        shown = [i for i, text in enumerate(replies) if text and len(text) <= MAX_ANSWER_CHARACTERS]
        raw = self._raw([(rows[i], replies[i] or "") for i in shown])
        verdicts = [Verdict(0.0, "no answer, or one too long to judge")] * len(completions)
        for i, grade in zip(shown, raw, strict=True):
            if isinstance(grade, NoReply):
                verdicts[i] = Verdict(None, f"not judged: {grade.rule}")
                continue
            value = float(np.interp(grade, self.grades, self.right))
            verdicts[i] = Verdict(value, f"graded {10 * grade:.1f} of 10")
        return verdicts

    def calibrate(self, examples: Sequence[Example]) -> dict[str, float]:
        """{accuracy, auc, disagreement} on the examples; from here on grades are probabilities.

        accuracy: of a map that was fitted on one half, on the other. Raises UserError for too few
        examples, or for a judge that cannot tell right answers from wrong ones.
        """
        graded = self._raw([(row, reply(text) or "") for row, text, _ in examples])
        known = [
            (grade, float(right))
            for grade, (*_, right) in zip(graded, examples, strict=True)
            if not isinstance(grade, NoReply)
        ]
        raw, truth = (
            np.array([grade for grade, _ in known]),
            np.array([right for _, right in known]),
        )
        if len(truth) < MIN_EXAMPLES or truth.min() == truth.max():
            raise UserError(
                f"judge_examples: {len(truth)} examples; give {MIN_EXAMPLES} or more, right and "
                "wrong"
            )
        auc, right = _auc(raw, truth), int(truth.sum())
        wrong = len(truth) - right
        # Chance alone gives more in one case of twenty (Mann-Whitney).
        luck = 0.5 + 1.645 * math.sqrt((len(truth) + 1) / (12 * right * wrong))
        if auc <= luck:
            raise UserError(
                f"judge_examples: the judge ranks a right answer above a wrong one in {auc:.0%} of "
                f"pairs, no better than chance, up to {luck:.0%}: give more examples, or take "
                "another judge"
            )
        order = np.argsort(truth, kind="stable")  # so that each half has right and wrong ones
        raw, truth = raw[order], truth[order]
        hits = []
        for side in (0, 1):
            guessed = np.interp(raw[1 - side :: 2], *_monotone(raw[side::2], truth[side::2])) > 0.5
            hits += list(guessed == (truth[1 - side :: 2] > 0.5))
        self.grades, self.right = _monotone(raw, truth)
        return {
            "accuracy": float(np.mean(hits)),
            "auc": auc,
            "disagreement": self.disagreement,
        }

    def _raw(self, pairs: Sequence[tuple[Mapping[str, Any], str]]) -> list[float | NoReply]:
        """Mean grade of both orders, in [0, 1], or why there is none."""
        asked = [(row["messages"][-1]["content"], row["answer"], text) for row, text in pairs]
        both = grades(asked, self.ask, self.count) if asked else []
        self._differences += [abs(g[0] - g[1]) / 10 for g in both if not isinstance(g, NoReply)]
        return [g if isinstance(g, NoReply) else (g[0] + g[1]) / 20 for g in both]


def _auc(raw: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Share of (right, wrong) pairs in which the right one has the higher grade; ties are half."""
    gaps = raw[truth == 1][:, None] - raw[truth == 0][None, :]
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def _monotone(
    raw: NDArray[np.float64], truth: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(grades, probabilities): isotonic regression by pooling adjacent violators.

    One right and one wrong answer that nobody saw keep the ends away from 0 and 1.
    """
    grid = np.unique(raw)
    blocks: list[list[float]] = []  # [right, count, grades in it]
    for grade in grid:
        here = truth[raw == grade]
        blocks.append([here.sum() + 0.5 / len(grid), len(here) + 1.0 / len(grid), 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            right, count, size = blocks.pop()
            blocks[-1] = [blocks[-1][0] + right, blocks[-1][1] + count, blocks[-1][2] + size]
    values = [right / count for right, count, size in blocks for _ in range(int(size))]
    return grid, np.array(values)
