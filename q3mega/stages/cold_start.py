"""Stage 4, long-CoT cold start: plant the pattern of reasoning with few samples and few steps.

Queries pass a filter (verifiable, one question, not answerable without thinking), the teacher
answers each several times, answers pass the six rules, and a small subset of what is left is
trained on (Qwen3 report, section 4.1). Validation questions are held out before anything is drawn.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from q3mega.chat_models import judge_prompts
from q3mega.config.stages import ColdStart
from q3mega.data.chat import parse
from q3mega.data.sft import chat_sample, reply_text
from q3mega.data.tagged import TaggedText
from q3mega.engine import parallel
from q3mega.errors import NoReply, UserError
from q3mega.evaluation import reasoning
from q3mega.problems import Problem
from q3mega.problems.generated.scripted_teacher import Candidate, candidates, unsuitable_queries
from q3mega.problems.generated.solutions import boxed, check
from q3mega.problems.query_filters import ResponseFilter, balance, query_filter
from q3mega.rewards import score_problem
from q3mega.rollout import SamplingParams
from q3mega.rollout.base import text_of
from q3mega.stages.common.chat_models import chat_model
from q3mega.stages.common.filter_report import FilterReport
from q3mega.stages.common.fine_tune import fine_tune
from q3mega.stages.common.stage import Stage

UNSUITABLE_SHARE = 10  # one query in ten of the generated pool
GUESSED = "answered without thinking"
Answered = tuple[Problem, Candidate]


def run(stage: Stage[ColdStart]) -> None:
    """Curate long chains of thought, fine-tune on them, evaluate."""
    source = stage.start()
    if not stage.prepared("samples.json"):
        curate(stage, Generated(stage, source) if stage.pool.generated else FromFiles(stage))
    rows = json.loads((stage.data / "samples.json").read_text())
    samples = [
        chat_sample(stage.tokenizer, row["messages"], reply_text(row["thinking"], row["response"]))
        for row in rows
    ]
    engine = fine_tune(stage, source, samples)
    teacher = stage.config.teacher
    longest = max(stage.answer_tokens, teacher.max_tokens if teacher else 0)
    results = reasoning.thinking(
        stage.sampler(engine), stage.tokenizer, stage.held_out(), stage.seed("eval"),
        max_tokens=longest,
    )  # fmt: skip
    stage.finish(engine, results)


def curate(stage: Stage[ColdStart], helpers: "Helpers") -> None:
    """Both filters; leaves samples.json, queries.json and the filter_report in data/."""
    config, filter_report, held = stage.config, FilterReport(_described), stage.held_out()

    queries = helpers.queries()
    filter_report.step("queries", queries)
    queries = filter_report.keep("query", queries, map(query_filter, queries))
    queries = filter_report.keep("query", *helpers.unfit(queries))
    queries = filter_report.keep("query", queries, helpers.guessed(queries))
    filter_report.step("queries that passed the filter", queries)
    queries = balance(queries, stage.seed("balance"), config.keep)
    filter_report.step("queries of balanced domains", queries)

    tries = zip(queries, helpers.candidates(queries, held), strict=True)
    tried = [(query, c) for query, some in tries for c in some]
    filter_report.step("responses", tried)
    missing = [f"no answer ({c.rule})" if isinstance(c, NoReply) else None for _, c in tried]
    tried = filter_report.keep("response", tried, missing)
    answers = [(query, c) for query, c in tried if isinstance(c, Candidate)]
    rules = ResponseFilter([p.question for p in held])
    broken = (rules(q, c.thinking, c.response, _right(q)) for q, c in answers)
    answers = filter_report.keep("response", answers, broken)
    answers = filter_report.keep("response", answers, helpers.unsound(answers))
    filter_report.step("responses that passed the filter", answers)

    first = {query.id: (query, c) for query, c in reversed(answers)}
    sound = [first[query.id] for query in queries if query.id in first]
    filter_report.step("queries with a sound response", sound)
    chosen = random.Random(stage.seed("subset")).sample(sound, min(config.samples, len(sound)))
    filter_report.step("samples", chosen)
    if not chosen:
        raise UserError(
            f"stages.{stage.name}.queries={config.queries}: nothing passed both filters "
            f"({dict(filter_report.drops)}); more queries, more candidates, or a stronger teacher"
        )
    filter_report.write(stage)
    rows = [
        {"id": q.id, "messages": q.messages, "thinking": c.thinking, "response": c.response}
        for q, c in chosen
    ]
    stage.write("data/queries.json", [vars(p) for p in queries])
    stage.write("data/samples.json", rows)
    stage.barrier()


def _right(query: Problem) -> Callable[[str], bool]:
    """Whether the query's reward gives a text full marks."""
    # A teacher's length is its own: the reward `length` sees none of it.
    return lambda text: (score_problem(query, text, tokens=0, max_tokens=1).score or 0.0) >= 1


def _described(item: Any) -> dict[str, Any]:
    query, candidate = item if isinstance(item, tuple) else (item, None)
    description = {"id": query.id, "question": query.question}
    if isinstance(candidate, NoReply):
        return description | {"reason": candidate.detail}
    return description | (
        {"thinking": candidate.thinking, "response": candidate.response} if candidate else {}
    )


class Helpers(Protocol):
    """Who writes candidates and judges, where rules cannot: a script and the base model for the
    generated families, the recipe's teacher and judge for problems from files."""

    def queries(self) -> list[Problem]:
        """What may be learnt from, before the filters."""
        ...

    def unfit(self, queries: list[Problem]) -> tuple[list[Problem], list[str | None]]:
        """The queries, by the judge's domains where it gives any, and what is wrong with each."""

    def guessed(self, queries: list[Problem]) -> list[str | None]:
        """Which are answered right without thinking."""

    def candidates(
        self, queries: list[Problem], held: list[Problem]
    ) -> Sequence[Sequence[Candidate | NoReply]]:
        """The teacher's answers to each query."""
        ...

    def unsound(self, answers: list[Answered]) -> list[str | None]:
        """Of responses that passed the rules, what is wrong with them all the same."""


class Generated:
    """At laptop scale: a scripted teacher, who errs in every way that the filters exist for."""

    def __init__(self, stage: Stage[ColdStart], source: Path) -> None:
        self.stage, self.base = stage, stage.engine(source)

    def queries(self) -> list[Problem]:
        """See `Helpers`."""
        stage, n = self.stage, self.stage.config.queries
        pool = stage.problems(n // len(stage.pool.domains), "queries")
        return pool + unsuitable_queries(n // UNSUITABLE_SHARE, stage.seed("unsuitable"))

    def unfit(self, queries: list[Problem]) -> tuple[list[Problem], list[str | None]]:
        """See `Helpers`."""
        return queries, [None] * len(queries)

    def guessed(self, queries: list[Problem]) -> list[str | None]:
        """By the base model, which has no room to think (the report's judge, at our scale)."""
        tokenizer, sampler = self.stage.tokenizer, self.stage.sampler(self.base)
        params = SamplingParams(max_tokens=24, temperature=0)

        def are_right(share: list[Problem]) -> list[bool]:
            prompts = [tokenizer.encode(TaggedText(f"Q: {p.question}\nA:")) for p in share]
            completions = sampler.generate(prompts, params)
            answers = [boxed(text_of(c, tokenizer).split("\n")[0]) for (c,) in completions]
            return [a is not None and check(p, a) for p, a in zip(share, answers, strict=True)]

        return [GUESSED if r else None for r in parallel.map_over_data_ranks(queries, are_right)]

    def candidates(self, queries: list[Problem], held: list[Problem]) -> list[list[Candidate]]:
        """See `Helpers`."""
        copied = [p for p in held if p.family == "chain_sum"]
        n, seed = self.stage.config.candidates, self.stage.seed("teacher")
        return [candidates(query, n, seed, copied) for query in queries]

    def unsound(self, answers: list[Answered]) -> list[str | None]:
        """See `Helpers`."""
        return [None] * len(answers)


class FromFiles:
    """The recipe's teacher and judge; without a judge, rules alone decide."""

    def __init__(self, stage: Stage[ColdStart]) -> None:
        self.stage, config = stage, stage.config
        assert config.teacher is not None  # the recipe gives one with files of problems
        self.teacher = chat_model(stage, config.teacher, "teacher")
        self.judge = chat_model(stage, config.judge, "judge") if config.judge else None

    def queries(self) -> list[Problem]:
        """See `Helpers`."""
        return self.stage.problems(
            -(-self.stage.config.queries // len(self.stage.pool.domains)), "queries"
        )

    def unfit(self, queries: list[Problem]) -> tuple[list[Problem], list[str | None]]:
        """See `Helpers`."""
        if self.judge is None:
            return queries, [None] * len(queries)
        domains = self.stage.config.domains
        questions = [q.question for q in queries]
        opinions = judge_prompts.of_queries(
            questions, domains, self.judge.opinion, self.judge.count
        )
        labelled = [
            q if isinstance(o, NoReply) else replace(q, family=o.domain)
            for q, o in zip(queries, opinions, strict=True)
        ]
        rules = [
            f"not judged ({o.rule})" if isinstance(o, NoReply)
            else "judged open-ended" if o.open_ended
            else "judged several questions" if o.questions > 1
            else None
            for o in opinions
        ]  # fmt: skip
        return labelled, rules

    def guessed(self, queries: list[Problem]) -> list[str | None]:
        """See `Helpers`."""
        judge = self.judge or self.teacher
        replies = judge([list(q.messages) for q in queries], temperature=0.0, thinking=False)
        return [
            f"not answered without thinking ({text.rule})" if isinstance(text, NoReply)
            else GUESSED if _right(q)(text)
            else None
            for q, (text,) in zip(queries, replies, strict=True)
        ]  # fmt: skip

    def candidates(
        self, queries: list[Problem], held: list[Problem]
    ) -> list[list[Candidate | NoReply]]:
        """See `Helpers`."""
        replies = self.teacher([list(q.messages) for q in queries], n=self.stage.config.candidates)
        return [[_candidate(text) for text in once(texts)] for texts in replies]

    def unsound(self, answers: list[Answered]) -> list[str | None]:
        """See `Helpers`."""
        if self.judge is None:
            return [None] * len(answers)
        texts = [(q.question, c.thinking, c.response) for q, c in answers]
        return [
            f"not judged ({o.rule})" if isinstance(o, NoReply)
            else "judged a guess" if o.guess
            else "judged in disagreement" if not o.agrees
            else "judged inconsistent in style" if not o.consistent
            else None
            for o in judge_prompts.of_responses(texts, self.judge.opinion, self.judge.count)
        ]  # fmt: skip


def once(texts: Sequence[str | NoReply]) -> list[str | NoReply]:
    """The candidates of a query, where a text that was said before is none: some servers draw the
    same for every request."""
    again = NoReply("same as another", "the server drew a text twice: raise the temperature")
    return [again if text in texts[:i] and isinstance(text, str) else text
            for i, text in enumerate(texts)]  # fmt: skip


def _candidate(text: str | NoReply) -> Candidate | NoReply:
    if isinstance(text, NoReply):
        return text
    message = parse(text)
    return Candidate(message.thinking or "", message.content if message.closed else "", None)
