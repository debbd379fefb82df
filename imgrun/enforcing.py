"""The limits that a spec asks for, as they are enforced: all of them, or with ``best-effort`` those that can be.

What cannot be is added to the ``warnings`` of the job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgrun.errors import LimitError
from imgrun.isolation.cgroups.cgroup import JobCgroup, Limits, check_limits
from imgrun.spec import JobSpec

if TYPE_CHECKING:
    from imgrun.accounting.holding import Hold
    from imgrun.state import JobDir


def asked_for(spec: JobSpec, warnings: list[str]) -> Limits:
    """The limits to be enforced."""
    asked = spec.limits()
    if spec.limits_mode != "best-effort":
        return asked
    for field in Limits._fields:
        value = getattr(asked, field)
        if value is None or value == ():
            continue
        try:
            check_limits(Limits(**{field: value}))
        except LimitError as e:
            warnings.append(f"without the limit: {e.message}")
            asked = Limits(**{**asked._asdict(), field: () if field == "io_max" else None})
    return asked


def change(cgroup: JobCgroup, was: JobSpec, spec: JobSpec, warnings: list[str]) -> list[str]:
    """Enforce the limits of ``spec`` from now on. Returns caveats; raises LimitError, with those that ``was`` has."""
    asked = asked_for(spec, warnings)
    try:
        return list(cgroup.set_limits(asked))
    except LimitError:
        try:
            cgroup.set_limits(was.limits())
        except LimitError:
            pass  # one that could not be enforced from the beginning
        raise


def hold_when_full(job: JobDir, spec: JobSpec, cgroup: JobCgroup, warnings: list[str]) -> Hold | None:
    """For ``--oom hold``, from now on. Raises LimitError."""
    if spec.oom != "hold":
        return None
    from imgrun.accounting.holding import Hold

    try:
        return Hold(job, cgroup)
    except LimitError as e:
        if spec.limits_mode != "best-effort":
            raise
        warnings.append(f"it is not held at its memory limit: {e.message}")
        return None
