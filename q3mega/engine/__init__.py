"""megatron-core behind a keyhole: layout, training and evaluation steps, optimizer, checkpoints."""

from q3mega.errors import naming_missing_packages

with naming_missing_packages(__name__):
    from q3mega import device  # noqa: F401

    # isort: split
    from q3mega.engine.engine import Engine, LossFn, OptimizerSpec
    from q3mega.engine.head import LMHead

__all__ = ["Engine", "LMHead", "LossFn", "OptimizerSpec"]
