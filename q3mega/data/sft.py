"""Supervised samples from chats: loss on the assistant's last turn, its stop token included."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q3mega.data.batch import Sample
from q3mega.data.chat import EMPTY_THINKING, render
from q3mega.data.tokenizer import Tokenizer


def reply_text(thinking: str, response: str) -> str:
    """An assistant turn; without thinking it keeps the empty block."""
    return f"<think>\n{thinking}\n</think>\n\n{response}" if thinking else EMPTY_THINKING + response


def chat_sample(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    reply: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    prefilled: bool = False,
) -> Sample:
    """One turn to learn. `reply` is the raw text after the generation prompt (`reply_text`).

    prefilled: the empty think block is part of the prompt (enable_thinking=False) and carries no
    loss; in a sample that a /no_think flag switched, the model has to write the block itself.
    """
    prompt = render(
        messages,
        tools=tools,
        add_generation_prompt=True,
        enable_thinking=False if prefilled else None,
    )
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(reply.removeprefix(EMPTY_THINKING) if prefilled else reply)
    after.append(tokenizer.eos)
    return Sample(before + after, [0.0] * len(before) + [1.0] * len(after))


def epochs(samples: Sequence[Sample], batch: int, seed: int) -> Callable[[int], list[Sample]]:
    """draw(step) for `supervised.train`: every sample once an epoch, in that epoch's order."""
    steps = -(-len(samples) // batch)

    def draw(step: int) -> list[Sample]:
        epoch, place = divmod(step - 1, steps)
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return [samples[i] for i in order[place * batch : (place + 1) * batch]]

    return draw


def steps_of(samples: Sequence[Sample], batch: int, epochs: int) -> int:
    """Optimizer steps of so many epochs."""
    return epochs * -(-len(samples) // batch)
