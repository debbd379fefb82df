"""What a system has beside its root: /proc, /sys, /dev, the files of /etc that say who and where it is, as operations.

Sources: devpts (Documentation/filesystems/devpts.rst), cgroup_namespaces(7), proc(5).
"""

from __future__ import annotations

import errno
import os
import stat

from imgrun import syscalls as sc
from imgrun.init_shim import SHIM
from imgrun.isolation.mounts import (
    BESIDE,
    NO_ACCESS_TO_DEVICES,
    Context,
    Operation,
    attach,
    is_directory,
    new_filesystem,
    open_target,
    tmpfs,
)

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)


class Proc(Operation):
    def describe(self) -> str:
        return "mount proc of the job's PID namespace at /proc"

    def execute(self, ctx: Context) -> None:
        mount = new_filesystem("proc", {}, NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)
        attach(ctx, mount, "/proc")
        os.close(mount)


class Sys(Operation):
    """/sys, read-only: of the job's own network namespace when it has one, else the host's, without what is mounted there."""

    def __init__(self, own_network: bool) -> None:
        self.own_network = own_network

    def describe(self) -> str:
        whose = "a sysfs of its own network" if self.own_network else "the host's sysfs"
        return f"attach {whose}, read-only, at /sys"

    def execute(self, ctx: Context) -> None:
        attributes = NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC | sc.MOUNT_ATTR_RDONLY
        mount = ctx.fds["sys"]
        if self.own_network:
            try:
                mount = new_filesystem("sysfs", {}, attributes)
            except PermissionError:
                # The kernel gives a new sysfs only where the old one is not partly hidden (mount_too_revealing).
                pass
        if mount == ctx.fds["sys"]:
            sc.mount_setattr(mount, set=attributes, recursive=True)
        attach(ctx, mount, "/sys")


class CgroupView(Operation):
    """/sys/fs/cgroup shows the job's own directories and nothing beside or above them.

    On a pure v2 host that is the job's cgroup itself; elsewhere a tmpfs with one directory per hierarchy. Programs that
    look up their memory or CPU limit find it there. ``writable`` lets an init in the image manage what is below its v2
    cgroup; the limits of that cgroup itself stay read-only, even to the host's own root, and so do v1 hierarchies.
    """

    def __init__(self, views: tuple[tuple[str, str], ...], writable: bool) -> None:
        self.views = views
        self.writable = writable

    def describe(self) -> str:
        names = ", ".join(name or "/" for name, _ in self.views) or "nothing"
        return f"show the job's own cgroups ({names}) at /sys/fs/cgroup{'' if self.writable else ', read-only'}"

    def execute(self, ctx: Context) -> None:
        base = -1
        if [name for name, _ in self.views] != [""]:
            base = tmpfs(1 << 16, 0o755, NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)
            attach(ctx, base, "/sys/fs/cgroup")
            for name, _ in self.views:
                os.mkdir(name, 0o755, dir_fd=base)
        for name, path in self.views:
            mount = sc.open_tree(path, sc.OPEN_TREE_CLONE)
            writable = self.writable and os.path.exists(f"{path}/cgroup.controllers")
            read_only = 0 if writable else sc.MOUNT_ATTR_RDONLY
            sc.mount_setattr(mount, set=NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC | read_only)
            attach(ctx, mount, f"/sys/fs/cgroup/{name}")
            if writable:
                _keep_limits(mount)
            os.close(mount)
        if base >= 0:
            sc.mount_setattr(base, set=sc.MOUNT_ATTR_RDONLY)
            os.close(base)


def _keep_limits(cgroup: int) -> None:
    """Cover each file of a v2 cgroup by a read-only mount of itself, but those that dividing it takes (cgroups(7))."""
    listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=cgroup)
    names = os.listdir(listed)
    os.close(listed)
    for name in names:
        if name in DELEGATED or not stat.S_ISREG(os.stat(name, dir_fd=cgroup).st_mode):
            continue
        file = sc.open_tree(name, sc.OPEN_TREE_CLONE, cgroup)
        sc.mount_setattr(file, set=sc.MOUNT_ATTR_RDONLY | NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)
        sc.move_mount(file, name, cgroup)
        os.close(file)


class Dev(Operation):
    """A minimal /dev on a tmpfs with mode 0755.

    Not sticky: below a sticky directory, opening a bound device node with O_CREAT, as ``> /dev/null`` does, is refused.
    """

    def __init__(self, shm_size: int | None = None) -> None:
        self.shm_size = shm_size

    def describe(self) -> str:
        return f"make /dev: {' '.join(DEVICES)} pts ptmx shm mqueue fd, and the shim at {SHIM}"

    def execute(self, ctx: Context) -> None:
        dev = tmpfs(1 << 20, 0o755, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
        attach(ctx, dev, "/dev")
        for name in DEVICES:
            _bind_device(dev, name)
        if os.path.exists("/dev/fuse"):
            # For jobs of the job: it serves nobody outside the opener's own user namespace.
            _bind_device(dev, "fuse")
        for name, target in DEVICE_LINKS:
            os.symlink(target, name, dir_fd=dev)
        for name in ("pts", "shm", "mqueue", "imgrun"):
            os.mkdir(name, 0o755, dir_fd=dev)
        # gid 5 is tty in every distribution; without it in the map, the opener's own group has to do.
        options: dict[str, str | None] = {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5"}
        try:
            pts = new_filesystem("devpts", options, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            del options["gid"]
            pts = new_filesystem("devpts", options, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
        for name, mount in (
            ("pts", pts),
            ("shm", tmpfs(self.shm_size, 0o1777)),
            ("mqueue", new_filesystem("mqueue", {}, NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)),
        ):
            sc.move_mount(mount, name, dev)
            os.close(mount)
        _bind_file(ctx.fds["shim"], dev, SHIM.removeprefix("/dev/"))
        os.close(dev)


def _bind_device(directory: int, name: str) -> None:
    """The host's own node: its mode and owner are not the job's to change, not even where its root is the host's."""
    mount = sc.open_tree(f"/dev/{name}", sc.OPEN_TREE_CLONE)
    sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
    _bind_file(mount, directory, name)


def _bind_file(mount: int, directory: int, name: str) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory))
    sc.move_mount(mount, name, directory)
    os.close(mount)


class EtcFile(Operation):
    """One of /etc/hosts, /etc/hostname and /etc/resolv.conf, right for this job.

    In an overlay the file is replaced: it stays an ordinary file that the job can rename over. In a writable image it is
    covered by a mount where it exists, so that the image keeps its own.
    """

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = content

    def describe(self) -> str:
        return f"set /etc/{self.name} ({len(self.content)} bytes)"

    def execute(self, ctx: Context) -> None:
        if ctx.root_is_ours:
            etc = open_target(ctx, "/etc", directory=True)
            try:
                self._replace(etc)
                return
            except PermissionError:
                pass  # the image's /etc belongs to an id that the job does not have: cover the file instead
            finally:
                os.close(etc)
        try:
            target = sc.openat2(f"etc/{self.name}", os.O_PATH, ctx.root, resolve=BESIDE)
        except OSError:
            return
        try:
            if stat.S_ISREG(os.fstat(target).st_mode):
                self._replace(ctx.stage)
                mount = sc.open_tree(self.name, sc.OPEN_TREE_CLONE, ctx.stage)
                sc.move_mount(mount, "", target)
                os.close(mount)
        finally:
            os.close(target)

    def _replace(self, directory: int) -> None:
        try:
            os.unlink(self.name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.name, flags, 0o644, dir_fd=directory)
        try:
            os.fchmod(fd, 0o644)
            os.write(fd, self.content)
        finally:
            os.close(fd)


class Cover(Operation):
    """Attach a read-only mount over a path, when that is there."""

    verb = ""

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return self.verb.format(self.path)

    def cover(self, target: int) -> int:
        """The mount that is to lie over it."""
        raise NotImplementedError

    def execute(self, ctx: Context) -> None:
        try:
            target = sc.openat2(self.path, os.O_PATH, ctx.root, resolve=BESIDE)
        except FileNotFoundError:
            return
        mount = self.cover(target)
        sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY, recursive=True)
        sc.move_mount(mount, "", target)
        os.close(mount)
        os.close(target)


class Hide(Cover):
    """Cover a path: a file by /dev/null, a directory by an empty read-only tmpfs."""

    verb = "hide {}"

    def cover(self, target: int) -> int:
        return tmpfs(4096, 0o555) if is_directory(target) else sc.open_tree("/dev/null", sc.OPEN_TREE_CLONE)


class Protect(Cover):
    """Make a path read-only by a mount of itself over itself."""

    verb = "make {} read-only"

    def cover(self, target: int) -> int:
        return sc.clone_mount(target, recursive=True)
