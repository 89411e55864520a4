"""The python tool: a program runs in the sandbox, and what it prints comes back."""

from q3mega import sandbox
from q3mega.environments.tool import MAX_RESULT_CHARACTERS, RunText, shorten


def python() -> RunText:
    """What a program prints, in the sandbox. Raises UserError where nothing confines it."""
    sandbox.confinement()

    def run(code: str) -> str:
        outcome = sandbox.run(code)
        printed = outcome.stdout.strip()
        if outcome.status == "ok":
            return printed
        error = f"error: {outcome.reason}"
        return f"{shorten(printed, MAX_RESULT_CHARACTERS - len(error) - 1)}\n{error}".strip()

    return run
