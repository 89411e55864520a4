"""The validated recipe: YAML in, one typed, frozen object out.

A stage is one class below and one row of `STAGES`; a setting is one line in its class. Whatever is
wrong with a file or an override becomes a `UserError` of one line that names the dotted path.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from q3mega.errors import UserError
from q3mega.model.sizes import QWEN3, Qwen3Shape
from q3mega.sections import Section, explain, field_names, override, parse_yaml, short

Kind = Literal[
    "prose", "code", "science", "facts", "worked", "direct", "chat", "retrieval", "retrieval_long",
]  # fmt: skip
Curated = Annotated[str, Field(pattern="^curated:.")]  # a folder that q3mega curate has written
Recompute = Literal["none", "norms", "experts", "full"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class TokenizerSpec(Section):
    """Either trained on the recipe's own text to `vocab_size` entries, or read from a folder."""

    vocab_size: PositiveInt | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.vocab_size is None) == (self.path is None):
            raise UserError("give either vocab_size (train one) or path (a Hugging Face folder)")
        return self


class ModelSpec(Section):
    """A Qwen3 shape, written out or derived: `size` fills in every number that is not given."""

    size: Literal[tuple(QWEN3)] | None = None  # type: ignore[valid-type]
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: PositiveInt
    experts: NonNegativeInt = 0
    topk: PositiveInt = 2
    moe_ffn: NonNegativeInt = 0
    balance: NonNegativeFloat = 1e-3  # coefficient of the experts' load-balancing loss
    tied: bool = True
    rope_base: PositiveFloat = 1e4

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        base = QWEN3.get(str(given.get("size"))) if isinstance(given, dict) else None
        if base is None:
            return given
        return {k: v for k, v in asdict(base).items() if k in cls.model_fields} | given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.experts and not self.moe_ffn:
            raise UserError(f"experts={self.experts} needs moe_ffn, the width of one expert")
        self.shape()
        return self

    def shape(self, vocab: int = Qwen3Shape.vocab) -> Qwen3Shape:
        """The table row, for a tokenizer of `vocab` entries (default: the released one)."""
        return Qwen3Shape(vocab=vocab, **self.model_dump(exclude={"size"}))


class Layout(Section):
    """How many processes train, and along which axes of megatron-core they split the work."""

    processes: PositiveInt
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    recompute: Recompute = "none"  # in the backward: RMSNorms, all of an expert layer, every layer

    def counts_ends(self, layers: int) -> bool:
        """Whether embedding and lm_head each count as a layer, since pipelines divide only so."""
        chunks = self.pipeline * self.virtual_pipeline
        return layers % chunks > 0 and (layers + 2) % chunks == 0 and layers + 2 > chunks


def check_layout(layout: Layout, model: ModelSpec | Qwen3Shape) -> None:
    """Raise UserError on the first rule of megatron-core that `layout` breaks for `model`."""

    def divides(field: str, divisor: int, of: str, whole: int) -> None:
        if whole % divisor:
            raise UserError(f"layout.{field}={divisor} does not divide {of}={whole}")

    grid = "tensor * pipeline * context"
    divides(grid, layout.tensor * layout.pipeline * layout.context, "processes", layout.processes)
    divides("tensor", layout.tensor, "heads", model.heads)
    divides("tensor", layout.tensor, "kv_heads", model.kv_heads)
    divides("tensor", layout.tensor, "ffn", model.ffn)
    chunks = layout.pipeline * layout.virtual_pipeline
    if model.layers % chunks and not layout.counts_ends(model.layers):
        raise UserError(
            f"layout.pipeline * virtual_pipeline={chunks} divides neither layers={model.layers} "
            "nor, with embedding and lm_head counted as one each, two more"
        )
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError(
            f"layout.virtual_pipeline={layout.virtual_pipeline} needs layout.pipeline > 1"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise UserError("layout.sequence_parallel=True needs layout.tensor > 1")
    if not model.experts:
        if layout.recompute == "experts":
            raise UserError(f"layout.recompute={layout.recompute} needs experts, this is dense")
        for field in ("expert", "expert_tensor"):
            if (ways := getattr(layout, field)) > 1:
                raise UserError(f"layout.{field}={ways} needs a model with experts, this is dense")
        return
    divides("expert", layout.expert, "experts", model.experts)
    divides("expert_tensor", layout.expert_tensor, "moe_ffn", model.moe_ffn)
    grid = "expert * expert_tensor * pipeline"
    size = layout.expert * layout.expert_tensor * layout.pipeline
    divides(grid, size, "processes", layout.processes)
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            f"layout.tensor={layout.tensor} of a mixture of experts needs "
            "layout.sequence_parallel=true"
        )


class Slurm(Section):
    """What `q3mega slurm` asks the cluster for; nodes follow from a stage's layout."""

    processes_per_node: PositiveInt = 8
    gpus: bool = True  # one a process
    cpus_per_process: PositiveInt = 8
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"  # a stage's limit
    setup: tuple[str, ...] = ()  # shell lines before the ranks start: modules, a container


def layout_of(overrides: Sequence[str], processes: int) -> Layout:
    """A layout of `axis=ways` words; UserError for what is none."""
    raw: dict[str, Any] = {"processes": processes}
    for word in overrides:
        field, _, value = word.partition("=")
        raw[field] = parse_yaml(value, f"override {short(word)}")
    try:
        return Layout.model_validate(raw)
    except ValidationError as error:
        names = partial(field_names, Layout)
        raise UserError(f"layout.{explain(error.errors()[0], names)}") from None


class StageConfig(Section):
    """What every stage has: where it starts, how it is laid out, saved and optimized."""

    trains: ClassVar[Literal["model", "student"]] = "model"

    layout: Layout
    init: str | None = None  # a Hugging Face folder; None: the stage that comes before
    save_every: PositiveInt = 50  # optimizer steps
    micro_batch_tokens: PositiveInt = 4096  # a rank's packed micro-batch holds at most so many
    fp8: bool = False  # pre-training's linear layers, through Transformer Engine
    sample_batch: PositiveInt = 512  # sequences that a sampling rank decodes at once
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat
    adam_lr: PositiveFloat | None = None  # with muon: embeddings and norms; None: lr
    min_lr: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.min_lr > self.lr:
            raise UserError(f"min_lr={self.min_lr} must not exceed lr={self.lr}")
        return self


class PretrainSettings(Section):
    """One pass over a mixture of documents (kinds: q3mega.data.corpus)."""

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
    candidates: PositiveInt  # answers a query, from the teacher
    samples: PositiveInt  # the refined subset that is trained on


class RLSettings(Section):
    """Rollouts and policy updates; published presets: QWEN3_FACTS section 7."""

    steps: PositiveInt  # rollout batches
    prompts: PositiveInt  # a rollout batch
    rollouts: Annotated[int, Field(ge=2)]  # a prompt
    updates: PositiveInt  # optimizer steps a rollout batch
    max_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    variant: Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo"] = (
        "dapo"
    )
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    kl_coef: NonNegativeFloat = 0.0
    entropy_hold: NonNegativeFloat = 0.7  # the controller's target, of the first batch's entropy
    entropy_step: NonNegativeFloat = 0.001
    entropy_limit: NonNegativeFloat = 0.02


class Selection(Section):
    """Which problems RL trains on: unused, learnable, as hard as possible, of every family."""

    pool: PositiveInt
    tries: Annotated[int, Field(ge=2)] = 4  # rollouts that measure a problem's pass rate
    keep: PositiveInt


class ReasoningRL(StageConfig, RLSettings):
    """Reinforcement learning on verifiable problems."""

    selection: Selection


class ModeFusion(SFT):
    """Supervised fine-tuning that puts thinking and direct answers into one model."""

    thinking_queries: PositiveInt  # answered by the RL model itself, kept when right
    direct: PositiveInt  # non-thinking answers to reasoning queries
    general: PositiveInt  # non-thinking samples of the general tasks
    skill: Fraction = 0.5  # share of general samples that do their task
    max_tokens: PositiveInt
    budgets: tuple[PositiveInt, ...]  # of the thinking-budget curve, tokens
    stop_thinking: str | None = None  # closes the block at the budget; None: the report's sentence


class PreferenceModel(Section):
    """The Bradley-Terry model that scores open queries."""

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
    judge: JudgeModel = JudgeModel()
    preference: PreferenceModel = PreferenceModel()


class DistillOffPolicy(SFT):
    """The student learns from the teacher's samples, in both modes."""

    trains = "student"

    teacher: str | None = None  # a Hugging Face folder; None: the latest stage of the model
    student_pretraining: PretrainSettings | None = None  # before distillation; needs no init
    student_lr: PositiveFloat = 0.02
    queries: PositiveInt
    max_tokens: PositiveInt


class DistillOnPolicy(StageConfig):
    """The student learns from the teacher's distribution on its own samples."""

    trains = "student"

    teacher: str | None = None
    steps: PositiveInt
    prompts: PositiveInt  # a step, one sample each
    max_tokens: PositiveInt
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    temperature: PositiveFloat = 1.0
    compare_rl: RLSettings | None = None  # Table 21: RL from the same start
    compare_rl_lr: PositiveFloat = 3e-4
    compare_sft_samples: NonNegativeInt = 0  # and more off-policy data from the same start


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


class Recipe(Section):
    """A whole run. `stages` keeps the file's order, and each stage's layout is complete."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    seed: NonNegativeInt
    tokenizer: TokenizerSpec
    model: ModelSpec  # also the teacher's
    student: ModelSpec | None = None
    layout: Layout
    precision: Literal["fp32", "bf16"] = "fp32"  # of weights; gradients and Adam are fp32
    slurm: Slurm = Slurm()
    stages: dict[str, SerializeAsAny[StageConfig]]

    @model_validator(mode="before")
    @classmethod
    def _inherit_layout(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
            return raw
        default = raw.get("layout")
        stages = {
            name: {**stage, "layout": _over(default, stage.get("layout"))}
            if isinstance(stage, dict)
            else stage
            for name, stage in raw["stages"].items()
        }
        return raw | {"stages": stages}

    @field_validator("stages", mode="before")
    @classmethod
    def _own_class(cls, raw: Any) -> dict[str, StageConfig]:
        # A section made of the table validates each value with its own class and keeps the path.
        rows: dict[str, Any] = {name: (cls, None) for name, cls in STAGES.items()}
        stages = create_model("Stages", __base__=Section, **rows).model_validate(raw)
        if not raw:
            raise UserError(f"a recipe needs at least one of {', '.join(STAGES)}")
        return {name: getattr(stages, name) for name in raw}

    @model_validator(mode="after")
    def _layouts_fit(self) -> Self:
        for name, stage in self.stages.items():
            if stage.fp8 and not isinstance(stage, Pretrain):
                raise UserError(
                    f"stages.{name}.fp8=True: only pre-training computes in fp8, the others sample"
                )
            if stage.trains == "student" and self.student is None:
                raise UserError(f"stages.{name} trains a student: add a student section")
            for role in dict.fromkeys(("model", stage.trains)):  # the model is a student's teacher
                try:
                    check_layout(stage.layout, getattr(self, role))
                except UserError as error:
                    raise UserError(f"stages.{name} ({role}): {error}") from None
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, apply `dotted.path=value` overrides (values are YAML), validate.

        A path that begins with a stage's name is short for `stages.` before it. A file's `base`
        names another, beside it, which the file is laid over: sections are merged (a mixture is
        replaced), null takes a field out, stages that the base has not come last.
        """
        raw = _read(Path(path))
        for item in overrides:
            field, equals, value = item.partition("=")
            if not equals or not all(field.split(".")):
                raise UserError(f"override {short(item)} must look like stage.field=value")
            if (stage := field.split(".")[0]) in STAGES:
                stages = raw.get("stages")
                if not isinstance(stages, dict) or stage not in stages:
                    raise UserError(f"override {short(item)}: the recipe has no stage {stage}")
                field = f"stages.{field}"
            override(raw, field, parse_yaml(value, f"override {short(item)}"))
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UserError(explain(error.errors()[0], _names)) from None

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe (every default filled in), whole or not at all."""
        partial = Path(f"{path}.partial")
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    def stage_dir(self, run_dir: str | Path, stage: str) -> Path:
        """The folder of `stage`, numbered by its place in this recipe from 1."""
        return Path(run_dir) / f"{list(self.stages).index(stage) + 1:02d}-{stage}"


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file laid over its base; `above` are the files that led to it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {path} is not UTF-8 text") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} must be a mapping of sections, not {short(raw)}")
    if (base := raw.pop("base", None)) is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"recipe {path}: base={short(base)} must name a recipe file beside it")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise UserError(f"recipe {path}: base={base} leads back to itself")
    return _merged(_read(path.parent / base, above), raw)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = base | own
    for key in base.keys() & own.keys():
        if isinstance(base[key], dict) and isinstance(own[key], dict) and key != "mixture":
            both[key] = _merged(base[key], own[key])
    return {key: value for key, value in both.items() if value is not None or key not in base}


def _over(default: Any, own: Any) -> Any:
    """A stage's layout laid over the default; what is not a mapping is left for validation."""
    if own is None:
        return default
    return {**default, **own} if isinstance(default, dict) and isinstance(own, dict) else own


def _names(path: list[Any]) -> list[str]:
    match path:
        case ["stages"]:
            return list(STAGES)
        case ["stages", stage, *rest]:
            return field_names(STAGES[stage], rest)
    return field_names(Recipe, path)
