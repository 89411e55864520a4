"""Plans before any GPU is asked for: a recipe's stages on their layouts, or the best layouts that
fit. What things cost is q3mega.planner.cost's."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from q3mega.config.layout import Layout, Recompute, check_layout
from q3mega.config.recipe import Recipe
from q3mega.config.workload import PROMPT_TOKENS
from q3mega.errors import UserError
from q3mega.model.sizes import QWEN3, Qwen3Shape
from q3mega.planner.cost import (
    CARDS,
    GIB,
    Card,
    Job,
    Rollouts,
    by_stage,
    kv_bytes,
    memory,
    sent,
    step,
)
from q3mega.planner.rollout_schedule import Rates, finish_times, pace

# -- a recipe's stages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One stage: bytes of a GPU of each pipeline stage, and seconds of one step, by component."""

    stage: str
    job: Job
    memory: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def needed(self) -> list[float]:
        """Bytes of a GPU of each pipeline stage."""
        return [sum(part.values()) for part in self.memory]


def stages(recipe: Recipe, card: Card) -> list[Planned]:
    """Every stage at the longest sequences that its settings allow.

    A supervised sample counts as a whole micro-batch, an answer as long as `max_tokens`.
    """
    return [_planned(recipe, name, card) for name in recipe.stages]


def _planned(recipe: Recipe, name: str, card: Card) -> Planned:
    config = recipe.stages[name]
    load, layout = config.workload(), config.layout
    vocab = recipe.tokenizer.vocab_size or Qwen3Shape.vocab
    if config.optimizer == "muon":  # whose state no rank shares with another
        layout = layout.model_copy(update={"distributed_optimizer": False})
    job = Job(
        recipe.trained_by(config).shape(vocab), layout, card, load.longest, load.batch,
        max(1, config.micro_batch_tokens // load.longest), "fp8" if config.fp8 else "bf16",
        layout.recompute, "all_to_all",
    )  # fmt: skip
    teacher = replace(job, shape=recipe.model.shape(vocab))
    seconds = {"train": step(job).seconds * load.updates}
    held = {name: count * memory(job)["weights"] for name, count in load.frozen.items()}
    if load.sampling:
        rollouts = Rollouts(
            teacher.shape if load.sampling.by_teacher else job.shape, layout.processes,
            layout.tensor, load.sampling.sequences, PROMPT_TOKENS, load.sampling.tokens,
            layout.expert * layout.expert_tensor, config.sample_batch, card,
        )  # fmt: skip
        held = {"kv_cache": rollouts.cache(), **held}
        if load.sampling.every_step:
            seconds["sample"] = rollouts.seconds()
    if load.teacher:
        held["teacher"] = memory(teacher)["weights"]
    if load.teacher_forward:
        seconds["teacher"] = step(teacher).seconds / 3
    return Planned(name, job, [part | held for part in by_stage(job)], seconds)


# -- search ----------------------------------------------------------------------------------------


def layouts(job: Job, gpus: int) -> Iterator[Job]:
    """Every layout of `gpus` that megatron-core runs for the shape, tensor within a node."""
    s, powers = job.shape, [2**i for i in range(10)]
    for tensor in (p for p in powers if p <= job.card.node):
        for pipeline in (p for p in powers if p <= s.layers):
            for context in (p for p in powers if p * 4096 <= max(4096, job.sequence)):
                for expert in powers if s.experts else (1,):
                    layout = Layout(
                        processes=gpus, tensor=tensor, pipeline=pipeline, context=context,
                        expert=expert, sequence_parallel=tensor > 1,
                    )  # fmt: skip
                    for virtual in _virtual(s.layers, pipeline):
                        tried = layout.model_copy(update={"virtual_pipeline": virtual})
                        candidate = replace(job, layout=tried)
                        try:
                            check_layout(tried, s)
                        except UserError:
                            continue
                        if candidate.data * candidate.micro_batch <= candidate.batch:
                            yield candidate


def _virtual(layers: int, pipeline: int) -> list[int]:
    """Up to four ways of cutting a stage's layers; the ends count as two if need be."""
    layers_counted = layers if layers % pipeline == 0 else layers + 2
    if pipeline == 1 or layers_counted % pipeline:
        return [1]
    per_stage = layers_counted // pipeline
    return [v for v in range(1, per_stage + 1) if per_stage % v == 0][:4]


def best(job: Job, gpus: int, count: int = 5) -> list[Job]:
    """The fastest layouts that fit, each with the least recomputation that makes it fit."""
    choices: tuple[Recompute, ...] = ("none", "norms", "experts", "full")
    fitting = []
    for candidate in layouts(job, gpus):
        for recompute in choices:
            if recompute == "experts" and not job.shape.experts:
                continue
            tried = replace(candidate, recompute=recompute)
            if sum(memory(tried).values()) <= job.card.memory:
                fitting.append(tried)
                break
    return sorted(fitting, key=lambda j: step(j).seconds)[:count]


# -- tables ----------------------------------------------------------------------------------------


def table_of_stages(recipe: Recipe, card: str) -> tuple[str, bool]:
    """(Markdown, whether every stage fits): a recipe's stages on their layouts."""
    rows, fits = [], True
    for planned in stages(recipe, _card(card)):
        needed, job, trained = planned.needed, planned.job, step(planned.job)
        fits &= max(needed) <= job.card.memory
        verdict = "fits" if max(needed) <= job.card.memory else "TOO MUCH"
        fullest = planned.memory[needed.index(max(needed))]
        split = ", ".join(f"{n} {b / GIB:.3g}" for n, b in fullest.items() if b)
        traffic = ", ".join(f"{n} {b / GIB:.3g}" for n, b in sent(job).items() if b)
        times = ", ".join(f"{n} {t:.3g}" for n, t in planned.seconds.items())
        cells = [
            planned.stage, _layout(job), f"{max(needed) / GIB:.1f} {verdict}", split,
            " ".join(f"{n / GIB:.0f}" for n in needed), traffic or "nothing", times,
            f"{trained.bubble:.0%}", f"{trained.tokens_per_second:,.0f}",
            f"{trained.flops / 1e12:.0f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "stage", "layout", "GiB of the fullest GPU", "of which", "GiB by pipeline stage",
        "GiB sent a GPU and step", "seconds a step", "bubble", "trained tokens/s a GPU",
        "TFLOP/s a GPU",
    ]  # fmt: skip
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]), fits


def table_of_layouts(
    model: str, gpus: int | None, card: str, sequence: int, batch: int
) -> tuple[str, bool]:
    """(Markdown, whether any fits): the fastest layouts of a model that fit."""
    job = _job(model, gpus, card, sequence, batch)
    fastest = best(job, job.layout.processes)
    if not fastest:
        return f"{model} fits no layout of {gpus} {card}: take more GPUs", False
    rows = []
    for each in fastest:
        taken, needed = step(each), sum(memory(each).values())
        sent = sum(taken.parts.get(n, 0.0) for n in ("dispatch", "tensor", "context"))
        share = sent / sum(taken.parts.values())
        rows.append(
            f"| {_layout(each)} | {each.recompute} | {needed / GIB:.1f} | {taken.seconds:.3g} | "
            f"{taken.tokens_per_second:,.0f} | {taken.flops / 1e12:.0f} | {taken.bubble:.0%} | "
            f"{share:.0%} |"
        )
    head = (
        "| layout | recompute | GiB a GPU | seconds a step | tokens/s a GPU | TFLOP/s a GPU | "
        "bubble | communication |\n|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows]), True


STALENESS = (0, 1, 2, 4)
BATCHES = 24  # simulated


def table_of_schedules(
    model: str, gpus: int | None, card: str, longest: int, sequences: int, updates: int
) -> tuple[str, bool]:
    """(Markdown, whether any fits): reinforcement with some GPUs that train and others that sample,
    by how many batches may be ahead; the first row's all do both in turn.

    A recipe does not know how long answers will be: they are drawn log-normal, with a quarter of
    `longest` as the median and sigma 0.8, and cut there.
    """
    for name, value in (("--rl", updates), ("--sequence", longest), ("--batch", sequences)):
        if value < 1:
            raise UserError(f"{name} {value} must be 1 or more")
    base = _job(model, gpus, card, longest, sequences)
    gpus = base.layout.processes
    rng = random.Random(0)

    def length() -> int:
        return min(longest, int(rng.lognormvariate(math.log(longest / 4), 0.8)))

    lengths = [[length() for _ in range(sequences)] for _ in range(BATCHES)]
    mean = sum(map(sum, lengths)) / (BATCHES * sequences)
    packed = math.ceil(
        sequences * (mean + PROMPT_TOKENS) / longest / updates
    )  # whole micro-batches
    head = [
        "GPUs that train", "that sample", "layout", "seconds of updates",
        *(f"a batch, staleness {n}" for n in STALENESS), "best, times all in turn",
    ]  # fmt: skip
    rows, in_turn = [], 0.0
    for share in (1, 0.75, 0.5, 0.25):
        training = int(gpus * share)
        fastest = best(replace(base, batch=packed), training, 1) if training else []
        serving = gpus - training if share < 1 else gpus
        rates = _serving(base, serving, mean)
        if not fastest or rates is None:
            continue
        rates = replace(rates, train=step(fastest[0]).seconds * updates)
        allowed = STALENESS if share < 1 else STALENESS[:1]
        times = [pace(finish_times(rates, lengths, n)) for n in allowed]
        in_turn = in_turn or times[0]
        cells = [f"{t:.3g}" for t in times] + [""] * (len(STALENESS) - len(times))
        where = (str(training), str(serving)) if share < 1 else ("all", "all")
        cells = [*where, _layout(fastest[0]), f"{rates.train:.3g}", *cells]
        rows.append(f"| {' | '.join(cells)} | {in_turn / min(times):.2f} |")
    if not rows:
        return f"reinforcement of {model} does not fit {gpus} {card}: take more GPUs", False
    summary = (
        f"{sequences} answers a batch of {mean:,.0f} tokens in the mean, {longest:,} at most, "
        f"{updates} updates; simulated, {BATCHES} batches"
    )
    return "\n".join(
        [summary, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    ), True


def _serving(job: Job, gpus: int, mean: float) -> Rates | None:
    """Servers of as few GPUs as the weights leave half free; None: there is no such server."""
    weights = 2.0 * job.shape.num_parameters()
    for tensor in (1, 2, 4, 8, 16):
        if weights / tensor <= job.card.memory / 2 and tensor <= gpus:
            break
    else:
        return None
    rollouts = Rollouts(
        job.shape, gpus, tensor, job.batch, PROMPT_TOKENS, int(mean), tensor, 0, job.card
    )
    room = 0.9 * job.card.memory * tensor - weights
    slots = int(room / ((PROMPT_TOKENS + mean) * kv_bytes(job.shape)))
    # every server takes all weights over its network
    handed = weights / tensor / (job.card.network_bandwidth / 2)
    return Rates(rollouts.decode, gpus // tensor, min(slots, 512), 0.0, handed)


def _job(model: str, gpus: int | None, card: str, sequence: int, batch: int) -> Job:
    if model not in QWEN3:
        raise UserError(f"--model {model}: choose one of {', '.join(QWEN3)}")
    if gpus is None or gpus < 1:
        raise UserError(f"--gpus {gpus}: say how many GPUs, 1 or more")
    return Job(QWEN3[model], Layout(processes=gpus), _card(card), sequence, batch)


def _card(name: str) -> Card:
    if name not in CARDS:
        raise UserError(f"--card {name}: choose one of {', '.join(CARDS)}")
    return CARDS[name]


def _layout(job: Job) -> str:
    a = job.layout
    ways = {
        "TP": a.tensor, "PP": a.pipeline, "VPP": a.virtual_pipeline, "CP": a.context,
        "EP": a.expert, "ETP": a.expert_tensor, "DP": job.data,
    }  # fmt: skip
    return " ".join(f"{n}{w}" for n, w in ways.items() if w > 1) or "one GPU"
