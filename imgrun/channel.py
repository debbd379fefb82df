"""Messages with descriptors between processes on one host (unix(7), SCM_RIGHTS), as JSON.

Uses ``_socket``, the C half of ``socket``, whose Python half would cost each start 3 ms of imports.
"""

from __future__ import annotations

import _socket
import array
import json
from typing import Any

MAX_BYTES = 1 << 20
MAX_FDS = 200


class Channel:
    """One end of a connected SOCK_SEQPACKET socket. Every message is whole or absent."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        a, b = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        for end in (a, b):
            end.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, MAX_BYTES)
        return cls(a), cls(b)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Take over a descriptor of such a socket."""
        return cls(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: list[int] | tuple[int, ...] = ()) -> None:
        """Raises OSError (EPIPE, ECONNRESET) when the other end is gone."""
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.sendmsg([json.dumps(message).encode()], ancillary, _socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, close-on-exec; None when the other end is gone."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(MAX_BYTES, _socket.CMSG_SPACE(MAX_FDS * 4), _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return None
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            return None
        return json.loads(data), list(fds)

    def peer_uid(self) -> int:
        """The uid the other end had when it connected (SO_PEERCRED)."""
        credentials = self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[4:8], "little")

    def set_timeout(self, seconds: float | None) -> None:
        self._sock.settimeout(seconds)

    def close(self) -> None:
        self._sock.close()


def listen(path: str) -> _socket.socket:
    """A listening socket at ``path``, for its owner only."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    sock.bind(path)
    sock.listen(16)
    return sock


def accept(sock: _socket.socket) -> Channel:
    raw: Any = sock  # the type stubs leave out what socket.accept is made of
    fd, _ = raw._accept()
    return Channel.from_fd(fd)


def connect(path: str) -> Channel:
    """Raises OSError (ENOENT, ECONNREFUSED) when nobody listens."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return Channel(sock)
