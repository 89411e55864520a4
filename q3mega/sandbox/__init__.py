"""Programs of models, run in confined processes."""

from q3mega.sandbox.confined import Limits, Outcome, confinement, limits_of, run, started
from q3mega.sandbox.worker import Worker

__all__ = ["Limits", "Outcome", "Worker", "confinement", "limits_of", "run", "started"]
