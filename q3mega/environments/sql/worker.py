"""The worker of the tool `sql`. It runs by path, confined, and imports nothing of this package.

A line {"script": ..., "query": ...} asks. A line {"text": ...} answers, or {"wrong": ...} with the
reason why the script makes no database. SQLite looks at a budget only between two of its
instructions, and one may take hours. Then the parent ends the process.
"""

import json
import os
import resource
import sqlite3
import sys
from collections.abc import Callable
from functools import lru_cache

MAX_ROWS = 50
MAX_ANSWER_CHARACTERS = 10_000  # characters of an answer; the tool cuts it once more
MAX_VALUE_BYTES = 1 << 20  # bytes
MAX_PAGES = 1 << 14  # of 4 KiB, of a database
MAX_DATABASES = 8  # are kept; episodes ask theirs more than once
CPU_SECONDS = 20  # for one question; the parent's limit is what cuts, this one ends an orphan
STEPS_PER_LOOK = 100_000  # instructions of SQLite's machine between two looks at the budget
MAX_LOOKS = 100  # at most: some seconds
READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
OUTSIDE = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA}
ERRORS = (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError)  # ValueError: a NUL, say


class Database:
    """What a script makes, in memory. Raises one of ERRORS for a script that fails."""

    def __init__(self, script: str) -> None:
        self.looks = 0
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("pragma temp_store = memory")  # it has no folder for large sorts
        self.connection.execute(f"pragma max_page_count = {MAX_PAGES}")
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        self.connection.set_progress_handler(self._over_budget, STEPS_PER_LOOK)
        self._authorize(lambda action: action not in OUTSIDE)
        self.connection.executescript(script)
        self._authorize(lambda action: action in READS)

    def _over_budget(self) -> bool:
        self.looks += 1
        return self.looks > MAX_LOOKS

    def _authorize(self, allows: Callable[[int], bool]) -> None:
        self.connection.set_authorizer(
            lambda action, *names: (
                sqlite3.SQLITE_OK
                if allows(action) and "load_extension" not in names
                else sqlite3.SQLITE_DENY
            )
        )

    def answer(self, query: str) -> str:
        """The rows that a query finds, as text, or what is wrong with it."""
        self.looks = 0
        try:
            cursor = self.connection.execute(query)
            if cursor.description is None:
                return "error: not a query"
            lines = []
            for row in cursor.fetchmany(MAX_ROWS):
                lines.append(" | ".join(str(value)[:MAX_ANSWER_CHARACTERS] for value in row))
                if sum(map(len, lines)) > MAX_ANSWER_CHARACTERS:
                    break
        except ERRORS as error:
            return f"error: {error}" if str(error) else f"error: {type(error).__name__}"
        return "\n".join(lines)[:MAX_ANSWER_CHARACTERS] or "no rows"


database = lru_cache(maxsize=MAX_DATABASES)(Database)


def replied(script: str, query: str | None) -> dict[str, str]:
    """The answer to one line. query: None only makes the database."""
    try:
        made = database(script)
    except ERRORS as error:
        return {"wrong": str(error) or type(error).__name__}
    return {"text": "" if query is None else made.answer(query)}


def main() -> None:
    """Answer lines of JSON until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
        print(json.dumps(replied(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
