"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, hosted ones), in text.

Replies are kept in an SQLite file: a run that was killed asks for none twice. A server that fails
for good is an error that says what to do, never an empty reply.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import openai

from q3mega.errors import UserError
from q3mega.keys import key_of
from q3mega.rollout.chat_model import Chat

_LOG = "see the server's log"
RETRIES = 6  # of a request, by the client: with back-off, or as long as the server asks for
TIMEOUT = 3600.0  # seconds: a long chain of thought is one reply


class EndpointFailed(UserError):
    """The server did not answer, or not usably."""


class Endpoint:
    """`model` at `url` (ending in /v1).

    key_env: the environment variable that holds the key. concurrency: requests at once.
    token_budget: of all prompts and replies that the cache has ever paid for; requests under way
    when it is reached are let through. cache: an SQLite file, shared by runs and processes.
    switch: tell the chat template whether to think; hosted servers may refuse the field.
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
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        key = key_of("key_env", key_env) or "none"
        self.url, self.model, self.switch = url, model, switch
        self.concurrency, self.token_budget = concurrency, token_budget
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)
        self.cache = _Cache(cache)

    def check(self) -> None:
        """Ask for nothing but the list of models. Raises UserError when ours is not in it."""
        try:
            names = [model.id for model in self.client.models.list().data]
        except openai.NotFoundError:
            return  # a server without a list
        except openai.OpenAIError as error:
            raise self._failed(error) from None
        if self.model not in names:
            raise UserError(
                f"model={self.model} is not served at {self.url}: it has {', '.join(names[:20])}"
            )

    def ask(
        self,
        chats: Sequence[Chat],
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float = 0.0,
        thinking: bool = True,
    ) -> list[list[str]]:
        """See `ChatModel`. Equal chats of one call are asked once."""
        settings = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}
            if self.switch
            else {},
        }
        keys = [_key(self.url, chat, settings) for chat in chats]
        wanted = dict(zip(keys, chats, strict=True))
        found = {key: self.cache.replies(key) for key in wanted}
        spent = self.cache.spent()
        waiting = [key for key in wanted if len(found[key]) < n]
        under_way: dict[Future[tuple[list[str], int]], str] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self.concurrency:
                    self._check_budget(spent)
                    key = waiting.pop(0)
                    more = n - len(found[key])
                    under_way[pool.submit(self._request, wanted[key], settings, more)] = key
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    key = under_way.pop(future)
                    replies, tokens = future.result()
                    self.cache.add(key, len(found[key]), replies, tokens)
                    found[key] += replies
                    spent += tokens
                    if len(found[key]) < n:  # a server that gives one choice at a time
                        waiting.append(key)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [found[key][:n] for key in keys]

    def _request(self, chat: Chat, settings: Mapping[str, Any], n: int) -> tuple[list[str], int]:
        """(at least one reply, tokens paid for)"""
        try:
            answer = self.client.chat.completions.create(
                messages=cast(Any, [dict(turn) for turn in chat]), n=n, **settings
            )
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise self._failed(error) from None
        replies = [_raw(choice) for choice in getattr(answer, "choices", None) or []]
        if not replies:
            raise EndpointFailed(f"{self.url} gave no reply of {self.model}: {answer!r:.200}")
        most = n * settings["max_tokens"]  # where the server does not say what it took
        return replies[:n], answer.usage.total_tokens if answer.usage else most

    def _check_budget(self, spent: int) -> None:
        if self.token_budget is not None and spent >= self.token_budget:
            raise UserError(
                f"token_budget={self.token_budget}: {spent} tokens of {self.model} at {self.url} "
                "are spent; raise it to go on, what was answered is kept"
            )

    def _failed(self, error: Exception) -> EndpointFailed:
        remedy = _LOG
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                remedy = "name the variable that holds a valid key in key_env"
            case openai.NotFoundError():
                remedy = (
                    "url must end in the path of the API, mostly /v1, and model be served there"
                )
            case openai.APITimeoutError():
                remedy = "it took too long: fewer requests at once (concurrency), or more servers"
            case openai.APIConnectionError():
                remedy = "is the server up, and url right?"
            case openai.BadRequestError():
                remedy = "a shorter prompt, fewer max_tokens, or switch: false"
        said = " ".join(str(error).replace(self.client.api_key, "***").split())
        return EndpointFailed(f"{self.model} at {self.url} failed ({said:.300}): {remedy}")


def _key(url: str, chat: Chat, settings: Mapping[str, Any]) -> str:
    text = json.dumps([url, [dict(turn) for turn in chat], settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _raw(choice: Any) -> str:
    """The reply with its thinking, which servers with a parser of it give in a field of its own."""
    message = choice.message
    thinking = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    content = message.content or ""
    if message.content is None and not thinking:
        raise EndpointFailed(f"a reply without text, which ended by {choice.finish_reason}: {_LOG}")
    if not thinking:
        return content
    if not content and choice.finish_reason == "length":
        return f"<think>\n{thinking}"
    return f"<think>\n{thinking.strip()}\n</think>\n\n{content.lstrip()}"


class _Cache:
    """Replies by key and number, and the tokens that they cost. path None: in memory."""

    def __init__(self, path: Path | None) -> None:
        self.database = sqlite3.connect(path or ":memory:", timeout=60)
        try:
            with self.database:
                self.database.execute("pragma journal_mode = wal")
                self.database.execute(
                    "create table if not exists replies (key, number, text, tokens, "
                    "primary key (key, number)) without rowid"
                )
                self.database.execute("select key, number, text, tokens from replies limit 0")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"cache={path} is no cache of replies ({error}): remove it, or name another file"
            ) from None

    def replies(self, key: str) -> list[str]:
        rows = self.database.execute(
            "select text from replies where key = ? order by number", (key,)
        )
        return [text for (text,) in rows]

    def add(self, key: str, first: int, texts: Sequence[str], tokens: int) -> None:
        """Replies first, first + 1, ...; another process may have been quicker."""
        costs = [tokens] + [0] * (len(texts) - 1)
        rows = [(key, first + i, t, c) for i, (t, c) in enumerate(zip(texts, costs, strict=True))]
        with self.database:
            self.database.executemany("insert or ignore into replies values (?, ?, ?, ?)", rows)

    def spent(self) -> int:
        """Tokens of all replies."""
        return self.database.execute("select coalesce(sum(tokens), 0) from replies").fetchone()[0]
