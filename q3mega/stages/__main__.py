"""One process of a stage: `python -m q3mega.stages RUN_DIR STAGE`, under torchrun's environment."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from q3mega.config.stage import StageConfig
from q3mega.errors import EXIT_STOPPED, Stopped, UserError, naming_missing_packages
from q3mega.io import exclusive_lock, explaining
from q3mega.train import stopping

_HANDOVER_SECONDS = 60.0  # in which a file system notices that a killed process holds no lock


def main() -> int:
    """Run the stage; return 0, 2 (bad input) or EXIT_STOPPED."""
    run_dir, name = Path(sys.argv[1]), sys.argv[2]
    stopping.listen()
    warnings.filterwarnings("ignore", module="megatron|torch.distributed")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with explaining(), naming_missing_packages("q3mega run"), _alone(run_dir, name):
            from q3mega.stages.common.stage import Stage

            stage: Stage[StageConfig] = Stage(run_dir, name)
            module, _, function = stage.config.program.partition(":")
            run: Callable[[Stage[StageConfig]], None] = getattr(import_module(module), function)
            run(stage)
            torch.distributed.destroy_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print("stopped: goes on when it is started again", file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)  # peers may be where nobody meets them, and threads at work
    return 0


@contextmanager
def _alone(run_dir: Path, name: str) -> Iterator[None]:
    """One group of processes a stage, whoever started them and on whichever machine."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    in_use = f"{name} of {run_dir} is at work already, in process {{holder}}: wait for its end"
    with exclusive_lock(run_dir / f".{name}.lock", in_use, _HANDOVER_SECONDS):
        yield


if __name__ == "__main__":
    sys.exit(main())
