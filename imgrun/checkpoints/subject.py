"""Which job is to be saved, what is asked for, where it goes until it is complete, and what is refused beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from imgrun.errors import CheckpointError
from imgrun.spec import JobSpec

COMPRESSED = (".zst", ".tzst")
"""What names of archives end in that are compressed without being asked for it."""


class Subject(NamedTuple):
    """The running job that is to be saved, as its supervisor knows it."""

    id: str
    spec: JobSpec
    hostname: str
    init: int
    scratch: str
    userns: bool
    rootless: bool
    usage: Callable[[], dict[str, Any]]
    """What the job has used so far, all its lives together."""
    input: dict[str, Any] | None
    """Where the job's input stands, when that is a file."""
    unsent: bytes
    """Input that the supervisor has read and the job has not been given."""
    shim: str
    """The program of its first two processes."""
    fetching: int | None = None
    """The process that still fetches its memory, after a restore with ``lazy``."""


class How(NamedTuple):
    """What is asked for beside a directory."""

    leave_running: bool = False
    archive: bool = False
    """The target is a file to be made, or ``-`` for the descriptor ``output``."""
    output: int = -1
    compress: bool = False
    capture_image: bool = False
    pre_dump: int = 0
    """Rounds in which memory is saved while the job runs; -1 for as many as are worth it."""

    @classmethod
    def asked(cls, message: dict[str, Any], fds: list[int]) -> How:
        """What another imgrun command asks for, with the descriptor that came with it. Raises KeyError, TypeError."""
        return cls(**message["how"])._replace(output=fds[0] if fds else -1)


def must_compress(path: str, asked: bool) -> bool:
    return asked or path.endswith(COMPRESSED)


def building_place(subject: Subject, target: str, how: How) -> str:
    """Where a checkpoint is made before it gets its name: beside that, and on the job's own disk for an archive."""
    if how.archive:
        return f"{os.path.dirname(subject.scratch)}/checkpoint.{subject.id}.new"
    return f"{os.path.abspath(target)}.{subject.id}.new"


def building_archive(subject: Subject, target: str, how: How) -> str | None:
    """What an archive is called until it is complete."""
    return f"{os.path.abspath(target)}.{subject.id}.new" if how.archive and target != "-" else None


def kept_log(subject: Subject, target: str) -> str:
    """Where CRIU's log is to be found after a failure."""
    return f"{os.path.dirname(subject.scratch)}/dump.log" if target == "-" else f"{target}.criu.log"


def refuse(subject: Subject, target: str, how: How) -> None:
    if how.archive:
        if target != "-" and os.path.lexists(target) and not os.path.isfile(target):
            raise CheckpointError(f"{target} cannot be replaced by an archive", "give the name of a file")
        if how.compress:
            from imgrun.checkpoints.archive import zstd

            zstd()
    else:
        refuse_unsuitable(target)
    writable = subject.spec.root == "writable"
    if writable and how.leave_running:
        raise CheckpointError(
            "a job that runs on would change its image, and the checkpoint be worthless",
            "stop it with the checkpoint, or start it without --writable",
        )
    if how.capture_image and not writable:
        raise CheckpointError("the job cannot change its image", "--capture-image is for jobs started with --writable")
    if how.capture_image and not os.path.isfile(subject.spec.image):
        raise CheckpointError("an image that is no file cannot be captured", "leave --capture-image out")
    if how.capture_image and how.archive:
        # What it wrote into it is known when it has ended; an archive is complete before that, or the job might be lost.
        raise CheckpointError("an archive cannot hold the image", "checkpoint to a directory, with --to")


def refuse_unsuitable(target: str) -> None:
    """Raise CheckpointError when ``target`` is there and neither an empty directory nor a checkpoint to be replaced."""
    from imgrun.checkpoints.manifest import MANIFEST

    try:
        names = set(os.listdir(target))
    except FileNotFoundError:
        return
    except OSError as e:
        raise CheckpointError(f"{target} cannot hold a checkpoint: {e.strerror}", "give a new directory") from e
    if os.path.islink(target) or os.path.ismount(target):
        raise CheckpointError(f"{target} cannot be replaced by a checkpoint", "give the name of a new directory in it")
    if names and MANIFEST not in names:
        raise CheckpointError(f"{target} holds something that is no checkpoint", "give a new or an empty directory")
