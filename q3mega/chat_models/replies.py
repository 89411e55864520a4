"""What servers of chat completions answer, well and badly: texts, or a fault with its remedy.

Servers differ in where thinking stands, in what a refusal looks like, and in whether an error has a
status. What is read here is untrusted: any bytes at all are replies or a `Fault`.
"""

import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from q3mega.config.secrets import excerpt
from q3mega.errors import NoReply

# why a chat has no reply: `NoReply.rule`
REFUSED = "content filter"
TOO_LONG = "context too short"
REJECTED = "request rejected"
BROKEN = "server failed"
EMPTY = "empty reply"

# What to do about a fault; every setting named here is a field of `ChatModelSpec`.
REMEDIES = {
    "key": "name the variable that holds a valid key in key_env",
    "url": "url must end in the path of the API, mostly /v1, and model be served there",
    "page": "a log-in page or a proxy answers there; url must be that of the API itself",
    "shape": "is it a server of chat completions? url must end in its path, mostly /v1",
    "stream": "set extra_body: {stream: false}",
    "log": "see the server's log",
    "slow": "it took too long; a higher timeout_s, fewer requests at once (concurrency), or more "
    "servers",
    "down": "is the server up, and url right?",
    "busy": "fewer requests at once (concurrency), or more retries",
    "later": "run again then, what was answered is kept",
    "account": "see to the account of the key; what was answered is kept",
    "length": "a shorter prompt, or fewer max_tokens",
    "refused": "raise max_failures, or take another model",
    "request": "a shorter prompt, fewer max_tokens, or send_enable_thinking: false",
    "empty": "more max_tokens, or another model",
    "max_tokens": "set token_limit: max_completion_tokens",
    "max_completion_tokens": "set token_limit: max_tokens",
    "temperature": "set temperature: null",
    "chat_template_kwargs": "set send_enable_thinking: false",
}

_CUT = {"length", "max_tokens"}
_FILTERED = {
    "content_filter", "content_filtered", "safety", "prohibited_content", "recitation", "blocklist",
    "refusal", "sensitive", "guardrail_intervened",
}  # fmt: skip
_STOPPED = {"error", "abort", "network_error", "insufficient_system_resource"}
_OF_CONTENT = re.compile(
    r"(?i)content[ _-]?(filter|policy|policies|management|moderation|safety|exists risk)"
    r"|responsible ?ai|invalid_prompt|moderation|data_?inspection|flagged|inappropriate"
    r"|considered (high|risky)|prohibited|(usage|safety) polic|guardrail|unsafe|harmful"
    r"|(violat|sensitive).{0,40}(polic|content|information|detect)|(blocked|filtered) by"
)
_OF_LENGTH = re.compile(
    r"(?i)context.{0,20}(length|size|window)|maximum.{0,30}\b(tokens|length)|too (long|large)"
    r"|exceeds?.{0,40}(context|tokens|length)|input length|longer than the"
)
_OF_KEYS = re.compile(r"(?i)api[ _-]?key|unauthori[sz]ed|authenticat|credential")
_OF_MONEY = re.compile(r"(?i)insufficient[ _](quota|balance|credit|fund)|billing|payment|arrear")
_UNKNOWN = re.compile(
    r"(?i)unsupported|not support|unrecogni[sz]ed|unknown|unexpected|instead|not permitted|extra"
    r"|forbidden|invalid|only the default|must be|not allowed|cannot|at most|only one"
)
_UNKNOWN_LIMIT = re.compile(
    r"(?i)unsupported|not support|unrecogni[sz]ed|unknown|unexpected|instead|extra|not permitted"
)
_RATE = re.compile(r"(?i)request too large|too large for")


class Fault(Exception):
    """A request that failed. rule: see `NoReply`. said: what happened, without keys.

    passes: another try may better it, `wait` seconds from now if the server says so. ends: all
    other requests would fail as well. field: of the request, which the server does not take.
    """

    def __init__(
        self, rule: str, message: str, remedy: str, *,
        passes: bool = False, ends: bool = False, wait: float | None = None,
        field: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.rule, self.said, self.remedy = rule, excerpt(message), remedy
        self.passes, self.ends, self.wait, self.field = passes, ends, wait, field


@dataclass(frozen=True)
class Answer:
    """replies: one or more. tokens: that the request took, None where the server does not say."""

    replies: list[str | NoReply]
    tokens: int | None


def read(status: int, headers: Mapping[str, str], body: str, sent: Collection[str] = ()) -> Answer:
    """The replies in an answer, whose request had the fields `sent`. Raises Fault."""
    if not 200 <= status < 300:
        raise _fault(status, headers, body, sent)
    text = body.strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        remedy = "page" if text[:1] == "<" else "stream" if text.startswith("data:") else "log"
        what = "a page" if remedy == "page" else "a stream" if remedy == "stream" else "no JSON"
        raise Fault(
            BROKEN, f"answered with {what}: {_plain(text) or 'nothing'}", REMEDIES[remedy],
            passes=remedy != "stream",
        ) from None  # fmt: skip
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choices = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    if not choices:
        if isinstance(answer, dict) and _words(answer)[0]:
            raise _fault(_status_in(answer), headers, body, sent)
        raise Fault(BROKEN, f"gave no reply: {body}", REMEDIES["shape"], passes=True)
    if all(isinstance(c.get("index"), int) for c in choices):
        choices.sort(key=lambda c: c["index"])
    return Answer([_reply(c) for c in choices], _tokens(answer.get("usage")))


def models_in(body: str) -> list[str] | None:
    """The names in a list of models; None where it has none that can be read. Raises Fault for
    what is no JSON."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        remedy = REMEDIES["page" if body.lstrip()[:1] == "<" else "shape"]
        message = f"answered no list of models: {_plain(body) or 'nothing'}"
        raise Fault(BROKEN, message, remedy) from None
    if isinstance(answer, dict):
        answer = answer.get("data", answer.get("models"))
    if not isinstance(answer, list):
        return None
    named = [m.get("id") or m.get("name") if isinstance(m, dict) else m for m in answer]
    names = [name for name in named if isinstance(name, str)]
    return names if names or not answer else None


def clean(text: str) -> str:
    """Text that can be written as UTF-8: half a surrogate pair is U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# -- what a reply says -----------------------------------------------------------------------------


def _reply(choice: Mapping[str, Any]) -> str | NoReply:
    """The reply with its thinking, which servers with a parser of it give in a field of its own."""
    held = [choice.get("message"), choice.get("delta")]
    message: Mapping[str, Any] = next((m for m in held if isinstance(m, dict)), {})
    content = _text(message.get("content")) or _text(choice.get("text"))
    thinking = next(
        (text for k in ("reasoning_content", "reasoning", "thinking", "reasoning_details")
         if (text := _text(message.get(k)) or _text(message.get(k), thinking=True))),
        _text(message.get("content"), thinking=True),
    )  # fmt: skip
    end = str(choice.get("finish_reason") or "").lower()
    refusal = _text(message.get("refusal"))
    if end in _FILTERED or (refusal and not content):
        reason = f"a reply without text, or cut, which ended by {end or 'a refusal'}: {refusal}"
        return NoReply(REFUSED, f"{excerpt(reason)}: {REMEDIES['refused']}")
    if end in _STOPPED:
        raise Fault(BROKEN, f"broke a reply off ({end})", REMEDIES["log"], passes=True)
    if not content.strip() and not (thinking.strip() and (end in _CUT or not end)):
        what = "calls of tools" if message.get("tool_calls") else "a reply without text"
        reason = f"{what}, which ended by {excerpt(end) or 'nothing it says'}: {REMEDIES['empty']}"
        return NoReply(EMPTY, reason, again=True)
    if thinking.strip() and "</think>" not in content:
        closed = f"\n</think>\n\n{content.lstrip()}" if content.strip() else ""
        content = f"<think>\n{thinking.strip() if closed else thinking}{closed}"
    return clean(content)


def _text(value: Any, *, thinking: bool = False) -> str:
    """The text in a field: a string, or parts of which some may be thinking."""
    if isinstance(value, str):
        return "" if thinking else value
    if isinstance(value, list):
        return "".join(_text(part, thinking=thinking) if isinstance(part, dict)
                       else _text(part) if not thinking else "" for part in value)  # fmt: skip
    if not isinstance(value, dict):
        return ""
    if (value.get("type") in ("thinking", "reasoning")) != thinking and "type" in value:
        return ""
    for field in ("text", "thinking", "summary", "content", "reasoning"):
        inner = value.get(field)
        if isinstance(inner, str) and inner:
            return inner
        if isinstance(inner, list) and (text := _text(inner)):
            return text
    return ""


def _tokens(usage: Any) -> int | None:
    def count(name: str) -> int | None:
        value = usage.get(name) if isinstance(usage, dict) else None
        return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else None

    total, prompt, completion = map(count, ("total_tokens", "prompt_tokens", "completion_tokens"))
    if total:
        return total
    return None if prompt is None or completion is None else prompt + completion


# -- what a failure says ---------------------------------------------------------------------------


def _fault(status: int, headers: Mapping[str, str], body: str, sent: Collection[str]) -> Fault:
    """status 0: the server gave an error in a good answer, and no number with it."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    words, named = _words(answer)
    words = words or _plain(body)
    message = f"{status or 'an error'}: {words}"
    if status == 402 or (status in (0, 403, 429) and _OF_MONEY.search(words)):
        return Fault(REJECTED, message, REMEDIES["account"], ends=True)
    if status == 401 or (not status and _OF_KEYS.search(words)):
        return Fault(REJECTED, message, REMEDIES["key"], ends=True)
    if status in (404, 405) or 300 <= status < 400:
        return Fault(REJECTED, message, REMEDIES["url"], ends=True)
    if status == 451 or (status != 429 and _OF_CONTENT.search(words)):
        return Fault(REFUSED, message, REMEDIES["refused"])
    if status in (0, 400, 422):
        field = _refused_field(words, named, sent)
        if field:
            return Fault(REJECTED, message, REMEDIES.get(field, REMEDIES["request"]), field=field)
    if status == 413 or (status < 500 and (_RATE if status == 429 else _OF_LENGTH).search(words)):
        return Fault(TOO_LONG, message, REMEDIES["length"])
    if status == 403:
        return Fault(REJECTED, message, REMEDIES["key"])
    if status in (408, 409, 425, 429) or status >= 500 or not status:
        down = status in (429, 502, 503, 504, 529)
        remedy = REMEDIES["busy" if status == 429 else "log"]
        return Fault(BROKEN, message, remedy, passes=True, ends=down, wait=_wait(headers))
    return Fault(REJECTED, message, REMEDIES["request"])


def _words(answer: Any) -> tuple[str, set[str]]:
    """(what an error's body says, the fields that it blames). FastAPI's bodies hold the request as
    well, which is left out."""
    if not isinstance(answer, dict):
        return "", set()
    error = answer.get("error") or answer
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, str):
        return error, set()
    if not isinstance(error, dict):
        return "", set()
    named = {error["param"]} if isinstance(error.get("param"), str) else set()
    parts = [error.get(k) for k in ("message", "msg", "error_msg", "code", "type", "status")]
    details = error.get("detail")
    for detail in details if isinstance(details, list) else [details]:
        if isinstance(detail, dict):
            parts += [detail.get("msg"), detail.get("message"), detail.get("type")]
            location = detail.get("loc")
            named |= (
                {p for p in location if isinstance(p, str)} if isinstance(location, list) else set()
            )
        else:
            parts.append(detail)
    texts = [str(p) for p in parts if isinstance(p, str | int) and str(p).strip()]
    only_numbers = error is answer and not any(isinstance(p, str) for p in parts)
    return ("" if only_numbers else ", ".join([*texts, *sorted(named)])), named


def _status_in(answer: Mapping[str, Any]) -> int:
    """The status in the body of an error, 0 where there is none."""
    error = answer.get("error")
    for holder in (error, answer):
        for field in ("code", "status", "status_code"):
            value = holder.get(field) if isinstance(holder, dict) else None
            if re.fullmatch(r"[345]\d\d", str(value)):
                return int(str(value))
    return 0


def _refused_field(words: str, named: Collection[str], sent: Collection[str]) -> str | None:
    """The field of the request that an error blames, so that it may be left out or renamed."""
    if not _UNKNOWN.search(words):
        return None
    for field in ("chat_template_kwargs", "temperature", "seed"):
        if field in sent and (field in named or re.search(rf"(?<![\w.]){field}(?!\w)", words)):
            return field
    if "n" in sent and ("n" in named or re.search(r"['\"`]n['\"`]|completion choice", words)):
        return "n"
    for field in ("max_tokens", "max_completion_tokens"):
        blamed = field in named or re.search(rf"(?<!\w){field}(?!\w)", words)
        if field in sent and blamed and _UNKNOWN_LIMIT.search(words):
            return field
    return None


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def _plain(text: str) -> str:
    """The words of a page."""
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>", " ", text[:100_000])
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())
