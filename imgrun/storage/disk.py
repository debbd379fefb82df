"""A partitioned disk: its table, in sectors of 512 or 4096 bytes, and the choice of its root as seen from outside.

Source: UEFI Specification, section 5.3 (GUID Partition Table).
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from imgrun.errors import ImageDamaged, ImageError, ImageFormatError, PartitionError
from imgrun.storage import formats
from imgrun.storage.blkid import Partition, Table, partition_table, signature
from imgrun.storage.partitions import by_type, listing, named, none_found, numbered, several

__all__ = ["Choice", "Table", "choose", "listing", "none_found", "read", "several", "unusable", "with_contents"]

GPT_SIGNATURE = b"EFI PART"
SECTOR_SIZES = (512, 4096)


class Choice(NamedTuple):
    """``root`` None: the contents of the partitions have to decide."""

    table: Table
    root: Partition | None


def choose(fd: int, size: int, path: str, wanted: str | None, recognised: str) -> Choice:
    """Read the partition table of a file that is no bare file system, and choose the root partition.

    ``wanted`` is what the user names; ``recognised`` is libblkid's name for the file as a whole, if any. Raises
    ImageFormatError for what is no disk at all, ImageDamaged for a disk that is cut short, and PartitionError.
    """
    table = None if recognised in formats.BY_TYPE else _read_table(fd, size, path)
    if table is None:
        if wanted is not None and not recognised:
            whole = signature(fd, 0, size, path)
            recognised = whole.type if whole else ""
        if wanted is not None and recognised and recognised not in formats.BY_TYPE:
            raise PartitionError(f"{path} is a bare {recognised} file system, not a disk", "leave out --partition")
        raise unusable(fd, 0, size, path, path, recognised)
    if wanted is None:
        roots = by_type(table, path)
        if len(roots) == 1:
            return Choice(table, _whole(roots[0], size, path))
        for p in table.partitions:
            _whole(p, size, path)
        table = with_contents(fd, table, size)
        if roots:
            raise several(table, path, roots, "root partitions")
        if not any(p.fstype for p in table.partitions):
            raise none_found(table, path)
        return Choice(table, None)
    root = numbered(table, wanted) or named(with_contents(fd, table, size), wanted, path)
    return Choice(table, _whole(root, size, path))


def read(path: str) -> Table | None:
    """The partition table of a disk with the contents of its partitions, whole or not; None when there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        table = _read_table(fd, size, path)
        return with_contents(fd, table, size) if table else None
    except ImageDamaged:
        return None
    finally:
        os.close(fd)


def with_contents(fd: int, table: Table, size: int) -> Table:
    """The same table with the file system of each partition looked up."""
    filled = []
    for p in table.partitions:
        try:
            found = signature(fd, p.offset, p.size, path_name(p)) if _fits(p, size) else None
        except ImageFormatError:
            found = None
        filled.append(p._replace(fstype=found.type, fs_label=found.label, fs_uuid=found.uuid) if found else p)
    return table._replace(partitions=tuple(filled))


def path_name(p: Partition) -> str:
    return f"partition {p.number}"


def unusable(fd: int, offset: int, size: int, path: str, name: str, recognised: str) -> ImageError:
    """The error for content that holds no file system that imgrun mounts."""
    known = formats.what_it_is(recognised, path) if recognised else None
    if known is None and recognised:
        return ImageFormatError(f"{name} holds {recognised}, which imgrun cannot use", formats.NOT_LINUX)
    phrase, hint = known or formats.what_it_looks_like(fd, offset, size, path)
    return ImageFormatError(f"{name} is not a usable image: it looks like {phrase}", hint)


def _read_table(fd: int, size: int, path: str) -> Table | None:
    table = None
    for sector_size in SECTOR_SIZES:
        table = partition_table(fd, size, sector_size)
        if table is not None:
            break
    if table is None or table.kind == "gpt":
        _refuse_truncated(fd, size, path)
    if table is None or table.kind == "gpt":
        return table
    # An MBR does not say what its sectors are: believe the size in which its partitions begin with something known.
    for sector_size in SECTOR_SIZES:
        other = partition_table(fd, size, sector_size)
        filled = with_contents(fd, other, size) if other else None
        if filled and any(p.fstype for p in filled.partitions):
            return filled
    return table


def _refuse_truncated(fd: int, size: int, path: str) -> None:
    """A GPT names the place of its copy, the disk's last sector: what is shorter was cut."""
    for sector_size in SECTOR_SIZES:
        header = os.pread(fd, 92, sector_size)
        if header[:8] != GPT_SIGNATURE:
            continue
        (backup,) = struct.unpack_from("<Q", header, 32)
        if (backup + 1) * sector_size > size:
            whole = (backup + 1) * sector_size
            raise ImageDamaged(
                f"{path} is truncated: its partition table is for {whole} bytes, the file has {size}",
                "was its copy or download cut short?",
            )
        return


def _fits(p: Partition, size: int) -> bool:
    return p.size > 0 and p.offset + p.size <= size


def _whole(root: Partition, size: int, path: str) -> Partition:
    if not _fits(root, size):
        end = root.offset + root.size
        raise ImageDamaged(
            f"{path} is truncated: its partition {root.number} ends at {end} bytes, the file at {size}",
            "was its copy or download cut short?",
        )
    return root
