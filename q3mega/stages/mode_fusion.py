"""Stage 6, thinking-mode fusion: one model that thinks, or not, as the last flag says.

Continual SFT of the RL model (Qwen3 report, section 4.3). The thinking part is sampled from that
model itself on the cold start's queries and kept where right; the non-thinking part covers direct
answers, the general tasks and tool use. Flags stand in user and system turns; some thinking samples
carry none, since thinking is the default; a non-thinking sample keeps an empty block. The thinking
budget is not trained: it is only measured here.
"""

import json
import random
from typing import Any

from q3mega import evaluate
from q3mega.data.batch import Sample
from q3mega.data.corpus import REASONING
from q3mega.data.sft import chat_sample, reply_text
from q3mega.data.tasks import Problem, general, generate
from q3mega.data.tasks.reasoning import chain_sum
from q3mega.data.tasks.solutions import response_text, solve, thinking_text
from q3mega.engine import Engine
from q3mega.evaluate import flagged
from q3mega.rollout import STOP_THINKING, SamplingParams
from q3mega.stages.fine_tune import fine_tune
from q3mega.stages.stage import Stage

FLAGLESS = 0.15  # of the thinking samples carry no flag
SYSTEM = 0.2  # of the flags stand in a system turn
HISTORY = 0.25  # of the samples have an earlier turn with a flag of its own
PREFILLED = 0.25  # of the non-thinking samples have the empty block in the prompt


def run(stage: Stage) -> None:
    source = stage.start()
    if not stage.prepared("samples.json"):
        build(stage, stage.engine(source))
    samples = [Sample(**row) for row in json.loads((stage.data / "samples.json").read_text())]
    engine = fine_tune(stage, source, samples)
    stage.finish(engine, both_modes(stage, engine) | budgets(stage, engine))


def build(stage: Stage, model: Engine) -> None:
    """The mixed set, as samples.json in data/; drops.json counts what rejection sampling lost."""
    rng = random.Random(stage.seed("mix"))
    thinking, dropped = rejection_samples(stage, model)
    samples = thinking + direct_samples(stage, rng) + general_samples(stage, rng)
    samples += follow_samples(stage, rng, len(samples) // 4)
    stage.write("data/drops.json", {"rejection sampling: wrong or cut": dropped})
    stage.write("data/samples.json", [vars(s) for s in samples])
    stage.barrier()


def rejection_samples(stage: Stage, model: Engine) -> tuple[list[Sample], int]:
    """(samples, number dropped): the RL model's own right answers to the cold start's queries."""
    config, rng = stage.config, random.Random(stage.seed("thinking"))
    queries = stage.cold_start_queries()
    share = max(0, config.thinking_queries - len(queries)) // len(REASONING)
    queries += [p for f in REASONING for p in generate(f, share, seed=stage.seed("more", f))]
    queries = rng.sample(queries, min(len(queries), config.thinking_queries))
    params = SamplingParams(config.max_tokens, 0.6, seed=stage.seed("reject"))
    samples, dropped = [], 0
    for (answer,) in evaluate.answers(stage.sampler(model), stage.tokenizer, queries, params):
        if answer.correct and answer.mode == "think":
            flag = "" if rng.random() < FLAGLESS else "think"
            turns = with_flag(rng, answer.problem.messages, flag)
            samples.append(chat_sample(stage.tokenizer, turns, answer.text))
        else:
            dropped += 1
    return samples, dropped


def with_flag(rng: random.Random, messages: Any, flag: str) -> list[dict[str, Any]]:
    """The flag ("" for none) in the last user turn or in a system turn; now and then a history
    whose own flag says something else, so that the last one has to win."""
    *_, last = messages
    turns: list[dict[str, Any]] = []
    earlier = ""
    if flag and rng.random() < HISTORY:
        before = chain_sum(rng, rng.randint(2, 3))
        earlier = rng.choice(("/think", "/no_think"))
        turns = [
            {"role": "user", "content": f"{before.question} {earlier}"},
            {"role": "assistant", "content": rf"The answer is \boxed{{{before.answer}}}."},
        ]
    if flag and not earlier and rng.random() < SYSTEM:
        return [{"role": "system", "content": f"/{flag}"}, last]
    return [*turns, {**last, "content": f"{last['content']} /{flag}" if flag else last["content"]}]


def direct_samples(stage: Stage, rng: random.Random) -> list[Sample]:
    """Reasoning questions answered at once, without a line of work."""
    share = stage.config.direct // len(REASONING)
    queries = [p for f in REASONING for p in generate(f, share, seed=stage.seed("direct", f))]
    return [_silent(stage, rng, q, response_text(solve(q), rng)) for q in queries]


def _silent(stage: Stage, rng: random.Random, query: Problem, response: str) -> Sample:
    prefilled = rng.random() < PREFILLED
    turns = list(query.messages) if prefilled else with_flag(rng, query.messages, "no_think")
    reply = reply_text("", response)
    return chat_sample(stage.tokenizer, turns, reply, tools=query.tools, prefilled=prefilled)


def general_samples(stage: Stage, rng: random.Random) -> list[Sample]:
    """The general tasks at half skill, and the second turn of those with tools."""
    families = [f for f in general.GENERAL if f != "think_follow"]
    out = []
    for i in range(stage.config.general):
        query = general.draw(rng, [families[i % len(families)]])
        first, *more = general.episode(query, rng, stage.config.skill)
        out.append(_silent(stage, rng, query, first["content"]))
        if more:
            result, last = more
            (asked,) = flagged(query, "no_think")
            reply = reply_text("", last["content"])
            out.append(
                chat_sample(stage.tokenizer, [asked, first, result], reply, tools=query.tools)
            )
    return out


def follow_samples(stage: Stage, rng: random.Random, n: int) -> list[Sample]:
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


def both_modes(stage: Stage, engine: Engine) -> dict[str, Any]:
    """Accuracy in each mode and without a flag, obedience to flags, and the five capabilities."""
    sampler, tokenizer = stage.sampler(engine), stage.tokenizer
    results: dict[str, Any] = evaluate.thinking(
        sampler, tokenizer, stage.seed("eval"), mode="think", max_tokens=stage.answer_tokens
    )
    problems = evaluate.held_out(400)
    params = SamplingParams(stage.answer_tokens, 0.6, seed=stage.seed("modes"))
    results["default_accuracy"] = evaluate.accuracy(
        evaluate.answers(sampler, tokenizer, problems, params)
    )
    silent = evaluate.answers(sampler, tokenizer, problems, params, "no_think")
    results["no_think_accuracy"] = evaluate.accuracy(silent)
    return results | evaluate.capabilities(
        sampler, tokenizer, stage.seed("capabilities"), stage.answer_tokens
    )


def budgets(stage: Stage, engine: Engine) -> dict[str, Any]:
    """The thinking-budget curve; nothing was trained for it."""
    config = stage.config
    stop_thinking = config.stop_thinking or STOP_THINKING
    params = SamplingParams(
        stage.answer_tokens, 0.6, seed=stage.seed("budget"), stop_thinking=stop_thinking
    )
    curve, answered = evaluate.budget_curve(
        stage.sampler(engine), stage.tokenizer, evaluate.held_out(400), params, config.budgets
    )
    return {"answered_min": answered, "curves": {"thinking_budget": curve}}
