"""What is asked of a vLLM server (0.32), and what its answers must look like.

Sampling stands on the token-level endpoint (--enable-scale-out), replacing weights on the entry
points for reinforcement learning and on /collective_rpc (VLLM_SERVER_DEV_MODE=1).
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from q3mega.errors import UserError
from q3mega.rollout.servers.client import (
    HEALTH_TIMEOUT_S,
    LOADING_VERSION,
    Group,
    RequestResult,
    RetryableError,
    RolloutServerFailed,
    Server,
    check_norms,
    described,
    in_brief,
    read,
    usable,
)

RAW = "start it with --logprobs-mode processed_logprobs"
LONGER = "start it with a larger --max-model-len"
VERSION = "/weight_info"
ROUTES = "start them with --enable-return-routed-experts"
_GENERATE = "/inference/v1/generate"
_REMEDIES = {404: "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"}


class _About(BaseModel):
    version: str


class _World(BaseModel):
    world_size: PositiveInt


class _Held(BaseModel):
    checksums: dict[str, str]


class _Token(BaseModel):
    token_id: int
    logprob: float = Field(le=1e-3, gt=-9000)  # the server writes -9999 for what it cannot tell
    top_logprobs: list["_Token"] = Field([])


class _Tokens(BaseModel):
    content: list[_Token]


class _Known(BaseModel):
    logprob: float = Field(le=1e-3, gt=-9000)


class _Span(BaseModel):
    version: str
    end: NonNegativeInt


class Choice(BaseModel):
    token_ids: list[NonNegativeInt] = Field(min_length=1)
    logprobs: _Tokens
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[_Span] = Field(min_length=1)
    routed_experts: str | None = None  # .npy in base64: (fed tokens, layers, topk)
    # of each token of the prompt, what the server would have said in its place: None of the first
    prompt_logprobs: list[dict[int, _Known] | None] = Field([])


class _Answer(BaseModel):
    choices: list[Choice] = Field(min_length=1, max_length=1)
    prompt_logprobs: list[dict[int, _Known] | None] | None = None


async def connect(client: httpx2.AsyncClient, urls: Sequence[str]) -> list[Server]:
    """Raises UserError for a server that is not up or lacks the endpoint."""
    servers = []
    for url in urls:
        try:
            (await client.get(f"{url}/health", timeout=HEALTH_TIMEOUT_S)).raise_for_status()
            about = read(_About, await client.get(f"{url}/version", timeout=HEALTH_TIMEOUT_S))
            served = await client.post(url + _GENERATE, json={}, timeout=HEALTH_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL, RetryableError) as error:
            raise RolloutServerFailed(
                f"{url} is no vLLM server that is up ({in_brief(error)}): is it started, and the "
                "url right, without /v1?"
            ) from None
        if served.status_code == 404:
            raise UserError(f"{url} has no token-level endpoint: start it with --enable-scale-out")
        servers.append(Server(url, about.version))
    return servers


async def is_healthy(client: httpx2.AsyncClient, server: Server) -> bool:
    try:
        return (await client.get(f"{server.url}/health", timeout=HEALTH_TIMEOUT_S)).is_success
    except httpx2.HTTPError:
        return False


async def load(
    client: httpx2.AsyncClient,
    server: Server,
    folder: Path,
    version: str,
    norms: Mapping[str, set[str]],
) -> None:
    await begin(client, server)
    await _call(client, server, "reload_weights", weights_path=str(folder.resolve()))
    await finish(client, server, version, norms)


async def check_receives(client: httpx2.AsyncClient, server: Server) -> None:
    answer = await client.get(f"{server.url}/get_world_size", timeout=HEALTH_TIMEOUT_S)
    try:
        server.ranks = read(_World, usable(answer, _REMEDIES)).world_size
        await _call(client, server, "leave_trainer")
    except RetryableError as error:
        raise UserError(
            f"{server.url} can join no trainer's group ({error}): start it with "
            "--worker-extension-cls q3mega.rollout.weight_sync.vllm_worker.Receiver and q3mega "
            "on its PYTHONPATH, or take engine.sync=folder"
        ) from None


async def join(client: httpx2.AsyncClient, server: Server, group: Group) -> None:
    await _call(client, server, "join_trainer", **group._asdict())


async def leave(client: httpx2.AsyncClient, server: Server, group: str) -> None:
    await _call(client, server, "leave_trainer")


async def begin(client: httpx2.AsyncClient, server: Server) -> None:
    await _ask(client, server, "/pause", {})
    await _ask(client, server, "/update_weight_version", {"new_version": LOADING_VERSION})


async def open_update(client: httpx2.AsyncClient, server: Server) -> None:
    await _call(client, server, "open_weights")


async def receive(
    client: httpx2.AsyncClient, server: Server, group: str, tensors: Sequence[tuple[str, Tensor]]
) -> None:
    await _call(client, server, "receive_weights", **described(tensors))


async def close_update(client: httpx2.AsyncClient, server: Server) -> None:
    await _call(client, server, "close_weights")


async def finish(
    client: httpx2.AsyncClient, server: Server, version: str, norms: Mapping[str, set[str]]
) -> None:
    answer = read(_Held, await _ask(client, server, "/weight_checker", {"action": "checksum"}))
    # the names begin with the place in the server's layout; norms are whole everywhere
    held = {name.rpartition(":")[2]: sha for name, sha in answer.checksums.items()}
    check_norms(server, held, norms)
    await _ask(client, server, "/resume", {})
    await _ask(client, server, "/update_weight_version", {"new_version": version})


def request(
    prompt: list[int], tokens: int, name: str, logprobs: int = 0, **how: Any
) -> dict[str, Any]:
    # The server would stop at ids of its own too, unless told to ignore them.
    fixed = {"max_tokens": tokens, "logprobs": logprobs, "ignore_eos": True, "detokenize": False}
    return {"request_id": name, "token_ids": prompt, "sampling_params": fixed | how}


async def generate(
    client: httpx2.AsyncClient, server: Server, body: dict[str, Any]
) -> RequestResult:
    choice = parsed((await _ask(client, server, _GENERATE, body)).content)
    return RequestResult(
        choice.token_ids,
        [t.logprob for t in choice.logprobs.content],
        choice.finish_reason,
        [(span.end, span.version) for span in choice.weight_versions],
        routes_of(choice, len(body["token_ids"])) if choice.routed_experts else None,
        [{i: t.logprob for i, t in row.items()} for row in choice.prompt_logprobs if row],
    )


async def abort(client: httpx2.AsyncClient, server: Server, names: list[str]) -> None:
    inside = [f"generate-tokens-{name}" for name in names]  # as the endpoint renames them
    await _ask(client, server, "/inference/v1/abort_requests", {"request_ids": inside})


async def best_logprob(
    client: httpx2.AsyncClient, server: Server, token: int, temperature: float
) -> float:
    body = request([token], 1, "q3mega-probe", logprobs=1, temperature=temperature, seed=0)
    try:
        choice = parsed((await _ask(client, server, _GENERATE, body)).content)
        (first,) = choice.logprobs.content
        return max(t.logprob for t in first.top_logprobs)
    except (httpx2.HTTPError, RetryableError, ValueError) as error:
        raise RolloutServerFailed(
            f"{server.url} failed at a single token ({in_brief(error)})"
        ) from None


def parsed(answer: bytes) -> Choice:
    """The one choice of an answer. Raises RetryableError for what is none, or is not whole."""
    try:
        whole = _Answer.model_validate_json(answer)
        (choice,) = whole.choices
        choice.prompt_logprobs = whole.prompt_logprobs or []
    except ValueError as error:
        raise RetryableError(f"not an answer to use: {in_brief(error)}") from None
    if [t.token_id for t in choice.logprobs.content] != choice.token_ids:
        raise RetryableError("log-probabilities are not those of the tokens")
    return choice


async def _ask(
    client: httpx2.AsyncClient, server: Server, path: str, body: dict[str, Any]
) -> httpx2.Response:
    return usable(await client.post(server.url + path, json=body), _REMEDIES)


async def _call(client: httpx2.AsyncClient, server: Server, method: str, **how: Any) -> None:
    """A method of the server's workers."""
    await _ask(client, server, "/collective_rpc", {"method": method, "kwargs": how})


async def ids_of(client: httpx2.AsyncClient, server: Server, text: str) -> list[int] | None:
    """The server's token ids of a text; None when it has no tokenizer that it shows."""
    try:
        body = {"prompt": text, "add_special_tokens": False}
        return (await client.post(f"{server.url}/tokenize", json=body)).json()["tokens"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None


def routes_of(choice: Choice, prompt: int) -> Tensor:
    """(prompt + tokens - 1, layers * topk) as `Completion` has them. Raises UserError where they
    are not those of the tokens."""
    try:
        data = base64.b64decode(choice.routed_experts or "")
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"routed_experts of a server cannot be read: {in_brief(error)}") from None
    fed = prompt + len(choice.token_ids) - 1
    if found.ndim != 3 or len(found) != fed or found.dtype.kind not in "iu":
        raise UserError(
            f"routed_experts of a server are {found.shape} {found.dtype}, not integers "
            f"(fed tokens={fed}, layers, topk)"
        )
    routes = torch.from_numpy(found.astype(np.int32)).flatten(1) + 1
    return routes.to(torch.uint8) if routes.numel() and int(routes.max()) < 256 else routes
