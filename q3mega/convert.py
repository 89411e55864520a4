"""Hugging Face folders to megatron-core's distributed checkpoints, and back.

Under torchrun every rank converts its part: `torchrun --nproc-per-node 8 -m q3mega.cli convert
hf-to-mcore SRC DST tensor=8`. A megatron-core folder keeps config.json and the tokenizer, so that
it can be turned back. Neither direction changes a bit of any weight.
"""

import shutil
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from q3mega.data.batch import Sample, collate
from q3mega.engine import Engine, checkpoint
from q3mega.errors import UserError
from q3mega.layout import Layout, check_layout
from q3mega.model.huggingface import audit, dtype_of, shape_of

KEPT = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "*.jinja")
NEAR = 1e-4  # apart, of fp32 logits; bf16 ones differ by their rounding and are only shown


def hf_to_mcore(source: Path, target: Path, layout: Layout, *, check: bool = False) -> None:
    """Write `target`; check: list the tensors of `source` in TARGET/tensors.txt, read `target` back
    and compare logits with transformers on `source`."""
    engine = _engine(source, target, layout)
    found = audit(source, engine.shape) if check else {}
    _refuse(source, found)
    engine.load_hf(source)
    checkpoint.save_weights(engine, target)
    _keep(source, target)
    if check:
        _list(target, found)
        checkpoint.load_weights(engine, target)
        _compare(engine, source)


def mcore_to_hf(source: Path, target: Path, layout: Layout, *, check: bool = False) -> None:
    """Write `target`; check: list its tensors in TARGET/tensors.txt and compare logits with
    transformers on it."""
    engine = _engine(source, target, layout)
    checkpoint.load_weights(engine, source)
    engine.save_hf(target, {})
    _keep(source, target)
    if check:
        found = audit(target, engine.shape)
        _list(target, found)
        _refuse(target, found)
        _compare(engine, target)


def _refuse(folder: Path, found: dict[str, str]) -> None:
    wrong = [f"{name} is {state}" for name, state in found.items() if state != "mapped"]
    if wrong:
        more = ", ..." if len(wrong) > 8 else ""
        raise UserError(f"{folder}: {len(wrong)} tensors: {', '.join(wrong[:8])}{more}")


def _list(target: Path, found: dict[str, str]) -> None:
    if dist.get_rank() == 0:
        (target / "tensors.txt").write_text("".join(f"{s}\t{n}\n" for n, s in found.items()))
        states = Counter(found.values())
        counts = ", ".join(f"{states[s]} {s}" for s in ("mapped", "missing", "left over"))
        print(f"tensors: {counts}; listed in {target / 'tensors.txt'}")
    dist.barrier()


def _engine(source: Path, target: Path, layout: Layout) -> Engine:
    if target.exists():
        raise UserError(f"{target} exists: choose another place, nothing there is overwritten")
    shape = shape_of(source)
    check_layout(layout, shape)
    return Engine(shape, layout, seed=0, dtype=dtype_of(source))


def _keep(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        for pattern in KEPT:
            for file in source.glob(pattern):
                shutil.copyfile(file, target / file.name)
    dist.barrier()


def _compare(engine: Engine, folder: Path) -> None:
    """Print the largest difference between the engine's logits and transformers' on `folder`.

    Raises UserError where fp32 ones are more than NEAR apart.
    """
    ids = torch.randint(engine.shape.vocab, (48,), generator=torch.Generator().manual_seed(0))
    batch = collate([Sample(ids.tolist(), [0.0] * len(ids))])
    found = engine.evaluate([batch], lambda head, _: head.logits())
    if dist.get_rank():
        return
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    worst = float((found[0].cpu() - expected.float()).abs().max())
    print(f"logits of transformers and of the engine: at most {worst:.2g} apart")
    if worst > NEAR and expected.dtype == torch.float32:
        raise UserError(f"{folder}: logits are {worst:.2g} apart, more than {NEAR:g}")
