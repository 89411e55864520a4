"""The search tool: documents by BM25."""

import re
import sqlite3
from collections.abc import Sequence

from q3mega.environments.tool import RunText
from q3mega.errors import UserError

MAX_HITS = 3  # documents that a search finds
MAX_QUERY_WORDS = 32  # of a query; the others are left out


def search(documents: Sequence[str]) -> RunText:
    """The documents that fit a query best, by BM25 over their words (SQLite's FTS5).

    Raises UserError for documents that are no list of texts.
    """
    if not (isinstance(documents, list | tuple) and all(isinstance(d, str) for d in documents)):
        raise UserError(f"documents={documents!r:.80} must be a list of texts")
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("create virtual table corpus using fts5(text)")
    database.executemany("insert into corpus values (?)", ((text,) for text in documents))

    def run(query: str) -> str:
        # Words in quotes, so that none is taken for an operator of the query language.
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query)[:MAX_QUERY_WORDS])
        if not words:
            return "error: give words to search for"
        hits = database.execute(
            "select text from corpus where corpus match ? order by rank limit ?", (words, MAX_HITS)
        )
        return "\n\n".join(text for (text,) in hits) or "nothing found"

    return run
