"""Making a disk image: a partition table around one file system."""

from __future__ import annotations

import errno
import os
import uuid

from imgrun.building.recipe import ImageOptions
from imgrun.building.tools import ToolFailed, Tools, no_space, no_space_in
from imgrun.errors import HostError
from imgrun.storage.partitions import ROOT_TYPES

_SECTOR = 512
_START = 1 << 20
_GENERIC = "0fc63daf-8483-4772-8e79-3d69d8477de4"
"""The type GUID of Linux file system data, for a processor without a root type of its own."""


def wrap(tools: Tools, filesystem: str, target: str, options: ImageOptions, machine: str) -> None:
    """Write a disk with the file ``filesystem`` as its only partition into the empty file ``target``.

    ``machine`` is what the content runs on, as uname -m says it. Raises NoSpace, HostError.
    """
    size = -(-os.stat(filesystem).st_size // _SECTOR) * _SECTOR
    end = -(-(_START + size) // _START) * _START + _START
    try:
        os.truncate(target, end)
        copy_sparse(filesystem, target, _START)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space_in(os.path.dirname(target)) from None
        raise HostError(f"{target} cannot be written: {error.strerror}") from None
    script = _script(size, options, machine)
    try:
        tools.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", target], stdin=script)
    except ToolFailed as error:
        raise no_space(error, os.path.dirname(target)) or HostError(
            f"the partition table could not be written: {error.summary()}", "--debug shows all it said"
        ) from None


def copy_sparse(source: str, target: str, offset: int) -> None:
    """Copy what is allocated of the file ``source`` into ``target``, moved up by ``offset`` bytes. Raises OSError."""
    with open(source, "rb", buffering=0) as given, open(target, "r+b", buffering=0) as written:
        end = 0
        while True:
            try:
                start = os.lseek(given.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(given.fileno(), start, os.SEEK_HOLE)
            while start < end:
                copied = os.copy_file_range(given.fileno(), written.fileno(), end - start, start, offset + start)
                if not copied:
                    raise OSError(errno.EIO, "it became shorter while it was copied")
                start += copied


def _script(size: int, options: ImageOptions, machine: str) -> bytes:
    """What sfdisk(8) is to do. With a fixed UUID of the file system the others follow from it."""
    where = f"start={_START // _SECTOR}, size={size // _SECTOR}"
    base = uuid.UUID(options.uuid) if options.uuid else uuid.uuid4()
    disk_id, partition_id = uuid.uuid5(base, "disk"), uuid.uuid5(base, "partition")
    if options.table == "mbr":
        return f"label: dos\nlabel-id: 0x{disk_id.hex[:8]}\n{where}, type=83, bootable\n".encode()
    kind = next((guid for guid, name in ROOT_TYPES.items() if name == machine), _GENERIC)
    name = options.label or "root"
    return f'label: gpt\nlabel-id: {disk_id}\n{where}, type={kind}, uuid={partition_id}, name="{name}"\n'.encode()
