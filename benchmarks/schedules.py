"""What sampling beside training is worth, with a model's own times and answer lengths.

    python benchmarks/schedules.py RUN/05-reasoning_rl/hf [--prompts 64] [--rollouts 8]

Measures on this machine, one after the other: answers to generated problems, a decoding step at
several numbers of sequences, a batch's updates, and writing the weights. Then simulates
(q3mega.planner.rollout_schedule) a trainer and as many servers as keep it busy, each as fast as
this machine.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
from q3mega.algorithms.losses import normalise, policy_gradient
from q3mega.config.layout import Layout
from q3mega.data.batch import Sample
from q3mega.data.chat import render
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, OptimizerSpec
from q3mega.engine.parallel import shard_by_length
from q3mega.model.config import shape_of
from q3mega.ops.grpo_loss import Settings as GrpoSettings
from q3mega.planner.rollout_schedule import Rates, finish_times, pace
from q3mega.problems.pool import Pool
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.in_process import InProcessSampler

BATCHES = 24  # simulated
COUNTS = (1, 8, 32, 128, 512)  # sequences of a decoding step
STEPS = 48  # measured
STALENESS = (0, 1, 2, 4)


def between(points: dict[int, float], n: int) -> float:
    """Linear between the measured ones."""
    for (a, x), (b, y) in pairwise(sorted(points.items())):
        if n <= b:
            return x + (y - x) * (n - a) / (b - a)
    return points[max(points)] * n / max(points)


def seconds_of(run: Callable[[], object]) -> float:
    """The median of five, after one that warms up."""
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=160)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.checkpoint)
    spec = OptimizerSpec(lr=1e-6, steps=100)
    engine = Engine(shape_of(args.checkpoint), Layout(processes=1), seed=0, optimizer=spec)
    engine.load_hf(args.checkpoint)
    sampler = InProcessSampler(engine, tokenizer)
    pool = Pool()
    problems = [p for d in pool.domains for p in pool.draw(d, args.prompts, 0)]
    prompts = [tokenizer.encode(render(p.messages, add_generation_prompt=True)) for p in problems]

    some = prompts[:: len(prompts) // args.prompts][: args.prompts]
    params = SamplingParams(args.max_tokens, n=args.rollouts)
    groups = sampler.generate(some, params)
    answers = [(p, c) for p, group in zip(some, groups, strict=True) for c in group]
    lengths = [len(c.tokens) for _, c in answers]
    deciles = statistics.quantiles(lengths, n=10)
    print(f"{len(lengths)} answers: {statistics.fmean(lengths):.0f} tokens in the mean, ", end="")
    print(f"{deciles[4]:.0f} in the median, {deciles[8]:.0f} at 90 %, {max(lengths)} at most")

    decode = {}
    for n in COUNTS:  # a long and a short call on the same prompts: prefill falls out
        fixed = (some * n)[:n]
        sampler.stops = ()
        seconds = []
        for tokens in (8, 8 + STEPS):
            started = time.perf_counter()
            sampler.generate(fixed, SamplingParams(tokens))
            seconds.append(time.perf_counter() - started)
        decode[n] = (seconds[1] - seconds[0]) / STEPS
    steps = ", ".join(f"{n}: {1000 * s:.2f}" for n, s in decode.items())
    print(f"milliseconds a decoding step, by sequences: {steps}")

    samples = [sample(p, c, i) for i, (p, c) in enumerate(answers)]
    loss = policy_gradient(GrpoSettings(variant="dapo", clip_low=0.2, clip_high=0.28))

    def updates() -> None:
        for part in range(args.updates):
            weighted = normalise(samples[part :: args.updates], "token", args.max_tokens)
            engine.train_step(shard_by_length(weighted, 4096), loss)

    train = seconds_of(updates)
    with tempfile.TemporaryDirectory() as folder:
        sync = seconds_of(lambda: engine.save_hf(folder, {}))
    print(f"{args.updates} updates: {train:.2f} s; weights: {sync:.3f} s\n")

    def batch(number: int) -> list[int]:
        """Another order of the measured lengths, so that servers share them differently."""
        return [lengths[(i * 37 + number * 11) % len(lengths)] for i in range(len(lengths))]

    batches = [batch(number) for number in range(BATCHES)]
    print(f"| servers | {' | '.join(f'staleness {n}, s a batch' for n in STALENESS)} | best |")
    print("|---" * (len(STALENESS) + 2) + "|")
    for servers in (1, 2, 4):
        rates = Rates(lambda n: between(decode, n), servers, 512, train, sync)
        times = [pace(finish_times(rates, batches, n)) for n in STALENESS]
        cells = " | ".join(f"{t:.2f}" for t in times)
        print(f"| {servers} | {cells} | {times[0] / min(times):.2f}x |")


def sample(prompt: list[int], completion: Completion, number: int) -> Sample:
    blank, length = [0.0] * len(prompt), len(completion.tokens)
    columns = {
        "advantages": blank + [1.0 if number % 2 else -1.0] * length,
        "old_logprobs": blank + completion.logprobs,
    }
    return Sample(prompt + completion.tokens, blank + [1.0] * length, columns)


if __name__ == "__main__":
    main()
