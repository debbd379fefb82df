"""Making a checkpoint: what of a job is saved, and in which order, so that it is complete or absent and no job is lost.

It is made beside its final name and renamed when it is complete (imgrun.manifest says what is in it). All that can fail is
done while the job's processes stand still under CRIU, which lets them go on if anything does; only then is the job ended,
and its files, where they can stay on their disk, are renamed into the checkpoint. It holds the job's memory, so it is its
owner's alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from imgrun import criu, identity
from imgrun import syscalls as sc
from imgrun.errors import CheckpointError, ImgrunError, JobStateError, NoSpace
from imgrun.isolation import namespaces
from imgrun.isolation.processes import census, children_of
from imgrun.isolation.sources import id_map
from imgrun.manifest import FORMAT, MANIFEST, checksum, describe_files
from imgrun.relay import bytes_waiting
from imgrun.spec import JobSpec
from imgrun.state import now
from imgrun.storage.trees import remove_tree

LAYERS = ("upper", "tmp", "var-tmp")
LOG = "dump.log"


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


def save(subject: Subject, target: str, *, leave_running: bool) -> dict[str, Any]:
    """Save the job to the directory ``target``, replacing an older checkpoint there once this one is complete.

    Raises CheckpointError or NoSpace; the job then runs on. Runs in a process of its own beside the supervisor.
    """
    target = os.path.abspath(target)
    refuse_unsuitable(target)
    if subject.spec.root == "writable" and leave_running:
        raise CheckpointError(
            "a job that runs on would change its image, and the checkpoint be worthless",
            "stop it with the checkpoint, or start it without --writable",
        )
    building = building_place(target, subject.id)
    try:
        remove_tree(building)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.mkdir(building, 0o700)
        for name in ("processes", "files", "work"):
            os.mkdir(f"{building}/{name}", 0o700)
        saving = _Saving(subject, building, target, leave_running)
        saving.run()
        _replace(building, target)
        return saving.manifest
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space for the checkpoint in {os.path.dirname(target)}", "free some, or save elsewhere") from e
        raise CheckpointError(f"the checkpoint could not be written to {target}: {e}", "check the path") from e
    finally:
        with contextlib.suppress(OSError):
            os.rename(f"{building}/work/{criu.LOG}", kept_log(target))
        remove_tree(building)


def building_place(target: str, job_id: str) -> str:
    """Where a checkpoint is made before it gets its name."""
    return f"{os.path.abspath(target)}.{job_id}.new"


def kept_log(target: str) -> str:
    """Where CRIU's log is to be found after a failure."""
    return f"{target}.criu.log"


def refuse_unsuitable(target: str) -> None:
    """Raise CheckpointError when ``target`` is there and neither an empty directory nor a checkpoint to be replaced."""
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


class _Saving:
    """One checkpoint under way."""

    def __init__(self, subject: Subject, building: str, target: str, leave_running: bool) -> None:
        self.subject = subject
        self.building = building
        self.log = f"{building}/work/{criu.LOG}"
        self.target = target
        self.leave_running = leave_running
        self.manifest: dict[str, Any] = {}
        self.layers = LAYERS if subject.spec.scratch_size is None else ("scratch.img",)
        self.renames = False
        self._reaper = 0
        self._descriptors: dict[str, int] = {}
        self._places = memory_mounts(subject.spec)

    def run(self) -> None:
        subject = self.subject
        ended = os.pidfd_open(subject.init)
        self._descriptors = namespaces.open_all(subject.init)
        opened = [ended, *self._descriptors.values()]
        try:
            self._reaper = next(iter(children_of(subject.init)), 0)
            if not self._reaper:
                raise JobStateError("the job is ending", "see 'imgrun inspect' for how")
            self.manifest = self._describe()
            self.renames = not self.leave_running and _can_rename(subject.scratch, f"{self.building}/files")
            userns = self._descriptors.get("user")
            opened.append(toolbox := toolbox_mount())
            opened.append(images := directory_mount(f"{self.building}/processes", userns))
            opened.append(work := directory_mount(f"{self.building}/work", userns))
            site = criu.Site(self._descriptors, toolbox, images, work, subject.userns)
            criu.TASKS["save"] = lambda: _save_memory(self._places)
            criu.dump(site, frozen=lambda session: self._frozen(session, ended), log=self.log, kept=kept_log(self.target))
            if not self.leave_running:
                # Only now: while CRIU was not reaped, the job's PID namespace could not end.
                _await_end(ended)
        finally:
            for fd in opened:
                os.close(fd)
        if self.leave_running:
            self._write_manifest()
        else:
            self._take_files()

    def _describe(self) -> dict[str, Any]:
        from imgrun import __version__

        spec = self.subject.spec
        reaper = self._reaper
        return {
            "format": FORMAT,
            "imgrun": __version__,
            "job": self.subject.id,
            "created_at": now(),
            "spec": spec.to_dict(),
            "hostname": self.subject.hostname,
            "image": identity.image(spec.image),
            "streams": {str(fd): os.readlink(f"/proc/{reaper}/fd/{fd}") for fd in (0, 1, 2)},
            "input": self.subject.input,
            "userns": self.subject.userns,
            "rootless": self.subject.rootless,
            "ids": {name: _id_map(reaper, name) for name in ("uid", "gid")},
            "host": identity.host(),
            "memory": self._places,
            "layers": list(self.layers),
        }

    def _frozen(self, session: criu.Session, init: int) -> None:
        """Everything that must be of the same instant; and, unless the job is to run on, everything that can fail."""
        began = time.monotonic()
        session.in_job("save")
        if self.manifest["streams"]["0"].startswith("pipe:"):
            waiting = _waiting_input(f"/proc/{self._reaper}/fd/0") + self.subject.unsent
            if waiting:
                with open(f"{self.building}/stdin", "wb") as f:
                    f.write(waiting)
        count = census(self._descriptors["pid"], criu.first_pid())
        self.manifest["last_pid"] = count.largest
        self.manifest["processes"] = count.processes
        usage = self.subject.usage()
        if usage.get("user_seconds") is None:
            usage |= {"user_seconds": count.user_seconds, "system_seconds": count.system_seconds}
        self.manifest["usage"] = usage
        self._settle_scratch()
        if not self.renames:
            self._copy_files()
        self.manifest["statistics"] = {"files_seconds": round(time.monotonic() - began, 6)}
        if not self.leave_running:
            self._write_manifest()
            self._kill(init)

    def _kill(self, init: int) -> None:
        """End the job before CRIU hears of it, which would let the tree run on for a moment and change what was saved.

        The end of PID 1 kills all of its namespace at once, so when one process has ended, none of the others runs again.
        """
        reaper = os.pidfd_open(self._reaper)
        try:
            signal.pidfd_send_signal(init, signal.SIGKILL)
            _await_end(reaper)
        finally:
            os.close(reaper)

    def _settle_scratch(self) -> None:
        """What is in a file system of its own is in its file only when that is synced."""
        if self.subject.spec.scratch_size is not None:
            here = os.open(f"/proc/{self.subject.init}/root/tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            sc.syncfs(here)
            os.close(here)

    def _copy_files(self) -> None:
        for name in self.layers:
            copy_tree(f"{self.subject.scratch}/{name}", f"{self.building}/files/{name}")

    def _write_manifest(self) -> None:
        """The last file, once all others are on the disk."""
        here = os.open(self.building, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.manifest["files"] = describe_files(self.building)
            self.manifest["statistics"]["bytes"] = sum(file["size"] for file in self.manifest["files"].values())
            self.manifest["checksum"] = checksum(self.manifest)
            sc.syncfs(here)
            with open(f"{self.building}/{MANIFEST}", "w", encoding="utf-8") as f:
                json.dump(self.manifest, f, indent=1)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
            os.fsync(here)
        finally:
            os.close(here)

    def _take_files(self) -> None:
        """The job has ended: its files become the checkpoint's; and what it wrote into its image is known now."""
        if self.renames:
            for name in self.layers:
                try:
                    os.rename(f"{self.subject.scratch}/{name}", f"{self.building}/files/{name}")
                except OSError:
                    copy_tree(f"{self.subject.scratch}/{name}", f"{self.building}/files/{name}")
        if self.subject.spec.root == "writable":
            _await_detached(self.subject.spec.image)
            self.manifest["image"] = identity.image(self.subject.spec.image)
            self.manifest["checksum"] = checksum(self.manifest)
            with open(f"{self.building}/{MANIFEST}", "r+", encoding="utf-8") as f:
                f.write(json.dumps(self.manifest, indent=1) + "\n")
                f.truncate()
                os.fsync(f.fileno())


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def memory_mounts(spec: JobSpec) -> list[str]:
    """The memory file systems that the job could write to; CRIU does not save what mounts hold."""
    return ["/dev/shm", *(mount.dst for mount in spec.mounts if mount.type == "tmpfs")]


def no_name_service() -> None:
    """Names of users would be looked up by libraries of the job's own root."""
    module: Any = tarfile
    module.pwd = module.grp = None


def _save_memory(places: list[str]) -> None:
    no_name_service()
    for number, place in enumerate(places):
        with tarfile.open(f"{criu.IMAGES}/memory-{number}.tar", "w") as tar:
            tar.add(place, ".")


def _waiting_input(fd_path: str) -> bytes:
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


def _id_map(pid: int, name: str) -> list[list[int]]:
    with open(f"/proc/{pid}/{name}_map", "rb") as f:
        return [[int(word) for word in line.split()] for line in f]


def _can_rename(source: str, target: str) -> bool:
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


def _await_detached(image: str) -> None:
    """Wait until no mount writes to the image any more; the kernel takes a moment after the job's end."""
    from imgrun.storage import loop

    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + 5
        while any(True for _ in loop.bindings(fd)) and time.monotonic() < deadline:
            time.sleep(0.005)
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
    """Copy files with all that belongs to them, sharing blocks where the file system can. Raises NoSpace."""
    words = ["cp", "--archive", "--reflink=auto", "--sparse=always", "--no-target-directory", source, target]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["cp failed"]
        if "No space left" in done.stderr or "quota" in done.stderr:
            raise NoSpace(f"no space to copy the job's files to {target}", "free some, or save elsewhere")
        raise CheckpointError(f"the job's files could not be copied: {why[0]}", "check both file systems")


def _replace(building: str, target: str) -> None:
    """Give the complete checkpoint its name. The one that had it goes last."""
    with contextlib.suppress(OSError):
        os.rename(f"{building}/work/{criu.LOG}", f"{building}/{LOG}")
    remove_tree(f"{building}/work")
    old = f"{building}.old"
    remove_tree(old)
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(building, target)
    parent = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    try:
        remove_tree(old)
    except ImgrunError:
        pass  # the new one is what was asked for
