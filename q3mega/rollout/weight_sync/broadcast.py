"""Weights from rank 0 of the trainer to servers, through a process group of their own.

Rank 0 is the group's rank 0, the servers' processes follow; backend NCCL on GPUs, gloo on CPUs.
"""

import asyncio
import contextlib
import hashlib
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from urllib.parse import urlsplit

import httpx2
import torch
import torch.distributed as dist
from torch import Tensor

from q3mega import device
from q3mega.rollout.servers.client import (
    Group,
    RetryableError,
    RolloutServerFailed,
    Server,
    in_brief,
    look,
    version_of,
)
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync import transfer_group

BUCKET_BYTES = 512 << 20  # bytes that a server receives before it loads them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that a server may hold norms in
_log = logging.getLogger(__name__)


class Broadcast:
    """The group of rank 0 and `servers`, made anew whenever its members change or one failed.

    Raises UserError for servers that cannot join.
    """

    def __init__(self, servers: ServerSampler) -> None:
        self.servers, self.server_kind = servers, servers.server_kind
        self.members: list[Server] = []
        self.group: dist.ProcessGroup | None = None
        self.name = ""
        servers.run(self._check)

    async def _check(self, client: httpx2.AsyncClient) -> None:
        for server in self.servers.servers:
            await self.server_kind.check_receives(client, server)

    def look(self) -> None:
        """See which servers are up. Raises RolloutServerFailed when none is."""
        servers = self.servers.servers
        self.servers.run(lambda client: look(self.server_kind, client, servers, None))

    def is_current(self, version: str) -> bool:
        """Do the servers that are up, and did not fail since, hold this version?"""

        async def ask(client: httpx2.AsyncClient) -> bool:
            found = [await version_of(self.server_kind, client, s) for s in self._up()]
            return set(found) == {version}

        return self.servers.run(ask)

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Have the servers hold these weights, under Hugging Face names, as `version`.

        tensors: all are consumed, as other ranks have a part in them. Where it breaks, the log says
        so, and who broke it is left out of the next try.

        Raises RolloutServerFailed when no server is left, and for a server whose norms differ from
        ours afterwards.
        """
        left = iter(tensors)
        try:
            self.servers.run(lambda client: self._send(client, left, version))
        except RetryableError as error:
            _log.warning("%s did not reach all servers: %s", version, error)
        finally:
            for _ in left:
                pass

    def _up(self) -> list[Server]:
        up = [s for s in self.servers.servers if s.alive]
        if not up:
            raise RolloutServerFailed("no server is left that takes weights: see their logs")
        return up

    async def _send(
        self, client: httpx2.AsyncClient, tensors: Iterator[tuple[str, Tensor]], version: str
    ) -> None:
        started, size, up = time.monotonic(), 0, self._up()
        norms: dict[str, set[str]] = {}
        await self._each(up, lambda s: self.server_kind.begin(client, s))
        if self.group is None or up != self.members:
            await self._join(client, up)
        await self._each(up, lambda s: self.server_kind.open_update(client, s))
        for bucket in _buckets(tensors):
            norms |= {n: digests(t) for n, t in bucket if n.endswith("norm.weight")}
            size += sum(t.nbytes for _, t in bucket)
            await self._one(client, bucket)
        await self._each(up, lambda s: self.server_kind.close_update(client, s))
        sent = time.monotonic()
        await self._each(up, lambda s: self.server_kind.finish(client, s, version, norms))
        _log.info(
            "%s: %.3g MB to %d servers in %.2f s, checked in %.2f s",
            version, size / 1e6, len(up), sent - started, time.monotonic() - sent,
        )  # fmt: skip

    async def _each(
        self, servers: Sequence[Server], work: Callable[[Server], Awaitable[object]]
    ) -> None:
        """For all at once. Raises RetryableError when some failed, which are then left out."""
        found = await asyncio.gather(*map(work, servers), return_exceptions=True)
        said = []
        for server, error in zip(servers, found, strict=True):
            if isinstance(error, httpx2.HTTPError | RetryableError):
                server.alive = False
                said.append(f"{server.url}: {in_brief(error)}")
            elif isinstance(error, BaseException):
                raise error
        if said:
            raise RetryableError("; ".join(said))

    async def _join(self, client: httpx2.AsyncClient, servers: list[Server]) -> None:
        self._leave()
        for server in set(servers) & set(self.members):  # which hold memory for the old one
            with contextlib.suppress(RetryableError):
                await self.server_kind.leave(client, server, self.name)
        self.name = f"q3mega-{uuid.uuid4().hex[:8]}"
        world = 1 + sum(s.ranks for s in servers)
        store = dist.TCPStore(
            "0.0.0.0", 0, world, True, transfer_group.TRANSFER_TIMEOUT, wait_for_workers=False
        )
        first, groups = 1, {}
        for server in servers:
            address = _own_address(server)
            groups[server.url] = Group(address, store.port, first, world, self.name, device.BACKEND)
            first += server.ranks
        joining = asyncio.create_task(
            asyncio.to_thread(transfer_group.join, store, 0, world, self.name, device.BACKEND)
        )
        await self._each(servers, lambda s: self.server_kind.join(client, s, groups[s.url]))
        self.group, self.members = await joining, servers

    async def _one(self, client: httpx2.AsyncClient, bucket: list[tuple[str, Tensor]]) -> None:
        """Tell the servers what comes, and send it."""
        told = {
            asyncio.create_task(self.server_kind.receive(client, server, self.name, bucket)): server
            for server in self.members
        }
        assert self.group is not None
        works = [self.group.broadcast(tensor, 0) for _, tensor in bucket]
        try:
            while not all(work.is_completed() for work in works):
                if any(task.done() and task.exception() for task in told):
                    break  # its server waits for nothing
                await asyncio.sleep(0.001)
            else:
                for work in works:
                    work.wait()
                await asyncio.wait(told, return_when=asyncio.FIRST_EXCEPTION)
        except RuntimeError as error:  # a member is gone
            _log.warning("the broadcast broke: %s", in_brief(error))
        broken = [task for task in told if not task.done() or task.exception()]
        if not broken:
            return
        failed = {told[t]: e for t in broken if t.done() and (e := t.exception())}
        self._leave()  # which ends the others' waiting
        await asyncio.gather(*told, return_exceptions=True)
        for server in self.members:
            server.alive = await self.server_kind.is_healthy(client, server)
        said = []
        for server, cause in failed.items():
            if not isinstance(cause, httpx2.HTTPError | RetryableError):
                raise cause
            server.alive = False
            said.append(f"{server.url}: {in_brief(cause)}")
        raise RetryableError("; ".join(said) or "a server is gone")

    def _leave(self) -> None:
        if self.group is not None:
            self.group.abort()
            self.group = None


def _buckets(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    for pair in tensors:
        bucket.append(pair)
        if sum(t.nbytes for _, t in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _own_address(server: Server) -> str:
    """By which `server` reaches this machine: the end of a route to it."""
    at = urlsplit(server.url)
    family, _, _, _, address = socket.getaddrinfo(at.hostname, at.port or 80)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as route:  # sends nothing
        route.connect(address)
        return route.getsockname()[0]


def digests(tensor: Tensor) -> set[str]:
    """SHA-256 of its bytes in each dtype that a server may hold a norm in."""
    found = [tensor.to(dtype).cpu().view(torch.uint8).numpy().tobytes() for dtype in DTYPES]
    return {hashlib.sha256(data).hexdigest() for data in found}
