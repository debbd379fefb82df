"""What libblkid says about a file: which file system it holds, or which partitions.

libblkid is part of util-linux, so every host has it. It only reads, and needs no right beyond reading the file.
Source: libblkid's API reference, "Low-level probing".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from imgrun.errors import HostError, ImageFormatError

SUBLKS_LABEL = 1 << 1
SUBLKS_UUID = 1 << 3
SUBLKS_TYPE = 1 << 5
PARTS_ENTRY_DETAILS = 1 << 2
AMBIVALENT = -2
MAX_PARTITIONS = 256

_loaded: tuple[Any, Any] | None = None


class Partition(NamedTuple):
    """One partition of a disk; sizes in bytes. ``fstype`` and its label and uuid are empty until looked for."""

    number: int
    offset: int
    size: int
    type: str
    """The type's GUID in lower case (GPT), or as ``0x83`` (MBR)."""
    label: str = ""
    uuid: str = ""
    flags: int = 0
    fstype: str = ""
    fs_label: str = ""
    fs_uuid: str = ""


class Table(NamedTuple):
    """A partition table: ``kind`` is ``gpt`` or ``dos``; ``sector_size`` is the unit that the table counts in."""

    kind: str
    sector_size: int
    partitions: tuple[Partition, ...]


class Signature(NamedTuple):
    """What a region holds by its signature, in libblkid's names (``ext4``, ``xfs``, ``crypto_LUKS``, ...)."""

    type: str
    label: str
    uuid: str


def signature(fd: int, offset: int, size: int, name: str) -> Signature | None:
    """The file system, or other content, in ``size`` bytes at ``offset``; None when nothing is recognised.

    ``name`` is what messages call it. Raises ImageFormatError when there are signatures of more than one kind, as
    after formatting a used disk carelessly.
    """
    lib, ffi = _library()
    probe = _probe(lib, ffi, fd, offset, size)
    try:
        lib.blkid_probe_enable_superblocks(probe, 1)
        lib.blkid_probe_set_superblocks_flags(probe, SUBLKS_LABEL | SUBLKS_UUID | SUBLKS_TYPE)
        result = lib.blkid_do_safeprobe(probe)
        if result == AMBIVALENT:
            kinds = _all_types(lib, ffi, fd, offset, size)
            raise ImageFormatError(
                f"{name} has the signatures of several formats: {', '.join(kinds)}",
                "remove the ones that are left over: 'wipefs FILE' lists them",
            )
        kind = _value(lib, ffi, probe, b"TYPE")
        if result != 0 or not kind:
            return None
        return Signature(kind, _value(lib, ffi, probe, b"LABEL"), _value(lib, ffi, probe, b"UUID"))
    finally:
        lib.blkid_free_probe(probe)


def partition_table(fd: int, size: int, sector_size: int) -> Table | None:
    """The GPT or MBR partition table of a disk of ``size`` bytes; None when there is none for this sector size."""
    lib, ffi = _library()
    probe = _probe(lib, ffi, fd, 0, size)
    try:
        if lib.blkid_probe_set_sectorsize(probe, sector_size) != 0:
            return None
        lib.blkid_probe_enable_superblocks(probe, 0)
        lib.blkid_probe_enable_partitions(probe, 1)
        lib.blkid_probe_set_partitions_flags(probe, PARTS_ENTRY_DETAILS)
        listing = lib.blkid_probe_get_partitions(probe)
        if not listing:
            return None
        table = lib.blkid_partlist_get_table(listing)
        kind = _text(ffi, lib.blkid_parttable_get_type(table)) if table else ""
        if kind not in ("gpt", "dos"):
            return None
        count = min(lib.blkid_partlist_numof_partitions(listing), MAX_PARTITIONS)
        entries = (lib.blkid_partlist_get_partition(listing, i) for i in range(count))
        found = tuple(_partition(lib, ffi, e) for e in entries if not lib.blkid_partition_is_extended(e))
        return Table(kind, sector_size, found)
    finally:
        lib.blkid_free_probe(probe)


def _partition(lib: Any, ffi: Any, entry: Any) -> Partition:
    kind = _text(ffi, lib.blkid_partition_get_type_string(entry))
    return Partition(
        number=lib.blkid_partition_get_partno(entry),
        offset=lib.blkid_partition_get_start(entry) * 512,
        size=lib.blkid_partition_get_size(entry) * 512,
        type=kind.lower() or f"{lib.blkid_partition_get_type(entry):#04x}",
        label=_text(ffi, lib.blkid_partition_get_name(entry)),
        uuid=_text(ffi, lib.blkid_partition_get_uuid(entry)).lower(),
        flags=lib.blkid_partition_get_flags(entry),
    )


def _all_types(lib: Any, ffi: Any, fd: int, offset: int, size: int) -> list[str]:
    probe = _probe(lib, ffi, fd, offset, size)
    kinds: list[str] = []
    try:
        lib.blkid_probe_enable_superblocks(probe, 1)
        lib.blkid_probe_set_superblocks_flags(probe, SUBLKS_TYPE)
        while len(kinds) < 16 and lib.blkid_do_probe(probe) == 0:
            kinds.append(_value(lib, ffi, probe, b"TYPE"))
    finally:
        lib.blkid_free_probe(probe)
    return sorted(set(kinds))


def _probe(lib: Any, ffi: Any, fd: int, offset: int, size: int) -> Any:
    probe = lib.blkid_new_probe()
    if not probe:
        raise MemoryError
    if lib.blkid_probe_set_device(probe, fd, offset, size) != 0:
        lib.blkid_free_probe(probe)
        raise OSError(ffi.errno, "libblkid cannot read it")
    return probe


def _value(lib: Any, ffi: Any, probe: Any, name: bytes) -> str:
    data = ffi.new("const char **")
    if lib.blkid_probe_lookup_value(probe, name, data, ffi.NULL) != 0:
        return ""
    return _text(ffi, data[0])


def _text(ffi: Any, pointer: Any) -> str:
    """A string of the image, made safe to print: it may hold anything."""
    if not pointer:
        return ""
    text: str = ffi.string(pointer, 256).decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text).strip()


def _library() -> tuple[Any, Any]:
    global _loaded
    if _loaded is None:
        from imgrun.native._libraries import ffi

        try:
            _loaded = ffi.dlopen("libblkid.so.1"), ffi
        except OSError as e:
            raise HostError(
                "this host has no libblkid.so.1, which is needed to recognise images",
                "install libblkid1 (Debian, Ubuntu) or libblkid (Fedora, RHEL)",
            ) from e
    return _loaded
