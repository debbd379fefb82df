"""Giving a complete checkpoint its name, also in the stead of a maker that was killed.

Whoever looks at the name finds the older checkpoint or the new one, whole, at any moment. The manifest of one that ends its
job gets its name when the job has ended, so that from then on it is the only copy, and is never removed.
"""

from __future__ import annotations

import contextlib
import errno
import os

from imgrun import criu
from imgrun import syscalls as sc
from imgrun.checkpoints import captured
from imgrun.checkpoints.manifest import DIRECTORY, load
from imgrun.errors import CheckpointError, ImgrunError, RestoreError
from imgrun.storage.scratch import FILE
from imgrun.storage.trees import remove_tree

LOG = "dump.log"


def put_in_place(building: str, target: str, scratch: str) -> None:
    """Move what is still in ``scratch`` into the checkpoint made in ``building``, and give it the name ``target``.

    What had the name goes. Raises CheckpointError or NoSpace; all is in ``building`` then, and it can be tried again.
    """
    try:
        for name in (*captured.LAYERS, FILE):
            _take(f"{scratch}/{name}", f"{building}/files/{name}")
        with contextlib.suppress(OSError):
            os.rename(f"{building}/work/{criu.LOG}", f"{building}/{LOG}")
        with contextlib.suppress(ImgrunError):
            remove_tree(f"{building}/work")
        _sync(building)
        _name(building, target)
    except OSError as e:
        why = f"{target} could not be put in its place: {e.strerror}; the whole checkpoint is {building}"
        raise CheckpointError(why, f"restore from there, or rename it to {target}") from e
    with contextlib.suppress(OSError):  # it has its name; that this is on the disk is all that is missing
        _sync(os.path.dirname(target))
    for older in (building, f"{building}.old"):
        with contextlib.suppress(ImgrunError):
            remove_tree(older)


def adopt(building: str, target: str, scratch: str) -> bool:
    """Put a checkpoint in its place whose maker failed or was killed; whether it was complete. Raises as the other."""
    try:
        made = load(building).manifest["created_at"]
    except RestoreError:
        return False
    if os.stat(building).st_uid != os.geteuid():
        return False
    try:
        if load(target).manifest["created_at"] >= made:
            return False  # it was in its place, and this is what it has replaced
    except RestoreError:
        pass
    put_in_place(building, target, scratch)
    return True


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


def _sync(directory: str) -> None:
    fd = os.open(directory, DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
