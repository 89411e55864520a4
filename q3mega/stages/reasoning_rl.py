"""Stage 5, reasoning RL: GRPO on verifiable problems.

Problems obey the report's four rules (section 4.2): not used in the cold start, learnable for the
model at hand, as hard as possible, and of every domain. Then: many rollouts a prompt, several
off-policy updates a rollout batch, groups without a signal dropped, entropy held by a controller.
"""

import json
import random
import statistics

from q3mega.config.stages import ReasoningRL
from q3mega.errors import UserError
from q3mega.evaluation import evaluate
from q3mega.problems import Problem
from q3mega.rollout import Sampler, SamplingParams
from q3mega.stages.common.filter_report import FilterReport
from q3mega.stages.common.rl import learn
from q3mega.stages.common.stage import Stage


def run(stage: Stage[ReasoningRL]) -> None:
    """Select problems, learn from their rollouts, evaluate."""
    config = stage.config
    source = stage.start()
    engine = stage.engine(source, steps=config.steps * config.updates)
    if not stage.prepared("problems.json"):
        select(stage, stage.sampler(engine))
    problems = [Problem(**row) for row in json.loads((stage.data / "problems.json").read_text())]
    learn(stage, engine, source, problems, config)
    results = evaluate.thinking(
        stage.sampler(engine), stage.tokenizer, stage.held_out(), stage.seed("eval"),
        max_tokens=stage.answer_tokens,
    )  # fmt: skip
    stage.finish(engine, results | evaluate.entropy_ratio(stage.dir / "metrics.jsonl"))


def select(stage: Stage[ReasoningRL], sampler: Sampler) -> None:
    """The four rules; leaves problems.json and the filter_report in data/."""
    rules, filter_report = stage.config.selection, FilterReport(vars)
    used = {query.id for query in stage.cold_start_queries()}
    low, high = rules.band

    pool = stage.problems(rules.pool // len(stage.pool.domains), "pool")
    filter_report.step("problems", pool)
    seen = ["used in the cold start" if p.id in used else None for p in pool]
    pool = filter_report.keep("problem", pool, seen)

    params = SamplingParams(stage.config.max_tokens, n=rules.tries, seed=stage.seed("select"))
    answered = evaluate.answers(sampler, stage.tokenizer, pool, params)
    judged = {
        p.id: [a.correct for a in tries if a.correct is not None]
        for p, tries in zip(pool, answered, strict=True)
    }
    unjudged = (None if judged[p.id] else "no try could be judged" for p in pool)
    pool = filter_report.keep("problem", pool, unjudged)
    rates = {p.id: statistics.fmean(judged[p.id]) for p in pool}
    for right in range(rules.tries + 1):
        members = [p for p in pool if sum(judged[p.id]) == right]
        filter_report.step(f"right in {right} of {rules.tries} tries", members)
    unfit = (
        "not learnable" if rates[p.id] <= low else "too easy" if rates[p.id] >= high else None
        for p in pool
    )
    learnable = filter_report.keep("problem", pool, unfit)

    def hardest_first(problem: Problem) -> tuple[float, int, str]:
        return rates[problem.id], -problem.difficulty, problem.id

    chosen: list[Problem] = []
    for domain in stage.pool.domains:
        members = sorted((p for p in learnable if p.family == domain), key=hardest_first)
        chosen += members[: rules.keep // len(stage.pool.domains)]
    kept = {p.id for p in chosen}
    easier = (None if p.id in kept else "easier than the rest of its domain" for p in learnable)
    filter_report.keep("problem", learnable, easier)
    filter_report.step("problems to train on", chosen)
    if not chosen:
        raise UserError(
            f"stages.{stage.name}.selection.pool={rules.pool}: no problem is right in more than "
            f"{low:.0%} and less than {high:.0%} of the tries; strengthen the cold start, widen "
            "the pool, or raise tries"
        )
    random.Random(stage.seed("order")).shuffle(chosen)
    filter_report.write(stage)
    stage.write("data/problems.json", [vars(p) for p in chosen])
    stage.barrier()
