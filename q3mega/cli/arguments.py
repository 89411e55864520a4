"""What several commands take."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q3mega.config.layout import Layout

Commands = argparse._SubParsersAction  # what argparse gives to add commands to
RENAMED_COMMANDS = {"gap": "logprob-mismatch", "teach": "serve-teacher"}


def takes_recipe(command: argparse.ArgumentParser, **how: Any) -> None:
    """Give a command a recipe and overrides of its settings."""
    command.add_argument("recipe", **how)
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="stage.field=value", help="change a setting"
    )


def layout_of_words(words: list[str]) -> "Layout":
    """`axis=ways` words, for as many processes as torchrun has started."""
    from q3mega.config.layout import launched, layout_of

    return layout_of(words, processes=launched())
