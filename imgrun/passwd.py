"""Users and groups as the image's own /etc/passwd and /etc/group have them (passwd(5), group(5)).

The image is hostile input: files are opened beneath its root, must be regular, and are read up to a bound.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import SpecError

LIMIT = 8 << 20
"""Bytes read of one file at most."""


class User(NamedTuple):
    """Who a process is: the numbers for the kernel, the rest for its environment."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str


def read_file(root_fd: int, path: str, limit: int = LIMIT) -> str | None:
    """The text of a regular file of the image, or None when there is none (or it is something else)."""
    try:
        fd = sc.openat2(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, root_fd,
            resolve=sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS,
        )  # fmt: skip
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return os.read(fd, min(os.fstat(fd).st_size, limit)).decode(errors="surrogateescape")
    except OSError:
        return None
    finally:
        os.close(fd)


def resolve(root_fd: int, path: str) -> str | None:
    """Where ``path`` leads inside the image once its links are followed; None when it leads nowhere."""
    try:
        fd = sc.openat2(path, os.O_PATH, root_fd, resolve=sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS)
    except OSError:
        return None
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _entries(text: str | None, fields: int) -> list[list[str]]:
    rows = [line.split(":") for line in (text or "").splitlines() if "\0" not in line]
    return [row for row in rows if len(row) >= fields]


def _number(text: str) -> int | None:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 2**32
    return number if number < 2**32 - 1 else None


def lookup(root_fd: int, user: str) -> User:
    """Resolve ``NAME``, ``UID``, ``NAME:GROUP`` or ``UID:GID`` inside the image. Raises SpecError when it has no such user."""
    name, _, group = user.partition(":")
    passwd = _entries(read_file(root_fd, "etc/passwd"), 7)
    row = next((r for r in passwd if r[0] == name), None)
    uid = _number(name)
    if row is None and uid is not None:
        row = next((r for r in passwd if _number(r[2]) == uid), None)
    if row is not None:
        uid, gid = _number(row[2]), _number(row[3])
        if uid is None or gid is None:
            raise SpecError(f"user {name!r} has no usable ids in the image's /etc/passwd", "give --user as UID:GID")
        found = User(uid, gid, (), row[0], row[5] or "/", row[6] or "/bin/sh")
    elif uid is not None:
        found = User(uid, uid if not group else 0, (), str(uid), "/", "/bin/sh")
    elif name == "root":
        found = User(0, 0, (), "root", "/root", "/bin/sh")
    else:
        raise SpecError(f"no user {name!r} in the image's /etc/passwd", "use a name it has, or UID:GID")
    groups = _entries(read_file(root_fd, "etc/group"), 4)
    if group:
        gid = _number(group)
        if gid is None:
            named = next((g for g in groups if g[0] == group), None)
            gid = _number(named[2]) if named else None
        if gid is None:
            raise SpecError(f"no group {group!r} in the image's /etc/group", "use a name it has, or a number")
        return found._replace(gid=gid)
    member_of = tuple(
        n for g in groups if found.name in g[3].split(",") and (n := _number(g[2])) is not None and n != found.gid
    )
    return found._replace(groups=member_of[:256])
