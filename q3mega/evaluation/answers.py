"""A model's answers to problems, scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from q3mega.data.chat import parse, render
from q3mega.data.tokenizer import Tokenizer
from q3mega.data.tool_schemas import with_schemas
from q3mega.engine import parallel
from q3mega.environments.environment import environment_of
from q3mega.errors import UserError
from q3mega.evaluation.intervals import averages
from q3mega.problems import Problem, files
from q3mega.rewards import reward_names, reward_of, score, score_problem
from q3mega.rewards.math.answer import boxes
from q3mega.rewards.mode import mode_of
from q3mega.rollout import Completion, Sampler, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.episodes import run_episodes

Mode = Literal["think", "no_think"]


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


def answer_problems(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    params: SamplingParams,
    mode: Mode | None = None,
) -> list[list[Answer]]:
    """params.n answers to each problem, the work shared by the data-parallel ranks."""
    params = replace(params, seed=params.seed + parallel.data_rank())

    def sample(share: list[Problem]) -> list[list[Completion]]:
        prompts = [
            tokenizer.encode(render(flagged(p, mode), tools=p.tools, add_generation_prompt=True))
            for p in share
        ]
        return sampler.generate(prompts, params)

    return [
        [Answer(p, c, text_of(c, tokenizer), params.max_tokens) for c in tries]
        for p, tries in zip(problems, parallel.map_over_data_ranks(problems, sample), strict=True)
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
