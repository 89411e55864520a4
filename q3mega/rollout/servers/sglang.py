"""What is asked of an SGLang server (0.5.23), and what its answers must look like.

Sampling stands on its native endpoint, /generate. All of it is there without a flag.
"""

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
from pydantic import BaseModel, Field, NonNegativeInt
from torch import Tensor

from q3mega.config.secrets import excerpt
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

RAW = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"
LONGER = "start it with a larger --context-length"
VERSION = "/model_info"
ROUTES = "take vLLM's servers, whose routes are read"
_REMEDIES = {404: "is it an SGLang 0.5.23?"}
_Logprob = Annotated[float, Field(le=1e-3, gt=-1e30)]
_Token = tuple[_Logprob, NonNegativeInt, Any]  # the third is its text


class _End(BaseModel):
    type: Literal["stop", "length", "abort"]


class _Span(BaseModel):
    version: str
    end: NonNegativeInt


class _Meta(BaseModel):
    output_token_logprobs: list[_Token] = Field(min_length=1)
    output_top_logprobs: list[list[_Token]] = Field([])
    finish_reason: _End
    weight_versions: list[_Span] = Field(min_length=1)


class Answer(BaseModel):
    output_ids: list[NonNegativeInt]
    meta_info: _Meta


class _Info(BaseModel):
    version: str
    device: str
    tp_size: int
    pp_size: int
    dp_size: int


class _Held(BaseModel):
    checksums: dict[str, str]


class _Ranks(BaseModel):
    ranks: list[_Held]


async def connect(client: httpx2.AsyncClient, urls: Sequence[str]) -> list[Server]:
    """Raises UserError for a server that is not up, or is no SGLang."""
    servers = []
    for url in urls:
        try:
            found = await _info(client, url)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise RolloutServerFailed(
                f"{url} is no SGLang server that is up ({in_brief(error)}): is it started, and the "
                "url right, without /v1?"
            ) from None
        servers.append(Server(url, found.version, ranks=found.tp_size))
    return servers


async def is_healthy(client: httpx2.AsyncClient, server: Server) -> bool:
    """Does the scheduler answer? /health would sample, which a paused server does not."""
    try:
        await _info(client, server.url)
    except (httpx2.HTTPError, ValueError):
        return False
    return True


async def load(
    client: httpx2.AsyncClient,
    server: Server,
    folder: Path,
    version: str,
    norms: Mapping[str, set[str]],
) -> None:
    await begin(client, server)
    body = {"model_path": str(folder.resolve()), "flush_cache": True}
    await _order(client, server, "/update_weights_from_disk", body)
    await finish(client, server, version, norms)


async def check_receives(client: httpx2.AsyncClient, server: Server) -> None:
    found = await _info(client, server.url)
    if found.pp_size > 1 or found.dp_size > 1:
        raise UserError(
            f"{server.url} has pipeline or data parallelism inside (pp_size={found.pp_size}, "
            f"dp_size={found.dp_size}), and joins no group: start a server for each replica, "
            "without stages, or take engine.sync=folder"
        )


async def join(client: httpx2.AsyncClient, server: Server, group: Group) -> None:
    body = {
        "master_address": group.address, "master_port": group.port, "rank_offset": group.first,
        "world_size": group.world, "group_name": group.name, "backend": group.backend,
    }  # fmt: skip
    await _order(client, server, "/init_weights_update_group", body)


async def leave(client: httpx2.AsyncClient, server: Server, group: str) -> None:
    await _order(client, server, "/destroy_weights_update_group", {"group_name": group})


async def begin(client: httpx2.AsyncClient, server: Server) -> None:
    await _order(client, server, "/pause_generation", {"mode": "abort"})
    await _order(client, server, "/update_weight_version", {"new_version": LOADING_VERSION})


async def finish(
    client: httpx2.AsyncClient, server: Server, version: str, norms: Mapping[str, set[str]]
) -> None:
    """On a GPU the server's checksums are of a kind of its own, and are not looked at."""
    if (await _info(client, server.url)).device == "cpu":
        answer = await _order(client, server, "/weights_checker", {"action": "checksum"})
        ranks = read(_Ranks, answer).ranks
        held = {n: sha for rank in ranks for n, sha in rank.checksums.items()}
        short = {n: {sha[:16] for sha in digests} for n, digests in norms.items()}
        check_norms(server, held, short)
    await _order(client, server, "/continue_generation", {})
    await _order(client, server, "/update_weight_version", {"new_version": version})


async def open_update(client: httpx2.AsyncClient, server: Server) -> None:
    with contextlib.suppress(RetryableError):  # there is none that is open
        await _order(client, server, "/end_weight_update", {})
    await _order(client, server, "/begin_weight_update", {})


async def receive(
    client: httpx2.AsyncClient, server: Server, group: str, tensors: Sequence[tuple[str, Tensor]]
) -> None:
    body = described(tensors) | {"group_name": group, "flush_cache": False}
    await _order(client, server, "/update_weights_from_distributed", body)


async def close_update(client: httpx2.AsyncClient, server: Server) -> None:
    await _order(client, server, "/end_weight_update", {})
    await _order(client, server, "/flush_cache", {})


def request(
    prompt: list[int], tokens: int, name: str, logprobs: int = 0, **how: Any
) -> dict[str, Any]:
    """ignore_eos would make it ignore all stop ids, so it stops at ids of its own, too."""
    seed = how.pop("seed")
    fixed = {"max_new_tokens": tokens, "sampling_seed": seed, "skip_special_tokens": False}
    if how.get("top_k") == 0:
        how["top_k"] = -1
    return {
        "rid": name,
        "input_ids": prompt,
        "sampling_params": fixed | how,
        "return_logprob": True,
        "top_logprobs_num": logprobs,
    }


async def generate(
    client: httpx2.AsyncClient, server: Server, body: dict[str, Any]
) -> RequestResult:
    # An id that is under way is refused, also that of a request which the client gave up.
    body = body | {"rid": f"{body['rid']}.{uuid.uuid4().hex[:8]}"}
    answer = await _ask(client, server, body)
    meta, stops = answer.meta_info, body["sampling_params"]["stop_token_ids"]
    if meta.finish_reason.type == "stop" and answer.output_ids[-1] not in stops:
        raise UserError(
            f"{server.url} stopped at token {answer.output_ids[-1]}, which is none of "
            f"{sorted(stops)}: start it with --skip-tokenizer-init, from a folder whose "
            "config.json has one of these as eos_token_id, and without a generation_config.json"
        )
    return RequestResult(
        answer.output_ids,
        [logprob for logprob, _, _ in meta.output_token_logprobs],
        meta.finish_reason.type,
        [(span.end, span.version) for span in meta.weight_versions],
    )


async def abort(client: httpx2.AsyncClient, server: Server, names: list[str]) -> None:
    for name in names:  # the server ends all requests whose id begins so
        usable(
            await client.post(f"{server.url}/abort_request", json={"rid": f"{name}."}), _REMEDIES
        )


async def best_logprob(
    client: httpx2.AsyncClient, server: Server, token: int, temperature: float
) -> float:
    how = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "seed": 0}
    body = request([token], 1, f"q3mega-{uuid.uuid4().hex}", logprobs=1, **how)
    try:
        answer = await _ask(client, server, body)
        return max(logprob for logprob, _, _ in answer.meta_info.output_top_logprobs[0])
    except (httpx2.HTTPError, RetryableError, ValueError, IndexError) as error:
        raise RolloutServerFailed(
            f"{server.url} failed at a single token ({in_brief(error)})"
        ) from None


def parsed(answer: bytes) -> Answer:
    """Raises RetryableError for what is no answer, or is not whole."""
    try:
        found = Answer.model_validate_json(answer)
    except ValueError as error:
        raise RetryableError(f"not an answer to use: {in_brief(error)}") from None
    meta = found.meta_info
    if [token for _, token, _ in meta.output_token_logprobs] != found.output_ids:
        raise RetryableError("log-probabilities are not those of the tokens")
    ends = [0, *(span.end for span in meta.weight_versions)]
    if ends[-1] != len(found.output_ids) or any(a >= b for a, b in pairwise(ends)):
        raise RetryableError("weight versions are not those of the tokens")
    return found


async def _order(
    client: httpx2.AsyncClient, server: Server, path: str, body: dict[str, Any]
) -> httpx2.Response:
    """An entry point that changes the server. It says 400 for whatever fails inside."""
    answer = await client.post(server.url + path, json=body)
    if answer.status_code == 400:
        raise RetryableError(f"{server.url}{path}: {excerpt(answer.text)}")
    return usable(answer, _REMEDIES)


async def _ask(client: httpx2.AsyncClient, server: Server, body: dict[str, Any]) -> Answer:
    answer = await client.post(f"{server.url}/generate", json=body)
    return parsed(usable(answer, _REMEDIES).content)


async def _info(client: httpx2.AsyncClient, url: str) -> _Info:
    """Raises ValueError for what is no such answer."""
    answer = await client.get(f"{url}/server_info", timeout=HEALTH_TIMEOUT_S)
    return _Info.model_validate_json(answer.content)
