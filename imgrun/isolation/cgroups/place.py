"""Where in the unified hierarchy a job's directory may be.

Two rules decide. The kernel's: a cgroup that hands controllers to its children has no processes of its own (the root
excepted), so processes that stand in the way are moved into a leaf, ``imgrun-host``, and back when the last job has
gone. And systemd's: each cgroup has one manager, so below a unit that is not delegated nobody else enables controllers;
a login session gets a delegated scope of its own, in the same slice.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst; systemd's "Control Group APIs and Delegation".
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import dirs, fs
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups.limits import Limits

HOST_LEAF = fs.PREFIX + "host"
"""Where processes go that were in a cgroup which must hand out controllers: supervisors, and their neighbours."""

UNIT_SUFFIXES = (".service", ".scope", ".slice")

OWN_LIMITS = ("memory.max", "memory.high", "memory.swap.max", "cpu.max", "cpuset.cpus", "io.max")
"""Limits of a unit that its processes must not get rid of by moving elsewhere."""

OWN_CGROUP = "start imgrun in a cgroup of its own: systemd-run --scope -p Delegate=yes imgrun ..."


class Place(NamedTuple):
    """Where the job's directory can be made, and what it will have there."""

    kind: Literal["managed", "scope", "plain", "none"]
    """managed: ``parent`` is ours to hand out controllers. scope: systemd has to make a parent first. plain: a
    directory can be made, with the controllers that its parent hands out already. none: not even that."""
    parent: str
    controllers: frozenset[str]
    reason: str
    """Why there are no more controllers, as the rest of a sentence that begins with "cannot be enforced:"."""
    hint: str


def under_systemd() -> bool:
    """Whether systemd runs this host (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def unit_of(directory: str, mount: str) -> str | None:
    """The directory of the nearest systemd unit at or above ``directory``; the hierarchy's root for the root itself.

    None for a directory that somebody else made, and for the root that a container sees: that was handed to it.
    """
    path = directory
    while path != mount:
        if path.endswith(UNIT_SUFFIXES):
            return path
        path = os.path.dirname(path)
    is_root = directory == mount and not os.path.exists(f"{mount}/cgroup.type")
    return mount if is_root else None


def delegated(unit: str) -> bool:
    """Whether systemd has marked the unit as handed to its processes (``Delegate=yes``)."""
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(unit, name) == b"1":
                return True
        except OSError:
            continue
    return False


def limited(directory: str) -> bool:
    """Whether the cgroup has limits of its own. The number of tasks does not count: systemd limits it everywhere."""
    for name in OWN_LIMITS:
        value = fs.text(f"{directory}/{name}")
        if value and not value.startswith("max"):
            return True
    return False


def choose(tree: fs.Tree, wanted: frozenset[str]) -> Place:
    """Decide where a job that wants these controllers goes. Changes nothing."""
    own = tree.own
    if os.path.basename(own) == HOST_LEAF and own != tree.mount:
        own = os.path.dirname(own)
    handed_out = _words(f"{own}/cgroup.subtree_control")
    available = _words(f"{own}/cgroup.controllers")
    writable = tree.writable and all(
        fs.may_write(path) for path in (own, f"{own}/cgroup.procs", f"{own}/cgroup.subtree_control")
    )
    kind_of_cgroup = fs.text(f"{own}/cgroup.type") or "domain"
    if kind_of_cgroup != "domain":
        reason = f"the cgroup {own} is {kind_of_cgroup}, so no job can be below it"
        return Place("none", own, frozenset(), reason, "start imgrun in another cgroup")
    unit = unit_of(own, tree.mount) if under_systemd() else None
    nothing_to_do = wanted & _words(f"{tree.mount}/cgroup.controllers") <= handed_out
    if writable and (nothing_to_do or unit is None or delegated(unit)):
        return Place("managed", own, available, f"the cgroup {own} does not have the controller", _hint_missing())
    # A login's scope may be left for another one in its slice; a service or a batch job's cgroup may not.
    leavable = unit == own and own.endswith(".scope") and (os.geteuid() == 0 or f"{tree.mount}/user.slice/" in own)
    if leavable and not limited(own) and tree.writable:
        reason = "systemd does not delegate the controller to a scope of this caller"
        return Place("scope", own, _scope_controllers(tree), reason, _hint_missing())
    if not tree.writable:
        reason, hint = f"{tree.mount} is mounted read-only", "let the outer container have a writable cgroup mount"
    elif not writable:
        reason = f"the cgroup {own} is not this user's to divide"
        hint = "ask the batch system for the limit, run as root, or start imgrun in a delegated cgroup"
    else:
        reason = f"the systemd unit {os.path.basename(unit or own)} is not delegated to its processes"
        hint = "set Delegate=yes for it, or start imgrun with: systemd-run --scope -p Delegate=yes imgrun ..."
    return Place("plain" if writable else "none", own, handed_out if writable else frozenset(), reason, hint)


def settle(place: Place | None, required: bool, job_id: str) -> Place | None:
    """Where the v2 directory goes now, systemd having been asked for a scope if need be; None: it gets none.

    Without a scope the job still has a directory, if the caller may make one, but no controllers: that must do unless they
    are ``required``. Raises LimitError.
    """
    if place is not None and place.kind == "scope":
        try:
            return enter_scope(job_id, place)
        except LimitError:
            if required:
                raise
            return place if fs.may_write(place.parent) else None
    return None if place is None or place.kind == "none" else place


def enter_scope(job_id: str, place: Place) -> Place:
    """Have systemd move this process into a new delegated scope, and return that. Raises LimitError if it does not."""
    from imgrun.isolation.cgroups.systemd import start_scope

    parent = os.path.basename(os.path.dirname(place.parent))
    in_user_manager = "/user@" in place.parent
    start_scope(job_id, parent if os.geteuid() == 0 or in_user_manager else None)
    own = next(tree.own for tree in fs.discover() if tree.version == 2)
    return Place("managed", own, _words(f"{own}/cgroup.controllers"), place.reason, place.hint)


def come_near(job: str) -> bool:
    """Have systemd move this process beside the v2 directory of a job, so that its children may be born in that.

    The kernel asks for rights over the nearest directory that is above both. Gives whether it was possible.
    """
    parent = os.path.dirname(job)
    if not (under_systemd() and parent.endswith(".scope")):
        return False
    from imgrun.isolation.cgroups.systemd import join_unit

    below = f"/{HOST_LEAF}" if os.path.isdir(f"{parent}/{HOST_LEAF}") else ""
    return not join_unit(os.path.basename(parent), below)


def _words(path: str) -> frozenset[str]:
    return frozenset((fs.text(path) or "").split())


def _scope_controllers(tree: fs.Tree) -> frozenset[str]:
    """What a new scope can be expected to have: root's come from systemd itself, a user's from the user's manager."""
    path = tree.mount
    if os.geteuid() != 0:
        path += f"/user.slice/user-{os.geteuid()}.slice/user@{os.geteuid()}.service"
    return _words(f"{path}/cgroup.controllers")


def _hint_missing() -> str:
    if os.geteuid() == 0:
        return "leave the option out, or give this cgroup the controller (cgroup.subtree_control of its parents)"
    return (
        "an administrator can delegate it: systemctl edit user@.service, [Service] Delegate=cpu cpuset io memory pids; "
        "then log in again"
    )


def check(tree: fs.Tree, place: Place, limits: Limits, controller: str, options: list[str]) -> None:
    """Raise LimitError if what ``limits`` asks of ``controller`` cannot be had at ``place``."""
    if controller not in place.controllers:
        raise LimitError(f"{' and '.join(options)} cannot be enforced: {place.reason}", place.hint)
    if controller == "memory" and limits.swap is not None:
        # The root has no memory files at all, so nothing can be said there until the directory is made.
        if os.path.exists(f"{place.parent}/memory.max") and not os.path.exists(f"{place.parent}/memory.swap.max"):
            raise LimitError(
                "--swap cannot be enforced: this kernel does not count swap for each cgroup",
                "boot it with swapaccount=1, or leave --swap out",
            )
    elif controller == "cpuset" and limits.cpuset is not None:
        allowed = fs.text(f"{place.parent}/cpuset.cpus.effective")
        if allowed is None:  # the parent itself does without: then the root's holds
            allowed = fs.text(f"{tree.mount}/cpuset.cpus.effective") or ""
        lim.refuse_foreign_cpus(limits.cpuset, allowed, place.parent)
    elif controller == "io":
        by_cost = "enable=1" in (fs.text(f"{tree.mount}/io.cost.qos") or "")
        if limits.io_weight is not None and not by_cost and not lim.weighted_disks():
            raise lim.no_weighted_disk()
        for entry in limits.io_max:
            lim.disk_of(entry.device)


# ---- handing out controllers --------------------------------------------------------------------------------------


LOCK_TIMEOUT = 6.0
"""Anybody may lock a directory that he can read, so nobody is waited for longer than this (seconds). It is many times what
several imgruns that start at once need: each takes tens of milliseconds on a busy host."""


GIVE_BACK_TIMEOUT = 1.0
HAND_OUT_TIMEOUT = 3.0
"""Seconds for which others may stand in the way: new ones, and those that are ending, which cannot be moved any more."""


@contextmanager
def locked(directory: str, patience: float | None = None) -> Iterator[bool]:
    """Keep other imgrun processes from changing what ``directory`` hands out and which jobs are in it.

    Gives whether that was possible, which is waited for LOCK_TIMEOUT, or as long as ``patience`` says (seconds). To add
    to a directory without it is safe; to take away is not.
    """
    import fcntl

    deadline = time.monotonic() + (LOCK_TIMEOUT if patience is None else patience)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
                break
            except BlockingIOError:
                is_locked = False
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        yield is_locked
    finally:
        os.close(fd)


def make(path: str, place: Place, wanted: frozenset[str], required: bool) -> None:
    """Make a job's directory, its parent handing out the controllers that are wanted, if that is ours to change.

    Raises StartError, and LimitError where they cannot be handed out and are ``required``; nothing stays then.
    """
    if place.kind != "managed" or not wanted:
        dirs.make(path)
        return
    try:
        with locked(place.parent):
            try:
                hand_out(place.parent, wanted)
            except LimitError:
                if required:
                    raise
            dirs.make(path)
    except BaseException:
        give_back(place.parent)
        raise


def hand_out(parent: str, wanted: frozenset[str]) -> frozenset[str]:
    """Enable the controllers for the children of ``parent``, as far as it has them. Returns those that are enabled.

    Processes that stand in the way are moved into the leaf ``imgrun-host``. Raises LimitError if they cannot be.
    """
    path = f"{parent}/cgroup.subtree_control"
    missing = (wanted - _words(path)) & _words(f"{parent}/cgroup.controllers")
    deadline = time.monotonic() + HAND_OUT_TIMEOUT
    if missing and not _enable(path, missing, deadline):
        for name in sorted(missing):
            # One that fails (cpu, where there are real-time processes) must not keep the others away.
            _enable(path, frozenset((name,)), deadline)
    return _words(path)


def hand_out_more(job: str, wanted: frozenset[str]) -> None:
    """Have the parent of a job's directory hand out more controllers, if it is ours to do so. No job moves for it."""
    parent = os.path.dirname(job)
    mount = fs.mount_of(job, fs.parse_mounts(fs.read("/proc/self/mountinfo")))
    if mount is not None and choose(fs.Tree(2, (), mount.path, parent, mount.writable), wanted).kind == "managed":
        with locked(parent):
            hand_out(parent, wanted)


def _enable(path: str, controllers: frozenset[str], deadline: float) -> bool:
    """Enable the controllers, the directory's own processes being moved out of the way.

    The kernel refuses domain controllers (memory, io) where there are processes; threaded ones (cpu, cpuset, pids) it
    enables, but then takes the children for threads of the same job: nothing could be put in them. So both wait until
    the directory is empty; whoever forks meanwhile needs another round.
    """
    directory = os.path.dirname(path)
    is_root = not os.path.exists(f"{directory}/cgroup.type")
    while True:
        if not is_root and fs.text(f"{directory}/cgroup.procs"):
            _vacate(directory)
        try:
            fs.write(path, " ".join(f"+{name}" for name in sorted(controllers)))
        except OSError as error:
            if error.errno != errno.EBUSY:
                return False
        else:
            if is_root or not fs.text(f"{directory}/cgroup.procs"):
                return True
            fs.write(path, " ".join(f"-{name}" for name in sorted(controllers)))
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)


def _vacate(directory: str) -> None:
    """Move the processes of ``directory`` itself into its leaf."""
    leaf = f"{directory}/{HOST_LEAF}"
    try:
        os.mkdir(leaf)
    except FileExistsError:
        pass
    except OSError as e:
        raise LimitError(
            f"{directory} cannot hand out controllers: the cgroup {leaf} for its processes cannot be made: {e.strerror}",
            f"raise its cgroup.max.descendants and cgroup.max.depth, or {OWN_CGROUP}",
        ) from None
    problem = _move_all(directory, leaf)
    if problem is not None:
        pid, error = problem
        raise LimitError(
            f"process {pid} keeps {directory} from handing out controllers and cannot be moved: {error.strerror}", OWN_CGROUP
        )


def _move_all(source: str, target: str) -> tuple[str, OSError] | None:
    """Move the processes of one cgroup into another. Returns the first that could not be moved, with the reason."""
    for pid in (fs.text(f"{source}/cgroup.procs") or "").split():
        if pid == "0":  # which the kernel would take for the writer
            return pid, OSError(errno.ESRCH, "it is in another PID namespace")
        try:
            fs.write(f"{target}/cgroup.procs", pid)
        except ProcessLookupError:
            continue
        except OSError as error:
            return pid, error
    return None


def give_back(parent: str, patience: float | None = None) -> None:
    """When no job is left in ``parent``, put the processes of its leaf back and remove the leaf. Does what it can.

    Whoever made ``parent`` could not remove it otherwise. A scope of our own goes by itself.
    """
    leaf = f"{parent}/{HOST_LEAF}"
    our_scope = parent.endswith(".scope") and os.path.basename(parent).startswith(fs.PREFIX)
    if our_scope or not os.path.isdir(leaf):
        return
    try:
        with locked(parent, patience) as is_locked:
            if not is_locked or dirs.subtree(parent) != [leaf, parent]:
                return
            enabled = _words(f"{parent}/cgroup.subtree_control")
            if enabled:
                fs.write(f"{parent}/cgroup.subtree_control", " ".join(f"-{name}" for name in sorted(enabled)))
            deadline = time.monotonic() + GIVE_BACK_TIMEOUT
            while _move_all(leaf, parent) is None and not dirs.try_remove(leaf) and time.monotonic() < deadline:
                time.sleep(0.001)  # a process that is just ending is in the leaf, but not listed
    except OSError:
        return
