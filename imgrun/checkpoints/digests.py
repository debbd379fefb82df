"""Hashes of the files of a checkpoint, with all processors, and a list of what a job wrote: every file, its size and hash.

A hash is there to find damage, and is XXH3 of 128 bits, about as fast as memory is read. Against malice no hash would help
that lies beside what it is of; there, who owns the checkpoint decides (imgrun.checkpoints.manifest).

A file's hash is that of the hashes of its pieces of 2 MiB, so that one large file occupies all processors, and holes are
not read. Of the list each line is a JSON array, in a fixed order, so that two lists of one tree are the same text:

    ["upper/etc/motd", mode, uid, gid, size, hash or null]      a file; null where that, or the path, is too large
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
from typing import Any, NamedTuple

import xxhash

from imgrun import syscalls as sc
from imgrun.errors import CheckpointError

PIECE = 2 << 20
"""Bytes. A lazy restore reads and hashes so much before it gives a process the first page that it touches."""
DIGEST = 16
"""Bytes."""
BATCH = 512
"""Files that are hashed before their lines are given out; fewer, when they come to LARGEST bytes."""
LARGEST = 1 << 40
"""Bytes of a file that is hashed: of a larger one, the holes alone would take long."""
THREADS = 15
"""The most beside our own: memory is not read faster with more."""
DEEPEST = 200
LONGEST = 4000
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
INSIDE = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS | sc.RESOLVE_NO_XDEV


Parts = dict[tuple[str, int], bytes]
"""Digests of pieces, by the file's path and where in it they begin. Of what is all hole there need be none."""
Opener = Callable[[str], int]


class Digest(NamedTuple):
    size: int
    xxh128: str
    joined: bytes
    """The digests of its pieces, one after the other, of which the other is made."""

    @property
    def pieces(self) -> list[str]:
        """The hashes of its pieces."""
        return [self.joined[i : i + DIGEST].hex() for i in range(0, len(self.joined), DIGEST)]


def digests(directory: int, names: Iterable[str], known: Parts | None = None, *, leave: int = 0) -> dict[str, Digest]:
    """Size and hash of each of these files, by their paths below ``directory``; no symbolic link is followed.

    The digests of pieces that are ``known`` already are not made again. ``leave`` is the number of processors to be left to
    others. Raises OSError, and ValueError for what is no file.
    """
    return _digests(lambda name: open_inside(directory, name), names, dict(known or {}), leave)


def digest_of(path: str) -> Digest:
    """The same of one file, that any path leads to."""
    return _digests(lambda name: os.open(name, FILE | os.O_CLOEXEC), [path], {}, 0)[path]


def _digests(opener: Opener, names: Iterable[str], parts: Parts, leave: int) -> dict[str, Digest]:
    status = {name: _status(opener, name) for name in names}
    sizes = {name: found.st_size for name, found in status.items()}
    # A thread is worth its while for some megabytes.
    amount = sum(min(found.st_size, found.st_blocks * 512) for found in status.values()) - len(parts) * PIECE
    busy = min(max(amount, 0) >> 22, len(os.sched_getaffinity(0)) - 1 - leave, THREADS)
    todo = _pieces(opener, sizes, parts)
    failures: list[Exception] = []
    lock = threading.Lock()
    threads = [threading.Thread(target=_work, args=(opener, todo, lock, parts, failures)) for _ in range(busy)]
    for thread in threads:
        thread.start()
    _work(opener, todo, lock, parts, failures)
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


def _status(opener: Opener, name: str) -> os.stat_result:
    fd = opener(name)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _pieces(opener: Opener, sizes: dict[str, int], known: Parts) -> Iterator[tuple[str, int]]:
    """The pieces that have to be read: those that are not known, and not all hole."""
    for name, size in sizes.items():
        if size < PIECE:
            if (name, 0) not in known:
                yield name, 0
            continue
        fd = opener(name)
        try:
            start = 0
            while start < size:
                if start + PIECE <= size:
                    start = min(_next_data(fd, start), size - 1) // PIECE * PIECE
                if (name, start) not in known:
                    yield name, start
                start += PIECE
        finally:
            os.close(fd)


def _digest(name: str, size: int, parts: Parts) -> Digest:
    joined = b"".join(parts.get((name, start), _empty_piece()) for start in range(0, max(size, 1), PIECE))
    return Digest(size, xxhash.xxh3_128_hexdigest(joined), joined)


def _work(
    opener: Opener,
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
            fd = opener(name)
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


def walk(top: int, names: Iterable[str], device: int | None = None) -> Iterator[Entry]:
    """All below ``top`` that begins with one of ``names``, directories before what is in them, in a fixed order.

    With a ``device``, only what is on that one.
    Raises OSError, and CheckpointError where directories are nested too deep.
    """
    for name in names:
        yield from _walk(top, name, name, 0, device)


def _walk(parent: int, name: str, path: str, depth: int, device: int | None) -> Iterator[Entry]:
    entry = Entry(path, parent, name, os.stat(name, dir_fd=parent, follow_symlinks=False))
    if device is not None and entry.status.st_dev != device:
        return
    yield entry
    if not stat.S_ISDIR(entry.status.st_mode):
        return
    if depth > DEEPEST:
        raise CheckpointError(f"directories are nested deeper than {DEEPEST}: {path[:60]}...", "remove them")
    here = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        for child in sorted(os.listdir(here)):
            yield from _walk(here, child, f"{path}/{child}", depth + 1, device)
    finally:
        os.close(here)


Line = tuple[str, int, int, int, int, str | None]
"""Path, mode, uid, gid, size, and where a link leads."""


class Totals:
    """What a tree comes to, counted while its lines are made."""

    def __init__(self) -> None:
        self.entries = 0
        self.bytes = 0
        """On the disk: without holes."""


def lines(top: int, names: Iterable[str], totals: Totals | None = None) -> Iterator[bytes]:
    """The list of a tree. Raises what :func:`walk` raises."""
    entries = walk(top, sorted(names))
    for batch in _batches(_described(entries, totals)):
        found = digests(top, [line[0] for line in batch if _is_hashed(line)])
        for path, mode, uid, gid, size, target in batch:
            known = found.get(path)
            last = known.xxh128 if known else target
            yield json.dumps([path, mode, uid, gid, known.size if known else size, last]).encode() + b"\n"


def _is_hashed(line: Line) -> bool:
    path, mode, _, _, size, _ = line
    return stat.S_ISREG(mode) and size <= LARGEST and len(os.fsencode(path)) < LONGEST


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += line[4]
        if len(batch) == BATCH or size >= LARGEST:
            yield batch
            batch, size = [], 0
    yield batch


def _described(entries: Iterator[Entry], totals: Totals | None) -> Iterator[Line]:
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
