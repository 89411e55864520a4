"""Commands that make and compare text for pre-training."""

import argparse
from pathlib import Path

from q3mega.cli.arguments import Commands, takes_recipe
from q3mega.errors import UserError


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    _add_curate(commands)
    _add_mixtures(commands)


def _add_curate(commands: "Commands[argparse.ArgumentParser]") -> None:
    curate = commands.add_parser("curate", help="raw text to the tokens of pre-training")
    curate.set_defaults(command=_curate)
    curate.add_argument("config", help="a YAML file: docs/data.md")
    curate.add_argument("--out", type=Path, required=True, help="a folder; a cut run goes on there")
    curate.add_argument("--workers", type=int, default=2, help="processes")


def _curate(arguments: argparse.Namespace) -> int:
    from q3mega.curate.config import Config
    from q3mega.curate.pipeline import curate, table

    if arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers} must be 1 or more")
    print(table(curate(Config.load(arguments.config), arguments.out, arguments.workers)))
    return 0


def _add_mixtures(commands: "Commands[argparse.ArgumentParser]") -> None:
    mixtures = commands.add_parser("mixtures", help="compare curations by small models' losses")
    mixtures.set_defaults(command=_mixtures)
    takes_recipe(mixtures, help="a YAML file, of a small model: its pretrain_general is run")
    mixtures.add_argument("--curated", nargs="+", required=True, help="folders of q3mega curate")
    mixtures.add_argument("--out", type=Path, required=True, help="a folder for the runs")


def _mixtures(arguments: argparse.Namespace) -> int:
    from q3mega.tools.mixtures import compare

    a = arguments
    print(compare(a.recipe, a.curated, a.out, a.overrides))
    return 0
