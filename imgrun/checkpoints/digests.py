"""Hashes of the files of a checkpoint, with all processors, and a list of what a job wrote: every file, its size and hash.

A hash is there to find damage, and is XXH3 of 128 bits, about as fast as memory is read. Against malice no hash would help
that lies beside what it is of; there, who owns the checkpoint decides (imgrun.checkpoints.manifest).

A file's hash is that of the hashes of its pieces of 2 MiB, so that one large file occupies all processors, and a hole of any
size costs nothing. Of the list each line is a JSON array, in a fixed order, so that two lists of one tree are the same text:

    ["upper/etc/motd", mode, uid, gid, size, hash or null]      a file; null where the path is too long to be opened again
    ["upper/etc/mtab", mode, uid, gid, 0, target]               a symbolic link
    ["upper/etc", mode, uid, gid, 0, null]                      all else; of a device, the size is its number
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import xxhash

from imgrun import syscalls as sc
from imgrun.errors import CheckpointError

PIECE = 2 << 20
"""Bytes. A lazy restore reads and hashes so much before it gives a process the first page that it touches."""
BATCH = 512
"""Files that are hashed before their lines are given out."""
DEEPEST = 200
LONGEST = 4000
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
INSIDE = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS | sc.RESOLVE_NO_XDEV


Parts = dict[tuple[str, int], bytes]
"""Digests of pieces, by the file's path and where in it they begin."""


class Digest(NamedTuple):
    size: int
    xxh128: str
    pieces: list[str]
    """The hashes of the pieces, of which the other is made."""


def digests(directory: int, names: Iterable[str], known: Parts | None = None, *, leave: int = 0) -> dict[str, Digest]:
    """Size and hash of each of these files, by their paths below ``directory``; no symbolic link is followed.

    The digests of pieces that are ``known`` already are not made again. ``leave`` is the number of processors to be left to
    others. Raises OSError, and ValueError for what is no file.
    """
    sizes = {name: _size(directory, name) for name in names}
    parts = dict(known or {})
    pieces = [
        (name, start) for name, size in sizes.items() for start in range(0, max(size, 1), PIECE) if (name, start) not in parts
    ]
    failures: list[Exception] = []
    todo = iter(pieces)
    lock = threading.Lock()
    # A thread is worth its while for some megabytes.
    amount = sum(min(PIECE, sizes[name] - start) for name, start in pieces)
    busy = min(amount >> 22, len(os.sched_getaffinity(0)) - 1 - leave)
    threads = [threading.Thread(target=_work, args=(directory, todo, lock, parts, failures)) for _ in range(busy)]
    for thread in threads:
        thread.start()
    _work(directory, todo, lock, parts, failures)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return {name: _digest(name, size, parts) for name, size in sizes.items()}


def open_inside(directory: int, name: str) -> int:
    """Open a file below ``directory``, through no link and on no other mount. Raises OSError, ValueError."""
    fd = sc.openat2(name, FILE, directory, resolve=INSIDE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{name} is not a file")
    return fd


def _size(directory: int, name: str) -> int:
    fd = open_inside(directory, name)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _digest(name: str, size: int, parts: Parts) -> Digest:
    pieces = [parts[name, start] for start in range(0, max(size, 1), PIECE)]
    return Digest(size, xxhash.xxh3_128_hexdigest(b"".join(pieces)), [piece.hex() for piece in pieces])


def _work(
    directory: int,
    todo: Iterator[tuple[str, int]],
    lock: threading.Lock,
    parts: Parts,
    failures: list[Exception],
) -> None:
    buffer = bytearray(1 << 20)
    try:
        while not failures:
            with lock:
                name, start = next(todo, ("", 0))
            if not name:
                return
            fd = open_inside(directory, name)
            try:
                digest = hash_piece(fd, start, buffer, lambda: bool(failures))
                if digest is not None:
                    parts[name, start] = digest
            finally:
                os.close(fd)
    except (OSError, ValueError) as e:
        failures.append(e)


def hash_piece(fd: int, start: int, buffer: bytearray, given_up: Callable[[], bool]) -> bytes | None:
    """Of the piece of a file that begins at ``start``; None when it is ``given_up``."""
    end = start + PIECE
    if end <= os.fstat(fd).st_size and _next_data(fd, start) >= end:
        return _empty_piece()
    digest = xxhash.xxh3_128()
    view = memoryview(buffer)
    for place in range(start, end, len(buffer)):
        size = os.preadv(fd, [buffer], place)
        digest.update(view[:size])
        if given_up():
            return None
        if size < len(buffer):
            break
    return digest.digest()


def _next_data(fd: int, start: int) -> int:
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError:
        return os.fstat(fd).st_size  # there is none to the end


@cache
def _empty_piece() -> bytes:
    return xxhash.xxh3_128_digest(bytes(PIECE))


# -- trees ------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Something in a tree: its path from the top, and where it can be opened."""

    path: str
    parent: int
    name: str
    status: os.stat_result

    def target(self) -> str:
        """Of a symbolic link."""
        return os.readlink(self.name, dir_fd=self.parent)


def walk(top: int, names: Iterable[str]) -> Iterator[Entry]:
    """All below ``top`` that begins with one of ``names``, directories before what is in them, in a fixed order.

    Raises OSError, and CheckpointError where directories are nested too deep.
    """
    for name in names:
        yield from _walk(top, name, name, 0)


def _walk(parent: int, name: str, path: str, depth: int) -> Iterator[Entry]:
    entry = Entry(path, parent, name, os.stat(name, dir_fd=parent, follow_symlinks=False))
    yield entry
    if not stat.S_ISDIR(entry.status.st_mode):
        return
    if depth > DEEPEST:
        raise CheckpointError(f"directories are nested deeper than {DEEPEST}: {path[:60]}...", "remove them")
    here = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        for child in sorted(os.listdir(here)):
            yield from _walk(here, child, f"{path}/{child}", depth + 1)
    finally:
        os.close(here)


class Totals:
    """What a tree comes to, counted while its lines are made."""

    def __init__(self) -> None:
        self.entries = 0
        self.bytes = 0
        """On the disk: without holes."""


def lines(top: int, names: Iterable[str], totals: Totals | None = None) -> Iterator[bytes]:
    """The list of a tree. Raises what :func:`walk` raises."""
    entries = walk(top, sorted(names))
    while batch := list(islice(_described(entries, totals), BATCH)):
        files = [path for path, mode, *_ in batch if stat.S_ISREG(mode) and len(os.fsencode(path)) < LONGEST]
        found = digests(top, files)
        for path, mode, uid, gid, size, target in batch:
            known = found.get(path)
            last = known.xxh128 if known else target
            yield json.dumps([path, mode, uid, gid, known.size if known else size, last]).encode() + b"\n"


def _described(entries: Iterator[Entry], totals: Totals | None) -> Iterator[tuple[str, int, int, int, int, str | None]]:
    for entry in entries:
        status = entry.status
        if totals is not None:
            totals.entries += 1
            totals.bytes += status.st_blocks * 512
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            size = status.st_rdev
        target = entry.target() if stat.S_ISLNK(status.st_mode) else None
        yield entry.path, status.st_mode, status.st_uid, status.st_gid, size, target


def difference(was: Iterable[bytes], now: Iterator[bytes]) -> str | None:
    """In what the tree differs from its list, as a sentence; None when it does not. Stops at the first."""
    for line in was:
        found = next(now, None)
        if found == line:
            continue
        before, after = _path(line), _path(found)
        if found is None or (before is not None and after is not None and before.split("/") < after.split("/")):
            return f"{before} is missing"
        return f"{after} was changed" if before == after else f"{after} does not belong there"
    extra = _path(next(now, None))
    return None if extra is None else f"{extra} does not belong there"


def _path(line: bytes | None) -> str | None:
    if line is None:
        return None
    fields: Any = json.loads(line)
    return str(fields[0])
