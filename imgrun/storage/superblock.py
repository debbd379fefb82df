"""The few fields of each file system's superblock that decide whether an image is whole and clean.

Offsets are from the kernel's on-disk definitions: fs/ext4/ext4.h (struct ext4_super_block), fs/xfs/libxfs/xfs_format.h
(struct xfs_dsb), fs/btrfs (struct btrfs_super_block), fs/squashfs/squashfs_fs.h and fs/erofs/erofs_fs.h.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

EXT_VALID = 0x1
EXT_ERRORS = 0x2
EXT_HAS_JOURNAL = 0x4
EXT_RECOVER = 0x4
EXT_64BIT = 0x80
BTRFS_SUPERBLOCK = 64 << 10

DRIVERS = {"ext2": "ext4", "ext3": "ext4", "ext4": "ext4", "xfs": "xfs", "btrfs": "btrfs", "squashfs": "squashfs",
           "erofs": "erofs"}  # fmt: skip
"""The file systems that imgrun mounts, and the kernel's driver for each: ext4's serves its ancestors too."""
READ_ONLY_KINDS = ("squashfs", "erofs")


class Superblock(NamedTuple):
    """``size`` is what the file system occupies by its own account; sizes in bytes.

    ``sector_size`` is the largest logical block size of a device that it can be mounted from. ``unclean`` says what was
    not finished, or is empty; ``replayable`` that a writable mount finishes it. An xfs journal's state is not in the
    superblock: only a mount can tell. ``incomplete`` names what else the file system needs and an image cannot have.
    """

    size: int
    block_size: int
    sector_size: int
    unclean: str = ""
    replayable: bool = False
    incomplete: str = ""


def read(fd: int, offset: int, fstype: str) -> Superblock | None:
    """Read the superblock of ``fstype``, one of DRIVERS, in the region at ``offset``. None when it is cut short."""
    start, length, parse = _PARSERS[DRIVERS[fstype]]
    data = os.pread(fd, length, offset + start)
    return parse(data) if len(data) == length else None


def mounts(path: str, offset: int, fstype: str | None) -> str | None:
    """Which file system this is, when it was last mounted for writing, and how often; None where that is not kept.

    Raises OSError.
    """
    if DRIVERS.get(fstype or "") != "ext4":
        return None
    with open(path, "rb") as f:
        f.seek(offset + 1024)
        sb = f.read(1024)
    if len(sb) < 1024:
        return ""
    last, _, count = struct.unpack_from("<IIH", sb, 0x2C)
    return f"{sb[0x68:0x78].hex()} {sb[0x275]:x}{last:08x} {count}"


def _ext(sb: bytes) -> Superblock:
    (blocks,) = struct.unpack_from("<I", sb, 0x04)
    (log_block_size,) = struct.unpack_from("<I", sb, 0x18)
    (state,) = struct.unpack_from("<H", sb, 0x3A)
    compatible, incompatible = struct.unpack_from("<II", sb, 0x5C)
    if incompatible & EXT_64BIT:
        blocks |= struct.unpack_from("<I", sb, 0x150)[0] << 32
    block_size = 1024 << min(log_block_size, 6)
    unclean = ""
    if incompatible & EXT_RECOVER:
        unclean = "its journal holds changes that are not yet in place"
    elif state & EXT_ERRORS:
        unclean = "it records that errors were found in it"
    elif not state & EXT_VALID:
        unclean = "it was not unmounted cleanly"
    journal = bool(incompatible & EXT_RECOVER and compatible & EXT_HAS_JOURNAL)
    return Superblock(blocks * block_size, block_size, min(block_size, 4096), unclean, journal and not state & EXT_ERRORS)


def _xfs(sb: bytes) -> Superblock:
    block_size, blocks = struct.unpack_from(">IQ", sb, 4)
    (log_start,) = struct.unpack_from(">Q", sb, 48)
    (sector_size,) = struct.unpack_from(">H", sb, 102)
    # mkfs.xfs clears this byte last.
    unclean = "mkfs.xfs did not finish" if sb[126] else ""
    incomplete = "" if log_start else "its journal is on another device"
    return Superblock(blocks * block_size, block_size, sector_size, unclean, False, incomplete)


def _btrfs(sb: bytes) -> Superblock:
    (log_root,) = struct.unpack_from("<Q", sb, 96)
    (devices,) = struct.unpack_from("<Q", sb, 136)
    (sector_size,) = struct.unpack_from("<I", sb, 144)
    (device_size,) = struct.unpack_from("<Q", sb, 209)
    unclean = "its log tree holds changes that are not yet in place" if log_root else ""
    incomplete = "" if devices == 1 else f"it is one of the {devices} devices of a btrfs file system"
    return Superblock(device_size, sector_size, min(sector_size, 4096), unclean, bool(log_root), incomplete)


def _squashfs(sb: bytes) -> Superblock:
    (block_size,) = struct.unpack_from("<I", sb, 12)
    (used,) = struct.unpack_from("<Q", sb, 40)
    return Superblock(used, block_size, 4096)


def _erofs(sb: bytes) -> Superblock:
    block_size = 1 << min(sb[12], 16)
    (blocks,) = struct.unpack_from("<I", sb, 36)
    (devices,) = struct.unpack_from("<H", sb, 86)
    incomplete = f"its data is in {devices} other files" if devices else ""
    return Superblock(blocks * block_size, block_size, min(block_size, 4096), incomplete=incomplete)


_PARSERS = {
    "ext4": (1024, 1024, _ext),
    "xfs": (0, 512, _xfs),
    "btrfs": (BTRFS_SUPERBLOCK, 4096, _btrfs),
    "squashfs": (0, 96, _squashfs),
    "erofs": (1024, 128, _erofs),
}
