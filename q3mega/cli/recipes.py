"""Commands that take a recipe or a run."""

import argparse
import sys
from pathlib import Path

from q3mega.cli.arguments import Commands, takes_recipe
from q3mega.errors import EXIT_STOPPED, UserError


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    _add_run(commands)
    _add_report(commands)
    _add_settings(commands)
    _add_plan(commands)
    _add_slurm(commands)


def _add_run(commands: "Commands[argparse.ArgumentParser]") -> None:
    run = commands.add_parser("run", help="run a recipe's stages; a cut run goes on by itself")
    run.set_defaults(command=_run)
    takes_recipe(run, help="a YAML file")
    run.add_argument("--run-dir", help="where the run lives (default: runs/<the recipe's name>)")
    run.add_argument("--only", metavar="STAGE", help="run this stage alone")
    run.add_argument("--from", dest="start", metavar="STAGE", help="leave out the stages before it")


def _run(arguments: argparse.Namespace) -> int:
    from q3mega.config.recipe import Recipe
    from q3mega.launch.driver import RunStopped, StageFailed, run

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    run_dir = Path(arguments.run_dir or Path("runs") / recipe.name)
    try:
        run(recipe, run_dir, only=arguments.only, start=arguments.start)
    except StageFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except RunStopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(
            f"interrupted: run again to go on from the last checkpoint in {run_dir}",
            file=sys.stderr,
        )
        return 130
    return 0


def _add_report(commands: "Commands[argparse.ArgumentParser]") -> None:
    report = commands.add_parser("report", help="write report.html again from a run folder")
    report.set_defaults(command=_report)
    report.add_argument("run_dir", metavar="RUN")


def _report(arguments: argparse.Namespace) -> int:
    from q3mega.report.page import publish

    publish(arguments.run_dir)
    return 0


def _add_settings(commands: "Commands[argparse.ArgumentParser]") -> None:
    settings = commands.add_parser("settings", help="what a recipe can say, and what it means")
    settings.set_defaults(command=_settings)
    settings.add_argument("stage", nargs="?", metavar="STAGE", help="a stage, or recipe")


def _settings(arguments: argparse.Namespace) -> int:
    from q3mega.config.reference import page, stage_page

    print(stage_page(arguments.stage) if arguments.stage else page(), end="")
    return 0


def _add_plan(commands: "Commands[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser("plan", help="memory and time of a step, before a GPU is asked for")
    plan.set_defaults(command=_plan)
    takes_recipe(plan, nargs="?", help="a YAML file: each of its stages on its layout")
    plan.add_argument("--model", help="instead of a recipe: search layouts of this size")
    plan.add_argument("--gpus", type=int, help="with --model: how many")
    plan.add_argument("--card", default="h100", help="h100, h200 or a100")
    plan.add_argument("--sequence", type=int, default=4096, help="with --model: tokens")
    plan.add_argument("--batch", type=int, default=1024, help="with --model: sequences a step")
    plan.add_argument(
        "--rl", type=int, metavar="UPDATES",
        help="with --model: reinforcement by its schedules, so many updates a batch of --batch "
        "answers of up to --sequence tokens",
    )  # fmt: skip


def _plan(arguments: argparse.Namespace) -> int:
    from q3mega.config.recipe import Recipe
    from q3mega.planner import plan

    a = arguments
    if (a.recipe is None) == (a.model is None):
        raise UserError("plan takes a recipe, or --model and --gpus")
    if a.recipe:
        from q3mega.launch.preflight import check_files

        recipe = Recipe.load(a.recipe, a.overrides)
        check_files(recipe)
        table, fits = plan.table_of_stages(recipe, a.card)
    elif a.rl is not None:
        searched = a.model, a.gpus, a.card, a.sequence, a.batch
        table, fits = plan.table_of_schedules(*searched, a.rl)
    else:
        table, fits = plan.table_of_layouts(a.model, a.gpus, a.card, a.sequence, a.batch)
    print(table)
    return 0 if fits else 2


def _add_slurm(commands: "Commands[argparse.ArgumentParser]") -> None:
    slurm = commands.add_parser("slurm", help="a job script for each stage of a recipe")
    slurm.set_defaults(command=_slurm)
    takes_recipe(slurm, help="a YAML file")
    slurm.add_argument("--run-dir", help="on a file system of all nodes (default: runs/<name>)")
    slurm.add_argument("--submit", action="store_true", help="put them in the queue, as a chain")


def _slurm(arguments: argparse.Namespace) -> int:
    from q3mega.config.recipe import Recipe
    from q3mega.launch import slurm
    from q3mega.launch.preflight import check_files

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    check_files(recipe)
    run_dir = Path(arguments.run_dir or Path("runs") / recipe.name)
    paths = slurm.write(recipe, run_dir)
    jobs = slurm.submit(paths) if arguments.submit else [""] * len(paths)
    for path, job in zip(paths, jobs, strict=True):
        print(path, job)
    return 0
