"""What of a job is saved beside its processes, and how: files, waiting input; and the mounts by which CRIU gets at where it
works.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from imgrun import criu
from imgrun import syscalls as sc
from imgrun.errors import CheckpointError, NoSpace
from imgrun.isolation.sources import id_map
from imgrun.relay import bytes_waiting
from imgrun.spec import JobSpec

SECONDS = 10
LAYERS = ("upper", "tmp", "var-tmp")


def memory_places(spec: JobSpec) -> list[str]:
    """The memory file systems that the job could write to."""
    return ["/dev/shm", *(mount.dst for mount in spec.mounts if mount.type == "tmpfs")]


def waiting_input(fd_path: str) -> bytes:
    """What is in the job's input pipe, which keeps it. The supervisor adds nothing to it meanwhile."""
    source = os.open(fd_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        waiting = bytes_waiting(source)
        if not waiting:
            return b""
        data = os.read(source, waiting)
        # Put it back for a job that runs on, or for one whose dump fails after this.
        back = os.open(fd_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(back, data)
        finally:
            os.close(back)
        return data
    finally:
        os.close(source)


def id_rows(pid: int, name: str) -> list[list[int]]:
    with open(f"/proc/{pid}/{name}_map", "rb") as f:
        return [[int(word) for word in line.split()] for line in f]


def can_rename(source: str, target: str) -> bool:
    """Whether what is in one directory can be moved to the other without copying; found out by doing it."""
    name = f".probe-{os.urandom(6).hex()}"
    os.mkdir(f"{source}/{name}", 0o700)
    try:
        os.rename(f"{source}/{name}", f"{target}/{name}")
    except OSError:
        os.rmdir(f"{source}/{name}")
        return False
    os.rmdir(f"{target}/{name}")
    return True


def await_detached(path: str) -> None:
    """Wait until no mount writes to the file any more; the kernel takes a moment after the job's end."""
    from imgrun.storage import loop

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for binding in loop.bindings(fd):
            loop.wait_until_unmounted(binding.number, SECONDS)
    finally:
        os.close(fd)


def toolbox_mount() -> int:
    tree = sc.open_tree(criu.toolbox(), sc.OPEN_TREE_CLONE)
    sc.mount_setattr(tree, set=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    return tree


def directory_mount(path: str, userns: int | None, *, read_only: bool = False) -> int:
    """A detached mount of a directory in which the job's root is the directory's owner."""
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        tree = sc.clone_mount(directory, recursive=False)
    finally:
        os.close(directory)
    if userns is not None and os.geteuid() == 0 and not _is_own_userns(userns):
        id_map(tree, userns, f"the file system of {path}")
    attributes = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC
    sc.mount_setattr(tree, set=attributes | (sc.MOUNT_ATTR_RDONLY if read_only else 0))
    return tree


def _is_own_userns(fd: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/user"))


def copy_tree(source: str, target: str) -> None:
    """Copy files with all that belongs to them, sharing blocks where the file system can. Raises NoSpace, CheckpointError."""
    with Copying(target, "--no-target-directory", source, target):
        pass


def copying(source: str, names: Iterable[str], target: str) -> Copying:
    """The same for some of what a directory has, to another directory, beside what is done meanwhile."""
    return Copying(target, f"--target-directory={target}", "--", *(f"{source}/{name}" for name in names))


class Copying:
    """A copy under way; as a context, it is complete at its end. Raises NoSpace, CheckpointError."""

    def __init__(self, target: str, *arguments: str) -> None:
        words = ["cp", "--archive", "--reflink=auto", "--sparse=always", *arguments]
        environment = {**os.environ, "LC_ALL": "C"}
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        self._target = target
        self._process = subprocess.Popen(words, stdin=null, stdout=null, stderr=pipe, text=True, env=environment)

    def __enter__(self) -> Copying:
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        if kind is not None:
            self._process.kill()
        _, said = self._process.communicate()
        if kind is None and self._process.returncode:
            why = said.strip().splitlines()[-1:] or ["cp failed"]
            if "No space left" in said or "quota" in said:
                raise NoSpace(f"no space to copy the job's files to {self._target}", "free some, or save elsewhere")
            raise CheckpointError(f"the job's files could not be copied: {why[0]}", "check both file systems")
