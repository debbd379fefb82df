"""A checkpoint as HTCondor can carry it: one file in the sandbox, complete or absent.

HTCondor's file transfer follows links and loses owners, extended attributes and special files; and what a job leaves at an
eviction it takes back without being told when it is a file, but not when it is a directory. So the checkpoint, and what the
job has written to its sandbox, becomes an archive of tar's.

In the end the starter sends home what has another time (in seconds) or size than when it brought the sandbox. The shadow is
to tell it what had changed in earlier lives, but does not after an eviction, when it takes the job's SpooledOutputFiles for a
list of outputs. So what was written before, and only brought and kept since, has to look newer.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from imgrun.errors import CheckpointError, ImgrunError, NoSpace, RestoreError
from imgrun.helper import find_program
from imgrun.storage.trees import remove_tree

OUTPUT = "sandbox"
"""The directory in the archive with what the job wrote to its sandbox."""
TAR = ("--numeric-owner", "--xattrs", "--xattrs-include=*")


def pack(checkpoint: str, target: str, sandbox: str, names: Iterable[str]) -> None:
    """Make the archive ``target`` of the checkpoint and of these files of the sandbox.

    To be called with the rights over its files that the job had. Raises NoSpace or CheckpointError; ``target`` is then
    what it was.
    """
    building = f"{checkpoint}.tar"
    try:
        _tar("--create", "--sparse", *TAR, f"--file={building}", f"--directory={checkpoint}", "--", ".")
        if found := [f"./{name}" for name in sorted(names)]:
            # The names of the archive's members change, and those that hard links point to; not what symbolic links say.
            move = f"--transform=s,^\\./,./{OUTPUT}/,S"
            _tar("--append", "--sparse", move, *TAR, f"--file={building}", f"--directory={sandbox}", "--", *found)
        os.chmod(building, 0o600)
        os.rename(building, target)
    except OSError as e:
        raise CheckpointError(f"the checkpoint could not be moved to {target}: {e.strerror}", "see the sandbox") from e
    finally:
        remove_tree(building)


def make_newer(path: str) -> None:
    """Give a file, if there is one, a time that the starter does not know."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9), follow_symlinks=False)


def unpack(source: str, checkpoint: str, sandbox: str, *, newer: bool) -> None:
    """Make a checkpoint of an archive, and put the job's files back into the sandbox; ``newer`` than those that were brought
    into it. Raises RestoreError."""
    pid = os.fork()
    if pid == 0:
        _unpack_as_job(source, checkpoint, sandbox, newer)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RestoreError(
            f"the checkpoint {source} could not be unpacked", "see the line above; without it the job starts anew"
        )


def _unpack_as_job(source: str, checkpoint: str, sandbox: str, newer: bool) -> None:
    """In a process of its own, with the ids that the job had: its files may belong to any of them."""
    from imgrun.cli import report
    from imgrun.isolation import rootless

    status = 1
    try:
        if not rootless.is_host_root():
            rootless.enter()
        remove_tree(checkpoint)
        os.mkdir(checkpoint, 0o700)
        _tar("--extract", "--same-permissions", "--same-owner", *TAR, f"--file={source}", f"--directory={checkpoint}")
        output = f"{checkpoint}/{OUTPUT}"
        for name in os.listdir(output) if os.path.isdir(output) else ():
            path = f"{sandbox}/{name}"
            brought = _seconds(path)
            remove_tree(path)
            os.rename(f"{output}/{name}", path)
            if newer and brought == _seconds(path):
                make_newer(path)
        remove_tree(output)
        status = 0
    except ImgrunError as e:
        report(e)
    except OSError as e:
        report(RestoreError(str(e)))
    finally:
        os._exit(status)


def _seconds(path: str) -> int | None:
    """When the file was modified; None when there is none."""
    return os.lstat(path).st_mtime_ns // 10**9 if os.path.lexists(path) else None


def _tar(*words: str) -> None:
    program = find_program("tar")
    if program is None:
        raise CheckpointError("tar is not installed, which packs a job's files for HTCondor", "install tar")
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        why = done.stderr.strip().splitlines()[:1] or ["no reason given"]
        if "No space left" in done.stderr or "quota" in done.stderr:
            raise NoSpace("no space to pack the job's files for HTCondor", "ask for more disk: request_disk")
        raise CheckpointError(why[0], "see the sandbox")
