"""Computations that are too long for the head, of each kind in turn."""

import random

from q3mega.environments.prompts import BOX_REQUESTS, user_message
from q3mega.environments.python.computations import COMPUTATIONS
from q3mega.problems.base import Row

_PYTHON = (
    "Work this out with the python tool.",
    "Write and run a program to answer this.",
    "Use Python for the following.",
    "Do not guess: compute this with the tool.",
)


def agent_python(rng: random.Random, number: int) -> Row:
    """A computation, of each kind in turn."""
    kind = list(COMPUTATIONS)[number % len(COMPUTATIONS)]
    spec = COMPUTATIONS[kind]
    given = spec.draw(rng)
    text = rng.choice(spec.questions).format(**given)
    orders = [f"{rng.choice(_PYTHON)} {text}", f"{text} {rng.choice(_PYTHON)}"]
    return {
        "messages": user_message(f"{rng.choice(orders)} {rng.choice(BOX_REQUESTS)}"),
        "reward": "answer",
        "answer": str(spec.solve(**given)),
        "tools": rng.choice((["python"], ["python", "calculator"])),
        "group": kind,
        "given": given,
    }
