"""What every stage can be told: where it starts, how it is laid out, saved and optimized."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from q3mega.config.layout import Layout
from q3mega.config.section import Changeable, ChangesRounding, Section
from q3mega.config.servers import RolloutServers
from q3mega.config.workload import InputFiles, Workload
from q3mega.errors import UserError

if TYPE_CHECKING:
    from q3mega.config.rl import RLSettings

Momentum = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Section):
    """What every stage has.

    A stage's class adds its own fields, names its program, and answers `workload` and `inputs`.
    """

    program: ClassVar[str]  # "module:function", which gets the Stage of one process
    trains: ClassVar[Literal["model", "student"]] = "model"
    may_use_fp8: ClassVar[bool] = False

    layout: ChangesRounding[Layout] = Field(
        description="Processes and the axes that split them; what is not given is the recipe's."
    )
    init: str | None = Field(
        None, description="A Hugging Face folder to start from; null: the stage that comes before."
    )
    save_every: Changeable[PositiveInt] = Field(
        50, description="Optimizer steps between checkpoints."
    )
    micro_batch_tokens: ChangesRounding[PositiveInt] = Field(
        4096, description="Most tokens of one rank's packed micro-batch."
    )
    fp8: bool = Field(
        False,
        description="Linear layers compute in fp8, through Transformer Engine; for pre-training.",
    )
    sample_batch: ChangesRounding[PositiveInt] = Field(
        512, description="Sequences that a sampling rank decodes at once."
    )
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="The optimizer.")
    lr: PositiveFloat = Field(description="Peak learning rate; with muon that of matrices.")
    adam_lr: PositiveFloat | None = Field(
        None, description="With muon, the rate of embeddings and norms; null: lr."
    )
    min_lr: NonNegativeFloat = Field(0.0, description="Learning rate at the end of the decay.")
    warmup_steps: NonNegativeInt = Field(
        0, description="Optimizer steps in which the rate rises from 0."
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the rate falls to min_lr over the stage."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")
    clip_grad: NonNegativeFloat = Field(
        1.0, description="Largest norm of the gradient; 0: it is not clipped."
    )
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.95), description="Adam's moments.")
    max_skipped: Changeable[NonNegativeInt] = Field(
        10,
        description="Steps in a row that may be skipped because loss or gradient is not finite.",
    )
    expert_shares: Literal["step", "last_step"] = Field(
        "step",
        description="Whose router choices balance a mixture's experts: the step's own, counted by "
        "one more forward pass, or those of the step before.",
    )

    @model_validator(mode="after")
    def _rates_fall(self) -> Self:
        if self.min_lr > self.lr:
            raise UserError(f"min_lr={self.min_lr} must not exceed lr={self.lr}")
        return self

    @property
    def teacher_elsewhere(self) -> bool:
        """Whether the stage's teacher computes in another job or on a server."""
        return False

    @property
    def rl(self) -> "RLSettings | None":
        """The reinforcement learning that the stage does, if any."""
        return None

    @property
    def sampling_servers(self) -> RolloutServers | None:
        """The servers that sample for the stage; None: its own processes do."""
        return None

    @property
    def longest_answer(self) -> int:
        """The most tokens of an answer in training; 0: the stage samples none."""
        return 0

    @property
    def document_kinds(self) -> Sequence[str]:
        """The kinds of documents that the stage's mixture has."""
        return ()

    def workload(self) -> Workload:
        """What the stage asks of its GPUs. Each stage's class answers."""
        raise NotImplementedError

    def inputs(self) -> InputFiles:
        """What the stage reads besides the recipe's problems."""
        return InputFiles(checkpoints={} if self.init is None else {"init": self.init})

    def check_problems(self, files: Sequence[str]) -> None:
        """UserError where the stage cannot work with the recipe's problems.

        files: the recipe's `problems`; none for the generated families.
        """


class SFT(StageConfig):
    """What the supervised stages after pre-training share."""

    epochs: PositiveInt = Field(description="Passes over the samples.")
    batch_samples: PositiveInt = Field(description="Samples of an optimizer step.")

    def workload(self) -> Workload:
        """See `StageConfig`. A sample counts as a whole micro-batch."""
        return Workload(longest=self.micro_batch_tokens, batch=self.batch_samples)
