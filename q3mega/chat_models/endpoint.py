"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, hosted ones), in text.

Replies are kept in an SQLite file: a run that was killed asks for none twice. What fails for one
chat costs that chat; what fails for all is an error that says what to do, never an empty reply.
"""

import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import openai

from q3mega.chat_models.base import Chat
from q3mega.chat_models.replies import BROKEN, REMEDIES, Answer, Fault, clean, models_in, read
from q3mega.chat_models.reply_cache import ReplyCache
from q3mega.config.secrets import key_of, public_url, without_keys
from q3mega.errors import NoReply, UserError

MAX_RETRIES = 6  # of a request: with back-off, or as long as the server asks for
REQUEST_TIMEOUT_S = 3600.0  # seconds: a long chain of thought is one reply
FIRST_BACK_OFF_S = 0.5  # seconds before the first retry; twice as long before each that follows
MAX_BACK_OFF_S = 8.0
MAX_WAIT_S = 600.0  # seconds that a server may ask to wait
CONNECT_TIMEOUT_S = 30.0  # seconds in which a server takes a connection
MIN_KEY_CHARACTERS = (
    16  # characters: replies are kept, and must not hold a key that a server echoes
)
MAX_FAILURES_IN_A_ROW = (
    16  # failures without a reply between them: the next chat would fail as well
)
TokenLimit = Literal["max_tokens", "max_completion_tokens"]
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class EndpointFailed(UserError):
    """The server did not answer, or not usably."""


@dataclass
class _Question:
    """A chat, the replies to it so far, and the tries that failed."""

    chat: Chat
    replies: list[str]
    failures: list[NoReply] = field(default_factory=list)

    @property
    def tries(self) -> int:
        return len(self.replies) + len(self.failures)

    def first(self, n: int) -> list[str | NoReply]:
        every: list[str | NoReply] = [*self.replies, *self.failures]
        return every[:n]


class Endpoint:
    """`model` at `url` (ending in /v1).

    key_env: the environment variable that holds the key. concurrency: requests at once.
    token_budget: of all prompts and replies that the cache has ever paid for; requests under way
    when it is reached are let through. cache: an SQLite file. switch: tell the chat template
    whether to think. token_limit: the field that bounds a reply. extra_body: fields of every
    request. Fields that a server refuses are left out, which the log says.
    Raises UserError for a key that is not there and a cache that is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str | None = None,
        concurrency: int = 64,
        token_budget: int | None = None,
        cache: Path | None = None,
        switch: bool = True,
        token_limit: TokenLimit = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        timeout: float = REQUEST_TIMEOUT_S,
        retries: int = MAX_RETRIES,
    ) -> None:
        key = key_of("key_env", key_env) or "none"
        self.url, self.model, self.switch = public_url(url), model, switch
        self.concurrency, self.token_budget, self.retries = concurrency, token_budget, retries
        self.token_limit, self.extra_body = token_limit, dict(extra_body or {})
        limits = openai.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S))
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=limits, max_retries=0)
        self.cache = ReplyCache(cache)
        self.left_out: frozenset[str] = frozenset()  # fields that the server does not take
        self.replied = False  # has any chat had a reply?
        self.closing = threading.Event()

    def check(self) -> None:
        """Ask for nothing but the list of models. Raises UserError when ours is not in it."""

        def names() -> list[str] | None:
            status, headers, body = self._sent(self.client.models.with_raw_response.list)
            if status in (404, 405, 501) or (status == 403 and "scope" in body):
                return None  # a server without a list, or a key that may not see it
            if not 200 <= status < 300:
                read(status, headers, body)
            return models_in(body)

        try:
            served = self._persist(names)
        except Fault as fault:
            raise self._failed(fault) from None
        if served is None:
            _log.warning("%s shows no list of models: %s was not looked for", self.url, self.model)
        elif not {self.model, f"models/{self.model}", f"{self.model}:latest"} & set(served):
            names_ = ", ".join(served[:20]) or "none"
            raise UserError(f"model={self.model} is not served at {self.url}: it has {names_}")

    def ask(
        self,
        chats: Sequence[Chat],
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | None = 0.0,
        thinking: bool = True,
    ) -> list[list[str | NoReply]]:
        """See `ChatModel`. Equal chats of one call are asked once. What failed is not kept: it is
        asked for again by the next call, also after a resume.

        Raises EndpointFailed where the server is down, refuses the key, or has answered no chat.
        """
        settings = self._settings(max_tokens, temperature, thinking)
        keys = [_key(self.url, chat, settings) for chat in chats]
        asked = {
            key: _Question(chat, self.cache.replies(key))
            for key, chat in dict(zip(keys, chats, strict=True)).items()
        }
        self.replied |= any(question.replies for question in asked.values())
        self._ask_all(asked, settings, n)
        answers = {key: question.first(n) for key, question in asked.items()}
        lost = [reply for some in answers.values() for reply in some if isinstance(reply, NoReply)]
        if lost:
            few = sum(bool(question.failures) for question in asked.values())
            detail = lost[-1].detail
            _log.warning("%d of %d chats lack a reply, the last: %s", few, len(asked), detail)
            if not self.replied:
                raise EndpointFailed(detail)
        return [answers[key] for key in keys]

    def _ask_all(self, asked: Mapping[str, _Question], settings: Mapping[str, Any], n: int) -> None:
        """Until each question has n replies or failures."""
        spent, failures = self.cache.spent(), 0
        waiting = [key for key, question in asked.items() if len(question.replies) < n]
        under_way: dict[Future[Answer], str] = {}

        def take(future: Future[Answer]) -> list[str]:
            """The texts of a request that has ended; they are paid for, so they are kept."""
            nonlocal spent
            key, answer = under_way.pop(future), future.result()
            texts = [reply for reply in answer.replies if isinstance(reply, str)]
            tokens = answer.tokens or 0
            if texts or tokens:
                self.cache.add(key, len(asked[key].replies), texts, tokens)
            asked[key].replies += texts
            asked[key].failures += [r for r in answer.replies if isinstance(r, NoReply)]
            spent += tokens
            if asked[key].tries < n:  # a server that gives one choice at a time
                waiting.append(key)
            return texts

        self.closing.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < self.concurrency:
                        self._check_budget(spent)
                        key = waiting.pop(0)
                        job = pool.submit(self._request, key, asked[key], settings, n)
                        under_way[job] = key
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        question = asked[under_way[future]]
                        texts = take(future)
                        self.replied |= bool(texts)
                        failures = 0 if texts else failures + 1
                        self._check_alive(failures, question)
            except BaseException:
                self.closing.set()  # no more retries
                for future in wait(under_way).done:
                    if future.exception() is None:
                        take(future)
                raise

    def _check_alive(self, failures: int, question: _Question) -> None:
        """Is there a sense in asking for more, after so many failures on end?"""
        broken = bool(question.failures) and question.failures[-1].rule == BROKEN
        enough = (
            max(MAX_FAILURES_IN_A_ROW, self.concurrency) if self.replied else MAX_FAILURES_IN_A_ROW
        )
        if failures >= enough and (broken or not self.replied):
            raise EndpointFailed(f"{failures} requests on end: {question.failures[-1].detail}")

    # -- one request -----------------------------------------------------------------------------

    def _settings(
        self, max_tokens: int, temperature: float | None, thinking: bool
    ) -> dict[str, Any]:
        """What is asked for, whatever a server calls it: with the chat, the cache's key."""
        body = dict(self.extra_body)
        if self.switch:
            switches = body.get("chat_template_kwargs", {})
            body["chat_template_kwargs"] = {"enable_thinking": thinking} | switches
        heat = {} if temperature is None else {"temperature": temperature}
        return {"model": self.model, "max_tokens": max_tokens, "extra_body": body} | heat

    def _body(
        self, settings: Mapping[str, Any], n: int, seed: int | None, left_out: frozenset[str]
    ) -> dict[str, Any]:
        body = {**settings["extra_body"], **settings, "n": n}
        del body["extra_body"]
        if seed is not None and body.get("temperature") != 0:
            body["seed"] = seed
        limit = self.token_limit
        if limit in left_out:
            limit = "max_tokens" if limit == "max_completion_tokens" else "max_completion_tokens"
        body[limit] = body.pop("max_tokens")
        return {
            name: value for name, value in body.items() if name == limit or name not in left_out
        }

    def _request(
        self, key: str, question: _Question, settings: Mapping[str, Any], n: int
    ) -> Answer:
        """One or more of the replies that are missing, or why there are none."""
        missing = n - question.tries
        # Some servers draw the same text for the same request: what follows has seeds of its own.
        drawn = json.dumps([key, question.replies, len(question.failures)])
        seed = zlib.crc32(drawn.encode()) >> 1 if question.tries else None
        left_out = self.left_out
        while True:
            body = self._body(settings, missing, seed, left_out)
            try:
                answer = self._persist(partial(self._answer, question.chat, body))
            except Fault as fault:
                if fault.field and fault.field not in left_out:
                    left_out |= {fault.field}
                    continue
                if fault.ends:
                    raise self._failed(fault) from None
                return Answer([NoReply(fault.rule, str(self._failed(fault)))] * missing, None)
            self._remember(left_out)
            tokens = missing * settings["max_tokens"] if answer.tokens is None else answer.tokens
            replies = answer.replies[:missing]
            return Answer([self._signed(reply) for reply in replies], tokens)

    def _signed(self, reply: str | NoReply) -> str | NoReply:
        """A reply that may be kept, or whose there is none."""
        if isinstance(reply, str):
            return without_keys(reply, MIN_KEY_CHARACTERS)
        return replace(reply, detail=f"{self.model} at {self.url}: {reply.detail}")

    def _answer(self, chat: Chat, body: Mapping[str, Any]) -> Answer:
        turns = json.dumps([dict(turn) for turn in chat], ensure_ascii=False)
        messages = cast(Any, json.loads(clean(turns)))
        create = self.client.chat.completions.with_raw_response.create
        rest = {name: value for name, value in body.items() if name != "model"}
        return read(
            *self._sent(lambda: create(model=self.model, messages=messages, extra_body=rest)),
            sent=body,
        )

    def _sent(self, send: Callable[[], Any]) -> tuple[int, Mapping[str, str], str]:
        """(status, headers, body) of whatever the server answers. Raises Fault where it does not
        answer."""
        try:
            response = send().http_response
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            # A connection that breaks or times out within an answer may do so for one chat alone.
            cause = type(error.__cause__).__name__
            down = "Connect" in cause or "Proxy" in cause
            slow = isinstance(error, openai.APITimeoutError) and not down
            said, remedy = f"{error} {cause}: {error.__cause__}", "slow" if slow else "down"
            raise Fault(BROKEN, said, REMEDIES[remedy], passes=True, ends=down) from None
        except openai.OpenAIError as error:
            raise Fault(BROKEN, f"{type(error).__name__}: {error}", REMEDIES["log"]) from None
        return response.status_code, response.headers, response.text

    def _persist(self, attempt: Callable[[], _T]) -> _T:
        """What `attempt` gives, after as many tries as it takes and is allowed. Raises Fault."""
        tries = 0
        while True:
            try:
                return attempt()
            except Fault as fault:
                if fault.wait is not None and fault.wait > MAX_WAIT_S:
                    said = f"{fault.said}; it asks to wait {fault.wait:.0f} s"
                    raise Fault(fault.rule, said, REMEDIES["later"], ends=True) from None
                slow = fault.remedy == REMEDIES["slow"]  # twice its timeout is long enough
                if not fault.passes or tries >= min(self.retries, 1 if slow else self.retries):
                    raise
                pause = min(MAX_BACK_OFF_S, FIRST_BACK_OFF_S * 2**tries)
                tries += 1
                if self.closing.wait(pause if fault.wait is None else fault.wait):
                    raise

    def _remember(self, left_out: frozenset[str]) -> None:
        """Fields without which a request has been answered."""
        for name in sorted(left_out - self.left_out):
            remedy = REMEDIES.get(name)
            hint = f" ({remedy} to say so at once)" if remedy else ""
            _log.warning("%s at %s takes no %s: asked without%s", self.model, self.url, name, hint)
        self.left_out |= left_out

    def _check_budget(self, spent: int) -> None:
        if self.token_budget is not None and spent >= self.token_budget:
            raise UserError(
                f"token_budget={self.token_budget}: {spent} tokens of {self.model} at {self.url} "
                "are spent; raise it to go on, what was answered is kept"
            )

    def _failed(self, fault: Fault) -> EndpointFailed:
        return EndpointFailed(f"{self.model} at {self.url} failed ({fault.said}): {fault.remedy}")


def _key(url: str, chat: Chat, settings: Mapping[str, Any]) -> str:
    text = json.dumps([url, [dict(turn) for turn in chat], settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
