"""Models that are asked in text: teachers and judges, which may have a tokenizer of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from q3mega.data.chat import render
from q3mega.data.tokenizer import Tokenizer
from q3mega.errors import NoReply
from q3mega.rollout.base import Sampler, SamplingParams, text_of

Chat = Sequence[Mapping[str, Any]]


class ChatModel(Protocol):
    """A model behind an endpoint, or one that samples in process."""

    def ask(
        self,
        chats: Sequence[Chat],
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | None = 0.0,
        thinking: bool = True,
    ) -> list[list[str | NoReply]]:
        """n replies to each chat, as `data.chat.parse` reads them: with the think block first where
        the model thought, unclosed where it never came to an end; or why there is none.
        temperature None: the server's own."""
        ...


class LocalChat:
    """A checkpoint of ours, through a sampler."""

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, seed: int) -> None:
        self.sampler, self.tokenizer, self.seed = sampler, tokenizer, seed

    def ask(
        self,
        chats: Sequence[Chat],
        *,
        n: int = 1,
        max_tokens: int,
        temperature: float | None = 0.0,
        thinking: bool = True,
    ) -> list[list[str | NoReply]]:
        """See `ChatModel`. Every call draws anew, the same in every run."""
        self.seed += 1
        block = None if thinking else False
        texts = [render(c, add_generation_prompt=True, enable_thinking=block) for c in chats]
        params = SamplingParams(
            max_tokens, 1.0 if temperature is None else temperature, n=n, seed=self.seed
        )
        completions = self.sampler.generate(self.tokenizer.encode_batch(texts), params)
        return [[text_of(c, self.tokenizer) for c in tries] for tries in completions]
