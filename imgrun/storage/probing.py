"""What an image file holds, and which part of it is the root: told from its bytes alone, and refused if it cannot be used."""

from __future__ import annotations

import errno
import os
import stat
from typing import Literal, NamedTuple

from imgrun.errors import ImageDamaged, ImageFormatError, ImageMissing, PartitionError, PrivilegeError
from imgrun.storage import disk, superblock
from imgrun.storage.blkid import Partition, signature

Kind = Literal["directory", "filesystem", "disk"]


class ImageInfo(NamedTuple):
    """What an image holds. Sizes and offsets are in bytes.

    ``offset`` and ``size`` bound the root file system in the file (all of it, or a partition). ``sector_size`` is the
    logical block size for its loop device. ``needs_mount_probe`` tells that only a look into the candidate partitions
    can decide which is the root; ``partition`` and ``fstype`` are then still unknown.
    """

    path: str
    kind: Kind
    fstype: str | None = None
    offset: int = 0
    size: int = 0
    block_size: int = 0
    sector_size: int = 512
    uuid: str = ""
    label: str = ""
    table: str | None = None
    """``gpt`` or ``dos`` for a disk."""
    partition: int | None = None
    partitions: tuple[Partition, ...] = ()
    unclean: str = ""
    """What was left undone when it was last written to; empty also where only a mount can tell (xfs)."""
    replayable: bool = False
    """Whether a writable mount would put ``unclean`` right."""
    needs_mount_probe: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path if self.partition is None else f"partition {self.partition} of {self.path}"


def probe(path: str, partition: str | None = None) -> ImageInfo:
    """What the image holds, and which part of it is the root. Needs to read the file and no more.

    ``partition`` names one by number, label or UUID. Raises an ImageError that says why it cannot be used.
    """
    fd = open_file(path, writable=False)
    try:
        return examine(fd, path, partition)
    finally:
        os.close(fd)


def open_file(path: str, *, writable: bool) -> int:
    """Open an image without side effects on what may turn out to be a device or a pipe."""
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        raise _missing(path, e) from e
    try:
        mode = os.fstat(found).st_mode
        if stat.S_ISBLK(mode):
            raise ImageMissing(
                f"{path} is a block device; an image is a file or a directory", "mount it and give the directory"
            )
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ImageMissing(f"{path} is {_file_kind(mode)}; an image is a file or a directory", "check the path")
        flags = os.O_RDWR if writable and stat.S_ISREG(mode) else os.O_RDONLY
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC)
    except OSError as e:
        if writable and e.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY):
            raise PrivilegeError(f"{path} cannot be written to: {e.strerror}", "run without --writable") from e
        raise _missing(path, e) from e
    finally:
        os.close(found)


def _missing(path: str, e: OSError | ValueError) -> ImageMissing:
    if isinstance(e, FileNotFoundError | NotADirectoryError):
        return ImageMissing(f"{path}: there is no such image", "check the path")
    if isinstance(e, PermissionError):
        return ImageMissing(f"{path} may not be read by this user", "ask its owner for read permission")
    return ImageMissing(f"{path} cannot be opened: {e.strerror if isinstance(e, OSError) else e}", "check the path")


def _file_kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a character device"}
    return kinds.get(stat.S_IFMT(mode), "not a regular file")


def examine(fd: int, path: str, partition: str | None) -> ImageInfo:
    """As :func:`probe`, of what is open."""
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        if partition is not None:
            raise PartitionError(f"{path} is a directory: it has no partition {partition!r}")
        return ImageInfo(path, "directory")
    size = status.st_size
    if size == 0:
        raise ImageFormatError(f"{path} is empty", "was it ever filled, or its download finished?")
    info = ImageInfo(path, "disk")
    try:
        found = None if partition is not None else signature(fd, 0, size, path)
        if found is not None and found.type in superblock.DRIVERS:
            info = info._replace(kind="filesystem", size=size, fstype=found.type, uuid=found.uuid, label=found.label)
            return _with_superblock(fd, info)
        choice = disk.choose(fd, size, path, partition, found.type if found else "")
        info = info._replace(table=choice.table.kind, partitions=choice.table.partitions)
        if choice.root is None:
            return info._replace(needs_mount_probe=True)
        return with_partition(fd, info, choice.root)
    except OSError as e:
        raise ImageDamaged(f"{path} cannot be read: {e.strerror}", "check the disk it is on") from e


def with_partition(fd: int, info: ImageInfo, root: Partition) -> ImageInfo:
    """What the image is with this partition as its root. Raises an ImageError."""
    info = info._replace(partition=root.number, offset=root.offset, size=root.size)
    found = signature(fd, root.offset, root.size, info.name)
    if found is None or found.type not in superblock.DRIVERS:
        raise disk.unusable(fd, root.offset, root.size, info.path, info.name, found.type if found else "")
    return _with_superblock(fd, info._replace(fstype=found.type, uuid=found.uuid, label=found.label))


def _with_superblock(fd: int, info: ImageInfo) -> ImageInfo:
    fstype = info.fstype or ""
    sb = superblock.read(fd, info.offset, fstype)
    if sb is None or sb.size > info.size:
        needs = f"its {fstype} file system has {sb.size} bytes" if sb else f"its {fstype} superblock is cut off"
        where = "the file" if info.partition is None else "the partition"
        raise ImageDamaged(
            f"{info.name} is truncated: {needs}, {where} only {info.size}", "was its copy or download cut short?"
        )
    if sb.size > info.size // 512 * 512:
        from shlex import quote

        raise ImageDamaged(
            f"{info.name} has {info.size} bytes, which is not a multiple of 512: its end cannot be read",
            f"pad it: truncate -s %4096 {quote(info.path)}",
        )
    if sb.incomplete:
        raise ImageFormatError(f"{info.name} cannot be used on its own: {sb.incomplete}")
    aligned = sb.sector_size >= 4096 and info.offset % 4096 == 0 and info.size % 4096 == 0
    return info._replace(
        block_size=sb.block_size, sector_size=4096 if aligned else 512, unclean=sb.unclean, replayable=sb.replayable
    )


def refuse_unfit(info: ImageInfo, writable: bool) -> None:
    """Raises an ImageError for a root file system that cannot be used so."""
    if writable and info.fstype in superblock.READ_ONLY_KINDS:
        raise ImageFormatError(
            f"{info.name} is {info.fstype}, which cannot be written to",
            "run without --writable: an overlay takes writes",
        )
    if info.unclean and not (writable and info.replayable):
        raise ImageDamaged(f"{info.name} is not clean: {info.unclean}", repair(info))


def repair(info: ImageInfo) -> str:
    """How to make an unclean file system clean."""
    from shlex import quote

    path = quote(info.path)
    if superblock.DRIVERS[info.fstype or ""] == "ext4":
        check = f"e2fsck {'-p' if info.replayable else '-f'}"
        if info.partition is None:
            return f"repair it with: {check} {path}"
        part = f"losetup --find --show --offset {info.offset} --sizelimit {info.size} {path}"
        return f"repair it with: d=$({part}) && {check} $d; losetup -d $d"
    options = "loop" if info.partition is None else f"loop,offset={info.offset},sizelimit={info.size}"
    once = f"finish it by mounting it once: mount -o {options} {path} /mnt && umount /mnt"
    return once + ("; if that fails, xfs_repair" if info.fstype == "xfs" else "; if that fails, btrfs rescue zero-log")
