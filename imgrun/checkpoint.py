"""The checkpoint directory: what of a job is saved, in which order, and how it is read again.

    DIR/manifest.json   what it is a checkpoint of, and what it needs; written last
    DIR/processes/      CRIU's images, and a tar of each memory file system the job could write to
    DIR/files/          the job's writable files: upper, tmp, var-tmp; or scratch.img of a sized scratch
    DIR/stdin           input that the job had been given and not yet read

It is made beside its final name and renamed when it is complete. It holds the job's memory, so it is its owner's alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import select
import signal
import struct
import subprocess
import tarfile
from typing import Any, NamedTuple

from imgrun import criu
from imgrun import syscalls as sc
from imgrun.errors import CheckpointError, ImgrunError, NoSpace, RestoreError
from imgrun.isolation import namespaces
from imgrun.isolation.processes import children_of, pid_inside
from imgrun.isolation.sources import id_map
from imgrun.spec import JobSpec
from imgrun.state import now
from imgrun.storage.trees import remove_tree

FORMAT = 1
MANIFEST = "manifest.json"
FIONREAD = 0x541B
LAYERS = ("upper", "tmp", "var-tmp")


class Subject(NamedTuple):
    """The running job that is to be saved, as its supervisor knows it."""

    id: str
    spec: JobSpec
    hostname: str
    init: int
    scratch: str
    userns: bool
    wall_seconds: float


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    path: str
    manifest: dict[str, Any]

    @property
    def spec(self) -> JobSpec:
        return JobSpec.from_dict(self.manifest["spec"])


def exists(path: str) -> bool:
    """Whether ``path`` holds a complete checkpoint."""
    return os.path.isfile(f"{path}/{MANIFEST}")


def load(path: str) -> Checkpoint:
    """Read and check a checkpoint's manifest. Raises RestoreError."""
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
        with open(f"{path}/{MANIFEST}", encoding="utf-8") as f:
            manifest = json.load(f)
    except FileNotFoundError:
        hint = "give the directory that 'imgrun checkpoint' made"
        raise RestoreError(f"{path} holds no complete checkpoint", hint) from None
    except (OSError, ValueError) as e:
        raise RestoreError(f"the checkpoint {path} cannot be read: {e}", "restore an older one") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise RestoreError(f"the checkpoint {path} has format {found!r}; this imgrun reads {FORMAT}", "use its own imgrun")
    if status.st_uid not in (0, os.geteuid()):
        raise RestoreError(f"the checkpoint {path} belongs to another user", "it holds programs that would run as you")
    for name, size in manifest.get("sizes", {}).items():
        try:
            found_size = os.stat(f"{path}/{name}").st_size
        except OSError:
            raise RestoreError(f"the checkpoint {path} lacks {name}", "restore an older one") from None
        if found_size != size:
            raise RestoreError(f"{name} of the checkpoint {path} has {found_size} bytes, not {size}", "restore an older one")
    return Checkpoint(path, manifest)


# -- saving -----------------------------------------------------------------------------------------------------------


def save(subject: Subject, target: str, *, leave_running: bool) -> dict[str, Any]:
    """Save the job to the directory ``target``, replacing an older checkpoint there once this one is complete.

    Raises CheckpointError or NoSpace; the job then runs on. Runs in a process of its own beside the supervisor.
    """
    target = os.path.abspath(target)
    building = f"{target}.{subject.id}.new"
    remove_tree(building)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.mkdir(building, 0o700)
        os.mkdir(f"{building}/processes", 0o700)
        os.mkdir(f"{building}/files", 0o700)
        manifest = _save(subject, building, leave_running)
        _complete(building, target, manifest)
        return manifest
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space for the checkpoint in {os.path.dirname(target)}", "free some, or save elsewhere") from e
        raise CheckpointError(f"the checkpoint could not be written to {target}: {e}", "check the path") from e
    finally:
        _keep_log(building, target)
        remove_tree(building)


def _save(subject: Subject, building: str, leave_running: bool) -> dict[str, Any]:
    ended = os.pidfd_open(subject.init)
    descriptors = namespaces.open_all(subject.init)
    reaper = next(iter(children_of(subject.init)), 0)
    streams = {str(fd): os.readlink(f"/proc/{reaper}/fd/{fd}") for fd in (0, 1, 2)}
    manifest = _describe(subject, streams)
    manifest["last_pid"] = _last_pid(descriptors["pid"])
    volatile = memory_mounts(subject.spec)
    criu.TASKS["save"] = lambda: _save_memory(volatile)
    toolbox = _toolbox_mount()
    images = _directory_mount(f"{building}/processes", descriptors.get("user"))
    site = criu.Site(descriptors, toolbox, images, subject.userns)

    def frozen(session: criu.Session) -> None:
        session.in_job("save")
        if streams["0"].startswith("pipe:"):
            _save_input(f"/proc/{reaper}/fd/0", f"{building}/stdin")
        if leave_running:
            _copy_files(subject, f"{building}/files")

    try:
        criu.dump(site, leave_running=leave_running, frozen=frozen, log=f"{building}/processes/{criu.LOG}")
        if not leave_running:
            try:
                _take_files_and_kill(subject, f"{building}/files", ended)
            except ImgrunError:
                criu.go_on(descriptors)
                raise
    finally:
        for fd in (toolbox, images, ended, *descriptors.values()):
            os.close(fd)
    return manifest


def _take_files_and_kill(subject: Subject, files: str, init: int) -> None:
    """End a stopped job and keep its files: by renaming where they can stay on their disk, else by a copy made before."""
    stays = os.stat(subject.scratch).st_dev == os.stat(files).st_dev
    if not stays:
        _copy_files(subject, files)
    signal.pidfd_send_signal(init, signal.SIGKILL)
    poll = select.poll()
    poll.register(init, select.POLLIN)
    poll.poll()
    if stays:
        for name in _layers(subject):
            os.rename(f"{subject.scratch}/{name}", f"{files}/{name}")


def _describe(subject: Subject, streams: dict[str, str]) -> dict[str, Any]:
    from imgrun import __version__

    image = os.stat(subject.spec.image)
    return {
        "format": FORMAT,
        "imgrun": __version__,
        "job": subject.id,
        "created_at": now(),
        "spec": subject.spec.to_dict(),
        "hostname": subject.hostname,
        "image": {"path": subject.spec.image, "size": image.st_size, "mtime_ns": image.st_mtime_ns},
        "streams": streams,
        "userns": subject.userns,
        "host": {"kernel": platform.release(), "machine": platform.machine()},
        "usage": {"wall_seconds": round(subject.wall_seconds, 6)},
    }


def _last_pid(pid_namespace: int) -> int:
    """The largest pid in use in the job, which is where its numbering goes on after a restore."""
    here = os.fstat(pid_namespace)
    largest = 1
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.path.samestat(os.stat(f"/proc/{name}/ns/pid"), here):
                    largest = max(largest, pid_inside(int(name)) or 1)
            except OSError:
                continue
    return largest


def memory_mounts(spec: JobSpec) -> list[str]:
    """The memory file systems that the job could write to; CRIU does not save what mounts hold."""
    return ["/dev/shm", *(mount.dst for mount in spec.mounts if mount.type == "tmpfs")]


def _no_name_service() -> None:
    """Names of users would be looked up by libraries of the job's own root."""
    module: Any = tarfile
    module.pwd = module.grp = None


def _save_memory(places: list[str]) -> None:
    _no_name_service()
    for number, place in enumerate(places):
        with tarfile.open(f"{criu.IMAGES}/memory-{number}.tar", "w") as tar:
            tar.add(place, ".")


def _save_input(fd_path: str, path: str) -> None:
    """Copy what is in the job's input pipe, leaving it there. The supervisor adds nothing to it meanwhile."""
    source = os.open(fd_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        (waiting,) = struct.unpack("i", fcntl.ioctl(source, FIONREAD, b"\0" * 4))
        if not waiting:
            return
        data = os.read(source, waiting)
        with open(path, "wb") as f:
            f.write(data)
        # Put it back for a job that runs on, or for one whose dump fails after this.
        back = os.open(fd_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(back, data)
        finally:
            os.close(back)
    finally:
        os.close(source)


def _toolbox_mount() -> int:
    tree = sc.open_tree(criu.toolbox(), sc.OPEN_TREE_CLONE)
    sc.mount_setattr(tree, set=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    return tree


def _directory_mount(path: str, userns: int | None) -> int:
    """A detached mount of a directory in which the job's root writes as the directory's owner."""
    tree = sc.open_tree(path, sc.OPEN_TREE_CLONE)
    if userns is not None and os.geteuid() == 0 and not _is_own_userns(userns):
        id_map(tree, userns, f"the file system of {path}")
    return tree


def _is_own_userns(fd: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/user"))


def _layers(subject: Subject) -> tuple[str, ...]:
    return LAYERS if subject.spec.scratch_size is None else ("scratch.img",)


def _copy_files(subject: Subject, files: str) -> None:
    if subject.spec.scratch_size is not None:
        here = os.open(f"/proc/{subject.init}/root/tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        sc.syncfs(here)
        os.close(here)
    for name in _layers(subject):
        copy_tree(f"{subject.scratch}/{name}", f"{files}/{name}")


def copy_tree(source: str, target: str) -> None:
    """Copy files with all that belongs to them, sharing blocks where the file system can. Raises NoSpace."""
    words = ["cp", "--archive", "--reflink=auto", "--sparse=always", "--no-target-directory", source, target]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["cp failed"]
        if "No space left" in done.stderr:
            raise NoSpace(f"no space to copy the job's files to {target}", "free some, or save elsewhere")
        raise CheckpointError(f"the job's files could not be copied: {why[0]}", "check both file systems")


def _complete(building: str, target: str, manifest: dict[str, Any]) -> None:
    """Everything to the disk, the manifest last, then the name."""
    manifest["sizes"] = {
        f"processes/{name}": os.stat(f"{building}/processes/{name}").st_size
        for name in sorted(os.listdir(f"{building}/processes"))
    }
    here = os.open(building, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sc.syncfs(here)
        with open(f"{building}/{MANIFEST}", "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=1)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        old = f"{building}.old"
        remove_tree(old)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(building, target)
        remove_tree(old)
    finally:
        os.close(here)


def _keep_log(building: str, target: str) -> None:
    """After a failure, leave CRIU's log where the checkpoint was to be."""
    try:
        os.rename(f"{building}/processes/{criu.LOG}", f"{target}.criu.log")
    except OSError:
        pass


# -- continuing -------------------------------------------------------------------------------------------------------


def put_files_back(checkpoint: Checkpoint, scratch: str) -> None:
    """Fill the scratch of the new job with the files of the checkpoint, which keeps its own."""
    for name in os.listdir(f"{checkpoint.path}/files"):
        if name != "scratch.img":
            remove_tree(f"{scratch}/{name}")
        try:
            copy_tree(f"{checkpoint.path}/files/{name}", f"{scratch}/{name}")
        except CheckpointError as e:
            raise RestoreError(e.message, e.hint) from e


def restore(checkpoint: Checkpoint, init: int, join: tuple[int, ...], clone_into: int, streams: tuple[int, ...]) -> None:
    """Bring the processes back into the namespaces of ``init``. Raises RestoreError."""
    descriptors = namespaces.open_all(init)
    toolbox = _toolbox_mount()
    images = _directory_mount(f"{checkpoint.path}/processes", descriptors.get("user"))
    inherit = {
        checkpoint.manifest["streams"][str(number)]: fd
        for number, fd in enumerate(streams)
        if checkpoint.manifest["streams"][str(number)].startswith("pipe:")
    }
    last_pid = int(checkpoint.manifest["last_pid"])
    site = criu.Site(
        descriptors, toolbox, images, bool(checkpoint.manifest["userns"]), join, clone_into, last_pid, inherit
    )
    places = memory_mounts(checkpoint.spec)
    try:
        criu.restore(site, before=lambda: _restore_memory(places), log=f"{checkpoint.path}/processes/{criu.RESTORE_LOG}")
    finally:
        for fd in (toolbox, images, *descriptors.values()):
            os.close(fd)


def _restore_memory(places: list[str]) -> None:
    _no_name_service()
    for number, place in enumerate(places):
        with tarfile.open(f"{criu.IMAGES}/memory-{number}.tar") as tar:
            # All of it as it was; what it can do wrong it does inside the job, with the job's rights.
            tar.extraction_filter = lambda member, _path: member
            tar.extractall(place, numeric_owner=True)


def saved_input(checkpoint: Checkpoint) -> bytes:
    """What the job had been given to read and had not read."""
    try:
        with open(f"{checkpoint.path}/stdin", "rb") as f:
            return f.read()
    except FileNotFoundError:
        return b""
