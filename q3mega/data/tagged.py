"""Text that knows which of its spellings are control tokens.

A user, a document or a tool may write <|im_end|> too. What may end a turn, open a think block or
make a call is therefore no matter of spelling: a `TaggedText` says where its control tokens are,
and `Tokenizer.encode` reads everything else in it as text.
"""

import re
from collections.abc import Iterable
from typing import Self

# Those that the chat template writes.
TEMPLATE_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
SPELLED = re.compile("|".join(map(re.escape, TEMPLATE_TOKENS)))
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates: no text in UTF-8 has one
Span = tuple[int, int]


class TaggedText(str):
    """control: (start, stop) of each control token in it, in order; by default it has none.

    Equal to the string that it spells. `+` keeps the control tokens of both sides; a plain string
    has those of the template that it spells. What else strings do gives a plain string.
    """

    control: tuple[Span, ...]

    def __new__(cls, text: str = "", control: Iterable[Span] = ()) -> Self:
        self = super().__new__(cls, text)
        self.control = tuple(control)
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[str, tuple[Span, ...]]]:
        return type(self), (str(self), self.control)

    def __add__(self, other: str) -> "TaggedText":
        return _joined(self, other)

    def __radd__(self, other: str) -> "TaggedText":
        return _joined(other, self)

    def removeprefix(self, prefix: str, /) -> "TaggedText":
        """See `str.removeprefix`."""
        if not self.startswith(prefix):
            return self
        cut = len(prefix)
        return TaggedText(self[cut:], [(a - cut, b - cut) for a, b in self.control if a >= cut])


def tagged(text: str) -> TaggedText:
    """A plain string that our own code writes: the template's tokens in it are control tokens."""
    if isinstance(text, TaggedText):
        return text
    return TaggedText(text, [match.span() for match in SPELLED.finditer(text)])


def _joined(one: str, two: str) -> TaggedText:
    one, two = tagged(one), tagged(two)
    control = [*one.control, *((len(one) + a, len(one) + b) for a, b in two.control)]
    return TaggedText(str(one) + str(two), control)
