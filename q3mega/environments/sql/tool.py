"""The sql tool: queries of a database in memory, in a confined process."""

from pathlib import Path

from q3mega.environments.tool import RunText
from q3mega.errors import UserError
from q3mega.sandbox import Limits, Worker, WorkerProgram, confined

QUERY_TIMEOUT_S = 5.0  # then its process is ended
_WORKER_PATH = str(Path(__file__).with_name("worker.py"))
_WORKER = Worker(
    "SQL",
    lambda: WorkerProgram(
        (confined.interpreter(), "-I", "-S", "-B", "-X", "utf8", _WORKER_PATH), (_WORKER_PATH,)
    ),
    # It limits its own CPU time and writes nothing.
    Limits(cpu=10**9, wall=1e9, memory=1 << 30, output=0, scratch=1 << 12),
    QUERY_TIMEOUT_S,
)


def sql(script: str) -> RunText:
    """Rows that a SELECT finds in the database which `script` makes, in memory.

    The model's query may read and compute, for some seconds and with values of up to a megabyte;
    the script may write too. Both run in a confined process, which is ended where SQLite looks at
    no budget. Raises UserError for a script that fails, takes longer or does anything else, and
    where nothing confines it.
    """
    if not isinstance(script, str):
        raise UserError(f"script={script!r:.80} makes no database (no text): give SQL statements")
    with _WORKER.asking() as ask:
        made = ask({"script": script, "query": None})
    if made is None or "wrong" in made:
        why = "it takes too long or too much memory" if made is None else made["wrong"]
        raise UserError(f"script={script!r:.80} makes no database ({why}): correct it")

    def run(query: str) -> str:
        with _WORKER.asking() as ask:
            reply = ask({"script": script, "query": query})
        if reply is None:
            return "error: the query takes too long or too much memory"
        return str(reply["text"]) if "text" in reply else f"error: {reply['wrong']}"

    return run
