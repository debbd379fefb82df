"""What is refused before a job is saved, and what is said when a checkpoint cannot be written."""

from __future__ import annotations

import errno
import fcntl
import os
import re

from imgrun.checkpoints.identity import HOW_TO_GET_CRIU, criu_version
from imgrun.checkpoints.subject import How, Subject
from imgrun.errors import CheckpointError, ImgrunError, JobStateError, NoSpace
from imgrun.spec import JobSpec


def unfreezable(spec: JobSpec) -> str | None:
    """Why no job of this spec can be frozen here; None where nothing is known to be against it."""
    if spec.init != "shim":
        return f"it cannot be frozen with --init {spec.init}"
    if spec.tty:
        return "it cannot be frozen with a terminal"
    if spec.seccomp != "off":
        return "it cannot be frozen with --seccomp"
    return None if criu_version() is not None else f"CRIU is not installed ({HOW_TO_GET_CRIU})"


LONGEST = 230
"""Bytes of a name, beside which there is one that is longer until it is complete."""


def refuse(subject: Subject, target: str, how: How) -> None:
    if len(os.fsencode(os.path.basename(target))) > LONGEST:
        raise not_written(target, OSError(errno.ENAMETOOLONG, ""))
    if how.archive:
        if target == "-" and fcntl.fcntl(how.output, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise not_written(target, OSError(errno.EBADF, ""))
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
    if how.capture_image and not os.path.isfile(subject.held_image):
        raise CheckpointError("an image that is no file cannot be captured", "leave --capture-image out")
    if how.capture_image and target == "-" and not settles(subject):
        raise CheckpointError(
            "the image is complete only when the job has ended, and who reads standard output might have gone by then",
            "give --archive FILE, or a directory, with --to",
        )


def settles(subject: Subject) -> bool:
    """Whether all that the job has written into its image can be brought to be there while the job has it."""
    from imgrun.image import probe

    info = probe(subject.held_image, subject.spec.partition)
    return not subject.rootless and (not info.unclean or info.replayable)


def not_written(target: str, error: OSError) -> CheckpointError:
    """What is said of a system call that failed while a checkpoint was written to ``target``."""
    number, place = error.errno, os.path.dirname(target)
    if target == "-":
        if number in (errno.EPIPE, errno.ECONNRESET):
            return CheckpointError(
                "whoever reads standard output went away before the archive was complete", "see why it ended"
            )
        if number == errno.EBADF:
            return CheckpointError("standard output is not open for writing", "give --archive FILE, or a pipe")
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
        hint = "see what the limits of the user and of imgrun's cgroup leave, and try again"
        return CheckpointError(f"the checkpoint could not be made: {error.strerror}", hint)
    why, hint = error.strerror or str(error), "look at its disk, or save elsewhere"
    if number in (errno.EACCES, errno.EPERM):
        why, hint = f"you may not write to {place}", "give a path in a directory of yours"
    elif number == errno.EROFS:
        why, hint = "its file system is read-only", "save elsewhere"
    elif number == errno.ENAMETOOLONG:
        why, hint = "the name is too long", f"give one of no more than {LONGEST} bytes"
    elif number in (errno.EEXIST, errno.ENOTDIR):
        wrong = error.filename if number == errno.EEXIST and error.filename else place
        why, hint = f"{wrong} is no directory", "give another path"
    elif number in (errno.ENOENT, errno.ELOOP):
        hint = "give a path in a directory that is there"
    what = "standard output" if target == "-" else target
    return CheckpointError(f"the checkpoint could not be written to {what}: {why}", hint)


def explained(error: CheckpointError | OSError, building: str, target: str) -> ImgrunError:
    """What is said of an error while a checkpoint was made in the directory ``building``."""
    full = _is_full(building)
    if isinstance(error, CheckpointError) and not full:  # CRIU's log, which would say so, has no space either
        return error
    if isinstance(error, CheckpointError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = "on standard output" if target == "-" and not full else f"in {os.path.dirname(building if full else target)}"
        return NoSpace(f"no space for the checkpoint {where}", "free some, or save elsewhere")
    if error.errno == errno.ESRCH:  # its processes had gone when they were looked at
        return JobStateError("the job is ending", "see 'imgrun inspect' for how")
    return not_written(target, error)


def _is_full(directory: str) -> bool:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return False
    return disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < 1 << 16  # some do not tell what they have


def refuse_unsuitable(target: str) -> None:
    """Raise CheckpointError when ``target`` is there and neither an empty directory nor a checkpoint to be replaced.

    What else is in it would be lost with the checkpoint.
    """
    from imgrun.checkpoints.manifest import MANIFEST, NAMES

    try:
        names = set(os.listdir(target))
    except FileNotFoundError:
        return
    except OSError as e:
        if e.errno == errno.ENOTDIR and os.path.lexists(target):
            raise CheckpointError(f"{target} cannot hold a checkpoint: it is no directory", "give a new one") from e
        raise not_written(target, e) from e
    if os.path.islink(target) or os.path.ismount(target):
        raise CheckpointError(f"{target} cannot be replaced by a checkpoint", "give the name of a new directory in it")
    if names and not (names <= NAMES and _begins_as_ours(f"{target}/{MANIFEST}")):
        raise CheckpointError(f"{target} holds something that is no checkpoint", "give a new or an empty directory")


def _begins_as_ours(manifest: str) -> bool:
    """Whether a file is a manifest of ours: of any format, and be it damaged. Only its beginning is read."""
    try:
        fd = os.open(manifest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        begin = os.read(fd, 100)
    except OSError:
        return False
    finally:
        os.close(fd)
    return re.match(rb'{\s*"format": ?[0-9]+,\s*"imgrun": ?"', begin) is not None
