"""The teacher's side: every rank of its job runs `serve`, for one student's job after another.

Each of its replicas has a data_port, the first rank of those that end it; a data_port sends a batch's
hidden states as soon as its last layer has made them, so nothing is kept and nothing is gathered,
and the stages before are at work on the next ones. A send waits until the student takes it.
"""

import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

from q3mega import device  # noqa: F401

# isort: split
import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from q3mega.data.batch import Batch, Sample, collate
from q3mega.distillation.service.connection import (
    HANDSHAKE_TIMEOUT_S,
    Connection,
    ConnectionLost,
    Listener,
)
from q3mega.distillation.service.messages import (
    BLOCK_BYTES,
    DTYPES,
    ForwardRequest,
    HandshakeReply,
    HandshakeRequest,
    StudentRank,
)
from q3mega.engine import Engine, Head, parallel
from q3mega.errors import UserError
from q3mega.ops import vocab

SYNC_INTERVAL_S = 60.0  # seconds after which ranks that wait hear from each other
_log = logging.getLogger(__name__)


def serve(
    engine: Engine, tokenizer: str, *, port: int, key: bytes, network: bool, idle: float
) -> None:
    """Teach until no student has come for `idle` seconds; one that is silent as long is gone.

    tokenizer: its digest. key: what both sides must hold. network: listen on all of the machine's
    networks, not to this machine alone; the door is at `port` of rank 0. Raises UserError for a
    port that cannot be had.
    """
    leads, speaks = torch.distributed.get_rank() == 0, _is_first_of_last_stage()
    with ExitStack() as opened:
        desk = opened.enter_context(Listener(0, key, network=network)) if speaks else None
        desks = [(parallel.data_rank(), desk.address)] if desk else []
        data_ports = [address for _, address in sorted(parallel.gather_over_all(desks))]
        door = None
        if leads:
            try:
                door = opened.enter_context(Listener(port, key, network=network))
            except (OSError, OverflowError) as error:
                raise UserError(f"--port {port} cannot be listened on: {error}") from None
            print(f"teaching at tcp://{door.address}", flush=True)
        offer = HandshakeReply(
            shape=engine.shape, dtype=_dtype(engine), data_ports=data_ports, session="",
            block_rows=max(1, BLOCK_BYTES // (4 * engine.shape.hidden)),
        )  # fmt: skip
        while True:
            session = _next_session(door, offer, tokenizer, idle)
            if session is None:
                return
            askers = _seat(desk, session, idle) if desk else []
            _teach(engine, askers, session.block_rows)
            for asker in askers:
                asker.close()


class _Asker:
    """A student's rank at this data_port; once it is gone it is told nothing more."""

    def __init__(self, wire: Connection | None, gone: str = "") -> None:
        self.wire, self.gone = wire, gone

    def tell(self, tensor: Tensor) -> None:
        if self.wire and not self.gone:
            try:
                self.wire.send_tensor(tensor)
            except ConnectionLost as error:
                self.gone = str(error)

    def ask(self, vocabulary: int) -> list[list[list[int]]]:
        """Its next batches, each a list of documents; none when it is gone."""
        if self.wire and not self.gone:
            try:
                lengths = self.wire.receive(ForwardRequest).lengths
                tokens = self.wire.receive_tensor((sum(map(sum, lengths)),), torch.int32)
                vocab.check_ids(tokens, vocabulary)
            except (ConnectionLost, UserError) as error:
                self.gone = str(error)
            else:
                documents = iter(tokens.split([n for batch in lengths for n in batch]))
                return [[next(documents).tolist() for _ in batch] for batch in lengths]
        return []

    def close(self) -> None:
        if self.wire:
            self.wire.close()


class _Session(HandshakeReply):
    student_ranks: int


def _next_session(
    door: Listener | None, offer: HandshakeReply, tokenizer: str, idle: float
) -> _Session | None:
    """The next student's, known to all ranks; None when none has come."""
    until = time.monotonic() + idle
    while True:
        left = until - time.monotonic()
        found: list[Any] = []  # [] to wait on, [None] to end
        if door:
            found = (
                [None]
                if left <= 0
                else _welcome(door, offer, tokenizer, min(SYNC_INTERVAL_S, left))
            )
        if said := parallel.gather_over_all(found):
            return said[0]


def _welcome(
    door: Listener, offer: HandshakeReply, tokenizer: str, patience: float
) -> list[_Session]:
    try:
        wire = door.accept(patience, HANDSHAKE_TIMEOUT_S)
    except TimeoutError:
        return []
    except ConnectionLost as error:
        _log.warning("a stranger was turned away: %s", error)
        return []
    try:
        hello = wire.receive(HandshakeRequest)
        refusal = _objection(hello, offer.shape.vocab, tokenizer)
        answer = offer.model_copy(update={"refusal": refusal, "session": secrets.token_hex(8)})
        wire.send(answer)
    except ConnectionLost as error:
        _log.warning("a student was turned away: %s", error)
        return []
    finally:
        wire.close()
    if refusal:
        _log.warning("a student was turned away: %s", refusal)
        return []
    return [_Session(**dict(answer), student_ranks=hello.student_ranks)]


def _objection(hello: HandshakeRequest, rows: int, tokenizer: str) -> str:
    if hello.vocab > rows:
        return f"its lm_head has {rows} rows, the student's {hello.vocab} ids need more"
    if hello.tokenizer != tokenizer:
        return "its tokenizer gives other ids than the student's"
    return ""


def _seat(desk: Listener, session: _Session, idle: float) -> list[_Asker]:
    """This replica's askers, in the order of their numbers."""
    wanted = range(parallel.data_rank(), session.student_ranks, parallel.data_size())
    found: dict[int, _Asker] = {}
    while len(found) < len(wanted):
        try:
            wire = desk.accept(HANDSHAKE_TIMEOUT_S, idle)
            seat = wire.receive(StudentRank)
        except ConnectionLost as error:
            _log.warning("a stranger was turned away: %s", error)
            continue
        except TimeoutError:
            missing = ", ".join(str(i) for i in wanted if i not in found)
            return [*found.values(), _Asker(None, f"its data-parallel rank {missing} did not come")]
        if seat.session == session.session and seat.rank in wanted:
            found[seat.rank] = _Asker(wire)
        else:  # a rank of a session that is over
            wire.close()
    return [found[i] for i in wanted]


def _teach(engine: Engine, askers: Sequence[_Asker], block: int) -> None:
    """One session: the lm_head to the first asker, then what each asks for, until one is gone."""
    if parallel.data_rank() == 0 and _ends_a_replica():
        _send_head(engine, askers, block)
    replica = parallel.data_rank()
    while True:
        whole = not any(asker.gone for asker in askers)  # else the others may never ask
        asked = [asker.ask(engine.shape.vocab) for asker in askers] if whole else []
        said = (replica, asked, next((a.gone for a in askers if a.gone), ""))
        rounds = parallel.gather_over_all([said] if _is_first_of_last_stage() else [])
        if gone := next((g for _, _, g in rounds if g), ""):
            if torch.distributed.get_rank() == 0:
                print(f"the student is gone: {gone}; waiting for the next", flush=True)
            return
        [mine] = [asked for at, asked, _ in rounds if at == replica]
        _answer(engine, mine, askers)


def _answer(
    engine: Engine, asked: Sequence[list[list[list[int]]]], askers: Sequence[_Asker]
) -> None:
    """One batch of each asker in turn; the askers are those of the data_port."""
    batches: list[Batch] = []
    turns: list[_Asker] = []
    for row in zip_longest(*asked):
        for i, documents in enumerate(row):
            if documents is not None:
                batches.append(collate([Sample(d, [0.0] * len(d)) for d in documents]))
                turns += askers[i : i + 1]
    turn = iter(turns)
    dtype = DTYPES[_dtype(engine)]

    def send(head: Head, _: Batch) -> None:
        if asker := next(turn, None):  # none: of no batch, but of ranks that meet in every layer
            asker.tell(head.hidden.to(dtype))

    engine.evaluate(batches, send)


@torch.no_grad()
def _send_head(engine: Engine, askers: Sequence[_Asker], block: int) -> None:
    weight = head_weight(engine)
    head = Head(weight, weight, engine.tp_group)
    for ids in torch.arange(engine.shape.vocab, device=weight.device).split(block):
        rows = head.rows(ids)
        if askers:
            askers[0].tell(rows)


def head_weight(engine: Engine) -> Tensor:
    """(V / TP, H) this rank's rows of the lm_head; of the last pipeline stage."""
    model = engine.chunks[-1]
    if engine.shape.tied:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _dtype(engine: Engine) -> Any:
    return next(n for n, d in DTYPES.items() if d == next(engine.chunks[-1].parameters()).dtype)


def _ends_a_replica() -> bool:
    return ps.is_pipeline_last_stage() and ps.get_context_parallel_rank() == 0


def _is_first_of_last_stage() -> bool:
    return _ends_a_replica() and ps.get_tensor_model_parallel_rank() == 0
