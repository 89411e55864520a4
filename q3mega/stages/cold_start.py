"""Stage 4, long-CoT cold start: plant the pattern of reasoning with few samples and few steps.

Queries pass a filter (verifiable, one question, not answerable without thinking), the teacher
answers each several times, answers pass the six rules, and a small subset of what is left is
trained on (Qwen3 report, section 4.1). Validation questions are held out before anything is drawn.
"""

import json
import random
from collections import Counter

from q3mega import evaluate
from q3mega.data.corpus import REASONING
from q3mega.data.filters import balance, query_filter, response_filter
from q3mega.data.sft import chat_sample, reply_text
from q3mega.data.tasks import Problem, generate
from q3mega.data.tasks.solutions import boxed, check
from q3mega.data.tasks.tutor import candidates, unsuitable_queries
from q3mega.engine import Engine, parallel
from q3mega.evaluate import text_of
from q3mega.rollout import SamplingParams
from q3mega.stages.fine_tune import fine_tune
from q3mega.stages.stage import Stage

UNSUITABLE_SHARE = 10  # one query in ten of the raw pool
VALIDATION = 400


def run(stage: Stage) -> None:
    source = stage.start()
    if not stage.prepared("samples.json"):
        curate(stage, stage.engine(source))
    rows = json.loads((stage.data / "samples.json").read_text())
    samples = [
        chat_sample(stage.tokenizer, row["messages"], reply_text(row["thinking"], row["response"]))
        for row in rows
    ]
    engine = fine_tune(stage, source, samples)
    stage.finish(
        engine, evaluate.thinking(stage.sampler(engine), stage.tokenizer, stage.seed("eval"))
    )


def curate(stage: Stage, judge: Engine) -> None:
    """Both filters; leaves samples.json, queries.json and drops.json in data/."""
    config = stage.config
    validation = {p.question for p in evaluate.held_out(VALIDATION)}
    share = config.queries // len(REASONING)
    pool = [p for f in REASONING for p in generate(f, share, seed=stage.seed("queries", f))]
    pool += unsuitable_queries(config.queries // UNSUITABLE_SHARE, stage.seed("unsuitable"))
    known = answered_directly(stage, judge, pool)
    drops: Counter[str] = Counter()
    kept: list[Problem] = []
    for query, guessed in zip(pool, known, strict=True):
        rule = query_filter(query, guessed)
        drops.update([f"query: {rule}"] if rule else [])
        kept += [] if rule else [query]
    kept = balance(kept, stage.seed("balance"))
    held = [p for p in evaluate.held_out(VALIDATION) if p.family == "chain_sum"]
    rows = []
    for query in kept:
        for c in candidates(query, config.candidates, stage.seed("teacher"), held):
            rule = response_filter(query, c.thinking, c.response, validation)
            drops.update([f"response: {rule}"] if rule else [])
            if rule is None:
                rows.append(
                    {
                        "id": query.id,
                        "messages": query.messages,
                        "thinking": c.thinking,
                        "response": c.response,
                    }
                )
                break
    rows = random.Random(stage.seed("subset")).sample(rows, min(config.samples, len(rows)))
    stage.write("data/drops.json", dict(drops))
    stage.write("data/queries.json", [vars(p) for p in kept])
    stage.write("data/samples.json", rows)
    stage.barrier()


def answered_directly(stage: Stage, judge: Engine, pool: list[Problem]) -> list[bool]:
    """Does the base model answer right with no room to think? (the report's judge, at our scale)"""
    rank, size = parallel.data_rank(), parallel.data_size()
    mine = pool[rank::size]
    prompts = [stage.tokenizer.encode(f"Q: {p.question}\nA:") for p in mine]
    params = SamplingParams(max_tokens=24, temperature=0)
    found = stage.sampler(judge).generate(prompts, params)
    right = []
    for i, (p, (c,)) in enumerate(zip(mine, found, strict=True)):
        answer = boxed(text_of(c, stage.tokenizer).split("\n")[0])
        right.append((rank + i * size, answer is not None and check(p, answer)))
    every = dict(parallel.gather_over_data(right))
    return [every[i] for i in range(len(pool))]
