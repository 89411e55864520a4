"""What a stage can be told of models elsewhere: teachers, judges and rollout servers.

A key never stands here: a recipe names the environment variable that holds it.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from q3mega.config import secrets
from q3mega.config.section import Changeable, ChangesRounding, MovableAddress, Section
from q3mega.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Url = Annotated[str, Field(pattern="^https?://."), AfterValidator(secrets.public_url)]
EnvironmentVariable = Annotated[str, AfterValidator(secrets.variable)]
# Fields of a chat request that a recipe may not add: they have a setting, or the stage sets them.
_OF_REQUESTS = {
    "model",
    "messages",
    "n",
    "seed",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
}


def _secrets(fields: object, path: str = "") -> Iterator[str]:
    """The dotted paths of fields that hold keys or passwords."""
    if isinstance(fields, dict):
        for name, value in fields.items():
            if secrets.is_secret(str(name)):
                yield f"{path}{name}"
            yield from _secrets(value, f"{path}{name}.")


def _teachers_url(url: str) -> str:
    return secrets.public_url(url, "teacher_url", "teacher_key_env")


class ChatModelSpec(Section):
    """A teacher or judge: `model` of an OpenAI-compatible server at `url`, or the folder `path`."""

    url: MovableAddress[Url | None] = Field(
        None, description="An OpenAI-compatible server, with /v1 at the end."
    )
    model: str | None = Field(None, description="The model's name on that server.")
    path: str | None = Field(
        None,
        description="A Hugging Face folder in place of a server; the stage's processes sample "
        "from it.",
    )
    key_env: Changeable[EnvironmentVariable | None] = Field(
        None, description="The environment variable that holds the server's key."
    )
    max_tokens: PositiveInt = Field(32768, description="Most tokens of a reply.")
    temperature: NonNegativeFloat | None = Field(
        0.6, description="Temperature of a teacher; null: the server's own, of a judge too."
    )
    concurrency: Changeable[PositiveInt] = Field(64, description="Requests at once.")
    token_budget: Changeable[PositiveInt | None] = Field(
        None, description="Tokens of all requests together; null: no limit."
    )
    max_failures: Changeable[Fraction] = Field(
        0.05, description="Share of texts without a usable reply that ends the stage."
    )
    timeout_s: Changeable[PositiveFloat] = Field(3600.0, description="Seconds of a request.")
    retries: Changeable[NonNegativeInt] = Field(6, description="Further tries of a request.")
    send_enable_thinking: bool = Field(
        True, description="Requests carry chat_template_kwargs.enable_thinking."
    )
    token_limit: Changeable[Literal["max_tokens", "max_completion_tokens"]] = Field(
        "max_tokens",
        description="The request's field that bounds a reply; reasoning models of some hosts "
        "take the second alone.",
    )
    extra_body: dict[str, Any] = Field({}, description="Further fields of every request.")

    @field_validator("extra_body")
    @classmethod
    def _can_be_sent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in fields:
            if name in _OF_REQUESTS:
                raise UserError(f"extra_body.{name} is set by the stage; leave it out")
        if fields.get("stream"):
            raise UserError("extra_body.stream=true: replies are read whole; set it to false")
        secret = next(_secrets(fields), None)
        if secret:
            raise UserError(
                f"extra_body.{secret} would be kept in the run's folder: name the variable that "
                "holds the key in key_env"
            )
        try:
            json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"extra_body={fields!r:.80} is no JSON: {error}") from None
        return fields

    @model_validator(mode="after")
    def _of_servers(self) -> Self:
        for name in ("timeout_s", "retries", "send_enable_thinking", "token_limit", "extra_body"):
            if self.path is not None and name in self.model_fields_set:
                raise UserError(f"{name}={getattr(self, name)!r} is for a server (url); drop it")
        if self.path is not None and self.temperature is None:
            raise UserError("temperature=None is for a server (url); give a number")
        return self

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.path is None) == (self.url is None) or (self.url is None) != (self.model is None):
            raise UserError("give either url and model (a server) or path (a Hugging Face folder)")
        return self


class RolloutServers(Section):
    """Servers that sample instead of the training processes: docs/rollout_servers.md."""

    kind: ChangesRounding[Literal["vllm", "sglang"]] = Field(description="What the servers are.")
    urls: Changeable[Annotated[tuple[Url, ...], Field(min_length=1)]] = Field(
        description="The servers, without /v1."
    )
    concurrency: Changeable[PositiveInt] = Field(
        256, description="Sequences under way on each server."
    )
    timeout_s: Changeable[PositiveFloat] = Field(3600.0, description="Seconds of a request.")
    retries: Changeable[NonNegativeInt] = Field(3, description="Further tries of a sequence.")
    key_env: Changeable[EnvironmentVariable | None] = Field(
        None, description="The environment variable that holds the servers' key."
    )
    max_logprob_mismatch: Changeable[PositiveFloat | None] = Field(
        0.1,
        description="Mean |delta log p| between server and trainer that ends the run; null: no "
        "limit.",
    )
    weight_sync: Changeable[Literal["folder", "broadcast"]] = Field(
        "folder", description="How the servers get new weights."
    )
    weights_folder: Changeable[str | None] = Field(
        None,
        description="weight_sync: folder: where the weights are written; null: in the stage's "
        "folder.",
    )

    @model_validator(mode="after")
    def _can_sync(self) -> Self:
        if self.weight_sync == "broadcast" and self.weights_folder is not None:
            raise UserError(
                f"weights_folder={self.weights_folder} is for weight_sync: folder; "
                "leave one of them out"
            )
        return self


class TeacherSettings(Section):
    """Where the teacher is, and what of it the student learns from: docs/distillation.md."""

    teacher: str | None = Field(
        None, description="The teacher's Hugging Face folder; null: the latest stage of the model."
    )
    teacher_url: MovableAddress[
        Annotated[
            str, Field(pattern=r"^(tcp://[^/]+:\d+|https?://.+)$"), AfterValidator(_teachers_url)
        ]
        | None
    ] = Field(
        None,
        description="The teacher elsewhere: tcp://HOST:PORT of a q3mega serve-teacher, or "
        "http://HOST:PORT of a vLLM server.",
    )
    teacher_key_env: Changeable[EnvironmentVariable | None] = Field(
        None, description="The environment variable that holds teacher_url's key."
    )
    teacher_timeout_s: Changeable[PositiveFloat] = Field(
        1800.0, description="Seconds in which teacher_url must send something."
    )
    teacher_topk: NonNegativeInt = Field(
        0,
        description="The teacher's best tokens of each position that the student learns from; 0: "
        "its text off-policy, its whole distribution on-policy.",
    )

    @property
    def teacher_serves(self) -> bool:
        """Is the teacher a server of tokens and log-probabilities?"""
        return self.teacher_url is not None and self.teacher_url.startswith("http")

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher_url is None:
            return self
        at = f"teacher_url={self.teacher_url}"
        if self.teacher is not None:
            raise UserError(f"{at} and teacher={self.teacher}: give one of them")
        if self.teacher_serves != (self.teacher_topk > 0):
            raise UserError(
                f"{at}, teacher_topk={self.teacher_topk}: a server (http) tells its best tokens, "
                "so give teacher_topk; a q3mega serve-teacher (tcp) its whole distribution, so "
                "leave it 0"
            )
        return self
