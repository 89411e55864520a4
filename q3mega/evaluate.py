"""Evaluation: accuracies with intervals, pass@k, the thinking-budget curve, retrieval, held-out loss.

Problems are held out by a hash of their text; every number comes with n and a 95 % interval.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from q3mega.algorithms.losses import supervised
from q3mega.data import corpus
from q3mega.data.batch import Batch, Sample, pack
from q3mega.data.chat import parse, render
from q3mega.data.tasks import Problem, generate
from q3mega.data.tasks.solutions import boxed, check
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, Head, parallel
from q3mega.rollout import Completion, Sampler, SamplingParams

Mode = Literal["think", "no_think"]
Z95 = 1.959964


def proportion(outcomes: Iterable[float]) -> dict[str, float]:
    """{value, n, low, high} of outcomes in [0, 1]: Wilson's 95 % interval (exact 0/1 or graded)."""
    values = list(outcomes)
    n, p = len(values), sum(values) / max(1, len(values))
    if not n:
        return {"value": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return {"value": p, "n": n, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> dict[str, float]:
    """Unbiased pass@k over problems (Chen et al., 2107.03374): 1 - C(n-c, k) / C(n, k)."""
    values = []
    for tries in correct:
        n, c = len(tries), sum(tries)
        values.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return proportion(values)


def held_out(n: int, difficulty: Mapping[str, tuple[int, int]] | None = None) -> list[Problem]:
    """n held-out reasoning problems, the families in turn; the same ones in every stage."""
    share = -(-n // len(corpus.REASONING))
    drawn = [
        generate(f, share, seed=0, heldout=True, difficulty=(difficulty or {}).get(f))
        for f in corpus.REASONING
    ]
    return list(itertools.chain.from_iterable(zip(*drawn, strict=True)))[:n]


def flagged(problem: Problem, mode: Mode | None) -> list[dict[str, Any]]:
    """The problem's messages, with /think or /no_think added to the last user turn."""
    *before, last = problem.messages
    content = f"{last['content']} /{mode}" if mode else last["content"]
    return [*before, {**last, "content": content}]


@dataclass(frozen=True)
class Answer:
    """One completion of one problem, judged."""

    problem: Problem
    completion: Completion
    text: str

    @property
    def correct(self) -> bool:
        message = parse(self.text)
        answer = boxed(message.content) if message.closed else None
        return answer is not None and check(self.problem, answer)

    @property
    def answered(self) -> bool:
        """A boxed answer outside of a closed think block, right or wrong."""
        message = parse(self.text)
        return message.closed and boxed(message.content) is not None

    @property
    def mode(self) -> Mode | None:
        """Which mode the completion is in; None when its tags are broken."""
        message = parse(self.text)
        if message.thinking is None or not message.closed or not self.text.startswith("<think>"):
            return None
        if self.text.count("<think>") != 1 or self.text.count("</think>") != 1:
            return None
        return "think" if message.thinking.strip() else "no_think"


def answers(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    mode: Mode | None = None,
) -> list[list[Answer]]:
    """params.n answers to each problem, the work shared by the data-parallel ranks."""
    rank, size = parallel.data_rank(), parallel.data_size()
    mine = list(enumerate(problems))[rank::size]
    prompts = [tokenizer.encode(render(flagged(p, mode), tools=p.tools, add_generation_prompt=True)) for _, p in mine]
    completions = sampler.generate(prompts, replace(params, seed=params.seed + rank)) if mine else []
    done = [(i, c) for (i, _), c in zip(mine, completions, strict=True)]
    found = dict(parallel.gather_over_data(done))
    return [
        [Answer(p, c, text_of(c, tokenizer)) for c in found[i]] for i, p in enumerate(problems)
    ]


def text_of(completion: Completion, tokenizer: Tokenizer) -> str:
    """A completion's text without its stop token."""
    tokens = completion.tokens
    return tokenizer.decode(tokens[:-1] if completion.finish_reason == "stop" else tokens)


def accuracy(found: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Share of right answers, over problems and tries; the interval counts problems."""
    return proportion(sum(a.correct for a in tries) / len(tries) for tries in found)


def budget_curve(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    budgets: Sequence[int],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Accuracy against the thinking budget (Qwen3 report, figure 2), and the smallest share answered."""
    rows, shares = [], []
    for budget in budgets:
        found = answers(sampler, tokenizer, problems, replace(params, thinking_budget=budget), "think")
        rows.append(accuracy(found))
        shares.append(proportion(a.answered for tries in found for a in tries))
    curve = {
        "x": list(budgets),
        "y": [r["value"] for r in rows],
        "low": [r["low"] for r in rows],
        "high": [r["high"] for r in rows],
        "xlabel": "thinking budget, tokens",
        "ylabel": "accuracy",
    }
    return curve, min(shares, key=lambda s: s["value"])


def loss_by_kind(
    engine: Engine, tokenizer: Tokenizer, kinds: Iterable[str], sequence: int, seed: int
) -> dict[str, dict[str, float]]:
    """Nats a token on fresh documents of each kind (text kinds: from another shuffle)."""
    results = {}
    for kind in kinds:
        texts = itertools.islice(corpus.documents(kind, seed), 48)
        tokens = [ids[:sequence] for ids in tokenizer.encode_batch(list(texts)) if len(ids) > 1]
        mine = [Sample(t, [0.0] + [1.0] * (len(t) - 1)) for t in tokens][parallel.data_rank() :: parallel.data_size()]
        parts = engine.evaluate(pack(mine, 4 * sequence), _nats)
        sums = np.array(parallel.gather_over_data(parts))
        total, n = sums.sum(0)
        results[f"loss_{kind}"] = {"value": total / n, "n": int(n), "low": total / n, "high": total / n}
    return results


def _nats(head: Head, batch: Batch) -> tuple[float, float]:
    return float(supervised(head, batch)[0]), float(batch.loss_weights.sum())


def retrieval(
    engine: Engine, tokenizer: Tokenizer, length: int, n: int, seed: int
) -> dict[str, float]:
    """Share of key-value documents of about `length` tokens whose asked-for value is read back.

    Teacher-forced arg-max on every token of the value, which is what greedy decoding would give.
    """
    rng = random.Random(seed)
    per_pair = len(tokenizer.encode("key 123 is 456\n"))
    samples = []
    for _ in range(n):
        body, question, answer = corpus.retrieval_document(rng, (length - 24) // per_pair)
        prompt, value = tokenizer.encode(body + question), tokenizer.encode(answer)
        samples.append(Sample(prompt + value, [0.0] * len(prompt) + [1.0] * len(value)))
    mine = samples[parallel.data_rank() :: parallel.data_size()]
    parts = engine.evaluate(pack(mine, max(map(len, samples))), _read_back)
    return proportion(hit for part in parallel.gather_over_data(parts) for hit in part)


def _read_back(head: Head, batch: Batch) -> list[bool]:
    asked = batch.loss_weights > 0
    guess = (head.hidden[asked] @ head.weight.T).argmax(-1)  # one process holds the whole lm_head
    wrong = torch.zeros(len(batch.cu_seqlens) - 1).index_add(
        0, batch.seq_ids[asked], (guess != batch.targets[asked]).float()
    )
    return (wrong == 0).tolist()
