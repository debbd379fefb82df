"""Messages with descriptors: whole or absent, and nothing kept open by accident."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.channel import MAX_FDS, Channel, accept, connect, listen

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=5))
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, Any]]) -> None:
    a, b = Channel.pair()
    try:
        for message in messages:
            a.send(message)
        assert [b.receive() for _ in messages] == [(message, []) for message in messages]
    finally:
        a.close()
        b.close()


def test_descriptors_are_passed_and_closed_on_exec() -> None:
    a, b = Channel.pair()
    read, write = os.pipe()
    a.send({"n": 1}, [write])
    os.close(write)
    received = b.receive()
    assert received is not None
    message, (copy,) = received
    assert message == {"n": 1}
    assert not os.get_inheritable(copy)
    os.write(copy, b"x")
    assert os.read(read, 2) == b"x"
    for fd in (read, copy):
        os.close(fd)
    a.close()
    b.close()


def test_many_descriptors() -> None:
    a, b = Channel.pair()
    null = os.open("/dev/null", os.O_RDONLY)
    a.send({}, [null] * MAX_FDS)
    received = b.receive()
    assert received is not None
    assert len(received[1]) == MAX_FDS
    for fd in (*received[1], null):
        os.close(fd)
    a.close()
    b.close()


def test_a_large_message() -> None:
    a, b = Channel.pair()
    message = {"text": "x" * 100_000}
    a.send(message)
    assert b.receive() == (message, [])
    a.close()
    b.close()


def test_the_end_of_the_other_side() -> None:
    a, b = Channel.pair()
    a.send({"last": True})
    a.close()
    assert b.receive() == ({"last": True}, [])
    assert b.receive() is None
    with pytest.raises(OSError, match="pipe"):
        b.send({})
    b.close()


def test_an_end_that_was_closed_with_messages_unread() -> None:
    a, b = Channel.pair()
    b.send({"never": "read"})
    a.close()
    assert b.receive() is None
    b.close()


def test_time_out() -> None:
    a, b = Channel.pair()
    a.set_timeout(0.01)
    with pytest.raises(TimeoutError):
        a.receive()
    a.close()
    b.close()


def test_what_is_not_json_is_a_value_error() -> None:
    raw, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel.from_fd(theirs.detach())
    raw.send(b"\xff{")
    with pytest.raises(ValueError):
        channel.receive()
    raw.close()
    channel.close()


def test_listen_and_connect(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        connect(path)
    server = listen(path)
    client = connect(path)
    served = accept(server)
    assert served.peer_uid() == os.getuid()
    client.send({"hello": 1})
    assert served.receive() == ({"hello": 1}, [])
    served.send({"you": 2})
    assert client.receive() == ({"you": 2}, [])
    for end in (client, served):
        assert not os.get_inheritable(end.fileno())
        end.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        connect(path)
