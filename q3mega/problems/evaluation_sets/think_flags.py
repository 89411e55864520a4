r"""Evaluation: chats of several turns in which flags come and go (ThinkFollow of the Qwen3 report).

The last /think or /no_think decides, in whichever user or system turn it stands; without one a
model thinks. The last question has one number for an answer, so that obeying is not enough.
"""

import random
from collections.abc import Callable

from q3mega.data.chat import last_flag
from q3mega.problems.base import Row

BOX = r"Put the number in \boxed{}."
_ITEMS = ("apples", "books", "candles", "coins", "pencils", "plates", "stamps", "tickets")
_PEOPLE = ("Amara", "Chen", "Elif", "Jonas", "Maria", "Noor", "Pavel", "Yuki")
_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You teach arithmetic to adults.")


def _packed(rng: random.Random) -> tuple[str, int]:
    boxes, each, gone = rng.randint(3, 12), rng.randint(4, 15), rng.randint(2, 11)
    who, what = rng.choice(_PEOPLE), rng.choice(_ITEMS)
    text = f"{who} fills {boxes} boxes with {each} {what} each and gives {gone} of the {what} away."
    return f"{text} How many {what} are left?", boxes * each - gone


def _driven(rng: random.Random) -> tuple[str, int]:
    speed, hours, more = rng.randint(4, 12) * 10, rng.randint(2, 6), rng.randint(5, 60)
    text = f"A train runs for {hours} hours at {speed} km an hour, then {more} km more."
    return f"{text} How many km is that in all?", speed * hours + more


def _paid(rng: random.Random) -> tuple[str, int]:
    count, price = rng.randint(2, 9), rng.randint(3, 19)
    note = -(-count * price // 50) * 50
    what = rng.choice(_ITEMS)
    text = f"{rng.choice(_PEOPLE)} buys {count} {what} at {price} euros each and pays with {note}"
    return f"{text} euros. How many euros come back?", note - count * price


def _floored(rng: random.Random) -> tuple[str, int]:
    wide, long, less = rng.randint(4, 15), rng.randint(4, 15), rng.randint(2, 9)
    text = f"A room is {wide} m wide and {long} m long; {less} square metres of it are covered."
    return f"{text} How many square metres are not?", wide * long - less


def _shared(rng: random.Random) -> tuple[str, int]:
    people, each, extra = rng.randint(3, 9), rng.randint(3, 14), rng.randint(2, 20)
    who, what = rng.choice(_PEOPLE), rng.choice(_ITEMS)
    text = f"{people} friends share {people * each} {what} evenly. {who}, one of them, already had"
    return f"{text} {extra}. How many {what} has {who} now?", each + extra


QUESTIONS: tuple[Callable[[random.Random], tuple[str, int]], ...] = (
    _packed, _driven, _paid, _floored, _shared,
)  # fmt: skip


def rows(n: int, seed: int) -> list[Row]:
    """n chats of 1 to 4 user turns, thinking asked in every second one. Group: number of turns."""
    rng = random.Random(f"think_flags/{seed}")
    return [_row(rng, "no_think" if i % 2 else "think", 1 + i // 2 % 4) for i in range(n)]


def _row(rng: random.Random, mode: str, turns: int) -> Row:
    while True:
        messages, answer = _chat(rng, turns)
        if (last_flag(messages) or "think") == mode:
            return {
                "messages": messages,
                "reward": ["mode", "answer"],
                "answer": str(answer),
                "group": f"{turns} turn{'s' * (turns > 1)}",
            }


def _chat(rng: random.Random, turns: int) -> tuple[list[dict[str, str]], int]:
    messages = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": _flagged(rng, rng.choice(_SYSTEMS), 0.7)})
    for turn in range(turns):
        question, answer = rng.choice(QUESTIONS)(rng)
        # The last turn often has no flag: then the model has to look back for it.
        content = _flagged(rng, f"{question} {BOX}", 0.6)
        messages.append({"role": "user", "content": content})
        if turn < turns - 1:
            reply = rf"The answer is \boxed{{{answer}}}."
            messages.append({"role": "assistant", "content": reply})
    return messages, answer


def _flagged(rng: random.Random, text: str, share: float) -> str:
    if rng.random() >= share:
        return text
    flag = rng.choice(("/think", "/no_think"))
    return f"{text} {flag}" if rng.random() < 0.8 else f"{flag} {text}"
