"""Wire protocol between a student's job and a teacher's job.

1. Student rank 0 connects to the control port and sends `HandshakeRequest`. The teacher replies
   `HandshakeReply` with the addresses of its data ports, one for each of its replicas, and closes
   this connection.
2. Student rank i (data-parallel) connects to data port i modulo the number of data ports and sends
   `StudentRank`.
3. Data port 0 sends the lm_head weight (V, H) to student rank 0 once, in the teacher's dtype and in
   blocks of `block_rows` rows.
4. Any number of times: a student rank sends `ForwardRequest` and its token ids (int32). Its data
   port answers with the hidden states (T, H) of each batch, one batch at a time.

Closing a connection ends the session for all student ranks.
"""

from typing import Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from q3mega.model import Qwen3Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK_BYTES = 64 << 20  # of the lm_head at once


class HandshakeRequest(BaseModel):
    vocab: PositiveInt  # ids of the tokenizer
    tokenizer: str  # Tokenizer.digest
    student_ranks: PositiveInt  # ranks that will ask, numbered from 0


class HandshakeReply(BaseModel):
    refusal: str = ""  # why there will be no session
    shape: Qwen3Shape
    dtype: Literal["float32", "bfloat16"]
    data_ports: list[str]  # host:port; asker i asks data_port i modulo their number
    session: str
    block_rows: PositiveInt


class StudentRank(BaseModel):
    session: str
    rank: NonNegativeInt


class ForwardRequest(BaseModel):
    lengths: list[list[PositiveInt]] = Field(max_length=1 << 20)  # of each batch's documents
