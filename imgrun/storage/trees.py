"""Measuring and removing directory trees that a job may have filled with anything: links out of it, millions of files,
directories nested deeper than any path or stack. No link is ever followed, and no path longer than one name is used.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

from imgrun.errors import HostError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
MAX_DEPTH = 200


def remove_tree(path: str) -> None:
    """Remove ``path`` and all below it; nothing there is no error. Raises HostError when something stays.

    What is nested is first moved up, so that any depth takes two descriptors and no recursion.
    """
    try:
        try:
            top = os.open(path, DIRECTORY)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            os.unlink(path)
            return
        try:
            _empty(top)
        finally:
            os.close(top)
        os.rmdir(path)
    except OSError as e:
        if isinstance(e, PermissionError) and os.geteuid() != 0 and _removed_with_all_ids(path):
            return
        raise HostError(f"could not remove {path}: {e.strerror}", "remove it by hand, then run 'imgrun gc'") from e


def _removed_with_all_ids(path: str) -> bool:
    """Remove what an ordinary user's job left with the user's subordinate ids, as the root of a namespace that has them."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            from imgrun.isolation import rootless

            rootless.enter()
            remove_tree(path)
            status = 0
        except (HostError, OSError):
            pass  # the caller says what it could not do itself
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def disk_usage(fd: int, *, entries: int = 200_000, seconds: float = 1.0) -> int | None:
    """The bytes that the files below the directory ``fd`` occupy on disk, each file once however many names it has.

    None when the tree is larger than ``entries``, slower than ``seconds`` or deeper than is worth the effort.
    """
    deadline = time.monotonic() + seconds
    total = 0
    linked: set[int] = set()
    stack = [_Scan(os.open(".", DIRECTORY, dir_fd=fd))]
    try:
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
                continue
            entries -= 1
            if entries < 0 or (entries % 256 == 0 and time.monotonic() > deadline):
                return None
            parent, name = entry
            try:
                status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if status.st_nlink > 1 and not _is_dir(status):
                    if status.st_ino in linked:
                        continue
                    linked.add(status.st_ino)
                total += status.st_blocks * 512
                if _is_dir(status):
                    if len(stack) >= MAX_DEPTH:
                        return None
                    stack.append(_Scan(os.open(name, DIRECTORY, dir_fd=parent)))
            except OSError:
                # Gone in the meantime, or closed to this user: then it is not known.
                if os.geteuid() != 0:
                    return None
        return total
    finally:
        for scan in stack:
            scan.close()


class _Scan(Iterator[tuple[int, str]]):
    """The entries of one directory, with the descriptor that their names are relative to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._entries = os.scandir(fd)

    def __next__(self) -> tuple[int, str]:
        entry = next(self._entries, None)
        if entry is None:
            self.close()
            raise StopIteration
        return self._fd, entry.name

    def close(self) -> None:
        if self._fd >= 0:
            self._entries.close()
            os.close(self._fd)
            self._fd = -1


def _is_dir(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o040000


def _empty(top: int) -> None:
    waiting = os.listdir(top)
    lifted = 0
    while waiting:
        name = waiting.pop()
        if _gone(top, name):
            continue
        inner = _enter(top, name)
        try:
            for child in os.listdir(inner):
                if _gone(inner, child):
                    continue
                lifted += 1
                new = f".removing-{lifted}-{os.urandom(8).hex()}"
                _lift(inner, child, top, new)
                waiting.append(new)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)


def _gone(directory: int, name: str) -> bool:
    """Remove what is no directory, or an empty one. False for a directory that still has something in it."""
    try:
        os.unlink(name, dir_fd=directory)
        return True
    except FileNotFoundError:
        return True
    except (IsADirectoryError, PermissionError) as refused:
        # unlink(2) on a directory: EISDIR on Linux, EPERM by POSIX.
        try:
            os.rmdir(name, dir_fd=directory)
            return True
        except NotADirectoryError:
            raise refused from None
        except OSError as e:
            if e.errno not in NOT_EMPTY:
                raise
            return False


def _enter(top: int, name: str) -> int:
    """Open a directory with the right to empty it; its owner may have taken that right from himself."""
    if os.geteuid() != 0:
        os.chmod(name, 0o700, dir_fd=top)
    return os.open(name, DIRECTORY, dir_fd=top)


def _lift(inner: int, child: str, top: int, new: str) -> None:
    if os.geteuid() != 0:
        os.chmod(child, 0o700, dir_fd=inner)
    os.rename(child, new, src_dir_fd=inner, dst_dir_fd=top)
