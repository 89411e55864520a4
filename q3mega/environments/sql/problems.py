"""Questions about an invented database, whose reference the gold query finds."""

import random

from q3mega.environments.prompts import BOX_REQUESTS, user_message
from q3mega.environments.sql.databases import draw_database
from q3mega.problems.base import Row

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


def agent_sql(rng: random.Random, number: int) -> Row:
    """Two or three tables; the reference is what the gold query finds in them."""
    database = draw_database(rng)
    about = rng.choice(_HIDDEN) if rng.random() < 0.3 else f"Its tables:\n\n{database.tables}"
    parts = [f"{rng.choice(_SQL)} {about}", database.question, rng.choice(BOX_REQUESTS)]
    return {
        "messages": user_message("\n\n".join(parts)),
        "reward": "answer",
        "answer": database.answer,
        "tools": ["sql"],
        "script": database.script,
        "gold": database.gold,
        "group": "a name" if "order by" in database.gold else "a number",
    }
