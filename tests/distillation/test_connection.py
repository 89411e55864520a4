"""What passes between two jobs arrives as it was; what is not of the protocol does not get in."""

import socket
import threading
from contextlib import contextmanager

import pytest

from q3mega import device  # noqa: F401

# isort: split
import torch
from pydantic import BaseModel

from q3mega.distillation.service.connection import (
    GREETING,
    Connection,
    ConnectionLost,
    Listener,
    connect,
)


class Note(BaseModel):
    text: str


@contextmanager
def pair(timeout=5.0):
    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        yield Connection(_Tcp(a), timeout), Connection(_Tcp(b), timeout)


class _Tcp:
    """A local pair has no options of TCP."""

    def __init__(self, inner):
        self.inner = inner

    def setsockopt(self, *_):
        pass

    def __getattr__(self, name):
        return getattr(self.inner, name)


def proved(listening: bytes, dialling: bytes):
    """(the listener's end, the dialler's), each a Connection or what it raised."""
    found = {}

    def take(name, make):
        try:
            found[name] = make()
        except ConnectionLost as error:
            found[name] = error

    with Listener(0, listening, network=False) as listener:
        thread = threading.Thread(target=take, args=("there", lambda: listener.accept(5.0, 5.0)))
        thread.start()
        take("here", lambda: connect(listener.address, dialling, 5.0))
        thread.join()
    return found["there"], found["here"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_tensors_arrive_bit_for_bit(dtype):
    tensor = torch.randn(700, 300).mul(1000).to(dtype)  # more than a socket's buffer
    there, here = proved(b"key", b"key")

    def say():
        here.send(Note(text="é\n"))
        here.send_tensor(tensor)

    thread = threading.Thread(target=say)
    thread.start()
    assert there.receive(Note).text == "é\n"
    assert torch.equal(there.receive_tensor((700, 300), dtype), tensor)
    thread.join()
    here.close()
    with pytest.raises(ConnectionLost, match="closed the connection"):
        there.receive_tensor((1,), dtype)
    there.close()


def test_another_key_is_seen_by_both_sides():
    there, here = proved(b"key", b"another")
    assert isinstance(there, ConnectionLost) and "another key" in str(there)
    assert isinstance(here, ConnectionLost)


def test_a_stranger_is_turned_away():
    with Listener(0, b"", network=False) as listener:
        with socket.create_connection(listener.socket.getsockname()) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nhost: teacher\r\n\r\n" + b"x" * 48)
            with pytest.raises(ConnectionLost, match="it greets by b'GET / HTTP"):
                listener.accept(5.0, 5.0)
            assert stranger.recv(100)[: len(GREETING)] == GREETING  # and nothing of the key
        with pytest.raises(TimeoutError):
            listener.accept(0.05, 5.0)


@pytest.mark.parametrize("sent", [b"{}\n", b"[1]\n", b"cos\nsystem\n(S'true'\ntR.\n", b"[" * 9999])
def test_what_is_no_message_is_gone(sent):
    with pair() as (here, there):
        here.connection.sendall(sent + b"\n")
        with pytest.raises(ConnectionLost, match="which is no"):
            there.receive(Note)


def test_silence_is_gone_after_the_timeout():
    with pair(timeout=0.1) as (_, there), pytest.raises(ConnectionLost, match="says nothing"):
        there.receive(Note)
