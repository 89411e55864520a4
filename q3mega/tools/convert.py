"""Hugging Face folders to megatron-core's distributed checkpoints, and back.

Under torchrun every rank converts its part: `torchrun --nproc-per-node 8 -m q3mega convert
hf-to-mcore SRC DST tensor=8`. A megatron-core folder keeps config.json and the tokenizer, so that
it can be turned back. Neither direction changes a bit of any weight; tensors of several precisions
are kept in float32, which holds them all. A target appears when all of it is written and verified.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from q3mega.config.layout import Layout, check_layout
from q3mega.data.batch import Sample, collate
from q3mega.engine import Engine, checkpoint, parallel
from q3mega.errors import UserError
from q3mega.io import write_json
from q3mega.model import Qwen3Shape
from q3mega.model.config import declared_dtype, dtype_of, read, shape_of
from q3mega.model.reader import Reader, audit

KEPT = (
    "config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt",
    "chat_template*", "*.jinja",
)  # fmt: skip
NEAR = 1e-3  # apart, in standard deviations of the logits, both in fp32


def hf_to_mcore(source: Path, target: Path, layout: Layout, *, check: bool = False) -> None:
    """Write `target`, of the tensors' own precision; check: list the tensors of `source` in
    TARGET/tensors.txt, read `target` back and compare logits with transformers on `source`."""
    shape = _prepared(source, target, layout)
    reader = Reader(source, shape)
    dtype = _exact(reader)
    with _becoming(target) as unfinished:
        engine = Engine(shape, layout, seed=0, dtype=dtype, fresh=False)
        states = audit(source, shape) if check else {}
        _refuse(source, states)
        engine.load_hf(source)
        checkpoint.save_weights(engine, unfinished)
        _keep(source, unfinished)
        if dist.get_rank() == 0:
            _declare(unfinished, dtype)
        dist.barrier()
        if check:
            del engine
            _list(unfinished, states)
            _compare(unfinished, source, shape, layout)


def mcore_to_hf(source: Path, target: Path, layout: Layout, *, check: bool = False) -> None:
    """Write `target`; check: list its tensors in TARGET/tensors.txt and compare logits with
    transformers on it."""
    shape = _prepared(source, target, layout)
    with _becoming(target) as unfinished:
        engine = Engine(shape, layout, seed=0, dtype=dtype_of(source) or torch.float32, fresh=False)
        checkpoint.load_weights(engine, source)
        engine.save_hf(unfinished, {})
        _keep(source, unfinished)
        if check:
            del engine
            states = audit(unfinished, shape)
            _list(unfinished, states)
            _refuse(unfinished, states)
            _compare(source, unfinished, shape, layout)


def _prepared(source: Path, target: Path, layout: Layout) -> Qwen3Shape:
    """The shape of `source`, on processes that are cut as the layout says. Raises UserError for
    what could not be converted, and for a target that exists."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists: choose another place, nothing there is overwritten")
    shape = shape_of(source)
    check_layout(layout, shape)
    parallel.initialise(layout, seed=0)
    return shape


@contextmanager
def _becoming(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which gets its name once the block has ended well; else it is
    gone. Every rank calls."""
    made: list[str] = []
    if dist.get_rank() == 0:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            made = [tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)]
        except OSError as error:
            raise UserError(f"{target} cannot be made ({error}): choose another place") from None
    [name] = parallel.gather_over_all(made)
    unfinished = Path(name) / target.name
    try:
        yield unfinished
        dist.barrier()
        if dist.get_rank() == 0:
            try:
                os.rename(unfinished, target)
            except OSError as error:
                raise UserError(
                    f"{target} could not be made ({error}): choose another place"
                ) from None
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(name, ignore_errors=True)


def _exact(reader: Reader) -> torch.dtype:
    """The precision that keeps every bit; says so where config.json or a tensor has another."""
    dtype, kinds = reader.dtype(), reader.kinds()
    name = str(dtype).removeprefix("torch.")
    same = len(kinds) == 1 and declared_dtype(reader.folder) in (None, name)
    if dist.get_rank() == 0 and not same:
        print(f"tensors are {', '.join(kinds)}: kept as {name}")
    return dtype


def _declare(folder: Path, dtype: torch.dtype) -> None:
    """config.json with the weights' dtype; untouched where it has that already."""
    name = str(dtype).removeprefix("torch.")
    if declared_dtype(folder) != name:
        raw = {k: v for k, v in read(folder).items() if k != "torch_dtype"}
        write_json(folder / "config.json", raw | {"dtype": name})


def _refuse(folder: Path, states: dict[str, str]) -> None:
    wrong = [f"{name} is {state}" for name, state in states.items() if state != "mapped"]
    if wrong:
        more = ", ..." if len(wrong) > 8 else ""
        raise UserError(f"{folder}: {len(wrong)} tensors: {', '.join(wrong[:8])}{more}")


def _list(target: Path, states: dict[str, str]) -> None:
    if dist.get_rank() == 0:
        (target / "tensors.txt").write_text("".join(f"{s}\t{n}\n" for n, s in states.items()))
        counted = Counter(states.values())
        counts = ", ".join(f"{counted[s]} {s}" for s in ("mapped", "missing", "left over"))
        print(f"tensors: {counts}; listed in {target.name}/tensors.txt")
    dist.barrier()


def _keep(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        for pattern in KEPT:
            for file in filter(Path.is_file, source.glob(pattern)):
                shutil.copyfile(file, target / file.name)
    dist.barrier()


def _compare(mcore: Path, folder: Path, shape: Qwen3Shape, layout: Layout) -> None:
    """Print the largest difference between the engine's logits on `mcore` and transformers' on
    `folder`, both computed in fp32 whatever the weights' precision is.

    Raises UserError where they are more than NEAR apart.
    """
    engine = Engine(shape, layout, seed=0, fresh=False)
    checkpoint.load_weights(engine, mcore)
    ids = torch.randint(shape.vocab, (48,), generator=torch.Generator().manual_seed(0))
    batch = collate([Sample(ids.tolist(), [0.0] * len(ids))])
    [ours] = engine.evaluate([batch], lambda head, _: head.logits())
    apart: list[tuple[float, float]] = []
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(ids[None]).logits[0]
        worst = float((ours.cpu() - theirs).abs().max())
        apart = [(worst, worst / float(theirs.std()))]
        print(
            "logits of transformers and of the engine, both in float32: at most "
            f"{worst:.2g} apart, {apart[0][1]:.1g} of their standard deviation"
        )
    [(worst, share)] = parallel.gather_over_all(apart)
    if not share <= NEAR:
        raise UserError(
            f"{folder}: logits are {worst:.2g} apart, {share:.1g} of their standard deviation and "
            f"more than {NEAR:g}: the folder is computed otherwise here, report its config.json"
        )
