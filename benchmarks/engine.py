"""A training step of the engine beside one of transformers: same weights, tokens and optimizer.

    python benchmarks/engine.py [--rounds 9]

One process, fp32, 16 documents of 256 tokens, AdamW with clipping: megatron-core's modules, DDP,
distributed optimizer and schedule against `Qwen3ForCausalLM`, its loss and torch's AdamW. The two
take turns; figures are medians of seconds a step. First losses are compared too.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from q3mega import device  # noqa: F401

# isort: split
import torch
from transformers import AutoModelForCausalLM

from q3mega.algorithms.losses import normalise, supervised
from q3mega.config.layout import Layout
from q3mega.data.batch import Sample, pack
from q3mega.engine import Engine, OptimizerSpec
from q3mega.model import Qwen3Shape

LENGTH, DOCUMENTS = 256, 16
DENSE = Qwen3Shape(
    layers=6, hidden=256, heads=8, kv_heads=4, ffn=768, head_dim=32, vocab=4096, tied=True
)
MOE = Qwen3Shape(
    layers=6, hidden=256, heads=8, kv_heads=4, ffn=768, head_dim=32, vocab=4096, tied=True,
    experts=8, topk=2, moe_ffn=256, router_aux_loss_coef=0.0,
)  # fmt: skip


def ours(engine: Engine, ids: torch.Tensor) -> Callable[[], float]:
    weights = [0.0] + [1.0] * (LENGTH - 1)
    samples = normalise([Sample(row, weights) for row in ids.tolist()])
    batches = pack(samples, LENGTH * DOCUMENTS)
    return lambda: engine.train_step(batches, supervised)["loss"]


def theirs(folder: str, ids: torch.Tensor) -> Callable[[], float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    print("| model | engine s | transformers s | ratio | first losses |\n|---|---|---|---|---|")
    for name, shape in (("dense", DENSE), ("8 experts, top-2", MOE)):
        spec = OptimizerSpec(lr=1e-3, steps=100)
        engine = Engine(shape, Layout(processes=1), seed=0, optimizer=spec)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(shape.vocab, (DOCUMENTS, LENGTH), generator=g)
        with tempfile.TemporaryDirectory() as folder:
            engine.save_hf(folder, {})
            steps = {"ours": ours(engine, ids), "theirs": theirs(folder, ids)}
        first = {who: step() for who, step in steps.items()}
        times: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(rounds):
            for who, step in steps.items():
                start = time.perf_counter()
                step()
                times[who].append(time.perf_counter() - start)
        a, b = (statistics.median(times[who]) for who in steps)
        losses = f"{first['ours']:.5f}, {first['theirs']:.5f}"
        print(f"| {name} | {a:.3f} | {b:.3f} | {a / b:.2f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
