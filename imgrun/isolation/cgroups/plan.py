"""Which hierarchies a job needs a directory in, and whether its limits can be enforced there. Changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import fs, v1
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups import place as cgroup_place
from imgrun.isolation.cgroups.limits import Limits
from imgrun.isolation.cgroups.place import Place

ACCOUNTING = frozenset(("memory", "pids", "io"))
"""What is measured for every job, where the caller may."""


class Plan(NamedTuple):
    """Where a job's directories go: for each hierarchy its tree and the controllers wanted there."""

    v1: tuple[fs.Tree, ...]
    place: Place | None
    """Where the v2 directory goes; None where v2 is not mounted."""
    v2_wanted: frozenset[str]
    notes: tuple[str, ...]


def plan(limits: Limits, accounting: bool) -> Plan:
    """Find a place for everything and check the limits against it. Changes nothing; raises LimitError, SpecError."""
    lim.validate(limits)
    required = lim.needed(limits)
    trees = fs.discover()
    unified = trees[0] if trees and trees[0].version == 2 else None
    place = None
    v1_home = {name: tree for tree in trees if tree.version == 1 for name in v1.controls_of(tree.controllers)}
    wanted = (ACCOUNTING if accounting else frozenset()) | required.keys()
    v2_wanted = wanted - v1_home.keys()
    if unified is not None:
        place = cgroup_place.choose(unified, v2_wanted)
    notes: list[str] = []
    for controller, options in required.items():
        if controller in v1_home:
            _check_v1_access(v1_home[controller], options)
            notes += v1.check(v1_home[controller], limits, controller)
        elif unified is not None and place is not None and not bound_to_v1(controller):
            cgroup_place.check(unified, place, limits, controller, options)
        else:
            raise _missing(controller, options)
    if place is None or place.kind == "none":
        wanted |= {"freeze", "cpuacct"}
    chosen = dict.fromkeys(
        tree
        for name, tree in v1_home.items()
        if name in required or (name in wanted and tree.writable and fs.may_write(tree.own))
    )
    return Plan(tuple(chosen), place, v2_wanted, tuple(dict.fromkeys(notes)))


def _check_v1_access(tree: fs.Tree, options: list[str]) -> None:
    if not tree.writable:
        raise LimitError(
            f"{' and '.join(options)} cannot be enforced: {tree.mount} is mounted read-only",
            "let the outer container have a writable cgroup mount",
        )
    if not fs.may_write(tree.own):
        raise LimitError(
            f"{' and '.join(options)} cannot be enforced: no permission to make a cgroup in {tree.own}",
            "run as root, or ask an administrator for a directory there that belongs to you",
        )


def _v1_name(controller: str) -> str:
    return "blkio" if controller == "io" else controller


def bound_to_v1(controller: str) -> bool:
    """Whether the kernel has the controller in a v1 hierarchy (``NAME HIERARCHY CGROUPS ENABLED``), so not in v2."""
    for line in (fs.text("/proc/cgroups") or "").splitlines():
        words = line.split("\t")
        if words[0] == _v1_name(controller) and len(words) == 4:
            return words[1] != "0"
    return False


def _missing(controller: str, options: list[str]) -> LimitError:
    name = _v1_name(controller)
    advice = f"mount it: mount -t cgroup -o {name} cgroup /sys/fs/cgroup/{name}; or use a host with cgroup v2"
    for line in (fs.text("/proc/cgroups") or "").splitlines():
        if line.startswith(f"{name}\t") and line.endswith("\t0"):
            advice = f"it is switched off: boot the kernel with cgroup_enable={name}"
    return LimitError(
        f"{' and '.join(options)} cannot be enforced: no cgroup hierarchy with the {name} controller is visible here",
        advice,
    )
