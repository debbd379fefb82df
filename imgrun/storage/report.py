"""The record that ``imgrun image inspect`` shows: what an image is, and whether it can run on this host."""

from __future__ import annotations

import os
from typing import Any

from imgrun import image
from imgrun.errors import ImageDamaged, ImageMissing, ImgrunError, PrivilegeError
from imgrun.isolation.rootless import is_host_root
from imgrun.storage import disk, superblock
from imgrun.storage.guest import OsInfo, check_architecture, identify
from imgrun.storage.mount import kernel_has, lacking
from imgrun.storage.partitions import ROOT_TYPES


def report(path: str, partition: str | None = None) -> dict[str, Any]:
    """See :func:`imgrun.image.inspect`. Every key is always there; None is "not known"."""
    record: dict[str, Any] = dict.fromkeys(
        (
            "path", "kind", "format", "size", "allocated", "table", "partition", "partitions", "offset",
            "filesystem_size", "block_size", "sector_size", "uuid", "label", "clean", "os", "architectures",
            "runnable", "reason", "hint",
        )
    )  # fmt: skip
    record["path"] = path
    try:
        info = image.probe(path, partition)
        _tell(record, info)
        _tell_file(record, path)
        _look_inside(record, info, partition)
    except ImageMissing:
        raise
    except ImgrunError as e:
        _tell_file(record, path)
        record["runnable"] = None if isinstance(e, PrivilegeError) else False
        record["reason"], record["hint"] = e.message, e.hint
    return record


def _tell(record: dict[str, Any], info: image.ImageInfo) -> None:
    record.update(
        kind=info.kind,
        format=info.fstype or (info.kind if info.kind == "directory" else None),
        partition=info.partition,
        uuid=info.uuid or None,
        label=info.label or None,
    )
    if info.fstype:
        record.update(offset=info.offset, filesystem_size=info.size, block_size=info.block_size, sector_size=info.sector_size)
        # An xfs journal is only seen by mounting it.
        record["clean"] = False if info.unclean else None if info.fstype == "xfs" else True


def _tell_file(record: dict[str, Any], path: str) -> None:
    """The file's sizes and its partitions, also when the image is refused for what they hold."""
    status = os.stat(path)
    if record["kind"] == "directory" or not status.st_size:
        return
    record.update(size=status.st_size, allocated=status.st_blocks * 512)
    if record["kind"] == "filesystem":
        return
    table = disk.read(path)
    if table is None:
        return
    record.update(kind="disk", table=table.kind)
    record["partitions"] = [
        {
            "number": p.number,
            "offset": p.offset,
            "size": p.size,
            "type": p.type,
            "root_for": ROOT_TYPES.get(p.type),
            "label": p.label or None,
            "uuid": p.uuid or None,
            "format": p.fstype or None,
            "fs_label": p.fs_label or None,
            "fs_uuid": p.fs_uuid or None,
        }
        for p in table.partitions
    ]


def _need_driver(info: image.ImageInfo) -> None:
    driver = superblock.DRIVERS.get(info.fstype or "")
    if driver and kernel_has(driver) is False:
        raise lacking(driver, info.name)


def _look_inside(record: dict[str, Any], info: image.ImageInfo, partition: str | None) -> None:
    try:
        if is_host_root():
            _need_driver(info)
            root, found = _look(info.path, partition, None)
        else:
            from tempfile import TemporaryDirectory

            from imgrun.apart import apart

            with TemporaryDirectory(prefix="imgrun-") as place:
                root, seen = apart(lambda: _in_json(*_look(info.path, partition, place)))
            seen |= {"architectures": tuple(seen["architectures"]), "header": bytes.fromhex(seen["header"])}
            found = OsInfo(**seen)
    except ImageDamaged:
        record["clean"] = False
        raise
    record.update(root)
    record["clean"] = True if record["kind"] != "directory" else None
    record["os"] = {"name": found.name or None, "id": found.id or None, "version": found.version or None}
    record["architectures"] = list(found.architectures) or None
    check_architecture(found)
    record["runnable"] = True


def _look(path: str, partition: str | None, serve_in: str | None) -> tuple[dict[str, Any], OsInfo]:
    """What the root file system is, and what is in it. ``serve_in`` as of open_image."""
    record: dict[str, Any] = {}
    with image.open_image(path, "read-only", partition, wait=0, serve_in=serve_in) as held:
        _tell(record, held.info)
        root = held.mount()
        try:
            return record, identify(root)
        finally:
            os.close(root)


def _in_json(record: dict[str, Any], found: OsInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    return record, found._asdict() | {"header": found.header.hex()}
