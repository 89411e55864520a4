"""Messages and tensors between two jobs, over TCP.

A message is a line of JSON, checked by the model that reads it; a tensor is its memory, in a shape
and dtype that both sides know beforehand. Nothing that comes in is unpickled or evaluated. Both
sides first prove that they hold the same key (HMAC-SHA256 over two nonces). Nothing is encrypted.
"""

import contextlib
import hmac
import json
import secrets
import socket
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

GREETING = b"q3mega-teacher-2"  # the last sign is the protocol's version
HANDSHAKE_TIMEOUT_S = 30.0  # seconds in which the other side greets
MAX_MESSAGE_BYTES = 1 << 26  # bytes of a message
NONCE_BYTES = 32
_M = TypeVar("_M", bound=BaseModel)


class ConnectionLost(Exception):
    """The other side is not there, says nothing, or says what is no message."""


class Connection:
    """One connection. timeout: seconds without a byte, after which the other side is gone."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host without power
        connection.settimeout(timeout)
        self.connection = connection

    def send(self, message: BaseModel) -> None:
        self._write(message.model_dump_json().encode() + b"\n")

    def receive(self, kind: type[_M]) -> _M:
        """The next message. Raises ConnectionLost for what is none of that kind."""
        line = bytearray()
        while not line.endswith(b"\n"):
            if len(line) > MAX_MESSAGE_BYTES:
                raise ConnectionLost(f"it sent a message of more than {MAX_MESSAGE_BYTES} bytes")
            ahead = self._some(1 << 16, socket.MSG_PEEK)  # what follows the line stays unread
            line += self._read(ahead.find(b"\n") + 1 or len(ahead))
        try:
            return kind.model_validate(json.loads(line))
        except (ValueError, RecursionError) as error:
            what = "no JSON" if not isinstance(error, ValidationError) else f"no {kind.__name__}"
            raise ConnectionLost(f"it sent {bytes(line[:80])!r}, which is {what}") from None

    def send_tensor(self, tensor: Tensor) -> None:
        self._write(_bytes(tensor.detach().cpu().contiguous()))

    def receive_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the CPU, in pinned memory where there is a GPU to copy it to."""
        tensor = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        self._fill(_bytes(tensor))
        return tensor

    def prove(self, key: bytes, *, dialled: bool) -> None:
        """Greet the other side and prove to each other that both hold the key.

        Raises ConnectionLost when the other side does not hold it.
        """
        mine = secrets.token_bytes(NONCE_BYTES)
        self._write(GREETING + mine)
        said = self._read(len(GREETING) + NONCE_BYTES)
        if not said.startswith(GREETING):
            raise ConnectionLost(f"it greets by {said[: len(GREETING)]!r}, not {GREETING!r}")
        theirs = said[len(GREETING) :]
        nonces = mine + theirs if dialled else theirs + mine

        def proof(role: bytes) -> bytes:
            return hmac.digest(key, role + nonces, "sha256")

        if dialled:  # who listens shows nothing to a stranger
            self._write(proof(b"student"))
        other = b"teacher" if dialled else b"student"
        if not hmac.compare_digest(self._read(NONCE_BYTES), proof(other)):
            raise ConnectionLost("it holds another key")
        if not dialled:
            self._write(proof(b"teacher"))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _write(self, data: Any) -> None:
        try:
            self.connection.sendall(data)
        except OSError as error:
            raise ConnectionLost(_told(error)) from None

    def _some(self, most: int, flags: int = 0) -> bytes:
        try:
            found = self.connection.recv(most, flags)
        except OSError as error:
            raise ConnectionLost(_told(error)) from None
        if not found:
            raise ConnectionLost("it closed the connection")
        return found

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                found = self.connection.recv_into(view)
            except OSError as error:
                raise ConnectionLost(_told(error)) from None
            if not found:
                raise ConnectionLost("it closed the connection")
            view = view[found:]


class Listener:
    """Waits for connections: on all of this machine's networks, or from this machine alone."""

    def __init__(self, port: int, key: bytes, *, network: bool) -> None:
        """port 0: any free one. Raises OSError when it is taken."""
        self.key = key
        self.socket = socket.create_server(("" if network else "127.0.0.1", port))
        host = socket.gethostname() if network else "127.0.0.1"
        self.address = f"{host}:{self.socket.getsockname()[1]}"

    def accept(self, patience: float, timeout: float) -> Connection:
        """Who comes next and proves the key. Raises TimeoutError after `patience` seconds without
        anyone, ConnectionLost for a stranger."""
        self.socket.settimeout(patience)
        connection, _ = self.socket.accept()
        wire = Connection(connection, HANDSHAKE_TIMEOUT_S)
        try:
            wire.prove(self.key, dialled=False)
        except ConnectionLost:
            wire.close()
            raise
        connection.settimeout(timeout)
        return wire

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def connect(address: str, key: bytes, timeout: float) -> Connection:
    """A proved connection to `host:port`. Raises ConnectionLost."""
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), HANDSHAKE_TIMEOUT_S)
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectionLost(f"{address}: {_told(error)}") from None
    wire = Connection(connection, HANDSHAKE_TIMEOUT_S)
    try:
        wire.prove(key, dialled=True)
    except ConnectionLost:
        wire.close()
        raise
    connection.settimeout(timeout)
    return wire


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _told(error: Exception) -> str:
    return "it says nothing" if isinstance(error, TimeoutError) else str(error)
