"""Reading an archive of a checkpoint, which is hostile until all of it is seen: each name is made by itself, in a new
directory, through no link, and no more than the manifest announces. It runs in a process apart (imgrun.checkpoints.unpacking).
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import tarfile
from typing import IO, Any

from imgrun.checkpoints.archive import SLACK, attributes_of, zstd
from imgrun.checkpoints.manifest import DIRECTORY, IMAGE, IMAGE_RECORD, LARGEST_MANIFEST, MANIFEST, SINGLE, checksum, size_of
from imgrun.errors import NoSpace, RestoreError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
COPY = 1 << 20
MORE_MEMBERS = 4096
"""Directories, links between rounds and the like, which the manifest does not count."""
BAD = "get it anew from where it was made"


def unpack(source: int, archive: str, directory: str) -> None:
    reader: IO[bytes]
    process = None
    if os.pread(source, 4, 0) == ZSTD_MAGIC:
        words = [zstd(), "--decompress", "--quiet", "--stdout"]
        process = subprocess.Popen(
            words, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pipesize=COPY, cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
        assert process.stdout is not None
        reader = process.stdout
    else:
        reader = open(os.dup(source), "rb")  # noqa: SIM115
    top = os.open(directory, DIRECTORY)
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=COPY, encoding="utf-8", errors="surrogateescape") as tar:
            _Unpacker(tar, top, archive).run()
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = _damage_to_compressed(process) or _damage(e)
        raise RestoreError(f"the archive {archive} is damaged, or is none of imgrun's: {why}", BAD) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space to unpack {archive} to {directory}", "set IMGRUN_STATE_DIR to another disk") from e
        raise RestoreError(f"the archive {archive} cannot be unpacked to {directory}: {e.strerror or e}", BAD) from e
    finally:
        os.close(top)
        if process is not None:
            process.kill()
            process.wait()


def _damage(error: Exception) -> str:
    if isinstance(error, _Nonsense):
        return str(error)
    if isinstance(error, tarfile.TarError | EOFError):
        early = isinstance(error, EOFError) or str(error) in ("unexpected end of data", "truncated header", "empty header")
        return "it ends early" if early else "it is empty" if str(error) == "empty file" else "it is no tar archive"
    return "its manifest, or what is said of a file in it, makes no sense"


def _damage_to_compressed(process: subprocess.Popen[bytes] | None) -> str | None:
    if process is None:
        return None
    assert process.stdout is not None
    process.stdout.close()  # one that could go on is ended by that
    said = process.communicate()[1]
    if process.returncode != 1:
        return None
    return "it ends early" if b"premature end" in said else "it cannot be decompressed"


class _Nonsense(ValueError):
    """With the words for it."""


def _ranges(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """What of a file is in the archive, as offset and length; the rest are holes. Raises ValueError."""
    sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
    if sparse is None:
        return [(0, member.size)]
    end = 0
    for start, length in sparse:
        if start < end or length < 0 or start + length > member.size:
            raise _Nonsense(f"the holes of {member.name} make no sense")
        end = start + length
    return sparse


class _Unpacker:
    def __init__(self, tar: tarfile.TarFile, top: int, archive: str) -> None:
        self._tar = tar
        self._remembered: list[tarfile.TarInfo] = tar.members  # type: ignore[attr-defined]
        self._top = top
        self._archive = archive
        self._bytes = LARGEST_MANIFEST
        self._members = 2
        self._layers: tuple[str, ...] = ()
        self._later = self._adding = False
        """Whether an image may follow that was added later; and whether it has begun."""
        self._directories: list[tuple[str, float]] = []
        """And when they were changed last, which filling them changes."""

    def run(self) -> None:
        first = self._tar.next()
        if first is None or first.name != MANIFEST or not first.isreg() or first.size > LARGEST_MANIFEST:
            raise RestoreError(f"{self._archive} is no archive of a checkpoint", "give one that 'imgrun checkpoint' made")
        self._file(first, self._top, MANIFEST)
        self._expect()
        try:
            while (member := self._tar.next()) is not None:
                self._remembered.clear()  # or it would keep all of them
                self._members -= 1
                if self._members < 0:
                    raise self._bomb("members")
                self._extract(member)
        except (tarfile.ReadError, EOFError):
            if not self._adding:
                raise
        if self._later:
            self._settle_image()
        for path, changed in reversed(self._directories):
            *above, name = path.split("/")
            parent = self._open_parent(above)
            os.utime(name, (changed, changed), dir_fd=parent, follow_symlinks=False)
            os.close(parent)

    def _settle_image(self) -> None:
        """Have the manifest say what is known of an image that was added, or do without one of which not all is there."""
        there = os.listdir(self._top)
        if IMAGE_RECORD not in there:
            if IMAGE in there:
                os.unlink(IMAGE, dir_fd=self._top)
            return
        record = self._read(IMAGE_RECORD)
        os.unlink(IMAGE_RECORD, dir_fd=self._top)
        manifest = self._read(MANIFEST)
        manifest["files"][IMAGE] = {"size": int(record["size"]), "xxh128": str(record["xxh128"])}
        manifest["checksum"] = checksum(manifest)
        with open(os.open(MANIFEST, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, dir_fd=self._top), "w") as f:
            json.dump(manifest, f)

    def _read(self, name: str) -> dict[str, Any]:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._top), "rb") as f:
            found: dict[str, Any] = json.load(f)
        return found

    def _bomb(self, what: str) -> RestoreError:
        return RestoreError(f"the archive {self._archive} holds more {what} than its manifest says", BAD)

    def _expect(self) -> None:
        """What the manifest says of the rest, which has to fit."""
        manifest = self._read(MANIFEST)
        tree = manifest["tree"]
        files, tree_bytes, entries = manifest["files"], int(tree["bytes"]), int(tree["entries"])
        self._layers = tuple(str(layer) for layer in manifest["layers"])
        self._bytes = size_of(files) + tree_bytes
        image = manifest["image"]
        self._later = bool(image.get("later")) and IMAGE not in files
        if IMAGE in files:
            self._bytes -= int(files[IMAGE]["size"])
        if IMAGE in files or self._later:  # only what is no hole is to come
            self._bytes += max(int(image["stored"]), 0) + (SLACK if self._later else 0)
        self._members = len(files) + entries + MORE_MEMBERS
        if min(tree_bytes, entries, *(int(file.get("size", 0)) for file in files.values())) < 0:
            raise _Nonsense("sizes below zero")
        space = os.fstatvfs(self._top)
        free = space.f_bavail * space.f_frsize
        if self._bytes > free:
            raise NoSpace(
                f"{self._archive} takes {self._bytes >> 20} MiB, and imgrun's state directory has {free >> 20} MiB free",
                "free some, or set IMGRUN_STATE_DIR to another disk",
            )
        # Blocks are not always used up, as sizes may say less than a file takes, or a manifest may lie.
        self._bytes += self._members * 4096

    def _extract(self, member: tarfile.TarInfo) -> None:
        parts = member.name.rstrip("/").split("/")
        if not self._belongs(parts, member):
            raise RestoreError(f"the archive {self._archive} holds {member.name!r}, which no checkpoint does", BAD)
        self._adding = self._adding or (self._later and parts == [IMAGE])
        parent = self._open_parent(parts[:-1])
        name = parts[-1]
        try:
            if member.isdir():
                self._directory(member, parent, name)
            elif member.isreg():
                self._file(member, parent, name)
            elif member.issym():
                os.symlink(member.linkname, name, dir_fd=parent)
                os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
            elif member.islnk():
                self._link(member, parent, name)
            elif member.isfifo() or member.ischr():
                kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR
                os.mknod(name, kind | 0o600, 0, dir_fd=parent)
                self._attributes(member, parent, name)
            else:
                raise _Nonsense(f"{member.name} is of an unknown kind")
        finally:
            os.close(parent)

    def _belongs(self, parts: list[str], member: tarfile.TarInfo) -> bool:
        if any(part in ("", ".", "..") for part in parts):
            return False
        if parts[0] == "files":
            if member.ischr() and (member.devmajor, member.devminor) != (0, 0):
                return False
            return member.isdir() if len(parts) == 1 else parts[1] in self._layers
        if parts[0] == "processes":
            return len(parts) <= 3 and (member.isreg() or member.isdir() or (member.issym() and parts[-1] == "parent"))
        if parts == [IMAGE_RECORD]:
            return self._adding and member.isreg() and member.size < COPY
        return len(parts) == 1 and parts[0] in SINGLE and member.isreg()

    def _open_parent(self, parts: list[str]) -> int:
        """A directory of ours, by its names one after the other; none of them may be a link."""
        here = os.dup(self._top)
        for part in parts:
            try:
                inner = os.open(part, DIRECTORY, dir_fd=here)
            finally:
                os.close(here)
            here = inner
        return here

    def _directory(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=parent)
        self._directories.append((member.name.rstrip("/"), member.mtime))
        self._attributes(member, parent, name)

    def _file(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            content: Any = self._tar.extractfile(member)
            raw = content.raw  # a buffer would read ahead, and a stream cannot go back
            for start, length in _ranges(member):
                raw.seek(start)
                self._copy(raw, fd, start, length)
            os.truncate(fd, member.size)
        finally:
            os.close(fd)
        self._attributes(member, parent, name)

    def _copy(self, content: Any, fd: int, start: int, length: int) -> None:
        end = start + length
        while start < end:
            data = content.read(min(end - start, COPY))
            if not data:
                raise EOFError
            self._bytes -= len(data)
            if self._bytes < 0:
                raise self._bomb("bytes")
            written = 0
            while written < len(data):
                written += os.pwrite(fd, data[written:], start + written)
            start += len(data)

    def _link(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        parts = member.linkname.split("/")
        if parts[:1] != ["files"] or any(part in ("", ".", "..") for part in parts):
            raise RestoreError(f"the archive {self._archive} links to {member.linkname!r}, outside of it", BAD)
        source = self._open_parent(parts[:-1])
        try:
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _attributes(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        """Owner, mode, extended attributes and time; what the checkpoint itself consists of is its owner's alone."""
        if not member.name.startswith("files/"):
            os.chmod(name, 0o700 if member.isdir() else 0o600, dir_fd=parent)
            return
        os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(name, member.mode & 0o7777, dir_fd=parent)
        if member.isreg() or member.isdir():
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            try:
                for key, value in attributes_of(member):
                    os.setxattr(fd, key, value)
            finally:
                os.close(fd)
        os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
