"""Keys of servers and of other jobs: recipes name the environment variable that holds one."""

import os

from q3mega.errors import UserError


def key_of(field: str, name: str | None) -> str:
    """The key in the environment variable `name`, which `field` names; an empty one without.

    Raises UserError where the variable is missing or empty.
    """
    key = os.environ.get(name, "") if name else ""
    if name and not key:
        raise UserError(f"{field}={name}: the environment has no such variable; export it")
    return key
