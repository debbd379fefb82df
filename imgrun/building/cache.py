"""Bases of images, kept between builds: one tar per set of packages, in ``$IMGRUN_CACHE``.

The default is ``imgrun`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``. What nobody used for 30 days is removed when
something is added. A build of the same base by another process is waited for, not repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable

from imgrun.building.recipe import Recipe

_UNUSED_SECONDS = 30 * 86400
_LAYOUT = 1


def directory() -> str:
    """Where bases are kept. It need not exist."""
    own = os.environ.get("IMGRUN_CACHE")
    if own:
        return os.path.abspath(own)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "imgrun")


def key(recipe: Recipe) -> str:
    """Names what the packages of ``recipe`` are made from, whatever becomes of them afterwards."""
    source = recipe.source
    repos = ""
    if source.repos:
        with contextlib.suppress(OSError):
            for entry in sorted(os.scandir(source.repos), key=lambda entry: entry.name):
                if entry.name.endswith(".repo") and entry.is_file():
                    with open(entry.path, encoding="utf-8", errors="replace") as file:
                        repos += file.read(1 << 20)
    parts = [
        _LAYOUT, platform.machine(), os.environ.get("SOURCE_DATE_EPOCH"), sorted(recipe.packages), repos,
        source._replace(repos=""),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{source.type}-{source.release}-{digest}"


def base(
    recipe: Recipe, make: Callable[[str], None], *, fresh: bool, fallback: str, progress: Callable[[str], None]
) -> tuple[str, bool]:
    """The path of the tar for ``recipe``, and whether it was there already.

    ``make(path)`` writes it when it is missing, or always with ``fresh``. Where the cache cannot be used, that is
    said and the tar goes to the path ``fallback``.
    """
    place = directory()
    try:
        os.makedirs(place, 0o700, exist_ok=True)
        status = os.stat(place)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(0, "others can write there")
        tar = os.path.join(place, f"{key(recipe)}.tar")
        part = f"{tar}.part"
        lock = _lock(part, progress)
    except OSError as error:
        progress(f"not kept for the next build: {place}: {error.strerror}")
        make(fallback)
        return fallback, False
    try:
        if not fresh and os.path.exists(tar):
            made = os.stat(tar).st_mtime
            progress(f"packages as of {_ago(time.time() - made)}, from {tar}; --no-cache gets them anew")
            os.utime(tar, (time.time(), made))
            os.unlink(part)
            return tar, True
        try:
            make(part)
            os.fsync(lock)
        except BaseException:
            os.unlink(part)
            raise
        os.replace(part, tar)
        _remove_unused(place)
        return tar, False
    finally:
        os.close(lock)


def _lock(path: str, progress: Callable[[str], None]) -> int:
    """Create ``path`` and lock it; the descriptor holds the lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another build of the same packages")
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _remove_unused(place: str) -> None:
    oldest = time.time() - _UNUSED_SECONDS
    for entry in os.scandir(place):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tar") and max(status.st_atime, status.st_mtime) < oldest:
                os.unlink(entry.path)


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        count = int(seconds // unit)
        if count:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "a moment ago"
