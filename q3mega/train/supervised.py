"""The first loop: predict the next token under a mask. Seven of the nine stages are this loop."""

from collections.abc import Callable
from pathlib import Path

from q3mega.algorithms.losses import normalise, supervised
from q3mega.data.batch import Batch, Sample
from q3mega.engine import Engine, LossFn, parallel
from q3mega.train import stopping
from q3mega.train.log import Log, size


def train(
    engine: Engine,
    draw: Callable[[int], list[Sample]],
    *,
    steps: int,
    capacity: int,
    folder: Path,
    log: Log,
    save_every: int,
    loss_fn: LossFn = supervised,
    prepare: Callable[[list[Batch]], None] | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Steps 1..steps; `draw(step)` is the global batch of a step and depends on nothing else.

    `prepare` may add columns to this rank's micro-batches (a teacher's hidden states); `watch`
    is told each step that is done, 0 before the first.
    """
    resumed = engine.load_latest(folder)
    first = resumed[0] if resumed else 0
    log.resume(first)
    if watch and first == 0:
        watch(0)

    def save(step: int) -> None:
        engine.save(folder, step, {})

    for step in stopping.steps(first + 1, steps, save_every, save, engine.finish_saving):
        samples = draw(step)
        batches = parallel.shard_by_length(normalise(samples), capacity)
        if prepare:
            prepare(batches)
        metrics = engine.train_step(batches, loss_fn)
        log.step(step, **size(samples), **metrics)
        if watch:
            watch(step)
    engine.finish_saving()
