"""`q3mega mixtures`: which of several curations a small model learns most from, label by label.

The report chose its mixture of instances by ablations on small proxy models (section 3.1). Here a
recipe's pre-training stage runs once on each curation, and each model is then read the same
held-out documents: all that the curations keep apart, each once.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet

from q3mega.config.layout import Layout
from q3mega.config.recipe import Recipe
from q3mega.config.stages import Pretrain
from q3mega.curate.dataset import Curated
from q3mega.engine import Engine
from q3mega.evaluation import evaluate
from q3mega.launch import driver
from q3mega.model.config import shape_of

STAGE = "pretrain_general"
LABELS = ("domain", "quality", "language", "source")
MOST = 4000  # held-out documents
_Cell = tuple[str, ...]


def compare(recipe: str, folders: Sequence[str], out: Path, overrides: Sequence[str] = ()) -> str:
    """Train and read; a table of nats a token by label, a column for each of `folders`.

    OUT/1, OUT/2, ... are run folders; what is trained already is not trained again.
    """
    documents = held_out(folders)
    losses = []
    for number, folder in enumerate(folders, 1):
        mixture = f"{STAGE}.mixture={{'curated:{folder}': 1}}"
        proxy = Recipe.load(recipe, [*overrides, mixture])
        stage = proxy.stages[STAGE]
        assert isinstance(stage, Pretrain)
        run_dir = out / str(number)
        driver.run(proxy, run_dir, only=STAGE)
        losses.append(_losses(proxy.stage_dir(run_dir, STAGE) / "hf", documents, stage.sequence))
    return _table(folders, losses)


def held_out(folders: Sequence[str]) -> dict[_Cell, list[list[int]]]:
    """Tokens of the held-out documents of all folders, by their values of LABELS."""
    by_text: dict[bytes, tuple[_Cell, list[int]]] = {}
    for folder in folders:
        curated = Curated(folder)
        labels = parquet.read_table(
            curated.folder / "dataset" / "heldout.parquet", columns=list(LABELS)
        )
        for row, ids in zip(labels.to_pylist(), curated.data(heldout=True), strict=True):
            by_text.setdefault(ids.tobytes(), (tuple(row[n] for n in LABELS), ids.tolist()))
    cells: dict[_Cell, list[list[int]]] = defaultdict(list)
    for cell, ids in list(by_text.values())[:MOST]:
        cells[cell].append(ids)
    return cells


def _losses(
    hf: Path, documents: dict[_Cell, list[list[int]]], sequence: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """(nats, tokens) by label and value."""
    engine = Engine(shape_of(hf), Layout(processes=1), seed=0, fresh=False)
    engine.load_hf(hf)
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for cell, some in sorted(documents.items()):
        part = np.array(evaluate.nll(engine, some, sequence))
        for label in (("all", ""), *zip(LABELS, cell, strict=True)):
            sums[label] += part
    return {label: (float(total), float(n)) for label, (total, n) in sums.items()}


def _table(
    folders: Sequence[str], losses: Sequence[dict[tuple[str, str], tuple[float, float]]]
) -> str:
    lines = ["nats a token on held-out documents, the least of a row marked *"]
    lines += [f"{number}: {folder}" for number, folder in enumerate(folders, 1)]
    lines.append(f"{'':<28}{'tokens':>9}" + "".join(f"{i + 1:>9}" for i in range(len(folders))))
    for label, (_, n) in sorted(losses[0].items()):
        values = [losses_by_label[label][0] / n for losses_by_label in losses]
        cells = (f"{v:>8.4f}{'*' if v == min(values) else ' '}" for v in values)
        lines.append(f"{' '.join(label):<28}{n:>9.0f}" + "".join(cells))
    return "\n".join(lines)
