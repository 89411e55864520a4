"""Memory, communication and time of a layout, before any GPU is asked for: arithmetic, no torch.

A `Job` is one training step of one model on one layout. `memory` counts what the fullest rank
holds, `sent` what a rank tells the others, `step` adds up what it does: products at rates of their
own for projections, attention and experts, memory traffic, launches, and the communication of each
axis. The rates were fitted to published throughput of Qwen3-8B, 30B-A3B and 235B-A22B on H100s
(benchmarks/published.py); for other cards they are the same shares of the card's peaks, and nothing
has checked them there.
"""

import math
from dataclasses import dataclass
from typing import Literal

from q3mega.config.layout import Layout, Recompute
from q3mega.model.sizes import Qwen3Shape

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """The vendor's peaks of one GPU.

    memory (bytes): its HBM.
    flops (1/s): products in bf16.
    hbm_bandwidth (bytes/s): reads and writes of its HBM.
    nvlink_bandwidth (bytes/s): to the GPUs of its node, in one direction.
    network_bandwidth (bytes/s): to GPUs of other nodes, in one direction.
    node: GPUs of a node.
    """

    memory: float
    flops: float
    hbm_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    node: int = 8


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
    if not a.count_embedding_and_head_as_layers(s.layers):
        return math.ceil(s.layers / a.pipeline)
    return (s.layers + 2) // a.pipeline - (stage == 0) - (stage == a.pipeline - 1)


def parameters(job: Job, stage: int = 0) -> tuple[float, float]:
    """(dense, experts') parameters of a rank of a pipeline stage."""
    s, a = job.shape, job.layout
    layers = _layers(job, stage)
    experts = s.experts * 3 * s.hidden * s.moe_ffn
    dense = s.num_parameters(embeddings=False) / s.layers - experts
    matrices = (stage == 0) + (stage == a.pipeline - 1)  # embedding, lm_head
    if s.tied and a.pipeline == 1:
        matrices = 1
    return (
        (layers * dense + matrices * s.vocab * s.hidden) / a.tensor,
        layers * experts / (a.expert * a.expert_tensor),
    )


def _copies(job: Job) -> tuple[int, int]:
    """How many ranks hold the same dense, the same experts' parameters."""
    a = job.layout
    return job.data * a.context, a.processes // (a.expert * a.expert_tensor * a.pipeline)


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
    """Bytes of the fullest rank by component: bf16 weights, fp32 gradients, Adam."""
    return max(by_stage(job), key=lambda parts: sum(parts.values()))


def by_stage(job: Job) -> list[dict[str, float]]:
    """Bytes of a rank of each pipeline stage, by component."""
    return [_memory(job, stage) for stage in range(job.layout.pipeline)]


def _memory(job: Job, stage: int) -> dict[str, float]:
    a, (dense, experts) = job.layout, parameters(job, stage)
    copies, expert_copies = _copies(job) if a.distributed_optimizer else (1, 1)
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
        "logits": LOGITS_BYTES if stage == a.pipeline - 1 else 0.0,
        "context": CONTEXT_BYTES,
    }


# -- communication ---------------------------------------------------------------------------------


def _sent_of_layer(job: Job) -> dict[str, float]:
    """Bytes that a rank sends for a layer and micro-batch, forward and backward; experts' apart
    for those of the same node and of others."""
    s, a, t = job.shape, job.layout, job.tokens
    gathers = 4 if s.experts else 8  # and their scatters; a quarter more for the backward's
    kept = 2 * s.kv_heads * s.head_dim * 2 / a.tensor
    bytes_by_axis = {
        "tensor": 1.25 * gathers * t * s.hidden * 2 * (a.tensor - 1) / a.tensor,
        "context": 2 * t * (a.context - 1) * kept,  # keys and values gathered, gradients summed
    }
    if not s.experts:
        return bytes_by_axis
    # there and back, forward and backward; between nodes a fused dispatcher sends a token once a
    # node, an all-to-all once an expert
    ways, volume = a.expert * a.expert_tensor, 4 * t / a.tensor * s.hidden * 2
    nodes = max(1.0, ways / job.card.node)
    far = min(s.topk, nodes) if job.dispatch == "fused" else s.topk
    near = s.topk / nodes * (1 - nodes / ways) if ways > 1 else 0.0
    return bytes_by_axis | {"experts": volume * near, "experts_far": volume * far * (1 - 1 / nodes)}


# What is recomputed is also told once more: times what the axes send without.
TOLD_AGAIN = {"experts": {"experts": 1.5, "experts_far": 1.5}}
TOLD_AGAIN["full"] = TOLD_AGAIN["experts"] | {"tensor": 1.4, "context": 1.5}


def sent(job: Job) -> dict[str, float]:
    """Bytes that a rank inside the pipeline sends in one step, by axis."""
    a, middle = job.layout, 1 if job.layout.pipeline > 1 else 0
    times = _layers(job, middle) * job.micro_batches
    again = TOLD_AGAIN.get(job.recompute, {})
    bytes_by_axis = {
        axis: size * times * again.get(axis, 1) for axis, size in _sent_of_layer(job).items()
    }
    if a.pipeline > 1:  # activations on, their gradients back; of two stages each has one of them
        each = min(a.pipeline - 1, 2) * job.tokens * job.shape.hidden * 2 / _shards(job)
        bytes_by_axis["pipeline"] = each * job.micro_batches * a.virtual_pipeline
    dense, experts = parameters(job, middle)
    copies, expert_copies = _copies(job)
    # fp32 gradients are reduced and scattered, bf16 weights gathered
    bytes_by_axis["data"] = 6 * (dense * (1 - 1 / copies) + experts * (1 - 1 / expert_copies))
    return bytes_by_axis


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
    s, a, card, bytes_sent = job.shape, job.layout, job.card, _sent_of_layer(job)
    t, q = job.tokens, s.heads * s.head_dim
    faster, casts = (rates.fp8, rates.casts) if job.precision == "fp8" else (1.0, 1.0)
    rate = card.flops * rates.projection * faster
    skew = rates.skew if s.experts and not job.forced else 1.0
    local_tokens = t / a.tensor
    traffic = local_tokens * 2 * (20 * s.hidden + 8 * (q + 2 * s.kv_heads * s.head_dim))
    parts = {
        "projections": 6 * local_tokens * s.attention_parameters() / rate,
        "attention": 6 * local_tokens * q * job.sequence / (card.flops * rates.attention),
    }
    launch = rates.launch
    if s.experts:
        routed = local_tokens * s.topk * skew
        products = 6 * routed * 3 * s.hidden * s.moe_ffn
        parts["experts"] = products / (card.flops * rates.expert * faster)
        share = rates.fused_dispatch if job.dispatch == "fused" else rates.all_to_all
        alone = (
            bytes_sent["experts_far"] / card.network_bandwidth
            + bytes_sent["experts"] / card.nvlink_bandwidth
        )
        visible = 1 - rates.hidden if job.overlap else 1.0
        parts["dispatch"] = skew * alone * visible / share
        traffic += rates.permute * routed * 2 * (8 * s.hidden + 10 * s.moe_ffn)
        launch *= rates.graphs if job.graphs else 1.0
    else:
        parts["mlp"] = 6 * local_tokens * 3 * s.hidden * s.ffn / rate
        traffic += local_tokens * 2 * 8 * s.ffn
        launch *= rates.launch_dense
    parts["traffic"] = traffic * casts / (card.hbm_bandwidth * rates.traffic)
    parts["launch"] = launch
    if a.tensor > 1:
        parts["tensor"] = bytes_sent["tensor"] / (card.nvlink_bandwidth * rates.link)
    if a.context > 1:
        near = a.tensor * a.context <= card.node
        seen = 0.75 * bytes_sent["context"]  # the rest hides behind the products
        parts["context"] = seen / (
            (card.nvlink_bandwidth if near else card.network_bandwidth) * rates.link
        )
    if job.recompute == "experts":
        parts["recompute"] = (
            parts.get("experts", 0.0) / 3 + parts.get("dispatch", 0.0) / 2 + parts["traffic"] / 4
        )
    elif job.recompute == "norms":
        parts["recompute"] = parts["traffic"] / 10
    elif job.recompute == "full":
        parts["recompute"] = sum(parts.values()) / 3
    return parts


def _gradients(job: Job) -> float:
    """Seconds of the data-parallel sums that stay visible: three tenths of the dense ones."""
    if job.data * job.layout.context == 1:
        return 0.0
    dense, _ = parameters(job)
    return 0.3 * 6 * dense / (0.7 * job.card.network_bandwidth)


# -- sampling --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """`sequences` answers of `tokens` each, sampled by engines of `tensor` GPUs on all the GPUs.

    prompt: tokens before them. An engine decodes `batch` sequences of its share at once.
    """

    shape: Qwen3Shape
    gpus: int
    tensor: int
    sequences: int
    prompt: int
    tokens: int
    expert: int = 1  # ways that the experts are split
    batch: int = 512
    card: Card = CARDS["h100"]

    @property
    def share(self) -> int:
        """Sequences of a server, or of the ranks that sample as one."""
        return math.ceil(self.sequences * self.tensor / self.gpus)

    @property
    def at_once(self) -> int:
        """Sequences that a server decodes at once."""
        return min(self.batch, self.share)

    def cache(self) -> float:
        """Bytes a GPU of the cache of keys and values at its fullest."""
        cached = self.at_once * (self.prompt + self.tokens) * kv_bytes(self.shape)
        return cached / self.tensor

    def decode(self, sequences: int) -> float:
        """Seconds in which an engine decodes a token of each of so many: memory bounds it."""
        s, a = self.shape, self.card
        experts = 2 * s.layers * s.experts * 3 * s.hidden * s.moe_ffn
        touched = 2.0 * s.num_parameters(embeddings=False) - experts
        # of a rank's experts those are read that any of these tokens goes to
        met = sequences * max(1, self.expert // self.tensor)
        unread = (1 - s.topk / s.experts) ** met if s.experts else 0.0
        cached = sequences * (self.prompt + self.tokens / 2) * kv_bytes(s)
        read = (touched + 2 * s.vocab * s.hidden + cached) / self.tensor
        read += experts * (1 - unread) / self.expert
        products = s.forward_flops(sequences, self.prompt + self.tokens / 2) / self.tensor
        return max(read / (a.hbm_bandwidth * 0.8), products / (a.flops * RATES.projection))

    def seconds(self) -> float:
        """Of decoding all answers; prefill at the speed of a training step's forward."""
        prefill = self.shape.forward_flops(self.at_once * self.prompt, self.prompt / 2)
        prefill /= self.tensor * self.card.flops * RATES.projection
        rounds = math.ceil(self.share / self.at_once)
        return rounds * (self.tokens * self.decode(self.at_once) + prefill)


def kv_bytes(shape: Qwen3Shape) -> int:
    """Of a token's keys and values in bf16, all layers."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
