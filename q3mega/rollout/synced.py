"""Servers that sample from the weights which are being trained, handed over through a folder."""

import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from q3mega.engine import Engine, parallel
from q3mega.rollout.base import Completion, SamplingParams
from q3mega.rollout.servers import ServerSampler

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a server may hold norms in
_log = logging.getLogger(__name__)


class SyncedSampler:
    """A `Sampler` whose servers have the engine's weights before every call.

    folder: of this sampler alone, on a file system that all ranks and servers see under one path.
    All ranks construct it and call it, in the same order. The data-parallel ranks ask for their
    own prompts; the ranks that share a model get the first one's completions.
    """

    def __init__(self, engine: Engine, servers: ServerSampler, folder: Path) -> None:
        self.engine, self.servers, self.folder = engine, servers, folder
        # No other process, an earlier one of this run included, ever gave a version this name.
        self.name, *_ = parallel.gather_over_all([uuid.uuid4().hex[:8]])
        self.written: Path | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        self._sync()
        return parallel.from_first(lambda: self.servers.generate(prompts, params))

    def _sync(self) -> None:
        """Also when the weights are the same: a server may have come back without them."""
        path = self.folder / f"weights-{self.name}-{self.engine.changes}"
        if path != self.written:
            # vLLM on a CPU loads no lm_head again that is tied, so it is served untied there
            self.engine.save_hf(path, {}, lm_head=True)
            self.written = path
        if dist.get_rank() == 0:
            started = time.monotonic()
            self.servers.load(path, path.name, norms(path))
            for old in self.folder.glob("weights-*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
            _log.info("%s is on the servers, %.2f s", path.name, time.monotonic() - started)
        dist.barrier()
        self.servers.version = path.name


def norms(folder: Path) -> dict[str, set[str]]:
    """The norms' weights, which every layout of a server holds whole and under these names:
    SHA-256 of their bytes in each dtype."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith("norm.weight"):
                    tensor = tensors.get_tensor(name)
                    found[name] = {_sha256(tensor.to(dtype)) for dtype in _DTYPES}
    return found


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
