"""Memory and step time of a layout, before any GPU is asked for: arithmetic, no torch.

A `Job` is one training step of one model on one layout. `memory` counts what the fullest rank
holds, `step` adds up what it does: products at rates of their own for projections, attention and
experts, memory traffic, launches, and the communication of each axis. The rates were fitted to
published throughput of Qwen3-8B, 30B-A3B and 235B-A22B on H100s (benchmarks/published.py); for
other cards they are the same shares of the card's peaks, and nothing has checked them there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from q3mega.errors import UserError
from q3mega.model.sizes import QWEN3, Qwen3Shape
from q3mega.recipe import (
    SFT,
    DistillOnPolicy,
    Layout,
    Pretrain,
    Recipe,
    Recompute,
    RLSettings,
    check_layout,
)

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Peaks by the vendor. flops: bf16 a second; memory, traffic: bytes and bytes a second; link:
    bytes a second and direction to the GPUs of a node, network: to those of others.
    """

    memory: float
    flops: float
    traffic: float
    link: float
    network: float
    node: int = 8  # GPUs


CARDS = {
    "h100": Card(80e9, 989.4e12, 3.35e12, 450e9, 50e9),
    "h200": Card(141e9, 989.4e12, 4.8e12, 450e9, 50e9),
    "a100": Card(80e9, 312e12, 2.04e12, 300e9, 25e9),
}


@dataclass(frozen=True)
class Rates:
    """Shares of a card's peaks, and times: fitted, see the module's text."""

    projection: float = 0.573
    attention: float = 0.516
    expert: float = 0.6
    traffic: float = 0.526
    link: float = 0.674  # tensor and context parallelism
    all_to_all: float = 0.8
    fused_dispatch: float = 1.0  # DeepEP, HybridEP
    hidden: float = 0.9  # of the experts' communication behind 1F1B's other micro-batch
    launch: float = 1.72e-3  # seconds a layer with experts, forward and backward
    launch_dense: float = 0.14  # of that in a dense layer
    graphs: float = 0.239  # of that with CUDA graphs of router and preprocessing
    permute: float = 2.38  # passes over routed tokens, above those that the formulas count
    casts: float = 2.61  # traffic with fp8, of that without
    fp8: float = 1.5  # products a second with fp8, of those without
    skew: float = 1.29  # the busiest rank's tokens over the mean, where the router decides


RATES = Rates()


@dataclass(frozen=True)
class Job:
    """One optimizer step: `batch` sequences of `sequence` tokens, `micro_batch` at a time."""

    shape: Qwen3Shape
    layout: Layout
    card: Card = CARDS["h100"]
    sequence: int = 4096
    batch: int = 1024
    micro_batch: int = 1
    precision: Literal["bf16", "fp8"] = "bf16"
    recompute: Recompute = "none"
    dispatch: Literal["all_to_all", "fused"] = "fused"
    overlap: bool = False  # the experts' communication behind computation
    graphs: bool = False
    forced: bool = False  # experts get equally many tokens whatever the router says

    @property
    def data(self) -> int:
        """Data-parallel ways."""
        a = self.layout
        return a.processes // (a.tensor * a.pipeline * a.context)

    @property
    def micro_batches(self) -> int:
        """Of a data-parallel rank and step."""
        return math.ceil(self.batch / (self.data * self.micro_batch))

    @property
    def tokens(self) -> float:
        """Of a micro-batch, that a tensor-parallel group holds."""
        return self.micro_batch * self.sequence / self.layout.context


# -- memory ----------------------------------------------------------------------------------------


def _layers(job: Job, stage: int) -> int:
    """Of a pipeline stage; where embedding and lm_head count, the ends hold one less."""
    s, a = job.shape, job.layout
    if not a.counts_ends(s.layers):
        return math.ceil(s.layers / a.pipeline)
    return (s.layers + 2) // a.pipeline - (stage == 0) - (stage == a.pipeline - 1)


def parameters(job: Job, stage: int = 0) -> tuple[float, float]:
    """(dense, experts') parameters of a rank of a pipeline stage, the first or one inside."""
    s, a = job.shape, job.layout
    layers = _layers(job, stage)
    experts = s.experts * 3 * s.hidden * s.moe_ffn
    dense = s.num_parameters(embeddings=False) / s.layers - experts
    ends = s.vocab * s.hidden * (1 if s.tied or a.pipeline > 1 else 2) if stage == 0 else 0
    return (
        (layers * dense + ends) / a.tensor,
        layers * experts / (a.expert * a.expert_tensor),
    )


def activation_bytes(job: Job) -> float:
    """Kept for the backward, a token and layer of a rank, in two bytes an element."""
    s, q, kv = job.shape, job.shape.heads, job.shape.kv_heads
    d = s.head_dim
    if job.recompute == "full":
        return 2 * s.hidden / _shards(job)
    norms = 0 if job.recompute == "norms" else 2 * s.hidden
    # residual twice, both norms' outputs; q, k, v; q and k normalised, and rotated; the output
    attention = 2 * s.hidden + norms + (q + 2 * kv) * d + 2 * (q + kv) * d + q * d
    if not s.experts:
        mlp = 3 * s.ffn
    elif job.recompute == "experts":
        mlp = 0
    else:  # permuted tokens, gate and up, their product
        product = 0 if job.recompute == "norms" else s.moe_ffn
        mlp = s.topk * (s.hidden + 2 * s.moe_ffn + product)
    return 2 * (attention + mlp) / _shards(job)


def _shards(job: Job) -> int:
    return job.layout.tensor if job.layout.sequence_parallel else 1


LOGITS_BYTES = float(GIB)  # the one buffer of the lm-head's operators
CONTEXT_BYTES = 1.5 * GIB  # CUDA, NCCL, what the allocator cannot use


def memory(job: Job) -> dict[str, float]:
    """Bytes of the fullest rank by component: bf16 weights, fp32 gradients, Adam.

    The fullest is on the first pipeline stage, which has most micro-batches in flight, or on the
    second, which may hold a layer more.
    """
    stages = range(min(2, job.layout.pipeline))
    return max((_memory(job, s) for s in stages), key=lambda found: sum(found.values()))


def _memory(job: Job, stage: int) -> dict[str, float]:
    a, (dense, experts) = job.layout, parameters(job, stage)
    copies = job.data * a.context if a.distributed_optimizer else 1
    expert_copies = a.processes // (a.expert * a.expert_tensor * a.pipeline)
    if not a.distributed_optimizer:
        expert_copies = 1
    v = a.virtual_pipeline
    # of a micro-batch's passes through a stage's chunks (1F1B, interleaved 1F1B)
    warm = a.pipeline - stage if v == 1 else (v + 1) * a.pipeline - 1 - 2 * stage
    in_flight = min(job.micro_batches * v, warm)
    skew = RATES.skew if job.shape.experts and not job.forced else 1.0
    kept = activation_bytes(job) * job.tokens * _layers(job, stage) / v * in_flight
    return {
        "weights": 2 * (dense + experts),
        "gradients": 4 * (dense + experts),
        "optimizer": 12 * (dense / copies + experts / expert_copies),
        "activations": kept * skew,
        "logits": LOGITS_BYTES,
        "context": CONTEXT_BYTES,
    }


# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """seconds: of one step; parts: seconds of one layer and micro-batch, by what takes them."""

    seconds: float
    parts: dict[str, float]
    bubble: float  # share of the step
    tokens_per_second: float  # a GPU
    flops: float  # useful ones a second and GPU


def step(job: Job, rates: Rates = RATES) -> Step:
    """How long one optimizer step takes."""
    s, a = job.shape, job.layout
    parts = _layer(job, rates)
    head = 6 * job.tokens * s.vocab * s.hidden / a.tensor / (job.card.flops * rates.projection)
    layer, last = sum(parts.values()), _layers(job, a.pipeline - 1)
    micro = max(_layers(job, 1 if a.pipeline > 2 else 0) * layer, last * layer + head)
    bubble = (a.pipeline - 1) / (job.micro_batches * a.virtual_pipeline)
    busy = micro * job.micro_batches
    seconds = busy * (1 + bubble) + _gradients(job)
    done = job.batch * job.sequence
    useful = 3 * s.forward_flops(done, job.sequence / 2)
    return Step(
        seconds,
        parts | {"lm_head": head / s.layers},
        busy * bubble / seconds,
        done / seconds / a.processes,
        useful / seconds / a.processes,
    )


def _layer(job: Job, rates: Rates) -> dict[str, float]:
    """Seconds of a layer's forward and backward over one micro-batch."""
    s, a, card = job.shape, job.layout, job.card
    t, q = job.tokens, s.heads * s.head_dim
    faster, casts = (rates.fp8, rates.casts) if job.precision == "fp8" else (1.0, 1.0)
    rate = card.flops * rates.projection * faster
    skew = rates.skew if s.experts and not job.forced else 1.0
    own = t / a.tensor
    traffic = own * 2 * (20 * s.hidden + 8 * (q + 2 * s.kv_heads * s.head_dim))
    parts = {
        "projections": 6 * own * s.attention_parameters() / rate,
        "attention": 6 * own * q * job.sequence / (card.flops * rates.attention),
    }
    launch = rates.launch
    if s.experts:
        routed = own * s.topk * skew
        products = 6 * routed * 3 * s.hidden * s.moe_ffn
        parts["experts"] = products / (card.flops * rates.expert * faster)
        parts["dispatch"] = _dispatch(job, rates) * skew
        traffic += rates.permute * routed * 2 * (8 * s.hidden + 10 * s.moe_ffn)
        launch *= rates.graphs if job.graphs else 1.0
    else:
        parts["mlp"] = 6 * own * 3 * s.hidden * s.ffn / rate
        traffic += own * 2 * 8 * s.ffn
        launch *= rates.launch_dense
    parts["traffic"] = traffic * casts / (card.traffic * rates.traffic)
    parts["launch"] = launch
    if a.tensor > 1:
        gathers = 4 if s.experts else 8  # and their scatters; a quarter more for the backward's
        sent = 1.25 * gathers * t * s.hidden * 2 * (a.tensor - 1) / a.tensor
        parts["tensor"] = sent / (card.link * rates.link)
    if a.context > 1:
        sent = 3 * t * (a.context - 1) * 2 * s.kv_heads * s.head_dim * 2 / a.tensor
        near = a.tensor * a.context <= card.node
        parts["context"] = 0.5 * sent / ((card.link if near else card.network) * rates.link)
    if job.recompute == "experts":
        parts["recompute"] = (
            parts.get("experts", 0.0) / 3 + parts.get("dispatch", 0.0) / 2 + parts["traffic"] / 4
        )
    elif job.recompute == "norms":
        parts["recompute"] = parts["traffic"] / 10
    elif job.recompute == "full":
        parts["recompute"] = sum(parts.values()) / 3
    return parts


def _dispatch(job: Job, rates: Rates) -> float:
    """Seconds of the experts' four exchanges: there and back, forward and backward.

    Between nodes a fused dispatcher sends a token once a node, an all-to-all once an expert.
    """
    s, a, card = job.shape, job.layout, job.card
    ways = a.expert * a.expert_tensor
    nodes = max(1.0, ways / card.node)
    volume = 4 * job.tokens / a.tensor * s.hidden * 2
    fused = job.dispatch == "fused"
    share = rates.fused_dispatch if fused else rates.all_to_all
    far = (min(s.topk, nodes) if fused else s.topk) * (1 - 1 / nodes)
    near = s.topk / nodes * (1 - nodes / ways) if ways > 1 else 0.0
    seconds = volume * (far / card.network + near / card.link) / share
    return seconds * (1 - rates.hidden if job.overlap else 1.0)


def _gradients(job: Job) -> float:
    """Seconds of the data-parallel sums that stay visible: three tenths of the dense ones."""
    if job.data * job.layout.context == 1:
        return 0.0
    dense, _ = parameters(job)
    return 0.3 * 6 * dense / (0.7 * job.card.network)


# -- sampling --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """`sequences` answers of `tokens` each, sampled by engines of `tensor` GPUs on all the GPUs.

    prompt: tokens before them. Each engine decodes its share at once.
    """

    shape: Qwen3Shape
    gpus: int
    tensor: int
    sequences: int
    prompt: int
    tokens: int
    card: Card = CARDS["h100"]

    @property
    def at_once(self) -> int:
        """Sequences of an engine."""
        return math.ceil(self.sequences * self.tensor / self.gpus)

    def cache(self) -> float:
        """Bytes a GPU of the cache of keys and values at its fullest."""
        cached = self.at_once * (self.prompt + self.tokens) * kv_bytes(self.shape)
        return cached / self.tensor

    def seconds(self) -> float:
        """Of decoding, which memory bounds; prefill at the speed of a training step's forward."""
        s, a = self.shape, self.card
        touched = 2.0 * s.num_parameters(embeddings=False)
        if s.experts:  # with this many tokens a step, which of the experts are read
            unread = (1 - s.topk / s.experts) ** self.at_once
            idle = s.layers * s.experts * 3 * s.hidden * s.moe_ffn * unread
            touched -= 2 * idle
        cached = self.at_once * (self.prompt + self.tokens / 2) * kv_bytes(s)
        read = (touched + 2 * s.vocab * s.hidden + cached) / self.tensor
        products = s.forward_flops(self.at_once, self.prompt + self.tokens / 2) / self.tensor
        each = max(read / (a.traffic * 0.8), products / (a.flops * RATES.projection))
        prefill = s.forward_flops(self.at_once * self.prompt, self.prompt / 2) / self.tensor
        return self.tokens * each + prefill / (a.flops * RATES.projection)


def kv_bytes(shape: Qwen3Shape) -> int:
    """Of a token's keys and values in bf16, all layers."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


# -- a recipe's stages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One stage: bytes of the fullest GPU, and seconds of one step, each by component."""

    stage: str
    job: Job
    memory: dict[str, float]
    seconds: dict[str, float]


PROMPT = 256  # tokens of a question: a recipe does not know


def stages(recipe: Recipe, card: Card) -> list[Planned]:
    """Every stage at the longest sequences that its settings allow.

    A supervised sample counts as a whole micro-batch, an answer as long as `max_tokens`.
    """
    return [_planned(recipe, name, card) for name in recipe.stages]


def _planned(recipe: Recipe, name: str, card: Card) -> Planned:
    config: Any = recipe.stages[name]
    vocab = recipe.tokenizer.vocab_size or Qwen3Shape.vocab
    spec = recipe.model if config.trains == "model" else recipe.student
    assert spec is not None  # a recipe whose stage trains a student has one
    longest = getattr(config, "sequence", None) or getattr(config, "max_tokens", 0) + PROMPT
    if isinstance(config, SFT):
        longest, batch = config.micro_batch_tokens, config.batch_samples
    elif isinstance(config, Pretrain):
        batch = max(1, config.tokens_per_step // longest)
    elif isinstance(config, RLSettings):
        batch = math.ceil(config.prompts * config.rollouts / config.updates)
    else:
        batch = config.prompts
    job = Job(
        spec.shape(vocab), config.layout, card, longest, batch,
        max(1, config.micro_batch_tokens // longest), recompute=config.layout.recompute,
    )  # fmt: skip
    needs, takes = memory(job), {"train": step(job).seconds}
    sampled = Rollouts(
        job.shape, config.layout.processes, config.layout.tensor,
        batch, PROMPT, getattr(config, "max_tokens", 0), card,
    )  # fmt: skip
    if isinstance(config, RLSettings):
        takes["train"] *= config.updates
        sampled = replace(sampled, sequences=config.prompts * config.rollouts)
    if isinstance(config, RLSettings | DistillOnPolicy):  # sampled by the training processes
        takes["sample"] = sampled.seconds()
        needs["kv_cache"] = sampled.cache()
    if isinstance(config, DistillOnPolicy):
        teacher = replace(job, shape=recipe.model.shape(vocab))
        takes["teacher"] = step(teacher).seconds / 3
        needs["teacher"] = memory(teacher)["weights"]
    return Planned(name, job, needs, takes)


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
                        own = layout.model_copy(update={"virtual_pipeline": virtual})
                        found = replace(job, layout=own)
                        try:
                            check_layout(own, s)
                        except UserError:
                            continue
                        if found.data * found.micro_batch <= found.batch:
                            yield found


def _virtual(layers: int, pipeline: int) -> list[int]:
    """Up to four ways of cutting a stage's layers; the ends count as two if need be."""
    whole = layers if layers % pipeline == 0 else layers + 2
    if pipeline == 1 or whole % pipeline:
        return [1]
    per_stage = whole // pipeline
    return [v for v in range(1, per_stage + 1) if per_stage % v == 0][:4]


def best(job: Job, gpus: int, count: int = 5) -> list[Job]:
    """The fastest layouts that fit, each with the least recomputation that makes it fit."""
    choices: tuple[Recompute, ...] = ("none", "norms", "experts", "full")
    fitting = []
    for found in layouts(job, gpus):
        for recompute in choices:
            if recompute == "experts" and not job.shape.experts:
                continue
            tried = replace(found, recompute=recompute)
            if sum(memory(tried).values()) <= job.card.memory:
                fitting.append(tried)
                break
    return sorted(fitting, key=lambda j: step(j).seconds)[:count]


# -- tables ----------------------------------------------------------------------------------------


def table_of_stages(recipe: Recipe, card: str) -> tuple[str, bool]:
    """(Markdown, whether every stage fits): a recipe's stages on their layouts."""
    rows, fits = [], True
    for planned in stages(recipe, _card(card)):
        needed = sum(planned.memory.values())
        fits &= needed <= planned.job.card.memory
        split = ", ".join(f"{n} {b / GIB:.3g}" for n, b in planned.memory.items())
        times = ", ".join(f"{n} {t:.3g}" for n, t in planned.seconds.items())
        verdict = "fits" if needed <= planned.job.card.memory else "TOO MUCH"
        cells = f"{needed / GIB:.1f} {verdict} | {split} | {times}"
        rows.append(f"| {planned.stage} | {_layout(planned.job)} | {cells} |")
    head = "| stage | layout | GiB a GPU | of which | seconds a step |\n|---|---|---|---|---|"
    return "\n".join([head, *rows]), fits


def table_of_layouts(
    model: str, gpus: int | None, card: str, sequence: int, batch: int
) -> tuple[str, bool]:
    """(Markdown, whether any fits): the fastest layouts of a model that fit."""
    if model not in QWEN3:
        raise UserError(f"--model {model}: choose one of {', '.join(QWEN3)}")
    if gpus is None or gpus < 1:
        raise UserError(f"--gpus {gpus}: say how many GPUs, 1 or more")
    job = Job(QWEN3[model], Layout(processes=gpus), _card(card), sequence, batch)
    found = best(job, gpus)
    if not found:
        return f"{model} fits no layout of {gpus} {card}: take more GPUs", False
    rows = []
    for each in found:
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
