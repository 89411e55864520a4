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
from q3mega.config.section import Address, Free, Rounds, Section
from q3mega.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Url = Annotated[str, Field(pattern="^https?://."), AfterValidator(secrets.public_url)]
Variable = Annotated[str, AfterValidator(secrets.variable)]  # of the environment
# fields of a request for a chat that are not free: they have a setting, or the stage sets them
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

    url: Address[Url | None] = None
    model: str | None = None
    path: str | None = None  # a Hugging Face folder, sampled from by the stage's own processes
    key_env: Free[Variable | None] = None  # the environment variable that holds the server's key
    max_tokens: PositiveInt = 32768  # of a reply
    temperature: NonNegativeFloat | None = 0.6  # of a teacher; None: the server's, of a judge too
    concurrency: Free[PositiveInt] = 64  # requests at once
    token_budget: Free[PositiveInt | None] = None  # tokens of all requests; None: no limit
    max_failures: Free[Fraction] = 0.05  # share of texts without a usable reply that ends the stage
    timeout_s: Free[PositiveFloat] = 3600.0  # seconds a request
    retries: Free[NonNegativeInt] = 6  # of a request
    send_enable_thinking: bool = True  # send chat_template_kwargs.enable_thinking
    # the field that bounds a reply; reasoning models of some hosts take the second alone
    token_limit: Free[Literal["max_tokens", "max_completion_tokens"]] = "max_tokens"
    extra_body: dict[str, Any] = Field({})  # further fields of every request

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
    """Servers that sample instead of the training processes: docs/engines.md."""

    kind: Rounds[Literal["vllm", "sglang"]]
    urls: Free[Annotated[tuple[Url, ...], Field(min_length=1)]]
    concurrency: Free[PositiveInt] = 256  # sequences under way on each server
    timeout_s: Free[PositiveFloat] = 3600.0  # seconds a request
    retries: Free[NonNegativeInt] = 3  # of a sequence
    key_env: Free[Variable | None] = None  # the environment variable that holds the servers' key
    # mean |delta log p| to the trainer that ends the run
    max_logprob_mismatch: Free[PositiveFloat | None] = 0.1
    weight_sync: Free[Literal["folder", "broadcast"]] = "folder"  # how the servers get the weights
    weights_folder: Free[str | None] = (
        None  # a folder for them of this stage's; None: in the stage's own
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

    teacher: str | None = None  # a Hugging Face folder; None: the latest stage of the model
    # the teacher elsewhere: tcp://host:port of a q3mega serve-teacher, http://host:port of vLLM
    teacher_url: Address[
        Annotated[
            str, Field(pattern=r"^(tcp://[^/]+:\d+|https?://.+)$"), AfterValidator(_teachers_url)
        ]
        | None
    ] = None
    teacher_key_env: Free[Variable | None] = None  # the variable that holds teacher_url's key
    teacher_timeout_s: Free[PositiveFloat] = 1800.0  # seconds until teacher_url says something
    teacher_topk: NonNegativeInt = 0  # its best tokens of each position; 0: see the stage

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
