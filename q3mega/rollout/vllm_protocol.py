"""What is asked of a vLLM server (0.32), and what its answers must look like.

Sampling stands on the token-level endpoint (--enable-scale-out), replacing weights on the entry
points for reinforcement learning and on /collective_rpc (VLLM_SERVER_DEV_MODE=1).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
from pydantic import BaseModel, Field, NonNegativeInt

from q3mega.errors import UserError

GLANCE = 30.0  # seconds in which a healthy server says so
LOADING = "loading"  # the version of a server whose weights are being replaced
_GENERATE = "/inference/v1/generate"


class EngineFailed(UserError):
    """No server gave a usable answer."""


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


class Choice(BaseModel):
    token_ids: list[NonNegativeInt] = Field(min_length=1)
    logprobs: _Tokens
    finish_reason: Literal["stop", "length"]  # what was aborted is asked for again
    weight_versions: list[_Span] = Field(min_length=1)
    # of each token of the prompt, what the server would have said in its place: None of the first
    prompt_logprobs: list[dict[int, _Known] | None] = Field([])


class _Answer(BaseModel):
    choices: list[Choice] = Field(min_length=1, max_length=1)
    prompt_logprobs: list[dict[int, _Known] | None] | None = None


class Unusable(Exception):
    """An answer that another try may better."""


@dataclass
class Server:
    url: str
    engine: str  # vLLM's version
    alive: bool = True  # False: not asked until the next call looks at it again
    tempered: bool | None = None  # are log-probabilities at the sampling temperature?


async def connect(client: httpx2.AsyncClient, urls: Sequence[str]) -> list[Server]:
    """Raises UserError for a server that is not up or lacks the endpoint."""
    servers = []
    for url in urls:
        try:
            (await client.get(f"{url}/health", timeout=GLANCE)).raise_for_status()
            version = (await client.get(f"{url}/version", timeout=GLANCE)).json()["version"]
            served = await client.post(url + _GENERATE, json={}, timeout=GLANCE)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise EngineFailed(
                f"{url} is no vLLM server that is up ({in_brief(error)}): is it started, and the "
                "url right, without /v1?"
            ) from None
        if served.status_code == 404:
            raise UserError(f"{url} has no token-level endpoint: start it with --enable-scale-out")
        servers.append(Server(url, version))
    return servers


async def look(client: httpx2.AsyncClient, servers: Sequence[Server], version: str | None) -> None:
    """Who is alive, with these weights? Raises EngineFailed when none is."""

    async def see(server: Server) -> None:
        server.alive = await is_healthy(client, server)
        if server.alive and version is not None:
            server.alive = await version_of(client, server) == version

    await asyncio.gather(*map(see, servers))
    if not any(server.alive for server in servers):
        weights = "" if version is None else f" with weights {version}"
        urls = ", ".join(server.url for server in servers)
        raise EngineFailed(f"no server of {urls} is up{weights}: see their logs")


async def is_healthy(client: httpx2.AsyncClient, server: Server) -> bool:
    try:
        return (await client.get(f"{server.url}/health", timeout=GLANCE)).is_success
    except httpx2.HTTPError:
        return False


async def version_of(client: httpx2.AsyncClient, server: Server) -> str | None:
    """What a server says of its weights, None where it does not."""
    try:
        return (await client.get(f"{server.url}/weight_info", timeout=GLANCE)).json()[
            "weight_version"
        ]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None


async def load(
    client: httpx2.AsyncClient,
    server: Server,
    folder: Path,
    version: str,
    norms: Mapping[str, set[str]],
) -> None:
    """Replace the weights. Raises EngineFailed when the server then has other norms."""
    # A load that is cut leaves the version LOADING behind, and is done again by the next one.
    await _ask(client, server, "/pause", {})
    await _ask(client, server, "/update_weight_version", {"new_version": LOADING})
    path = {"weights_path": str(folder.resolve())}
    await _ask(client, server, "/collective_rpc", {"method": "reload_weights", "kwargs": path})
    answer = await _ask(client, server, "/weight_checker", {"action": "checksum"})
    # the names begin with the place in the server's layout; norms are whole everywhere
    held = {name.rpartition(":")[2]: sha for name, sha in answer.json()["checksums"].items()}
    wrong = sorted(name for name, digests in norms.items() if held.get(name) not in digests)
    if wrong:
        raise EngineFailed(
            f"{server.url} read other weights than were written ({', '.join(wrong[:3])}; "
            f"{len(wrong)} of {len(norms)}): does it see the same file system?"
        )
    await _ask(client, server, "/resume", {})
    await _ask(client, server, "/update_weight_version", {"new_version": version})


def request(prompt: list[int], tokens: int, logprobs: int = 0, **how: Any) -> dict[str, Any]:
    """The body of `generate`. logprobs: of so many best tokens beside the sampled one.

    The server would stop at ids of its own too, unless told to ignore them.
    """
    fixed = {"max_tokens": tokens, "logprobs": logprobs, "ignore_eos": True, "detokenize": False}
    return {"token_ids": prompt, "sampling_params": fixed | how}


async def _ask(
    client: httpx2.AsyncClient, server: Server, path: str, body: dict[str, Any]
) -> httpx2.Response:
    """Raises Unusable for what another try may better, UserError for what it cannot."""
    answer = await client.post(server.url + path, json=body)
    if answer.is_success:
        return answer
    said = f"{server.url}{path} answered {answer.status_code}: {' '.join(answer.text.split()):.300}"
    if answer.status_code >= 500 or answer.status_code in (408, 429):
        raise Unusable(said)
    remedy = {
        401: "name the variable that holds the key in key_env",
        404: "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out",
    }.get(answer.status_code, "a shorter prompt, or fewer max_tokens?")
    raise UserError(f"{said}: {remedy}")


async def generate(client: httpx2.AsyncClient, server: Server, body: dict[str, Any]) -> Choice:
    """Raises Unusable for a failure or an answer that another try may better."""
    return parsed((await _ask(client, server, _GENERATE, body)).content)


def parsed(answer: bytes) -> Choice:
    """The one choice of an answer. Raises Unusable for what is none, or is not whole."""
    try:
        whole = _Answer.model_validate_json(answer)
        (choice,) = whole.choices
        choice.prompt_logprobs = whole.prompt_logprobs or []
    except ValueError as error:
        raise Unusable(f"not an answer to use: {in_brief(error)}") from None
    if [t.token_id for t in choice.logprobs.content] != choice.token_ids:
        raise Unusable("log-probabilities are not those of the tokens")
    return choice


async def ids_of(client: httpx2.AsyncClient, server: Server, text: str) -> list[int] | None:
    """The server's token ids of a text; None when it has no tokenizer that it shows."""
    try:
        body = {"prompt": text, "add_special_tokens": False}
        return (await client.post(f"{server.url}/tokenize", json=body)).json()["tokens"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None


async def best_logprob(
    client: httpx2.AsyncClient, server: Server, token: int, temperature: float
) -> float:
    """Of the likeliest token after `token`. Raises EngineFailed."""
    body = request([token], 1, logprobs=1, temperature=temperature, seed=0)
    try:
        (first,) = (await generate(client, server, body)).logprobs.content
        return max(t.logprob for t in first.top_logprobs)
    except (httpx2.HTTPError, Unusable, ValueError) as error:
        raise EngineFailed(f"{server.url} failed at a single token ({in_brief(error)})") from None


def in_brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
