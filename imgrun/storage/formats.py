"""What a file that imgrun cannot use looks like, and what its owner can do about it. Only read when refusing one."""

from __future__ import annotations

import os

RAW = "convert it: qemu-img convert -O raw {path} {stem}.img"
BUILD = "unpack it into a directory, which also works as an image, or see 'imgrun image build --help'"
UNPACK = "unpack it first: {tool} {path}"
NOT_LINUX = "imgrun needs a Linux root file system: ext2, ext3, ext4, xfs, btrfs, squashfs or erofs"
FOREIGN = "mount it and give the directory as the image, or copy it into a new image"

BY_TYPE = {
    "crypto_LUKS": (
        "an encrypted volume (LUKS)",
        "open it with 'cryptsetup open --readonly', mount it, and give the directory as the image",
    ),
    "BitLocker": ("an encrypted volume (BitLocker)", NOT_LINUX),
    "LVM2_member": (
        "an LVM physical volume",
        "activate it ('losetup', 'vgchange -ay'), mount the root volume, and give the directory as the image",
    ),
    "linux_raid_member": ("one member of a Linux RAID", "assemble and mount it, and give the directory as the image"),
    "swap": ("swap space", NOT_LINUX),
    "vfat": ("a FAT file system", NOT_LINUX),
    "exfat": ("an exFAT file system", NOT_LINUX),
    "ntfs": ("an NTFS file system", NOT_LINUX),
    "iso9660": ("an ISO 9660 CD image", FOREIGN),
    "udf": ("a UDF disc image", FOREIGN),
    "jbd": ("an external ext4 journal", NOT_LINUX),
    "xfs_log": ("an external xfs journal", NOT_LINUX),
}
"""libblkid's names of what is recognised but cannot be used."""

MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"QFI\xfb", "a qcow2 disk image", RAW),
    (0, b"KDMV", "a VMDK disk image", RAW),
    (0, b"COWD", "a VMDK disk image", RAW),
    (0, b"# Disk DescriptorFile", "the description file of a VMDK disk image", RAW),
    (0, b"vhdxfile", "a VHDX disk image", RAW),
    (0, b"conectix", "a VHD disk image", RAW),
    (64, b"\x7f\x10\xda\xbe", "a VDI disk image", RAW),
    (32, b"SIF_MAGIC\0", "an Apptainer image (SIF)", "give it as a directory: apptainer build --sandbox DIR {path}"),
    (0, b"LUKS\xba\xbe", *BY_TYPE["crypto_LUKS"]),
    (512, b"LABELONE", *BY_TYPE["LVM2_member"]),
    (32769, b"CD001", *BY_TYPE["iso9660"]),
    (257, b"ustar", "a tar archive", BUILD),
    (0, b"\x1f\x8b", "compressed by gzip", UNPACK.replace("{tool}", "gunzip -k")),
    (0, b"\xfd7zXZ\0", "compressed by xz", UNPACK.replace("{tool}", "unxz -k")),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK.replace("{tool}", "unzstd")),
    (0, b"BZh", "compressed by bzip2", UNPACK.replace("{tool}", "bunzip2 -k")),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", UNPACK.replace("{tool}", "unlz4")),
    (0, b"PK\x03\x04", "a zip archive", UNPACK.replace("{tool}", "unzip")),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", UNPACK.replace("{tool}", "7z x")),
    (0, b"070701", "a cpio archive", BUILD),
    (0, b"\x7fELF", "a program (ELF), not an image", "give an image first, then the command to run in it"),
    (0, b"MZ", "a Windows program", NOT_LINUX),
    (0, b"#!", "a script, not an image", "give an image first, then the command to run in it"),
)
HEAD = 64 << 10


def what_it_is(kind: str, path: str) -> tuple[str, str] | None:
    """A phrase and a hint for content that libblkid names ``kind``."""
    found = BY_TYPE.get(kind)
    return _filled(*found, path) if found else None


def what_it_looks_like(fd: int, offset: int, size: int, path: str) -> tuple[str, str]:
    """A phrase such as ``a qcow2 disk image`` and a hint, for content that libblkid does not know."""
    head = os.pread(fd, min(HEAD, size), offset)
    for at, magic, phrase, hint in MAGIC:
        if head[at : at + len(magic)] == magic:
            return _filled(phrase, hint, path)
    if size >= 512 and os.pread(fd, 8, offset + size - 512) == b"conectix":
        return _filled("a VHD disk image", RAW, path)
    if not head.strip(b"\0"):
        return "empty space that was never formatted", "'mke2fs -d DIRECTORY FILE' fills it with a root file system"
    if _is_text(head[:4096]):
        return "a text file", "give the image itself; was a page or pointer downloaded in its place?"
    if head[510:512] == b"\x55\xaa":
        return "a disk with a boot sector but no partition table that can be read", NOT_LINUX
    return "nothing that is known", NOT_LINUX


def _is_text(data: bytes) -> bool:
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        if e.start < len(data) - 3:
            return False
        text = data[: e.start].decode()
    return all(c.isprintable() or c in "\n\r\t\f" for c in text)


def _filled(phrase: str, hint: str, path: str) -> tuple[str, str]:
    from shlex import quote

    stem = os.path.splitext(os.path.basename(path))[0]
    return phrase, hint.replace("{stem}.img", quote(f"{stem}.img")).replace("{path}", quote(path))
