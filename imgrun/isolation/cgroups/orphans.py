"""Cgroups of jobs whose supervisor was killed, and of which nothing is recorded where anybody looks: found by looking.

So it is when a state directory is removed under its jobs, or never used again: that of a batch job, in a sandbox that
goes with it. What tells such a cgroup is that nobody holds it (dirs.hold), that no process is in it, and its age.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable

from imgrun.isolation.cgroups import dirs, fs
from imgrun.isolation.cgroups import place as cgroup_place

JOB = re.compile(rf"{fs.PREFIX}([0-9a-f]{{12}}|doctor-[0-9]+)")
"""The names of what :meth:`JobCgroup.create` makes, for jobs and for ``imgrun doctor``."""

DYING = 2.0
"""Seconds that a job which has been killed and thawed may take to end; the next look removes it otherwise."""


def remove_orphans(age: float = dirs.YOUNG) -> list[str]:
    """Remove the cgroups of dead jobs from every hierarchy that is mounted here. Returns the ids of the jobs."""
    found: dict[tuple[int, str], list[str]] = {}
    for mount in fs.parse_mounts(fs.read("/proc/self/mountinfo")):
        if mount.writable and (mount.version == 2 or mount.controllers) and _shows(mount):
            found[mount.device, mount.root] = dirs.subtree(mount.path)
    return remove_among([path for listed in found.values() for path in listed], age)


def _shows(mount: fs.Mount) -> bool:
    """Whether it is what its path leads to: a later mount may cover it."""
    try:
        return os.stat(mount.path).st_dev == mount.device
    except OSError:
        return False


def remove_beside(paths: Iterable[str]) -> list[str]:
    """As :func:`remove_orphans`, only of the cgroups directly beside these."""
    beside = []
    for parent in map(os.path.dirname, paths):
        try:
            beside += [f"{parent}/{name}" for name in os.listdir(parent)]
        except OSError:
            continue
    return remove_among(beside)


def remove_among(paths: list[str], age: float = dirs.YOUNG) -> list[str]:
    """Remove those of the directories that are cgroups of dead jobs, as far as they are the caller's. Of root, all are.

    What is below a path comes before it. ``age``: in seconds, how long ago they must have been made. Who was moved aside
    for them is moved back. Returns the ids of the jobs.
    """
    # All are looked at first: the time of a cgroup changes when one inside it goes.
    old = [path for path in paths if _id(path) and not dirs.young(path, age) and _may_remove(path)]
    for path in old:
        if fs.text(f"{path}/freezer.self_freezing") == "1":
            _let_die(path)
    removed = dict.fromkeys(_id(path) for path in old if _remove_one(path))
    for path in paths:
        if os.path.basename(path) == cgroup_place.HOST_LEAF:
            _give_back(os.path.dirname(path))
    return list(removed)


def _id(path: str) -> str:
    match = JOB.fullmatch(os.path.basename(path))
    return match[1] if match else ""


def _may_remove(path: str) -> bool:
    """Whether it is the caller's, or in a directory that is: a job with an init of its own owns its cgroup."""
    try:
        return os.geteuid() in (0, os.lstat(path).st_uid, os.lstat(os.path.dirname(path)).st_uid)
    except OSError:
        return False


def _let_die(path: str) -> None:
    """Thaw a job that was frozen (v1) when its supervisor was killed: its death waits for that. Another stays frozen."""
    claimed = dirs.claim(path)
    if claimed < 0:
        return
    try:
        if any(_is_killed(pid) for pid in dirs.processes(path)):
            fs.write(f"{path}/freezer.state", "THAWED")
            deadline = time.monotonic() + DYING
            while dirs.processes(path) and time.monotonic() < deadline:
                time.sleep(0.005)
    except OSError:
        pass  # it went meanwhile
    finally:
        os.close(claimed)


def _is_killed(pid: int) -> bool:
    """Whether SIGKILL is on its way to the process."""
    for line in (fs.text(f"/proc/{pid}/status") or "").splitlines():
        name, _, mask = line.partition(":")
        if name in ("SigPnd", "ShdPnd") and int(mask, 16) & 1 << signal.SIGKILL - 1:
            return True
    return False


def _remove_one(path: str) -> bool:
    claimed = dirs.claim(path)
    if claimed < 0:
        return False
    try:
        if fs.keyed(f"{path}/cgroup.events").get("populated") or dirs.processes(path):
            return False
        if any(_id(below) for below in dirs.subtree(path)[:-1]):
            return False  # a job in the job, which was not removed: it has an owner, or is young
        return dirs.try_remove(path)
    finally:
        os.close(claimed)


def _give_back(parent: str) -> None:
    """If they are the caller's own: root leaves others' processes where they are."""
    try:
        if os.lstat(parent).st_uid == os.geteuid():
            cgroup_place.give_back(parent, patience=0)
    except OSError:
        pass  # it went meanwhile
