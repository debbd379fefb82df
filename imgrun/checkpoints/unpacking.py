"""An archive back into a checkpoint, for one restore: below the state root, from where the new job takes the files.

An archive is hostile until all of it is seen. It is read in a process with little memory, and put into a new directory that
only its owner can enter, each name by itself: nothing outside of it can be named, through whatever link. What it may come
to, its manifest says, and that must fit on the disk before the rest is read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from typing import IO, Any

from imgrun.apart import apart
from imgrun.checkpoints.manifest import DIRECTORY, LARGEST_MANIFEST, MANIFEST, SINGLE, Checkpoint, load, size_of
from imgrun.errors import ImgrunError, NoSpace, RestoreError
from imgrun.state import StateRoot
from imgrun.storage.trees import remove_tree

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PLACE = "unpacked"
"""Of the state root: a directory for each archive that is being restored, locked for as long."""
MEMORY = 1 << 30
COPY = 1 << 20
MORE_MEMBERS = 4096
"""Directories, links between rounds and the like, which the manifest does not count."""
YOUNG = 60.0
BAD = "get it anew from where it was made"
LOG = "dump.log"


def is_archive(path: str) -> bool:
    """Whether this is to be unpacked first: anything but a directory."""
    return os.path.exists(path) and not os.path.isdir(path)


class Unpacked:
    """The checkpoint that was in an archive, until the job that continues it has taken it."""

    def __init__(self, archive: str, *, allow: tuple[str, ...] = ()) -> None:
        """Unpack all of it. Raises RestoreError and NoSpace; nothing is left then."""
        self.archive = os.path.abspath(archive)
        root = StateRoot()
        root.prepare()
        source = _open(self.archive, allow)
        try:
            self.path, self._lock = _new_place(root)
            try:
                apart(lambda: _unpack(source, self.archive, self.path), memory=MEMORY)
            except ImgrunError as e:
                self.close()
                if isinstance(e, RestoreError | NoSpace):
                    raise
                raise RestoreError(f"the archive {self.archive} cannot be unpacked: {e.message}", e.hint) from e
            except BaseException:
                self.close()
                raise
        finally:
            os.close(source)

    def close(self) -> None:
        with contextlib.suppress(ImgrunError):  # whoever comes next tries again
            remove_tree(self.path)
        os.close(self._lock)

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def opened(path: str, allow: tuple[str, ...] = ()) -> Iterator[Checkpoint]:
    """The checkpoint in a directory, or unpacked from an archive until the job is started. Raises RestoreError, NoSpace."""
    if not is_archive(path):
        yield load(path)
        return
    with Unpacked(path, allow=allow) as unpacked:
        yield load(unpacked.path)._replace(archive=unpacked.archive)


def _open(path: str, allow: tuple[str, ...]) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as e:
        raise RestoreError(f"the archive {path} cannot be read: {e.strerror}", "see its path and permissions") from None
    status = os.fstat(fd)
    wrong = None
    if not stat.S_ISREG(status.st_mode):
        wrong = ("is no file", "give the file that 'imgrun checkpoint --archive' made")
    elif status.st_uid not in (0, os.geteuid()) and "owner" not in allow:
        # As of a directory: it holds programs that would run as the caller.
        wrong = (f"belongs to uid {status.st_uid}, who could have put anything into it", "copy it, or --allow owner")
    if wrong:
        os.close(fd)
        raise RestoreError(f"{path} {wrong[0]}", wrong[1])
    return fd


def _new_place(root: StateRoot) -> tuple[str, int]:
    above = f"{root.path}/{PLACE}"
    os.makedirs(above, 0o700, exist_ok=True)
    name = os.urandom(6).hex()
    os.mkdir(f"{above}/.{name}", 0o700)
    lock = os.open(f"{above}/.{name}", DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Under its own name only once it is locked: unlocked would mean leftovers.
    os.rename(f"{above}/.{name}", f"{above}/{name}")
    return f"{above}/{name}", lock


def remove_leftovers(root: StateRoot) -> None:
    """What unpackers that were killed have left."""
    above = f"{root.path}/{PLACE}"
    try:
        names = os.listdir(above)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError, ImgrunError):
            fd = os.open(f"{above}/{name}", DIRECTORY)
            try:
                if name[0] == "." and time.time() - os.fstat(fd).st_mtime < YOUNG:
                    continue
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(f"{above}/{name}")
            finally:
                os.close(fd)


# -- in the process apart ---------------------------------------------------------------------------------------------


def _unpack(source: int, archive: str, directory: str) -> None:
    reader: IO[bytes]
    process = None
    if os.pread(source, 4, 0) == ZSTD_MAGIC:
        from imgrun.checkpoints.archive import zstd

        words = [zstd(), "--decompress", "--quiet", "--stdout"]
        process = subprocess.Popen(
            words, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pipesize=COPY, cwd="/",
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
        raise RestoreError(f"the archive {archive} is damaged, or is none of imgrun's: {e}", BAD) from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space to unpack {archive} to {directory}", "set IMGRUN_STATE_DIR to another disk") from e
        raise RestoreError(f"the archive {archive} cannot be unpacked to {directory}: {e.strerror or e}", BAD) from e
    finally:
        os.close(top)
        if process is not None:
            process.kill()
            process.wait()


def _ranges(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """What of a file is in the archive, as offset and length; the rest are holes. Raises ValueError for nonsense."""
    sparse: list[tuple[int, int]] | None = getattr(member, "sparse", None)
    if sparse is None:
        return [(0, member.size)]
    end = 0
    for start, length in sparse:
        if start < end or length < 0 or start + length > member.size:
            raise ValueError(f"the holes of {member.name} make no sense")
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
        self._directories: list[tuple[str, float]] = []
        """And when they were changed last, which filling them changes."""

    def run(self) -> None:
        first = self._tar.next()
        if first is None or first.name != MANIFEST or not first.isreg() or first.size > LARGEST_MANIFEST:
            raise RestoreError(f"{self._archive} is no archive of a checkpoint", "give one that 'imgrun checkpoint' made")
        self._file(first, self._top, MANIFEST)
        self._expect()
        while (member := self._tar.next()) is not None:
            self._remembered.clear()  # or it would keep all of them
            self._members -= 1
            if self._members < 0:
                raise self._bomb("members")
            self._extract(member)
        for path, changed in reversed(self._directories):
            *above, name = path.split("/")
            parent = self._open_parent(above)
            os.utime(name, (changed, changed), dir_fd=parent, follow_symlinks=False)
            os.close(parent)

    def _bomb(self, what: str) -> RestoreError:
        return RestoreError(f"the archive {self._archive} holds more {what} than its manifest says", BAD)

    def _expect(self) -> None:
        """What the manifest says of the rest, which has to fit."""
        with open(os.open(MANIFEST, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._top), "rb") as f:
            manifest: dict[str, Any] = json.load(f)
        tree = manifest["tree"]
        files, tree_bytes, entries = manifest["files"], int(tree["bytes"]), int(tree["entries"])
        self._layers = tuple(str(layer) for layer in manifest["layers"])
        self._bytes = size_of(files) + tree_bytes
        self._members = len(files) + entries + MORE_MEMBERS
        if min(tree_bytes, entries, *(int(file.get("size", 0)) for file in files.values())) < 0:
            raise ValueError("sizes below zero")
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
                raise ValueError(f"{member.name} is of an unknown kind")
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
                raise EOFError("it ends early")
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
                for key, value in member.pax_headers.items():
                    if key.startswith("SCHILY.xattr."):
                        os.setxattr(fd, key.removeprefix("SCHILY.xattr."), os.fsencode(value))
            finally:
                os.close(fd)
        os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
