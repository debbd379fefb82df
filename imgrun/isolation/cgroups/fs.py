"""The cgroup file systems of this host: which hierarchies are mounted, where the caller is in each, and their files.

Sources: ``cgroups(7)``, ``cgroup_namespaces(7)``, ``proc_pid_mountinfo(5)``, and the kernel's
Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst. Nothing here decides anything or is remembered between calls.
"""

from __future__ import annotations

import os
from typing import NamedTuple

PREFIX = "imgrun-"
"""Every directory that imgrun makes in a cgroup file system begins with this."""

V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "pids", "blkio", "freezer")
"""The v1 controllers that imgrun uses. A hierarchy with none of them is left alone."""


class Mount(NamedTuple):
    """A mounted cgroup file system, or the part of one that a bind mount shows."""

    version: int
    controllers: tuple[str, ...]
    """v1: those of ``V1_CONTROLLERS`` that are bound to it. v2: empty; see ``cgroup.controllers``."""
    root: str
    """The directory of the hierarchy that is mounted, as seen from the caller's cgroup namespace."""
    path: str
    device: int
    writable: bool


class Tree(NamedTuple):
    """A hierarchy in which the caller's own directory can be seen."""

    version: int
    controllers: tuple[str, ...]
    mount: str
    own: str
    writable: bool


def unescape(text: str) -> str:
    """Undo the ``\\040`` form that mountinfo gives to blanks, newlines and backslashes."""
    if "\\" not in text:
        return text
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def parse_mounts(mountinfo: str) -> list[Mount]:
    """The cgroup mounts among the lines of /proc/PID/mountinfo; of several at one place the last, which covers them."""
    mounts: dict[str, Mount] = {}
    for line in mountinfo.splitlines():
        if " - cgroup" not in line:
            continue
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        fstype, _, options = after.split(" ", 2)
        if fstype not in ("cgroup", "cgroup2"):
            continue
        major, _, minor = fields[2].partition(":")
        flags = options.split(",")
        mounts[fields[4]] = Mount(
            version=1 if fstype == "cgroup" else 2,
            controllers=tuple(name for name in V1_CONTROLLERS if name in flags and fstype == "cgroup"),
            root=unescape(fields[3]),
            path=unescape(fields[4]),
            device=os.makedev(int(major), int(minor)),
            writable="ro" not in flags and "ro" not in fields[5].split(","),
        )
    return list(mounts.values())


def parse_membership(text: str) -> dict[str, str]:
    """/proc/PID/cgroup as controller -> path. Controllers that share a hierarchy share a path; v2's key is empty."""
    membership = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if number != "0" else ("",):
            membership[controller] = path
    return membership


def locate(mount: Mount, path: str) -> str | None:
    """Where the cgroup ``path`` is below ``mount``; None when the mount does not show it.

    Paths that begin with ``/..`` lie outside the caller's cgroup namespace and have no name here.
    """
    if path.startswith("/..") or mount.root.startswith("/.."):
        return None
    if mount.root != "/":
        if path != mount.root and not path.startswith(mount.root + "/"):
            return None
        path = path[len(mount.root) :]
    return (mount.path.rstrip("/") + path).rstrip("/")


def discover(proc: str = "/proc/self") -> list[Tree]:
    """The hierarchies that the caller can see itself in: v2 first, one entry for each even if mounted twice."""
    mounts = parse_mounts(read(f"{proc}/mountinfo"))
    membership = read(f"{proc}/cgroup")
    while True:
        trees, gone = _find(mounts, parse_membership(membership))
        before = membership
        # Another imgrun process may move this one between reading where it is and looking there.
        if not gone or (membership := read(f"{proc}/cgroup")) == before:
            return trees


def _find(mounts: list[Mount], membership: dict[str, str]) -> tuple[list[Tree], bool]:
    """The trees, and whether one was left out because its directory does not exist."""
    found: dict[int, Tree] = {}
    gone = False
    for mount in mounts:
        if mount.version == 1 and not mount.controllers:
            continue
        path = membership.get(mount.controllers[0] if mount.version == 1 else "")
        own = locate(mount, path) if path is not None else None
        if own is None or (mount.device in found and found[mount.device].writable):
            continue
        try:
            # A later mount may cover this one: then the path leads somewhere else.
            if os.stat(own).st_dev != mount.device:
                continue
        except OSError:
            gone = True
            continue
        found[mount.device] = Tree(mount.version, mount.controllers, mount.path.rstrip("/"), own, mount.writable)
    return sorted(found.values(), key=lambda tree: -tree.version), gone


def mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    """The cgroup mount that ``path``, an absolute path without ``..``, lies in."""
    best = None
    if ".." not in path.split("/"):
        for mount in mounts:
            if path.startswith(mount.path.rstrip("/") + "/") and (best is None or len(mount.path) >= len(best.path)):
                best = mount
    return best


# ---- files --------------------------------------------------------------------------------------------------------


def read(path: str) -> str:
    """The whole of a small kernel file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
    finally:
        os.close(fd)
    return b"".join(chunks).decode(errors="surrogateescape")


def write(path: str, value: str) -> None:
    """Write a kernel file that exists, in one call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def text(path: str) -> str | None:
    """The file's content without the last newline, or None when there is no such file or it cannot be read."""
    try:
        return read(path).rstrip("\n")
    except OSError:
        return None


def number(path: str) -> int | None:
    """The file's only value; None when it is absent or not a number (``max``)."""
    value = text(path)
    return int(value) if value and value.lstrip("-").isdigit() else None


def keyed(path: str) -> dict[str, int]:
    """A flat-keyed file, ``KEY VALUE`` a line; empty when it is absent."""
    values = {}
    for line in (text(path) or "").splitlines():
        key, _, value = line.rpartition(" ")
        if value.isdigit():
            values[key] = int(value)
    return values


def may_write(path: str) -> bool:
    return os.access(path, os.W_OK)
