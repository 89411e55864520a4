"""The operators beside what else computes the same: time and extra memory of forward and backward.

    python benchmarks/operators.py [--device cuda] [--only grpo] [--rounds 5] [--threads 2]

On a CPU in fp32, on a GPU in bf16 and at larger sizes. Every case runs its implementations in
turn, `rounds` times, in one process; the first table gives medians and useful TFLOP/s: those of the
fewest products that the result needs. Extra memory is the peak above the inputs: on a CPU of
resident memory, from one run in a fresh process; on a GPU of what PyTorch allocates. The second
table divides the others' figures by those of the first of ours. "products" are the fewest matrix
products that the result needs, into memory that is there already, and nothing else: nobody who
calls this library's products is faster. Everything runs once before it is timed, for what compiles.
Liger-Kernel and TRL are left out where they are not installed.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from q3mega import ops
from q3mega.ops import dispatch, rotary

VOCABULARY = 151_936
OTHERS = ("eager", "compile", "Liger", "TRL", "products", "chunk loop", "SDPA causal")
TRL_COLUMNS = 32_768  # of a tile of TRL's, its trainers' choice for divergences
Run = Callable[[], Tensor]  # builds the loss; the harness calls backward


class Case(NamedTuple):
    runs: dict[str, Run]
    leaves: tuple[Tensor, ...]  # that gradients go to
    teraflops: float  # useful ones, forward and backward
    apart: bool = False  # forward and backward are compared each by itself


class Target(NamedTuple):
    """Where and in which dtype a case runs."""

    device: str
    dtype: torch.dtype

    def leaf(self, *shape: int, seed: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
        return x.to(self.device, self.dtype).requires_grad_(grad)

    def row(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def ours(self, op: str, run: Callable[..., Tensor]) -> Iterator[tuple[str, Run]]:
        """run(backend) of every fast backend that serves `op` here."""
        for name, state in dispatch.backends(op).items():
            if name != "reference" and state in ("ok", "default"):
                yield name, partial(run, name)


def _compiled(eager: Callable[..., Tensor], *operands: Tensor) -> dict[str, Run]:
    compiled = torch.compile(eager, dynamic=False)
    return {"eager": lambda: eager(*operands), "compile": lambda: compiled(*operands)}


def _products(rows: int, gradient_rows: int, heads: int, hidden: Tensor, weight: Tensor) -> Run:
    """Logits of `rows` rows by so many heads, and both gradients of `gradient_rows`."""
    x, w = hidden.detach()[:rows], weight.detach()
    z, d_hidden, d_weight = x.new_empty(rows, len(w)), torch.zeros_like(x), torch.zeros_like(w)

    def run() -> Tensor:
        for _ in range(heads):
            torch.mm(x, w.T, out=z)
        few = slice(gradient_rows)
        torch.mm(z[few], w, out=d_hidden[few])
        torch.mm(z[few].T, x[few], out=d_weight)
        return hidden[0, 0] * 0.0  # for the harness, which wants something to go back from

    return run


def _others(liger: Callable[[], Run], trl: Callable[[], Run]) -> dict[str, Run]:
    """Those that are installed; each is made by a function, which may import."""
    known = {"Liger": ("liger_kernel", liger), "TRL": ("trl", trl)}
    return {name: make() for name, (package, make) in known.items() if find_spec(package)}


# -- cases -----------------------------------------------------------------------------------------


def grpo(
    target: Target, n: int, h: int, masked: float = 0.0, idle: float = 0.0, entropy: float = 0.0
) -> Case:
    """n tokens in 16 sequences; masked: of the tokens, idle: of the sequences without advantage.

    entropy: the coefficient of its bonus, which Liger and TRL do without: they have no gradient of
    it here.
    """
    hidden, weight = target.leaf(n, h, seed=0), target.leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    g = torch.Generator().manual_seed(2)
    targets = target.row(torch.randint(VOCABULARY, (n,), generator=g))
    sequences = target.row(torch.randn(16, generator=g) * (torch.arange(16) >= 16 * idle))
    advantages = sequences.repeat_interleave(n // 16)
    mask = target.row((torch.rand(n, generator=g) >= masked).float())
    weights, old = mask / mask.sum(), target.row(torch.full((n,), -12.0))

    def loss(chosen: Tensor) -> Tensor:
        ratio = (chosen - old).clamp(-20, 20).exp()
        per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (per_token * weights).sum()

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).float().log_softmax(-1)
        policy = loss(logp.gather(1, targets[:, None])[:, 0])
        if not entropy:
            return policy
        return policy + entropy * ((logp.exp() * logp).sum(-1) * weights).sum()

    def ours(backend: str) -> Tensor:
        return ops.grpo_loss(
            hidden, weight, targets, advantages=advantages, old_logprobs=old,
            loss_weights=weights, entropy_coef=entropy, backend=backend,
        ).loss  # fmt: skip

    def liger() -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        chunked = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="bnpo", use_ref_model=False)
        by_sequence = [x.view(16, -1) for x in (targets, mask)]
        return lambda: chunked(
            hidden.view(16, -1, h), weight, *by_sequence, sequences,
            old_per_token_logps=old.view(16, -1),
        )[0]  # fmt: skip

    def trl() -> Run:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        options = None, targets, 1.0, TRL_COLUMNS, None, 1.0, ()
        return lambda: loss(ChunkedLogProbFunction.apply(hidden, weight, *options)[0])

    our_runs = dict(target.ours("grpo_loss", ours))
    runs = our_runs | _compiled(eager, hidden, weight) | _others(liger, trl)
    counted, with_gradient = int(mask.sum()), int(((mask > 0) & (advantages != 0)).sum())
    runs["products"] = _products(counted, with_gradient, 1, hidden, weight)
    units = counted + 2 * with_gradient
    return Case(runs, (hidden, weight), units * 2 * VOCABULARY * h / 1e12)


def distill(target: Target, n: int, h: int, kind: str) -> Case:
    hidden, weight = target.leaf(n, h, seed=0), target.leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    teacher = target.leaf(n, h, seed=2, grad=False)
    head = target.leaf(VOCABULARY, h, seed=3, scale=h**-0.5, grad=False)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        q = (hidden @ weight.T).float().log_softmax(-1)
        p = (teacher @ head.T).float().log_softmax(-1)
        if kind == "forward_kl":
            return F.kl_div(q, p, reduction="sum", log_target=True)
        if kind == "reverse_kl":
            return F.kl_div(p, q, reduction="sum", log_target=True)
        half = torch.tensor(0.5).log()
        m = torch.logaddexp(q + half, p + half)
        first = F.kl_div(m, p, reduction="sum", log_target=True)
        return 0.5 * (first + F.kl_div(m, q, reduction="sum", log_target=True))

    def ours(backend: str) -> Tensor:
        return ops.distill_loss(
            hidden, weight, teacher_hidden=teacher, teacher_weight=head, divergence=kind,
            backend=backend,
        ).loss  # fmt: skip

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]

    def liger() -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
        labels = torch.zeros(n, dtype=torch.long, device=target.device)
        return lambda: chunked(hidden, weight, teacher, head, labels) * n  # theirs is a mean

    def trl() -> Run:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        options = None, teacher, head, None, beta
        return lambda: ChunkedDivergenceFunction.apply(hidden, weight, *options)[0].sum()

    our_runs = dict(target.ours("distill_loss", ours))
    runs = our_runs | _compiled(eager, hidden, weight) | _others(liger, trl)
    runs["products"] = _products(n, n, 2, hidden, weight)
    return Case(runs, (hidden, weight), 4 * 2 * n * VOCABULARY * h / 1e12)


def topk(target: Target, n: int, h: int, k: int = 64) -> Case:
    hidden, weight = target.leaf(n, h, seed=0), target.leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    g = torch.Generator().manual_seed(2)
    every = VOCABULARY // k
    ids = target.row(torch.randint(every, (n, k), generator=g) + torch.arange(k) * every)
    logprobs = target.row(torch.randn(n, k, generator=g).log_softmax(-1) - 0.1)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        q = (hidden @ weight.T).float().log_softmax(-1).gather(1, ids).log_softmax(-1)
        return F.kl_div(q, logprobs.log_softmax(-1), reduction="sum", log_target=True)

    def ours(backend: str) -> Tensor:
        return ops.distill_loss(
            hidden, weight, teacher_topk=(ids, logprobs), divergence="forward_kl", tail=False,
            backend=backend,
        ).loss  # fmt: skip

    runs = dict(target.ours("distill_loss", ours)) | _compiled(eager, hidden, weight)
    return Case(runs, (hidden, weight), 3 * 2 * n * k * h / 1e12)


def attention(
    target: Target,
    s: int,
    heads: int,
    kv_heads: int,
    chunk_size: int,
    local_size: int,
    dim: int = 128,
) -> Case:
    q = target.leaf(s, heads, dim, seed=0)
    k, v = (target.leaf(s, kv_heads, dim, seed=i) for i in (1, 2))
    pull = target.leaf(s, heads, dim, seed=3, grad=False)
    chunk = chunk_size - local_size
    freq, index = rotary.inv_freq(dim, 1e6).to(target.device), torch.arange(s, device=target.device)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three attentions' scores, of which each entry takes one."""
        position_in_chunk = index % chunk
        key = rotary.rotate(k, position_in_chunk, freq)
        back = index[:, None] // chunk - index // chunk
        scores = torch.zeros((), device=target.device)
        for distance, position in (
            (0, position_in_chunk), (1, (position_in_chunk + chunk).clamp(max=chunk_size)),
            (2, torch.full_like(position_in_chunk, chunk_size)),
        ):  # fmt: skip
            mask = back == distance if distance < 2 else back >= 2
            part = torch.einsum("qhd,khd->hqk", rotary.rotate(q, position, freq), key)
            scores = scores + part.masked_fill(~mask, 0.0)
        scores = scores.masked_fill(index[:, None] < index, -torch.inf) * dim**-0.5
        return (torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) * pull).sum()

    def sdpa() -> Tensor:
        rotated = (rotary.rotate(x, index, freq) for x in (q, k))
        heads_first = (x.transpose(0, 1)[None] for x in (*rotated, v))
        out = F.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=heads != kv_heads
        )
        return (out[0].transpose(0, 1) * pull).sum()

    def ours(backend: str) -> Tensor:
        kw = {"chunk_size": chunk_size, "local_size": local_size, "backend": backend}
        return (ops.dual_chunk_attention(q, k, v, **kw) * pull).sum()

    runs = dict(target.ours("dual_chunk_attention", ours))
    if target.device == "cpu":  # three (S, S) scores of every head, and heads of keys as of queries
        runs |= _compiled(eager, q, k, v)
    runs |= {"SDPA causal": sdpa, "chunk loop": partial(ours, "reference")}
    return Case(runs, (q, k, v), 3.5 * 2 * s * s * heads * dim / 1e12, apart=True)


CASES: dict[str, dict[str, Callable[[Target], Case]]] = {
    "cpu": {
        "grpo N=1024 H=256": partial(grpo, n=1024, h=256),
        "grpo + entropy N=1024 H=256": partial(grpo, n=1024, h=256, entropy=0.01),
        "grpo + entropy N=512 H=1024": partial(grpo, n=512, h=1024, entropy=0.01),
        "grpo + entropy N=2048 H=1024": partial(grpo, n=2048, h=1024, entropy=0.01),
        "grpo N=512 H=1024, half masked, 30 % idle": partial(
            grpo, n=512, h=1024, masked=0.5, idle=0.3
        ),
        "distill forward KL N=1024 H=256": partial(distill, n=1024, h=256, kind="forward_kl"),
        "distill reverse KL N=1024 H=256": partial(distill, n=1024, h=256, kind="reverse_kl"),
        "distill JSD N=1024 H=256": partial(distill, n=1024, h=256, kind="jsd"),
        "distill top-64 N=1024 H=256": partial(topk, n=1024, h=256),
        "attention S=4096 D=128 c=512": partial(
            attention, s=4096, heads=2, kv_heads=2, chunk_size=640, local_size=128
        ),
    },
    "cuda": {
        "grpo + entropy N=8192 H=4096": partial(grpo, n=8192, h=4096, entropy=0.01),
        "grpo N=8192 H=4096, half masked, 30 % idle": partial(
            grpo, n=8192, h=4096, masked=0.5, idle=0.3
        ),
        "distill forward KL N=8192 H=4096": partial(distill, n=8192, h=4096, kind="forward_kl"),
        "distill reverse KL N=8192 H=4096": partial(distill, n=8192, h=4096, kind="reverse_kl"),
        "distill JSD N=8192 H=4096": partial(distill, n=8192, h=4096, kind="jsd"),
        "distill top-64 N=8192 H=4096": partial(topk, n=8192, h=4096),
        "attention S=8192 32q/8kv c=7168": partial(
            attention, s=8192, heads=32, kv_heads=8, chunk_size=8192, local_size=1024
        ),
        "attention S=32768 32q/8kv c=7168": partial(
            attention, s=32_768, heads=32, kv_heads=8, chunk_size=8192, local_size=1024
        ),
    },
}


# -- measuring -------------------------------------------------------------------------------------


def _target(device: str) -> Target:
    return Target(device, torch.float32 if device == "cpu" else torch.bfloat16)


def _synchronised_time(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _run(case: Case, name: str, device: str) -> tuple[float, float]:
    """(forward seconds, backward seconds), gradients fresh."""
    for leaf in case.leaves:
        leaf.grad = None
    start = _synchronised_time(device)
    loss = case.runs[name]()
    middle = _synchronised_time(device)
    loss.backward()
    return middle - start, _synchronised_time(device) - middle


def _peak(case_name: str, name: str, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    case = CASES["cpu"][case_name](_target("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    before = status("VmRSS")
    _run(case, name, "cpu")
    pipe.send((status("VmHWM") - before) / 2**20)


def _memory_in_fresh_process(case_name: str, name: str, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(case_name, name, threads, send))
    process.start()
    process.join()
    return receive.recv()


def _memory_of_gpu(case: Case, name: str) -> float:
    for leaf in case.leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(case, name, "cuda")
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _ratios(rows: dict[str, dict[str, float]], part: str) -> list[str]:
    """Each of OTHERS' time over ours, and our extra memory over eager's."""
    ours = next(iter(rows.values()))
    cells = [f"{rows[x][part] / ours[part]:.2f}" if x in rows else "" for x in OTHERS]
    return [*cells, f"{ours['GiB'] / rows['eager']['GiB']:.3f}" if "eager" in rows else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name this pattern is found in")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device, record, ratios = args.device, {}, []
    torch.set_num_threads(args.threads)
    card = f", {torch.cuda.get_device_name()}" if device == "cuda" else f", {args.threads} threads"
    print(f"torch {torch.__version__}, {device}{card}, median of {args.rounds}\n")
    print("| case | implementation | forward s | backward s | both s | TFLOP/s | extra GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, build in CASES[device].items():
        if not re.search(args.only, name):
            continue
        case, times = build(_target(device)), {}
        for round_ in range(args.rounds + 1):
            for implementation in case.runs:
                taken = _run(case, implementation, device)
                if round_:
                    times.setdefault(implementation, []).append(taken)
        rows: dict[str, dict[str, float]] = {}
        for implementation, taken in times.items():
            forward, backward = (statistics.median(x) for x in zip(*taken, strict=True))
            both = statistics.median(map(sum, taken))
            gib = (
                _memory_of_gpu(case, implementation)
                if device == "cuda"
                else _memory_in_fresh_process(name, implementation, args.threads)
            )
            row = {"forward": forward, "backward": backward, "both": both, "GiB": gib}
            rows[implementation] = row
            cells = f"{forward:.4g} | {backward:.4g} | {both:.4g} | {case.teraflops / both:.3g}"
            print(f"| {name} | {implementation} | {cells} | {gib:.2f} |", flush=True)
        for part in ("forward", "backward") if case.apart else ("both",):
            ratios.append((f"{name}, {part}", *_ratios(rows, part)))
        record[name] = rows
    print(f"\n| time / ours | {' | '.join(OTHERS)} | our extra memory / eager's |")
    print("|---" * (len(OTHERS) + 2) + "|")
    for cells in ratios:
        print(f"| {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
