"""A checkpoint as one stream: a tar archive in the format of POSIX, through zstd where that is asked for.

    manifest.json files.list shim stdin processes/... files/... image.img image.json

The manifest comes first: whoever unpacks it knows what is to come. But an image that is complete only when the job has ended
is added to what is an archive already: its size and hash follow it, in image.json. tar(1) of GNU reads it, extended attributes
and holes included (``tar --xattrs --xattrs-include='*'``). Reading it is imgrun.checkpoints.unpacker.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from imgrun.checkpoints.digests import Entry, open_inside, walk
from imgrun.checkpoints.manifest import DIRECTORY, IMAGE, IMAGE_RECORD, MANIFEST, PARTS, list_files
from imgrun.errors import CheckpointError, HostError
from imgrun.helper import find_program

BLOCK = 512
COPY = 1 << 20
SLACK = 8 << 20
"""Bytes for what else an image may become when it is completed, and to say what is in it."""
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
XATTR = "SCHILY.xattr."
LEVEL = "-1"
"""Of zstd: memory is written about as fast as a good disk takes it; higher ones save little of it."""


class Archive(NamedTuple):
    """Where to: a file that is to have this name, or a descriptor of the caller's."""

    path: str | None
    building: str | None
    """What the file is called until it is complete."""
    fd: int
    compress: bool


def zstd() -> str:
    """The path of the program. Raises HostError without it."""
    program = find_program("zstd")
    if program is None:
        raise HostError("zstd is missing, which compressed archives need", "install zstd, or use an archive without .zst")
    return program


def check_place(path: str) -> None:
    """See that a file of this name can be made. Raises OSError."""
    os.close(os.open(path, NEW, 0o600))
    os.unlink(path)


def check_holdable(files: int, layers: tuple[str, ...]) -> None:
    """Raise CheckpointError for what the job has on disk and an archive could not bring back."""
    for entry in walk(files, layers):
        mode = entry.status.st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and entry.status.st_rdev != 0):
            raise CheckpointError(f"the job has made the device {entry.path}, which no archive brings back", "remove it")


def write(
    archive: Archive, directory: str, files: int, layers: tuple[str, ...], image: str | None = None, more: int | None = None
) -> None:
    """Write the checkpoint in ``directory``, whose ``files/`` are the ``layers`` below the descriptor ``files``.

    ``image`` is a path to the image that belongs to it; ``more`` how many bytes of one will be added later.

    The file gets its name when all of it is on the disk. Raises OSError, CheckpointError.
    """
    temporary = archive.building
    fd = archive.fd
    if temporary is None:
        os.set_blocking(fd, True)
    else:
        fd = os.open(temporary, NEW, 0o600)
    try:
        if archive.compress:
            with _Compressor(fd) as compressor:
                _write(compressor.sink, directory, files, layers, image, end=more is None)
        else:
            _write(fd, directory, files, layers, image, end=more is None)
        if temporary is not None and archive.path is not None:
            if more is not None:
                _require_room(fd, more + SLACK)
            os.fsync(fd)
            os.rename(temporary, archive.path)
            _sync(os.path.dirname(archive.path))
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):  # it has its name
                os.unlink(temporary)
        raise
    finally:
        if temporary is not None:
            os.close(fd)


def add_image(path: str, compress: bool, image: str, description: dict[str, Any]) -> None:
    """Add the image that this path leads to to an archive that was written without its end. Raises OSError, CheckpointError.

    The archive is what it was when that fails.
    """
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    end = os.fstat(fd).st_size
    try:
        with _Compressor(fd) if compress else contextlib.nullcontext() as compressor:
            writer = Writer(fd if compressor is None else compressor.sink)
            _add_image(writer, image)
            writer.add_text(IMAGE_RECORD, json.dumps(description).encode())
            writer.end()
        end = os.fstat(fd).st_size
    finally:
        os.ftruncate(fd, end)
        os.fsync(fd)
        os.close(fd)


def _require_room(fd: int, size: int) -> None:
    space = os.fstatvfs(fd)
    if size > space.f_bavail * space.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Compressor:
    """zstd, on all processors, between us and the archive."""

    def __init__(self, target: int) -> None:
        words = [zstd(), LEVEL, "-T0", "--quiet", "--stdout"]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=target, stderr=subprocess.PIPE, pipesize=COPY, cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
        assert self._process.stdin is not None
        self.sink = self._process.stdin.fileno()

    def __enter__(self) -> _Compressor:
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        process = self._process
        if kind is not None and kind is not BrokenPipeError:
            process.kill()
        words: bytes = process.communicate()[1]
        if process.returncode and (kind is None or kind is BrokenPipeError):
            said = (words.decode(errors="replace").strip().splitlines()[-1:] or ["it was killed"])[0]
            gone = process.returncode == -signal.SIGPIPE or "Broken pipe" in said
            code = errno.EPIPE if gone else errno.ENOSPC if "No space" in said else errno.EIO
            raise OSError(code, f"zstd failed: {said.rpartition(' : ')[2]}")


def _write(sink: int, directory: str, files: int, layers: tuple[str, ...], image: str | None, *, end: bool) -> None:
    writer = Writer(sink)
    top = os.open(directory, DIRECTORY)
    try:
        names = [MANIFEST, *list_files(top)]
        # Directories before what is in them.
        places = {os.path.dirname(name) for name in names} | set(PARTS)
        for entry in walk(top, [MANIFEST]):
            writer.add(entry, entry.path)
        for place in sorted(places - {""}):
            writer.add_directory(place)
        for name in names[1:]:
            for entry in walk(top, [name]):
                writer.add(entry, entry.path)
        for entry in walk(files, layers):
            writer.add(entry, f"files/{entry.path}")
    finally:
        os.close(top)
    if image is not None:
        _add_image(writer, image)
    if end:
        writer.end()


def _add_image(writer: Writer, path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writer.add_file(fd, IMAGE)
    finally:
        os.close(fd)


class Writer:
    """Members of a tar archive, to a descriptor that may be a pipe."""

    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._links: dict[tuple[int, int], str] = {}

    def add_directory(self, name: str) -> None:
        info = tarfile.TarInfo(name)
        info.type = tarfile.DIRTYPE
        info.mode = 0o700
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))

    def add_text(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))
        self._put(content + bytes(-len(content) % BLOCK))

    def add(self, entry: Entry, name: str) -> None:
        status = entry.status
        info = _info(name, status)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return  # nobody can connect to it any more, as tar(1) does
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), name)
            if first != name:
                info.type, info.linkname = tarfile.LNKTYPE, first
                self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
                return
        if kind == stat.S_IFREG:
            fd = open_inside(entry.parent, entry.name)
            try:
                self.add_file(fd, name)
            finally:
                os.close(fd)
            return
        if kind == stat.S_IFLNK:
            info.type, info.linkname = tarfile.SYMTYPE, entry.target()
        elif kind == stat.S_IFDIR:
            info.type = tarfile.DIRTYPE
            here = os.open(entry.name, DIRECTORY, dir_fd=entry.parent)
            try:
                info.pax_headers = _attributes(here)
            finally:
                os.close(here)
        elif kind == stat.S_IFIFO:
            info.type = tarfile.FIFOTYPE
        else:
            info.type = tarfile.CHRTYPE  # 0:0, with which an overlay says that a name is gone
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def add_file(self, fd: int, name: str) -> None:
        status = os.fstat(fd)
        info = _info(name, status)
        headers = _attributes(fd)
        ranges = [(0, status.st_size)]
        table = b""
        if status.st_blocks * 512 < status.st_size:
            ranges = _data(fd, status.st_size)
            rows = (len(ranges), *(number for pair in ranges for number in pair))
            table = "".join(f"{number}\n" for number in rows).encode()
            table += bytes(-len(table) % BLOCK)
            headers |= {
                "GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                "GNU.sparse.name": name, "GNU.sparse.realsize": str(status.st_size),
            }  # fmt: skip
        info.size = len(table) + sum(length for _, length in ranges)
        info.pax_headers = headers
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        self._put(table)
        for start, length in ranges:
            self._copy(fd, start, length, name)
        self._put(bytes(-info.size % BLOCK))

    def _copy(self, fd: int, start: int, length: int, name: str) -> None:
        end = start + length
        while start < end:
            sent = self._send(fd, start, min(end - start, COPY))
            if sent == 0:
                raise CheckpointError(f"{name} became shorter while it was archived", "checkpoint it again")
            start += sent

    def _send(self, fd: int, start: int, length: int) -> int:
        try:
            return os.sendfile(self._sink, fd, start, length)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        data = os.pread(fd, length, start)  # what cannot be sent from or to
        return os.write(self._sink, data)

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            sent = os.write(self._sink, view)
            view = view[sent:]

    def end(self) -> None:
        self._put(bytes(2 * BLOCK))


def _info(name: str, status: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.mtime = status.st_mtime
    return info


def _attributes(fd: int) -> dict[str, str]:
    """Extended attributes, as tar(1) names them."""
    try:
        names = os.listxattr(fd)
    except OSError:
        return {}
    names = [name for name in names if name != "security.selinux"]  # a host's own
    return {f"{XATTR}{name}": os.fsdecode(os.getxattr(fd, name)) for name in names}


def attributes_of(member: tarfile.TarInfo) -> Iterator[tuple[str, bytes]]:
    """The extended attributes of what was archived."""
    for key, value in member.pax_headers.items():
        if key.startswith(XATTR):
            yield key.removeprefix(XATTR), os.fsencode(value)


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    """What of a file is no hole; with an empty last part, so that its length is known."""
    found = []
    place = 0
    while place < size:
        try:
            start = os.lseek(fd, place, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        place = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, min(place, size) - start))
    return [*found, (size, 0)]
