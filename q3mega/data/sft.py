"""Supervised samples from chats: loss on the assistant's last turn, its stop token included."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q3mega.data.batch import Sample
from q3mega.data.chat import EMPTY_THINKING, assistant_text, render, with_calls
from q3mega.data.tagged import TaggedText, tagged
from q3mega.data.tokenizer import Tokenizer


def reply_text(thinking: str, response: str) -> TaggedText:
    """An assistant turn; without thinking it keeps the empty block. Control tokens are the tags of
    the block and of the response's well-formed calls."""
    block = tagged(EMPTY_THINKING)
    if thinking:
        block = "<think>\n" + TaggedText(thinking) + "\n</think>\n\n"
    return block + with_calls(response)


def chat_sample(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    reply: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    prefilled: bool = False,
) -> Sample:
    """One turn to learn. `reply` is the raw text after the generation prompt: `reply_text`'s, what
    our own model sampled, or a plain string, whose control tokens `assistant_text` tells.

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
    turn = assistant_text(reply)
    after = tokenizer.encode(turn.removeprefix(EMPTY_THINKING) if prefilled else turn)
    after.append(tokenizer.eos)
    return Sample(before + after, [0.0] * len(before) + [1.0] * len(after))


def epochs(samples: Sequence[Sample], batch: int, seed: int) -> Callable[[int], list[Sample]]:
    """draw(step) for `supervised.train`: every sample once an epoch, in that epoch's order."""
    steps = -(-len(samples) // batch)

    def draw(step: int) -> list[Sample]:
        epoch, index = divmod(step - 1, steps)
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return [samples[i] for i in order[index * batch : (index + 1) * batch]]

    return draw


def steps_of(samples: Sequence[Sample], batch: int, epochs: int) -> int:
    """Optimizer steps of so many epochs."""
    return epochs * -(-len(samples) // batch)
