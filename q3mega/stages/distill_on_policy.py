"""Stage 9, on-policy distillation: the student answers itself, and the teacher corrects each token.

The student is pulled to the teacher's distribution on its own tokens (Qwen3 report, section 4.5).
The report's Table 21 is made from the same start: RL, and more off-policy data, all against the
FLOPs of sampling, teacher and training.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from q3mega.config.rl import RLSettings
from q3mega.config.stages import DistillOnPolicy
from q3mega.data.batch import Sample
from q3mega.data.chat import render
from q3mega.data.sft import epochs, steps_of
from q3mega.distillation.teaching import taught_by
from q3mega.engine import Engine, parallel
from q3mega.evaluation import answers
from q3mega.evaluation.answers import flagged
from q3mega.io import whole_records
from q3mega.model import Qwen3Shape
from q3mega.model.config import shape_of
from q3mega.rollout import Sampler, SamplingParams
from q3mega.stages.common.rl import learn
from q3mega.stages.common.stage import Stage
from q3mega.stages.common.teachers import pass_rates, problems, teacher_of, teacher_samples
from q3mega.train import supervised
from q3mega.train.log import Log

POINTS = 4  # evaluations along each curve of the comparison


def run(stage: Stage[DistillOnPolicy]) -> None:
    """Train on the student's own answers under the teacher, compare, evaluate."""
    config = stage.config
    source = stage.start()
    with teacher_of(stage, shape_of(source).vocab) as teacher:
        engine = stage.engine(source, steps=config.steps)
        loss, add_teacher = taught_by(teacher, config)
        sampler, log = stage.sampler(engine), stage.log(config.steps)
        supervised.train(
            engine,
            lambda step: own_answers(stage, sampler, step),
            steps=config.steps,
            capacity=config.micro_batch_tokens,
            folder=stage.dir / "checkpoints" / "on_policy",
            log=log,
            save_every=config.save_every,
            loss_fn=loss,
            prepare=add_teacher,
            watch=watcher(stage, engine, log, config.steps),
        )
    results: dict[str, Any] = pass_rates(stage, engine)
    student, strong = engine.shape, teacher.shape
    curves = {
        "on-policy distillation": curve(stage.dir, lambda row: distilled(student, strong, row))
    }
    if config.compare_rl:
        rates = compare_rl(stage, source, config.compare_rl)
        curves["RL"] = curve(stage.dir / "rl", lambda row: reinforced(student, row))
        ratio = curves["RL"]["x"][-1] / curves["on-policy distillation"]["x"][-1]
        results |= {
            "rl_pass1": rates["pass1"],
            "rl_pass8": rates["pass8"],
            "flops_ratio_rl_over_opd": {"value": ratio, "n": 1},
        }
    if config.compare_sft_samples:
        compare_sft(stage, source)
        curves["more off-policy data"] = curve(
            stage.dir / "more", lambda row: copied(student, strong, row)
        )
    results["curves"] = {
        "distillation_flops": {"xlabel": "FLOPs", "ylabel": "thinking accuracy", "series": curves}
    }
    stage.finish(engine, results)


def own_answers(stage: Stage[DistillOnPolicy], sampler: Sampler, step: int) -> list[Sample]:
    """The student's answers to this step's prompts: every token it chose carries the loss."""
    queries = problems(stage, stage.config.prompts, f"step {step}")
    prompts = [
        stage.tokenizer.encode(render(flagged(p, mode), add_generation_prompt=True))
        for p, mode in parallel.local_share(queries)
    ]
    seed = stage.seed("rollout", step, parallel.data_rank())
    params = SamplingParams(stage.config.max_tokens, seed=seed)
    samples = []
    for prompt, (c,) in zip(prompts, sampler.generate(prompts, params), strict=True):
        weights = [0.0] * len(prompt) + [float(m) for m in c.mask]
        samples.append(Sample(prompt + c.tokens, weights))
    return parallel.gather_over_data(samples)


# -- the comparison of Table 21 ------------------------------------------------------------------


def forward(shape: Qwen3Shape, row: dict[str, float], prefix: str = "") -> float:
    """FLOPs of one forward pass over what a step's log line counts."""
    tokens = row[f"{prefix}tokens"]
    return shape.forward_flops(tokens, row[f"{prefix}pairs"] / tokens) if tokens else 0.0


def distilled(student: Qwen3Shape, teacher: Qwen3Shape, row: dict[str, float]) -> float:
    """Sampling is one forward of the student, training three, the teacher one of its own."""
    return 4 * forward(student, row) + forward(teacher, row)


def reinforced(student: Qwen3Shape, row: dict[str, float]) -> float:
    """Everything is sampled, what carries a signal is trained on."""
    return forward(student, row) + 3 * forward(student, row, "trained_")


def copied(student: Qwen3Shape, teacher: Qwen3Shape, row: dict[str, float]) -> float:
    """The teacher writes a sample once, the student trains on it."""
    return forward(teacher, row) + 3 * forward(student, row)


def watcher(
    stage: Stage[DistillOnPolicy], engine: Engine, log: Log, steps: int
) -> Callable[[int], None]:
    """Thinking accuracy at the start and at a few steps of a run, into points.jsonl."""
    at = {round(steps * i / POINTS) for i in range(POINTS + 1)}
    held = stage.held_out()

    def watch(step: int) -> None:
        if step in at:
            params = SamplingParams(stage.answer_tokens, 0.6, seed=stage.seed("curve"))
            answered = answers.answer_problems(
                stage.sampler(engine), stage.tokenizer, held, params, "think"
            )
            log.point(step, **answers.accuracy(answered))

    return watch


def curve(folder: Path, cost: Callable[[dict[str, float]], float]) -> dict[str, list[float]]:
    """A run's points against what it had spent by then, from its own record."""
    spent = {0: 0.0}
    for row in whole_records(folder / "metrics.jsonl"):
        spent[row["step"]] = spent[row["step"] - 1] + cost(row)
    points = whole_records(folder / "points.jsonl")
    columns = {
        name: [p[key] for p in points]
        for name, key in (("y", "value"), ("low", "low"), ("high", "high"))
    }
    return {"x": [spent[p["step"]] for p in points], **columns}


def compare_rl(stage: Stage[DistillOnPolicy], source: Path, config: RLSettings) -> dict[str, Any]:
    """RL from the same start, on problems drawn and flagged as distillation's thinking prompts."""
    engine = stage.engine(
        source, steps=config.steps * config.updates, lr=stage.config.compare_rl_lr
    )
    pool = [
        replace(p, messages=tuple(flagged(p, mode)))
        for p, mode in problems(stage, 2000, "rl")
        if mode == "think"
    ]
    watch = watcher(stage, engine, stage.log(config.steps, "rl"), config.steps)
    learn(stage, engine, source, pool, config, part="rl", watch=watch)
    return pass_rates(stage, engine)


def compare_sft(stage: Stage[DistillOnPolicy], source: Path) -> None:
    """More off-policy data from the same start: the baseline that can undercut both."""
    config = stage.config
    samples = teacher_samples(stage, config.compare_sft_samples, "more")
    steps = steps_of(samples, config.prompts, 1)
    engine, log = stage.engine(source, steps=steps), stage.log(steps, "more")
    supervised.train(
        engine,
        epochs(samples, config.prompts, stage.seed("more order")),
        steps=steps,
        capacity=config.micro_batch_tokens,
        folder=stage.dir / "checkpoints" / "more",
        log=log,
        save_every=config.save_every,
        watch=watcher(stage, engine, log, steps),
    )
