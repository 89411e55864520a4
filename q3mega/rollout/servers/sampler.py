"""Sampling from servers: token ids in and out, through their token-level endpoints.

A request is one sequence with a seed and an id of its own, so that a retry, on whichever server,
asks for that sequence again and for nothing else. docs/engines.md says how to start a server.
"""

import asyncio
import logging
import math
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx2
import torch.nn.functional as F

from q3mega.config.secrets import key_of, public_url
from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError
from q3mega.model.routing import continued
from q3mega.rollout.base import Completion, SamplingParams, merge_versions
from q3mega.rollout.servers import sglang, vllm
from q3mega.rollout.servers.client import (
    HEALTH_TIMEOUT_S,
    RequestResult,
    RetryableError,
    RolloutServerFailed,
    RolloutServerKind,
    Server,
    in_brief,
    look,
    version_of,
)

ServerKind = Literal["vllm", "sglang"]
SERVER_KINDS: dict[ServerKind, RolloutServerKind] = {"vllm": vllm, "sglang": sglang}
REQUEST_TIMEOUT_S = 3600.0  # seconds: a long chain of thought is one reply
FIRST_BACK_OFF_S = 0.5  # seconds before the first retry; twice as long before each that follows
ABORT_INTERVAL_S = 0.2  # seconds until requests that still run are aborted once more
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class ServerSampler:
    """A `Sampler` over the servers of one kind at `urls` (without /v1), which hold the same
    weights.

    concurrency: sequences under way on each server; the others wait. timeout: seconds a request.
    retries: of a sequence. key_env: the environment variable that holds the servers' key.
    `version`: the weights that every token must come from; None: one version a call, whichever.
    `server_versions`: the servers' software versions by url.

    Raises UserError for a server that is not up or does not serve the endpoint.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Tokenizer,
        *,
        kind: ServerKind = "vllm",
        concurrency: int = 64,
        timeout: float = REQUEST_TIMEOUT_S,
        retries: int = 3,
        key_env: str | None = None,
    ) -> None:
        self.key = key_of("key_env", key_env) or "none"
        self.kind, self.server_kind = kind, SERVER_KINDS[kind]
        self.tokenizer = tokenizer
        self.stops = [tokenizer.eos, tokenizer.eod]
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.version: str | None = None
        self.batches: set[_Batch] = set()  # of the calls under way
        bare = [public_url(url, "urls").rstrip("/") for url in urls]
        self.servers = self.run(lambda client: self.server_kind.connect(client, bare))
        self.server_versions = {server.url: server.software_version for server in self.servers}

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`. Log-probabilities are nan where top-p or top-k cut: what the servers tell
        then depends on them.

        Raises RolloutServerFailed when no server is left or a sequence is out of retries, UserError
        for what the servers refuse.
        """
        return self.resume(prompts, None, params)

    def resume(
        self,
        prompts: Sequence[Sequence[int]],
        partial: Sequence[Sequence[Completion]] | None,
        params: SamplingParams,
        *,
        seconds: float | None = None,
    ) -> list[list[Completion]]:
        """Like `generate`, on from completions that were interrupted: `params.n` for each prompt,
        None: from nothing. Finished ones are given back as they are.

        After `seconds`, or at `interrupt()`, what is sampled so far is returned, unfinished ones
        with finish_reason "abort". Those may go on under newer weights: see
        `Completion.weight_versions`.
        """
        cut = params.temperature > 0 and (params.top_p < 1 or params.top_k > 0)
        starts = [[Completion([], [], [], "abort") for _ in range(params.n)] for _ in prompts]
        queue = [
            (list(prompt), deepcopy(completion))
            for prompt, group in zip(prompts, partial or starts, strict=True)
            for completion in group
        ]

        async def all_of(client: httpx2.AsyncClient) -> list[Completion]:
            await look(self.server_kind, client, self.servers, self.version)
            if params.temperature not in (0, 1) and not cut:
                await self._check_temperature(client)
            batch = _Batch(self, client)
            self.batches.add(batch)
            if seconds is not None:
                batch.loop.call_later(seconds, batch.stop)
            try:
                return await asyncio.gather(
                    *(self._sequence(batch, p, i, params, c) for i, (p, c) in enumerate(queue))
                )
            finally:
                self.batches.discard(batch)

        done = self.run(all_of)
        if cut:
            for c in done:
                c.logprobs = [math.nan if chosen else 0.0 for chosen in c.mask]
        return [done[i : i + params.n] for i in range(0, len(done), params.n)]

    def ask_all(self, requests: Mapping[str, dict[str, Any]]) -> list[RequestResult]:
        """The answers to requests, by name; slots, retries and errors are those of `generate`."""

        async def all_of(client: httpx2.AsyncClient) -> list[RequestResult]:
            await look(self.server_kind, client, self.servers, self.version)
            batch = _Batch(self, client)
            return await asyncio.gather(*(batch.ask(*item) for item in requests.items()))

        return self.run(all_of)

    def interrupt(self) -> None:
        """End the calls that are under way early: see `resume`. From any thread."""
        for batch in list(self.batches):
            with suppress(RuntimeError):  # its loop has just ended
                batch.loop.call_soon_threadsafe(batch.stop)

    def load(self, folder: Path, version: str, norms: Mapping[str, set[str]]) -> None:
        """Have every server that is up read the Hugging Face folder, which it must see under this
        path; all tokens after it must come from these weights. Requests under way are aborted.

        norms: tensor -> SHA-256 of its bytes in each dtype that a server may hold it in. A server
        that breaks down meanwhile is left out until the next call.

        Raises RolloutServerFailed when none is left, and for a server whose tensors are others
        afterwards.
        """

        async def replace(client: httpx2.AsyncClient, server: Server) -> None:
            try:
                if await version_of(self.server_kind, client, server) != version:
                    await self.server_kind.load(client, server, folder, version, norms)
            except (httpx2.HTTPError, RetryableError) as error:
                _log.warning("%s did not load version %s: %s", server.url, version, in_brief(error))

        async def all_of(client: httpx2.AsyncClient) -> None:
            await look(self.server_kind, client, self.servers, None)
            await asyncio.gather(*(replace(client, s) for s in self.servers if s.alive))
            await look(self.server_kind, client, self.servers, version)

        self.run(all_of)
        self.version = version

    # -- one sequence ----------------------------------------------------------------------------

    async def _sequence(
        self,
        batch: "_Batch",
        prompt: list[int],
        place: int,
        params: SamplingParams,
        done: Completion,
    ) -> Completion:
        """With a thinking budget: up to it, then, after the stop text if need be, from there on."""
        budget = params.thinking_budget
        limited = budget is not None and budget <= params.max_tokens
        first = max(1, budget) if budget is not None and limited else params.max_tokens
        while done.finish_reason == "abort":
            chosen = sum(done.mask)
            if limited and chosen == first and 0 not in done.mask:
                self._close(done, prompt, params)
            if chosen >= params.max_tokens:
                done.finish_reason = "length"
                break
            limit = first if chosen < first else params.max_tokens
            name = f"{place}-{chosen}"
            more = await self._sample(batch, prompt + done.tokens, name, limit - chosen, params)
            _append(done, more)
            if more.finish_reason == "abort":
                break
            if more.finish_reason == "stop":
                done.finish_reason = "stop"
        if done.routes is not None:  # a stop text at the end was not fed: its experts are free
            missing = len(prompt) + len(done.tokens) - 1 - len(done.routes)
            done.routes = F.pad(done.routes, (0, 0, 0, missing))
        return done

    def _close(self, done: Completion, prompt: list[int], params: SamplingParams) -> None:
        """The stop text, if a think block is open."""
        opened = self.tokenizer.think_open in (prompt[-1], done.tokens[0])
        if opened and self.tokenizer.think_close not in done.tokens:
            text = self.tokenizer.encode(params.stop_thinking)
            done.tokens += text
            done.logprobs += [0.0] * len(text)
            done.mask += [0] * len(text)

    async def _sample(
        self, batch: "_Batch", prompt: list[int], name: str, tokens: int, params: SamplingParams
    ) -> RequestResult:
        how: dict[str, Any] = {"temperature": params.temperature}
        if params.temperature > 0:
            how |= {"top_p": params.top_p, "top_k": params.top_k}
        seed = zlib.crc32(f"{params.seed}-{name}".encode())
        body = self.server_kind.request(
            prompt, tokens, f"q3mega-{params.seed}-{name}", **how,
            seed=seed, stop_token_ids=self.stops,
        )  # fmt: skip
        found = await batch.ask(f"q3mega-{params.seed}-{name}", body)
        if found.finish_reason == "length" and len(found.tokens) < tokens:
            raise UserError(
                f"max_tokens={params.max_tokens}: a server stopped after {len(prompt)} + "
                f"{len(found.tokens)} tokens; {self.server_kind.LONGER}"
            )
        if params.routes and found.routes is None and found.tokens:
            raise UserError(
                "routes=True (routing_replay: r3): the servers do not tell their experts; "
                f"{self.server_kind.ROUTES}"
            )
        return found

    # -- what the servers are --------------------------------------------------------------------

    async def _check_temperature(self, client: httpx2.AsyncClient) -> None:
        """By default a server gives log-probabilities at temperature 1, whatever it samples at."""
        for server in self.servers:
            if server.alive and server.tempered is None:
                hot = await self.server_kind.best_logprob(client, server, self.stops[0], 1.0)
                cold = await self.server_kind.best_logprob(client, server, self.stops[0], 0.25)
                server.tempered = abs(hot - cold) > 1e-6
            if server.tempered is False:
                raise UserError(
                    f"{server.url} gives log-probabilities at temperature 1, whatever it samples "
                    f"at: {self.server_kind.RAW}"
                )

    def run(self, work: Callable[[httpx2.AsyncClient], Awaitable[_T]]) -> _T:
        async def inside() -> _T:
            async with httpx2.AsyncClient(
                headers={"authorization": f"Bearer {self.key}"},
                timeout=httpx2.Timeout(self.timeout, connect=HEALTH_TIMEOUT_S, pool=None),
                limits=httpx2.Limits(max_connections=None),
                trust_env=False,  # a cluster's proxy is not for its own nodes
            ) as client:
                return await work(client)

        return asyncio.run(inside())


def _append(done: Completion, more: RequestResult) -> None:
    starts = [0, *(end for end, _ in more.versions)]
    runs = [(v, end - start) for start, (end, v) in zip(starts, more.versions, strict=False)]
    done.weight_versions = merge_versions(done.weight_versions + runs)
    done.tokens += more.tokens
    done.logprobs += more.logprobs
    done.mask += [1] * len(more.tokens)
    done.routes = continued(done.routes, more.routes) if more.tokens else done.routes


class _Batch:
    """One call: its connections, the servers' free slots, and the weights that it samples from."""

    def __init__(self, sampler: ServerSampler, client: httpx2.AsyncClient) -> None:
        self.client, self.server_kind, self.servers = client, sampler.server_kind, sampler.servers
        self.retries = sampler.retries
        self.synced, self.version = sampler.version is not None, sampler.version
        self.loop, self.stopped = asyncio.get_running_loop(), False
        self.under_way: dict[str, Server] = {}  # requests, by their names
        self.slots: asyncio.Queue[Server] = asyncio.Queue()
        for server in [s for s in self.servers if s.alive] * sampler.concurrency:
            self.slots.put_nowait(server)

    def stop(self) -> None:
        """Sample no more."""
        if not self.stopped:
            self.stopped = True
            self.aborting = self.loop.create_task(self._abort())

    async def _abort(self) -> None:
        while self.under_way:  # again, as a request may reach its server after our word
            for server in self.servers:
                names = [name for name, at in self.under_way.items() if at is server]
                try:
                    if names and server.alive:
                        await self.server_kind.abort(self.client, server, names)
                except (httpx2.HTTPError, RetryableError) as error:
                    _log.warning("%s did not abort: %s", server.url, in_brief(error))
            await asyncio.sleep(ABORT_INTERVAL_S)

    async def ask(self, name: str, body: dict[str, Any]) -> RequestResult:
        """The answer of any server, after up to `retries` others; a slot is held for each."""
        said = ""
        for attempt in range(self.retries + 1):
            if attempt and not self.stopped:
                await asyncio.sleep(FIRST_BACK_OFF_S * 2 ** (attempt - 1))
            server = await self._slot()
            try:
                if self.stopped:
                    return RequestResult([], [], "abort", [])
                self.under_way[name] = server
                found = await self.server_kind.generate(self.client, server, body)
                if found.finish_reason == "abort" and not self.stopped:
                    raise RetryableError("the server aborted it")
                if self._is_current(server, found):
                    return found
            except (httpx2.HTTPError, RetryableError) as error:
                said = in_brief(error)
                if not await self.server_kind.is_healthy(self.client, server):
                    self._drop(server, said)
            finally:
                self.under_way.pop(name, None)
                self.slots.put_nowait(server)
        raise RolloutServerFailed(
            f"a sequence failed {self.retries + 1} times, at last at {server.url} ({said}): see "
            "the server's log, or raise timeout or retries"
        )

    async def _slot(self) -> Server:
        while True:
            server = await self.slots.get()
            if server.alive:  # else its slot is gone
                return server

    def _is_current(self, server: Server, found: RequestResult) -> bool:
        versions = {version for _, version in found.versions}
        self.version = self.version or found.versions[0][1]
        if versions == {self.version}:
            return True
        others = f"it has weights {', '.join(sorted(versions))} where {self.version} is wanted"
        if not self.synced:
            raise RolloutServerFailed(
                f"{server.url}: {others}; the servers must hold the same weights"
            )
        self._drop(server, others)
        return False

    def _drop(self, server: Server, why: str) -> None:
        if server.alive:
            _log.warning("%s is left out of this batch: %s", server.url, why)
        server.alive = False
        if not any(s.alive for s in self.servers):
            raise RolloutServerFailed(
                f"no server is left, the last was {server.url} ({why}): start them"
            )
