"""An archive back into a checkpoint, for one restore: below the state root, from where the new job takes the files.

An archive is hostile until all of it is seen. It is read in a process with little memory, and put into a new directory that
only its owner can enter, each name by itself: nothing outside of it can be named, through whatever link. What it may come
to, its manifest says, and that must fit on the disk before the rest is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from imgrun.apart import apart
from imgrun.checkpoints.manifest import DIRECTORY, Checkpoint, load
from imgrun.errors import ImgrunError, NoSpace, RestoreError
from imgrun.state import StateRoot
from imgrun.storage.trees import remove_tree

PLACE = "unpacked"
"""Of the state root: a directory for each archive that is being restored, locked for as long."""
MEMORY = 1 << 30
YOUNG = 60.0


def is_archive(path: str) -> bool:
    """Whether this is to be unpacked first: anything but a directory."""
    return os.path.exists(path) and not os.path.isdir(path)


class Unpacked:
    """The checkpoint that was in an archive, until the job that continues it has taken it."""

    def __init__(self, archive: str, *, allow: tuple[str, ...] = ()) -> None:
        """Unpack all of it. Raises RestoreError and NoSpace; nothing is left then."""
        from imgrun.checkpoints.unpacker import unpack

        self.archive = os.path.abspath(archive)
        root = StateRoot()
        root.prepare()
        source = _open(self.archive, allow)
        try:
            self.path, self._lock = _new_place(root)
            try:
                apart(lambda: unpack(source, self.archive, self.path), memory=MEMORY)
            except ImgrunError as e:
                self.close()
                if isinstance(e, RestoreError | NoSpace):
                    raise
                raise RestoreError(f"the archive {self.archive} cannot be unpacked: {e.message}", e.hint) from e
            except BaseException:
                self.close()
                raise
        finally:
            os.close(source)

    def close(self) -> None:
        with contextlib.suppress(ImgrunError):  # whoever comes next tries again
            remove_tree(self.path)
        os.close(self._lock)

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def opened(path: str, allow: tuple[str, ...] = ()) -> Iterator[Checkpoint]:
    """The checkpoint in a directory, or unpacked from an archive until the job is started. Raises RestoreError, NoSpace."""
    if not is_archive(path):
        yield load(path)
        return
    with Unpacked(path, allow=allow) as unpacked:
        yield load(unpacked.path)._replace(archive=unpacked.archive)


def _open(path: str, allow: tuple[str, ...]) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as e:
        hint = "ask its owner for it" if isinstance(e, PermissionError) else "see its path"
        raise RestoreError(f"the archive {path} cannot be read: {e.strerror}", hint) from None
    status = os.fstat(fd)
    wrong = None
    if not stat.S_ISREG(status.st_mode):
        wrong = ("is no file", "give the file that 'imgrun checkpoint --archive' made; save a stream to one first")
    elif status.st_uid not in (0, os.geteuid()) and "owner" not in allow:
        # As of a directory: it holds programs that would run as the caller.
        wrong = (f"belongs to uid {status.st_uid}, who could have put anything into it", "copy it, or --allow owner")
    if wrong:
        os.close(fd)
        raise RestoreError(f"{path} {wrong[0]}", wrong[1])
    return fd


def _new_place(root: StateRoot) -> tuple[str, int]:
    above = f"{root.path}/{PLACE}"
    os.makedirs(above, 0o700, exist_ok=True)
    name = os.urandom(6).hex()
    os.mkdir(f"{above}/.{name}", 0o700)
    lock = os.open(f"{above}/.{name}", DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Under its own name only once it is locked: unlocked would mean leftovers.
    os.rename(f"{above}/.{name}", f"{above}/{name}")
    return f"{above}/{name}", lock


def remove_leftovers(root: StateRoot) -> None:
    """What unpackers that were killed have left."""
    above = f"{root.path}/{PLACE}"
    try:
        names = os.listdir(above)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError, ImgrunError):
            fd = os.open(f"{above}/{name}", DIRECTORY)
            try:
                if name[0] == "." and time.time() - os.fstat(fd).st_mtime < YOUNG:
                    continue
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(f"{above}/{name}")
            finally:
                os.close(fd)
