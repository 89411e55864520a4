"""The machinery under a recipe: strict sections, plain YAML, dotted overrides, one-line errors."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from q3mega.errors import UserError
from q3mega.keys import is_secret, redacted


class Section(BaseModel):
    """Part of a recipe: frozen, finite numbers only, and no key that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML, but `1e-4` is a number (as in YAML 1.2) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                problem = f"{key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


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


def explain(error: Mapping[str, Any], names: Callable[[list[Any]], Sequence[str]]) -> str:
    """One line for one pydantic error: dotted path, value, what is allowed.

    `names(path)` lists the fields that exist at a path.
    """
    *parents, name = error["loc"] or ("recipe",)
    path = one_line(".".join(map(str, (*parents, name))))
    match error["type"]:
        case "missing":
            return f"{path} is missing and has no default"
        case "extra_forbidden":
            valid = ".".join(map(str, (*parents, nearest(name, names(parents)))))
            held = "***" if is_secret(str(name)) else shown(error["input"])
            return f"{path}={held} is not a field, the nearest is {valid}"
        case "literal_error" if "[key]" in error["loc"]:  # pydantic's mark for a mapping's key
            *section, key = map(str, error["loc"][: error["loc"].index("[key]")])
            kinds = re.findall(r"'([^']+)'", error["ctx"]["expected"])
            valid = ".".join((*section, nearest(key, kinds)))
            return f"{one_line('.'.join((*section, key)))} is not a field, the nearest is {valid}"
        case "value_error":  # one of our own, which may name the path already
            message = one_line(str(error["ctx"]["error"]))
            return message if not error["loc"] or message.startswith(path) else f"{path}: {message}"
    allowed = one_line(error["msg"]).replace("Input should be", "must be", 1)
    return f"{path}={shown(error['input'])} is not allowed: {allowed}"


def field_names(section: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The fields at `path` below `section`; keys of mappings and list indices are stepped over."""
    for key in path:
        if key in section.model_fields:
            section = next(_sections(section.model_fields[key].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def nearest(name: object, valid: Sequence[str]) -> str:
    """The member of `valid` that looks most like `name`."""
    return difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)[0]


def one_line(text: str) -> str:
    return " ".join(text.split())


def shown(value: object) -> str:
    """`short`, without a password that stands in a URL."""
    return short(redacted(value) if isinstance(value, str) else value)


def short(value: object) -> str:
    """A value as a message shows it: one line, cut to some thirty characters."""
    return reprlib.repr(value)
