"""What a stage's settings say to those who check and plan it before anything computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PROMPT_TOKENS = 256  # of a question, which a recipe does not know


@dataclass(frozen=True)
class Sampling:
    """What the training processes of a stage sample.

    sequences: at once, of a step or of the whole stage.
    tokens: the longest answer.
    by_teacher: the recipe's model samples, and not the one that is trained.
    every_step: the sampling is part of each step, and not of the stage's preparation.
    """

    sequences: int
    tokens: int
    by_teacher: bool = False
    every_step: bool = False


@dataclass(frozen=True)
class Workload:
    """What a stage asks of its GPUs, for the planner.

    longest: tokens of the longest sequence that is trained on.
    batch: sequences of an optimizer step.
    updates: optimizer steps of one step of the stage.
    sampling: None where servers sample, or nobody.
    frozen: models of the trained shape that are held beside it, by what they are for.
    teacher: the recipe's model is held beside the trained one.
    teacher_forward: it computes a forward pass of every step.
    """

    longest: int
    batch: int
    updates: int = 1
    sampling: Sampling | None = None
    frozen: Mapping[str, int] = field(default_factory=dict)
    teacher: bool = False
    teacher_forward: bool = False


@dataclass(frozen=True)
class InputFiles:
    """What a stage reads, for the check before a run.

    checkpoints: Hugging Face folders, by the field that names them.
    problems: files and sets of problems, which may have tools and ask models.
    reward_models: of each reward that asks a model, the field that gives one and whether it does.
    answered_chats: files of chats with their answers.
    preference_pairs, judge_examples: files of rows, or None.
    runs_programs: the sandbox is needed, whatever the problems are.
    """

    checkpoints: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    reward_models: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    answered_chats: tuple[str, ...] = ()
    preference_pairs: str | None = None
    judge_examples: str | None = None
    runs_programs: bool = False
