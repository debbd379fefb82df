"""Hashing memory while CRIU still writes it, and sending it on its way to the disk: little is left to do after it."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator

from imgrun import syscalls as sc
from imgrun.checkpoints.digests import DIRECTORY, FILE, PIECE, Parts, hash_piece, open_inside, walk
from imgrun.checkpoints.manifest import is_memory
from imgrun.errors import CheckpointError

LAST = 19
PAUSE = 0.01
"""Seconds between two looks for more."""
FEW = 200
"""Files that are synced one by one, which takes each about a millisecond."""


class Ahead:
    """Hashes what is complete of CRIU's images, piece by piece: one thread is faster than CRIU."""

    def __init__(self, top: int, place: str, *, write: bool) -> None:
        """``place`` is the directory of the images, below the descriptor ``top``.

        ``write``: what is hashed begins to be written to the disk as well, which takes time from CRIU.
        """
        self._top = top
        self._place = place
        self._write = write
        self._parts: Parts = {}
        self._taken: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, knowing nothing. From here on this process has several threads; not where there is one processor only."""
        self._stop.clear()
        self._parts.clear()
        self._taken.clear()
        if len(os.sched_getaffinity(0)) > 1:
            self._thread = threading.Thread(target=self._work)
            self._thread.start()

    def known(self) -> set[tuple[str, int]]:
        """The pieces that are hashed by now."""
        return set(self._parts)

    def stop(self) -> Parts:
        """No more of it; returns what is known."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._parts

    def _work(self) -> None:
        buffer = bytearray(1 << 20)
        # Of this thread alone (setpriority(2)): CRIU, for which the job waits, comes first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
        try:
            while not self._stop.is_set():
                name, start = self._next()
                if not name:
                    self._stop.wait(PAUSE)
                    continue
                fd = open_inside(self._top, name)
                try:
                    if self._write:
                        sc.begin_writing(fd)
                    digest = hash_piece(fd, start, buffer, self._stop.is_set)
                    if digest is not None:
                        self._parts[name, start] = digest
                finally:
                    os.close(fd)
        except (OSError, ValueError):
            return  # what is not known is hashed in the end, and that fails if it must

    def _next(self) -> tuple[str, int]:
        """The path and start of a piece that is complete and not hashed yet; an empty path when there is none."""
        for name, size in self._memory(self._place):
            start = self._taken.get(name, 0)
            if start + PIECE <= size:
                self._taken[name] = start + PIECE
                return name, start
        return "", 0

    def _memory(self, place: str) -> Iterator[tuple[str, int]]:
        """The files with memory, those of earlier rounds too, and their sizes."""
        here = os.open(place, DIRECTORY, dir_fd=self._top)
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    name = f"{place}/{entry.name}"
                    if is_memory(name):
                        yield name, entry.stat(follow_symlinks=False).st_size
                    elif entry.is_dir(follow_symlinks=False):
                        yield from self._memory(name)
        finally:
            os.close(here)


class Syncing:
    """Has the kernel write a directory with all that is in it to the disk, beside what we do meanwhile."""

    def __init__(self, top: int) -> None:
        """``top`` was opened before any of it was written: a failure of the disk is told to whoever had something open."""
        self._top = top
        self._failure: OSError | CheckpointError | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def finish(self) -> None:
        """Wait until everything that was there in the beginning is on the disk. Raises OSError, and what ``walk`` raises."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            # One by one where that can be: what others have written to the same disk may be much more.
            if not _sync_few(self._top):
                sc.syncfs(self._top)
        except (OSError, CheckpointError) as e:
            self._failure = e


def _sync_few(top: int) -> bool:
    """Write each file and directory below ``top`` to the disk; False, and not all of them, when they are more than a few."""
    for number, entry in enumerate(walk(top, os.listdir(top))):
        if number == FEW:
            return False
        if stat.S_ISREG(entry.status.st_mode) or stat.S_ISDIR(entry.status.st_mode):
            fd = os.open(entry.name, FILE | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.parent)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    os.fsync(top)
    return True
