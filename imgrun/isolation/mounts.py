"""The mount plan: each operation is an object that can say what it does and do it.

Operations run in the job's own mount namespace, before its root becomes ``/``. Targets are looked up with the job's root
as the root of the walk (openat2(2), RESOLVE_IN_ROOT), so no link in the image leads out of it. Mounts arrive as detached
descriptors from the supervisor (:mod:`imgrun.isolation.sources`) or are made here, by the job's own root.

Sources: mount_namespaces(7), overlayfs (Documentation/filesystems/overlayfs.rst), pivot_root(2), devpts
(Documentation/filesystems/devpts.rst).
"""

from __future__ import annotations

import errno
import os
import stat

from imgrun import syscalls as sc
from imgrun.errors import ImgrunError, SpecError, StartError
from imgrun.init_shim import SHIM

BESIDE = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS
NO_ACCESS_TO_DEVICES = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV
KERNEL_TREES = ("/proc", "/sys", "/dev")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)

STAGE = "/etc"
"""A directory that every host has and from which nothing more is needed. Not ``/``: what is stacked there would have to be
detached by itself, and each detaching waits for all processors (synchronize_rcu)."""


class Context:
    """What operations share: the supervisor's descriptors by name, the staging area, and the root being built."""

    def __init__(self, fds: dict[str, int]) -> None:
        self.fds = fds
        self.stage = -1
        self.root = -1
        self.root_is_ours = False
        """Whether the root is an overlay, so that what is created or replaced in it never reaches the image."""


class Operation:
    """One step of the plan."""

    def describe(self) -> str:
        raise NotImplementedError

    def execute(self, ctx: Context) -> None:
        raise NotImplementedError


def execute_all(operations: list[Operation], ctx: Context) -> None:
    """Run the plan. An operation's OSError becomes a StartError that says which step failed and why."""
    for operation in operations:
        try:
            operation.execute(ctx)
        except ImgrunError:
            raise
        except OSError as e:
            raise StartError(f"could not {operation.describe()}: {e.strerror}", _advice(e)) from e


def _advice(e: OSError) -> str:
    if e.errno == errno.ENOSPC:
        return "free space where imgrun keeps its state (IMGRUN_STATE_DIR), or give more --scratch-size"
    if e.errno == errno.EPERM:
        return "run 'imgrun doctor': it says which of the kernel's features are withheld here"
    return "run again with --debug for the details"


def new_filesystem(fstype: str, options: dict[str, str | None], attributes: int = 0) -> int:
    """Make a file system and return a detached mount of it. The kernel's own explanation is added to its error."""
    fs = sc.fsopen(fstype)
    try:
        try:
            for key, value in options.items():
                sc.fsconfig(fs, key, value)
            sc.fsconfig_create(fs)
        except OSError as e:
            said = sc.fs_messages(fs)
            raise OSError(e.errno, f"{os.strerror(e.errno or 0)}{''.join(f' ({line})' for line in said[-1:])}") from e
        return sc.fsmount(fs, attributes)
    finally:
        os.close(fs)


def tmpfs(size: int | None, mode: int, attributes: int = NO_ACCESS_TO_DEVICES) -> int:
    options: dict[str, str | None] = {"mode": f"{mode:o}"}
    if size is not None:
        options["size"] = str(size)
    return new_filesystem("tmpfs", options, attributes)


def open_target(ctx: Context, path: str, *, directory: bool) -> int:
    """An O_PATH descriptor of ``path`` in the job's root, created when it is missing.

    A symbolic link that leads nowhere is replaced where the root is the job's own, and refused where it is the image's.
    """
    try:
        return _open_existing(ctx, path, directory)
    except FileNotFoundError:
        return _open_new(ctx, path, directory)
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        why = "links lead in a circle" if e.errno == errno.ELOOP else "what should be a directory is not"
        raise StartError(f"{path} in the image cannot be used: {why}", "mend the image, or choose another target") from e


def _open_new(ctx: Context, path: str, directory: bool) -> int:
    parts = [p for p in path.split("/") if p]
    for i in range(1, len(parts) + 1):
        so_far = "/".join(parts[:i])
        last = i == len(parts)
        try:
            os.close(_open_existing(ctx, so_far, directory or not last))
            continue
        except FileNotFoundError:
            pass
        parent = _open_existing(ctx, "/".join(parts[: i - 1]), True)
        try:
            _create(ctx, parent, parts[i - 1], directory or not last, path)
        finally:
            os.close(parent)
    return _open_existing(ctx, path, directory)


def _open_existing(ctx: Context, path: str, directory: bool) -> int:
    fd = sc.openat2(path or ".", os.O_PATH, ctx.root, resolve=BESIDE)
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    if is_directory == directory:
        return fd
    os.close(fd)
    wanted, found = ("a directory", "not one") if directory else ("a file", "a directory")
    raise SpecError(
        f"/{path.lstrip('/')} in the image must be {wanted} to be mounted on, and is {found}",
        "choose another target, or change the image",
    )


def _create(ctx: Context, parent: int, name: str, directory: bool, path: str) -> None:
    try:
        here = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISLNK(here.st_mode) or not ctx.root_is_ours:
            raise StartError(
                f"cannot mount on {path}: {name!r} in the image is a link that leads nowhere inside it",
                "mend the link in the image, or run without --writable",
            )
        os.unlink(name, dir_fd=parent)
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644, dir_fd=parent))
    except OSError as e:
        if e.errno == errno.EROFS:
            raise StartError(f"{path} does not exist in the read-only image", "create it in the image") from e
        raise


def attach(ctx: Context, mount_fd: int, path: str, *, directory: bool = True) -> None:
    """Put the detached mount at ``path`` of the job's root."""
    if path in KERNEL_TREES:
        _refuse_link(ctx, path)
    target = open_target(ctx, path, directory=directory)
    try:
        sc.move_mount(mount_fd, "", target)
    finally:
        os.close(target)


def _refuse_link(ctx: Context, path: str) -> None:
    """What is hidden below these is found by path: a link that changes its meaning on the way would keep it in sight."""
    try:
        is_link = stat.S_ISLNK(os.stat(path.lstrip("/"), dir_fd=ctx.root, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return
    if is_link:
        raise StartError(f"{path} in the image is a symbolic link", "make it a directory in the image")


def is_directory(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


class Isolate(Operation):
    """Stop mount events to and from the host, and lay a small tmpfs over a directory of it to build on."""

    def describe(self) -> str:
        return f"make all mounts private and lay a staging tmpfs over {STAGE}"

    def execute(self, ctx: Context) -> None:
        sc.set_propagation("/", sc.MS_PRIVATE | sc.MS_REC)
        stage = tmpfs(1 << 20, 0o755)
        sc.move_mount(stage, STAGE)
        ctx.stage = stage
        os.fchdir(stage)
        for name in ("lower", "scratch", "root"):
            os.mkdir(name, 0o755)


class Root(Operation):
    """The given mount as the job's root: the image itself for ``--writable``, or (``ours``) one composed for the job."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours

    def describe(self) -> str:
        return "attach what fuse-overlayfs serves as the root" if self.ours else "attach the image as the root, writable"

    def execute(self, ctx: Context) -> None:
        sc.move_mount(ctx.fds["image"], "root", ctx.stage)
        ctx.root = os.open("root", os.O_PATH | os.O_CLOEXEC, dir_fd=ctx.stage)
        ctx.root_is_ours = self.ours


class Scratch(Operation):
    """The job's scratch, where the operations after this one find it."""

    def describe(self) -> str:
        return "attach the job's scratch to the staging area"

    def execute(self, ctx: Context) -> None:
        sc.move_mount(ctx.fds["scratch"], "scratch", ctx.stage)


class Overlay(Operation):
    """The image below, the job's scratch above. Mounted by the job's own root: ``userxattr``."""

    def describe(self) -> str:
        return "mount an overlay (lower: image, upper: scratch/upper, userxattr, xino=on) as the root"

    def execute(self, ctx: Context) -> None:
        sc.move_mount(ctx.fds["image"], "lower", ctx.stage)
        os.fchdir(ctx.stage)
        options: dict[str, str | None] = {
            "source": "imgrun",
            "lowerdir": "lower",
            "upperdir": "scratch/upper",
            "workdir": "scratch/work",
            # CRIU must see the same inode in /proc/PID/maps and from stat.
            "xino": "on",
            "userxattr": None,
        }
        sc.move_mount(new_filesystem("overlay", options, sc.MOUNT_ATTR_NODEV), "root", ctx.stage)
        ctx.root = os.open("root", os.O_PATH | os.O_CLOEXEC, dir_fd=ctx.stage)
        ctx.root_is_ours = True


class FromScratch(Operation):
    """A directory of the scratch as one of the job's own: /tmp and /var/tmp."""

    def __init__(self, name: str, target: str) -> None:
        self.name = name
        self.target = target

    def describe(self) -> str:
        return f"attach scratch/{self.name} at {self.target}"

    def execute(self, ctx: Context) -> None:
        here = os.open(f"scratch/{self.name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=ctx.stage)
        mount = sc.clone_mount(here, recursive=False)
        os.close(here)
        sc.mount_setattr(mount, set=NO_ACCESS_TO_DEVICES)
        attach(ctx, mount, self.target)
        os.close(mount)


class Given(Operation):
    """A mount that the supervisor prepared: a bind or another image."""

    def __init__(self, key: str, target: str, what: str) -> None:
        self.key = key
        self.target = target
        self.what = what

    def describe(self) -> str:
        return f"attach {self.what}"

    def execute(self, ctx: Context) -> None:
        fd = ctx.fds[self.key]
        attach(ctx, fd, self.target, directory=is_directory(fd))


class Tmpfs(Operation):
    def __init__(self, target: str, size: int | None = None, mode: int = 0o1777) -> None:
        self.target = target
        self.size = size
        self.mode = mode

    def describe(self) -> str:
        size = "" if self.size is None else f", at most {self.size} bytes"
        return f"mount a tmpfs at {self.target} (mode {self.mode:o}{size})"

    def execute(self, ctx: Context) -> None:
        mount = tmpfs(self.size, self.mode)
        attach(ctx, mount, self.target)
        os.close(mount)


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


class Hide(Operation):
    """Cover a path: a file by /dev/null, a directory by an empty read-only tmpfs."""

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"hide {self.path}"

    def execute(self, ctx: Context) -> None:
        try:
            target = sc.openat2(self.path, os.O_PATH, ctx.root, resolve=BESIDE)
        except FileNotFoundError:
            return
        mount = tmpfs(4096, 0o555) if is_directory(target) else sc.open_tree("/dev/null", sc.OPEN_TREE_CLONE)
        sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY)
        sc.move_mount(mount, "", target)
        os.close(mount)
        os.close(target)


class Protect(Operation):
    """Make a path read-only by a mount of itself over itself."""

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"make {self.path} read-only"

    def execute(self, ctx: Context) -> None:
        try:
            target = sc.openat2(self.path, os.O_PATH, ctx.root, resolve=BESIDE)
        except FileNotFoundError:
            return
        mount = sc.clone_mount(target, recursive=True)
        sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY, recursive=True)
        sc.move_mount(mount, "", target)
        os.close(mount)
        os.close(target)


class ReadOnlyRoot(Operation):
    def describe(self) -> str:
        return "make the root read-only"

    def execute(self, ctx: Context) -> None:
        root = sc.openat2(".", os.O_PATH, ctx.root, resolve=BESIDE)
        sc.mount_setattr(root, set=sc.MOUNT_ATTR_RDONLY)
        os.close(root)


class EnterRoot(Operation):
    """Make the root ``/`` and let go of everything of the host's (pivot_root(2), "pivot_root(".", ".")")."""

    def describe(self) -> str:
        return "pivot_root into the root and detach the host's mounts"

    def execute(self, ctx: Context) -> None:
        os.fchdir(ctx.root)
        sc.pivot_root(".", ".")
        # "." leads to what is now stacked on the new root, which is the old one. While it is there, "/.." leads out.
        sc.umount(".", sc.MNT_DETACH)
        os.chdir("/")
        if os.path.samestat(os.stat("/"), os.stat("/..")) and _mounts_at_root() == 1:
            return
        raise StartError("could not leave the host's root behind", "this is a bug; nothing was started")


def _mounts_at_root() -> int:
    with open("/proc/self/mountinfo", "rb") as f:
        return sum(line.split(b" ", 5)[4] == b"/" for line in f)
