"""What CRIU is given for a lazy restore: the hashes of the memory, and leave to fetch it where the job has a user namespace.

The processes run before their memory is read. CRIU, ours, compares each piece of a file with memory before the first page of
it is used: its lazy-pages when a process touches it, its restore what it reads itself. What was good once is not looked at
again, and is read once more for use: this finds damage, not somebody who changes the file while it is being restored.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import os
import struct
from typing import NamedTuple

from imgrun.checkpoints.criu_process import WORK
from imgrun.checkpoints.digests import DIRECTORY, PIECE, open_inside
from imgrun.checkpoints.manifest import OLDER, Checkpoint, is_memory
from imgrun.errors import RestoreError
from imgrun.isolation.rootless import is_host_root

NEEDS = (
    "its memory is read first, not lazily: that needs root of the host, and /dev/userfaultfd (Linux 6.1) or --userns off; "
    "and a kernel with userfaultfd"
)
PATCH = "0010-verify-pages-while-reading"
"""Of a CRIU that verifies what it reads."""
DIGESTS = "digests"
IMAGE = struct.Struct("=QQ64s")
"""Of each file, before its hashes: the inode, the size, the name; see PATCH."""
DEVICE = "/dev/userfaultfd"
API = 0xC018AA3F
"""UFFDIO_API of userfaultfd(2), whose argument is a struct uffdio_api: version, features, ioctls."""
UFFDIO = struct.Struct("=QQQ")
FORK = 1 << 1
EVENTS = FORK | 1 << 2 | 1 << 3 | 1 << 6
"""To be told when a process with lazy memory forks, and remaps, empties or unmaps some of it."""


class Lazily(NamedTuple):
    """How a lazy restore can be done here."""

    verifies: bool
    """Whether CRIU compares what it reads; or else somebody has to, before the processes run."""
    device: int
    """/dev/userfaultfd, of which CRIU in the job makes what the kernel does not let it make otherwise; -1 for none."""

    def close(self) -> None:
        if self.device >= 0:
            os.close(self.device)


def possible() -> Lazily | None:
    """How it can be done here, as far as that is known without asking CRIU; None for not at all."""
    if not is_host_root():
        return None  # UFFD_FEATURE_EVENT_FORK is for CAP_SYS_PTRACE in the first user namespace
    import imgrun_criu

    if PATCH not in imgrun_criu.build()["patches"]:
        return Lazily(False, -1)
    try:
        return Lazily(True, os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return Lazily(True, -1)


def write_digests(checkpoint: Checkpoint, work: str) -> dict[str, str]:
    """Write the hashes of what is in the files with memory to CRIU's directory. Returns what makes it compare them.

    Raises RestoreError.
    """
    try:
        _write_digests(checkpoint, f"{work}/{DIGESTS}")
    except (OSError, ValueError, LookupError, TypeError, struct.error) as e:
        raise RestoreError(f"the hashes of the memory in {checkpoint.path} cannot be used: {e}", OLDER) from e
    return {"CRIU_PAGES_DIGESTS": f"{WORK}/{DIGESTS}"}


def _write_digests(checkpoint: Checkpoint, path: str) -> None:
    directory = os.open(checkpoint.path, DIRECTORY)
    try:
        files = [(name, known) for name, known in checkpoint.manifest["files"].items() if is_memory(name)]
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as f:
            f.write(struct.pack("=QQ", PIECE, len(files)))
            for name, known in files:
                fd = open_inside(directory, name)
                inode = os.fstat(fd).st_ino
                os.close(fd)
                f.write(IMAGE.pack(inode, known["size"], name.encode()))
                count = -(-known["size"] // PIECE)
                f.write(b"".join(bytes.fromhex(piece) for piece in known["pieces"][:count]))
    finally:
        os.close(directory)


def changed(log: str) -> str | None:
    """The file with memory that CRIU found changed, from what it logged; None for none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as f:
            return next((line.partition("[")[2].partition("]")[0] for line in f if "was changed before" in line), None)
    except OSError:
        return None


class Granter:
    """Gives the userfaultfds of processes in a user namespace what only root of the host may ask for."""

    def __init__(self, device: int) -> None:
        self._ours, self._theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        self.given = {"CRIU_UFFD_DEVICE_FD": device, "CRIU_UFFD_API_FD": self._theirs.fileno()}
        """What CRIU needs for that, by the variables in which it finds it."""

    def fileno(self) -> int:
        return self._ours.fileno()

    def answer(self) -> None:
        """One request: a userfaultfd with the struct uffdio_api that it is to be asked with."""
        data, ancillary, _, _ = self._ours.recvmsg(UFFDIO.size, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            answer = _enable(fds[0], data) if fds else b"\0"
        finally:
            for fd in fds:
                os.close(fd)
        self._ours.send(answer, _socket.MSG_NOSIGNAL)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


def _enable(fd: int, asked: bytes) -> bytes:
    """CRIU reads a hostile checkpoint: what it sends may be anything."""
    if len(asked) != UFFDIO.size or os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
        return b"\0"
    if UFFDIO.unpack(asked)[1] & ~EVENTS:
        return b"\0"
    try:
        return fcntl.ioctl(fd, API, asked)
    except OSError:
        return b"\0"
