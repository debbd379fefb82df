"""Everything imgrun reports as wrong, as one exception tree.

    ImgrunError                 125
    ├── SpecError               the request itself is wrong
    ├── ImageError              the image cannot be used
    │   ├── ImageMissing        no such file, not a file, not readable
    │   ├── ImageFormatError    unknown, encrypted, or a format this kernel lacks
    │   ├── ImageDamaged        truncated, or its journal is not clean
    │   ├── PartitionError      no root partition, or more than one
    │   ├── ImageArchError      made for another processor
    │   └── ImageBusy           another job holds it
    ├── CommandError            the image has no such program
    │   ├── CommandNotFound     127
    │   └── CommandNotExecutable 126
    ├── HostError               this host cannot give what was asked
    │   ├── NoSpace             a disk, or the loop devices, are used up
    │   ├── LimitError          a limit cannot be enforced here
    │   └── PrivilegeError      the caller lacks a right
    ├── JobError                about a job that exists, or does not
    │   ├── JobNotFound
    │   ├── NameInUse
    │   └── JobStateError       the job is not in a state that allows this
    ├── StartError              a step of starting the job failed
    ├── CheckpointError         the job could not be frozen; it runs on
    └── RestoreError            the checkpoint could not be continued; it is untouched

Each carries a one-line ``message`` (what is wrong with which thing), an optional ``hint`` (what to do), and the exit code
of the command line.
"""

from __future__ import annotations


class ImgrunError(Exception):
    """The base of all errors that imgrun reports to its user."""

    exit_code = 125

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SpecError(ImgrunError):
    """The request is malformed or contradicts itself."""


class ImageError(ImgrunError):
    """The image cannot be used."""


class ImageMissing(ImageError):
    """The image does not exist, is not a file or directory, or may not be read."""


class ImageFormatError(ImageError):
    """What the file holds is unknown, encrypted, or not supported by this kernel."""


class ImageDamaged(ImageError):
    """The file system is truncated or was not cleanly unmounted."""


class PartitionError(ImageError):
    """The disk has no root partition, more than one, or not the one asked for."""


class ImageArchError(ImageError):
    """The image holds programs for another processor."""


class ImageBusy(ImageError):
    """Another job or mount holds the image in a way that excludes this one."""


class CommandError(ImgrunError):
    """The command cannot be executed inside the image."""


class CommandNotFound(CommandError):
    """There is no such command in the image."""

    exit_code = 127


class CommandNotExecutable(CommandError):
    """The command exists in the image but cannot be executed."""

    exit_code = 126


class HostError(ImgrunError):
    """This host cannot do what was asked."""


class NoSpace(HostError):
    """A disk is full, or there is no free loop device."""


class LimitError(HostError):
    """A limit was asked for that this host cannot enforce."""


class PrivilegeError(HostError):
    """The caller may not do what was asked."""


class JobError(ImgrunError):
    """Something about one job."""


class JobNotFound(JobError):
    """No job has this id, prefix or name."""


class NameInUse(JobError):
    """Another job already has this name."""


class JobStateError(JobError):
    """The job's state does not allow the operation."""


class StartError(ImgrunError):
    """A step of starting the job failed; nothing of it remains."""


class CheckpointError(ImgrunError):
    """The job could not be frozen, and runs on as before."""


class RestoreError(ImgrunError):
    """The checkpoint could not be continued; it is untouched, and nothing runs."""
