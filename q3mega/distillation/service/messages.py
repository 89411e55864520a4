"""What a teacher's job and a student's say to each other.

Student's first rank -> door: Hello. Door -> it: Welcome. Each student rank that asks -> the speaker
of its number: Seat. Speaker 0 -> asker 0: the lm_head's rows in blocks of `block`, in the teacher's
dtype. From then on, as often as a student likes: Ask and its tokens (int32), for which the speaker
sends the hidden states (T, H) of each batch in turn. Who hangs up has ended the session.
"""

from typing import Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from q3mega.model import Qwen3Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_BYTES = 64 << 20  # of the lm_head at once


class Hello(BaseModel):
    vocab: PositiveInt  # ids of the tokenizer
    tokenizer: str  # Tokenizer.digest
    askers: PositiveInt  # ranks that will ask, numbered from 0


class Welcome(BaseModel):
    refusal: str = ""  # why there will be no session
    shape: Qwen3Shape
    dtype: Literal["float32", "bfloat16"]
    speakers: list[str]  # host:port; asker i asks speaker i modulo their number
    session: str
    block: PositiveInt


class Seat(BaseModel):
    session: str
    asker: NonNegativeInt


class Ask(BaseModel):
    lengths: list[list[PositiveInt]] = Field(max_length=1 << 20)  # of each batch's documents
