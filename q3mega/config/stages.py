"""What each stage can be told: one class a stage, one row in `STAGES`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from q3mega.config.pretraining import Pretrain, PretrainSettings
from q3mega.config.rl import RLSettings
from q3mega.config.section import ChangesRounding, Section
from q3mega.config.servers import ChatModelSpec, Fraction, RolloutServers, TeacherSettings
from q3mega.config.stage import SFT, StageConfig
from q3mega.config.workload import PROMPT_TOKENS, InputFiles, Sampling, Workload
from q3mega.errors import UserError


class ColdStart(SFT):
    """Supervised fine-tuning on long chains of thought that passed two filters."""

    program = "q3mega.stages.cold_start:run"

    queries: PositiveInt = Field(description="Queries before the filters.")
    keep: PositiveInt | None = Field(
        None, description="Queries that the teacher answers; null: all that the balance allows."
    )
    candidates: PositiveInt = Field(description="Answers of the teacher to each query.")
    samples: PositiveInt = Field(description="Samples of the refined subset that is trained on.")
    teacher: ChatModelSpec | None = Field(
        None,
        description="Who answers the problems of files; the generated families have a scripted "
        "teacher.",
    )
    judge: ChatModelSpec | None = Field(
        None, description="Who judges queries and answers; null: rules, and the teacher itself."
    )
    domains: tuple[str, ...] = Field(
        ("mathematics", "code", "logical reasoning", "science"),
        description="What the judge sorts queries into.",
    )

    def check_problems(self, files: Sequence[str]) -> None:
        """See `StageConfig`."""
        if bool(files) != bool(self.teacher):
            raise UserError(
                "stages.cold_start.teacher answers the problems of files: give it together with "
                f"problems={list(files)}"
            )


class Selection(Section):
    """Which problems RL trains on: unused, learnable, as hard as possible, of every family."""

    pool: PositiveInt = Field(description="Problems that are tried.")
    tries: Annotated[int, Field(ge=2)] = Field(
        4, description="Rollouts that measure a problem's pass rate."
    )
    band: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="Pass rates between these are kept, the ends not."
    )
    keep: PositiveInt = Field(description="Problems that are kept, the hardest of each domain.")


class RLStage(StageConfig, RLSettings):
    """What the two stages of reinforcement learning share."""

    rollout_servers: ChangesRounding[RolloutServers | None] = Field(
        None, description="Servers that sample; null: the training processes do."
    )

    @property
    def rl(self) -> RLSettings:
        """See `StageConfig`."""
        return self

    @property
    def sampling_servers(self) -> RolloutServers | None:
        """See `StageConfig`."""
        return self.rollout_servers

    @property
    def longest_answer(self) -> int:
        """See `StageConfig`."""
        return self.max_tokens

    def workload(self) -> Workload:
        """See `StageConfig`."""
        return self.rl_workload(in_process=self.rollout_servers is None)


class ReasoningRL(RLStage):
    """Reinforcement learning on verifiable problems."""

    program = "q3mega.stages.reasoning_rl:run"

    selection: Selection = Field(description="Which problems are trained on.")

    @property
    def samples_in_background(self) -> bool:
        """See `RLSettings`."""
        return self.rollout_servers is not None

    def workload(self) -> Workload:
        """See `StageConfig`."""
        return replace(super().workload(), frozen={"reference": 1} if self.kl_coef else {})


class ModeFusion(SFT):
    """Supervised fine-tuning that puts thinking and direct answers into one model."""

    program = "q3mega.stages.mode_fusion:run"

    thinking_queries: PositiveInt = Field(
        description="Queries that the RL model answers itself; right answers are kept."
    )
    direct: NonNegativeInt = Field(
        0, description="Non-thinking answers to generated reasoning queries."
    )
    general: NonNegativeInt = Field(
        0, description="Non-thinking samples of the generated general tasks."
    )
    non_thinking: dict[str, PositiveInt] = Field(
        {}, description="File of answered chats -> samples that are drawn from it."
    )
    judge: ChatModelSpec | None = Field(
        None, description="Who holds the responses of those chats to checklists; null: nobody."
    )
    skill: Fraction = Field(0.5, description="Share of the general samples that do their task.")
    max_tokens: PositiveInt = Field(description="Most tokens of a thinking answer.")
    budgets: tuple[PositiveInt, ...] = Field(
        description="Tokens of thinking at each point of the thinking-budget curve."
    )
    stop_thinking: str | None = Field(
        None, description="Text that closes the block at the budget; null: the report's sentence."
    )

    @property
    def longest_answer(self) -> int:
        """See `StageConfig`."""
        return self.max_tokens

    def workload(self) -> Workload:
        """See `StageConfig`."""
        return replace(
            super().workload(), sampling=Sampling(self.thinking_queries, self.max_tokens)
        )

    def inputs(self) -> InputFiles:
        """See `StageConfig`."""
        return replace(super().inputs(), answered_chats=tuple(self.non_thinking))

    def check_problems(self, files: Sequence[str]) -> None:
        """See `StageConfig`."""
        if files and self.direct:
            raise UserError(
                f"stages.mode_fusion.direct={self.direct}: problems of files have no scripted "
                "answers; set it to 0 and give answered chats in non_thinking"
            )


class PreferenceSettings(Section):
    """The Bradley-Terry model that scores open queries."""

    file: str | None = Field(
        None, description="Rows of question or messages, chosen, rejected; null: generated ones."
    )
    steps: PositiveInt = Field(60, description="Optimizer steps.")
    pairs: PositiveInt = Field(32, description="Pairs of an optimizer step.")
    lr: PositiveFloat = Field(1e-3, description="Peak learning rate.")


class JudgeSettings(Section):
    """The model that compares a reply with the reference answer."""

    steps: PositiveInt = Field(300, description="Optimizer steps.")
    questions: PositiveInt = Field(32, description="Questions of an optimizer step.")
    lr: PositiveFloat = Field(3e-3, description="Peak learning rate.")


class GeneralRL(RLStage):
    """Reinforcement learning over five capabilities, with three kinds of reward."""

    program = "q3mega.stages.general_rl:run"

    reasoning_share: Fraction = Field(
        description="Share of the prompts that are reasoning problems, so that thinking is kept."
    )
    problems: dict[str, PositiveFloat] = Field(
        {},
        description="File or set of problems -> share of the other prompts; none: generated tasks.",
    )
    judge: JudgeSettings = Field(JudgeSettings(), description="The judge that is trained here.")
    judge_model: ChatModelSpec | None = Field(
        None, description="The judge that is asked instead of one trained here."
    )
    judge_examples: str | None = Field(
        None,
        description="Rows of messages, answer, response, right that calibrate judge_model.",
    )
    preference: PreferenceSettings = Field(
        PreferenceSettings(), description="The preference model that is trained here."
    )

    def workload(self) -> Workload:
        """See `StageConfig`. The reference policy counts among the judges."""
        trained_judge = not self.problems and not self.judge_model
        trained_preference = not self.problems or self.preference.file is not None
        models = (self.kl_coef > 0) + trained_judge + trained_preference
        return replace(super().workload(), frozen={"judges": models})

    def inputs(self) -> InputFiles:
        """See `StageConfig`."""
        return replace(
            super().inputs(),
            problems=tuple(self.problems),
            reward_models={
                "judge": ("judge_model", self.judge_model is not None),
                "preference": ("preference.file", self.preference.file is not None),
            },
            preference_pairs=self.preference.file,
            judge_examples=self.judge_examples,
            runs_programs=not self.problems,  # one of the generated tasks does
        )


class DistillStage(StageConfig, TeacherSettings):
    """What the two distillations share."""

    trains: ClassVar[Literal["model", "student"]] = "student"

    max_tokens: PositiveInt = Field(description="Most tokens of an answer.")

    @property
    def teacher_elsewhere(self) -> bool:
        """See `StageConfig`."""
        return self.teacher_url is not None

    @property
    def longest_answer(self) -> int:
        """See `StageConfig`."""
        return self.max_tokens

    def inputs(self) -> InputFiles:
        """See `StageConfig`."""
        inputs = super().inputs()
        if self.teacher is None:
            return inputs
        return replace(inputs, checkpoints={**inputs.checkpoints, "teacher": self.teacher})


class DistillOffPolicy(DistillStage, SFT):
    """The student learns from the teacher's samples, in both modes; with teacher_topk, from its
    best tokens at each of their positions."""

    program = "q3mega.stages.distill_off_policy:run"

    student_pretraining: PretrainSettings | None = Field(
        None, description="Pre-training of a student that has no init."
    )
    student_lr: PositiveFloat = Field(0.02, description="Peak learning rate of that pre-training.")
    queries: PositiveInt = Field(description="Queries that the teacher answers.")

    @model_validator(mode="after")
    def _teacher_writes(self) -> Self:
        if self.teacher_url is not None and not self.teacher_serves:
            raise UserError(
                f"teacher_url={self.teacher_url}: a q3mega serve-teacher (tcp) writes no text, "
                "and the student learns from it here: give teacher, or a server (http)"
            )
        return self

    def workload(self) -> Workload:
        """See `StageConfig`."""
        sampling = Sampling(self.queries, self.max_tokens, by_teacher=True)
        return replace(
            super().workload(),
            sampling=None if self.teacher_elsewhere else sampling,
            teacher=not self.teacher_elsewhere,
        )


class DistillOnPolicy(DistillStage):
    """The student learns from the teacher's distribution on its own samples: from the whole of it,
    or with teacher_topk from its best tokens."""

    program = "q3mega.stages.distill_on_policy:run"

    steps: PositiveInt = Field(description="Optimizer steps.")
    prompts: PositiveInt = Field(description="Prompts of a step, with one sample each.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "reverse_kl", description="What is minimised between teacher and student."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Temperature of both distributions in the divergence."
    )
    compare_rl: RLSettings | None = Field(
        None, description="RL from the same start, for the report's Table 21; null: none."
    )
    compare_rl_lr: PositiveFloat = Field(3e-4, description="Peak learning rate of that RL.")
    compare_sft_samples: NonNegativeInt = Field(
        0, description="Samples of more off-policy data from the same start; 0: none."
    )

    @model_validator(mode="after")
    def _teacher_can(self) -> Self:
        if self.teacher_serves and self.temperature != 1:
            raise UserError(
                f"temperature={self.temperature}: a server gives log-probabilities at temperature "
                "1; leave it there, or run the teacher by q3mega serve-teacher"
            )
        if self.teacher_url and not self.teacher_serves and self.compare_sft_samples:
            raise UserError(
                f"compare_sft_samples={self.compare_sft_samples}: teacher_url={self.teacher_url} "
                "writes no text; set it to 0"
            )
        return self

    @property
    def rl(self) -> RLSettings | None:
        """See `StageConfig`."""
        return self.compare_rl

    def workload(self) -> Workload:
        """See `StageConfig`."""
        return Workload(
            longest=self.max_tokens + PROMPT_TOKENS,
            batch=self.prompts,
            sampling=Sampling(self.prompts, self.max_tokens, every_step=True),
            teacher=not self.teacher_elsewhere,
            teacher_forward=not self.teacher_elsewhere,
        )


STAGES: dict[str, type[StageConfig]] = {
    "pretrain_general": Pretrain,
    "pretrain_reasoning": Pretrain,
    "pretrain_long": Pretrain,
    "cold_start": ColdStart,
    "reasoning_rl": ReasoningRL,
    "mode_fusion": ModeFusion,
    "general_rl": GeneralRL,
    "distill_off_policy": DistillOffPolicy,
    "distill_on_policy": DistillOnPolicy,
}
