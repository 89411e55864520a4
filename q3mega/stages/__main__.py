"""One process of a stage: `python -m q3mega.stages RUN_DIR STAGE`, under torchrun's environment."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from q3mega.errors import UserError

FILES = {
    "pretrain_general": "pretrain",
    "pretrain_reasoning": "pretrain",
    "pretrain_long": "pretrain",
    "cold_start": "cold_start",
    "reasoning_rl": "reasoning_rl",
    "mode_fusion": "mode_fusion",
    "general_rl": "general_rl",
    "distill_off_policy": "distill",
    "distill_on_policy": "distill",
}


def main() -> int:
    run_dir, name = sys.argv[1:]
    warnings.filterwarnings("ignore", module="megatron|torch.distributed")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        from q3mega.stages.stage import Stage

        module = import_module(f"q3mega.stages.{FILES[name]}")
        run: Callable[[Stage], None] = getattr(module, name, None) or module.run
        run(Stage(Path(run_dir), name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
