"""What sampling needs from a rollout server, whatever software it runs: `RolloutServerKind`.

The modules `vllm` and `sglang` implement it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import httpx2
from pydantic import BaseModel
from torch import Tensor

from q3mega.config.secrets import excerpt
from q3mega.errors import UserError

HEALTH_TIMEOUT_S = 30.0  # seconds in which a healthy server says so
LOADING_VERSION = "loading"  # the version of a server whose weights are being replaced
_KEY = "name the variable that holds the key in key_env"
_ELSEWHERE = "a proxy or a log-in page stands before it: give the server's own address"
_REQUEST = "a shorter prompt, or fewer max_tokens?"
_REMEDIES = {401: _KEY, 403: _KEY} | dict.fromkeys((301, 302, 303, 307, 308, 405), _ELSEWHERE)
_Model = TypeVar("_Model", bound=BaseModel)


class RolloutServerFailed(UserError):
    """No server gave a usable answer."""


class RetryableError(Exception):
    """An answer that another try may better."""


@dataclass(eq=False)
class Server:
    url: str
    software_version: str
    ranks: int = 1  # processes that hold parts of the model
    alive: bool = True  # False: not asked until the next call looks at it again
    tempered: bool | None = None  # are log-probabilities at the sampling temperature?


class Group(NamedTuple):
    """A process group that servers join to get weights, and the rank of a server's first process.
    Its backend is torch's name of it; rank 0, the trainer's, listens at the address."""

    address: str
    port: int
    first: int
    world: int
    name: str
    backend: str


@dataclass
class RequestResult:
    """What a request gave. finish_reason "abort": stopped before its end, perhaps before its first
    token. versions: of the weights, each with the number of tokens up to its last one."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "abort"]
    versions: list[tuple[int, str]]
    routes: Tensor | None = None  # of what was fed, where the server tells them; see `Completion`
    # of each token of the prompt, what could have stood in its place; none of the first
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)


class RolloutServerKind(Protocol):
    """Raises: UserError for what no other try betters, RolloutServerFailed where no server answers,
    RetryableError and httpx2.HTTPError for the rest."""

    RAW: str  # what to do when log-probabilities are at temperature 1
    LONGER: str  # what to do when sequences are cut
    ROUTES: str  # what to do when routes are not told
    VERSION: str  # where a server says which weights it has

    async def connect(self, client: httpx2.AsyncClient, urls: Sequence[str]) -> list[Server]: ...

    async def is_healthy(self, client: httpx2.AsyncClient, server: Server) -> bool: ...

    async def load(
        self,
        client: httpx2.AsyncClient,
        server: Server,
        folder: Path,
        version: str,
        norms: Mapping[str, set[str]],
    ) -> None:
        """Replace the weights by a folder's.

        A load that does not end leaves the version LOADING_VERSION.
        """
        ...

    async def check_receives(self, client: httpx2.AsyncClient, server: Server) -> None:
        """Raises UserError for a server that can join no group."""
        ...

    async def join(self, client: httpx2.AsyncClient, server: Server, group: Group) -> None: ...

    async def leave(self, client: httpx2.AsyncClient, server: Server, group: str) -> None: ...

    async def begin(self, client: httpx2.AsyncClient, server: Server) -> None:
        """Abort what is under way, take no more, and have the version LOADING_VERSION."""
        ...

    async def open_update(self, client: httpx2.AsyncClient, server: Server) -> None:
        """Have it take tensors, also where an earlier transfer was cut."""
        ...

    async def receive(
        self,
        client: httpx2.AsyncClient,
        server: Server,
        group: str,
        tensors: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Have it take these, under Hugging Face names, from the group's rank 0."""
        ...

    async def close_update(self, client: httpx2.AsyncClient, server: Server) -> None: ...

    async def finish(
        self,
        client: httpx2.AsyncClient,
        server: Server,
        version: str,
        norms: Mapping[str, set[str]],
    ) -> None:
        """Sample again, as `version`.

        Raises RolloutServerFailed for weights whose norms are not `norms`.
        """
        ...

    def request(
        self, prompt: list[int], tokens: int, name: str, logprobs: int = 0, **how: Any
    ) -> dict[str, Any]:
        """The body of `generate`. logprobs: of so many best tokens beside the sampled one. how:
        temperature, seed, stop_token_ids, and, unless greedy, top_p and top_k."""
        ...

    async def generate(
        self, client: httpx2.AsyncClient, server: Server, body: dict[str, Any]
    ) -> RequestResult: ...

    async def abort(self, client: httpx2.AsyncClient, server: Server, names: list[str]) -> None:
        """End requests: their answers are what they have sampled. Unknown names are none."""
        ...

    async def best_logprob(
        self, client: httpx2.AsyncClient, server: Server, token: int, temperature: float
    ) -> float:
        """Of the likeliest token after `token`. Raises RolloutServerFailed."""
        ...


async def version_of(
    kind: RolloutServerKind, client: httpx2.AsyncClient, server: Server
) -> str | None:
    """What a server says of its weights, None where it does not."""
    try:
        answer = await client.get(server.url + kind.VERSION, timeout=HEALTH_TIMEOUT_S)
        return answer.json()["weight_version"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None


async def look(
    kind: RolloutServerKind,
    client: httpx2.AsyncClient,
    servers: Sequence[Server],
    version: str | None,
) -> None:
    """Who is alive, with these weights? Raises RolloutServerFailed when none is."""

    async def see(server: Server) -> None:
        server.alive = await kind.is_healthy(client, server)
        if server.alive and version is not None:
            server.alive = await version_of(kind, client, server) == version

    await asyncio.gather(*map(see, servers))
    if not any(server.alive for server in servers):
        weights = "" if version is None else f" with weights {version}"
        urls = ", ".join(server.url for server in servers)
        raise RolloutServerFailed(f"no server of {urls} is up{weights}: see their logs")


def usable(answer: httpx2.Response, remedies: Mapping[int, str]) -> httpx2.Response:
    """Raises RetryableError for what another try may better, UserError for what it cannot."""
    if answer.is_success:
        return answer
    status = answer.status_code
    said = f"{answer.url} answered {status}: {excerpt(answer.text)}"
    if status >= 500 or status in (408, 429):
        raise RetryableError(said)
    remedy = remedies.get(status) or _REMEDIES.get(status, _REQUEST)
    raise UserError(f"{said}: {remedy}")


def read(kind: type[_Model], answer: httpx2.Response) -> _Model:
    """What an answer says. Raises RetryableError for what is none of this kind."""
    try:
        return kind.model_validate_json(answer.content)
    except ValueError as error:
        raise RetryableError(f"{answer.url} gave no answer to use: {in_brief(error)}") from None


def check_norms(server: Server, held: Mapping[str, str], norms: Mapping[str, set[str]]) -> None:
    """Raises RolloutServerFailed for a server whose norms' checksums are none of those of ours."""
    wrong = sorted(name for name, digests in norms.items() if held.get(name) not in digests)
    if wrong:
        raise RolloutServerFailed(
            f"{server.url} read other weights than were written ({', '.join(wrong[:3])}; "
            f"{len(wrong)} of {len(norms)}): does it see the same files, and serve this model?"
        )


def described(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, list]:
    """What a server must know of tensors before it can receive them."""
    return {
        "names": [name for name, _ in tensors],
        "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in tensors],
        "shapes": [list(t.shape) for _, t in tensors],
    }


def in_brief(error: Exception) -> str:
    return f"{type(error).__name__}: {excerpt(str(error))}"
