"""Pre-training documents: real text and generated ones, as megatron-core indexed datasets.

A mixture names kinds of documents and their share of the tokens; `Mixture` turns it into the global
batch of any step, a pure function of the step, so that a resumed run reads on where it stopped.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from q3mega import device  # noqa: F401

# isort: split
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from q3mega._data import blend_index
from q3mega.curate.dataset import Curated
from q3mega.data import package_text
from q3mega.data.batch import Sample
from q3mega.data.chat import render
from q3mega.data.tagged import TaggedText
from q3mega.data.tokenizer import Tokenizer
from q3mega.problems import Problem, generate
from q3mega.problems.generated import general
from q3mega.problems.generated.reasoning import REASONING
from q3mega.problems.generated.solutions import response_text, solve, text_documents, thinking_text

# The reasoning families and their shares of the pre-training problems.
SHARES = {"chain_sum": 0.4, "modular_product": 0.28, "number_sorting": 0.32}
# How many of the worked steps are wrong: a base model that knows the way and stumbles on it. Fewer
# of the sums, which have most facts and so are the slowest to get rid of their slips.
STEP_ERROR_RATE = {"chain_sum": 0.21, "modular_product": 0.28, "number_sorting": 0.27}
CURATED = "curated:"  # a kind that is a folder
MOST_TEXT = 300_000  # characters of real text of a kind: at laptop scale a mixture reads no more
VALUES = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # of pass keys
# The general tasks of chat; those with tools twice, since a call is the longest reply to learn.
# Constraints and programs are met in fusion first.
SHORT_TASKS = (
    *(name for name in general.GENERAL if name not in ("bounded", "program")),
    "calculator",
    "lookup",
)


@dataclass
class FilterReport:
    """What came to each step of a corpus's curation, and what each rule dropped; documents."""

    steps: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)


@functools.cache
def _real_text(kind: str) -> tuple[list[str], FilterReport]:
    names = [s.name for s in package_text.sources().values() if s.kind == kind]
    texts = [
        d for name in names for d in _first(MOST_TEXT // len(names), package_text.documents(name))
    ]
    random.Random(kind).shuffle(texts)
    distinct, copies = package_text.deduplicate(texts)
    questions = [p.question for f in REASONING for p in generate(f, 100, seed=0, heldout=True)]
    kept, contaminated = package_text.decontaminate(distinct, questions)
    steps = {"read": len(texts), "no copy, nor near one": len(distinct), "no question": len(kept)}
    drops = {"copy or near copy": copies, "words of a held-out question": contaminated}
    return kept, FilterReport(
        Counter({f"{kind}: {step}": n for step, n in steps.items()}),
        Counter({f"{kind}: {rule}": n for rule, n in drops.items() if n}),
    )


def _first(characters: int, texts: Iterator[str]) -> Iterator[str]:
    for document in texts:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def real_text(kind: str, heldout: bool = False) -> list[str]:
    """Documents of a text kind ("prose", "code", "science"), read once a process.

    Near-duplicates and whatever holds an evaluation question are dropped; one in ten is held out.
    """
    kept, _ = _real_text(kind)
    return kept[::10] if heldout else [d for i, d in enumerate(kept) if i % 10]


def _text(kind: str, rng: random.Random, heldout: bool) -> Iterator[str]:
    texts = real_text(kind, heldout)
    while True:
        yield from rng.sample(texts, len(texts))


def _facts(rng: random.Random) -> Iterator[str]:
    """Lines of one step each, the alphabet of the worked solutions."""
    while True:
        lines = []
        for _ in range(12):
            a, b = rng.sample(range(10), 2)
            lines.append(f"{a}+{b - a}={b}" if a < b else f"{a}-{a - b}={b}")
        yield "\n".join(lines)


def _problems(rng: random.Random) -> Iterator[Problem]:
    """Training-side problems of the reasoning families by their shares, without end."""

    def stream(family: str) -> Iterator[Problem]:
        while True:
            yield from generate(family, 2000, seed=rng.randrange(2**31))

    streams = {family: stream(family) for family in SHARES}
    while True:
        (family,) = rng.choices(list(SHARES), list(SHARES.values()))
        yield next(streams[family])


def _worked(rng: random.Random) -> Iterator[str]:
    for p in _problems(rng):
        yield text_documents(p, rng, slip=STEP_ERROR_RATE[p.family], style=rng.randrange(3))[0]


def _direct(rng: random.Random) -> Iterator[str]:
    for p in _problems(rng):
        yield text_documents(p, rng)[1]


def _chat(rng: random.Random) -> Iterator[TaggedText]:
    """Worked solutions in chat markup, and short replies: what post-training builds on."""
    for p in _problems(rng):
        if rng.random() < 0.6:
            solution = solve(p, rng=rng, slip=STEP_ERROR_RATE[p.family], style=rng.randrange(3))
            thinking, reply = thinking_text(solution), response_text(solution, rng)
            turns = [{"role": "assistant", "content": reply, "reasoning_content": thinking}]
        else:
            p = general.draw(rng, SHORT_TASKS)
            turns = general.episode(p, rng, skill=0.75)
        # The list of tools takes 200 tokens: a third of the episodes show it.
        yield render([*p.messages, *turns], tools=p.tools if rng.random() < 1 / 3 else ())


def haystack(rng: random.Random) -> Iterator[str]:
    """Lines of real text without end, in lower case: to hide a capital letter in."""
    lines = [line for d in real_text("prose") for line in d.split("\n") if 20 < len(line) < 120]
    while True:
        yield rng.choice(lines).lower()


def needle(rng: random.Random) -> tuple[str, str]:
    """A pass key: how its line begins, and its value."""
    return "code @", rng.choice(VALUES)


def _retrieval(longest: int) -> Callable[[random.Random], Iterator[str]]:
    """A needle in up to `longest` characters of real text, and again and again at the end.

    Every repetition pays for a look at the letter, however it is found: with two of them the look
    back is learned in some runs only, with eight in all, and in a third of the tokens.
    """

    def documents(rng: random.Random) -> Iterator[str]:
        hay = haystack(rng)
        while True:
            beginning, value = needle(rng)
            line, length = f"{beginning}{value}.", rng.randint(0, longest)
            lines: list[str] = []
            while sum(map(len, lines)) < length:
                lines.append(next(hay))
            lines.insert(rng.randint(0, len(lines)), line)
            yield "\n".join([*lines, *[line] * 8])

    return documents


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "facts": _facts,
    "worked": _worked,
    "direct": _direct,
    "chat": _chat,
    "retrieval": _retrieval(60),  # short ones first: the look back is learned in half the tokens
}

# Characters for tokens: of the laptop's nine in ten are whole; a cut one teaches the wrong thing.
LONG = 440, 384
TEXTS = tuple(dict.fromkeys(source.kind for source in package_text.sources().values()))


def documents(
    kind: str, seed: int, *, heldout: bool = False, sequence: int = 384
) -> Iterator[TaggedText]:
    """Documents of one kind, without end, the same ones for the same seed. Chats alone have control
    tokens: what spells one in any other text is text.

    heldout: the real texts that training never sees; generated kinds only draw anew. sequence:
    tokens that the long ones are made for.
    """
    rng = random.Random(f"{kind}/{seed}")
    if kind == "chat":
        return _chat(rng)
    return map(TaggedText, _plain_documents(kind, seed, rng, heldout, sequence))


def _plain_documents(
    kind: str, seed: int, rng: random.Random, heldout: bool, sequence: int
) -> Iterator[str]:
    if folder := curated(kind):
        return Curated(folder).documents(seed, heldout)
    if kind == "retrieval_long":
        return _retrieval(sequence * LONG[0] // LONG[1])(rng)
    return _text(kind, rng, heldout) if kind in TEXTS else KINDS[kind](rng)


def curated(kind: str) -> str | None:
    """The folder of a kind that q3mega curate has written, `curated:FOLDER`."""
    return kind.removeprefix(CURATED) if kind.startswith(CURATED) else None


def _token_documents(
    kind: str,
    seed: int,
    sequence: int,
    tokenizer: Tokenizer,
    held_out: Sequence[str],
    books: FilterReport,
) -> Iterator[list[list[int]]]:
    """Documents of one kind in batches, each with its end, without end; none holds a question of
    `held_out`, to the letter."""
    if folder := curated(kind):
        data = Curated(folder)
        data.check_tokenizer(tokenizer.path)
        stream = data.token_documents(seed)
        while True:
            yield list(itertools.islice(stream, 64))
    source = documents(kind, seed, sequence=sequence)
    distinct: set[int] = set()
    while True:
        drawn = list(itertools.islice(source, 64))
        clean = [d for d in drawn if not any(question in d for question in held_out)]
        distinct.update(map(hash, clean))
        books.steps[f"{kind}: drawn"] += len(drawn)
        books.steps[f"{kind}: without a held-out question"] += len(clean)
        books.steps[f"{kind}: of these, different ones"] = len(distinct)
        if len(clean) < len(drawn):
            books.drops[f"{kind}: a held-out question"] += len(drawn) - len(clean)
        yield [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(clean)]


def _prefix(folder: Path, kind: str) -> str:
    """Where the dataset of a kind is; a curated one has a path in its name."""
    return str(folder / quote(kind, safe=""))


_Kind = TypeVar("_Kind", bound=str)  # a Mapping is invariant in its keys


def build(
    mixture: Mapping[_Kind, float],
    tokens: int,
    sequence: int,
    tokenizer: Tokenizer,
    seed: int,
    folder: Path,
    held_out: Sequence[str] = (),
) -> FilterReport:
    """Write one indexed dataset a kind, with enough documents for its share of `tokens`.

    Documents longer than `sequence` are cut into pieces of that length; each ends in <|endoftext|>.
    held_out: questions that no document may hold. Word n-grams, which real text is searched by,
    would not do here: they leave out the signs, and 2+7-8 is not 2-7+8. Returns what came and went
    of all kinds but the curated ones, whose folders have books of their own.
    """
    total, books = sum(mixture.values()), FilterReport()
    for kind, weight in mixture.items():
        builder = IndexedDatasetBuilder(f"{_prefix(folder, kind)}.bin", dtype=np.int32)
        tokens_wanted, have = int(tokens * weight / total) + sequence, 0
        if kind in TEXTS:
            _, read = _real_text(kind)
            books.steps += read.steps
            books.drops += read.drops
        batches = _token_documents(kind, seed, sequence, tokenizer, held_out, books)
        while have < tokens_wanted:
            for ids in next(batches):
                for i in range(0, len(ids), sequence):
                    piece = ids[i : i + sequence]
                    builder.add_document(torch.tensor(piece), [len(piece)])
                have += len(ids)
        builder.finalize(f"{_prefix(folder, kind)}.idx")
    return books


class Mixture:
    """Global batches of `tokens_per_step` tokens from the datasets of `folder`, in mixed order."""

    def __init__(
        self,
        mixture: Mapping[_Kind, float],
        folder: Path,
        steps: int,
        tokens_per_step: int,
        seed: int,
    ) -> None:
        self.data = [IndexedDataset(_prefix(folder, kind)) for kind in mixture]
        lengths = [d.sequence_lengths for d in self.data]
        shares = [w / n.mean() for w, n in zip(mixture.values(), lengths, strict=True)]  # documents
        mean = sum(shares) / sum(
            s / n for s, n in zip(mixture.values(), [1] * len(shares), strict=True)
        )
        budget = int(steps * tokens_per_step * mean * 1.2) + 64
        which, positions = blend_index(np.array(shares), budget)
        rng = np.random.default_rng(seed)
        orders = [
            np.concatenate([rng.permutation(len(n)) for _ in range(budget // len(n) + 1)])
            for n in lengths
        ]
        document = np.array([orders[d][i] for d, i in zip(which, positions, strict=True)])
        size = np.array([lengths[d][i] for d, i in zip(which, document, strict=True)])
        self.which, self.document = which, document
        self.ends = np.searchsorted(size.cumsum(), np.arange(1, steps + 1) * tokens_per_step)
        assert self.ends[-1] < budget, "the blend is too short for the run"

    def __call__(self, step: int) -> list[Sample]:
        """The documents of step 1, 2, ...; every token but the first of each carries loss."""
        first = self.ends[step - 2] if step > 1 else 0
        samples = []
        for i in range(first, self.ends[step - 1]):
            tokens = self.data[self.which[i]][self.document[i]].tolist()
            if len(tokens) > 1:
                samples.append(Sample(tokens, [0.0] + [1.0] * (len(tokens) - 1)))
        return samples
