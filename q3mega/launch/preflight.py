"""What is checked before a stage computes: rows of files, rewards, the sandbox."""

import itertools
import re
from pathlib import Path

from q3mega.config.layout import check_layout
from q3mega.config.recipe import Recipe
from q3mega.config.workload import InputFiles
from q3mega.environments.environment import environment_of
from q3mega.errors import UserError
from q3mega.model.config import shape_of
from q3mega.problems import Problem, files
from q3mega.problems.pool import Pool
from q3mega.rewards import (
    MODELS,
    Verdict,
    model_rewards_of,
    plugins,
    reward_names,
    reward_of,
    score_problem,
)
from q3mega.sandbox import confinement

LONGEST = 131_072  # tokens of a prompt: Qwen3's context, with YaRN
_PIECE = re.compile(r"\d|[^\W\d_]+")  # each is a token or more: a digit, a run of letters


def check_files(recipe: Recipe) -> None:
    """UserError for a row that a stage could not use, before any of them computes."""
    _check_folders(recipe)
    plugins.load(recipe.rewards)
    for problem in Pool(recipe.problems):
        _check_length(problem)
        if models := model_rewards_of(problem):
            raise UserError(
                f"problems: reward={models[0]} of {problem.question[:60]!r} asks a model, and "
                "reasoning RL takes rules alone: give it to general_rl.problems"
            )
        if environment_of(problem):
            raise UserError(
                f"problems: {problem.question[:60]!r} has tools to run, and reasoning RL samples "
                "one turn: give it to general_rl.problems"
            )
        _check_sandbox(problem)
        _try_reward(problem)
    check_checkpoints(recipe)
    for name, stage in recipe.stages.items():
        _check_inputs(name, stage.inputs())


def check_checkpoints(recipe: Recipe) -> None:
    """UserError for a named folder whose config.json asks for what is not computed here, or whose
    model the stage's layout cannot split."""
    for stage in recipe.stages.values():
        for folder in stage.inputs().checkpoints.values():
            if (Path(folder) / "config.json").exists():
                check_layout(stage.layout, shape_of(folder))


def _check_inputs(stage: str, inputs: InputFiles) -> None:
    """UserError for what a stage reads besides the recipe's problems."""
    for name in inputs.answered_chats:
        files.answered(name)
    if inputs.runs_programs:
        confinement()
    for problem in itertools.chain.from_iterable(Pool([name]) for name in inputs.problems):
        _check_length(problem)
        _check_sandbox(problem)
        _try_reward(problem)
        environment_of(problem)  # which its tools must be able to work on
        for name in model_rewards_of(problem):
            field, given = inputs.reward_models[name]
            if not given:
                raise UserError(
                    f"{stage}.{field}: reward={name} of {problem.question[:60]!r} needs it"
                )
    if inputs.preference_pairs:
        files.pairs(inputs.preference_pairs)
    if inputs.judge_examples:
        files.judged(inputs.judge_examples)


def _check_length(problem: Problem) -> None:
    """Whether a prompt is longer than any context, however it is tokenized."""
    characters = sum(len(turn["content"]) for turn in problem.messages)
    if characters < LONGEST:
        return
    tokens = sum(len(_PIECE.findall(turn["content"])) for turn in problem.messages)
    if tokens > LONGEST:
        at = f" ({problem.meta['where']})" if "where" in problem.meta else ""
        raise UserError(
            f"problems: {problem.question[:60]!r}{at} is {tokens} tokens long or more, and the "
            f"longest context is {LONGEST}: shorten it, or leave the row out"
        )


def _try_reward(problem: Problem) -> None:
    """What the rewards need of the row, and whether those of users get through an empty reply."""
    scored = dict.fromkeys(MODELS, Verdict(0.0, "not asked"))
    score_problem(problem, "", tokens=0, max_tokens=1, scored=scored)


def _check_folders(recipe: Recipe) -> None:
    """Weights and tokenizers that are there before the run; a stage's hf/ may be this run's own."""
    expected = {"tokenizer.path": (recipe.tokenizer.path, "tokenizer.json")}
    for name, stage in recipe.stages.items():
        for field, folder in stage.inputs().checkpoints.items():
            if Path(folder).parent.name[3:] not in recipe.stages:
                expected[f"stages.{name}.{field}"] = (folder, "config.json")
    for field, (path, file) in expected.items():
        if path is not None and not (Path(path) / file).is_file():
            raise UserError(f"{field}={path}: there is no {file}; name a Hugging Face folder")


def _check_sandbox(problem: Problem) -> None:
    if "code" in reward_names(reward_of(problem)):
        confinement()
