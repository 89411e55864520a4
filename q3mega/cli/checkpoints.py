"""Commands that take a Hugging Face folder."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3mega.cli.arguments import Commands, layout_of_words
from q3mega.errors import UserError

if TYPE_CHECKING:
    from q3mega.rollout.base import SamplingParams


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    _add_convert(commands)
    _add_serve_teacher(commands)
    _add_sampling(commands)
    _add_logprob_mismatch(commands)


def _add_convert(commands: "Commands[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser("convert", help="weights to megatron-core's format and back")
    convert.set_defaults(command=_convert)
    convert.add_argument("direction", choices=("hf-to-mcore", "mcore-to-hf"))
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("overrides", nargs="*", metavar="axis=ways", help="tensor=2; torchrun")
    convert.add_argument("--verify", action="store_true", help="compare logits with transformers")


def _convert(arguments: argparse.Namespace) -> int:
    from q3mega.tools.convert import hf_to_mcore, mcore_to_hf

    a = arguments
    layout = layout_of_words(a.overrides)
    move = hf_to_mcore if a.direction == "hf-to-mcore" else mcore_to_hf
    move(a.source, a.target, layout, check=a.verify)
    return 0


def _add_serve_teacher(commands: "Commands[argparse.ArgumentParser]") -> None:
    teach = commands.add_parser(
        "serve-teacher", help="a teacher for students of other jobs; torchrun"
    )
    teach.set_defaults(command=_serve_teacher)
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


def _serve_teacher(arguments: argparse.Namespace) -> int:
    from q3mega.inference import serve_teacher

    a = arguments
    layout = layout_of_words(a.overrides)
    serve_teacher(a.checkpoint, layout, a.port, network=a.network, key_env=a.key_env, idle=a.idle)
    return 0


def _add_sampling(commands: "Commands[argparse.ArgumentParser]") -> None:
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
        for name, result in model.score(
            arguments.tasks, arguments.mode, params, arguments.problems
        ):
            results[name + suffix] = result
            print(
                f"{name + suffix:<32} {result['value']:.3f}  "
                f"[{result['low']:.3f}, {result['high']:.3f}]  {result['n']:>8}"
                + (
                    f"  {result['unscored_fraction']:.1%} unjudged"
                    if "unscored_fraction" in result
                    else ""
                )
            )
        if cut := model.counted.cut_share():
            print(f"cut at {params.max_tokens} tokens: {cut:.0%} (--max-tokens)", file=sys.stderr)
    if out:
        write_json(out, results)
    return 0


def _add_logprob_mismatch(commands: "Commands[argparse.ArgumentParser]") -> None:
    mismatch = commands.add_parser(
        "logprob-mismatch", help="log-probabilities: a checkpoint here against servers"
    )
    mismatch.set_defaults(command=_logprob_mismatch)
    mismatch.add_argument(
        "checkpoint", type=Path, help="a Hugging Face folder, which the servers hold"
    )
    mismatch.add_argument("overrides", nargs="*", metavar="axis=ways", help="tensor=2; torchrun")
    other = mismatch.add_mutually_exclusive_group(required=True)
    other.add_argument("--servers", nargs="+", metavar="URL", help="servers to compare with")
    other.add_argument("--record", type=Path, metavar="FILE", help="keep what this layout computes")
    other.add_argument("--against", type=Path, metavar="FILE", help="compare with such a file")
    mismatch.add_argument(
        "--kind", choices=("vllm", "sglang"), default="vllm", help="of the servers"
    )
    mismatch.add_argument("--threshold", type=float, help="of mean |delta log p|: fail above it")
    mismatch.add_argument("--problems", type=int, default=64, help="prompts, of generated problems")
    mismatch.add_argument(
        "--routes", action="store_true",
        help="compare a mixture's experts: servers with --enable-return-routed-experts",
    )  # fmt: skip
    mismatch.add_argument("--max-tokens", type=int, default=256)
    mismatch.add_argument("--seed", type=int, default=0)


def _logprob_mismatch(arguments: argparse.Namespace) -> int:
    from q3mega.inference import mismatch_of_layouts, mismatch_to_servers

    a = arguments
    if a.problems < 1:
        raise UserError(f"--problems={a.problems} must be 1 or more")
    layout = layout_of_words(a.overrides)
    if a.servers and layout.processes > 1:
        raise UserError("--servers compares servers with one process: leave torchrun out")
    measured = (
        mismatch_to_servers(
            a.checkpoint, a.kind, a.servers, a.problems, a.max_tokens, a.seed, routes=a.routes
        )
        if a.servers
        else mismatch_of_layouts(a.checkpoint, layout, a.problems, keep=a.record, against=a.against)
    )
    if measured is None or (layout.processes > 1 and os.environ["RANK"] != "0"):
        return 0
    print(f"tokens                {measured.tokens}")
    print(f"mean |delta log p|    {measured.mean:.3g}")
    print(f"max |delta log p|     {measured.max:.3g}")
    print(f"KL, nats a token      {measured.kl:.3g}")
    print(f"top-1 flipped         {measured.flipped:.3g}")
    if measured.routes is not None:
        print(f"routes that differ    {measured.routes:.3g}")
    if a.threshold is not None and not measured.mean <= a.threshold:
        print(
            f"error: mean |delta log p|={measured.mean:.3g} is above --threshold "
            f"{a.threshold:g}: do both hold these weights, in the same dtype?",
            file=sys.stderr,
        )
        return 1
    return 0
