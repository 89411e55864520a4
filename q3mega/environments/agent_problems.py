"""Agent and RAG problems for models of real size: rows with real tools, generated from a seed.

Every reference is computed when its row is made.
"""

import random
from collections.abc import Callable

from q3mega.environments.python.problems import agent_python
from q3mega.environments.search.problems import agent_search, rag
from q3mega.environments.sql.problems import agent_sql
from q3mega.errors import UserError
from q3mega.problems.base import Row

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
    rows: dict[str, Row] = {}
    while len(rows) < n:
        row = MAKERS[name](rng, len(rows))
        rows.setdefault(row["messages"][0]["content"], row | {"domain": name})
    return list(rows.values())
