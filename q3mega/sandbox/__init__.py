"""Programs of models, run in confined processes."""

from q3mega.sandbox.confined import Limits, Outcome, confinement, limits_of, run, started
from q3mega.sandbox.worker import Worker, WorkerProgram

__all__ = [
    "Limits",
    "Outcome",
    "Worker",
    "WorkerProgram",
    "confinement",
    "limits_of",
    "run",
    "started",
]
