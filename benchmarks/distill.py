"""What a teacher elsewhere costs its student: memory, bytes and time of the exact KL, by hidden
states and by full logits; and the top-k store's speed.

    python benchmarks/distill.py [--tokens 2048] [--hidden 256] [--teacher-hidden 512]
        [--store-tokens 1000000] [--folder DIR]

A teacher's process sends N tokens' hidden states, or their logits, to a student's over
`q3mega.distillation.service.connection` on this machine; the student computes
KL(teacher || student) over the whole vocabulary in fp32, once by itself and once with its gradient.
Extra memory is the peak of resident memory above the student's own operands and, for hidden states,
the teacher's lm_head, which is shown apart: it stays with the student from the first step on. The
store is written and read by documents of 4096 tokens, and the same bytes written by themselves;
speeds are of the bytes on disk,
which the page cache holds, by the clock and by the processor's time.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from q3mega import ops
from q3mega.distillation.service.connection import Listener, connect
from q3mega.distillation.topk import ENTRY, STEP_BITS, STEPS_A_NAT, TeacherTopK, TopKWriter

VOCABULARY = 151_936
KEY = b"benchmark"
GIB = 2**30
DOCUMENT = 4096  # tokens
NEAR = 1e-5  # nats a token


def operand(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def head(hidden: int, seed: int) -> Tensor:
    return operand(VOCABULARY, hidden, seed).mul_(2 * hidden**-0.5)  # logits of deviation 2


def teacher(form: str, n: int, hidden: int, pipe: Connection) -> None:
    states, weight = operand(n, hidden, 2), head(hidden, 3)
    with Listener(0, KEY, network=False) as listener:
        pipe.send(listener.address)
        wire = listener.accept(600.0, 600.0)
    if form == "hidden":
        wire.send_tensor(weight)
    wire.receive_tensor((1,), torch.int32)  # the student is ready
    wire.send_tensor(states if form == "hidden" else states @ weight.T)
    wire.receive_tensor((1,), torch.int32)


def student(form: str, n: int, sizes: tuple[int, int], train: bool, at: str, pipe: Any) -> None:
    own, weight = operand(n, sizes[0], 0).requires_grad_(train), head(sizes[0], 1)
    wire = connect(at, KEY, 600.0)
    theirs = torch.empty(0)
    before = resident("VmRSS")
    if form == "hidden":
        theirs = wire.receive_tensor((VOCABULARY, sizes[1]), torch.float32)
    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    wire.send_tensor(torch.zeros(1, dtype=torch.int32))
    shape = (n, sizes[1] if form == "hidden" else VOCABULARY)
    started = time.perf_counter()
    sent = wire.receive_tensor(shape, torch.float32)
    received = time.perf_counter() - started
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        if form == "hidden":
            how = {"teacher_hidden": sent, "teacher_weight": theirs, "divergence": "forward_kl"}
            loss = ops.distill_loss(own, weight, **how).loss
        else:
            ours = (own @ weight.T).log_softmax(-1)
            loss = F.kl_div(ours, sent.log_softmax(-1), reduction="sum", log_target=True)
    if train:
        loss.backward()
    found = {
        "kl": float(loss.detach()) / n, "extra": resident("VmHWM") - held, "held": held - before,
        "bytes": sent.nbytes, "received": received, "computed": time.perf_counter() - started,
    }  # fmt: skip
    if train:
        found["gradient"] = own.grad
    wire.send_tensor(torch.zeros(1, dtype=torch.int32))
    pipe.send(found)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def run(form: str, n: int, sizes: tuple[int, int], train: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    address, tell_address = context.Pipe(duplex=False)
    result, tell_result = context.Pipe(duplex=False)
    teaching = context.Process(target=teacher, args=(form, n, sizes[1], tell_address))
    teaching.start()
    arguments = (form, n, sizes, train, address.recv(), tell_result)
    learning = context.Process(target=student, args=arguments)
    learning.start()
    while not result.poll(1.0):
        assert learning.is_alive() or result.poll(), "the student's process died"
    found = result.recv()
    learning.join()
    teaching.join()
    return found


def exact(n: int, sizes: tuple[int, int]) -> None:
    print("| KL | form | nats a token | GiB extra | GiB held | MB sent | MB/s | s to compute |")
    print("|---" * 8 + "|")
    for train in (False, True):
        runs = {form: run(form, n, sizes, train) for form in ("hidden", "logits")}
        for form, r in runs.items():
            print(
                f"| {'with gradient' if train else 'alone'} | {form} | {r['kl']:.7f} | "
                f"{r['extra'] / GIB:.3f} | {r['held'] / GIB:.3f} | {r['bytes'] / 1e6:.1f} | "
                f"{r['bytes'] / r['received'] / 1e6:,.0f} | {r['computed']:.2f} |"
            )
        by_hidden, by_logits = runs.values()
        apart = abs(by_hidden["kl"] - by_logits["kl"])
        ratio = by_hidden["extra"] / by_logits["extra"]
        whole = (by_hidden["extra"] + by_hidden["held"]) / by_logits["extra"]
        told = f"apart {apart:.1e}; extra memory {ratio:.3f}, with the lm_head {whole:.3f}"
        if train:
            gap = by_hidden["gradient"] - by_logits["gradient"]
            told += f"; gradients {float(gap.norm() / by_logits['gradient'].norm()):.1e} apart"
        print(told, flush=True)
        assert apart <= NEAR


def store(tokens: int, k: int, folder: Path) -> None:
    ids = torch.rand(DOCUMENT, VOCABULARY // 8).topk(k).indices * 8  # distinct in a row
    logprobs = -torch.rand(DOCUMENT, k).mul_(20).sort(1).values
    spent: dict[str, tuple[float, float]] = {}
    lengths = [min(DOCUMENT, tokens - at) for at in range(0, tokens, DOCUMENT)]
    started = time.perf_counter(), time.process_time()
    with TopKWriter(folder, k=k, vocab_size=VOCABULARY) as writer:
        for length in lengths:
            writer.add(ids[:length], logprobs[:length])
    spent["written"] = time.perf_counter() - started[0], time.process_time() - started[1]
    steps = np.round(logprobs.double().numpy() * -STEPS_A_NAT).astype(np.uint64)
    packed = (ids.numpy().astype(np.uint64) << np.uint64(STEP_BITS) | steps).astype(ENTRY)
    whole = np.fromfile(folder / "topk.bin", ENTRY).reshape(tokens, k)
    for i, n in enumerate(lengths):
        assert np.array_equal(whole[i * DOCUMENT : i * DOCUMENT + n], packed[:n])
    started = time.perf_counter(), time.process_time()
    with (folder / "plain").open("wb") as file:
        for length in lengths:
            file.write(packed[:length].data)
    spent["its bytes alone"] = time.perf_counter() - started[0], time.process_time() - started[1]
    kept = torch.from_numpy(steps.astype(np.float32)) / -STEPS_A_NAT
    started = time.perf_counter(), time.process_time()
    found = TeacherTopK(folder)
    rows = [found[i] for i in range(len(found))]
    spent["read"] = time.perf_counter() - started[0], time.process_time() - started[1]
    for n, (back, values) in zip(lengths, rows, strict=True):
        assert torch.equal(back, ids[:n]) and torch.equal(values, kept[:n])
    size = tokens * k * ENTRY.itemsize / 1e6
    speeds = ", ".join(
        f"{name} {size / clock:,.0f} MB/s by the clock, {size / busy:,.0f} by the processor"
        for name, (clock, busy) in spent.items()
    )
    print(f"top-{k} of {tokens:,} tokens, {size:,.0f} MB: {speeds}; byte for byte what was given")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--store-tokens", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="for the store; default: a temporary one")
    a = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        store(a.store_tokens, 64, folder)
    finally:
        shutil.rmtree(folder)
    exact(a.tokens, (a.hidden, a.teacher_hidden))


if __name__ == "__main__":
    main()
