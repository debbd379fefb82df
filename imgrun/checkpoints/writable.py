"""A --writable image in a checkpoint: how it is known again, and its copy, made once all that the job wrote is in it.

A directory gets it when the job has ended. An archive is complete before that: the image's file system stands still for it
(imgrun.checkpoints.still), or, where that cannot be, the image is added when the job has ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import Any

from imgrun import syscalls as sc
from imgrun.checkpoints import archive, identity
from imgrun.checkpoints.captured import SECONDS, Copying, await_detached
from imgrun.checkpoints.digests import digest_of
from imgrun.checkpoints.manifest import IMAGE
from imgrun.checkpoints.refusals import settles
from imgrun.checkpoints.still import Still
from imgrun.checkpoints.subject import How, Subject
from imgrun.errors import CheckpointError, ImgrunError, NoSpace
from imgrun.isolation.processes import children_of


class WritableImage:
    """The image of the job that is being saved."""

    def __init__(self, subject: Subject, how: How) -> None:
        """To be made while the process has no threads."""
        self._subject = subject
        self._how = how
        self._path, self._held = subject.spec.image, subject.held_image
        self.later = how.capture_image and how.archive and not settles(subject)
        """Whether it is added to an archive when the job has ended."""
        self._still: Still | None = None
        if how.capture_image and how.archive and not self.later:
            self._still = Still(self._open(os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def _open(self, flags: int) -> int:
        return os.open(f"/proc/{self._subject.init}/root", flags)

    def require_room(self, building: str) -> None:
        """Raise NoSpace when a directory has none for it."""
        if self._how.capture_image and not self._how.archive:
            _check_room_for(self._held, building)

    def settle(self, manifest: dict[str, Any]) -> str | None:
        """For an archive: note what is known of it while the job has it; a path to it, if it is to be copied now.

        It stands still then, until :meth:`let_go`. Raises OSError, ImgrunError.
        """
        if self._still is not None:
            self._still.begin()
            manifest["files"] = {IMAGE: _describe(self._held)}
        elif self.later:  # its size is known when it is written out
            root = self._open(os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            sc.syncfs(root)
            os.close(root)
        manifest["image"] = identity.open_image(self._path, self._held, self._subject.spec.partition) | {"later": self.later}
        return None if self._still is None else self._held

    def let_go(self) -> None:
        """Without that the job could not end, either."""
        if self._still is not None:
            self._still.end()

    def add(self, path: str) -> None:
        """Add it to the archive with this path, which is a good one, and stays one. Raises OSError, ImgrunError."""
        _await_complete(self._held)
        archive.add_image(path, self._how.compress, self._held, _describe(self._held))

    def take(self, building: str, manifest: dict[str, Any]) -> str | None:
        """For a directory, when the job has ended: note what is known of it, and copy it, if it is to be.

        Returns why it was not. Raises OSError, ImgrunError.
        """
        _await_complete(self._held)
        manifest["image"] = identity.image(self._path, self._held)
        if self._how.capture_image:
            try:
                with Copying(target := f"{building}/{IMAGE}", "--dereference", "--no-target-directory", self._held, target):
                    pass
            except ImgrunError as e:
                with contextlib.suppress(OSError):
                    os.unlink(f"{building}/{IMAGE}")
                return e.message
        return None


def _check_room_for(image: str, directory: str) -> None:
    """Raise NoSpace when a copy of the image does not fit, unless the copy can share the blocks of the original."""
    needed = os.stat(image).st_blocks * 512
    space = os.statvfs(directory)
    if needed > space.f_bavail * space.f_frsize and not _shares_blocks(image, directory):
        raise NoSpace(f"the image takes {needed >> 20} MiB, which {directory} has not", "free some, or save elsewhere")


def _shares_blocks(image: str, directory: str) -> bool:
    probe = f"{directory}/work/reflink"
    words = ["cp", "--reflink=always", "--sparse=auto", image, probe]
    shared = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode == 0
    if os.path.exists(probe):
        os.unlink(probe)
    return shared


def _describe(path: str) -> dict[str, Any]:
    """Size and hash of what is to be in an archive."""
    digest = digest_of(path)
    return {"size": digest.size, "xxh128": digest.xxh128}


def _await_complete(image: str) -> None:
    """Wait until all that the job wrote into an image is there. Raises CheckpointError when that takes too long.

    What serves it without root is, as this process, a child of the supervisor's, and writes until it ends.
    """
    await_detached(image)
    status = os.stat(image)
    deadline = time.monotonic() + SECONDS
    while any(_has_open(pid, status) for pid in children_of(os.getppid()) if pid != os.getpid()):
        if time.monotonic() > deadline:
            raise CheckpointError(f"what serves the image {image} does not end", "check the image")
        time.sleep(0.01)


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    place = f"/proc/{pid}/fd"
    try:
        names = os.listdir(place)
    except OSError:
        return False  # it has ended
    for name in names:
        with contextlib.suppress(OSError):  # it is closed just now
            if os.path.samestat(os.stat(f"{place}/{name}"), wanted):
                return True
    return False
