"""The `q3mega` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3mega import console
from q3mega.errors import EXIT_STOPPED, UserError

if TYPE_CHECKING:
    from q3mega.config.layout import Layout
    from q3mega.rollout.base import SamplingParams

# The heavy imports stand inside the commands, so that --help and errors come at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: `q3mega.console`."""
    return console.run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting overrides at the first option; those behind it are left over.
    overrides = getattr(arguments, "overrides", None)
    if rest and (overrides is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides is not None:
        overrides += rest
    return arguments.command(arguments)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from q3mega.tools.doctor import version

        print(version())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="q3mega", description="The Qwen3 recipe, end to end.")
    parser.add_argument("--version", action=_Version, nargs=0, help="and the commit, if known")
    commands = parser.add_subparsers(metavar="command", required=True)

    run = commands.add_parser("run", help="run a recipe's stages; a cut run goes on by itself")
    run.set_defaults(command=_run)
    _takes_recipe(run, help="a YAML file")
    run.add_argument("--run-dir", help="where the run lives (default: runs/<the recipe's name>)")
    run.add_argument("--only", metavar="STAGE", help="run this stage alone")
    run.add_argument("--from", dest="start", metavar="STAGE", help="leave out the stages before it")

    report = commands.add_parser("report", help="write report.html again from a run folder")
    report.set_defaults(command=_report)
    report.add_argument("run_dir", metavar="RUN")

    curate = commands.add_parser("curate", help="raw text to the tokens of pre-training")
    curate.set_defaults(command=_curate)
    curate.add_argument("config", help="a YAML file: docs/data.md")
    curate.add_argument("--out", type=Path, required=True, help="a folder; a cut run goes on there")
    curate.add_argument("--workers", type=int, default=2, help="processes")

    mixtures = commands.add_parser("mixtures", help="compare curations by small models' losses")
    mixtures.set_defaults(command=_mixtures)
    _takes_recipe(mixtures, help="a YAML file, of a small model: its pretrain_general is run")
    mixtures.add_argument("--curated", nargs="+", required=True, help="folders of q3mega curate")
    mixtures.add_argument("--out", type=Path, required=True, help="a folder for the runs")

    plan = commands.add_parser("plan", help="memory and time of a step, before a GPU is asked for")
    plan.set_defaults(command=_plan)
    _takes_recipe(plan, nargs="?", help="a YAML file: each of its stages on its layout")
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

    slurm = commands.add_parser("slurm", help="a job script for each stage of a recipe")
    slurm.set_defaults(command=_slurm)
    _takes_recipe(slurm, help="a YAML file")
    slurm.add_argument("--run-dir", help="on a file system of all nodes (default: runs/<name>)")
    slurm.add_argument("--submit", action="store_true", help="put them in the queue, as a chain")

    convert = commands.add_parser("convert", help="weights to megatron-core's format and back")
    convert.set_defaults(command=_convert)
    convert.add_argument("direction", choices=("hf-to-mcore", "mcore-to-hf"))
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("overrides", nargs="*", metavar="axis=ways", help="tensor=2; torchrun")
    convert.add_argument("--verify", action="store_true", help="compare logits with transformers")

    teach = commands.add_parser(
        "serve-teacher", help="a teacher for students of other jobs; torchrun"
    )
    teach.set_defaults(command=_teach)
    teach.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    teach.add_argument("overrides", nargs="*", metavar="axis=ways", help="tensor=8 expert=8")
    teach.add_argument("--port", type=int, required=True, help="of rank 0, where students come")
    teach.add_argument(
        "--network", action="store_true",
        help="take students of other machines, on a network that you trust; needs --key-env",
    )  # fmt: skip
    teach.add_argument("--key-env", help="the environment variable that holds the students' key")
    teach.add_argument(
        "--idle", type=float, default=3600.0, help="seconds without a student that end it"
    )

    for name, command, purpose in (
        ("generate", _generate, "one answer of a checkpoint"),
        ("chat", _chat, "talk to a checkpoint; an empty line ends it"),
        ("eval", _eval, "accuracy of a checkpoint on held-out problems"),
    ):
        sub = commands.add_parser(name, help=purpose)
        sub.set_defaults(command=command)
        sub.set_defaults(mode="think")
        sub.add_argument("checkpoint", help="a Hugging Face folder, such as a stage's hf/")
        sub.add_argument("--max-tokens", type=int, help="of an answer (default: the model's limit)")
        sub.add_argument("--temperature", type=float, help="default: the report's, by mode")
        sub.add_argument("--seed", type=int, default=0)
        if name == "eval":
            sub.add_argument(
                "--tasks",
                nargs="+",
                required=True,
                help="families, capabilities, counterfactual, length_control, think_flags, "
                "tool_use, agent_search, agent_sql, agent_python, rag, ruler:LENGTH, human_eval, "
                "FILE.jsonl",
            )
            sub.add_argument("--mode", choices=("think", "no_think"), default="think")
            sub.add_argument("--tries", type=int, default=1, help="answers a problem, for pass@k")
            sub.add_argument("--problems", type=int, default=100, help="of each task")
            sub.add_argument("--batch", type=int, default=512, help="answers decoded at once")
            sub.add_argument(
                "--budget", type=int, nargs="+", help="thinking budgets, tokens: one run of each"
            )
            sub.add_argument("--out", type=Path, help="a JSON file of the same numbers")
            sub.add_argument(
                "--rewards", nargs="+", default=[], metavar="FILE.py", help="rewards of your own"
            )
        else:
            sub.add_argument(
                "--no-think", dest="mode", action="store_const", const="no_think",
                help="pre-fill an empty think block",
            )  # fmt: skip
            sub.add_argument("--budget", type=int, help="thinking budget, tokens")
        if name == "generate":
            sub.add_argument("--prompt", required=True)

    gap = commands.add_parser(
        "logprob-mismatch", help="log-probabilities: a checkpoint here against servers"
    )
    gap.set_defaults(command=_gap)
    gap.add_argument("checkpoint", type=Path, help="a Hugging Face folder, which the servers hold")
    gap.add_argument("overrides", nargs="*", metavar="axis=ways", help="tensor=2; torchrun")
    other = gap.add_mutually_exclusive_group(required=True)
    other.add_argument("--engine", nargs="+", metavar="URL", help="servers to compare with")
    other.add_argument("--record", type=Path, metavar="FILE", help="keep what this layout computes")
    other.add_argument("--against", type=Path, metavar="FILE", help="compare with such a file")
    gap.add_argument("--kind", choices=("vllm", "sglang"), default="vllm", help="of the servers")
    gap.add_argument("--threshold", type=float, help="of mean |delta log p|: fail above it")
    gap.add_argument("--problems", type=int, default=64, help="prompts, of generated problems")
    gap.add_argument(
        "--routes", action="store_true",
        help="compare a mixture's experts: servers with --enable-return-routed-experts",
    )  # fmt: skip
    gap.add_argument("--max-tokens", type=int, default=256)
    gap.add_argument("--seed", type=int, default=0)

    doctor = commands.add_parser("doctor", help="what is installed, and which backend serves what")
    doctor.set_defaults(command=_doctor)
    return parser


def _takes_recipe(command: argparse.ArgumentParser, **how: Any) -> None:
    command.add_argument("recipe", **how)
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="stage.field=value", help="change a setting"
    )


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


def _curate(arguments: argparse.Namespace) -> int:
    from q3mega.curate.config import Config
    from q3mega.curate.pipeline import curate, table

    if arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers} must be 1 or more")
    print(table(curate(Config.load(arguments.config), arguments.out, arguments.workers)))
    return 0


def _mixtures(arguments: argparse.Namespace) -> int:
    from q3mega.tools.mixtures import compare

    a = arguments
    print(compare(a.recipe, a.curated, a.out, a.overrides))
    return 0


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


def _report(arguments: argparse.Namespace) -> int:
    from q3mega.report.page import publish

    publish(arguments.run_dir)
    return 0


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


def _layout(words: list[str]) -> "Layout":
    """`axis=ways` words, for as many processes as torchrun has started."""
    from q3mega.config.layout import launched, layout_of

    return layout_of(words, processes=launched())


def _convert(arguments: argparse.Namespace) -> int:
    from q3mega.tools.convert import hf_to_mcore, mcore_to_hf

    a = arguments
    layout = _layout(a.overrides)
    move = hf_to_mcore if a.direction == "hf-to-mcore" else mcore_to_hf
    move(a.source, a.target, layout, check=a.verify)
    return 0


def _teach(arguments: argparse.Namespace) -> int:
    from q3mega.inference import teach

    a = arguments
    layout = _layout(a.overrides)
    teach(a.checkpoint, layout, a.port, network=a.network, key_env=a.key_env, idle=a.idle)
    return 0


def _params(arguments: argparse.Namespace, budget: int | None, n: int = 1) -> "SamplingParams":
    from q3mega.inference import longest_answer
    from q3mega.rollout.base import EVALUATION, SamplingParams

    a = arguments
    limit = longest_answer(a.checkpoint) if a.max_tokens is None else a.max_tokens
    how: dict[str, Any] = EVALUATION[a.mode]
    if a.temperature is not None:
        how = how | {"temperature": a.temperature}
    return SamplingParams(limit, **how, thinking_budget=budget, n=n, seed=a.seed)


def _generate(arguments: argparse.Namespace) -> int:
    from q3mega.inference import Checkpoint

    messages = [{"role": "user", "content": _text("--prompt", arguments.prompt)}]
    params = _params(arguments, arguments.budget)
    model = Checkpoint(arguments.checkpoint)
    print(model.answer(messages, params, think=arguments.mode == "think"))
    return 0


def _text(name: str, given: str) -> str:
    """Bytes that are no UTF-8 come from the command line as half surrogate pairs."""
    from q3mega.data.tagged import HALF_PAIR

    if HALF_PAIR.search(given):
        raise UserError(f"{name}={given[:60]!r} is not UTF-8: convert it, as with iconv -t UTF-8")
    return given


def _line() -> str:
    """What the user types next; "" at the end of the input too."""
    try:
        return _text("the line", input("you> ").strip()) if sys.stdin else ""
    except EOFError:
        print()  # the shell's prompt gets a line of its own
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 ({error}): set the terminal to it") from None


def _chat(arguments: argparse.Namespace) -> int:
    from q3mega.inference import Checkpoint

    params = _params(arguments, arguments.budget)
    model, messages = Checkpoint(arguments.checkpoint), list[dict[str, str]]()
    while line := _line():
        messages.append({"role": "user", "content": line})
        text = model.answer(messages, params, think=arguments.mode == "think")
        print(text)
        messages.append({"role": "assistant", "content": text})
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from q3mega.inference import Checkpoint
    from q3mega.io import write_json
    from q3mega.rewards import plugins

    if arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch} must be 1 or more")
    plugins.load(arguments.rewards)
    out: Path | None = arguments.out
    if out and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder")
    budgets = arguments.budget or [None]
    each = {budget: _params(arguments, budget, arguments.tries) for budget in budgets}
    model = Checkpoint(arguments.checkpoint, batch=arguments.batch)
    results = {}
    print(f"{'':<32} value  95 % interval   problems")
    for budget, params in each.items():
        suffix = "" if budget is None else f" at {budget}"
        for name, found in model.score(arguments.tasks, arguments.mode, params, arguments.problems):
            results[name + suffix] = found
            print(
                f"{name + suffix:<32} {found['value']:.3f}  "
                f"[{found['low']:.3f}, {found['high']:.3f}]  {found['n']:>8}"
                + (
                    f"  {found['unscored_fraction']:.1%} unjudged"
                    if "unscored_fraction" in found
                    else ""
                )
            )
        if cut := model.counted.cut_share():
            print(f"cut at {params.max_tokens} tokens: {cut:.0%} (--max-tokens)", file=sys.stderr)
    if out:
        write_json(out, results)
    return 0


def _gap(arguments: argparse.Namespace) -> int:
    from q3mega.inference import gap_of_layouts, gap_to

    a = arguments
    if a.problems < 1:
        raise UserError(f"--problems={a.problems} must be 1 or more")
    layout = _layout(a.overrides)
    if a.engine and layout.processes > 1:
        raise UserError("--engine compares servers with one process: leave torchrun out")
    found = (
        gap_to(a.checkpoint, a.kind, a.engine, a.problems, a.max_tokens, a.seed, routes=a.routes)
        if a.engine
        else gap_of_layouts(a.checkpoint, layout, a.problems, keep=a.record, against=a.against)
    )
    if found is None or (layout.processes > 1 and os.environ["RANK"] != "0"):
        return 0
    print(f"tokens                {found.tokens}")
    print(f"mean |delta log p|    {found.mean:.3g}")
    print(f"max |delta log p|     {found.max:.3g}")
    print(f"KL, nats a token      {found.kl:.3g}")
    print(f"top-1 flipped         {found.flipped:.3g}")
    if found.routes is not None:
        print(f"routes that differ    {found.routes:.3g}")
    if a.threshold is not None and not found.mean <= a.threshold:
        print(
            f"error: mean |delta log p|={found.mean:.3g} is above --threshold {a.threshold:g}: do "
            "both hold these weights, in the same dtype?",
            file=sys.stderr,
        )
        return 1
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from q3mega.tools.doctor import findings

    for name, finding in findings():
        print(f"{name:<32} {finding}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
