"""The `q3mega` command."""

import argparse
from collections.abc import Sequence
from typing import Any

from q3mega import console
from q3mega.cli import checkpoints, curation, recipes
from q3mega.cli.arguments import RENAMED_COMMANDS

# The heavy imports stand inside the commands, so that --help and errors come at once.
_EXAMPLES = """\
examples:
  q3mega run examples/laptop.yaml --run-dir runs/laptop
  q3mega run examples/laptop.yaml reasoning_rl.preset=gspo --run-dir runs/gspo
  q3mega eval runs/laptop/07-general_rl/hf --tasks chain_sum --tries 8

docs/README.md says where to read on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: `q3mega.console`."""
    return console.run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = command_parser()
    arguments, unknown = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option; those behind it are left over.
    overrides = getattr(arguments, "overrides", None)
    if unknown and (overrides is None or any(word.startswith("-") for word in unknown)):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides is not None:
        overrides += unknown
    return int(arguments.command(arguments))


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands, each of which has its function as `command`."""
    parser = _Parser(
        prog="q3mega", description="The Qwen3 recipe, end to end.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="and the commit, if known")
    commands = parser.add_subparsers(
        metavar="command", required=True, parser_class=argparse.ArgumentParser
    )
    for group in (recipes, checkpoints, curation):
        group.add_commands(commands)
    doctor = commands.add_parser("doctor", help="what is installed, and which backend serves what")
    doctor.set_defaults(command=_doctor)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        for old, new in RENAMED_COMMANDS.items():
            message = message.replace(f"invalid choice: {old!r}", f"{old} is called {new} now;")
        super().error(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from q3mega.tools.doctor import version

        print(version())
        parser.exit()


def _doctor(arguments: argparse.Namespace) -> int:
    from q3mega.tools.doctor import findings

    for name, finding in findings():
        print(f"{name:<32} {finding}")
    return 0
