"""What a job keeps in memory file systems: saved, and put back, by a process in its mount namespace, as tar archives.

CRIU does not save what mounts hold.
"""

from __future__ import annotations

import tarfile
from typing import Any

from imgrun.checkpoints.criu_process import IMAGES
from imgrun.spec import JobSpec


def places(spec: JobSpec) -> list[str]:
    """The memory file systems that the job could write to."""
    return ["/dev/shm", *(mount.dst for mount in spec.mounts if mount.type == "tmpfs")]


def save(places: list[str]) -> None:
    _no_name_service()
    for number, place in enumerate(places):
        with tarfile.open(f"{IMAGES}/memory-{number}.tar", "w") as tar:
            tar.add(place, ".")


def restore(places: list[str]) -> None:
    _no_name_service()
    for number, place in enumerate(places):
        with tarfile.open(f"{IMAGES}/memory-{number}.tar") as tar:
            # All of it as it was; what it can do wrong it does inside the job, with the job's rights.
            tar.extraction_filter = lambda member, _path: member
            tar.extractall(place, numeric_owner=True)


def _no_name_service() -> None:
    """Names of users would be looked up by libraries of the job's own root."""
    module: Any = tarfile
    module.pwd = module.grp = None
