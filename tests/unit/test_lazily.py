"""What CRIU is given for a lazy restore, and what it may ask for."""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path

from imgrun.checkpoints import lazily
from imgrun.checkpoints.lazily import EVENTS, UFFDIO, Granter


def asked(granter: Granter, data: bytes, *fds: int) -> bytes:
    with socket.socket(fileno=os.dup(granter.given["CRIU_UFFD_API_FD"])) as theirs:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        theirs.sendmsg([data], ancillary)
        granter.answer()
        return theirs.recv(100)


def test_nothing_is_asked_of_other_descriptors() -> None:
    """A checkpoint is hostile, and so may CRIU be that has read it."""
    granter = Granter(-1)
    ours, theirs = os.pipe()
    before = sorted(os.listdir("/proc/self/fd"))
    api = UFFDIO.pack(0xAA, EVENTS, 0)
    assert asked(granter, api, ours) == b"\0"
    assert asked(granter, api) == b"\0"
    assert asked(granter, api[:8], ours) == b"\0"
    assert asked(granter, api, ours, theirs) == b"\0"
    assert sorted(os.listdir("/proc/self/fd")) == before
    granter.close()
    os.close(ours)
    os.close(theirs)


def test_which_file_was_changed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert lazily.changed(str(log)) is None
    log.write_text("(00.000001)      3: Error (criu/mem.c:1): other\n")
    assert lazily.changed(str(log)) is None
    where = "(00.017427)      3: Error (criu/pages-digests.c:150): digests: "
    with log.open("a") as f:
        f.write(f"{where}[processes/pre-1/pages-1.img] was changed before 8388608\n")
    assert lazily.changed(str(log)) == "processes/pre-1/pages-1.img"
