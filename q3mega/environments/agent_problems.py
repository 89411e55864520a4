r"""Agent and RAG tasks for models of real size: rows with real tools, generated from a seed.

agent_search, rag: an invented world's documents, behind a search tool or in the prompt; a quarter
of the questions has no answer there. agent_sql: an invented database. agent_python: what cannot be
computed in the head. Every reference is computed when its row is made.
"""

import random
from collections.abc import Callable

from q3mega.environments.python_computations import COMPUTATIONS
from q3mega.environments.sql_databases import draw_database
from q3mega.errors import UserError
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
BOX = (
    r"Put the answer in \boxed{}.",
    r"Give your final answer in \boxed{}.",
    r"End with the answer in \boxed{}.",
)
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
_SQL = (
    "Use the sql tool to answer from the database.",
    "A SQLite database is at hand through the sql tool.",
    "Query the database with the sql tool to find the answer.",
    "This takes a query or two with the sql tool.",
)
_HIDDEN = (
    "Its tables are listed in sqlite_master.",
    "Look into sqlite_master first to see the tables.",
)
_PYTHON = (
    "Work this out with the python tool.",
    "Write and run a program to answer this.",
    "Use Python for the following.",
    "Do not guess: compute this with the tool.",
)


def _told(rng: random.Random, number: int, size: tuple[int, int], notes: tuple[int, int]) -> Row:
    """A question about a new world, with its documents, and the way to the answer."""
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
    return " ".join(map(rng.choice, (BOX, _EITHER, _AS_WRITTEN)))


def agent_search(rng: random.Random, number: int) -> Row:
    """20 to 60 documents behind the search tool; one search or two lead to the answer."""
    row = _told(rng, number, (15, 45), (5, 15))
    text = f"{rng.choice(_SEARCH)}\n\n{row.pop('text')}\n\n{_form(rng)}"
    return row | {"messages": _asked(text), "tools": ["search"]}


def rag(rng: random.Random, number: int) -> Row:
    """9 to 18 documents in the prompt."""
    row = _told(rng, number, (6, 12), (3, 6))
    documents = row.pop("documents")
    shown = "\n\n".join(f"[{i}] {text}" for i, text in enumerate(documents, 1))
    parts = [rng.choice(_READ), shown, f"Question: {row.pop('text')}", _form(rng)]
    return row | {"messages": _asked("\n\n".join(parts))}


def agent_sql(rng: random.Random, number: int) -> Row:
    """Two or three tables; the reference is what the gold query finds in them."""
    found = draw_database(rng)
    about = rng.choice(_HIDDEN) if rng.random() < 0.3 else f"Its tables:\n\n{found.tables}"
    parts = [f"{rng.choice(_SQL)} {about}", found.question, rng.choice(BOX)]
    return {
        "messages": _asked("\n\n".join(parts)),
        "reward": "answer",
        "answer": found.answer,
        "tools": ["sql"],
        "script": found.script,
        "gold": found.gold,
        "group": "a name" if "order by" in found.gold else "a number",
    }


def agent_python(rng: random.Random, number: int) -> Row:
    """A computation, of each kind in turn."""
    kind = list(COMPUTATIONS)[number % len(COMPUTATIONS)]
    spec = COMPUTATIONS[kind]
    given = spec.draw(rng)
    text = rng.choice(spec.questions).format(**given)
    asked = [f"{rng.choice(_PYTHON)} {text}", f"{text} {rng.choice(_PYTHON)}"]
    return {
        "messages": _asked(f"{rng.choice(asked)} {rng.choice(BOX)}"),
        "reward": "answer",
        "answer": str(spec.solve(**given)),
        "tools": rng.choice((["python"], ["python", "calculator"])),
        "group": kind,
        "given": given,
    }


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "agent_search": agent_search,
    "agent_sql": agent_sql,
    "agent_python": agent_python,
    "rag": rag,
}


def make(name: str, n: int, seed: int = 0) -> list[Row]:
    """n rows of a set, of different prompts; the same ones for the same arguments, and a larger n
    continues a smaller one's.

    Raises UserError for an unknown set.
    """
    if name not in MAKERS:
        raise UserError(f"name={name!r} is unknown: use one of {', '.join(MAKERS)}")
    rng = random.Random(f"{name}/{seed}")
    found: dict[str, Row] = {}
    while len(found) < n:
        row = MAKERS[name](rng, len(found))
        found.setdefault(row["messages"][0]["content"], row | {"domain": name})
    return list(found.values())
