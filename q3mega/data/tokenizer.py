"""Byte-level BPE with Qwen3's special tokens: trained in the run, or a released folder.

Digits and signs stand alone, so that arithmetic reads the same wherever it occurs; letters take
their leading space along. The folder is an ordinary Hugging Face one, chat template included.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from q3mega.config.section import short
from q3mega.data.chat import TEMPLATE_PATH
from q3mega.data.tagged import HALF_PAIR, TEMPLATE_TOKENS, Span, TaggedText
from q3mega.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", *TEMPLATE_TOKENS)
# a run of letters with the space before it; one digit; one newline; one sign; other white space,
# which leaves its last space to the letters that follow
_SPLIT = r" ?\p{L}+|\p{N}|\n|[^\s\p{L}\p{N}]|[^\S\n]+?(?= ?\p{L})|[^\S\n]+"


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train on `texts` and write a Hugging Face folder; special tokens get the last ids.

    Raises UserError when vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.vocab_size={vocab_size} must be at least {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size - len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is more than the text gives "
            f"({tokenizer.get_vocab_size() + len(SPECIAL_TOKENS)}): lower it or add text"
        )
    # as in the released files: a server that skips special tokens still shows thinking and calls
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=t.startswith("<|")) for t in SPECIAL_TOKENS]
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (path / "chat_template.jinja").write_text(TEMPLATE_PATH.read_text(encoding="utf-8"))


def text_encoder(folder: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder, to which every spelling is text: it gives no added token.

    A length that the folder cuts or pads to is left out. Raises UserError where no tokenizer.json
    can be read.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"tokenizer.path={folder}: no readable tokenizer.json ({error}): give a HF folder"
        ) from error
    # The released files mark <think>, <tool_call>, <|fim_prefix|>, ... as added and not as special.
    added = tokenizer.get_added_tokens_decoder().values()
    tokenizer.add_special_tokens([token.content for token in added])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Tokenizer:
    """Token ids of text and back.

    The control tokens of a `TaggedText` are those that it names, and all else in it is text. In a
    plain string, which our own code writes, every added token of the folder is one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tokenizer = text_encoder(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self._spelling = {i: token.content for i, token in added.items()}
        self._added = {spelling: i for i, spelling in self._spelling.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(entries.values()) + 1  # some leave ids out
        self.eod, self.eos = self.id("<|endoftext|>"), self.id("<|im_end|>")
        self.think_open, self.think_close = self.id("<think>"), self.id("</think>")

    def digest(self) -> str:
        """SHA-256 of what each id stands for: equal where ids mean the same, however a folder is
        written."""
        vocabulary = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def id(self, token: str) -> int:
        """The id of one token; UserError when the vocabulary lacks it."""
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"tokenizer {self.path} has no token {token!r}: is it a Qwen3 one?")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Raises UserError for half a surrogate pair, which no text holds."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        cut = [list(self._cut(text)) for text in texts]
        pieces = [piece for parts in cut for piece in parts if isinstance(piece, str)]
        try:
            encoded = iter(self._tokenizer.encode_batch(pieces, add_special_tokens=False))
        except TypeError:  # what the library says of any string that it cannot take
            (bad, *_) = filter(HALF_PAIR.search, pieces)
            raise UserError(f"{short(bad)} holds half a surrogate pair: it is no text") from None
        return [
            [i for part in parts for i in ([part] if isinstance(part, int) else next(encoded).ids)]
            for parts in cut
        ]

    def _cut(self, text: str) -> Iterator[str | int]:
        """The ids of the control tokens in a text, and what stands between them."""
        if isinstance(text, TaggedText):
            spans = text.control
        else:
            spans = tuple(match.span() for match in self._spelled.finditer(text))
        at = 0
        for start, stop in spans:
            token = self._added.get(text[start:stop])
            if token is not None:
                yield text[at:start]
                yield token
                at = stop
        yield text[at:]

    def decode(self, ids: Sequence[int]) -> TaggedText:
        """Text of `ids`, which knows the control tokens among them."""
        parts, control, size = list[str](), list[Span](), 0
        for added, run in itertools.groupby(ids, self._spelling.__contains__):
            for piece in map(self._spelling.__getitem__, run) if added else [self._text(run)]:
                parts.append(piece)
                size += len(piece)
                if added:
                    control.append((size - len(piece), size))
        return TaggedText("".join(parts), control)

    def _text(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
