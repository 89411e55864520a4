"""What reinforcement learning can be told, and the presets of GRPO's family."""

import math
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from q3mega.config.section import Section
from q3mega.config.workload import PROMPT_TOKENS, Sampling, Workload
from q3mega.errors import UserError

Variant = Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo"]
Aggregate = Literal["token", "sequence", "constant"]


class VariantDefaults(NamedTuple):
    """What a variant means besides its loss.

    aggregate: how tokens' losses become a batch's, see `algorithms.losses.normalise`.
    scale_by_std: advantages are divided by their group's standard deviation.
    """

    aggregate: Aggregate
    scale_by_std: bool = True


VARIANTS: dict[Variant, VariantDefaults] = {
    "grpo": VariantDefaults("sequence"),
    "dapo": VariantDefaults("token"),
    "dr_grpo": VariantDefaults("constant", scale_by_std=False),
    "bnpo": VariantDefaults("token"),
    "gspo": VariantDefaults("sequence"),
    "gspo_token": VariantDefaults("sequence"),
    "cispo": VariantDefaults("token"),
    "sapo": VariantDefaults("sequence"),
}

# What each paper prints. A field that is not here keeps its default, or the variant does not use
# it. No preset sets rollout_correction: it is for the sampler at hand, not part of an algorithm.
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

    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="A published algorithm, which fills in the fields that are not given."
    )
    steps: PositiveInt = Field(description="Rollout batches.")
    prompts: PositiveInt = Field(description="Prompts of a rollout batch.")
    rollouts: Annotated[int, Field(ge=2)] = Field(
        description="Rollouts of each prompt, which are its group."
    )
    updates: PositiveInt = Field(description="Optimizer steps on each rollout batch.")
    max_tokens: PositiveInt = Field(description="Most tokens of an answer, or of a turn.")
    temperature: PositiveFloat = Field(
        1.0, description="Sampling temperature, of which the policy's distribution is."
    )
    schedule: Literal["synchronous", "one_step_off", "asynchronous"] = Field(
        "synchronous",
        description="When a batch is sampled: from the newest weights; from those before the "
        "updates of the batch before it; on servers in the background, up to `staleness` batches "
        "ahead.",
    )
    staleness: PositiveInt = Field(
        1, description="Batches that an asynchronous schedule samples ahead at most."
    )
    variant: Variant = Field("dapo", description="The policy loss, see ops.grpo_loss.")
    clip_low: PositiveFloat = Field(0.2, description="The ratio is clipped at 1 - clip_low.")
    clip_high: PositiveFloat = Field(
        0.28, description="The ratio is clipped at 1 + clip_high; for cispo it is the cap itself."
    )
    aggregate: Aggregate | None = Field(
        None,
        description="How tokens' losses become one: mean over tokens, mean of sequences' means, "
        "or a constant divisor; null: the variant's own.",
    )
    kl_coef: NonNegativeFloat = Field(
        0.0, description="Weight of the KL to the reference policy, the stage's start; 0: none."
    )
    overlong: Literal["none", "penalty", "mask"] = Field(
        "none",
        description="Long answers: penalty falls to -1 over the last fifth of max_tokens; with "
        "mask truncated answers carry no loss.",
    )
    rollout_correction: Literal["none", "tis", "mis", "sequence_mask"] = Field(
        "none",
        description="Correction for the difference between sampler and trainer, from their "
        "log-probabilities before a batch's updates.",
    )
    tis_cap: PositiveFloat = Field(2.0, description="tis: largest importance weight of a token.")
    mis_band: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.5, 2.0), description="mis: importance weights outside of this band become 0."
    )
    sequence_delta: PositiveFloat = Field(
        0.5,
        description="sequence_mask: nats a token beyond which a bad answer carries no loss.",
    )
    routing_replay: Literal["none", "r2", "r3"] = Field(
        "none",
        description="The experts of a batch's updates: the router's own, the trainer's before "
        "them (r2), the sampler's (r3).",
    )
    entropy_target_ratio: NonNegativeFloat = Field(
        0.7, description="The entropy to hold, as a share of the first batch's."
    )
    entropy_coef_step: NonNegativeFloat = Field(
        0.001, description="What a batch adds to the entropy bonus, or takes from it."
    )
    entropy_coef_max: NonNegativeFloat = Field(0.02, description="Largest entropy bonus.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        preset = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        return given if preset is None else preset | given

    @model_validator(mode="after")
    def _band_rises(self) -> Self:
        low, high = self.mis_band
        if low >= high:
            raise UserError(f"mis_band={[low, high]} must rise: the published one is [0.5, 2.0]")
        return self

    @model_validator(mode="after")
    def _asynchronous_on_servers(self) -> Self:
        if self.schedule == "asynchronous" and not self.samples_in_background:
            raise UserError(
                "schedule=asynchronous is for reasoning_rl with servers that sample beside the "
                "training processes: name them in its `rollout_servers`, or take one_step_off"
            )
        return self

    @property
    def samples_in_background(self) -> bool:
        """Whether servers can sample while the trainer updates."""
        return False

    @property
    def aggregation(self) -> Aggregate:
        """`aggregate`, or the variant's own."""
        return self.aggregate or VARIANTS[self.variant].aggregate

    def rl_workload(self, *, in_process: bool) -> Workload:
        """The rollouts and updates, for the planner.

        in_process: the training processes sample.
        """
        sequences = self.prompts * self.rollouts
        return Workload(
            longest=self.max_tokens + PROMPT_TOKENS,
            batch=math.ceil(sequences / self.updates),
            updates=self.updates,
            sampling=Sampling(sequences, self.max_tokens, every_step=True) if in_process else None,
        )
