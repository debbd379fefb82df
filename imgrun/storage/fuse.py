"""File systems of images without the host's root: a FUSE server per job, in the supervisor's own user and mount namespace.

When the last mount goes, a server ends by itself. Source: fuse(8), mount_namespaces(7).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import HostError, ImageDamaged, ImageFormatError, PrivilegeError
from imgrun.helper import Helper, find_program

START_SECONDS = 20.0
OPTIONS = "allow_other,default_permissions"
FOREVER = "attr_timeout=1e6,entry_timeout=1e6,negative_timeout=1e6"
READ_ONLY_EXT4 = "ro,norecovery,no_default_opts,kernel_cache," + FOREVER
"""The kernel keeps names and attributes. By itself fuse2fs asks for the latter to be forgotten at once: stat(2) takes 5 times
as long."""


class Kind(NamedTuple):
    """A server program: its package, and how it is told what to serve."""

    program: str
    package: str
    arguments: tuple[str, ...]


SERVERS = {
    "squashfs": Kind("squashfuse_ll", "squashfuse", ("-f", "-o", "ro,offset={offset}," + OPTIONS, "{path}", "{target}")),
    "ext4": Kind("fuse2fs", "fuse2fs", ("-f", "-o", "{mode},offset={offset}," + OPTIONS, "{path}", "{target}")),
    "erofs": Kind("erofsfuse", "erofsfuse", ("-f", "--offset={offset}", "-o", "ro," + OPTIONS, "{path}", "{target}")),
}


def serve(fstype: str, fd: int, offset: int, *, writable: bool, directory: str, name: str) -> tuple[int, Helper]:
    """Serve the file system at ``offset`` of the file ``fd`` and return a detached mount of it with its server.

    The server inherits ``fd``, and with it the lock on the image.

    ``directory`` is an existing one of ours for the server's mount point and messages. Raises HostError when the server
    program or /dev/fuse is missing, ImageFormatError when no server serves ``fstype``, ImageDamaged when it refuses.
    """
    kind = SERVERS.get(fstype)
    if kind is None:
        raise ImageFormatError(
            f"{name} is {fstype}, which only root can mount", "make a squashfs of its files, or ask for root"
        )
    program = find_program(kind.program)
    if program is None:
        raise HostError(
            f"{name} is {fstype}, and {kind.program}, which serves it without root, is not installed",
            f"install {kind.package}, or make a squashfs of the image's files",
        )
    check_device()
    target = f"{directory}/image"
    os.mkdir(target, 0o700)
    mode = "rw" if writable else READ_ONLY_EXT4 + (",use_ino" if _uses_libfuse_2(program) else "")
    words = {"path": f"/proc/self/fd/{fd}", "offset": str(offset), "target": target, "mode": mode}
    argv = [program, *(argument.format_map(words) for argument in kind.arguments)]
    return start(argv, target, f"{directory}/fuse.log", name, keep=(fd,))


def _uses_libfuse_2(program: str) -> bool:
    """Whether inode numbers must be asked for to be those of the image; libfuse 3 does not know the option."""
    with open(program, "rb") as f:
        return b"libfuse.so.2" in f.read()


def start(argv: list[str], target: str, log: str, name: str, keep: tuple[int, ...] = ()) -> tuple[int, Helper]:
    """Run a file server that mounts itself on ``target``; returns the mount, taken off there again, and the server."""
    before = os.stat(target).st_dev
    # It tells of every change by POLLPRI (proc_pid_mountinfo(5)).
    mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    server = Helper.run(argv, log, keep)
    try:
        try:
            if not server.await_ready(lambda: os.stat(target).st_dev != before, START_SECONDS, mounts):
                raise ImageDamaged(f"{name}: {server.program} refused it: {server.last_words()}", "check the image")
        except TimeoutError:
            raise HostError(f"{server.program} did not serve {name} within {START_SECONDS:g} s", f"see {log}") from None
        here = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount = sc.clone_mount(here, recursive=False)
        finally:
            os.close(here)
        sc.umount(target, sc.MNT_DETACH)
        os.rmdir(target)
        return mount, server
    except BaseException:
        server.close()
        raise
    finally:
        os.close(mounts)


def check_device() -> None:
    """Raise an error that says what is wrong with /dev/fuse, if something is."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError("this host has no /dev/fuse", "ask your administrator: modprobe fuse") from None
    except OSError as e:
        raise PrivilegeError(
            f"/dev/fuse cannot be opened: {e.strerror}", "ask your administrator: chmod 666 /dev/fuse, as udev does"
        ) from e
