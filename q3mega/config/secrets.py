"""Keys of servers and of other jobs: recipes name the environment variable that holds one, and no
message, file or log shows it."""

import base64
import functools
import html
import json
import os
import re
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from q3mega.errors import UserError

_SECRET = re.compile(
    r"(?i)(.*[-_])?(api|access|auth|secret|private)?"
    r"(key|token|secret|password|passwd|pwd|authorization|credentials?|sig)"
)
_LOGIN = re.compile(r"([a-zA-Z][\w+.-]*://)[^\s/@'\"]+@")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:key|token|secret|password|sig)=)[^&\s'\"]+")
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{16,}")
_SHORT = 8  # characters: a shorter key is taken out as a word alone, or sentences would fall apart
_handed_out: set[str] = set()


def key_of(field: str, name: str | None) -> str:
    """The key in the environment variable `name`, which `field` names; an empty one without.

    Raises UserError where the variable is missing or empty, or what it holds is no key.
    """
    if not name:
        return ""
    variable(name, field)
    key = os.environ.get(name, "").strip()  # $(cat FILE) may bring a line's end
    if not key:
        raise UserError(f"{field}={name}: the environment has no such variable; export it")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{field}={name}: what it holds is no line of ASCII; export the key anew")
    _handed_out.add(key)
    return key


def variable(name: str, field: str = "") -> str:
    """`name`, a variable's. Raises UserError for what may be a key itself, and does not show it."""
    long = [part for part in name.split("_") if len(part) >= 16 and not part.isalpha()]
    if long or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(
            f"{field}: names the environment variable that holds the key, not the key itself: "
            "export it, and name the variable".removeprefix(": ")
        )
    return name


def public_url(url: str, field: str = "url", remedy: str = "key_env") -> str:
    """`url`. Raises UserError for one with a password or key in it, which files would keep."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UserError(f"{field}={redacted(url)} is no URL: http://host:port/path") from None
    if "@" in parts.netloc or any(is_secret(name) for name, _ in parse_qsl(parts.query)):
        raise UserError(
            f"{field} of {parts.hostname} holds a password or key, and recipes and logs would keep "
            f"it: leave it out, and name the variable that holds the key in {remedy}"
        )
    return url


def is_secret(name: str) -> bool:
    """Does a field of this name hold a key or a password?"""
    return _SECRET.fullmatch(name) is not None


def redacted(text: str) -> str:
    """What a server or client said without the keys that `key_of` has given out, however it spells
    them, and without what stands in URLs and headers where a password or key would."""
    text = _BEARER.sub(r"\1***", _LOGIN.sub(r"\1***@", without_keys(text)))
    return _QUERY.sub(r"\1***", text)


def without_keys(text: str, shortest: int = 1) -> str:
    """`text` without the keys that `key_of` has given out and that are so long."""
    for key in sorted(_handed_out, key=len, reverse=True):
        if len(key) >= shortest:
            text = _spellings(key).sub("***", text)
    return text


def excerpt(text: str, longest: int = 300) -> str:
    """What a server said, as a message may show it: redacted before it is cut, on one line."""
    return " ".join(redacted(text).split())[:longest]


@functools.cache
def _spellings(key: str) -> re.Pattern[str]:
    """The key as it is, and in URLs, JSON, HTML, hexadecimal and base64, alone or amid others."""
    spelt = {key, quote(key), quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1]}
    spelt |= {html.escape(key), repr(key)[1:-1], key.encode().hex()}
    if len(key) < _SHORT:
        words = "|".join(re.escape(word) for word in sorted(spelt, key=len, reverse=True))
        return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])")
    for before in range(3):  # bytes, modulo 3, that stand before the key in what was encoded
        data = b"\0" * before + key.encode()
        sure = slice(-(-before * 8 // 6), len(data) * 8 // 6)  # characters of the key alone
        spelt |= {f(data).decode()[sure] for f in (base64.b64encode, base64.urlsafe_b64encode)}
    words = "|".join(re.escape(word) for word in sorted(spelt, key=len, reverse=True))
    return re.compile(f"(?i:{words})")
