"""Detached mounts of file systems and directories: made, never attached in the host's tree, gone with their descriptor.

Such a mount may be id-mapped, and given to another mount namespace. Source: fsopen(2), open_tree(2), mount_setattr(2).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from imgrun import syscalls as sc
from imgrun.errors import HostError, ImageBusy, ImageDamaged, ImageError, ImageFormatError, ImgrunError, PrivilegeError
from imgrun.storage.retry import attempt

BUSY_SECONDS = 2.0
DAMAGE = (errno.EUCLEAN, errno.EBADMSG, errno.EIO, errno.ENODATA, errno.ENXIO)


def file_system(
    fstype: str,
    source: str,
    options: dict[str, str | None],
    *,
    read_only: bool,
    name: str,
    hint: Callable[[], str] = lambda: "'dmesg | tail' may say more",
) -> int:
    """Mount the block device ``source`` and return the mount's descriptor. Device nodes in it are never usable.

    Raises ImageFormatError when the kernel lacks ``fstype``, else what the kernel's refusal means; ``name`` is what
    messages call the image, ``hint`` says what to do about damage.
    """

    def mount() -> int:
        fs = sc.fsopen(fstype)
        try:
            try:
                sc.fsconfig(fs, "source", source)
                if read_only:
                    sc.fsconfig(fs, "ro", None)
                for key, value in options.items():
                    sc.fsconfig(fs, key, value)
                sc.fsconfig_create(fs)
            except OSError as e:
                raise _refused(e, sc.fs_messages(fs), fstype, name, hint()) from e
            return sc.fsmount(fs, sc.MOUNT_ATTR_NODEV | (sc.MOUNT_ATTR_RDONLY if read_only else 0))
        finally:
            os.close(fs)

    try:
        # Busy is also what a superblock says that its last user is just taking down.
        return attempt(mount, lambda e: isinstance(e, ImageBusy), BUSY_SECONDS)
    except OSError as e:
        if e.errno == errno.ENODEV:
            raise lacking(fstype, name) from e
        if e.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"the caller may not mount {name}", "run imgrun as root") from e
        raise HostError(f"{name} cannot be mounted: {e.strerror}", "'dmesg | tail' may say more") from e


class MountsBelow(HostError):
    """A directory that can only be had together with what is mounted below it."""


def directory(fd: int, *, read_only: bool, nosuid: bool = False, below: bool = False) -> int:
    """A mount of the directory ``fd`` alone: nothing that is mounted below it, now or later, is seen in it.

    Without the host's root, what mounts hide must stay hidden (mount_namespaces(7)): MountsBelow is raised where there are
    any. With ``below`` they come along.
    """
    try:
        mount = sc.clone_mount(fd, recursive=below)
    except OSError as e:
        if e.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError("the caller may not mount directories", "run imgrun as root") from e
        kind = MountsBelow if e.errno == errno.EINVAL and not below else HostError
        raise kind(f"the directory cannot be mounted: {e.strerror}", "nobody can use an unbindable mount") from e
    attributes = sc.MOUNT_ATTR_NODEV
    attributes |= sc.MOUNT_ATTR_RDONLY if read_only else 0
    attributes |= sc.MOUNT_ATTR_NOSUID if nosuid else 0
    try:
        sc.mount_setattr(mount, set=attributes, propagation=sc.MS_PRIVATE, recursive=below)
    except BaseException:
        os.close(mount)
        raise
    return mount


def kernel_has(fstype: str) -> bool | None:
    """Whether this kernel can mount ``fstype``, now or by loading a module; None when that cannot be told."""
    try:
        with open("/proc/filesystems", encoding="ascii") as f:
            if any(line.split()[-1:] == [fstype] for line in f):
                return True
        with open(f"/lib/modules/{os.uname().release}/modules.dep", encoding="utf-8") as f:
            return any(f"/{fstype}.ko" in line.partition(":")[0] for line in f)
    except FileNotFoundError:
        # A kernel without a module tree has nothing to load.
        return None if os.path.exists("/proc/modules") else False
    except OSError:
        return None


def lacking(fstype: str, name: str) -> ImageFormatError:
    return ImageFormatError(
        f"{name} is {fstype}, which this kernel cannot mount",
        f"load its module (modprobe {fstype}), or copy the image's files into an ext4 image",
    )


def _refused(e: OSError, said: list[str], fstype: str, name: str, hint: str) -> ImgrunError:
    detail = f": {said[-1]}" if said else f": {e.strerror}"
    if e.errno == errno.EBUSY or e.errno == errno.EEXIST:
        return ImageBusy(f"{name} is mounted elsewhere in another way{detail}", "unmount it there, or use a copy")
    if e.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"the caller may not mount {name}{detail}", "run imgrun as root")
    if e.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return HostError(f"{name} cannot be mounted{detail}")
    if e.errno == errno.EROFS:
        return ImageDamaged(f"{name} ({fstype}) has a journal that holds changes not yet in place", hint)
    kind: type[ImageError] = ImageDamaged if e.errno in DAMAGE else ImageFormatError
    return kind(f"{name} ({fstype}) is refused by the kernel{detail}", hint)
