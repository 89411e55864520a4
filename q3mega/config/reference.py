"""The reference of all settings: `q3mega settings`, and docs/settings.md.

`python -m q3mega.config.reference` prints the page.
"""

import types
from collections.abc import Collection, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from q3mega.config.recipe import Recipe
from q3mega.config.rl import RLSettings
from q3mega.config.section import Change, nearest
from q3mega.config.stage import StageConfig
from q3mega.config.stages import STAGES
from q3mega.errors import UserError

_WHAT_MAY_CHANGE = {
    Change.NOTHING: "freely",
    Change.ROUNDING: "rounding follows",
    Change.MOVED: "if it moved",
}
_HEAD = """\
# Settings

This page is generated: `python -m q3mega.config.reference > docs/settings.md`. `q3mega settings`
prints the same, `q3mega settings STAGE` one stage's.

A setting with no default must be given. "May change" says what may be another in a run that goes
on: nothing, unless it stands there. "freely": no result depends on it. "rounding follows": sums are
taken in another order. "if it moved": the same thing has a new address.
"""


def page() -> str:
    """All settings as Markdown: each section once."""
    parts = [_HEAD, "## A recipe\n", table(Recipe), "## Every stage\n", table(StageConfig)]
    for stage in dict.fromkeys(STAGES.values()):
        names = [name for name, known in STAGES.items() if known is stage]
        parts += [f"## {', '.join(names)}\n", _about(stage)]
        without = set(StageConfig.model_fields)
        if issubclass(stage, RLSettings):
            parts.append("It has the settings of RLSettings, and these.\n")
            without |= set(RLSettings.model_fields)
        parts.append(table(stage, without))
    for section in _inner_sections(Recipe, *STAGES.values()):
        parts += [f"## {section.__name__}\n", _about(section), table(section)]
    return "\n".join(parts)


def stage_page(stage: str) -> str:
    """One stage's settings with those of its sections, or the recipe's for the name "recipe".

    Raises UserError for another name.
    """
    pages: dict[str, type[BaseModel]] = {"recipe": Recipe, **STAGES}
    if stage not in pages:
        raise UserError(f"{stage} is not a stage, {nearest(stage, list(pages))}")
    section = pages[stage]
    parts = [table(section)]
    parts += [f"{s.__name__}\n\n{table(s)}" for s in _inner_sections(section)]
    return "\n".join(parts)


def table(section: type[BaseModel], without: Collection[str] = ()) -> str:
    """A section's fields as a Markdown table."""
    rows = ["| setting | type | default | may change | meaning |", "|---|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in without:
            changes = [_WHAT_MAY_CHANGE[m] for m in field.metadata if isinstance(m, Change)]
            cells = _type_name(field.annotation), _default(field), *(changes or [""])
            words = (name, *cells, field.description or "")
            rows.append(f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |")
    return "\n".join(rows) + "\n"


def _about(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split()) + "\n"


def _inner_sections(*sections: type[BaseModel]) -> list[type[BaseModel]]:
    """The sections that are fields of these, each once."""
    inner: dict[type[BaseModel], None] = {}
    for section in sections:
        for field in section.model_fields.values():
            for part in _sections_of(field.annotation):
                if part not in inner and part is not StageConfig:
                    inner |= {part: None, **dict.fromkeys(_inner_sections(part))}
    return list(inner)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _sections_of(part)


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type_name, parts)))
    if origin is tuple:
        several = parts[-1] is Ellipsis
        return f"list of {_type_name(parts[0])}" if several else f"{len(parts)} numbers"
    if origin is dict:
        return f"map to {_type_name(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type_name(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"section {annotation.__name__}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    return names.get(getattr(annotation, "__name__", ""), "any")


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        return "its own defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    print(page(), end="")
