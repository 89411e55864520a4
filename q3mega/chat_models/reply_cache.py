"""Replies that were paid for, in an SQLite file that lives on any file system.

A rollback journal, as a write-ahead log needs memory that the machines of a network file system do
not share. One process of a run opens the file; where a file system has no locks, the lock of the
run's folder keeps others away.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from q3mega.errors import UserError

_HEADER_BYTES = 100  # bytes; the 19th is 2 where a write-ahead log belongs to the file
_LOCK_TIMEOUT_S = 60.0  # seconds for another process's transaction


class ReplyCache:
    """Replies by key and number, and the tokens that they cost. path None: in memory.

    Raises UserError, here and later, for a file that is no such cache, is damaged, or is in use.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            self.database = self._opened("")
        except sqlite3.OperationalError as error:
            if not str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_IOERR"):
                raise self._unusable(error) from None
            try:
                self.database = self._opened("?vfs=unix-none")  # a file system without locks
            except sqlite3.DatabaseError as another:
                raise self._unusable(another) from None
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _opened(self, how: str) -> sqlite3.Connection:
        path = self.path
        name = ":memory:" if path is None else f"file:{quote(str(path.absolute()))}{how}"
        database = sqlite3.connect(name, timeout=_LOCK_TIMEOUT_S, uri=True, check_same_thread=False)
        if path is not None and _has_log(path):  # of an older version: taken in without its memory
            database.execute("pragma locking_mode = exclusive")
            database.execute("pragma journal_mode = delete")
            database.close()
            database = sqlite3.connect(
                name, timeout=_LOCK_TIMEOUT_S, uri=True, check_same_thread=False
            )
        with database:
            database.execute("pragma journal_mode = delete")
            database.execute(
                "create table if not exists replies (key, number, text, tokens, "
                "primary key (key, number)) without rowid"
            )
            database.execute("select key, number, text, tokens from replies limit 0")
        return database

    def replies(self, key: str) -> list[str]:
        rows = self._run(
            "select text from replies where key = ? and number >= 0 order by number", (key,)
        )
        return [text for (text,) in rows]

    def add(self, key: str, first: int, texts: Sequence[str], tokens: int) -> None:
        """Replies first, first + 1, ...; another process may have been quicker. Without texts the
        tokens were spent for nothing, and count all the same."""
        rows: list[tuple[str, int, str | None, int]]
        if texts:
            costs = [tokens] + [0] * (len(texts) - 1)
            numbered = enumerate(zip(texts, costs, strict=True), first)
            rows = [(key, i, text, cost) for i, (text, cost) in numbered]
        else:
            ((lowest,),) = self._run(
                "select min(0, coalesce(min(number), 0)) from replies where key = ?", (key,)
            )
            rows = [(key, lowest - 1, None, tokens)]
        try:
            with self.database:
                self.database.executemany("insert or ignore into replies values (?, ?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def spent(self) -> int:
        """Tokens of all requests."""
        return self._run("select coalesce(sum(tokens), 0) from replies")[0][0]

    def _run(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        try:
            return self.database.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: sqlite3.Error) -> UserError:
        match str(getattr(error, "sqlite_errorname", "")).split("_")[:2]:
            case ["SQLITE", "BUSY" | "LOCKED"]:
                return UserError(f"cache={self.path} is in use by another process: end that first")
            case ["SQLITE", "FULL" | "READONLY" | "CANTOPEN" | "IOERR"]:
                return UserError(
                    f"cache={self.path} cannot be read and written ({error}): is there space, and "
                    "may you write there?"
                )
        return UserError(
            f"cache={self.path} is no cache of replies ({error}): remove it, or name another file"
        )


def _has_log(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError:
        return False
    return header.startswith(b"SQLite format 3\0") and header[18:19] == b"\x02"
