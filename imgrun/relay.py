"""Carrying the job's input and output: bytes move between descriptors by splice(2), in order, none lost.

The supervisor's loop asks every pump which events it waits for, polls, and lets the ready ones move what they can. Nothing
here blocks: not on a slow reader, not on a closed one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import _socket

CHUNK = 1 << 18
IN, OUT = select.POLLIN, select.POLLOUT
SPLICE_F_MOVE, SPLICE_F_NONBLOCK = 1, 2
FIONREAD = 0x541B
TIOCGPTN = 0x80045430
MSG_DONTWAIT, MSG_NOSIGNAL = 0x40, 0x4000


def set_nonblocking(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)


def bytes_waiting(pipe: int) -> int:
    """What can be read from a pipe at once (FIONREAD, ioctl(2)). Raises OSError for what is not a pipe or the like."""
    return int.from_bytes(fcntl.ioctl(pipe, FIONREAD, bytes(4)), "little")


def own_description(fd: int, flags: int) -> int:
    """A descriptor for what ``fd`` is open on that may be made non-blocking without others noticing.

    Descriptors handed to us share their file status flags with the shell that gave them; opening them anew through
    /proc avoids changing theirs.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd)):
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            pass  # another user's terminal or pipe, or a socket behind it: use what we were given
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


class Pump:
    """Moves everything from ``source`` to ``sink`` and then closes both. Owns both descriptors.

    ``on_broken`` is called when the sink has no reader any more: the source is closed, so that the writer behind it
    learns of it (SIGPIPE), as in any pipeline.
    """

    def __init__(self, source: int, sink: int, *, close_sink: bool = True) -> None:
        self.source = source
        self.sink = sink
        self.moved = 0
        """Bytes delivered to the sink."""
        self.failure = 0
        """The error number with which the sink refused the rest, other than that nobody reads it any more."""
        self._close_sink = close_sink
        self._splice = True
        self._pending = b""
        self._wait_for_sink = False
        self._send: Callable[[bytes], int] = self._write
        self._socket: _socket.socket | None = None
        self._paused = False
        mode = os.fstat(sink).st_mode
        if stat.S_ISSOCK(mode):
            self._splice = False
            self._send = self._send_to_socket
            self._socket = _open_socket(sink)
        elif stat.S_ISCHR(mode):
            self._splice = False

    @property
    def open(self) -> bool:
        return self.source >= 0

    @property
    def unsent(self) -> bytes:
        """What was read and not delivered yet."""
        return self._pending

    def give(self, data: bytes) -> None:
        """Deliver this before anything else; nothing has been moved yet."""
        self._pending = data

    def interest(self) -> tuple[int, int] | None:
        """The descriptor and the event this pump waits for; None when it is done or paused."""
        if self.source < 0 or self._paused:
            return None
        return (self.sink, OUT) if self._pending or self._wait_for_sink else (self.source, IN)

    def move(self) -> None:
        """Move what can be moved now. Called when the awaited event came."""
        if self.source < 0:
            return
        try:
            if self._splice and not self._pending:
                self._move_by_splice()
            else:
                self._move_by_copy()
        except BlockingIOError:
            # The source was ready, so it is the sink that is full; or the other way round.
            self._wait_for_sink = not self._wait_for_sink
        except InterruptedError:
            pass
        except OSError as e:
            if e.errno == errno.EINVAL and self._splice:
                self._splice = False  # O_APPEND files and some devices cannot be spliced
            elif e.errno == errno.EIO and os.isatty(self.source):
                # A terminal we are in the background of, or a pty whose last user has gone.
                self._end_of_terminal()
            else:
                if e.errno not in (errno.EPIPE, errno.ECONNRESET):
                    self.failure = e.errno or 0
                self.close()

    def _move_by_splice(self) -> None:
        if self._few_bytes():
            self._move_by_copy()
            return
        n = os.splice(self.source, self.sink, CHUNK, flags=SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        self._wait_for_sink = False
        self.moved += n
        if n == 0:
            self.close()

    def _few_bytes(self) -> bool:
        """Whether so little waits in a pipe that moving its page would waste one of the few that the sink has room for."""
        try:
            return 0 < bytes_waiting(self.source) < select.PIPE_BUF
        except OSError:
            return False

    def _move_by_copy(self) -> None:
        if not self._pending:
            self._pending = os.read(self.source, CHUNK)
            if not self._pending:
                self.close()
                return
            self._wait_for_sink = True
            return
        n = self._send(self._pending)
        self.moved += n
        self._pending = self._pending[n:]
        self._wait_for_sink = bool(self._pending)

    def _write(self, data: bytes) -> int:
        # A sink that may block takes what poll promises: at least PIPE_BUF.
        return os.write(self.sink, data if not os.get_blocking(self.sink) else data[: select.PIPE_BUF])

    def _send_to_socket(self, data: bytes) -> int:
        assert self._socket is not None
        return self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL)

    def _end_of_terminal(self) -> None:
        try:
            background = not _is_master(self.source) and os.tcgetpgrp(self.source) != os.getpgrp()
        except OSError:
            background = False
        if background:
            self._paused = True
        else:
            self.close()

    def resume(self) -> None:
        """Try again after the terminal may have come back to the foreground (SIGCONT)."""
        self._paused = False

    def close(self) -> None:
        if self.source >= 0:
            os.close(self.source)
            self.source = -1
            if self._socket is not None:
                self._socket.close()
            if self._close_sink:
                os.close(self.sink)


def _is_master(terminal: int) -> bool:
    """Whether this is a pseudoterminal's master: it tells the foreground group of the other side (ioctl_tty(2))."""
    try:
        fcntl.ioctl(terminal, TIOCGPTN, bytes(4))
        return True
    except OSError:
        return False


def _open_socket(fd: int) -> _socket.socket:
    import _socket

    return _socket.socket(fileno=os.dup(fd))


class Relay:
    """All pumps of a job."""

    def __init__(self) -> None:
        self.inputs: list[Pump] = []
        self.outputs: list[Pump] = []

    def pumps(self) -> list[Pump]:
        return self.inputs + self.outputs

    def register(self, poll: select.poll, *, inputs: bool = True) -> dict[int, Pump]:
        """Add what the pumps wait for to ``poll``; returns whom to call for which descriptor."""
        waiting: dict[int, Pump] = {}
        for pump in self.pumps() if inputs else self.outputs:
            interest = pump.interest()
            if interest is not None:
                poll.register(*interest)
                waiting[interest[0]] = pump
        return waiting

    def stop_input(self) -> None:
        for pump in self.inputs:
            pump.close()

    def failures(self) -> list[str]:
        """Why output could not be written, other than that nobody reads it any more."""
        return [os.strerror(pump.failure) for pump in self.outputs if pump.failure]

    def outputs_open(self) -> bool:
        return any(pump.open for pump in self.outputs)

    def close(self) -> None:
        for pump in self.pumps():
            pump.close()


class Terminal:
    """The caller's terminal, raw while a job with ``--tty`` uses it; sizes are passed on (tty_ioctl(4))."""

    def __init__(self, fd: int) -> None:
        import termios
        import tty

        self._fd = fd
        self._termios = termios
        self._saved = termios.tcgetattr(fd)
        tty.setraw(fd, termios.TCSADRAIN)

    def copy_size(self, master: int) -> None:
        size = fcntl.ioctl(self._fd, self._termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(master, self._termios.TIOCSWINSZ, size)

    def restore(self) -> None:
        self._termios.tcsetattr(self._fd, self._termios.TCSADRAIN, self._saved)
