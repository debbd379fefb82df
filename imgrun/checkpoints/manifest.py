"""A complete checkpoint as it is read again: its manifest, who owns it, and whether every byte is still as it was written.

    DIR/manifest.json   what it is a checkpoint of, and what it needs; written last
    DIR/processes/      CRIU's images, and a tar of each memory file system the job could write to; pre-N/ of earlier rounds
    DIR/files/          the job's writable files: upper, tmp, var-tmp; or scratch.img of a sized scratch
    DIR/files.list      all of these, with sizes and hashes (imgrun.checkpoints.digests)
    DIR/shim            the program of the job's first two processes
    DIR/stdin           input that the job had been given and not yet read
    DIR/image.img       a --writable image, where it was to be captured

It is a hostile thing until it is checked: nothing in it is opened through a symbolic link or as anything but a file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from typing import Any, NamedTuple

from imgrun.checkpoints.captured import LAYERS, memory_places
from imgrun.checkpoints.digests import Digest, Parts, difference, digests, lines
from imgrun.errors import ImgrunError, RestoreError
from imgrun.spec import JobSpec
from imgrun.storage import scratch

FORMAT = 2
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 << 20
"""Bytes, of which a job with a terabyte of memory takes 20 million for hashes."""
SHAPE = {
    "spec": dict, "image": dict, "files": dict, "statistics": dict, "layers": list, "memory": list, "last_pid": int,
    "userns": bool, "rootless": bool, "hostname": str, "job": str, "created_at": str, "usage.wall_seconds": int | float,
    "ids.uid": list, "host.machine": str, "host.kernel": str, "host.cpu.features": list,
    "streams.0": str, "streams.1": str, "streams.2": str,
}  # fmt: skip
"""What has to be in a manifest, in which of its parts, and of which kind."""
LIST = "files.list"
SHIM = "shim"
IMAGE = "image.img"
IMAGE_RECORD = "image.json"
"""Of an archive only."""
SINGLE = ("stdin", SHIM, LIST, IMAGE)
LATER = (LIST, IMAGE)
"""What a checkpoint may get when it is complete. Without a word in the manifest it was not finished, and is nothing."""
WHOLE = ("stdin", SHIM)
"""What is read as a whole."""
LARGEST = 16 << 40
"""Bytes of any file that is hashed, as ext4 can have."""
COMPARING = 4 << 30
"""Bytes to compare what the job wrote with its list, most of which threads take and do not use."""
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
PARTS = ("processes", "files")
NAMES = {MANIFEST, f"{MANIFEST}.new", "dump.log", "work", *PARTS, *SINGLE}
"""All that may be at the top of a checkpoint, also of one that was not finished."""
OLDER = "restore an older checkpoint, or start the job anew"
MAKER = "restore as the user who made the checkpoint"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    path: str
    manifest: dict[str, Any]
    spec: JobSpec
    """What is to run: as it was saved, with what the caller has changed."""
    shared: bool = False
    """Whether it may be continued although another job was continued from it and still runs."""
    archive: str | None = None
    """Where it was unpacked from, for this once: nobody else needs the directory."""
    image_target: str | None = None
    """Where its captured image is to be put."""
    lazy: bool = False
    """Whether its processes run at once, and their memory follows."""

    def hold(self) -> int:
        """Keep others from continuing it, for as long as the descriptor is open. Raises RestoreError."""
        fd = os.open(self.archive or self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if self.shared:
            return fd
        try:
            # On the directory, or the archive, itself: nothing in it is touched.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                os.close(fd)
                raise RestoreError(
                    f"a job that was continued from the checkpoint {self.archive or self.path} is running",
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
    except PermissionError:
        raise RestoreError(f"{path} may not be opened", MAKER) from None
    except OSError as e:
        raise RestoreError(f"there is no checkpoint at {path}: {e.strerror}", "give the directory it was made in") from None
    try:
        text = _read(directory, MANIFEST)
        manifest = json.loads(text)
    except FileNotFoundError:
        hint = "give the directory that 'imgrun checkpoint' made"
        raise RestoreError(f"{path} holds no complete checkpoint", hint) from None
    except PermissionError:
        raise RestoreError(f"the manifest of the checkpoint {path} may not be read", MAKER) from None
    except OSError as e:
        raise RestoreError(f"the manifest of the checkpoint {path} cannot be read: {e.strerror}", OLDER) from e
    except (ValueError, RecursionError) as e:
        raise RestoreError(f"the manifest of the checkpoint {path} cannot be read: it is no JSON text", OLDER) from e
    finally:
        os.close(directory)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        hint = "continue it with a newer imgrun" if newer else "continue it with the imgrun that made it"
        what = "no format" if found is None else f"format {found!r}"
        raise RestoreError(f"the checkpoint {path} has {what}; this imgrun reads {FORMAT}", hint)
    if manifest.get("checksum") != checksum(manifest):
        raise RestoreError(f"the manifest of the checkpoint {path} was changed after it was written", OLDER)
    if missing := [key for key, kind in SHAPE.items() if not isinstance(_at(manifest, key), kind)]:
        raise RestoreError(f"the manifest of the checkpoint {path} lacks what it should have: {missing[0]}", OLDER)
    try:
        spec = JobSpec.from_dict(manifest["spec"])
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise RestoreError(f"the manifest of the checkpoint {path} has no job that could be run: {e}", OLDER) from e
    # These become paths.
    if manifest["layers"] not in ([*LAYERS], [scratch.FILE]) or manifest["memory"] != memory_places(spec):
        raise RestoreError(f"the checkpoint {path} has files where no job of its kind has any", OLDER)
    return Checkpoint(path, manifest, spec)


def _at(manifest: Any, place: str) -> Any:
    for key in place.split("."):
        manifest = manifest.get(key) if isinstance(manifest, dict) else None
    return manifest


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, FILE, dir_fd=directory)
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_MANIFEST:
            raise RestoreError(f"{name} of a checkpoint is not a file of a reasonable size", OLDER)
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


# -- what is in it ----------------------------------------------------------------------------------------------------

PARENT = re.compile(r"(\.\./)?pre-[0-9]+")
"""Where CRIU may look for the memory of an earlier round."""


MEMORY = re.compile(r"processes/(pre-[0-9]+/)?pages-[0-9]+\.img")
"""Where CRIU has the memory of processes. It adds to these files and changes nothing in them; all its others are small."""


def is_memory(name: str) -> bool:
    """Whether a file of a checkpoint holds memory of processes."""
    return MEMORY.fullmatch(name) is not None


def list_files(directory: int) -> list[str]:
    """What is hashed one by one, by relative paths: all but what the job itself wrote to disk."""
    found = [name for name in SINGLE if _kind(directory, name)]
    for place in _process_directories(directory):
        here = os.open(place, DIRECTORY, dir_fd=directory)
        try:
            names = sorted(os.listdir(here))
        finally:
            os.close(here)
        found += [f"{place}/{name}" for name in names if _kind(directory, f"{place}/{name}") != stat.S_IFDIR]
    return found


def _process_directories(directory: int) -> list[str]:
    processes = os.open("processes", DIRECTORY, dir_fd=directory)
    try:
        inner = [name for name in sorted(os.listdir(processes)) if _kind(processes, name) == stat.S_IFDIR]
    finally:
        os.close(processes)
    return ["processes", *(f"processes/{name}" for name in inner)]


def describe_files(path: str, known: dict[str, Any] | None = None, parts: Parts | None = None) -> dict[str, Any]:
    """Size and hash of each of these files; of those with memory, the hashes of their pieces; of a link, where it leads.

    ``known`` files have not changed, nor have ``parts``.
    """
    directory = os.open(path, DIRECTORY)
    try:
        before = known or {}
        return before | _describe(directory, [name for name in list_files(directory) if name not in before], parts)
    finally:
        os.close(directory)


def _describe(directory: int, names: list[str], parts: Parts | None = None) -> dict[str, Any]:
    links = [name for name in names if _kind(directory, name) == stat.S_IFLNK]
    found: dict[str, Any] = {name: {"link": os.readlink(name, dir_fd=directory)} for name in links}
    for name, link in found.items():
        if not PARENT.fullmatch(link["link"]):
            raise ValueError(f"{name} leads to {link['link']}")
    files = [name for name in names if name not in found]
    return found | {name: _description(name, digest) for name, digest in digests(directory, files, parts).items()}


def _description(name: str, digest: Digest) -> dict[str, Any]:
    if is_memory(name):
        return {"size": digest.size, "pieces": digest.pieces}  # a lazy restore looks at each by itself
    return {"size": digest.size, "xxh128": digest.xxh128}


def said(error: Exception) -> str:
    """What went wrong with which file, in words for people."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return str(error)


def size_of(files: dict[str, Any]) -> int:
    """The bytes of all that is described so."""
    return sum(int(file.get("size", 0)) for file in files.values())


def changed_memory(checkpoint: Checkpoint) -> list[str]:
    """A line for each file with memory that is not what was written. CRIU is left a processor, unless it reads them later."""
    expected: dict[str, Any] = checkpoint.manifest["files"]
    names = [name for name in expected if is_memory(name)]
    directory = os.open(checkpoint.path, DIRECTORY)
    try:
        found = digests(directory, names, leave=0 if checkpoint.lazy else 1)
    except (OSError, ValueError) as e:
        return [said(e)]
    finally:
        os.close(directory)
    return [f"{name} was changed" for name in names if _description(name, found[name]) != expected[name]]


def changed_files(checkpoint: Checkpoint, *, memory: bool = True) -> list[str]:
    """A line for each file that is missing, too much, or not what was written; of the job's own, the first such.

    Without ``memory``, only the sizes of the files with memory are looked at: :func:`changed_memory` does the rest.
    """
    try:
        directory = os.open(checkpoint.path, DIRECTORY)
    except OSError as e:
        return [f"{checkpoint.path}: {e.strerror}"]
    expected: dict[str, Any] = checkpoint.manifest.get("files", {})
    wrong = []
    try:
        for name in (*PARTS, *(f"files/{layer}" for layer in checkpoint.manifest["layers"])):
            kind = stat.S_IFREG if name.endswith(".img") else stat.S_IFDIR
            if _kind(directory, name) != kind:
                wrong.append(f"{name} is missing, or is no {'file' if kind == stat.S_IFREG else 'directory'}")
        if wrong:
            return wrong
        there = list_files(directory)
        wrong += [f"{name} is missing" for name in expected if name not in there]
        wrong += [f"{name} does not belong there" for name in there if name not in expected and name not in LATER]
        same = []
        for name in set(there) & set(expected):
            size = os.stat(name, dir_fd=directory, follow_symlinks=False).st_size
            if size > (LARGEST_MANIFEST if name in WHOLE else LARGEST):
                wrong.append(f"{name} is larger than any that belongs there")
            elif size != expected[name].get("size", size):
                wrong.append(f"{name} has {size} bytes, not {expected[name]['size']}")
            elif memory or not is_memory(name):
                same.append(name)
            elif _kind(directory, name) != stat.S_IFREG:
                wrong.append(f"{name} is no file")
        found = _describe(directory, same)
        wrong += [f"{name} was changed" for name in same if found[name] != expected[name]]
        if not wrong and LIST in expected:
            wrong += _changed_by_list(checkpoint)
    except (OSError, ValueError) as e:
        wrong.append(said(e))
    finally:
        os.close(directory)
    return sorted(wrong)


def _changed_by_list(checkpoint: Checkpoint) -> list[str]:
    """How the files that the job wrote differ from their list. They may belong to any of its ids."""
    from imgrun.apart import apart

    def compare() -> str:
        with open(f"{checkpoint.path}/{LIST}", "rb") as f:
            files = os.open(f"{checkpoint.path}/files", DIRECTORY)
            return difference(f, lines(files, checkpoint.manifest["layers"])) or ""

    try:
        found = apart(compare, memory=COMPARING)
    except ImgrunError as e:
        return [e.message]
    return [f"files/{found}"] if found else []


def _kind(directory: int, name: str) -> int:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return 0
