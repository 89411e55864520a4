"""The validated configuration of a curation: YAML in, one frozen object out."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from q3mega.config.section import Section, explain, field_names, parse_yaml, short
from q3mega.errors import UserError

Domain = Literal["code", "mathematics", "conversation", "science", "prose"]
Quality = Literal["low", "medium", "high"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class Source(Section):
    """Files of one origin, their format told by the name: sources.py lists them."""

    name: Name
    glob: str  # from the working directory; a folder stands for its Arrow files
    text: str = "text"  # the field that holds the text
    licence: str


class Rules(Section):
    """When a document is dropped as not worth reading; null turns a rule off.

    Those of Gopher (arXiv 2112.11446, A.1) for text, those of StarCoder (2305.06161, 3.1) for code.
    """

    language_probability: Fraction | None = 0.5  # at least; text only
    min_words: PositiveInt | None = 50
    max_words: PositiveInt | None = 100_000
    # letters of English; other languages get wider bounds (word_lengths.py)
    mean_word: tuple[PositiveFloat, PositiveFloat] | None = (3, 10)
    symbols: Fraction | None = 0.1  # of # and ellipses, a word
    bullets: Fraction | None = 0.9  # of the lines
    ellipses: Fraction | None = 0.3  # of the lines, at their end
    alphabetic: Fraction | None = 0.8  # of the words, at least
    repeated_lines: Fraction | None = 0.3  # of the lines
    repeated_pairs: Fraction | None = 0.2  # of the word pairs, the most frequent one
    stop_words: PositiveInt | None = 2  # different ones, English only
    boilerplate: PositiveInt | None = 3  # phrases of web pages' frames that are too many
    code_line: tuple[PositiveInt, PositiveInt] | None = (100, 1000)  # mean, longest: characters
    code_letters: Fraction | None = 0.25  # of the characters of code, at least


class Duplicates(Section):
    """When two documents are near: the Jaccard similarity of their word n-grams.

    With pairs of words, one word in ten exchanged leaves 0.68, a half that is shared 0.33.
    """

    words: PositiveInt = 2
    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.55


class Evaluation(Section):
    """Texts that no training document may hold: a file's field, one text a row."""

    glob: str
    text: str = "text"


class Decontamination(Section):
    evaluation: tuple[Evaluation, ...] = ()
    own: bool = True  # the package's held-out questions as well
    words: PositiveInt = 13  # in a row; a shorter text must occur whole
    shortest: PositiveInt = 4  # words; a shorter evaluation text occurs anywhere by chance

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.shortest > self.words:
            raise UserError(f"shortest={self.shortest} must not exceed words={self.words}")
        return self


class Weight(Section):
    """One factor of a document's weight: it applies where every label that is given matches."""

    domain: Domain | None = None
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = None  # ISO 639-1
    quality: Quality | None = None
    source: str | None = None
    weight: NonNegativeFloat


class Band(Section):
    """A share of the tokens from documents of `shortest` to `longest` tokens."""

    share: PositiveFloat
    shortest: PositiveInt
    longest: PositiveInt


class Lengths(Section):
    """The long-context step's text. The defaults are the report's (section 3.2)."""

    tokens: PositiveInt  # to write
    bands: tuple[Band, ...] = (
        Band(share=0.75, shortest=16384, longest=32768),
        Band(share=0.25, shortest=4096, longest=16383),
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        bands = sorted(self.bands, key=lambda b: b.shortest)
        for b in bands:
            if b.shortest > b.longest:
                raise UserError(f"bands: shortest={b.shortest} must not exceed longest={b.longest}")
        for below, above in itertools.pairwise(bands):
            if below.longest >= above.shortest:
                raise UserError(
                    f"bands overlap: longest={below.longest} reaches shortest={above.shortest}"
                )
        if not bands or abs(sum(b.share for b in bands) - 1) > 1e-6:
            raise UserError("bands: the shares must add up to 1")
        return self


class TokenizerFolder(Section):
    path: str  # holds tokenizer.json
    document_end: str = "<|endoftext|>"  # the token after each document


class Config(Section):
    """One curation. Everything but `malformed` decides the output, and must not change in it."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    tokenizer: TokenizerFolder
    shard_mb: PositiveInt = 64  # a plain file is cut into shards of so many megabytes
    malformed: Fraction = 0.01  # of a shard's rows: above it the run stops
    rules: Rules = Rules()
    duplicates: Duplicates = Duplicates()
    decontamination: Decontamination = Decontamination()
    mixture: tuple[Weight, ...] = ()  # factors; a document's weight is the product
    lengths: Lengths | None = None
    heldout: Annotated[float, Field(ge=0, lt=0.5)] = 0.01  # of the documents, for held-out losses
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [s.name for s in self.sources]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise UserError(f"sources.{index}.name={short(name)} is given twice")
        for index, factor in enumerate(self.mixture):
            if factor.source is not None and factor.source not in names:
                raise UserError(
                    f"mixture.{index}.source={short(factor.source)} is none of {', '.join(names)}"
                )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate a YAML file; UserError in one line for whatever is wrong with it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        raw = parse_yaml(text, str(path))
        if not isinstance(raw, dict):
            raise UserError(f"{path} must be a mapping of sections, not {short(raw)}")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise UserError(explain(error.errors()[0], partial(field_names, cls))) from None

    def settled(self) -> dict[str, Any]:
        """What decides the output, as plain data."""
        return json.loads(self.model_dump_json(exclude={"malformed"}))


def changed(old: Any, new: Any, path: str = "") -> str | None:
    """The dotted path, with both values, of the first setting that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        children = [(k, old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        children = [(str(i), *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else f"{path}={short(new)}, was {short(old)}"
    differences = (changed(a, b, f"{path}.{key}" if path else key) for key, a, b in children)
    return next(filter(None, differences), None)
