"""What the supervised stages after pre-training share: samples, epochs, one engine out."""

from collections.abc import Sequence
from pathlib import Path

from q3mega.algorithms import losses
from q3mega.config.stage import SFT
from q3mega.data.batch import Sample
from q3mega.data.sft import epochs, steps_of
from q3mega.engine import Engine, LossFn
from q3mega.stages.common.stage import Stage
from q3mega.train import supervised


def fine_tune(
    stage: Stage[SFT], source: Path, samples: Sequence[Sample], loss_fn: LossFn = losses.supervised
) -> Engine:
    """The weights of `source`, trained on `samples` by the stage's settings (config.stage.SFT)."""
    config = stage.config
    steps = steps_of(samples, config.batch_samples, config.epochs)
    engine = stage.engine(source, steps=steps)
    supervised.train(
        engine,
        epochs(samples, config.batch_samples, stage.seed("order")),
        steps=steps,
        capacity=config.micro_batch_tokens,
        folder=stage.dir / "checkpoints",
        log=stage.log(steps),
        save_every=config.save_every,
        loss_fn=loss_fn,
    )
    return engine
