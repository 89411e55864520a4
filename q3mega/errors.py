"""The one error a user is meant to see: a sentence, no traceback, exit code 2."""

from dataclasses import dataclass

EXIT_STOPPED = 75  # of a stage that was asked to stop and goes on when it is started again


class UserError(ValueError):
    """Bad input. The message names the field, the value, and the remedy, in one line."""


class JudgeFailed(UserError):
    """A judge model gave no usable verdict, which is never a score, and never silent."""


@dataclass(frozen=True)
class NoReply:
    """Stands where a model's text, or an opinion read from one, could not be had: that costs its
    sample. rule: what dropped samples are counted by. detail: what happened, and the remedy.
    again: another temperature may give one."""

    rule: str
    detail: str
    again: bool = False


class Stopped(BaseException):
    """A stage was asked to stop. No failure, so that nothing which catches those swallows it."""
