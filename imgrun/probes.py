"""Kernel features, tried as a job's start uses them, in a child process that takes all it made with it.

Each probe returns words about what it found, or raises OSError or an ImgrunError when the feature is withheld.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from imgrun import init_shim
from imgrun import syscalls as sc
from imgrun.errors import HostError, ImgrunError
from imgrun.helper import find_program
from imgrun.isolation import mounts, namespaces, rootless, security
from imgrun.isolation.sources import id_map
from imgrun.isolation.userns import RANGE, IdMap, IdRange

NAMESPACES = {
    "mount": sc.CLONE_NEWNS, "PID": sc.CLONE_NEWPID, "UTS": sc.CLONE_NEWUTS, "IPC": sc.CLONE_NEWIPC,
    "network": sc.CLONE_NEWNET, "cgroup": sc.CLONE_NEWCGROUP,
}  # fmt: skip
MAKERS = {
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4", "{file}", "4M"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-d", "file,name={file},size=300m"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "{file}"),
    "squashfs": ("mksquashfs", "{tree}", "{file}", "-quiet", "-no-progress"),
    "erofs": ("mkfs.erofs", "{file}", "{tree}"),
}
"""What makes a small file system of each format that images come in."""
SIZES = {"ext4": 4 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}
PROBE_SECONDS = 30
_MAP = IdMap((IdRange(0, 0x24000000, RANGE),), (IdRange(0, 0x24000000, RANGE),))
"""Any ids that are not the caller's own will do."""


class Tried(NamedTuple):
    """What came of a probe: words of success, or why not, with an advice if there is one."""

    ok: bool
    words: str
    hint: str = ""


def attempt(probe: Callable[[], str]) -> Tried:
    """Run a probe in this process."""
    try:
        return Tried(True, probe())
    except ImgrunError as e:
        return Tried(False, e.message, e.hint or "")
    except OSError as e:
        return Tried(False, e.strerror or str(e))


def in_child(probe: Callable[[], str]) -> Tried:
    """Run a probe in a process of its own, which may change its namespaces and rights for good."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.alarm(PROBE_SECONDS)
            tried = attempt(probe)
            answer = "\0".join((str(int(tried.ok)), tried.words, tried.hint))
            os.write(writing, answer.encode(errors="replace")[:4096])
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as f:
        said = f.read().decode(errors="replace").split("\0")
    status = os.waitpid(pid, 0)[1]
    if len(said) != 3:
        return Tried(False, f"the probe was killed by signal {os.WTERMSIG(status)}" if status else "the probe failed")
    return Tried(said[0] == "1", said[1], said[2])


def become_root() -> None:
    """Have a mount namespace that we are root of, as a supervisor does."""
    if rootless.is_host_root():
        sc.unshare(sc.CLONE_NEWNS)
        sc.set_propagation("/", sc.MS_PRIVATE | sc.MS_REC)
    else:
        rootless.enter()


def user_namespace() -> str:
    if rootless.is_host_root():
        os.close(namespaces.userns_descriptor(_MAP))
        return "made, with ids of its own"
    _, warnings = rootless.enter()
    return warnings[0] if warnings else "made, with your subordinate ids"


def namespace(flag: int) -> str:
    become_root()
    sc.unshare(flag)
    return "made"


def mount_api() -> str:
    become_root()
    mount = mounts.tmpfs(1 << 20, 0o755)
    sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY)
    sc.move_mount(mount, "/tmp" if os.path.isdir("/tmp") else "/")
    os.close(sc.clone_mount(mount, recursive=False))
    os.close(sc.openat2(".", os.O_PATH, mount))
    return "fsopen, move_mount, open_tree, mount_setattr, openat2"


def overlay(state: str) -> str:
    """As a job mounts it: by the root of its user namespace, with upper and lower layer id-mapped."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=state) as directory:
        for name in ("lower", "upper", "work"):
            os.mkdir(f"{directory}/{name}")
        tried = in_child(lambda: _mount_overlay(directory))
        shutil.rmtree(f"{directory}/work", ignore_errors=True)
    if not tried.ok:
        raise HostError(tried.words, tried.hint or None)
    return tried.words


def _mount_overlay(directory: str) -> str:
    here = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    how = "userxattr, xino=on"
    if not rootless.is_host_root():
        become_root()
        os.chdir(directory)
        _overlay_here()
        return how
    layers = sc.clone_mount(here, recursive=False)
    os.close(here)
    userns = namespaces.userns_descriptor(_MAP)
    id_map(layers, userns, "the file system of imgrun's state")
    sc.unshare(sc.CLONE_NEWNS)
    sc.setns(userns, sc.CLONE_NEWUSER)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    sc.unshare(sc.CLONE_NEWNS)
    sc.move_mount(layers, "/tmp" if os.path.isdir("/tmp") else "/")
    os.fchdir(layers)
    _overlay_here()
    return f"{how}, on id-mapped layers"


def _overlay_here() -> None:
    options: dict[str, str | None] = {
        "lowerdir": "lower", "upperdir": "upper", "workdir": "work", "xino": "on", "userxattr": None,
    }  # fmt: skip
    os.close(mounts.new_filesystem("overlay", options))


def image_format(fstype: str, scratch: str) -> str:
    """Make a file system, attach a loop device, mount and id-map it, as for an image. The host's root only."""
    from imgrun.image import open_image

    maker = MAKERS[fstype]
    program = find_program(maker[0])
    if program is None:
        raise FileNotFoundError(f"not tried: {maker[0]}, which would make one, is not installed")
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=scratch) as directory:
        os.mkdir(f"{directory}/tree")
        file = f"{directory}/image"
        if fstype in SIZES:
            with open(file, "wb") as f:
                f.truncate(SIZES[fstype])
        words = [word.format(file=file, tree=f"{directory}/tree") for word in maker[1:]]
        done = subprocess.run([program, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise FileNotFoundError(f"not tried: {maker[0]} failed: {(done.stderr or done.stdout).strip()[:200]}")
        image = open_image(file, "read-only")
        try:
            mount = image.mount()
            userns = namespaces.userns_descriptor(_MAP)
            try:
                id_map(mount, userns, fstype)
            finally:
                os.close(userns)
                os.close(mount)
        finally:
            image.close()
    return "mounted by the kernel, id-mapped"


def clone_into_cgroup() -> str:
    from imgrun.isolation.cgroups.cgroup import JobCgroup
    from imgrun.isolation.cgroups.limits import Limits

    group = JobCgroup.create(f"doctor-{os.getpid()}", Limits())
    try:
        if group.clone_into < 0:
            raise HostError("a job gets no v2 cgroup")
        pid = sc.clone(0, group.clone_into)
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return f"into {group.paths[0]}"
    finally:
        group.remove()


def seccomp() -> str:
    made = security.seccomp_filter()
    security.no_new_privs()
    made.load()
    return "libseccomp loads filters"


def file_system_of(path: str) -> str:
    """The type of the file system that holds ``path``, by the mount table."""
    try:
        import libmount

        found = libmount.Table("/proc/self/mountinfo").find_mountpoint(path, libmount.MNT_ITER_BACKWARD)
        return str(found.fstype)
    except Exception:  # noqa: BLE001 - not installed, or not to be used here: the table is as easily read
        pass
    best, kind = "", "an unknown file system"
    device = os.stat(path).st_dev
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
            for line in table:
                before, _, after = line.partition(" - ")
                fields = before.split()
                if fields[2] == f"{os.major(device)}:{os.minor(device)}" and len(fields[4]) >= len(best):
                    best, kind = fields[4], after.split()[0]
    except OSError:
        pass
    return kind


def trial_job(state: str) -> str:
    """Start a job by the command line; words about it. Raises HostError with what imgrun said."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=state) as directory:
        os.mkdir(f"{directory}/root")
        # Without arguments it exits with 125 at once; the record tells that from a failure of imgrun's own.
        shutil.copy(init_shim.program(), f"{directory}/root/probe")
        os.chmod(f"{directory}/root/probe", 0o755)
        command = [
            sys.executable,
            "-m",
            "imgrun.cli",
            "start",
            "--result",
            f"{directory}/result",
            f"{directory}/root",
            "/probe",
        ]
        paths = os.pathsep.join(path for path in sys.path if path)
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS,
                env={**os.environ, "PYTHONPATH": paths, "IMGRUN_STATE_DIR": state},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise HostError(f"it did not end within {PROBE_SECONDS} s") from None
        took = (time.monotonic() - began) * 1000
        try:
            with open(f"{directory}/result", encoding="utf-8") as f:
                record = json.load(f)
        except (OSError, ValueError):
            record = {}
    if record.get("reason") != "exited" or record.get("exit_code") != 125:
        said = [line.removeprefix("imgrun: ").strip() for line in done.stderr.splitlines() if line.strip()]
        raise HostError(record.get("message") or (said[0] if said else "it ended without a word"), record.get("hint"))
    warnings = record.get("warnings") or []
    return f"started and ended, in {took:.0f} ms" + (f"; it warned: {warnings[0]}" if warnings else "")
