"""Questions about an invented world: its documents are behind a search tool or in the prompt.

One question in four has no answer in its documents.
"""

import random

from q3mega.environments.prompts import BOX_REQUESTS, user_message
from q3mega.problems.base import Row
from q3mega.problems.generated.synthetic_documents import (
    NOT_FOUND,
    RELATIONS,
    World,
    paths,
    question,
)

UNANSWERABLE = 4  # one in
TWO_HOPS = 0.6  # of the questions
_SEARCH = (
    "Answer from the archive that the search tool reads.",
    "You have a small archive of documents and a tool to search it. Answer from these alone.",
    "Look this up with the search tool; general knowledge does not help.",
    "The search tool covers a collection of local papers. Find out the following.",
)
_READ = (
    "Answer from these documents alone.",
    "Read the documents, then answer the question from what they say.",
    "Here are some documents. The question below is about them.",
)
_EITHER = (
    rf"If the documents do not say it, answer \boxed{{{NOT_FOUND}}}.",
    rf"Where they do not hold the answer, write \boxed{{{NOT_FOUND}}} instead.",
    rf"Should it be nowhere in the documents, the right answer is \boxed{{{NOT_FOUND}}}.",
)
_AS_WRITTEN = (
    "Write names, dates and numbers as the documents do.",
    "Copy the name, date or number as it is written there, and nothing else.",
)


def _documents_and_question(
    rng: random.Random, number: int, size: tuple[int, int], notes: tuple[int, int]
) -> Row:
    """A question about a new world, with its documents, and the way to the answer.

    number: the row's index in its set, of which one in UNANSWERABLE has no answer.
    size, notes (lowest, highest): how many things the world has, how many documents are notes.
    """
    answerable = number % UNANSWERABLE > 0
    while True:
        world = World.draw(rng, rng.randint(*size))
        name, first = rng.choice(list(world.slots()))
        kind = RELATIONS[first].kind
        path = rng.choice(list(paths(kind))) if rng.random() < TWO_HOPS else (first,)
        answer, text = world.follow(name, path), question(rng, name, path)
        if answer not in text:
            break
    hidden = None
    if not answerable:
        step = rng.randrange(len(path))
        hidden = world.follow(name, path[:step]), path[step]
    return {
        "text": text,
        "answer": answer if answerable else NOT_FOUND,
        "documents": world.documents(rng, rng.randint(*notes), hidden),
        "reward": "groundedness",
        "difficulty": len(path),
        "group": f"{len(path)} fact{'s' * (len(path) > 1)}" if answerable else NOT_FOUND,
        "subject": name,
        "path": list(path),
    }


def _form(rng: random.Random) -> str:
    return " ".join(map(rng.choice, (BOX_REQUESTS, _EITHER, _AS_WRITTEN)))


def agent_search(rng: random.Random, number: int) -> Row:
    """20 to 60 documents behind the search tool; one search or two lead to the answer."""
    row = _documents_and_question(rng, number, (15, 45), (5, 15))
    text = f"{rng.choice(_SEARCH)}\n\n{row.pop('text')}\n\n{_form(rng)}"
    return row | {"messages": user_message(text), "tools": ["search"]}


def rag(rng: random.Random, number: int) -> Row:
    """9 to 18 documents in the prompt."""
    row = _documents_and_question(rng, number, (6, 12), (3, 6))
    documents = row.pop("documents")
    shown = "\n\n".join(f"[{i}] {text}" for i, text in enumerate(documents, 1))
    parts = [rng.choice(_READ), shown, f"Question: {row.pop('text')}", _form(rng)]
    return row | {"messages": user_message("\n\n".join(parts))}
