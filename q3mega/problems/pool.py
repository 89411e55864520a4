"""Where a run's reasoning problems come from: generated families, or files of one's own."""

import itertools
import random
from collections.abc import Iterator, Sequence

from q3mega.errors import UserError
from q3mega.problems import files
from q3mega.problems.base import Problem, generate
from q3mega.problems.generated.reasoning import REASONING


class Pool:
    """Problems by domain, one in ten of them held out by a hash of its text.

    names: files of JSON lines (`data.tasks.files.problems`). Without any, the domains are the
    generated families, which never run out.
    Raises UserError for files with too few problems to hold any out, or with one question whose
    rows have different references.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        distinct: dict[str, Problem] = {}
        for drawn in itertools.chain.from_iterable(map(files.problems, names)):
            _agrees(drawn, distinct.setdefault(drawn.id, drawn))
        self._rows: dict[str, list[Problem]] = {}
        for problem in distinct.values():
            self._rows.setdefault(problem.family, []).append(problem)
        self.generated = not names
        self.domains = tuple(self._rows) or REASONING
        if not self.held_out(1):
            raise UserError(
                f"problems={list(names)}: none of {len(distinct)} is held out for evaluation, as "
                "one in ten is by its hash; give more problems"
            )

    def __iter__(self) -> Iterator[Problem]:
        """The problems of the files."""
        return itertools.chain.from_iterable(self._rows.values())

    def draw(self, domain: str, n: int, seed: int, heldout: bool = False) -> list[Problem]:
        """n distinct problems of one side of the split; of files at most what they hold."""
        if self.generated:
            return generate(domain, n, seed=seed, heldout=heldout)
        side = [p for p in self._rows[domain] if p.heldout == heldout]
        return random.Random(seed).sample(side, min(n, len(side)))

    def held_out(self, n: int) -> list[Problem]:
        """n held-out problems, the domains in turn; the same ones in every stage."""
        each = -(-n // len(self.domains))
        drawn = [self.draw(domain, each, seed=0, heldout=True) for domain in self.domains]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*drawn))
        return [p for p in turns if p is not None][:n]


def _agrees(problem: Problem, first: Problem) -> None:
    if problem.answer != first.answer:
        raise UserError(
            f"{problem.meta.get('where')}: answer={problem.answer!r:.80} of "
            f"{problem.question[:60]!r}, which has answer={first.answer!r:.80} in "
            f"{first.meta.get('where')}: leave one of the rows out"
        )
