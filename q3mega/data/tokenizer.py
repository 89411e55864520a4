"""Byte-level BPE with Qwen3's special tokens: trained in the run, or a released folder.

Digits and signs stand alone, so that arithmetic reads the same wherever it occurs; letters take
their leading space along. The folder is an ordinary Hugging Face one, chat template included.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from q3mega.data.chat import TEMPLATE_PATH
from q3mega.errors import UserError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
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


class Tokenizer:
    """Token ids of text and back. Special tokens written in the text become their ids."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as error:  # the library raises no narrower class
            raise UserError(
                f"tokenizer.path={path}: no readable tokenizer.json ({error}): give a HF folder"
            ) from error
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
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"tokenizer {self.path} has no token {token!r}: is it a Qwen3 one?")
        return found

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
