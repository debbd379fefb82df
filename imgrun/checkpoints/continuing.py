"""Continuing a checkpoint: its files go back into the scratch, its memory file systems into their mounts, its input to where
it stood, and its processes into the namespaces of a new job. The checkpoint itself is only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from imgrun import criu, init_shim
from imgrun.apart import Beside
from imgrun.checkpoints import criu_rpc, lazily
from imgrun.checkpoints.captured import copy_tree, copying, directory_mount, toolbox_mount
from imgrun.checkpoints.criu_process import FETCH_LOG
from imgrun.checkpoints.manifest import IMAGE, OLDER, SHIM, Checkpoint, changed_memory
from imgrun.checkpoints.preflight import cannot_continue
from imgrun.errors import CheckpointError, RestoreError
from imgrun.helper import Helper
from imgrun.isolation import namespaces
from imgrun.storage.scratch import FILE, Scratch
from imgrun.storage.trees import remove_tree

TAIL = 64 << 10


def put_files_back(checkpoint: Checkpoint, scratch: Scratch) -> None:
    """Fill the scratch of the new job with the files of the checkpoint, which keeps its own unless it is unpacked for this."""
    scratch.adopt()
    source = f"{checkpoint.path}/files"
    copied = []
    for name in checkpoint.manifest["layers"]:
        if name != FILE:
            remove_tree(f"{scratch.path}/{name}")
        if checkpoint.archive is None or not _moved(f"{source}/{name}", f"{scratch.path}/{name}"):
            copied.append(name)
    if copied:
        with _as_restore_error(), copying(source, copied, scratch.path):
            pass


def _moved(source: str, target: str) -> bool:
    return os.path.isdir(source) and _renamed(source, target)  # a file's name is taken already


def _renamed(source: str, target: str) -> bool:
    try:
        os.rename(source, target)
        return True
    except OSError:
        return False  # it is on another disk


@contextlib.contextmanager
def _as_restore_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as e:
        raise RestoreError(e.message, e.hint) from e


def put_image(checkpoint: Checkpoint) -> Callable[[], None]:
    """Put the captured image where it is to be used, if it is to be. Raises RestoreError when something is there.

    Returns what takes it away again.
    """
    target = checkpoint.image_target
    if target is None:
        return lambda: None
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError as e:
        raise RestoreError(f"the captured image cannot be put at {target}: {e.strerror}", "give another --image PATH") from e
    try:
        with _as_restore_error():
            source = f"{checkpoint.path}/{IMAGE}"
            if checkpoint.archive is None or not _renamed(source, target):
                copy_tree(source, target)
    except BaseException:
        os.unlink(target)
        raise
    return lambda: os.unlink(target)


def shim_for(checkpoint: Checkpoint, directory: str) -> str:
    """The program that the checkpoint's first processes are of; where ours is another, theirs, copied to ``directory``."""
    try:
        with open(f"{checkpoint.path}/{SHIM}", "rb") as f:
            theirs = f.read()
        with open(init_shim.program(), "rb") as f:
            ours = f.read()
    except FileNotFoundError:
        return init_shim.program()
    if theirs == ours:
        return init_shim.program()
    path = f"{directory}/{init_shim.NAME}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
    with open(fd, "wb") as f:
        os.fchmod(fd, 0o755)
        f.write(theirs)
    return path


def restore(
    checkpoint: Checkpoint, init: int, join: tuple[int, ...], clone_into: int, streams: tuple[int, ...], work: str
) -> tuple[Helper | None, str | None]:
    """Bring the processes back into the namespaces of ``init``, with these standard streams.

    CRIU's log goes to the directory ``work``. What is in the files with memory is verified meanwhile, before any of the
    processes runs. Returns what still fetches their memory, of a lazy restore, and a warning.
    Raises RestoreError.
    """
    manifest = checkpoint.manifest
    criu.toolbox()
    descriptors = namespaces.open_all(init)
    pidfd = os.pidfd_open(init)
    opened = [pidfd, *descriptors.values()]
    possible = lazily.possible() if checkpoint.lazy else None
    verifies = possible is not None and possible.verifies
    verifying = None if verifies else Beside(lambda: changed_memory(checkpoint))

    def require_unchanged() -> None:
        if verifying is not None and (wrong := verifying.result()):
            raise RestoreError(cannot_continue(checkpoint, wrong[0]), OLDER)

    try:
        userns = descriptors.get("user")
        opened.append(toolbox := toolbox_mount())
        opened.append(images := directory_mount(f"{checkpoint.path}/processes", userns, read_only=True))
        opened.append(logs := directory_mount(work, userns))
        inherit = {
            manifest["streams"][str(number)]: fd
            for number, fd in enumerate(streams)
            if manifest["streams"][str(number)].startswith("pipe:")
        }
        last_pid = int(manifest["last_pid"])
        environment = lazily.write_digests(checkpoint, work) if verifies else {}
        site = criu.Site(
            descriptors, toolbox, images, logs, bool(manifest["userns"]), join, clone_into, last_pid, inherit, environment,
            init=pidfd,
        )  # fmt: skip
        places = [str(place) for place in manifest["memory"]]
        try:
            pid = criu_rpc.restore(
                site, before=lambda: _restore_memory(places), log=f"{work}/{criu.LOG}", lazily=possible,
                restored=require_unchanged,
            )  # fmt: skip
        except RestoreError as e:
            if (name := lazily.changed(f"{work}/{criu.LOG}") or lazily.changed(f"{work}/{FETCH_LOG}")) is not None:
                raise RestoreError(cannot_continue(checkpoint, f"{name} was changed"), OLDER) from e
            raise
        if pid is not None:
            return Helper(pid, "CRIU, which fetches the job's memory", f"{work}/{FETCH_LOG}"), None
        return None, lazily.NEEDS if checkpoint.lazy else None
    finally:
        if verifying is not None:
            verifying.cancel()
        if possible is not None:
            possible.close()
        for fd in opened:
            os.close(fd)


def changed_under_way(checkpoint: Checkpoint, log: str) -> tuple[str, str] | None:
    """What to say, and to do, where memory that the job came to need was changed, by the log of what fetches it."""
    name = lazily.changed(log)
    if name is None:
        return None
    return cannot_continue(checkpoint, f"{name} was changed; the job ran until it needed what was there"), OLDER


def _restore_memory(places: list[str]) -> Callable[[], None]:
    from imgrun.checkpoints import memory_files  # in that process: we have CRIU's protocol to import meanwhile

    return lambda: memory_files.restore(places)


# -- input ------------------------------------------------------------------------------------------------------------


def saved_input(checkpoint: Checkpoint) -> bytes:
    """What the job had been given to read and had not read."""
    try:
        with open(f"{checkpoint.path}/stdin", "rb") as f:
            return f.read()
    except FileNotFoundError:
        return b""


def reads_pipe(checkpoint: Checkpoint) -> bool:
    """Whether the job was given an input at all, and so has to be given one again."""
    return str(checkpoint.manifest["streams"]["0"]).startswith("pipe:")


def position(fd: int | None) -> dict[str, Any] | None:
    """Where the job's input stands: at its end (a negative descriptor), or in a file that is told from others."""
    if fd is None:
        return None
    if fd < 0:
        return {"ended": True}
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    offset = os.lseek(fd, 0, os.SEEK_CUR)
    return {"offset": offset, "before": _before(fd, offset)}


def has_more_input(checkpoint: Checkpoint, fd: int) -> bool:
    """Whether the job goes on to read from ``fd``: not when its input had ended.

    Where the same file is given again, from its start, it is set to where the job stood.
    """
    was = checkpoint.manifest.get("input") or {}
    if was.get("ended"):
        return False
    here = position(fd)
    from_start = "offset" in was and here is not None and here["offset"] == 0
    if from_start and os.fstat(fd).st_size >= was["offset"] and _before(fd, was["offset"]) == was["before"]:
        os.lseek(fd, was["offset"], os.SEEK_SET)
    return True


def _before(fd: int, offset: int) -> str:
    start = max(offset - TAIL, 0)
    return hashlib.sha256(os.pread(fd, offset - start, start)).hexdigest()
