"""Pass keys read back from long documents."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from q3mega.corpus import documents
from q3mega.data.batch import Batch, Sample, pack
from q3mega.data.tagged import TaggedText
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, LMHead, parallel
from q3mega.evaluation.intervals import proportion


def haystacks(tokenizer: Tokenizer, length: int, n: int, seed: int) -> list[Sample]:
    """n documents of `length` tokens of real text, one pass key anywhere, asked for at the end."""
    return parallel.from_first_data_rank(partial(_haystacks, tokenizer, length, n, seed))


def retrieval(engine: Engine, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the pass keys of `haystacks` that are read back.

    Teacher-forced arg-max on every token of the value, which is what greedy decoding would give.
    """
    parts = engine.evaluate(pack(parallel.local_share(samples), max(map(len, samples))), _read_back)
    return proportion(hit for part in parallel.gather_over_data(parts) for hit in part)


def _haystacks(tokenizer: Tokenizer, length: int, n: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    hay, samples = documents.haystack(rng), []
    for _ in range(n):
        beginning, value = documents.needle(rng)
        line = tokenizer.encode(f"{beginning}{value}.\n")
        question, answer = tokenizer.encode(beginning), tokenizer.encode(value)
        room = length - len(line) - len(question) - len(answer)
        straw: list[list[int]] = []
        while (missing := room - sum(map(len, straw))) > 0:
            straw.append(tokenizer.encode(TaggedText(next(hay) + "\n"))[:missing])
        straw.insert(rng.randint(0, len(straw)), line)
        prompt = [t for part in straw for t in part] + question
        samples.append(Sample(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)))
    return samples


def _read_back(head: LMHead, batch: Batch) -> list[bool]:
    """One outcome a value: a run of weighted positions."""
    is_answer = batch.loss_weights > 0
    few = replace(
        head, hidden=head.hidden[is_answer]
    )  # logits of a whole document would fill a GPU
    right = (few.logits().argmax(-1) == batch.targets[is_answer]).tolist()
    positions = is_answer.nonzero()[:, 0].tolist()
    values = itertools.groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])
    return [all(right[i] for i, _ in value) for _, value in values]
