"""Directories for the time of a build. What a killed build leaves behind, the next one in the same place removes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator

from imgrun.building.tools import Tools, no_space_in, undisturbed
from imgrun.errors import HostError, PrivilegeError


def temporary_place() -> str:
    """Where large temporary trees go: $TMPDIR, or else a place on disk."""
    own = os.environ.get("TMPDIR")
    if own:
        return os.path.abspath(own)
    return "/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()


@contextlib.contextmanager
def workdir(tools: Tools, parent: str, prefix: str, mode: int) -> Iterator[str]:
    """A new directory in ``parent`` that only this build uses, gone afterwards with all that is in it.

    A lock on it tells that its build is alive. Raises HostError when it cannot be made.
    """
    try:
        _sweep(tools, parent, prefix)
        path, fd = _make(parent, prefix, mode)
    except OSError as error:
        raise _cannot(parent, error) from None
    try:
        yield path
    finally:
        try:
            with undisturbed():
                tools.remove_tree(path)
        finally:
            os.close(fd)


def _make(parent: str, prefix: str, mode: int) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        try:
            fd = _lock(path)
        except OSError:
            os.rmdir(path)
            raise
        # Another build may have taken it for a dead one's before it was locked.
        if fd is not None and os.path.exists(path):
            os.chmod(path, mode)
            return path, fd


def _lock(path: str) -> int | None:
    """Lock a directory; None when another holds it or it is no longer there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EWOULDBLOCK:
            return None
        raise
    return fd


def _sweep(tools: Tools, parent: str, prefix: str) -> None:
    """Remove our own directories in ``parent`` whose builds are dead."""
    for entry in list(os.scandir(parent)):
        if not entry.name.startswith(prefix):
            continue
        with contextlib.suppress(OSError, HostError):
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            fd = _lock(entry.path)
            if fd is not None:
                try:
                    tools.remove_tree(entry.path)
                finally:
                    os.close(fd)


def _cannot(parent: str, error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space_in(parent)
    kind = PrivilegeError if error.errno in (errno.EACCES, errno.EPERM) else HostError
    return kind(f"nothing can be written in {parent}: {error.strerror}", "choose another place")
