"""The one error a user is meant to see: a sentence, no traceback, exit code 2."""


class UserError(ValueError):
    """Bad input. The message names the field, the value, and the remedy, in one line."""


class JudgeFailed(UserError):
    """A judge model gave no usable verdict, which is never a score, and never silent."""
