"""Which job is to be saved, what is asked for, and where it goes until it is complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

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
    image: int
    """A descriptor of its image, at whose path another may be by now."""
    fetching: int | None = None
    """The process that still fetches its memory, after a restore with ``lazy``."""

    @property
    def held_image(self) -> str:
        """A path to the image that the job has, for as long as the process that asks lives."""
        return f"/proc/{os.getpid()}/fd/{self.image}"


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
