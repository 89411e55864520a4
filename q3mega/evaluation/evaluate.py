"""Evaluation: accuracies with intervals, pass@k, thinking-budget curve, retrieval, held-out loss.

Problems are held out by a hash of their text; every number comes with n and a 95 % interval.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from q3mega.algorithms.losses import supervised
from q3mega.corpus import documents
from q3mega.data.batch import Batch, Sample, pack
from q3mega.data.chat import parse, render
from q3mega.data.tagged import TaggedText
from q3mega.data.tokenizer import Tokenizer
from q3mega.data.tool_schemas import with_schemas
from q3mega.engine import Engine, LMHead, parallel
from q3mega.environments.environment import environment_of
from q3mega.errors import UserError
from q3mega.io import whole_records
from q3mega.problems import Problem, files, generate
from q3mega.problems.generated import general
from q3mega.rewards import reward_names, reward_of, score, score_problem
from q3mega.rewards.math.answer import boxes
from q3mega.rewards.mode import mode_of
from q3mega.rollout import Completion, Sampler, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.episodes import run_episodes

Mode = Literal["think", "no_think"]
_T = TypeVar("_T")
Z95 = 1.959964
MAX_TOKENS = 160  # of an answer to a held-out problem, or what the stage allows if that is more


def proportion(outcomes: Iterable[float]) -> dict[str, float]:
    """{value, n, low, high} of outcomes: Wilson's 95 % interval where all are in [0, 1] (exact 0/1
    or graded), else the normal one."""
    values = list(outcomes)
    n, p = len(values), sum(values) / max(1, len(values))
    if not n:
        return {"value": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    if min(values) < 0 or max(values) > 1:
        half = Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return {"value": p, "n": n, "low": p - half, "high": p + half}
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": p, "n": n, "low": min(low, p), "high": max(high, p)}  # rounding at 0 and 1


def averages(scores: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """`proportion` of each problem's mean score over its tries; the interval counts problems.

    What could not be judged (None) is left out, and `unjudged` is its share where there is any.
    """
    judged = [_judged(tries) for tries in scores]
    means = proportion(statistics.fmean(tries) for tries in judged if tries)
    total, left = sum(map(len, scores)), sum(map(len, judged))
    return means if left == total else means | {"unscored_fraction": 1 - left / total}


def pass_at_k(correct: Sequence[Sequence[bool | None]], k: int) -> dict[str, float]:
    """Unbiased pass@k over problems (Chen et al., 2107.03374): 1 - C(n-c, k) / C(n, k).

    A problem of which fewer than k tries could be judged is left out.
    """
    values = []
    for tries in map(_judged, correct):
        n, c = len(tries), sum(tries)
        if n >= k:
            values.append(1.0 - math.comb(n - c, k) / math.comb(n, k))
    return proportion(values)


def _judged(scores: Iterable[_T | None]) -> list[_T]:
    return [score for score in scores if score is not None]


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
    max_tokens: int

    @cached_property
    def correct(self) -> bool | None:
        """Full marks from the problem's reward; None where it cannot judge."""
        tokens = len(self.completion.tokens)
        verdict = score_problem(self.problem, self.text, tokens=tokens, max_tokens=self.max_tokens)
        return None if verdict.score is None else verdict.score >= 1

    @property
    def answered(self) -> bool:
        """A reply after the thinking, right or wrong; in a box where the answer belongs there."""
        message = parse(self.text)
        boxed = reward_of(self.problem) == "answer"
        return message.closed and bool(boxes(message.content) if boxed else message.content)

    @property
    def mode(self) -> str | None:
        """Which mode the completion is in; None when its tags are broken."""
        return mode_of(self.text)


def answers(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    mode: Mode | None = None,
) -> list[list[Answer]]:
    """params.n answers to each problem, the work shared by the data-parallel ranks."""
    rank, size = parallel.data_rank(), parallel.data_size()
    numbered = list(enumerate(problems))[rank::size]
    prompts = [
        tokenizer.encode(render(flagged(p, mode), tools=p.tools, add_generation_prompt=True))
        for _, p in numbered
    ]
    completions = sampler.generate(prompts, replace(params, seed=params.seed + rank))
    done = [(i, c) for (i, _), c in zip(numbered, completions, strict=True)]
    by_number = dict(parallel.gather_over_data(done))
    return [
        [Answer(p, c, text_of(c, tokenizer), params.max_tokens) for c in by_number[i]]
        for i, p in enumerate(problems)
    ]


def graded(
    sampler: Sampler,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    mode: Mode,
) -> list[list[float | None]]:
    """The scores of params.n answers to each row (`data.tasks.files`), by the rewards it names.

    Where a row's tools can be run an answer is an episode with them, scored on its last turn alone:
    the rewards do not ask whether a tool was called. Without thinking the empty block is
    pre-filled, except where the reward `mode` judges how the model opens its reply. Raises
    UserError before anything is sampled for a row that its rewards cannot judge, or its tools not
    work on.
    """
    rows = [with_schemas(row) for row in rows]
    problems = [files.as_problem(row, "rows") for row in rows]
    for number, row in enumerate(rows, 1):
        try:
            _scored("", row, 0, params.max_tokens)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error
    filled = [mode == "no_think" and "mode" not in reward_names(row["reward"]) for row in rows]
    texts = [
        render(
            p.messages,
            add_generation_prompt=True,
            enable_thinking=False if block else None,
            tools=p.tools,
        )
        for p, block in zip(problems, filled, strict=True)
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    each = [i for i in range(len(rows)) for _ in range(params.n)]
    environments = [environment_of(problems[i]) for i in each]
    prompts_now = [prompts[i] for i in each]
    episodes = run_episodes(sampler, tokenizer, prompts_now, environments, params)
    scores = [
        _scored(turns[-1], rows[i], sum(c.mask), params.max_tokens * len(turns))
        for i, (c, turns) in zip(each, episodes, strict=True)
    ]
    return [scores[i : i + params.n] for i in range(0, len(scores), params.n)]


def _scored(text: str, row: Mapping[str, Any], tokens: int, max_tokens: int) -> float | None:
    given = {"tokens": tokens, "max_tokens": max_tokens} | dict(row)
    return score(row["reward"], text, given).score


def accuracy(answered: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Share of right answers, over problems and tries."""
    return averages([[a.correct for a in tries] for tries in answered])


def thinking(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    seed: int,
    *,
    mode: Mode | None = None,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, dict[str, float]]:
    """Thinking-mode accuracy on held-out problems at T=0.6 (the report's), T=1 and greedy."""
    results: dict[str, dict[str, float]] = {}
    for name, temperature in (
        ("think_accuracy", 0.6),
        ("think_accuracy_t1", 1.0),
        ("think_accuracy_greedy", 0.0),
    ):
        params = SamplingParams(max_tokens, temperature, seed=seed)
        answered = answers(sampler, tokenizer, problems, params, mode)
        results[name] = accuracy(answered)
        if name == "think_accuracy":
            for family in dict.fromkeys(p.family for p in problems):
                members = [tries for tries in answered if tries[0].problem.family == family]
                results[f"think_accuracy/{family}"] = accuracy(members)
            results["answered"] = proportion(a.answered for tries in answered for a in tries)
    return results


def entropy_ratio(metrics: Path) -> dict[str, dict[str, float]]:
    """Mean token entropy of the last ten RL steps over that of the first ten; nothing where no step
    had a token with a signal."""
    rows = whole_records(metrics)
    values = [row["entropy"] for row in rows if row.get("entropy") is not None]
    if not values:
        return {}
    ratio = float(np.mean(values[-10:]) / np.mean(values[:10]))
    return {"entropy_ratio": {"value": ratio, "n": len(values)}}


def capabilities(
    sampler: Sampler, tokenizer: Tokenizer, seed: int, max_tokens: int, per_family: int = 200
) -> dict[str, dict[str, float]]:
    """`capability_<name>` by what the tasks really ask (the hidden rubric and the references, not
    the reward models), and `mode_obedience` on conversations with random flags."""
    problems = [
        p if f == "think_follow" else replace(p, messages=tuple(flagged(p, "no_think")))
        for f in general.GENERAL
        for p in generate(
            f, 2 * per_family if f == "think_follow" else per_family, seed=0, heldout=True
        )
    ]
    numbered = list(enumerate(problems))[parallel.data_rank() :: parallel.data_size()]
    prompts = [
        tokenizer.encode(render(p.messages, tools=p.tools, add_generation_prompt=True))
        for _, p in numbered
    ]
    params = SamplingParams(max_tokens, 0.6, seed=seed + parallel.data_rank())
    environments = [environment_of(p) for _, p in numbered]
    episodes = run_episodes(sampler, tokenizer, prompts, environments, params)
    scored = [(i, success(p, turns)) for (i, p), (_, turns) in zip(numbered, episodes, strict=True)]
    by_number = dict(parallel.gather_over_data(scored))
    results = {}
    for name in general.CAPABILITIES:
        rows = [(p.family, by_number[i]) for i, p in enumerate(problems) if p.capability == name]
        results[f"capability_{name}"] = proportion(s for _, s in rows)
        for family in dict.fromkeys(f for f, _ in rows):
            results[f"task/{family}"] = proportion(s for f, s in rows if f == family)
    results["mode_obedience"] = results["task/think_follow"]
    return results


def success(problem: Problem, turns: list[str]) -> float:
    """How well an episode did what its problem asks, in [0, 1]."""
    last = parse(turns[-1])
    if problem.capability == "preference":
        return general.rubric(last.content, problem) if last.closed else 0.0
    if problem.capability == "rag":
        return float(last.closed and last.content.strip() == problem.answer)
    if problem.tools and len(turns) == 1:
        return 0.0  # answered without the tool: a guess
    return float(score_problem(problem, turns[-1]).score == 1.0)


def budget_curve(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    budgets: Sequence[int],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Accuracy by thinking budget (Qwen3 report, figure 2), and the smallest share answered."""
    rows, shares = [], []
    for budget in budgets:
        answered = answers(
            sampler, tokenizer, problems, replace(params, thinking_budget=budget), "think"
        )
        rows.append(accuracy(answered))
        shares.append(proportion(a.answered for tries in answered for a in tries))
    curve = {
        "x": list(budgets),
        "y": [r["value"] for r in rows],
        "low": [r["low"] for r in rows],
        "high": [r["high"] for r in rows],
        "xlabel": "thinking budget, tokens",
        "ylabel": "accuracy",
    }
    return curve, min(shares, key=lambda s: s["value"])


def _texts(kind: str, seed: int, n: int, heldout: bool = False) -> list[str]:
    return list(itertools.islice(documents.documents(kind, seed, heldout=heldout), n))


def _drawn_once(draw: Callable[[], list[_T]]) -> list[_T]:
    """What the first data-parallel rank draws, on all: reading real text takes each seconds."""
    return parallel.gather_over_data(draw() if parallel.data_rank() == 0 else [])


def loss_by_kind(
    engine: Engine, tokenizer: Tokenizer, kinds: Iterable[str], sequence: int, seed: int
) -> dict[str, dict[str, float]]:
    """Nats a token on documents of each kind that training has not read."""
    results = {}
    for kind in kinds:
        draw = partial(_texts, kind, seed, 48, heldout=True)
        texts = tokenizer.encode_batch(_drawn_once(draw))
        total, n = nll(engine, texts, sequence)
        results[f"loss_{kind}"] = {"value": total / n, "n": int(n)}
    return results


def nll(engine: Engine, documents: Iterable[list[int]], sequence: int) -> tuple[float, float]:
    """(sum of nats, number of tokens) over the first `sequence` tokens of each document."""
    tokens = [ids[:sequence] for ids in documents if len(ids) > 1]
    samples = [Sample(t, [0.0] + [1.0] * (len(t) - 1)) for t in tokens][
        parallel.data_rank() :: parallel.data_size()
    ]
    parts = engine.evaluate(pack(samples, 4 * sequence), _nll)
    total, n = np.array(parallel.gather_over_data(parts)).sum(0)
    return total, n


def _nll(head: LMHead, batch: Batch) -> tuple[float, float]:
    return float(supervised(head, batch)[0]), float(batch.loss_weights.sum())


def expert_load(
    engine: Engine, tokenizer: Tokenizer, kinds: Iterable[str], seed: int
) -> dict[str, Any]:
    """Each layer's busiest expert's tokens over the mean (1 = balance), on fresh documents."""
    routers = [layer.mlp.router for chunk in engine.chunks for layer in chunk.decoder.layers]
    counts = [torch.zeros(engine.shape.experts) for _ in routers]

    def count(layer: int) -> Callable[..., None]:
        def hook(router: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            counts[layer] += output[1].sum(0).cpu()  # the routing map (tokens, experts)

        return hook

    hooks = [router.register_forward_hook(count(i)) for i, router in enumerate(routers)]
    for kind in kinds:
        texts = tokenizer.encode_batch(_drawn_once(partial(_texts, kind, seed, 32)))
        samples = [Sample(t[:256], [0.0] * len(t[:256])) for t in texts]
        engine.evaluate(pack(samples, 4096), lambda head, batch: None)
    for hook in hooks:
        hook.remove()
    counts = [parallel.sum_over_tokens(total) for total in counts]
    imbalance = [float(total.max() / total.mean()) for total in counts]
    loads = parallel.gather_over_pipeline(imbalance)
    return {
        "expert_load_worst_layer": {"value": max(loads), "n": len(loads)},
        "expert_load_best_layer": {"value": min(loads), "n": len(loads)},
    }


def haystacks(tokenizer: Tokenizer, length: int, n: int, seed: int) -> list[Sample]:
    """n documents of `length` tokens of real text, one pass key anywhere, asked for at the end."""
    return _drawn_once(partial(_haystacks, tokenizer, length, n, seed))


def retrieval(engine: Engine, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the pass keys of `haystacks` that are read back.

    Teacher-forced arg-max on every token of the value, which is what greedy decoding would give.
    """
    local_samples = samples[parallel.data_rank() :: parallel.data_size()]
    parts = engine.evaluate(pack(local_samples, max(map(len, samples))), _read_back)
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
