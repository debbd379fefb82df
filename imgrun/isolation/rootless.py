"""Without the host's root: the supervisor first becomes root of a user and mount namespace of its own.

From there on everything goes as for root: the same sources, plan and child. The namespace has the caller as its root and,
where an administrator gave some, the caller's subordinate ids; nothing in it can do what the caller could not.
Sources: user_namespaces(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from imgrun import syscalls as sc
from imgrun.errors import HostError
from imgrun.helper import find_program
from imgrun.isolation.userns import RANGE, IdMap, IdRange, subordinate_ranges

CAP_SYS_ADMIN = 21
WHOLE = 2**32 - 1


def is_host_root() -> bool:
    """Whether the caller may mount file systems for the whole host: CAP_SYS_ADMIN in the first user namespace."""
    if not sc.capget()[0] >> CAP_SYS_ADMIN & 1:
        return False
    try:
        with open("/proc/self/uid_map", "rb") as f:
            fields = f.read().split()
    except OSError:
        return False
    return [int(field) for field in fields] == [0, 0, WHOLE]


class _Maps:
    """How the caller's namespace gets its ids."""

    def __init__(self) -> None:
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.uids = self._with_ranges("/etc/subuid", self.uid)
        self.gids = self._with_ranges("/etc/subgid", self.gid)
        self.helpers = (find_program("newuidmap"), find_program("newgidmap"))
        self.by_helper = len(self.uids) > 1 and len(self.gids) > 1 and None not in self.helpers
        if self.uid == 0:
            # Root of a namespace below the first, as in a job of imgrun's: its own ids can be handed on as they are.
            self.uids, self.gids = _own_ids("/proc/self/uid_map"), _own_ids("/proc/self/gid_map")
        elif not self.by_helper:
            self.uids, self.gids = self.uids[:1], self.gids[:1]

    @staticmethod
    def _with_ranges(path: str, own: int) -> list[IdRange]:
        import pwd

        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            name = str(os.geteuid())
        ranges = subordinate_ranges(path, name) or subordinate_ranges(path, str(os.geteuid()))
        found, inside = [IdRange(0, own, 1)], 1
        for first, count in ranges:
            count = min(count, RANGE - inside)
            if count > 0:
                found.append(IdRange(inside, first, count))
                inside += count
        return found


def number_of_ids() -> int:
    """How many user ids a job of the caller's has."""
    maps = _Maps()
    return sum(r.size for r in maps.uids) if maps.by_helper or maps.uid == 0 else 1


def _own_ids(path: str) -> list[IdRange]:
    with open(path, "rb") as f:
        rows = [line.split() for line in f]
    return [IdRange(int(inside), int(inside), int(size)) for inside, _, size in rows]


def enter() -> tuple[IdMap, list[str]]:
    """Become root of a new user and mount namespace. Returns the ids it has, as seen from inside, and warnings.

    The caller must have one thread, and keeps its credentials towards the host. Raises HostError where user namespaces
    are forbidden.
    """
    maps = _Maps()
    me = os.getpid()
    ready, tell = os.pipe2(os.O_CLOEXEC)
    said, say = os.pipe2(os.O_CLOEXEC)
    writer = os.fork()
    if writer == 0:
        _write_maps(maps, me, ready, tell, say)
    os.close(ready)
    os.close(say)
    try:
        try:
            sc.unshare(sc.CLONE_NEWUSER)
        except OSError as e:
            os.kill(writer, signal.SIGKILL)
            raise _forbidden(e) from e
        if maps.uid != 0 and not maps.by_helper:
            _write_own(maps)
        os.write(tell, b"x")
    finally:
        os.close(tell)
        status = os.waitpid(writer, 0)[1]
        words = os.read(said, 4096).decode(errors="replace").strip().splitlines()
        os.close(said)
    if status != 0:
        raise HostError(
            f"you did not get the ids that /etc/subuid and /etc/subgid give you: {words[0] if words else 'refused'}",
            "newuidmap and newgidmap must be set-uid root or have file capabilities; ask your administrator",
        )
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Gaining capabilities closed our /proc directory to the caller's other processes, as pasta, which need it.
    sc.prctl(sc.PR_SET_DUMPABLE, 1)
    try:
        sc.unshare(sc.CLONE_NEWNS)
    except OSError as e:
        raise _forbidden(e) from e
    sc.set_propagation("/", sc.MS_REC | sc.MS_SLAVE)
    warnings = []
    if len(maps.uids) == 1 and maps.uids[0].size == 1:
        warnings.append(
            "no subordinate ids (/etc/subuid, newuidmap): the job has a single id, so apt, su and --user fail in it"
        )
    inside = tuple(IdRange(r.inside, r.inside, r.size) for r in maps.uids)
    return IdMap(inside, tuple(IdRange(r.inside, r.inside, r.size) for r in maps.gids), identity=True), warnings


def _write_own(maps: _Maps) -> None:
    """A single id needs no helper, but group membership must be given up first (user_namespaces(7), setgroups)."""
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{maps.uids[0]}\n"),
        ("gid_map", f"{maps.gids[0]}\n"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as f:
            f.write(content)


def _write_maps(maps: _Maps, pid: int, ready: int, tell: int, say: int) -> NoReturn:
    """In a child that stays outside: write the maps once the parent is in its namespace."""
    status = 1
    try:
        os.close(tell)
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.read(ready, 1) != b"x":
            status = 0  # the parent did not get there, and says why itself
        elif maps.uid == 0:
            for name, ranges in (("uid_map", maps.uids), ("gid_map", maps.gids)):
                with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as f:
                    f.write("".join(f"{r}\n" for r in ranges))
            status = 0
        elif maps.by_helper:
            status = 0
            output = [(os.POSIX_SPAWN_DUP2, say, fd) for fd in (1, 2)]
            running = []
            for helper, ranges in zip(maps.helpers, (maps.uids, maps.gids), strict=True):
                assert helper is not None
                words = [helper, str(pid), *(str(number) for r in ranges for number in r)]
                running.append(os.posix_spawn(helper, words, os.environ, file_actions=output))
            for helper_pid in running:
                status |= os.waitpid(helper_pid, 0)[1]
        else:
            status = 0
    finally:
        os._exit(1 if status else 0)


def _forbidden(e: OSError) -> HostError:
    return HostError(
        f"user namespaces are not available to you here: {e.strerror}",
        "ask your administrator: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1 (Debian), "
        "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu)",
    )
