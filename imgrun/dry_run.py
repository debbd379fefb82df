"""``--dry-run``: the plan in words, with nothing made."""

from __future__ import annotations

from imgrun import init_shim
from imgrun.image import probe
from imgrun.isolation import limits
from imgrun.isolation.cgroups.cgroup import check_limits
from imgrun.isolation.sources import RootImage, ScratchDir, Shim
from imgrun.plan import build_plan
from imgrun.spec import JobSpec


def describe(spec: JobSpec) -> list[str]:
    """What ``start`` would do, a line each. Raises what it would refuse without touching the image's inside."""
    limits.check(spec.rlimits)
    info = probe(spec.image, spec.partition)
    notes = check_limits(spec.limits())
    sources = [RootImage(info, spec.root), ScratchDir.planned(spec.scratch_size), Shim(init_shim.program())]
    hostname = spec.hostname or spec.name or "job-ID"
    plan = build_plan(
        spec,
        hostname=hostname,
        base_sources=[*sources],
        cgroup_views=(("", "DIR"),),
        owner=None,
        host_ids=spec.userns == "off",
    )
    asked = [f"{key}={value}" for key, value in spec.limits()._asdict().items() if value not in (None, ())]
    kinds = ["mount", "PID", "UTS", "IPC", "cgroup"]
    if spec.userns == "auto":
        kinds.insert(0, "user")
    if spec.network != "host":
        kinds.append("network")
    what = " ".join(spec.command) or "the init of the image"
    return [
        f"supervisor: lock {spec.image} ({'exclusive' if spec.root == 'writable' else 'shared'})",
        f"supervisor: make the job's cgroup directories; limits: {' '.join(asked) or 'none'}",
        *(f"note: {note}" for note in notes),
        *plan.lines()[: len(plan.sources)],
        f"supervisor: make namespaces: {', '.join(kinds)}",
        *plan.lines()[len(plan.sources) :],
        f"job: set hostname {hostname}, drop capabilities, set no_new_privs" + _filter(spec),
        f"job: execute {what} as {spec.user or 'root'} in {spec.workdir or '/'}, with --init {spec.init}",
    ]


def _filter(spec: JobSpec) -> str:
    if spec.seccomp == "default":
        return ", load the system call filter"
    return ", forbid new user namespaces" if spec.userns == "off" else ""
