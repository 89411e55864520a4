"""Servers that sample from the weights which are being trained, handed over by a folder
or a broadcast."""

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open

from q3mega.engine import Engine, parallel
from q3mega.rollout.base import Completion, SamplingParams, cut_at_unknown
from q3mega.rollout.servers.client import RolloutServerFailed
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.broadcast import Broadcast, digests

INTERRUPT_INTERVAL_S = 0.05  # seconds between interrupts
_log = logging.getLogger(__name__)


class WeightSyncedSampler:
    """A `Sampler` whose servers have the engine's weights before every call.

    folder: of this sampler alone, on a file system that all ranks and servers see under one path.
    None: the weights are broadcast. All ranks construct it and call it, in the same order. The
    data-parallel ranks ask for their own prompts; the ranks that share a model get the first one's
    completions.
    """

    def __init__(self, engine: Engine, servers: ServerSampler, folder: Path | None) -> None:
        self.engine, self.servers, self.folder = engine, servers, folder
        # No other process, an earlier one of this run included, ever gave a version this name.
        self.name, *_ = parallel.gather_over_all([uuid.uuid4().hex[:8]])
        self.written = ""
        self.broadcast = Broadcast(servers) if folder is None else None

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        self.sync()
        return self.known(parallel.from_first(lambda: self.servers.generate(prompts, params)))

    def known(self, found: list[list[Completion]]) -> list[list[Completion]]:
        """Completions up to an id that the engine does not have."""
        ids = self.engine.valid_vocab
        return [[cut_at_unknown(c, ids) for c in group] for group in found]

    def sync(self) -> str:
        """Hand the weights over; their version. Also when they are the same: a server may have come
        back without them."""
        if self.folder is not None:
            self.write()
            self._load(self.folder / self.version)
        elif self.broadcast is not None:
            self._send(self.broadcast, self.version)
        dist.barrier()
        self.servers.version = self.version
        return self.version

    @property
    def version(self) -> str:
        return f"weights-{self.name}-{self.engine.changes}"

    def write(self) -> None:
        """Write the weights into the folder, if there is one and they are not there."""
        if self.folder is not None and self.version != self.written:
            # vLLM on a CPU loads no lm_head again that is tied, so it is served untied there
            self.engine.save_hf(self.folder / self.version, {}, lm_head=True)
            self.written = self.version

    def _load(self, path: Path) -> None:
        if dist.get_rank() == 0:
            started = time.monotonic()
            self.servers.load(path, path.name, norms(path))
            for old in path.parent.glob("weights-*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)
            _log.info("%s is on the servers, %.2f s", path.name, time.monotonic() - started)

    def _send(self, broadcast: Broadcast, version: str) -> None:
        """Until all servers that are left have the version; one that breaks is left out."""
        first = dist.get_rank() == 0
        if first:
            broadcast.look()
        for _ in range(1 + self.servers.retries):
            current, *_ = parallel.gather_over_all([not first or broadcast.is_current(version)])
            if current:
                return
            tensors = self.engine.tensors()
            if first:
                broadcast.send(tensors, version)
            for _ in tensors:
                pass
        if first and not broadcast.is_current(version):
            raise RolloutServerFailed(
                f"weights did not reach the servers in {1 + self.servers.retries} tries: see the "
                "warnings before this, and their logs; engine.sync=folder needs no group"
            )


class InterruptibleSampler:
    """A `Sampler` for threads of rank 0 that go on while all ranks train.

    New weights interrupt what is under way, which goes on under them from where it is.
    """

    def __init__(self, synced: WeightSyncedSampler) -> None:
        self.synced, self.servers = synced, synced.servers
        self.turn = threading.Condition()
        self.calls, self.handing_over = 0, False

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        found: list[list[Completion]] | None = None
        while found is None or any(c.finish_reason == "abort" for group in found for c in group):
            with self.turn:
                self.turn.wait_for(lambda: not self.handing_over)
                self.calls += 1
            try:
                found = self.servers.resume(prompts, found, params)
            finally:
                with self.turn:
                    self.calls -= 1
                    self.turn.notify_all()
        return self.synced.known(found)

    def sync(self) -> str:
        """See `WeightSyncedSampler.sync`: all ranks call it."""
        self.synced.write()  # which the servers need not wait for
        with self.turn:
            self.handing_over = True
            while not self.turn.wait_for(lambda: self.calls == 0, INTERRUPT_INTERVAL_S):
                self.servers.interrupt()  # again: a call may have begun since
        version = self.synced.sync()
        with self.turn:
            self.handing_over = False
            self.turn.notify_all()
        return version


def norms(folder: Path) -> dict[str, set[str]]:
    """The norms' weights, which every layout of a server holds whole and under these names:
    SHA-256 of their bytes in each dtype."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith("norm.weight"):
                    found[name] = digests(tensors.get_tensor(name))
    return found
