"""What pre-training can be told."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from q3mega.config.section import Section
from q3mega.config.stage import StageConfig
from q3mega.config.workload import Workload

DocumentKind = Literal[
    "prose", "code", "science", "facts", "worked", "direct", "chat", "retrieval", "retrieval_long",
]  # fmt: skip
CuratedFolder = Annotated[str, Field(pattern="^curated:.")]  # what q3mega curate has written


class PretrainSettings(Section):
    """One pass over a mixture of documents (kinds: q3mega.corpus.documents)."""

    steps: PositiveInt = Field(description="Optimizer steps.")
    tokens_per_step: PositiveInt = Field(description="Tokens of an optimizer step.")
    sequence: PositiveInt = Field(description="Tokens of the longest document.")
    mixture: dict[DocumentKind | CuratedFolder, PositiveFloat] = Field(
        description="Kind of document, or curated:FOLDER -> share of the tokens."
    )


class Extension(Section):
    """Beyond the trained length: YaRN and dual-chunk attention, at inference."""

    factor: PositiveFloat = Field(4.0, description="Tokens of a sequence, in trained lengths.")
    chunk_size: PositiveInt = Field(description="Tokens of a chunk of dual-chunk attention.")
    local_size: PositiveInt = Field(
        description="Tokens of a chunk that the next one attends to at their own distance."
    )
    documents: PositiveInt = Field(
        400, description="Documents of the retrieval evaluation, one pass key each."
    )


class Pretrain(StageConfig, PretrainSettings):
    """One of the three pre-training stages."""

    program = "q3mega.stages.pretrain:run"
    may_use_fp8 = True

    rope_base: PositiveFloat | None = Field(
        None, description="RoPE's base from this stage on (ABF); null: the one before."
    )
    extension: Extension | None = Field(
        None, description="An evaluation beyond the trained length; null: none."
    )

    @property
    def document_kinds(self) -> Sequence[str]:
        """See `StageConfig`."""
        return tuple(self.mixture)

    def workload(self) -> Workload:
        """See `StageConfig`."""
        return Workload(self.sequence, batch=max(1, self.tokens_per_step // self.sequence))
