"""User namespaces: which host ids a job's ids stand for, and how the map is written.

Sources: user_namespaces(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from imgrun.errors import HostError, ImgrunError

RANGE = 65536
"""Ids in one job's range: what an image can hold without surprises (0 to nobody)."""

FIRST_SLOT = 0x24000000 // RANGE
LAST_SLOT = 0x6FFF0000 // RANGE
"""Where root's jobs get their ranges when /etc/subuid has none for ``imgrun``: above all that useradd hands out
(SUB_UID_MAX, 600100000) and inside what systemd reserves for containers (0x80000 to 0x6fffffff)."""

SUBID_USER = "imgrun"


class IdRange(NamedTuple):
    """``size`` ids from ``inside`` on in the job are those from ``outside`` on in the parent namespace."""

    inside: int
    outside: int
    size: int

    def __str__(self) -> str:
        return f"{self.inside} {self.outside} {self.size}"


class IdMap(NamedTuple):
    """The ids of one job. ``identity`` says that they are the host's own ids (see :func:`identity`)."""

    uids: tuple[IdRange, ...]
    gids: tuple[IdRange, ...]
    identity: bool = False

    def describe(self) -> str:
        first = self.uids[0]
        last = first.inside + first.size - 1
        return f"ids {first.inside}-{last} are the host's {first.outside}-{first.outside + first.size - 1}"

    def outside_uid(self, inside: int) -> int | None:
        """The host's uid for a uid of the job; None when it is not mapped."""
        return _outside(self.uids, inside)

    def outside_gid(self, inside: int) -> int | None:
        return _outside(self.gids, inside)


def _outside(ranges: tuple[IdRange, ...], inside: int) -> int | None:
    for r in ranges:
        if r.inside <= inside < r.inside + r.size:
            return r.outside + inside - r.inside
    return None


def identity() -> IdMap:
    """The fallback where the kernel cannot id-map the image's mounts (overlay before 5.19, some file systems).

    Ids are the host's own: the job's root still has no capability outside its namespaces, but files it could reach
    would be the host root's.
    """
    whole = (IdRange(0, 0, RANGE),)
    return IdMap(whole, whole, identity=True)


def subordinate_ranges(path: str, user: str) -> list[tuple[int, int]]:
    """The (first, count) ranges that ``path``, in subuid(5)'s form, gives to ``user``."""
    ranges = []
    try:
        with open(path, encoding="utf-8", errors="replace") as table:
            for line in table:
                fields = line.strip().split(":")
                if len(fields) == 3 and fields[0] == user and fields[1].isdigit() and fields[2].isdigit():
                    ranges.append((int(fields[1]), int(fields[2])))
    except FileNotFoundError:
        pass
    return ranges


def _slots() -> tuple[Sequence[int], Literal["subuid", "default"]]:
    """The first ids of all ranges that root's jobs may use."""
    uids = subordinate_ranges("/etc/subuid", SUBID_USER)
    if not uids:
        return range(FIRST_SLOT * RANGE, (LAST_SLOT + 1) * RANGE, RANGE), "default"
    gids = subordinate_ranges("/etc/subgid", SUBID_USER)
    starts = [
        start
        for first, count in uids
        for start in range(first, first + count - RANGE + 1, RANGE)
        if any(g <= start and start + RANGE <= g + n for g, n in gids)
    ]
    return starts, "subuid"


class HeldMap:
    """A map that no other live job has, while ``fd``, of the file ``path``, is open and holds its lock."""

    def __init__(self, ids: IdMap, fd: int, path: str) -> None:
        self.ids = ids
        self._fd = fd
        self._path = path

    def close(self) -> None:
        if self._fd >= 0:
            try:
                os.unlink(self._path)  # while it is locked: whoever locks it now sees that it has no name any more
            except FileNotFoundError:
                pass  # somebody has emptied /run
            os.close(self._fd)
            self._fd = -1


HELD = "/run/imgrun/ids"
"""Where ranges are held: root's, on this host, whatever the state directory."""


def hold_range(directory: str = HELD, *, wanted: int | None = None) -> HeldMap:
    """Take a range of 65536 ids that no other live job on this host has, and hold it by a lock in ``directory``.

    It begins at ``wanted`` if that can be had: a job that is continued owns files in its range, in mounts that show the
    host's owners. For the same reason the others are taken at random, so that what a frozen job had is likely still free.

    Two jobs that share host ids could reach each other where only ids are compared (keyrings, abstract sockets' peers,
    per-user limits), so each has its own. Raises HostError when all are taken.
    """
    starts, source = _slots()
    if starts:
        first = int.from_bytes(os.urandom(4), "little") % len(starts)
        preferred = (wanted,) if wanted is not None and wanted in starts else ()
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            looking = _look(directory, fcntl.LOCK_SH)
            try:
                held = _hold_one(directory, chain(preferred, starts[first:], starts[:first]))
            finally:
                os.close(looking)
        except OSError as e:
            raise HostError(
                f"the job's range of ids cannot be held in {directory}: {e.strerror}",
                "see that root can write there, or use --userns off",
            ) from e
        if held is not None:
            return held
    where = f"/etc/subuid and /etc/subgid for '{SUBID_USER}'" if source == "subuid" else "imgrun's own region"
    raise HostError(
        f"no free range of {RANGE} ids for the job's user namespace in {where}",
        "end other jobs, widen the range, or use --userns off",
    )


def drop_unheld(directory: str = HELD) -> None:
    """Remove the files of ranges whose holder was killed. Does what the caller may."""
    try:
        looking = _look(directory, fcntl.LOCK_EX)
    except OSError:
        return
    try:
        for name in os.listdir(looking):
            _drop_unheld(f"{directory}/{name}")
    finally:
        os.close(looking)


def _drop_unheld(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            os.unlink(path)  # while it is locked, as in HeldMap.close
    except OSError:
        pass  # it is held
    finally:
        os.close(fd)


def _look(directory: str, how: int) -> int:
    """A descriptor that keeps takers of ranges (LOCK_SH) and whoever drops them (LOCK_EX) apart while it is open.

    What is about to be dropped is locked: a taker would take it for another job's.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _hold_one(directory: str, starts: Iterable[int]) -> HeldMap | None:
    for start in starts:
        path = f"{directory}/{start}"
        if (fd := _lock(path)) is not None:
            ranges = (IdRange(0, start, RANGE),)
            return HeldMap(IdMap(ranges, ranges), fd, path)
    return None


def _lock(path: str) -> int | None:
    """A descriptor of the file of this name, locked; None when somebody else has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # its holder ended between our two steps: the range is free


def gids_of(pid: int) -> list[range]:
    """The gids that the user namespace of ``pid`` has; none when it is gone."""
    try:
        with open(f"/proc/{pid}/gid_map", "rb") as f:
            rows = [tuple(map(int, line.split())) for line in f]
    except OSError:
        return []
    return [range(inside, inside + size) for inside, _, size in rows]


def write_maps(pid: int, ids: IdMap) -> None:
    """Give the user namespace of ``pid`` its ids. The caller needs CAP_SETUID and CAP_SETGID in the parent namespace."""
    for name, ranges in (("uid_map", ids.uids), ("gid_map", ids.gids)):
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, "".join(f"{r}\n" for r in ranges).encode())
            finally:
                os.close(fd)
        except OSError as e:
            raise _map_error(e, name, ranges) from e


def _map_error(e: OSError, name: str, ranges: tuple[IdRange, ...]) -> ImgrunError:
    return HostError(
        f"the kernel refused the job's {name} ({', '.join(map(str, ranges))}): {e.strerror}",
        "inside a container, the range must lie within the container's own ids; list one in /etc/subuid and "
        f"/etc/subgid for '{SUBID_USER}', or use --userns off",
    )
