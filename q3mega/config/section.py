"""The machinery under a recipe: strict sections, plain YAML, dotted overrides, one-line errors."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from q3mega.config.secrets import is_secret, redacted
from q3mega.errors import UserError


class Section(BaseModel):
    """Part of a recipe: frozen, finite numbers only, and no key that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class Change(Enum):
    """What a run's result has of a field that changes between two starts of it.

    A field without this mark is part of what the run is: with another value it is another run.
    """

    NOTHING = "nothing"
    ROUNDING = "the order of sums, so low bits, and what is sampled with them"
    MOVED = "nothing, as long as it neither comes nor goes: the address of the same thing"


_T = TypeVar("_T")
Changeable = Annotated[_T, Change.NOTHING]
ChangesRounding = Annotated[_T, Change.ROUNDING]
MovableAddress = Annotated[_T, Change.MOVED]


def leaves(
    value: Any, path: tuple[str, ...] = (), mark: Change | None = None
) -> Iterator[tuple[str, Any, Change | None]]:
    """(dotted path, value, mark) of every field below a section; a mark holds for what is in it."""
    if isinstance(value, Section):
        for name, info in type(value).model_fields.items():
            marks = [m for m in info.metadata if isinstance(m, Change)]
            yield from leaves(getattr(value, name), (*path, name), marks[0] if marks else mark)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)), mark)
    else:
        yield ".".join(path), value, mark


# Keys of older recipes -> their names today.
RENAMED_KEYS = {
    "balance": "router_aux_loss_coef",
    "correction": "rollout_correction",
    "engine": "rollout_servers",
    "entropy_hold": "entropy_target_ratio",
    "entropy_limit": "entropy_coef_max",
    "entropy_step": "entropy_coef_step",
    "evaluated": "eval_problems",
    "max_gap": "max_logprob_mismatch",
    "switch": "send_enable_thinking",
    "sync": "weight_sync",
    "teacher_at": "teacher_url",
    "teacher_timeout": "teacher_timeout_s",
    "timeout": "timeout_s",
    "weights": "weights_folder",
}


class _Int(int):
    """An integer that, where text is expected, is what was written: 012345 of an account."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Float(float):
    """The same of other numbers: 1.10 of a version."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2's core schema: 4:00:00, on and 2024-01-01 are text,
    012 is twelve, 1e-4 a number. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                problem = f"{key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
        number = _Int(int(node.value, base))
        number.written = node.value
        return number

    def construct_float(self, node: yaml.ScalarNode) -> float:
        number = _Float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
        number.written = node.value
        return number


_SCALARS = {  # https://yaml.org/spec/1.2.2/#1032-tag-resolution, and merge keys
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
    "merge": r"<<",
}
_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _kind, _pattern in _SCALARS.items():
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse_yaml(text: str, source: str) -> Any:
    """Plain data from YAML text; `source` names it in the UserError."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain data only
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = one_line(getattr(error, "problem", None) or str(error))
        raise UserError(f"{source}{line} is not valid YAML: {problem}") from None


def override(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at the dotted `path` in place, opening sections that are not there yet."""
    *parents, name = path.split(".")
    section = raw
    for key in parents:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise UserError(f"override {short(path)}: {short(key)}={short(section)} has no fields")
    section[name] = value


def explain(
    error: Mapping[str, Any],
    names: Callable[[list[Any]], Sequence[str]],
    homes: Callable[[str], Sequence[str]] = lambda name: (),
) -> str:
    """One line for one pydantic error: dotted path, value, what is allowed.

    `names(path)` lists the fields that exist at a path, `homes(name)` the paths that end in a name.
    """
    *parents, name = error["loc"] or ("recipe",)
    path = one_line(".".join(map(str, (*parents, name))))
    match error["type"]:
        case "missing":
            return f"{path} is missing and has no default"
        case "extra_forbidden":
            if (new := RENAMED_KEYS.get(str(name))) and new in names(parents):
                return f"{path} is called {new} now"
            hint = nearest(name, names(parents), parents, homes(str(name)))
            held = "***" if is_secret(str(name)) else shown(error["input"])
            return f"{path}={held} is not a field, {hint}"
        case "literal_error" if "[key]" in error["loc"]:  # pydantic's mark for a mapping's key
            *section, key = map(str, error["loc"][: error["loc"].index("[key]")])
            kinds = re.findall(r"'([^']+)'", error["ctx"]["expected"])
            hint = nearest(key, kinds, section)
            return f"{one_line('.'.join((*section, key)))} is not a field, {hint}"
        case "value_error":  # one of our own, which may name the path already
            message = one_line(str(error["ctx"]["error"]))
            return message if not error["loc"] or message.startswith(path) else f"{path}: {message}"
    allowed = one_line(error["msg"]).replace("Input should be", "must be", 1)
    return f"{path}={shown(error['input'])} is not allowed: {allowed}"


def field_names(section: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The fields at `path` below `section`; keys of mappings and list indices are stepped over."""
    for key in path:
        section = section_at(section, key) or section
    return list(section.model_fields)


def section_at(section: type[BaseModel], key: object) -> type[BaseModel] | None:
    """The section that a field holds; None for a value, and for a mapping by keys of the user."""
    if key not in section.model_fields:
        return None
    return next(_sections(section.model_fields[str(key)].annotation), None)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def nearest(
    name: object,
    valid: Sequence[str],
    parents: Sequence[object] = (),
    homes: Sequence[str] = (),
) -> str:
    """What to write for `name`: the member of `valid` that looks like it; where else it has a home;
    or what there is."""
    if close := difflib.get_close_matches(str(name), valid, n=1):
        return f"the nearest is {'.'.join(map(str, (*parents, close[0])))}"
    if homes:
        return f"it belongs to a section: {', '.join(homes)}"
    return f"there are {', '.join(valid)}"


def one_line(text: str) -> str:
    """A text with every run of white space made one blank."""
    return " ".join(text.split())


def shown(value: object) -> str:
    """`short`, without a password that stands in a URL."""
    return short(redacted(value) if isinstance(value, str) else value)


def short(value: object) -> str:
    """A value as a message shows it: one line, cut to some thirty characters."""
    return reprlib.repr(value)
