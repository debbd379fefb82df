"""A complete checkpoint as it is read again: its manifest, who owns it, and whether every byte is still as it was written.

    DIR/manifest.json   what it is a checkpoint of, and what it needs; written last
    DIR/processes/      CRIU's images, and a tar of each memory file system the job could write to
    DIR/files/          the job's writable files: upper, tmp, var-tmp; or scratch.img of a sized scratch
    DIR/stdin           input that the job had been given and not yet read

It is a hostile thing until it is checked: nothing in it is opened through a symbolic link or as anything but a file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from imgrun.errors import RestoreError
from imgrun.spec import JobSpec

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 16 << 20
PIECE = 8 << 20
"""Files are hashed in pieces of this size, so that one large file occupies all processors."""
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
PARTS = ("processes", "files")
OLDER = "restore an older checkpoint, or start the job anew"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    path: str
    manifest: dict[str, Any]
    spec: JobSpec
    """What is to run: as it was saved, with what the caller has changed."""
    shared: bool = False
    """Whether it may be continued although another job was continued from it and still runs."""

    def hold(self) -> int:
        """Keep others from continuing it, for as long as the descriptor is open. Raises RestoreError."""
        fd = os.open(self.path, DIRECTORY)
        if self.shared:
            return fd
        try:
            # On the directory itself: nothing in it is touched.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                os.close(fd)
                raise RestoreError(
                    f"a job that was continued from the checkpoint {self.path} is running",
                    "end that one first; or --allow second-copy, when two of it do no harm",
                ) from e
        return fd


def exists(path: str) -> bool:
    """Whether ``path`` holds a complete checkpoint."""
    return os.path.isfile(f"{path}/{MANIFEST}")


def load(path: str) -> Checkpoint:
    """Read a checkpoint's manifest, and see that it is of a known format and unchanged. Raises RestoreError."""
    path = os.path.abspath(path)
    try:
        directory = os.open(path, DIRECTORY)
    except OSError as e:
        raise RestoreError(f"there is no checkpoint at {path}: {e.strerror}", "give the directory it was made in") from None
    try:
        text = _read(directory, MANIFEST)
        manifest = json.loads(text)
    except FileNotFoundError:
        hint = "give the directory that 'imgrun checkpoint' made"
        raise RestoreError(f"{path} holds no complete checkpoint", hint) from None
    except (OSError, ValueError, RecursionError) as e:
        raise RestoreError(f"the manifest of the checkpoint {path} cannot be read: {e}", OLDER) from e
    finally:
        os.close(directory)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        hint = "continue it with a newer imgrun" if newer else "continue it with the imgrun that made it"
        raise RestoreError(f"the checkpoint {path} has format {found!r}; this imgrun reads {FORMAT}", hint)
    if manifest.get("checksum") != checksum(manifest):
        raise RestoreError(f"the manifest of the checkpoint {path} was changed after it was written", OLDER)
    try:
        spec = JobSpec.from_dict(manifest["spec"])
    except (KeyError, TypeError) as e:
        raise RestoreError(f"the manifest of the checkpoint {path} lacks what it should have: {e}", OLDER) from e
    return Checkpoint(path, manifest, spec)


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, FILE, dir_fd=directory)
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_MANIFEST:
            raise ValueError(f"{name} is not a file of a reasonable size")
        return f.read()


def checksum(manifest: dict[str, Any]) -> str:
    """Of everything in the manifest but itself."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def foreign_owner(checkpoint: Checkpoint, uid: int) -> str | None:
    """Who else could have put programs into it that would run as ``uid``; None for nobody."""
    for name in (".", *PARTS, MANIFEST):
        status = os.stat(f"{checkpoint.path}/{name}", follow_symlinks=False)
        if status.st_uid not in (0, uid):
            return f"{name} belongs to uid {status.st_uid}"
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o022:
            return f"{name} can be written to by others"
    return None


# -- hashes -----------------------------------------------------------------------------------------------------------


def list_files(directory: int) -> list[str]:
    """The files of a checkpoint that are hashed, by relative paths: all but what the job itself wrote to disk."""
    names = ["stdin"] if os.access("stdin", os.F_OK, dir_fd=directory) else []
    processes = os.open("processes", DIRECTORY, dir_fd=directory)
    try:
        return [*names, *(f"processes/{name}" for name in sorted(os.listdir(processes)))]
    finally:
        os.close(processes)


def describe_files(path: str) -> dict[str, Any]:
    """Size and SHA-256 of each hashed file; of a file, that of the SHA-256s of its pieces."""
    directory = os.open(path, DIRECTORY)
    try:
        return _digests(directory, list_files(directory))
    finally:
        os.close(directory)


def changed_files(checkpoint: Checkpoint) -> list[str]:
    """A line for each file that is missing, too much, or not what was written."""
    try:
        directory = os.open(checkpoint.path, DIRECTORY)
    except OSError as e:
        return [f"{checkpoint.path}: {e.strerror}"]
    expected: dict[str, Any] = checkpoint.manifest.get("files", {})
    wrong = []
    try:
        for name in (*PARTS, *(f"files/{layer}" for layer in checkpoint.manifest.get("layers", ()))):
            kind = stat.S_IFREG if name.endswith(".img") else stat.S_IFDIR
            if _kind(directory, name) != kind:
                wrong.append(f"{name} is missing, or is no {'file' if kind == stat.S_IFREG else 'directory'}")
        if wrong:
            return wrong
        there = list_files(directory)
        wrong += [f"{name} is missing" for name in expected if name not in there]
        wrong += [f"{name} does not belong there" for name in there if name not in expected]
        same = []
        for name in set(there) & set(expected):
            size = os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
            if size != expected[name]["size"]:
                wrong.append(f"{name} has {size} bytes, not {expected[name]['size']}")
            else:
                same.append(name)
        found = _digests(directory, same)
        wrong += [f"{name} was changed" for name in same if found[name] != expected[name]]
    except (OSError, ValueError) as e:
        wrong.append(str(e))
    finally:
        os.close(directory)
    return sorted(wrong)


def _kind(directory: int, name: str) -> int:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return 0


def _digests(directory: int, names: Iterable[str]) -> dict[str, Any]:
    opened: dict[str, int] = {}
    pieces: list[tuple[str, int]] = []
    parts: dict[tuple[str, int], bytes] = {}
    try:
        for name in names:
            opened[name] = os.open(name, FILE, dir_fd=directory)
            status = os.fstat(opened[name])
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{name} is not a file")
            pieces += [(name, start) for start in range(0, max(status.st_size, 1), PIECE)]
        failures: list[OSError] = []
        todo = iter(pieces)
        threads = [
            threading.Thread(target=_hash_pieces, args=(opened, todo, parts, failures))
            for _ in range(min(len(pieces) // 4, len(os.sched_getaffinity(0)) - 1))
        ]
        for thread in threads:
            thread.start()
        _hash_pieces(opened, todo, parts, failures)
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return {name: {"size": os.fstat(fd).st_size, "sha256": _whole(name, parts)} for name, fd in opened.items()}
    finally:
        for fd in opened.values():
            os.close(fd)


def _whole(name: str, parts: dict[tuple[str, int], bytes]) -> str:
    whole = hashlib.sha256()
    start = 0
    while (name, start) in parts:
        whole.update(parts[name, start])
        start += PIECE
    return whole.hexdigest()


def _hash_pieces(
    opened: dict[str, int],
    todo: Iterator[tuple[str, int]],
    parts: dict[tuple[str, int], bytes],
    failures: list[OSError],
) -> None:
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    try:
        for name, start in todo:
            digest = hashlib.sha256()
            for place in range(start, start + PIECE, len(buffer)):
                size = os.preadv(opened[name], [buffer], place)
                digest.update(view[:size])
                if size < len(buffer):
                    break
            parts[name, start] = digest.digest()
    except OSError as e:
        failures.append(e)
