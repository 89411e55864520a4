"""Sampling from vLLM servers: token ids in and out, through their token-level endpoint.

A request is one sequence with a seed and an id of its own, so that a retry, on whichever server,
asks for that sequence again and for nothing else. docs/engines.md says how to start a server.
"""

import asyncio
import logging
import math
import os
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import UserError
from q3mega.rollout.base import Completion, SamplingParams
from q3mega.rollout.vllm_protocol import (
    GLANCE,
    Choice,
    EngineFailed,
    Server,
    Unusable,
    best_logprob,
    connect,
    generate,
    ids_of,
    in_brief,
    is_healthy,
    load,
    look,
    request,
    version_of,
)

TIMEOUT = 3600.0  # seconds: a long chain of thought is one reply
BACK_OFF = 0.5  # seconds before the first retry; twice as long before each that follows
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class VllmSampler:
    """A `Sampler` over the vLLM servers at `urls` (without /v1), which hold the same weights.

    concurrency: sequences under way on each server; the others wait. timeout: seconds a request.
    retries: of a sequence. key_env: the environment variable that holds the servers' key.
    `version`: the weights that every token must come from; None: one version a call, whichever.
    `engines`: vLLM's version by url. Raises UserError for a server that is not up or does not
    serve the endpoint.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Tokenizer,
        *,
        concurrency: int = 64,
        timeout: float = TIMEOUT,
        retries: int = 3,
        key_env: str | None = None,
    ) -> None:
        self.key = os.environ.get(key_env) if key_env else "none"
        if not self.key:
            raise UserError(f"key_env={key_env}: the environment has no such variable; export it")
        self.tokenizer = tokenizer
        self.stops = [tokenizer.eos, tokenizer.eod]
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.version: str | None = None
        self.servers = self._run(lambda client: connect(client, [u.rstrip("/") for u in urls]))
        self.engines = {server.url: server.engine for server in self.servers}

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`. Log-probabilities are nan where top-p or top-k cut: the servers only tell
        those of what is left. Raises EngineFailed when no server is left, or a sequence is out of
        retries; UserError for what the servers refuse.
        """
        cut = params.temperature > 0 and (params.top_p < 1 or params.top_k > 0)

        async def all_of(client: httpx2.AsyncClient) -> list[Completion]:
            await look(client, self.servers, self.version)
            if params.temperature not in (0, 1) and not cut:
                await self._check_temperature(client)
            batch = _Batch(client, self.servers, self.concurrency, self.retries, self.version)
            queue = [list(p) for p in prompts for _ in range(params.n)]
            return await asyncio.gather(
                *(self._sequence(batch, p, i, params) for i, p in enumerate(queue))
            )

        done = self._run(all_of)
        if cut:
            for c in done:
                c.logprobs = [math.nan if chosen else 0.0 for chosen in c.mask]
        return [done[i : i + params.n] for i in range(0, len(done), params.n)]

    def ask_all(self, bodies: Sequence[dict[str, Any]]) -> list[Choice]:
        """The answers to requests as they are, with the slots, retries and errors of `generate`."""

        async def all_of(client: httpx2.AsyncClient) -> list[Choice]:
            await look(client, self.servers, self.version)
            batch = _Batch(client, self.servers, self.concurrency, self.retries, self.version)
            return await asyncio.gather(*map(batch.ask, bodies))

        return self._run(all_of)

    def ids_of(self, text: str) -> list[int] | None:
        """The first server's token ids of a text; None when it has no tokenizer."""
        return self._run(lambda client: ids_of(client, self.servers[0], text))

    def load(self, folder: Path, version: str, norms: Mapping[str, set[str]]) -> None:
        """Have every server that is up read the Hugging Face folder, which it must see under this
        path; all tokens after it must come from these weights. Requests under way are aborted.

        norms: tensor -> SHA-256 of its bytes in each dtype that a server may hold it in. A server
        that breaks down meanwhile is left out until the next call. Raises EngineFailed when none
        is left, and for one whose tensors are others afterwards.
        """

        async def replace(client: httpx2.AsyncClient, server: Server) -> None:
            try:
                if await version_of(client, server) != version:
                    await load(client, server, folder, version, norms)
            except (httpx2.HTTPError, Unusable) as error:
                _log.warning("%s did not load version %s: %s", server.url, version, in_brief(error))

        async def all_of(client: httpx2.AsyncClient) -> None:
            await look(client, self.servers, None)
            await asyncio.gather(*(replace(client, s) for s in self.servers if s.alive))
            await look(client, self.servers, version)

        self._run(all_of)
        self.version = version

    # -- one sequence ----------------------------------------------------------------------------

    async def _sequence(
        self, batch: "_Batch", prompt: list[int], place: int, params: SamplingParams
    ) -> Completion:
        """With a thinking budget: up to it, then, after the stop text if need be, from there on."""
        budget = params.thinking_budget
        limited = budget is not None and budget <= params.max_tokens
        first = max(1, budget) if budget is not None and limited else params.max_tokens
        done = await self._sample(batch, prompt, f"{place}-0", first, params)
        if not limited or done.finish_reason == "stop":
            return done
        opened = self.tokenizer.think_open in (prompt[-1], done.tokens[0])
        if opened and self.tokenizer.think_close not in done.tokens:
            text = self.tokenizer.encode(params.stop_thinking)
            done.tokens += text
            done.logprobs += [0.0] * len(text)
            done.mask += [0] * len(text)
        if left := params.max_tokens - first:
            more = await self._sample(batch, prompt + done.tokens, f"{place}-1", left, params)
            done.tokens += more.tokens
            done.logprobs += more.logprobs
            done.mask += more.mask
            done.finish_reason = more.finish_reason
        return done

    async def _sample(
        self, batch: "_Batch", prompt: list[int], name: str, tokens: int, params: SamplingParams
    ) -> Completion:
        how: dict[str, Any] = {"temperature": params.temperature}
        if params.temperature > 0:
            how |= {"top_p": params.top_p, "top_k": params.top_k}
        seed = zlib.crc32(f"{params.seed}-{name}".encode())
        body = request(prompt, tokens, **how, seed=seed, stop_token_ids=self.stops)
        choice = await batch.ask(body | {"request_id": f"q3mega-{params.seed}-{name}"})
        found = choice.token_ids
        if choice.finish_reason == "length" and len(found) < tokens:
            raise UserError(
                f"max_tokens={params.max_tokens}: a server stopped after {len(prompt)} + "
                f"{len(found)} tokens; start it with a larger --max-model-len"
            )
        logprobs = [t.logprob for t in choice.logprobs.content]
        version = choice.weight_versions[0].version
        return Completion(found, logprobs, [1] * len(found), choice.finish_reason, version)

    # -- what the servers are --------------------------------------------------------------------

    async def _check_temperature(self, client: httpx2.AsyncClient) -> None:
        """By default a server gives log-probabilities at temperature 1, whatever it samples at."""
        for server in self.servers:
            if server.alive and server.tempered is None:
                hot = await best_logprob(client, server, self.stops[0], 1.0)
                cold = await best_logprob(client, server, self.stops[0], 0.25)
                server.tempered = abs(hot - cold) > 1e-6
            if server.tempered is False:
                raise UserError(
                    f"{server.url} gives log-probabilities at temperature 1, whatever it samples "
                    "at: start it with --logprobs-mode processed_logprobs"
                )

    def _run(self, work: Callable[[httpx2.AsyncClient], Awaitable[_T]]) -> _T:
        async def inside() -> _T:
            async with httpx2.AsyncClient(
                headers={"authorization": f"Bearer {self.key}"},
                timeout=httpx2.Timeout(self.timeout, connect=GLANCE, pool=None),
                limits=httpx2.Limits(max_connections=None),
                trust_env=False,  # a cluster's proxy is not for its own nodes
            ) as client:
                return await work(client)

        return asyncio.run(inside())


class _Batch:
    """One call: its connections, the servers' free slots, and the weights that it samples from."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        servers: Sequence[Server],
        concurrency: int,
        retries: int,
        version: str | None,
    ) -> None:
        self.client, self.servers, self.retries = client, servers, retries
        self.synced, self.version = version is not None, version
        self.slots: asyncio.Queue[Server] = asyncio.Queue()
        for server in [s for s in servers if s.alive] * concurrency:
            self.slots.put_nowait(server)

    async def ask(self, body: dict[str, Any]) -> Choice:
        """The answer of any server, after up to `retries` others; a slot is held for each."""
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(BACK_OFF * 2 ** (attempt - 1))
            server = await self._slot()
            try:
                choice = await generate(self.client, server, body)
                if self._is_current(server, choice):
                    return choice
            except (httpx2.HTTPError, Unusable) as error:
                said = in_brief(error)
                if not await is_healthy(self.client, server):
                    self._drop(server, said)
            finally:
                self.slots.put_nowait(server)
        raise EngineFailed(
            f"a sequence failed {self.retries + 1} times, at last at {server.url} ({said}): see "
            "the server's log, or raise timeout or retries"
        )

    async def _slot(self) -> Server:
        while True:
            server = await self.slots.get()
            if server.alive:  # else its slot is gone
                return server

    def _is_current(self, server: Server, choice: Choice) -> bool:
        versions = {span.version for span in choice.weight_versions}
        self.version = self.version or choice.weight_versions[0].version
        if versions == {self.version}:
            return True
        found = f"it has weights {', '.join(sorted(versions))} where {self.version} is wanted"
        if not self.synced:
            raise EngineFailed(f"{server.url}: {found}; the servers must hold the same weights")
        self._drop(server, found)
        return False

    def _drop(self, server: Server, why: str) -> None:
        if server.alive:
            _log.warning("%s is left out of this batch: %s", server.url, why)
        server.alive = False
        if not any(s.alive for s in self.servers):
            raise EngineFailed(f"no server is left, the last was {server.url} ({why}): start them")
