"""Giving a complete checkpoint its name, also in the stead of a maker that was killed.

Whoever looks at the name finds the older checkpoint or the new one, whole, at any moment. The manifest of one that ends its
job gets its own name when the job has ended, so that from then on it is the only copy, and is never removed.
"""

from __future__ import annotations

import contextlib
import errno
import os

from imgrun import criu
from imgrun import syscalls as sc
from imgrun.checkpoints import captured
from imgrun.checkpoints.manifest import DIRECTORY, MANIFEST, load
from imgrun.checkpoints.refusals import refuse_unsuitable
from imgrun.errors import CheckpointError, ImgrunError, RestoreError
from imgrun.storage.scratch import FILE
from imgrun.storage.trees import remove_tree

LOG = "dump.log"


def publish(building: str) -> None:
    """Give the manifest its name: what has one is a checkpoint."""
    os.rename(f"{building}/{MANIFEST}.new", f"{building}/{MANIFEST}")


def put_in_place(building: str, target: str, scratch: str) -> None:
    """Move what is still in ``scratch`` into the checkpoint made in ``building``, and give it the name ``target``.

    An older checkpoint of that name goes. Raises CheckpointError or NoSpace; it can be tried again.
    """
    try:
        for name in (*captured.LAYERS, FILE):
            _take(f"{scratch}/{name}", f"{building}/files/{name}")
        with contextlib.suppress(OSError):
            os.rename(f"{building}/work/{criu.LOG}", f"{building}/{LOG}")
        with contextlib.suppress(ImgrunError):
            remove_tree(f"{building}/work")
        _sync(building)
        refuse_unsuitable(target)
        _name(building, target)
    except (OSError, CheckpointError) as e:
        cause = e.message if isinstance(e, CheckpointError) else f"{target} could not be made: {e.strerror}"
        hint = f"restore from there, or rename it to {target}"
        raise CheckpointError(f"{cause}; the checkpoint is complete, and is {building}", hint) from e
    with contextlib.suppress(OSError):  # it has its name; that this is on the disk is all that is missing
        _sync(os.path.dirname(target))
    _remove_older(building)


def adopt(building: str, target: str, scratch: str, identifier: str) -> bool:
    """Whether the checkpoint with this ``identifier`` in its manifest is complete; then it is put in its place, if it is not.

    For when its maker failed or was killed. Raises as :func:`put_in_place`.
    """
    if _identifier(target) == identifier:
        _remove_older(building)
        return True
    if _identifier(building) != identifier:
        return False
    put_in_place(building, target, scratch)
    return True


def _identifier(path: str) -> str | None:
    try:
        if os.lstat(path).st_uid != os.geteuid():
            return None
        identifier: str | None = load(path).manifest.get("id")
    except (OSError, RestoreError):
        return None
    return identifier


def _take(source: str, target: str) -> None:
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    try:
        os.rename(source, target)
    except OSError:
        part = f"{target}.part"
        remove_tree(part)
        captured.copy_tree(source, part)
        os.rename(part, target)


def _name(building: str, target: str) -> None:
    try:
        os.rename(building, target)  # also where an empty directory has the name
        return
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    try:
        sc.exchange(building, target)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # As on NFS: for a moment nothing has the name.
        remove_tree(f"{building}.old")
        os.rename(target, f"{building}.old")
        os.rename(building, target)


def _remove_older(building: str) -> None:
    """The new one has its name, and that is what was asked for."""
    for older in (building, f"{building}.old"):
        with contextlib.suppress(ImgrunError):
            remove_tree(older)


def _sync(directory: str) -> None:
    fd = os.open(directory, DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
