"""A checkpoint as one stream: a tar archive in the format of POSIX, through zstd where that is asked for.

    manifest.json files.list shim stdin processes/... files/...

The manifest comes first: whoever unpacks it knows what is to come. tar(1) of GNU reads it, extended attributes and holes
included (``tar --xattrs --xattrs-include='*'``). Reading it is imgrun.checkpoints.unpacking.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import tarfile
from typing import NamedTuple

from imgrun.checkpoints.digests import Entry, open_inside, walk
from imgrun.checkpoints.manifest import MANIFEST, PARTS, list_files
from imgrun.errors import CheckpointError, HostError
from imgrun.helper import find_program

BLOCK = 512
COPY = 1 << 20
PIPE = 1 << 20
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


def check_holdable(files: int, layers: tuple[str, ...]) -> None:
    """Raise CheckpointError for what the job has on disk and an archive could not bring back."""
    for entry in walk(files, layers):
        mode = entry.status.st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and entry.status.st_rdev != 0):
            raise CheckpointError(f"the job has made the device {entry.path}, which no archive brings back", "remove it")


def write(archive: Archive, directory: str, files: int, layers: tuple[str, ...]) -> int:
    """Write the checkpoint in ``directory``, whose ``files/`` are the ``layers`` below the descriptor ``files``.

    The file gets its name when all of it is on the disk. Returns its size. Raises OSError, CheckpointError.
    """
    temporary = archive.building
    fd = archive.fd
    if temporary is None:
        os.set_blocking(fd, True)
    else:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if archive.compress:
            with _Compressor(fd) as compressor:
                size = _write(compressor.sink, directory, files, layers)
        else:
            size = _write(fd, directory, files, layers)
        if temporary is not None and archive.path is not None:
            os.fsync(fd)
            size = os.fstat(fd).st_size
            os.rename(temporary, archive.path)
            _sync(os.path.dirname(archive.path))
        return size
    except BaseException:
        if temporary is not None:
            os.unlink(temporary)
        raise
    finally:
        if temporary is not None:
            os.close(fd)


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
            words, stdin=subprocess.PIPE, stdout=target, stderr=subprocess.PIPE, pipesize=PIPE, cwd="/",
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
            why = words.decode(errors="replace").strip().splitlines()[-1:] or ["it was killed"]
            code = errno.ENOSPC if "No space" in why[0] else errno.EPIPE if "Broken pipe" in why[0] else errno.EIO
            raise OSError(code, f"zstd: {why[0]}")


def _write(sink: int, directory: str, files: int, layers: tuple[str, ...]) -> int:
    writer = _Writer(sink)
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
    writer.end()
    return writer.written


class _Writer:
    """Members of a tar archive, to a descriptor that may be a pipe."""

    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._links: dict[tuple[int, int], str] = {}
        self.written = 0

    def add_directory(self, name: str) -> None:
        info = tarfile.TarInfo(name)
        info.type = tarfile.DIRTYPE
        info.mode = 0o700
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))

    def add(self, entry: Entry, name: str) -> None:
        status = entry.status
        info = tarfile.TarInfo(name)
        info.mode = stat.S_IMODE(status.st_mode)
        info.uid, info.gid = status.st_uid, status.st_gid
        info.mtime = status.st_mtime
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
            self._add_file(entry, info)
            return
        if kind == stat.S_IFLNK:
            info.type, info.linkname = tarfile.SYMTYPE, entry.target()
        elif kind == stat.S_IFDIR:
            info.type = tarfile.DIRTYPE
            here = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.parent)
            try:
                info.pax_headers = _attributes(here)
            finally:
                os.close(here)
        elif kind == stat.S_IFIFO:
            info.type = tarfile.FIFOTYPE
        else:
            info.type = tarfile.CHRTYPE  # 0:0, with which an overlay says that a name is gone
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _add_file(self, entry: Entry, info: tarfile.TarInfo) -> None:
        fd = open_inside(entry.parent, entry.name)
        try:
            status = os.fstat(fd)
            size = status.st_size
            headers = _attributes(fd)
            ranges = [(0, size)]
            table = b""
            if status.st_blocks * 512 < size:
                ranges = _data(fd, size)
                rows = (len(ranges), *(number for pair in ranges for number in pair))
                table = "".join(f"{number}\n" for number in rows).encode()
                table += bytes(-len(table) % BLOCK)
                headers |= {
                    "GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                    "GNU.sparse.name": info.name, "GNU.sparse.realsize": str(size),
                }  # fmt: skip
            info.size = len(table) + sum(length for _, length in ranges)
            info.pax_headers = headers
            self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            self._put(table)
            for start, length in ranges:
                self._copy(fd, start, length, info.name)
            self._put(bytes(-info.size % BLOCK))
        finally:
            os.close(fd)

    def _copy(self, fd: int, start: int, length: int, name: str) -> None:
        end = start + length
        while start < end:
            sent = self._send(fd, start, min(end - start, COPY))
            if sent == 0:
                raise CheckpointError(f"{name} became shorter while it was archived", "checkpoint it again")
            start += sent
            self.written += sent

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
            self.written += sent

    def end(self) -> None:
        self._put(bytes(2 * BLOCK))


def _attributes(fd: int) -> dict[str, str]:
    """Extended attributes, as tar(1) names them."""
    try:
        names = os.listxattr(fd)
    except OSError:
        return {}
    names = [name for name in names if name != "security.selinux"]  # a host's own
    return {f"SCHILY.xattr.{name}": os.fsdecode(os.getxattr(fd, name)) for name in names}


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
