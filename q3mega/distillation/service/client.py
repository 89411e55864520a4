"""The student's side of a teacher in a job of its own."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from q3mega import device

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor

from q3mega.data.batch import Batch
from q3mega.distillation.service.connection import Connection, ConnectionLost, connect
from q3mega.distillation.service.messages import (
    DTYPES,
    ForwardRequest,
    HandshakeReply,
    HandshakeRequest,
    StudentRank,
)
from q3mega.engine import parallel
from q3mega.errors import UserError
from q3mega.model import Qwen3Shape
from q3mega.model.sizes import rows_over


class TeacherClient:
    """The teacher at tcp://host:port, for the ranks that compute the loss.

    Every rank of the student's job makes one and calls it, in the same order. Of the ranks that
    share a model's last stage the first one asks and the others get what it has got. `weight`
    (V / TP, H_t): this rank's rows of the teacher's lm_head, cut like the student's; empty on
    the other stages. vocab: ids of the tokenizer. rows: of the student's lm_head, where it has more
    than those; the teacher's may have others. timeout: seconds in which the teacher sends
    something.

    Raises UserError for a teacher that is not there, is of another vocabulary or key, or goes away.
    """

    def __init__(
        self,
        at: str,
        *,
        vocab: int,
        tokenizer: str,
        rows: int | None = None,
        key: bytes = b"",
        timeout: float = 1800.0,
    ) -> None:
        self.at, self.key, self.timeout = at, key, timeout
        self.learns = ps.is_pipeline_last_stage()
        self.peers = ps.get_tensor_and_context_parallel_group()
        self.asks = self.learns and self.peers.rank() == 0
        self.wire: Connection | None = None
        number = parallel.data_rank()
        hello = HandshakeRequest(
            vocab=vocab, tokenizer=tokenizer, student_ranks=parallel.data_size()
        )
        mine = [self._enter(hello)] if self.asks and number == 0 else []
        [welcome] = parallel.gather_over_all(mine)
        self.shape: Qwen3Shape = welcome.shape
        self.dtype = DTYPES[welcome.dtype]
        if self.asks:
            data_port = welcome.data_ports[number % len(welcome.data_ports)]
            try:
                self.wire = connect(data_port, key, timeout)
                self.wire.send(StudentRank(session=welcome.session, rank=number))
            except ConnectionLost as error:
                raise self._lost(error) from None
        self.weight = (
            self._head(welcome.block_rows, rows or vocab)
            if self.learns
            else torch.empty(0, self.shape.hidden)
        )
        self.lengths: deque[int] = deque()  # of the batches that were asked for
        self.receiver = ThreadPoolExecutor(1)
        self.coming: Future[Tensor] | None = None

    def ask(self, batches: Sequence[Batch]) -> None:
        """Ask for these batches' hidden states, which `states` then gives in this order.

        Column teacher_row (T,) int64: a token's place in the teacher's (T, H_t), wherever
        parallelism takes the token.
        """
        self.lengths = deque(map(len, batches))
        for batch in batches:
            batch.columns["teacher_row"] = torch.arange(len(batch))
        if self.wire:
            lengths = [b.cu_seqlens.diff().tolist() for b in batches]
            try:
                self.wire.send(ForwardRequest(lengths=lengths))
                self.wire.send_tensor(torch.cat([b.tokens.int() for b in batches]))
            except ConnectionLost as error:
                raise self._lost(error) from None
            self._look_out()

    def states(self, row: Tensor) -> Tensor:
        """(n, H_t) the next batch's hidden states at row (n,); the one after is on its way.

        Zeros once all batches are through: what follows are fillers, without weight.
        """
        shape = self.shape.hidden
        if not self.lengths:
            return torch.zeros(len(row), shape, dtype=self.dtype, device=row.device)
        length = self.lengths.popleft()
        if self.coming:
            try:
                whole = self.coming.result().to(row.device)
            except ConnectionLost as error:
                raise self._lost(error) from None
            self._look_out()
        else:
            whole = torch.empty(length, shape, dtype=self.dtype, device=row.device)
        if self.peers.size() > 1:
            dist.broadcast(whole, group=self.peers, group_src=0)
        return whole[row]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.wire:
            self.wire.close()
        self.receiver.shutdown()

    def _look_out(self) -> None:
        """Receive the next batch's states behind what the student does."""
        assert self.wire
        if self.lengths:
            shape = self.lengths[0], self.shape.hidden
            self.coming = self.receiver.submit(self.wire.receive_tensor, shape, self.dtype)

    def _enter(self, hello: HandshakeRequest) -> HandshakeReply:
        try:
            door = connect(self.at.removeprefix("tcp://"), self.key, self.timeout)
            door.send(hello)
            welcome = door.receive(HandshakeReply)
            door.close()
        except ConnectionLost as error:
            raise UserError(
                f"teacher_at={self.at}: no teacher takes this student ({error}): is `q3mega teach` "
                "up there, with the same key and version, and not busy with another student?"
            ) from None
        if welcome.refusal:
            raise UserError(
                f"teacher_at={self.at} refuses: {welcome.refusal}; the two must share a vocabulary"
            )
        if welcome.shape.vocab < hello.vocab or not welcome.data_ports:
            raise UserError(f"teacher_at={self.at}: it offers what was not asked for")
        return welcome

    def _head(self, block: int, rows: int) -> Tensor:
        group: Any = ps.get_tensor_and_data_parallel_group(with_context_parallel=True)
        here = device.device()
        ways = ps.get_tensor_model_parallel_world_size()
        rows = rows_over(rows, ways) // ways
        first = ps.get_tensor_model_parallel_rank() * rows
        own = torch.zeros(rows, self.shape.hidden, dtype=self.dtype, device=here)
        for start in range(0, self.shape.vocab, block):
            shape = min(block, self.shape.vocab - start), self.shape.hidden
            if group.rank() == 0:
                assert self.wire
                try:
                    part = self.wire.receive_tensor(shape, self.dtype).to(here)
                except ConnectionLost as error:
                    raise self._lost(error) from None
            else:
                part = torch.empty(shape, dtype=self.dtype, device=here)
            if group.size() > 1:
                dist.broadcast(part, group=group, group_src=0)
            low, high = max(start, first), min(start + len(part), first + rows)
            if low < high:
                own[low - first : high - first] = part[low - start : high - start]
        return own

    def _lost(self, error: ConnectionLost) -> UserError:
        return UserError(
            f"teacher_at={self.at}: the teacher is gone ({error}): see its job's output, start "
            "`q3mega teach` again, then this run, which goes on from its last checkpoint"
        )
