"""Stage 6, thinking-mode fusion: one model that thinks, or not, as the last flag says.

Continual SFT of the RL model (Qwen3 report, section 4.3). The thinking part is sampled from that
model itself on the cold start's queries and kept where right; the non-thinking part covers direct
answers, the general tasks and tool use. Flags stand in user and system turns; some thinking samples
carry none, since thinking is the default; a non-thinking sample keeps an empty block. The thinking
budget is not trained: it is only measured here.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

from q3mega.chat_models import judge_prompts
from q3mega.config.stages import ModeFusion
from q3mega.data.batch import Sample
from q3mega.data.sft import chat_sample, reply_text
from q3mega.engine import Engine
from q3mega.errors import NoReply
from q3mega.evaluation import answers, reasoning
from q3mega.evaluation.answers import flagged
from q3mega.problems import Problem, files
from q3mega.problems.generated import general
from q3mega.problems.generated.reasoning import chain_sum
from q3mega.problems.generated.solutions import response_text, solve, thinking_text
from q3mega.rollout import STOP_THINKING, SamplingParams
from q3mega.stages.common.chat_models import chat_model
from q3mega.stages.common.filter_report import FilterReport
from q3mega.stages.common.fine_tune import fine_tune
from q3mega.stages.common.modes import both_modes
from q3mega.stages.common.stage import Stage

FLAGS = ("think", "no_think")
FLAGLESS = 0.15  # of the thinking samples carry no flag
SYSTEM = 0.2  # of the flags stand in a system turn
HISTORY = 0.25  # of the samples have an earlier turn with a flag of its own
PREFILLED = 0.25  # of the non-thinking samples have the empty block in the prompt
Turn = dict[str, Any]


def run(stage: Stage[ModeFusion]) -> None:
    """Build the set of both modes, fine-tune on it, evaluate both modes and the budget curve."""
    source = stage.start()
    if not stage.prepared("samples.json"):
        build(stage, stage.engine(source))
    samples = [Sample(**row) for row in json.loads((stage.data / "samples.json").read_text())]
    engine = fine_tune(stage, source, samples)
    stage.finish(engine, both_modes(stage, engine) | budgets(stage, engine))


def build(stage: Stage[ModeFusion], model: Engine) -> None:
    """The mixed set, as samples.json in data/, and its filter_report."""
    rng, filter_report = random.Random(stage.seed("mix")), FilterReport(lambda row: row)
    samples = rejection_samples(stage, model, filter_report)
    samples += chat_samples(stage, rng, filter_report)
    if stage.pool.generated:
        samples += direct_samples(stage, rng) + general_samples(stage, rng)
        samples += follow_samples(stage, rng, len(samples) // 4)
    filter_report.step("samples of both modes", samples)
    filter_report.write(stage)
    stage.write("data/samples.json", [vars(s) for s in samples])
    stage.barrier()


def rejection_samples(
    stage: Stage[ModeFusion], model: Engine, filter_report: FilterReport
) -> list[Sample]:
    """The RL model's own right answers to the cold start's queries."""
    config, rng = stage.config, random.Random(stage.seed("thinking"))
    queries = stage.cold_start_queries()
    more = max(0, config.thinking_queries - len(queries))
    queries += stage.problems(more // len(stage.pool.domains), "more")
    queries = rng.sample(queries, min(len(queries), config.thinking_queries))
    params = SamplingParams(config.max_tokens, 0.6, seed=stage.seed("reject"))
    answered = answers.answer_problems(stage.sampler(model), stage.tokenizer, queries, params)
    rows = [{"id": a.problem.id, "text": a.text} for (a,) in answered]
    filter_report.step("thinking answers", rows)
    rules = [
        "cannot be judged" if a.correct is None
        else None if a.correct and a.mode == "think"
        else "wrong or cut"
        for (a,) in answered
    ]  # fmt: skip
    filter_report.keep("thinking answer", rows, rules)
    samples = []
    for answer in (a for (a,), rule in zip(answered, rules, strict=True) if rule is None):
        flag = "" if rng.random() < FLAGLESS else "think"
        turns = with_flag(rng, answer.problem.messages, flag)
        samples.append(chat_sample(stage.tokenizer, turns, answer.text))
    filter_report.step("thinking samples", samples)
    return samples


def with_flag(rng: random.Random, messages: Sequence[Turn], flag: str) -> list[Turn]:
    """The flag ("" for none) in the last user turn or in a system turn; now and then earlier turns
    whose own flags say something else, so that the last one has to win."""
    *before, last = messages
    turns = [dict(turn) for turn in before]
    earlier = False
    if flag and rng.random() < HISTORY:
        if not turns:
            turns = _sum_turns(rng)
        user_turns = [turn for turn in turns if turn["role"] == "user"]
        for turn in user_turns:
            turn["content"] += f" /{rng.choice(FLAGS)}"
        earlier = bool(user_turns)
    if flag and not earlier and rng.random() < SYSTEM:
        if turns and turns[0]["role"] == "system":
            turns[0]["content"] += f"\n/{flag}"
        else:
            turns.insert(0, {"role": "system", "content": f"/{flag}"})
        return [*turns, last]
    return [*turns, {**last, "content": f"{last['content']} /{flag}" if flag else last["content"]}]


def _sum_turns(rng: random.Random) -> list[Turn]:
    """A short sum and its answer, to stand before another question."""
    before = chain_sum(rng, rng.randint(2, 3))
    return [
        {"role": "user", "content": before.question},
        {"role": "assistant", "content": rf"The answer is \boxed{{{before.answer}}}."},
    ]


def chat_samples(
    stage: Stage[ModeFusion], rng: random.Random, filter_report: FilterReport
) -> list[Sample]:
    """Non-thinking chats from files, whose responses a judge holds to checklists."""
    rows = []
    for name, n in stage.config.non_thinking.items():
        rows_of_file = files.answered(name)
        rows += rng.sample(rows_of_file, min(n, len(rows_of_file)))
    filter_report.step("answered chats", rows)
    if stage.config.judge and rows:
        judge = chat_model(stage, stage.config.judge, "judge")
        rows = filter_report.keep("chat", rows, unmet(rows, judge.opinion, judge.count))
    filter_report.step("non-thinking chats", rows)
    samples = []
    for row in rows:
        prefilled = rng.random() < PREFILLED
        turns = row["messages"] if prefilled else with_flag(rng, row["messages"], "no_think")
        reply, tools = reply_text("", row["response"]), row.get("tools", ())
        samples.append(chat_sample(stage.tokenizer, turns, reply, tools=tools, prefilled=prefilled))
    return samples


def unmet(
    rows: Sequence[dict[str, Any]], ask: judge_prompts.Ask, count: judge_prompts.Count
) -> list[str | None]:
    """What each row's response does not do that its checklist asks for; the judge writes a
    checklist where the row has none (Qwen3 report, section 4.3)."""
    questions = [row["messages"][-1]["content"] for row in rows]
    lists: list[list[str] | NoReply] = [list(row.get("checklist", ())) for row in rows]
    bare = [i for i, items in enumerate(lists) if not items]
    written = judge_prompts.checklists([questions[i] for i in bare], ask, count)
    for i, items in zip(bare, written, strict=True):
        lists[i] = items
    requests = [
        (question, row["response"], items)
        for question, row, items in zip(questions, rows, lists, strict=True)
        if not isinstance(items, NoReply)
    ]
    met = iter(judge_prompts.check(requests, ask, count))
    checklists = [items if isinstance(items, NoReply) else next(met) for items in lists]
    return [
        f"not judged ({some.rule})" if isinstance(some, NoReply)
        else None if all(some)
        else "misses its checklist"
        for some in checklists
    ]  # fmt: skip


def direct_samples(stage: Stage[ModeFusion], rng: random.Random) -> list[Sample]:
    """Reasoning questions answered at once, without a line of work."""
    queries = stage.problems(stage.config.direct // len(stage.pool.domains), "direct")
    return [_silent(stage, rng, q, response_text(solve(q), rng)) for q in queries]


def _silent(stage: Stage[ModeFusion], rng: random.Random, query: Problem, response: str) -> Sample:
    prefilled = rng.random() < PREFILLED
    turns = list(query.messages) if prefilled else with_flag(rng, query.messages, "no_think")
    reply = reply_text("", response)
    return chat_sample(stage.tokenizer, turns, reply, tools=query.tools, prefilled=prefilled)


def general_samples(stage: Stage[ModeFusion], rng: random.Random) -> list[Sample]:
    """The general tasks at half skill, and the second turn of those with tools."""
    families = [f for f in general.GENERAL if f != "think_follow"]
    out = []
    for i in range(stage.config.general):
        query = general.draw(rng, [families[i % len(families)]])
        first, *more = general.episode(query, rng, stage.config.skill)
        out.append(_silent(stage, rng, query, first["content"]))
        if more:
            result, last = more
            (turn,) = flagged(query, "no_think")
            reply = reply_text("", last["content"])
            out.append(
                chat_sample(stage.tokenizer, [turn, first, result], reply, tools=query.tools)
            )
    return out


def follow_samples(stage: Stage[ModeFusion], rng: random.Random, n: int) -> list[Sample]:
    """Conversations of several turns with random flags; the last flag decides."""
    out = []
    for _ in range(n):
        query = general.draw_follow(rng)
        solution = solve(
            Problem("", "chain_sum", "reasoning", (), query.answer, 0, query.meta["sum"])
        )
        thinking = thinking_text(solution) if query.meta["mode"] == "think" else ""
        out.append(
            chat_sample(
                stage.tokenizer, query.messages, reply_text(thinking, response_text(solution, rng))
            )
        )
    return out


def budgets(stage: Stage[ModeFusion], engine: Engine) -> dict[str, Any]:
    """The thinking-budget curve; nothing was trained for it."""
    config = stage.config
    stop_thinking = config.stop_thinking or STOP_THINKING
    params = SamplingParams(
        stage.answer_tokens, 0.6, seed=stage.seed("budget"), stop_thinking=stop_thinking
    )
    curve, answered = reasoning.budget_curve(
        stage.sampler(engine), stage.tokenizer, stage.held_out(), params, config.budgets
    )
    return {"answered_min": answered, "curves": {"thinking_budget": curve}}
