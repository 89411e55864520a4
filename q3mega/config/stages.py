"""What each stage can be told: one class a stage, one line a setting, one row in `STAGES`."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from q3mega.config.layout import Layout
from q3mega.config.section import Free, Rounds, Section
from q3mega.config.servers import ChatModelSpec, Fraction, RolloutServers, TeacherSettings
from q3mega.errors import UserError

Kind = Literal[
    "prose", "code", "science", "facts", "worked", "direct", "chat", "retrieval", "retrieval_long",
]  # fmt: skip
Curated = Annotated[str, Field(pattern="^curated:.")]  # a folder that q3mega curate has written
Momentum = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Section):
    """What every stage has: where it starts, how it is laid out, saved and optimized."""

    trains: ClassVar[Literal["model", "student"]] = "model"

    layout: Rounds[Layout]
    init: str | None = None  # a Hugging Face folder; None: the stage that comes before
    save_every: Free[PositiveInt] = 50  # optimizer steps
    micro_batch_tokens: Rounds[PositiveInt] = 4096  # a rank's packed micro-batch holds at most
    fp8: bool = False  # pre-training's linear layers, through Transformer Engine
    sample_batch: Rounds[PositiveInt] = 512  # sequences that a sampling rank decodes at once
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat
    adam_lr: PositiveFloat | None = None  # with muon: embeddings and norms; None: lr
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    max_skipped: Free[NonNegativeInt] = 10  # steps in a row whose loss or gradient is not finite
    # whose choices balance a mixture: "step" counts its own first, by a forward pass more
    expert_shares: Literal["step", "last_step"] = "step"

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.min_lr > self.lr:
            raise UserError(f"min_lr={self.min_lr} must not exceed lr={self.lr}")
        return self


class PretrainSettings(Section):
    """One pass over a mixture of documents (kinds: q3mega.corpus.documents)."""

    steps: PositiveInt
    tokens_per_step: PositiveInt
    sequence: PositiveInt  # longest document, tokens
    mixture: dict[Kind | Curated, PositiveFloat]  # share of the tokens


class Extension(Section):
    """Beyond the training length: YaRN and dual-chunk attention, at inference."""

    factor: PositiveFloat = 4.0
    chunk_size: PositiveInt
    local_size: PositiveInt
    documents: PositiveInt = 400  # of the retrieval evaluation, one pass key each


class Pretrain(StageConfig, PretrainSettings):
    """One of the three pre-training stages."""

    rope_base: PositiveFloat | None = None  # ABF: another base from here on
    extension: Extension | None = None


class SFT(StageConfig):
    """What the supervised stages share."""

    epochs: PositiveInt
    batch_samples: PositiveInt  # samples an optimizer step


class ColdStart(SFT):
    """Supervised fine-tuning on long chains of thought that passed two filters."""

    queries: PositiveInt  # before the filters
    keep: PositiveInt | None = None  # queries for the teacher; None: all that balance allows
    candidates: PositiveInt  # answers a query, from the teacher
    samples: PositiveInt  # the refined subset that is trained on
    # of problems from files; the generated families have a scripted teacher
    teacher: ChatModelSpec | None = None
    judge: ChatModelSpec | None = None  # None: rules, and the teacher without thinking
    # what the judge sorts queries into
    domains: tuple[str, ...] = ("mathematics", "code", "logical reasoning", "science")


# What each paper prints; what is not here keeps its default or is not used by the variant. The
# correction is none in all of them: it is for the sampler at hand, not part of an algorithm.
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath 2402.03300; the clip is PPO's
    "grpo": {"variant": "grpo", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "sequence",
             "kl_coef": 0.04},
    # 2503.14476
    "dapo": {"variant": "dapo", "clip_low": 0.2, "clip_high": 0.28, "aggregate": "token",
             "kl_coef": 0.0, "overlong": "penalty"},
    # 2503.20783: no standard deviation, a constant divisor
    "dr_grpo": {"variant": "dr_grpo", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "constant",
                "kl_coef": 0.0},
    # 2507.18071
    "gspo": {"variant": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence",
             "kl_coef": 0.0},
    "gspo_token": {"variant": "gspo_token", "clip_low": 3e-4, "clip_high": 4e-4,
                   "aggregate": "sequence", "kl_coef": 0.0},
    # MiniMax-M1 2506.13585, which does not print its cap on the ratio: ScaleRL's and TRL's
    "cispo": {"variant": "cispo", "clip_high": 5.0, "aggregate": "token", "kl_coef": 0.0},
    # 2511.20347
    "sapo": {"variant": "sapo", "aggregate": "sequence", "kl_coef": 0.0},
}  # fmt: skip


class RLSettings(Section):
    """Rollouts and policy updates; `preset` fills in what is not given (docs/rl.md)."""

    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    steps: PositiveInt  # rollout batches
    prompts: PositiveInt  # a rollout batch
    rollouts: Annotated[int, Field(ge=2)]  # a prompt
    updates: PositiveInt  # optimizer steps a rollout batch
    max_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    # one_step_off: a batch is sampled from the weights before the updates of the one before it;
    # asynchronous: servers sample in the background, up to `staleness` batches ahead
    schedule: Literal["synchronous", "one_step_off", "asynchronous"] = "synchronous"
    staleness: PositiveInt = 1
    variant: Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo"] = (
        "dapo"
    )
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    aggregate: Literal["token", "sequence", "constant"] | None = None  # None: the variant's own
    kl_coef: NonNegativeFloat = 0.0
    # penalty: to -1 over the last fifth of max_tokens; mask: truncated completions carry no loss
    overlong: Literal["none", "penalty", "mask"] = "none"
    # between sampler and trainer, from their log-probabilities at the start of a batch's updates
    rollout_correction: Literal["none", "tis", "mis", "sequence_mask"] = "none"
    tis_cap: PositiveFloat = 2.0  # highest importance weight of a token
    mis_band: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)  # weights outside of it become 0
    sequence_delta: PositiveFloat = 0.5  # nats a token; bad completions further off are masked
    # the experts of a batch's updates: those of the trainer before them (r2), of the sampler (r3)
    routing_replay: Literal["none", "r2", "r3"] = "none"
    entropy_target_ratio: NonNegativeFloat = (
        0.7  # the controller's target, of the first batch's entropy
    )
    entropy_coef_step: NonNegativeFloat = 0.001
    entropy_coef_max: NonNegativeFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        row = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        return given if row is None else row | given

    @model_validator(mode="after")
    def _band(self) -> Self:
        low, high = self.mis_band
        if low >= high:
            raise UserError(f"mis_band={[low, high]} must rise: the published one is [0.5, 2.0]")
        return self

    @model_validator(mode="after")
    def _beside(self) -> Self:
        beside = isinstance(self, ReasoningRL) and self.rollout_servers is not None
        if self.schedule == "asynchronous" and not beside:
            raise UserError(
                "schedule=asynchronous is for reasoning_rl with servers that sample beside the "
                "training processes: name them in its `engine`, or take one_step_off"
            )
        return self


class Selection(Section):
    """Which problems RL trains on: unused, learnable, as hard as possible, of every family."""

    pool: PositiveInt
    tries: Annotated[int, Field(ge=2)] = 4  # rollouts that measure a problem's pass rate
    band: tuple[Fraction, Fraction] = (0.0, 1.0)  # pass rates between these are kept
    keep: PositiveInt


class ReasoningRL(StageConfig, RLSettings):
    """Reinforcement learning on verifiable problems."""

    selection: Selection
    rollout_servers: Rounds[RolloutServers | None] = None  # None: the training processes sample


class ModeFusion(SFT):
    """Supervised fine-tuning that puts thinking and direct answers into one model."""

    thinking_queries: PositiveInt  # answered by the RL model itself, kept when right
    direct: NonNegativeInt = 0  # non-thinking answers to generated reasoning queries
    general: NonNegativeInt = 0  # non-thinking samples of the generated general tasks
    non_thinking: dict[str, PositiveInt] = Field(
        {}
    )  # file of answered chats -> samples drawn from it
    judge: ChatModelSpec | None = None  # holds the responses of those to checklists
    skill: Fraction = 0.5  # share of general samples that do their task
    max_tokens: PositiveInt
    budgets: tuple[PositiveInt, ...]  # of the thinking-budget curve, tokens
    stop_thinking: str | None = None  # closes the block at the budget; None: the report's sentence


class PreferenceModel(Section):
    """The Bradley-Terry model that scores open queries."""

    file: str | None = None  # rows of question or messages, chosen, rejected; None: generated
    steps: PositiveInt = 60
    pairs: PositiveInt = 32  # a step
    lr: PositiveFloat = 1e-3


class JudgeModel(Section):
    """The model that compares a reply with the reference answer."""

    steps: PositiveInt = 300
    questions: PositiveInt = 32  # a step
    lr: PositiveFloat = 3e-3


class GeneralRL(StageConfig, RLSettings):
    """Reinforcement learning over five capabilities, with three kinds of reward."""

    reasoning_share: Fraction  # of the prompts: reasoning problems, so that thinking is kept
    # file or set -> share of the other prompts; none: the generated tasks
    problems: dict[str, PositiveFloat] = Field({})
    judge: JudgeModel = JudgeModel()  # trained here
    judge_model: ChatModelSpec | None = None  # asked instead of one trained here
    judge_examples: str | None = None  # rows of messages, answer, response, right: its calibration
    preference: PreferenceModel = PreferenceModel()
    rollout_servers: Rounds[RolloutServers | None] = None


class DistillOffPolicy(SFT, TeacherSettings):
    """The student learns from the teacher's samples, in both modes; with teacher_topk, from its
    best tokens at each of their positions."""

    trains = "student"

    student_pretraining: PretrainSettings | None = None  # before distillation; needs no init
    student_lr: PositiveFloat = 0.02
    queries: PositiveInt
    max_tokens: PositiveInt

    @model_validator(mode="after")
    def _teacher_writes(self) -> Self:
        if self.teacher_url is not None and not self.teacher_serves:
            raise UserError(
                f"teacher_url={self.teacher_url}: a q3mega serve-teacher (tcp) writes no text, and "
                "the student learns from it here: give teacher, or a server (http)"
            )
        return self


class DistillOnPolicy(StageConfig, TeacherSettings):
    """The student learns from the teacher's distribution on its own samples: from the whole of it,
    or with teacher_topk from its best tokens."""

    trains = "student"

    steps: PositiveInt
    prompts: PositiveInt  # a step, one sample each
    max_tokens: PositiveInt
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    temperature: PositiveFloat = 1.0
    compare_rl: RLSettings | None = None  # Table 21: RL from the same start
    compare_rl_lr: PositiveFloat = 3e-4
    compare_sft_samples: NonNegativeInt = 0  # and more off-policy data from the same start

    @model_validator(mode="after")
    def _teacher_can(self) -> Self:
        if self.teacher_serves and self.temperature != 1:
            raise UserError(
                f"temperature={self.temperature}: a server tells log-probabilities at temperature "
                "1; leave it there, or run the teacher by q3mega serve-teacher"
            )
        if self.teacher_url and not self.teacher_serves and self.compare_sft_samples:
            raise UserError(
                f"compare_sft_samples={self.compare_sft_samples}: teacher_url={self.teacher_url} "
                "writes no text; set it to 0"
            )
        return self


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
