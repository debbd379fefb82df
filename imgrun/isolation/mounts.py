"""The mount plan: each operation is an object that can say what it does and do it.

Operations run in the job's own mount namespace, before its root becomes ``/``. Targets are looked up with the job's root
as the root of the walk (openat2(2), RESOLVE_IN_ROOT), so no link in the image leads out of it. Mounts arrive as detached
descriptors from the supervisor (:mod:`imgrun.isolation.sources`) or are made here, by the job's own root.

Sources: mount_namespaces(7), overlayfs (Documentation/filesystems/overlayfs.rst), pivot_root(2).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from imgrun import syscalls as sc
from imgrun.errors import ImgrunError, SpecError, StartError

BESIDE = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS
NO_ACCESS_TO_DEVICES = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV
KERNEL_TREES = ("/proc", "/sys", "/dev")

STAGE = "/etc"
"""A directory that every host has and from which nothing more is needed. Not ``/``: what is stacked there would have to be
detached by itself, and each detaching waits for all processors (synchronize_rcu)."""


SHOWS_OVERLAY_INODES = (6, 12)
"""Kernels from this one on show the overlay's own inodes in /proc/PID/maps; at older ones it is looked."""


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

    def __init__(self) -> None:
        # What only older kernels need is imported before the job's mount namespace is entered.
        self._find_xino: Callable[[int], str] | None = None
        if sc.kernel_version() < SHOWS_OVERLAY_INODES:
            from imgrun.isolation.inodes import xino

            self._find_xino = xino

    def describe(self) -> str:
        return "mount an overlay (lower: image, upper: scratch/upper, userxattr, xino) as the root"

    def execute(self, ctx: Context) -> None:
        sc.move_mount(ctx.fds["image"], "lower", ctx.stage)
        os.fchdir(ctx.stage)
        options: dict[str, str | None] = {
            "source": "imgrun",
            "lowerdir": "lower",
            "upperdir": "scratch/upper",
            "workdir": "scratch/work",
            # CRIU must see the same inode in /proc/PID/maps and from stat.
            "xino": "on" if self._find_xino is None else self._find_xino(ctx.stage),
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
