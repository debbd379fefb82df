"""Pumps between real pipes, files, sockets and terminals, driven by a loop as the supervisor's."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pty
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.relay import Pump, Relay, own_description, set_nonblocking

PATIENCE = 20.0


def drive(*pumps: Pump, until: Callable[[], bool] | None = None) -> None:
    """Poll and move until all pumps are done."""
    relay = Relay()
    relay.outputs = list(pumps)
    deadline = time.monotonic() + PATIENCE
    while relay.outputs_open() and not (until and until()):
        assert time.monotonic() < deadline, "the pumps do not come to an end"
        poll = select.poll()
        waiting = relay.register(poll)
        for fd, _ in poll.poll(100):
            waiting[fd].move()


class Writer(threading.Thread):
    """Writes all of the data to a descriptor, in pieces, and closes it."""

    def __init__(self, fd: int, data: bytes, piece: int = 1 << 16, pause: float = 0.0) -> None:
        super().__init__()
        self.fd, self.data, self.piece, self.pause = fd, data, piece, pause
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        try:
            for i in range(0, len(self.data), self.piece):
                view = memoryview(self.data)[i : i + self.piece]
                while view:
                    view = view[os.write(self.fd, view) :]
                time.sleep(self.pause)
        except OSError as e:
            self.error = e.errno
        os.close(self.fd)


class Reader(threading.Thread):
    """Reads a descriptor to its end, and closes it."""

    def __init__(self, fd: int, size: int = 1 << 16, pause: float = 0.0) -> None:
        super().__init__()
        self.fd, self.size, self.pause, self.data = fd, size, pause, b""
        self.start()

    def run(self) -> None:
        parts = []
        try:
            while part := os.read(self.fd, self.size):
                parts.append(part)
                time.sleep(self.pause)
        except OSError as e:
            assert e.errno == errno.EIO  # noqa: PT017 - the end of a terminal
        os.close(self.fd)
        self.data = b"".join(parts)


DATA = os.urandom(1 << 16) * 48  # 3 MiB: more than all buffers on the way


def pump_through(sink: int, data: bytes = DATA, *, blocking: bool = True, source_blocking: bool = False) -> Pump:
    read, write = os.pipe()
    os.set_blocking(read, source_blocking)
    os.set_blocking(sink, blocking)
    writer = Writer(write, data)
    pump = Pump(read, sink)
    drive(pump)
    writer.join()
    return pump


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("source_blocking", [True, False])
@pytest.mark.parametrize("pause", [0.0, 0.001])
def test_pipe_to_pipe(blocking: bool, source_blocking: bool, pause: float) -> None:
    read, write = os.pipe()
    reader = Reader(read, 1 << 14, pause)
    pump = pump_through(write, blocking=blocking, source_blocking=source_blocking)
    reader.join()
    assert pump.moved == len(DATA)
    assert hashlib.sha256(reader.data).digest() == hashlib.sha256(DATA).digest()


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND])
def test_pipe_to_file(tmp_path: Path, flags: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before\n")
    pump_through(os.open(path, os.O_WRONLY | flags))
    assert path.read_bytes() == (b"before\n" if flags == os.O_APPEND else b"") + DATA


def test_into_a_file_at_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"before\n")
    pump_through(os.dup(fd))
    os.write(fd, b"after\n")
    os.close(fd)
    assert path.read_bytes() == b"before\n" + DATA + b"after\n"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM])
@pytest.mark.parametrize("blocking", [True, False])
def test_pipe_to_socket(kind: int, blocking: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    reader = Reader(theirs.detach(), pause=0.0005)
    pump_through(ours.detach(), blocking=blocking)
    reader.join()
    assert reader.data == DATA


def test_pipe_to_terminal() -> None:
    master, slave = pty.openpty()
    import tty

    tty.setraw(slave)
    reader = Reader(master, 1000)
    data = bytes(range(256)) * 400
    pump_through(slave, data)
    reader.join()
    assert reader.data == data


def test_file_to_pipe(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(DATA)
    read, write = os.pipe()
    set_nonblocking(write)
    reader = Reader(read, 1 << 14, 0.0005)
    drive(Pump(os.open(path, os.O_RDONLY), write))
    reader.join()
    assert reader.data == DATA


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_device_to_pipe(device: str) -> None:
    read, write = os.pipe()
    set_nonblocking(write)
    pump = Pump(os.open(device, os.O_RDONLY), write)
    got = []

    def enough() -> bool:
        if device == "/dev/zero" and pump.moved:
            got.append(os.read(read, 1 << 16))
        return sum(map(len, got)) > 1 << 20

    drive(pump, until=enough)
    pump.close()
    assert set(b"".join(got)) <= {0}
    os.close(read)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_sink_without_a_reader_breaks_the_writer(kind: str) -> None:
    if kind == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        ours, theirs = socket.socketpair()
        theirs.close()
        write = ours.detach()
    source, source_write = os.pipe()
    writer = Writer(source_write, DATA)
    drive(Pump(source, write))
    writer.join()
    assert writer.error == errno.EPIPE


def test_a_full_disk_breaks_the_writer() -> None:
    source, source_write = os.pipe()
    writer = Writer(source_write, DATA)
    pump = Pump(source, os.open("/dev/full", os.O_WRONLY))
    drive(pump)
    writer.join()
    assert writer.error == errno.EPIPE
    assert pump.failure == errno.ENOSPC


def test_the_end_of_the_source_is_the_end_of_the_sink() -> None:
    read, write = os.pipe()
    source, source_write = os.pipe()
    os.close(source_write)
    pump = Pump(source, write)
    drive(pump)
    assert os.read(read, 1) == b""
    assert not pump.open
    pump.close()  # a second time does nothing
    os.close(read)


def test_a_reader_that_does_not_read_blocks_nobody() -> None:
    """One stuck stream must not hold up the other."""
    stuck_read, stuck_write = os.pipe()
    a_source, a_write = os.pipe()
    writer = Writer(a_write, DATA)
    stuck = Pump(a_source, stuck_write)
    read, write = os.pipe()
    reader = Reader(read)
    b_source, b_write = os.pipe()
    other = Writer(b_write, DATA)
    flowing = Pump(b_source, write)
    drive(stuck, flowing, until=lambda: not flowing.open)
    reader.join()
    assert reader.data == DATA
    assert stuck.open
    rest = Reader(stuck_read)
    drive(stuck)
    rest.join()
    writer.join()
    other.join()
    assert rest.data == DATA


def test_no_busy_waiting() -> None:
    """A pump that can do nothing waits in poll."""
    read, write = os.pipe()
    source, source_write = os.pipe()
    writer = Writer(source_write, DATA)
    pump = Pump(source, write)
    wakes = 0

    def count() -> bool:
        nonlocal wakes
        wakes += 1
        return time.monotonic() > end

    end = time.monotonic() + 0.5
    drive(pump, until=count)
    assert wakes < 100, f"{wakes} rounds in half a second of waiting for the reader"
    reader = Reader(read)
    drive(pump)
    reader.join()
    writer.join()
    assert reader.data == DATA


@given(st.lists(st.binary(min_size=1, max_size=20000), max_size=12))
def test_any_pieces(pieces: list[bytes]) -> None:
    read, write = os.pipe()
    reader = Reader(read, 777)
    pump_through(write, b"".join(pieces))
    reader.join()
    assert reader.data == b"".join(pieces)


# -- descriptors that others share -------------------------------------------------------------------------------------


def flags_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.mark.parametrize("kind", ["read end", "write end", "terminal", "socket", "file"])
def test_own_description_leaves_the_flags_of_others_alone(tmp_path: Path, kind: str) -> None:
    read, write = os.pipe()
    master, slave = pty.openpty()
    a, b = socket.socketpair()
    file = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    fd = {"read end": read, "write end": write, "terminal": slave, "socket": a.fileno(), "file": file}[kind]
    before = flags_of(fd)
    own = own_description(fd, os.O_WRONLY if kind == "write end" else os.O_RDONLY)
    set_nonblocking(own) if kind not in ("socket", "file") else None
    assert flags_of(fd) == before
    assert own > 2
    assert not os.get_inheritable(own)
    for other in (read, write, master, slave, file, own):
        os.close(other)
    a.close()
    b.close()


def test_own_description_of_a_pipe_without_a_reader() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(own_description(write, os.O_WRONLY))
    os.close(write)


def test_many_small_writes_fill_a_pipe_no_sooner_than_one_large() -> None:
    """A page moved for every line would fill the sink after sixteen of them, and stall a job that nobody reads yet."""
    (source, into), (out, sink) = os.pipe(), os.pipe()
    for fd in (source, sink):
        set_nonblocking(fd)
    pump = Pump(source, sink)
    lines = [b"%05d\n" % number for number in range(1000)]
    for line in lines:
        os.write(into, line)
        for _ in range(2):
            pump.move()
    assert os.read(out, 1 << 16) == b"".join(lines)
    os.close(into)
    os.close(out)
    pump.close()
