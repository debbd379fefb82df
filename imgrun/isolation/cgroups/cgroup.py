"""The cgroups of a job: one directory in each hierarchy that is needed, v1, v2 or both, behind one interface.

A host has each controller in exactly one place: bound to a v1 hierarchy, or in v2. What is made for a job:

- in v2, where it is mounted, always a directory: it kills and freezes without a race, counts CPU time and pressure, and
  is what perf_event_open(2) takes; with it the v1 hierarchies ``freezer`` and ``cpuacct`` are not needed;
- for accounting, ``memory``, ``pids`` and ``io`` (v1: ``blkio``), as far as the caller may;
- ``cpu`` and ``cpuset`` only for a limit, since being in a group of its own changes how a job competes for processors.

A limit that cannot be enforced is a LimitError, raised before anything was changed. What cannot be measured is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from imgrun.errors import HostError, LimitError
from imgrun.isolation.cgroups import dirs, fs, v1, v2
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups import place as cgroup_place
from imgrun.isolation.cgroups.limits import IoMax, Limits
from imgrun.isolation.cgroups.memory import JobMemory
from imgrun.isolation.cgroups.plan import bound_to_v1, plan
from imgrun.isolation.cgroups.usage import CgroupUsage, MemoryEvents

__all__ = [
    "CgroupUsage",
    "IoMax",
    "JobCgroup",
    "Limits",
    "MemoryEvents",
    "check_limits",
    "remove_leftovers",
    "reopen",
]

Directory = v1.V1Directory | v2.V2Directory


def check_limits(limits: Limits) -> tuple[str, ...]:
    """Find out whether this host can enforce ``limits`` for a job of this caller, without changing anything.

    Returns sentences about limits that hold with a restriction. Raises LimitError (which limit, why not, what to do)
    and SpecError for values that no host could take.
    """
    return plan(limits, accounting=False).notes


class JobCgroup:
    """The cgroup directories of one job."""

    def __init__(self, directories: Iterable[Directory], held: Iterable[int] = ()) -> None:
        self._directories = tuple(directories)
        self._held = list(held)
        self._clone_fd = -1
        self.memory = JobMemory(lambda: self._with("memory"))

    @classmethod
    def create(
        cls,
        job_id: str,
        limits: Limits,
        *,
        accounting: bool = True,
        announce: Callable[[list[str]], None] = lambda paths: None,
    ) -> JobCgroup:
        """Make the job's directories and write the limits, before any process is in them.

        ``announce`` is called with the paths before they are made, so that they can be recorded and removed later
        whatever happens to the caller. They are held (dirs.hold) until ``remove``. ``accounting``: also where no limit asks
        for it. In a login session under systemd the caller itself moves into a scope of its own. When anything fails,
        nothing stays. What dead jobs left beside them is removed.

        Raises LimitError, SpecError, StartError.
        """
        places = plan(limits, accounting)
        name = fs.PREFIX + job_id
        required = bool(places.v2_wanted & lim.needed(limits).keys())
        place = cgroup_place.settle(places.place, required, job_id)
        directories: list[Directory] = [v1.V1Directory(f"{tree.own}/{name}", tree.controllers) for tree in places.v1]
        if place is not None:
            directories.insert(0, v2.V2Directory(f"{place.parent}/{name}"))
        announce([directory.path for directory in directories])
        made: list[Directory] = []
        held: list[int] = []
        try:
            for directory in directories:
                if directory.version == 2 and place is not None:
                    cgroup_place.make(directory.path, place, places.v2_wanted, required)
                else:
                    dirs.make(directory.path)
                made.append(directory)
                held.append(dirs.hold(directory.path))
                directory.prepare()
                directory.apply(limits)
            job = cls(made, held)
            job._refuse_missing(limits)
            job.memory.event_source()  # what happens from the first process on is known to have happened
        except BaseException:
            try:
                cls(made, held).remove()
            except HostError:
                pass  # announced, so it is found and removed later
            raise
        if made and dirs.orphan_beside(made[0].path):
            from imgrun.isolation.cgroups import orphans

            orphans.remove_beside(job.paths)
        return job

    def _refuse_missing(self, limits: Limits) -> None:
        have = frozenset[str]().union(*(directory.controls for directory in self._directories))
        for controller, options in lim.needed(limits).items():
            if controller not in have:
                raise LimitError(
                    f"{' and '.join(options)} cannot be enforced: the kernel did not hand out {controller} to the job",
                    "see `imgrun doctor`",
                )

    # ---- entering

    @property
    def paths(self) -> tuple[str, ...]:
        """The directories, to be recorded; ``reopen`` and ``remove_leftovers`` take them."""
        return tuple(directory.path for directory in self._directories)

    @property
    def views(self) -> tuple[tuple[str, str], ...]:
        """(name below /sys/fs/cgroup, directory) of each, as programs inside the job look for them.

        The name is empty where v2 is all there is, and the mount point itself then.
        """
        return tuple(
            (",".join(one.controllers), one.path)
            if isinstance(one, v1.V1Directory)
            else ("unified" if len(self._directories) > 1 else "", one.path)
            for one in self._directories
        )

    def delegate(self, uid: int, gid: int) -> None:
        """Let a user, such as the job's root, divide the job's v2 cgroup further. v1 cannot be delegated safely."""
        unified = self._unified()
        if unified is not None:
            unified.delegate(uid, gid)

    @property
    def clone_into(self) -> int:
        """A descriptor of the v2 directory for clone3(2) with CLONE_INTO_CGROUP, or -1. It belongs to this object."""
        unified = self._unified()
        if self._clone_fd < 0 and unified is not None:
            self._clone_fd = os.open(unified.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._clone_fd

    def enter_beside(self, pid: int) -> bool:
        """Have ``clone_into`` be the v2 cgroup that this process of the job's is in, below the job's. Whether it is.

        A cgroup whose controllers are handed out further takes no processes (cgroups(7), no internal processes): EBUSY.
        """
        unified = self._unified()
        lines = (fs.text(f"/proc/{pid}/cgroup") or "").splitlines()
        own = next((line for line in lines if line.startswith("0::")), "")
        if unified is None or not (below := own.partition(f"/{os.path.basename(unified.path)}/")[2]):
            return False
        try:
            fd = os.open(f"{unified.path}/{below}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # the process has gone, and its cgroup with it
            return False
        self.close()
        self._clone_fd = fd
        return True

    def stir(self) -> bool:
        """Have the kernel give the v2 cgroup its place in perf_event_open(2), which below a new root it has not (ENOENT).

        The root's list of controllers has to be changed once for that. Whether it was: never where somebody keeps such a list.
        """
        unified = self._unified()
        parent = None if unified is None else os.path.dirname(unified.path)
        if parent is None or fs.text(f"{parent}/cgroup.subtree_control") != "":
            return False
        try:
            name = min((fs.text(f"{parent}/cgroup.controllers") or "").split(), default=None)
            if name is None or os.path.exists(f"{parent}/cgroup.type"):
                return False
            for sign in "+-":
                fs.write(f"{parent}/cgroup.subtree_control", f"{sign}{name}")
        except OSError:
            return False
        return True

    def join_descriptors(self) -> list[int]:
        """Descriptors of the v1 ``tasks`` files. A process with one thread that writes ``b"0"`` to each enters the job.

        The kernel judges by the credentials of whoever opened them, and a thread that moves itself waits for nobody
        (about 0.05 ms; a write to ``cgroup.procs`` takes 12 ms). The caller closes them.
        """
        descriptors: list[int] = []
        try:
            for directory in self._directories:
                if directory.version == 1:
                    descriptors.append(os.open(f"{directory.path}/tasks", os.O_WRONLY | os.O_CLOEXEC))
        except BaseException:
            for fd in descriptors:
                os.close(fd)
            raise
        return descriptors

    def processes(self) -> set[int]:
        """The processes of the job, in nested cgroups too; 0 stands for those that this PID namespace does not show."""
        return dirs.processes(self._directories[0].path) if self._directories else set()

    def close(self) -> None:
        """Close the descriptors that this object holds. The directories stay."""
        self.memory.close()
        if self._clone_fd >= 0:
            os.close(self._clone_fd)
        self._clone_fd = -1

    # ---- measuring

    def usage(self) -> CgroupUsage:
        """What the job used so far. Readable until ``remove``, also after its last process has ended."""
        usage = CgroupUsage()
        for directory in self._directories:
            usage = usage.or_else(directory.usage())
        return usage

    # ---- controlling

    def stop_all(self) -> bool:
        """Have every process stop, without waiting: one that waits for memory stops when it has got it.

        Whether there is a cgroup that can. ``thaw`` lets them go on.
        """
        directory = self._with("freeze")
        if directory is None:
            return False
        directory.begin_freeze()
        return True

    def freeze(self, timeout: float = 10.0) -> None:
        """Stop every process of the job and return when all have stopped. Raises HostError, with the job running on."""
        directory = self._with("freeze")
        if directory is None:
            raise HostError("the job cannot be frozen: it has no cgroup that can", "see `imgrun doctor`")
        if not directory.freeze(timeout):
            directory.thaw(timeout)
            raise HostError(
                f"the job's processes did not all stop within {timeout:g} s",
                "one of them may be waiting for a disk or a file server; try again later",
            )

    def thaw(self, timeout: float = 10.0) -> None:
        """Let the job run on. Raises HostError if it stays frozen, as when an enclosing cgroup is frozen."""
        directory = self._with("freeze")
        if directory is not None and not directory.thaw(timeout):
            raise HostError("the job stays frozen: a cgroup above it is frozen too", "thaw that one")

    def kill(self, timeout: float = 10.0) -> None:
        """Kill every process of the job, those that it forks meanwhile included, and return when none is left.

        Safe on a frozen job. Raises HostError for processes that do not die.
        """
        import time

        unified = self._unified()
        killed = unified is not None and unified.kill()
        freezer = next((one for one in self._directories if one.version == 1 and "freeze" in one.controls), None)
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while True:
            if freezer is not None and not killed:
                # Frozen, nothing can fork; the signal takes effect on thawing.
                self._attempt(lambda: freezer.freeze(0.1))
            left = sum(dirs.signal_all(directory.path, 9) for directory in self._directories)
            if freezer is not None:
                self._attempt(lambda: freezer.thaw(0.1))
            if not left and not any(self._busy(directory) for directory in self._directories):
                return
            if time.monotonic() > deadline:
                pids = " ".join(map(str, sorted(self.processes() - {os.getpid()})))
                raise HostError(f"processes of the job do not die: {pids}", "they may hang in a disk or a file server")
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    @staticmethod
    def _attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:  # the directory is gone
            pass

    @staticmethod
    def _busy(directory: Directory) -> bool:
        return bool(dirs.processes(directory.path) - {os.getpid()})

    def set_limits(self, limits: Limits) -> tuple[str, ...]:
        """Change the limits of the running job to exactly these: one that is None is taken back.

        Returns caveats as ``check_limits`` does. Raises LimitError; limits that were written before the one that failed
        stay, so call it with the old ones to undo. On v1 a job that was started without --cpus and --cpu-weight, or
        without --cpuset, has no directory for them and cannot get one.
        """
        lim.validate(limits)
        notes: list[str] = []
        for controller, options in lim.needed(limits).items():
            directory = self._with(controller)
            if directory is None and self._unified() is not None and not bound_to_v1(controller):
                continue
            if directory is None:
                raise LimitError(
                    f"{' and '.join(options)} cannot be set while the job runs: it was started without",
                    "start the job, or restore it from a checkpoint, with the option",
                )
            if isinstance(directory, v1.V1Directory):
                parent = os.path.dirname(directory.path)
                mount = fs.mount_of(directory.path, fs.parse_mounts(fs.read("/proc/self/mountinfo")))
                root = parent if mount is None else mount.path
                notes += v1.check(fs.Tree(1, (), root, parent, True), limits, controller)
        for directory in self._directories:
            directory.apply(limits, live=True)
        self._refuse_missing(limits)
        self.memory.levels()  # it may have got that controller only now
        return tuple(notes)

    def remove(self, timeout: float = 2.0) -> None:
        """Remove the directories, with those that the job itself made inside them. They must have no processes.

        Harmless when some or all are gone. Raises HostError naming what is still in use after ``timeout`` seconds.
        """
        self.close()
        try:
            busy = [directory.path for directory in self._directories if not dirs.try_remove(directory.path)]
            if busy:
                dirs.remove_patiently(busy, timeout)
        finally:
            while self._held:
                if (fd := self._held.pop()) >= 0:
                    os.close(fd)
        unified = self._unified()
        if unified is not None:
            cgroup_place.give_back(os.path.dirname(unified.path))

    def _with(self, controller: str) -> Directory | None:
        return next((one for one in self._directories if controller in one.controls), None)

    def _unified(self) -> v2.V2Directory | None:
        first = self._directories[0] if self._directories else None
        return first if isinstance(first, v2.V2Directory) else None


def reopen(paths: Iterable[str]) -> JobCgroup:
    """The cgroups of a job from its recorded paths, for another process. Directories that are gone are left out.

    A path that is not one of imgrun's directories in a cgroup file system is ignored, whatever the record says.
    """
    mounts = fs.parse_mounts(fs.read("/proc/self/mountinfo"))
    directories: list[Directory] = []
    for path in paths:
        mount = fs.mount_of(path, mounts)
        name = os.path.basename(path)
        if mount is None or not name.startswith(fs.PREFIX) or name == cgroup_place.HOST_LEAF:
            continue
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if status.st_dev != mount.device:
            continue
        if mount.version == 2:
            unified = v2.V2Directory(path)
            unified.look()
            directories.insert(0, unified)
        else:
            directories.append(v1.V1Directory(path, mount.controllers))
    return JobCgroup(directories)


def remove_leftovers(paths: Iterable[str]) -> None:
    """Kill whatever is left of a dead job and remove its directories. Raises HostError if that fails."""
    job = reopen(paths)
    job.kill()
    job.remove()
