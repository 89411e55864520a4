"""The operators' CPU backend beside plain PyTorch: time and extra memory of forward and backward.

    python benchmarks/operators.py [--threads 2] [--rounds 5] [--only grpo]

Every case runs its implementations in turn, `rounds` times, in one process; the table gives medians
and their ratio to ours. Extra memory is the peak of resident memory above the inputs', from one run
in a fresh process. What compiles (torch.compile, Liger's chunked losses) is warmed up before it
is timed.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss
from torch import Tensor

from q3mega import ops
from q3mega.ops import rotary

VOCABULARY = 151_936
Run = Callable[[], Tensor]  # builds the loss; the harness calls backward


def _leaf(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.mul_(scale).requires_grad_()


def _beside(
    ours: Run,
    eager: Callable[..., Tensor],
    chunked: Callable[..., Tensor] | None,
    *operands: Tensor,
) -> dict[str, Run]:
    compiled = torch.compile(eager, dynamic=False)
    runs = {
        "ours": ours,
        "eager": lambda: eager(*operands),
        "compile": lambda: compiled(*operands),
    }
    return runs | ({"Liger": lambda: chunked(*operands)} if chunked else {})


# -- cases: name -> implementations by name --------------------------------------------------------


def grpo(n: int, h: int, masked: float = 0.0, idle: float = 0.0) -> dict[str, Run]:
    """n tokens in 16 sequences; masked: of the tokens, idle: of the sequences without advantage."""
    hidden, weight = _leaf(n, h, seed=0), _leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    g = torch.Generator().manual_seed(2)
    targets = torch.randint(VOCABULARY, (n,), generator=g)
    sequences = torch.randn(16, generator=g) * (torch.arange(16) >= 16 * idle)
    advantages = sequences.repeat_interleave(n // 16)
    mask = (torch.rand(n, generator=g) >= masked).float()
    weights, old = mask / mask.sum(), torch.full((n,), -12.0)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).log_softmax(-1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        ratio = (chosen - old).clamp(-20, 20).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (loss * weights).sum()

    def ours() -> Tensor:
        return ops.grpo_loss(
            hidden, weight, targets, advantages=advantages, old_logprobs=old,
            loss_weights=weights, backend="cpu",
        ).loss  # fmt: skip

    liger = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="bnpo", use_ref_model=False)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        by_sequence = (x.view(16, -1) for x in (targets, mask))
        return liger(
            hidden.view(16, -1, h), weight, *by_sequence, sequences,
            old_per_token_logps=old.view(16, -1),
        )[0]  # fmt: skip

    return _beside(ours, eager, chunked, hidden, weight)


def distill(kind: str, n: int = 512, h: int = 256) -> dict[str, Run]:
    hidden, weight = _leaf(n, h, seed=0), _leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    teacher, head = _leaf(n, h, seed=2).detach(), _leaf(VOCABULARY, h, seed=3, scale=h**-0.5)
    head = head.detach()

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        q = (hidden @ weight.T).log_softmax(-1)
        p = (teacher @ head.T).log_softmax(-1)
        if kind == "forward_kl":
            return F.kl_div(q, p, reduction="sum", log_target=True)
        if kind == "reverse_kl":
            return F.kl_div(p, q, reduction="sum", log_target=True)
        half = torch.tensor(0.5).log()
        m = torch.logaddexp(q + half, p + half)
        first = F.kl_div(m, p, reduction="sum", log_target=True)
        return 0.5 * (first + F.kl_div(m, q, reduction="sum", log_target=True))

    def ours() -> Tensor:
        return ops.distill_loss(
            hidden, weight, teacher_hidden=teacher, teacher_weight=head, divergence=kind,
            backend="cpu",
        ).loss  # fmt: skip

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.zeros(n, dtype=torch.long)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return liger(hidden, weight, teacher, head, labels)

    return _beside(ours, eager, chunked, hidden, weight)


def topk(n: int = 512, h: int = 256, k: int = 64) -> dict[str, Run]:
    hidden, weight = _leaf(n, h, seed=0), _leaf(VOCABULARY, h, seed=1, scale=h**-0.5)
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY // k, (n, k), generator=g) + torch.arange(k) * (VOCABULARY // k)
    logprobs = torch.randn(n, k, generator=g).log_softmax(-1) - 0.1

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        q = (hidden @ weight.T).log_softmax(-1).gather(1, ids).log_softmax(-1)
        return F.kl_div(q, logprobs.log_softmax(-1), reduction="sum", log_target=True)

    def ours() -> Tensor:
        return ops.distill_loss(
            hidden, weight, teacher_topk=(ids, logprobs), divergence="forward_kl", tail=False,
            backend="cpu",
        ).loss  # fmt: skip

    return _beside(ours, eager, None, hidden, weight)


def attention(s: int = 4096, heads: int = 2, dim: int = 128) -> dict[str, Run]:
    q, k, v = (_leaf(s, heads, dim, seed=i) for i in range(3))
    chunk_size, local = 640, 128
    chunk = chunk_size - local
    freq, index = rotary.inv_freq(dim, 1e6), torch.arange(s)
    pull = _leaf(s, heads, dim, seed=3).detach()

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = index % chunk
        key = rotary.rotate(k, place, freq)
        back = index[:, None] // chunk - index // chunk
        scores = 0.0
        for distance, position in (
            (0, place), (1, (place + chunk).clamp(max=chunk_size)),
            (2, torch.full_like(place, chunk_size)),
        ):  # fmt: skip
            mask = back == distance if distance < 2 else back >= 2
            part = torch.einsum("qhd,khd->hqk", rotary.rotate(q, position, freq), key)
            scores = scores + part.masked_fill(~mask, 0.0)
        scores = scores.masked_fill(index[:, None] < index, -torch.inf) * dim**-0.5
        return (torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) * pull).sum()

    def sdpa() -> Tensor:
        turned = (rotary.rotate(x, index, freq) for x in (q, k))
        heads_first = (x.transpose(0, 1)[None] for x in (*turned, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
        return (out[0].transpose(0, 1) * pull).sum()

    def by(backend: str) -> Run:
        return lambda: (
            ops.dual_chunk_attention(
                q, k, v, chunk_size=chunk_size, local_size=local, backend=backend
            )
            * pull
        ).sum()

    return {
        "ours": by("cpu"),
        "eager": lambda: eager(q, k, v),
        "SDPA causal": sdpa,
        "chunk loop": by("reference"),
    }


CASES: dict[str, Callable[[], dict[str, Run]]] = {
    "grpo N=1024 H=256": lambda: grpo(1024, 256),
    "grpo N=512 H=1024": lambda: grpo(512, 1024),
    "grpo N=512 H=1024, half masked, 30 % idle": lambda: grpo(512, 1024, 0.5, 0.3),
    "distill forward KL N=512 H=256": lambda: distill("forward_kl"),
    "distill reverse KL N=512 H=256": lambda: distill("reverse_kl"),
    "distill JSD N=512 H=256": lambda: distill("jsd"),
    "distill top-64 N=512 H=256": topk,
    "attention S=4096 D=128 c=512": attention,
}


def _run(build: Run) -> tuple[float, float]:
    """(forward seconds, backward seconds)."""
    start = time.perf_counter()
    loss = build()
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle


def _peak(
    case: str, name: str, threads: int, pipe: "multiprocessing.connection.Connection"
) -> None:
    torch.set_num_threads(threads)
    build = CASES[case]()[name]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    before = status("VmRSS")
    _run(build)
    pipe.send((status("VmHWM") - before) / 2**20)


def memory(case: str, name: str, threads: int) -> float:
    """GiB of one forward and backward above the inputs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(case, name, threads, send))
    process.start()
    process.join()
    return receive.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {}
    print("| case | implementation | forward s | backward s | both / ours | extra GiB |")
    print("|---|---|---|---|---|---|")
    for case, build in CASES.items():
        if args.only not in case:
            continue
        runs, times = build(), {}
        for name in runs:
            if name in ("compile", "Liger"):
                _run(runs[name])
        for _ in range(args.rounds):
            for name, run in runs.items():
                times.setdefault(name, []).append(_run(run))
        del runs
        ours = statistics.median(sum(t) for t in times["ours"])
        for name, taken in times.items():
            forward, backward = (statistics.median(x) for x in zip(*taken, strict=True))
            both, gib = statistics.median(map(sum, taken)), memory(case, name, args.threads)
            record[f"{case}/{name}"] = {"forward": forward, "backward": backward, "GiB": gib}
            row = f"{forward:.2f} | {backward:.2f} | {both / ours:.2f} | {gib:.2f} |"
            print(f"| {case} | {name} | {row}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
