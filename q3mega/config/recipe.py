"""The validated recipe: YAML in, one typed, frozen object out.

`config.stages` says what a stage can be told, `config.layout` how it is split over processes. What
is wrong with a file or an override becomes a `UserError` of one line that names the dotted path.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
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

from q3mega.config.layout import Layout, check_layout
from q3mega.config.section import (
    Changeable,
    ChangesRounding,
    Section,
    explain,
    field_names,
    override,
    parse_yaml,
    section_at,
    short,
)
from q3mega.config.slurm import Slurm
from q3mega.config.stage import StageConfig
from q3mega.config.stages import STAGES
from q3mega.errors import UserError
from q3mega.io import atomic_write
from q3mega.model.sizes import QWEN3, Qwen3Shape, rows_for

# Fields that are paths, and those that are files or names of generated sets; of a map, its keys.
PATHS = (
    "rewards",
    "tokenizer.path",
    "stages.*.init",
    "stages.*.teacher.path",
    "stages.*.judge.path",
    "stages.*.judge_model.path",
    "stages.*.judge_examples",
    "stages.*.preference.file",
    "stages.*.rollout_servers.weights_folder",
    "stages.distill_off_policy.teacher",
    "stages.distill_on_policy.teacher",
)
NAMES = (
    "problems",
    "stages.*.problems",
    "stages.*.non_thinking",
    "stages.*.mixture",
    "stages.*.student_pretraining.mixture",
)


class TokenizerSpec(Section):
    """Either trained on the recipe's own text to `vocab_size` entries, or read from a folder."""

    vocab_size: PositiveInt | None = Field(
        None, description="Entries of a tokenizer that is trained on the recipe's own text."
    )
    path: str | None = Field(None, description="A folder with a tokenizer.json.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.vocab_size is None) == (self.path is None):
            raise UserError("give either vocab_size (train one) or path (a Hugging Face folder)")
        return self


class ModelSpec(Section):
    """A Qwen3 shape, written out or derived: `size` fills in every number that is not given."""

    size: Literal[tuple(QWEN3)] | None = Field(  # type: ignore[valid-type]
        None, description="A released size, which fills in every number that is not given."
    )
    layers: PositiveInt = Field(description="Transformer layers.")
    hidden: PositiveInt = Field(description="Width of the residual stream.")
    heads: PositiveInt = Field(description="Query heads.")
    kv_heads: PositiveInt = Field(description="Key and value heads.")
    head_dim: PositiveInt = Field(description="Width of a head.")
    ffn: PositiveInt = Field(description="Width of a dense layer's feed-forward.")
    experts: NonNegativeInt = Field(0, description="Experts of a layer; 0: a dense model.")
    topk: PositiveInt = Field(2, description="Experts of a token.")
    moe_ffn: NonNegativeInt = Field(0, description="Width of one expert.")
    router_aux_loss_coef: NonNegativeFloat = Field(
        1e-3, description="Coefficient of the experts' load-balancing loss."
    )
    tied: bool = Field(True, description="Embedding and lm_head are one matrix.")
    rope_base: PositiveFloat = Field(1e4, description="Base of RoPE's frequencies.")

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
        """The table row, for a tokenizer of `vocab` ids (default: the released one)."""
        return Qwen3Shape(vocab=rows_for(vocab), **self.model_dump(exclude={"size"}))


# A section made of the table validates each stage with its own class and keeps the path.
_Stages = create_model(
    "_Stages", __base__=Section, **{name: (stage, None) for name, stage in STAGES.items()}
)  # type: ignore[call-overload]


MODELS = ("model", "student")  # sections of a recipe that are a ModelSpec


class Recipe(Section):
    """A whole run. `stages` keeps the file's order, and each stage's layout is complete."""

    name: Changeable[Annotated[str, Field(pattern=r"^\w[\w.-]*$")]] = Field(
        description="What the run is called; its folder is runs/NAME by default."
    )
    seed: NonNegativeInt = Field(description="Every random choice follows from it.")
    problems: tuple[str, ...] = Field(
        (), description="Files of reasoning problems; none: the generated families."
    )
    rewards: tuple[str, ...] = Field(
        (), description="Python files of your own rewards, which every process runs."
    )
    eval_problems: Annotated[int, Field(ge=2)] = Field(
        400, description="Held-out problems of an evaluation; of a general task half as many."
    )
    tokenizer: TokenizerSpec = Field(description="The tokenizer of all models.")
    model: ModelSpec = Field(description="The model, which is the student's teacher as well.")
    student: ModelSpec | None = Field(None, description="The model that is distilled; null: none.")
    layout: ChangesRounding[Layout] = Field(
        description="Processes and axes of every stage that does not say otherwise."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the weights; gradients and Adam are fp32."
    )
    slurm: Changeable[Slurm] = Field(Slurm(), description="What q3mega slurm asks a cluster for.")
    stages: dict[str, SerializeAsAny[StageConfig]] = Field(
        description="Stage -> its settings, in the order in which they run."
    )

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
        stages = _Stages.model_validate(raw)
        if not raw:
            raise UserError(f"a recipe needs at least one of {', '.join(STAGES)}")
        return {name: getattr(stages, name) for name in raw}

    @model_validator(mode="after")
    def _stages_can_work_with_the_problems(self) -> Self:
        for stage in self.stages.values():
            stage.check_problems(self.problems)
        return self

    @model_validator(mode="after")
    def _layouts_fit(self) -> Self:
        for name, stage in self.stages.items():
            if stage.fp8 and not stage.may_use_fp8:
                raise UserError(
                    f"stages.{name}.fp8=True: only pre-training computes in fp8, the others sample"
                )
            if stage.trains == "student" and self.student is None:
                raise UserError(f"stages.{name} trains a student: add a student section")
            shapes = {stage.trains: self.trained_by(stage)}
            if not stage.teacher_elsewhere:  # the model is a student's teacher
                shapes = {"model": self.model, **shapes}
            for role, spec in shapes.items():
                try:
                    check_layout(stage.layout, spec.shape())
                except UserError as error:
                    raise UserError(f"stages.{name} ({role}): {error}") from None
        return self

    @model_validator(mode="after")
    def _routes_are_of_experts(self) -> Self:
        for name, stage in self.stages.items():
            if stage.rl is None or stage.rl.routing_replay == "none":
                continue
            if not self.trained_by(stage).shape().experts:
                raise UserError(
                    f"stages.{name}: routing_replay={stage.rl.routing_replay} needs a model with "
                    "experts, this is dense: set it to none"
                )
        return self

    def trained_by(self, stage: StageConfig) -> ModelSpec:
        """The model that a stage trains."""
        spec = self.model if stage.trains == "model" else self.student
        assert spec is not None  # a validated recipe with such a stage has a student
        return spec

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read YAML, apply `dotted.path=value` overrides (values are YAML), validate.

        A path that begins with a stage's name is short for `stages.` before it. A file's `base`
        names another, beside it, which the file is laid over: sections are merged, lists and maps
        by files or kinds are replaced, null takes a field out, stages that the base has not come
        last. Paths are relative to the file that names them, those of overrides to the working
        folder.
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
            given = parse_yaml(value, f"override {short(item)}")
            section, _, name = field.partition(".")
            if section in MODELS and name == "size" and isinstance(raw.get(section), dict):
                raw[section] = _of_size(raw[section], given)
            override(raw, field, given)
        try:
            cls.model_validate(raw)  # whose errors show the overrides as they were typed
            return cls.model_validate(_located(raw, Path.cwd()))  # files' paths are absolute by now
        except ValidationError as error:
            homes = partial(_homes, raw)
            raise UserError(explain(error.errors()[0], _names, homes)) from None

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe (every default filled in), whole or not at all."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        with atomic_write(Path(path)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

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
    base = raw.pop("base", None)
    raw = _located(raw, path.parent)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"recipe {path}: base={short(base)} must name a recipe file beside it")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise UserError(f"recipe {path}: base={base} leads back to itself")
    return _merged(_read(path.parent / base, above), raw)


def _located(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Raw fields in which every path is absolute, taken from `folder`."""
    for field in PATHS:
        raw = _changed(raw, field.split("."), lambda path: _absolute(path, folder))
    for field in NAMES:
        raw = _changed(raw, field.split("."), lambda name: _file(name, folder))
    return raw


def _changed(value: Any, field: Sequence[str], change: Callable[[str], str]) -> Any:
    """`value` with a changed text, list of texts, or keys of a mapping, at a field below it."""
    if field and isinstance(value, dict):
        keys = value if field[0] == "*" else {field[0]} & value.keys()
        return value | {key: _changed(value[key], field[1:], change) for key in keys}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not field and (number or isinstance(value, str)):  # a folder may be called 7
        return change(str(value))
    if field:
        return value
    if isinstance(value, list):
        return [_changed(each, (), change) for each in value]
    if isinstance(value, dict):
        return {_changed(key, (), change): each for key, each in value.items()}
    return value


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expanduser(path))


def _file(name: str, folder: Path) -> str:
    """The name of a generated set or kind, which has neither dot nor slash; else a path."""
    if (path := name.removeprefix("curated:")) != name:
        return f"curated:{_absolute(path, folder)}"
    return _absolute(name, folder) if "." in name or "/" in name else name


def _merged(
    base: dict[str, Any], over: dict[str, Any], section: type[BaseModel] = Recipe
) -> dict[str, Any]:
    both = base | over
    for key in base.keys() & over.keys():
        inner = _Stages if (section, key) == (Recipe, "stages") else section_at(section, key)
        if inner and isinstance(base[key], dict) and isinstance(over[key], dict):
            under = base[key]
            if section is Recipe and key in MODELS and "size" in over[key]:
                under = _of_size(under, over[key]["size"])
            both[key] = _merged(under, over[key], inner)
    return {key: value for key, value in both.items() if value is not None or key not in base}


def _of_size(model: dict[str, Any], size: Any) -> dict[str, Any]:
    """A model's raw fields without the numbers that a size laid over them brings."""
    numbers = asdict(QWEN3[size]) if isinstance(size, str) and size in QWEN3 else {}
    return {key: value for key, value in model.items() if key not in numbers}


def _over(default: Any, given: Any) -> Any:
    """A stage's layout laid over the default; what is not a mapping is left for validation."""
    if given is None:
        return default
    return {**default, **given} if isinstance(default, dict) and isinstance(given, dict) else given


def _names(path: list[Any]) -> list[str]:
    match path:
        case ["stages"]:
            return list(STAGES)
        case ["stages", stage, *rest]:
            return field_names(STAGES[stage], rest)
    return field_names(Recipe, path)


def _homes(raw: dict[str, Any], name: str) -> list[str]:
    """Where a recipe may have a field of this name, below its top."""
    stages = raw.get("stages")
    sections = {key: section_at(Recipe, key) for key in Recipe.model_fields if key != "stages"}
    sections |= {key: STAGES.get(key) for key in stages} if isinstance(stages, dict) else {}
    return [f"{key}.{name}" for key, s in sections.items() if s and name in s.model_fields]
