"""A scope of our own from systemd, so that the job's cgroup is ours by systemd's rules (org.freedesktop.systemd1(5)).

Imported only where a job starts in a login session under systemd.
"""

from __future__ import annotations

import os
import subprocess
import time

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import fs

MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")

TIMEOUT = 10.0


def scope_command(name: str, pid: int, slice_name: str | None, *, user: bool) -> list[str]:
    """The busctl call of StartTransientUnit that puts ``pid`` into a delegated scope."""
    properties = ["Description", "s", "imgrun job", "PIDs", "au", "1", str(pid), "Delegate", "b", "true"]
    properties += ["CollectMode", "s", "inactive-or-failed"]
    count = 4
    if slice_name is not None:
        properties += ["Slice", "s", slice_name]
        count += 1
    return [
        *("busctl", "--user" if user else "--system", "--quiet", f"--timeout={int(TIMEOUT)}", "call"),
        *(*MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))"),
        *(name, "fail", str(count), *properties, "0"),
    ]


def start_scope(job_id: str, slice_name: str | None) -> None:
    """Move this process into the new scope ``imgrun-JOBID.scope`` with ``Delegate=yes``, and wait until it is there.

    ``slice_name``: the slice to put it in, so that the limits of that slice go on holding; None for the manager's
    default. The scope ends when its last process does. Raises LimitError.
    """
    user = os.geteuid() != 0
    name = f"{fs.PREFIX}{job_id}.scope"
    problem = _call(scope_command(name, os.getpid(), slice_name, user=user))
    deadline = time.monotonic() + TIMEOUT
    # The call only queues the move.
    while not problem and not fs.parse_membership(fs.read("/proc/self/cgroup")).get("", "").endswith(f"/{name}"):
        if time.monotonic() > deadline:
            problem = "it was asked, but nothing happened"
        time.sleep(0.001)
    if problem:
        raise LimitError(
            f"systemd did not make a scope for the job: {problem.splitlines()[0]}",
            f"start imgrun in one: systemd-run {'--user ' if user else ''}--scope -p Delegate=yes imgrun ...",
        )


def attach_command(unit: str, below: str, pid: int, *, user: bool) -> list[str]:
    """The busctl call of AttachProcessesToUnit that puts ``pid`` into the unit's cgroup ``below``."""
    return [
        *("busctl", "--user" if user else "--system", "--quiet", f"--timeout={int(TIMEOUT)}", "call"),
        *(*MANAGER, "AttachProcessesToUnit", "ssau", unit, below, "1", str(pid)),
    ]


def join_unit(unit: str, below: str) -> str:
    """Move this process into the cgroup ``below`` (``/NAME``) of a delegated unit. Returns why not; empty if it is there.

    The kernel lets a user move no process out of a session's scope, which is root's; systemd does it for him.
    """
    return _call(attach_command(unit, below, os.getpid(), user=os.geteuid() != 0))


def _call(command: list[str]) -> str:
    """Run busctl; what it complained of, or nothing."""
    environment = dict(os.environ)
    if os.geteuid() != 0:
        environment.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT + 1, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.decode(errors="replace").strip() or "busctl failed") if done.returncode else ""
