"""One thin function per system call that Python lacks. Each raises ``OSError`` and names no policy.

Sources: the man page of the same name, section 2; ``loop(4)`` for the loop ioctls; and, for the mount API,
``open_tree(2)``, ``move_mount(2)``, ``fsopen(2)``, ``fsconfig(2)``, ``fsmount(2)``, ``mount_setattr(2)``.
Paths are given relative to a directory descriptor wherever the kernel allows it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from imgrun.native._syscalls import ffi, lib  # type: ignore[import-not-found,unused-ignore]

_lib: Any = lib
_ffi: Any = ffi

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19

MNT_DETACH = 2

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_IDMAP = 0x00100000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLOSE_RANGE_CLOEXEC = 4

PERF_FLAG_PID_CGROUP = 4

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16


OPENAT2_ATTEMPTS = 10_000


def _checked(result: int, path: object = None) -> int:
    if result < 0:
        if path is None:
            raise OSError(-result, os.strerror(-result))
        raise OSError(-result, os.strerror(-result), path)
    return result


def clone(flags: int, cgroup_fd: int = -1, pid: int = 0) -> int:
    """Fork into new namespaces, into a v2 cgroup when its descriptor is given, and with a chosen pid (clone3(2)).

    Returns 0 in the child. The caller must have a single thread: nothing that other threads hold is mended.
    """
    return _checked(_lib.ig_clone(flags, cgroup_fd, pid))


def userns_holder() -> int:
    """A process in a new user namespace that does nothing until it is killed or we die. Its caller kills and reaps it."""
    return _checked(_lib.ig_userns_holder())


def unshare(flags: int) -> None:
    _checked(_lib.ig_unshare(flags))


def setns(fd: int, flags: int = 0) -> None:
    _checked(_lib.ig_setns(fd, flags))


def pivot_root(new_root: str, put_old: str) -> None:
    _checked(_lib.ig_pivot_root(os.fsencode(new_root), os.fsencode(put_old)), new_root)


def kernel_version() -> tuple[int, int]:
    """Of the running kernel, as far as features are tied to it: (6, 12) for 6.12-rc1 (uname(2))."""
    major, minor = os.uname().release.split(".")[:2]
    rest = minor.lstrip("0123456789")
    return int(major), int(minor.removesuffix(rest))


def exchange(one: str, other: str) -> None:
    """Give each of two files or directories the other's name, both at once (rename(2), RENAME_EXCHANGE)."""
    _checked(_lib.ig_exchange(os.fsencode(one), os.fsencode(other)), one)


def syncfs(fd: int) -> None:
    """Write everything of the file system of ``fd`` to its disk (syncfs(2))."""
    _checked(_lib.ig_syncfs(fd))


def begin_writing(fd: int) -> None:
    """Have the kernel begin to write what it keeps of a file to its disk, without waiting for that (sync_file_range(2))."""
    _checked(_lib.ig_begin_writing(fd))


def perf_event_open(
    type: int,
    config: int,
    pid: int,
    cpu: int,
    group: int,
    flags: int,
    *,
    inherit: bool,
    enable_on_exec: bool,
    exclude_kernel: bool,
) -> int:
    """Open a counter that is read as three 64-bit numbers: count, time enabled, time running (perf_event_open(2))."""
    return _checked(_lib.ig_perf_event_open(type, config, pid, cpu, group, flags, inherit, enable_on_exec, exclude_kernel))


def fs_magic(path: str) -> int:
    """The number that names the kind of file system ``path`` is on (statfs(2), f_type)."""
    return _checked(_lib.ig_fs_magic(os.fsencode(path)), path)


def umount(target: str, flags: int = 0) -> None:
    _checked(_lib.ig_umount2(os.fsencode(target), flags), target)


def set_propagation(target: str, flags: int) -> None:
    """Change how mount events spread below ``target``: MS_PRIVATE or MS_SLAVE, with MS_REC."""
    _checked(_lib.ig_mount(_ffi.NULL, os.fsencode(target), _ffi.NULL, flags, _ffi.NULL), target)


def open_tree(path: str, flags: int, dirfd: int = AT_FDCWD) -> int:
    """A descriptor of a mount. A copy (OPEN_TREE_CLONE) is private, so that mounts on it stay its own.

    Otherwise it would be a peer of the mount it was copied from wherever that is shared, as all are under systemd.
    """
    fd: int = _checked(_lib.ig_open_tree(dirfd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC), path or None)
    if flags & OPEN_TREE_CLONE:
        try:
            mount_setattr(fd, propagation=MS_PRIVATE, recursive=bool(flags & AT_RECURSIVE))
        except BaseException:
            os.close(fd)
            raise
    return fd


def clone_mount(fd: int, *, recursive: bool) -> int:
    """Return a detached copy of the mount that the descriptor ``fd`` is in, rooted at ``fd``."""
    return open_tree("", OPEN_TREE_CLONE | AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), fd)


def move_mount(mount_fd: int, target: str, dirfd: int = AT_FDCWD) -> None:
    """Attach the detached mount ``mount_fd`` at ``target``; with an empty ``target``, at ``dirfd`` itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    _checked(_lib.ig_move_mount(mount_fd, b"", dirfd, os.fsencode(target), flags), target or None)


def fsopen(fstype: str) -> int:
    return _checked(_lib.ig_fsopen(fstype.encode(), FSOPEN_CLOEXEC), fstype)


def fsconfig(fd: int, key: str, value: str | int | None) -> None:
    """Set one parameter of a file system being made: a flag (None), a string, or a descriptor (int)."""
    if value is None:
        _checked(_lib.ig_fsconfig(fd, FSCONFIG_SET_FLAG, key.encode(), _ffi.NULL, 0), key)
    elif isinstance(value, int):
        _checked(_lib.ig_fsconfig(fd, FSCONFIG_SET_FD, key.encode(), _ffi.NULL, value), key)
    else:
        _checked(_lib.ig_fsconfig(fd, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0), key)


def fsconfig_create(fd: int) -> None:
    _checked(_lib.ig_fsconfig(fd, FSCONFIG_CMD_CREATE, _ffi.NULL, _ffi.NULL, 0))


def fsmount(fd: int, attributes: int = 0) -> int:
    return _checked(_lib.ig_fsmount(fd, FSMOUNT_CLOEXEC, attributes))


def fs_messages(fd: int) -> list[str]:
    """What the kernel says about a file system context that refused, without the 'e ' or 'w ' before each line."""
    lines: list[str] = []
    while True:
        try:
            line = os.read(fd, 4096)
        except OSError:
            return lines
        if not line:
            return lines
        lines.append(line.decode(errors="replace").rstrip("\n")[2:])


def mount_setattr(
    mount_fd: int, *, set: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0, recursive: bool = False
) -> None:
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _checked(_lib.ig_mount_setattr(mount_fd, b"", flags, set, clear, propagation, userns_fd))


def openat2(path: str, flags: int, dirfd: int, *, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open ``path`` with ``dirfd`` as its root, whatever symbolic links say (openat2(2))."""
    name, result = os.fsencode(path), 0
    for _ in range(OPENAT2_ATTEMPTS):
        result = _lib.ig_openat2(dirfd, name, flags | os.O_CLOEXEC, mode, resolve)
        # A rename or mount anywhere on the host while ".." is followed: the kernel asks to try again.
        if result != -errno.EAGAIN:
            break
    return _checked(result, path)


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    return _checked(_lib.ig_prctl(option, a, b, c, d))


def capget() -> tuple[int, int, int]:
    """The calling thread's effective, permitted and inheritable capabilities, as bit masks."""
    sets = [_ffi.new("uint64_t *") for _ in range(3)]
    _checked(_lib.ig_capget(*sets))
    return sets[0][0], sets[1][0], sets[2][0]


def capset(effective: int, permitted: int, inheritable: int) -> None:
    _checked(_lib.ig_capset(effective, permitted, inheritable))


def close_range_cloexec(first: int) -> None:
    """Mark every descriptor from ``first`` on close-on-exec."""
    _checked(_lib.ig_close_range(first, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC))


def close_others(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``."""
    first = 3
    for fd in sorted(fd for fd in keep if fd > 2):
        if fd > first:
            _checked(_lib.ig_close_range(first, fd - 1, 0))
        first = fd + 1
    _checked(_lib.ig_close_range(first, 0xFFFFFFFF, 0))


def join_session_keyring() -> None:
    """Start a new, empty session keyring, so that none of the caller's keys are inherited (keyctl(2))."""
    _checked(_lib.ig_join_session_keyring())


class LoopStatus(NamedTuple):
    """What a bound loop device is bound to. Sizes in bytes; ``size`` 0 means to the end of the file."""

    device: int
    inode: int
    offset: int
    size: int
    flags: int


def loop_get_free(control_fd: int) -> int:
    return _checked(_lib.ig_loop_get_free(control_fd))


def loop_configure(loop_fd: int, image_fd: int, *, offset: int, size: int, block_size: int, flags: int, name: str) -> None:
    _checked(_lib.ig_loop_configure(loop_fd, image_fd, offset, size, block_size, flags, os.fsencode(name)[:63]), name)


def loop_get_status(loop_fd: int) -> LoopStatus:
    """The binding of a loop device. ``device`` is as in ``stat(2)``'s st_dev."""
    status = _ffi.new("struct ig_loop_status *")
    _checked(_lib.ig_loop_get_status(loop_fd, status))
    packed = status.device
    device = os.makedev(packed >> 8 & 0xFFF, packed & 0xFF | packed >> 12 & 0xFFF00)
    return LoopStatus(device, status.inode, status.offset, status.size, status.flags)
