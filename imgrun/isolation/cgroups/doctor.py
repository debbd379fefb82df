"""What ``imgrun doctor`` says of cgroups: each kind of limit and measurement, tried as a job of this caller would."""

from __future__ import annotations

import os
from typing import NamedTuple

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import fs, v1
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups.limits import Limits
from imgrun.isolation.cgroups.plan import Plan, plan


class Finding(NamedTuple):
    """One line of ``imgrun doctor``."""

    name: str
    ok: bool
    detail: str
    advice: str


def examine() -> list[Finding]:
    everything = plan(Limits(), accounting=True)
    probes = (
        ("memory limit", "memory", Limits(memory=1 << 30)),
        ("swap limit", "memory", Limits(memory=1 << 30, swap=0)),
        ("processor quota", "cpu", Limits(cpus=0.01)),
        ("processor weight", "cpu", Limits(cpu_weight=100)),
        ("processor set", "cpuset", Limits(cpuset=_first_cpu())),
        ("process limit", "pids", Limits(pids=1000)),
        ("disk weight", "io", Limits(io_weight=100)),
        ("disk rate limit", "io", Limits(io_max=(lim.IoMax("/", rbps=1 << 40),))),
    )
    findings = [_try(name, controller, limits) for name, controller, limits in probes]
    findings.append(_killing(everything))
    findings.append(_memory_accounting(everything))
    return findings


def _first_cpu() -> str:
    return str(min(os.sched_getaffinity(0)))


def _try(name: str, controller: str, limits: Limits) -> Finding:
    try:
        found = plan(limits, accounting=False)
    except LimitError as error:
        return Finding(name, False, error.message, error.hint or "")
    for tree in found.v1:
        if controller in v1.controls_of(tree.controllers):
            return Finding(name, True, f"cgroup v1, {tree.own}", "")
    where = "in a scope that systemd makes" if found.place and found.place.kind == "scope" else "here"
    return Finding(name, True, f"cgroup v2, {where}: {found.place.parent if found.place else ''}", "")


def _killing(found: Plan) -> Finding:
    name = "freeze and kill"
    if found.place is not None and found.place.kind != "none":
        return Finding(name, True, f"cgroup v2, {found.place.parent}", "")
    for tree in found.v1:
        if "freezer" in tree.controllers:
            return Finding(name, True, f"cgroup v1, {tree.own}", "")
    detail = "no cgroup of its own for a job; it is killed through its PID namespace and cannot be frozen as a whole"
    return Finding(name, False, detail, "start imgrun in a delegated cgroup, or as root")


def _memory_accounting(found: Plan) -> Finding:
    name = "memory accounting"
    if any("memory" in tree.controllers for tree in found.v1):
        return Finding(name, True, "peak and current use, cgroup v1", "")
    if found.place is None or "memory" not in found.place.controllers:
        hint = found.place.hint if found.place is not None else "mount cgroup v2"
        return Finding(name, False, "no memory controller for the job; its use is taken from its processes", hint)
    peak = fs.number(f"{found.place.parent}/memory.peak")
    detail = "peak and current use" if peak is not None else "current use; the peak depends on the kernel (5.19)"
    return Finding(name, True, f"{detail}, cgroup v2", "")
