"""What jobs could leave behind on a machine, as far as it is of this test session.

Other sessions may run beside this one, so what is found is told apart by the session's temporary directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from imgrun.isolation.cgroups.orphans import remove_orphans

PATIENCE = 60.0
"""Seconds that the kernel and supervisors get to clean up what has ended."""


class Leaks:
    """Looks for what is left. ``base`` is the directory below which images and state directories lie."""

    def __init__(self, base: Path, owners: Collection[int] = (0,)) -> None:
        """``owners`` are the users whose cgroups the jobs of this session have theirs in."""
        self.base = str(base)
        self._owners = owners
        # In a mount table paths are relative to their file system, which may be mounted anywhere above the base.
        self.mark = f"/{base.parent.name}/{base.name}/"
        remove_orphans()  # of sessions that were killed
        self._reported: set[str] = set(cgroups())

    def left(self) -> list[str]:
        """A line for each thing that should not be there (any more)."""
        return [*self._loops(), *self._mounts(), *self._processes(), *self._cgroups()]

    def check(self) -> None:
        """Fail if anything stays."""
        deadline = time.monotonic() + PATIENCE
        while left := [line for line in self.left() if line not in self._reported]:
            if time.monotonic() > deadline:
                # The tests after this one are not to blame.
                self._reported.update(left)
                raise AssertionError("left behind:\n" + "\n".join(left))
            time.sleep(0.02)

    def _loops(self) -> Iterator[str]:
        for device, name in loops_of(self.base).items():
            yield f"{device}, a loop device of {name}"

    def _mounts(self) -> Iterator[str]:
        for line in read(Path("/proc/self/mountinfo")).splitlines():
            if self.mark in line or " imgrun " in line:
                yield f"a mount: {line}"

    def _processes(self) -> Iterator[str]:
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if self.owns(pid):
                words = read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")
                yield f"process {pid}: {read(Path(f'/proc/{pid}/comm')).strip()}: {words}"

    def owns(self, pid: int) -> bool:
        """Whether a process is of a job of this session, or of imgrun's own for one."""
        if pid == os.getpid():
            return False
        environment = read(Path(f"/proc/{pid}/environ"))
        if f"IMGRUN_STATE_DIR={self.base}" in environment:
            # The shell of a test is not a leak, imgrun is.
            return "imgrun" in read(Path(f"/proc/{pid}/cmdline"))
        try:
            if os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino:
                return False
        except OSError:
            return False
        return self.mark in read(Path(f"/proc/{pid}/mountinfo"))

    def _cgroups(self) -> Iterator[str]:
        for path in cgroups():
            # Those of other sessions come and go with processes in them; in another user's cgroups also without, for a while.
            if owner(os.path.dirname(path)) in self._owners and not has_foreign_processes(path, self):
                yield path


def loops_of(place: str | Path) -> dict[str, str]:
    """The loop devices whose file is, or is in, ``place``, and those files."""
    files = {device.name: read(device / "loop/backing_file").strip() for device in Path("/sys/block").glob("loop*")}
    return {name: file for name, file in files.items() if file.startswith(str(place))}


def cgroups() -> Iterator[str]:
    """All cgroup directories of jobs, in every hierarchy."""
    for line in read(Path("/proc/self/mountinfo")).splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind not in ("cgroup", "cgroup2"):
            continue
        for path, names, _ in os.walk(fields[4]):
            yield from (f"{path}/{name}" for name in names if name.startswith("imgrun-") and name != "imgrun-host")
            names[:] = [name for name in names if not name.startswith("imgrun-")]


def has_foreign_processes(cgroup: str, leaks: Leaks) -> bool:
    pids = [int(pid) for pid in read(Path(cgroup) / "cgroup.procs").split()]
    return bool(pids) and not any(leaks.owns(pid) for pid in pids)


def owner(path: str) -> int:
    """The user whose it is; -1 when it has gone."""
    try:
        return os.stat(path).st_uid
    except OSError:
        return -1


def read(path: Path) -> str:
    """The text of a file of the kernel's, empty when it has gone."""
    try:
        return path.read_bytes().decode(errors="surrogateescape")
    except OSError:
        return ""
