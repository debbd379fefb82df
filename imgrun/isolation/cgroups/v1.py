"""cgroup v1: one directory per hierarchy, below the caller's own, so that the caller's limits hold for the job too.

Source: the kernel's Documentation/admin-guide/cgroup-v1/, memory.rst, blkio-controller.rst, cpusets.rst,
freezer-subsystem.rst, pids.rst and cpuacct.rst, and Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os
import time

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import dirs, fs
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups.limits import Limits
from imgrun.isolation.cgroups.usage import CgroupUsage, MemoryEvents

UNLIMITED = -1
LARGEST_CHARGE = 8 * os.sysconf("SC_PAGE_SIZE")
"""Bytes at once for which the kernel kills, at the most (PAGE_ALLOC_COSTLY_ORDER in include/linux/mmzone.h)."""

THROTTLE = (
    ("rbps", "blkio.throttle.read_bps_device"),
    ("wbps", "blkio.throttle.write_bps_device"),
    ("riops", "blkio.throttle.read_iops_device"),
    ("wiops", "blkio.throttle.write_iops_device"),
)


def controls_of(controllers: tuple[str, ...]) -> frozenset[str]:
    """The controllers of a hierarchy under the names that v2 has for them."""
    return frozenset({"blkio": "io", "freezer": "freeze"}.get(name, name) for name in controllers)


def was_full(peak: int | None, limit: int | None) -> bool:
    """Whether something can have been refused for this limit, by the most that was ever held; both in bytes."""
    return peak is not None and limit is not None and peak + LARGEST_CHARGE > limit


# ---- before anything is changed ---------------------------------------------------------------------------------


def check(tree: fs.Tree, limits: Limits, controller: str) -> list[str]:
    """Raise LimitError if what ``limits`` asks of ``controller`` cannot be had in this hierarchy; return caveats."""
    if controller == "memory" and limits.swap is not None:
        _check_swap(tree, limits)
    elif controller == "cpu" and limits.cpus is not None:
        _check_cpus(tree, limits.cpus)
    elif controller == "cpuset" and limits.cpuset is not None:
        _check_cpuset(tree, limits.cpuset)
    elif controller == "io":
        return _check_io(tree, limits)
    return []


def _check_swap(tree: fs.Tree, limits: Limits) -> None:
    if not os.path.exists(f"{tree.own}/memory.memsw.limit_in_bytes"):
        raise LimitError(
            "--swap cannot be enforced: this kernel does not count swap for each cgroup",
            "boot it with swapaccount=1, or leave --swap out",
        )
    if limits.memory is None:
        raise LimitError("--swap needs --memory here: cgroup v1 limits only the sum of memory and swap", "add --memory SIZE")


def _check_cpus(tree: fs.Tree, cpus: float) -> None:
    path = tree.own
    while True:
        allowed = fs.number(f"{path}/cpu.cfs_quota_us") or UNLIMITED
        period = fs.number(f"{path}/cpu.cfs_period_us")
        if allowed > 0 and period and cpus > allowed / period:
            raise LimitError(
                f"--cpus {cpus:g} is more than the {allowed / period:g} that imgrun itself may use ({path})",
                "ask for no more than that, or ask the batch system for more",
            )
        if path == tree.mount or "/" not in path[1:]:
            return
        path = os.path.dirname(path)


def _check_cpuset(tree: fs.Tree, cpuset: str) -> None:
    allowed = fs.text(f"{tree.own}/cpuset.effective_cpus") or fs.text(f"{tree.own}/cpuset.cpus") or ""
    lim.refuse_foreign_cpus(cpuset, allowed, tree.own)
    if not _mems(tree.own):
        raise LimitError(
            f"--cpuset cannot be enforced: {tree.own}/cpuset.mems is empty",
            f"let an administrator fill it: cat /sys/devices/system/node/online > {tree.own}/cpuset.mems",
        )


def _mems(directory: str) -> str:
    return fs.text(f"{directory}/cpuset.effective_mems") or fs.text(f"{directory}/cpuset.mems") or ""


def _check_io(tree: fs.Tree, limits: Limits) -> list[str]:
    notes = []
    if limits.io_weight is not None:
        # A hierarchy's root has the statistics of BFQ only; the weight is in its children.
        if not any(os.path.exists(f"{tree.own}/blkio.bfq.{name}") for name in ("weight", "io_service_bytes")):
            raise LimitError(
                "--io-weight cannot be enforced: this kernel has no BFQ scheduler for disks",
                "use --io-max, or a kernel with CONFIG_BFQ_GROUP_IOSCHED",
            )
        if not lim.weighted_disks():
            raise lim.no_weighted_disk()
    if limits.io_max:
        if not os.path.exists(f"{tree.own}/{THROTTLE[0][1]}"):
            raise LimitError(
                "--io-max cannot be enforced: this kernel cannot throttle disks",
                "it needs CONFIG_BLK_DEV_THROTTLING",
            )
        for entry in limits.io_max:
            lim.disk_of(entry.device)
            if entry.wbps is not None or entry.wiops is not None:
                notes.append(
                    f"--io-max {entry.device}: with cgroup v1 the limits of writing hold for direct and synchronous "
                    "writes, not for what the kernel writes back from memory later"
                )
    return notes


# ---- the job's directory ------------------------------------------------------------------------------------------


class V1Directory:
    """The job's directory in one v1 hierarchy."""

    version = 1

    def __init__(self, path: str, controllers: tuple[str, ...]) -> None:
        self.path = path
        self.controllers = controllers
        self.controls = controls_of(controllers)

    def prepare(self) -> None:
        """Make the new directory able to take processes: a cpuset starts empty, and nothing may enter it so."""
        if "cpuset" in self.controls:
            parent = os.path.dirname(self.path)
            fs.write(f"{self.path}/cpuset.mems", _mems(parent))
            cpus = fs.text(f"{parent}/cpuset.effective_cpus") or fs.text(f"{parent}/cpuset.cpus") or ""
            fs.write(f"{self.path}/cpuset.cpus", cpus)

    def apply(self, limits: Limits, *, live: bool = False) -> None:
        """Write the limits. ``live``: also take back those that ``limits`` does not have. Raises LimitError."""
        if "memory" in self.controls:
            self._apply_memory(limits, live)
        if "cpu" in self.controls:
            self._apply_cpu(limits, live)
        if "cpuset" in self.controls and limits.cpuset is not None:
            lim.put(self.path, "cpuset.cpus", limits.cpuset, "--cpuset")
        elif "cpuset" in self.controls and live:
            self.prepare()
        if "pids" in self.controls and (limits.pids is not None or live):
            lim.put(self.path, "pids.max", "max" if limits.pids is None else str(limits.pids), "--pids")
        if "io" in self.controls:
            self._apply_io(limits, live)

    def _apply_memory(self, limits: Limits, live: bool) -> None:
        if limits.memory is None and not live:
            return
        memory = UNLIMITED if limits.memory is None else limits.memory
        total = UNLIMITED if limits.memory is None or limits.swap is None else limits.memory + limits.swap
        writes = [("memory.limit_in_bytes", memory, "--memory")]
        current = fs.number(f"{self.path}/memory.memsw.limit_in_bytes")
        if current is not None and (limits.swap is not None or live):
            # The sum may never be less than the memory alone, at no step.
            raising = memory == UNLIMITED or memory > current
            writes.insert(0 if raising else 1, ("memory.memsw.limit_in_bytes", total, "--swap"))
        for name, value, option in writes:
            lim.put(self.path, name, str(value), option)

    def _apply_cpu(self, limits: Limits, live: bool) -> None:
        if limits.cpus is not None:
            quota, period = lim.quota(limits.cpus)
            if fs.number(f"{self.path}/cpu.cfs_period_us") != period:
                # With the old quota a new period could ask for more than the parent has.
                lim.put(self.path, "cpu.cfs_quota_us", str(UNLIMITED), "--cpus")
                lim.put(self.path, "cpu.cfs_period_us", str(period), "--cpus")
            lim.put(self.path, "cpu.cfs_quota_us", str(quota), "--cpus")
        elif live:
            lim.put(self.path, "cpu.cfs_quota_us", str(UNLIMITED), "--cpus")
        if limits.cpu_weight is not None or live:
            lim.put(self.path, "cpu.shares", str(lim.shares(limits.cpu_weight or 100)), "--cpu-weight")

    def _apply_io(self, limits: Limits, live: bool) -> None:
        if limits.io_weight is not None or (live and os.path.exists(f"{self.path}/blkio.bfq.weight")):
            lim.put(self.path, "blkio.bfq.weight", str(lim.bfq_weight(limits.io_weight or 100)), "--io-weight")
        rules: dict[tuple[str, str], int] = {}
        for entry in limits.io_max:
            disk = lim.disk_of(entry.device)
            for key, file in THROTTLE:
                rate = getattr(entry, key)
                if rate is not None:
                    rules[file, disk] = rate
        if live:
            for _, file in THROTTLE:
                for line in (fs.text(f"{self.path}/{file}") or "").splitlines():
                    rules.setdefault((file, line.split(" ")[0]), 0)  # 0 takes the rule away
        for (file, disk), rate in rules.items():
            lim.put(self.path, file, f"{disk} {rate}", "--io-max")

    # ---- reading

    def usage(self) -> CgroupUsage:
        values: dict[str, int | float | None] = {}
        if "cpuacct" in self.controls:
            values["user_seconds"], values["system_seconds"] = self._cpu()
        if "memory" in self.controls:
            stat = fs.keyed(f"{self.path}/memory.stat")
            values.update(
                memory_current=fs.number(f"{self.path}/memory.usage_in_bytes"),
                memory_peak=fs.number(f"{self.path}/memory.max_usage_in_bytes"),
                memory_anon=stat.get("total_rss"),
                memory_file=stat.get("total_cache"),
                memory_shmem=stat.get("total_shmem"),
                memory_kernel=fs.number(f"{self.path}/memory.kmem.usage_in_bytes"),
                swap_current=stat.get("total_swap"),
            )
        if "pids" in self.controls:
            values.update(
                pids_current=fs.number(f"{self.path}/pids.current"),
                pids_peak=fs.number(f"{self.path}/pids.peak"),
                pids_refused=fs.keyed(f"{self.path}/pids.events").get("max"),
            )
        if "cpu" in self.controls and (fs.number(f"{self.path}/cpu.cfs_quota_us") or 0) > 0:
            stat = fs.keyed(f"{self.path}/cpu.stat")
            throttled = stat.get("throttled_time")
            values.update(
                periods=stat.get("nr_periods"),
                throttled_periods=stat.get("nr_throttled"),
                throttled_seconds=None if throttled is None else throttled / 1e9,
            )
        if "io" in self.controls:
            values["read_bytes"], values["written_bytes"] = self._io("io_service_bytes")
            values["read_operations"], values["write_operations"] = self._io("io_serviced")
        return CgroupUsage(**values)  # type: ignore[arg-type]

    def _cpu(self) -> tuple[float | None, float | None]:
        """The exact sum, divided as the sampled ticks are: the kernel does the same for a process."""
        total = fs.number(f"{self.path}/cpuacct.usage")
        ticks = fs.keyed(f"{self.path}/cpuacct.stat")
        if total is None or "user" not in ticks or "system" not in ticks:
            return None, None
        system = ticks["system"] / max(ticks["user"] + ticks["system"], 1)
        return total * (1 - system) / 1e9, total * system / 1e9

    def _io(self, name: str) -> tuple[int | None, int | None]:
        """Sums over the disks of the lines ``MAJOR:MINOR Read N`` and ``... Write N``.

        The kernel counts v1 traffic only on disks for which somebody, somewhere, has set a throttle (since 6.10), so a
        file without any disk says nothing, and is not taken for zero.
        """
        sums: dict[str, int] = {}
        for line in (fs.text(f"{self.path}/blkio.throttle.{name}_recursive") or "").splitlines():
            words = line.split(" ")
            if len(words) == 3:
                sums[words[1]] = sums.get(words[1], 0) + int(words[2])
        return sums.get("Read"), sums.get("Write")

    def memory_events(self) -> MemoryEvents:
        """v1 counts the kills of each directory for itself, so those of nested ones are added."""
        controls = [fs.keyed(f"{path}/memory.oom_control") for path in dirs.subtree(self.path)]
        kills = [control["oom_kill"] for control in controls if "oom_kill" in control]
        return MemoryEvents(kills=sum(kills) if kills else None, at_limit=self._at_limit())

    def _at_limit(self) -> int | None:
        """New kernels do not count when the sum of memory and swap met its limit; that it did shows in the peak."""
        names = ("failcnt", "memsw.failcnt", "memsw.max_usage_in_bytes", "memsw.limit_in_bytes")
        memory, both, peak, limit = (fs.number(f"{self.path}/memory.{name}") for name in names)
        if memory is None:
            return None
        return max(memory + (both or 0), int(was_full(peak, limit)))

    def open_memory_events(self) -> int:
        """An eventfd that becomes readable when the job is out of memory, and when the directory is removed."""
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            file = os.open(f"{self.path}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fs.write(f"{self.path}/cgroup.event_control", f"{event} {file}")
            finally:
                os.close(file)
        except OSError:
            os.close(event)
            raise
        return event

    def hold_when_full(self) -> None:
        lim.put(self.path, "memory.oom_control", "1", "--oom hold")

    def kill_when_full(self) -> None:
        lim.put(self.path, "memory.oom_control", "0", "--oom kill")

    def is_full(self) -> bool:
        return fs.keyed(f"{self.path}/memory.oom_control").get("under_oom") == 1

    # ---- freezing

    def begin_freeze(self) -> None:
        fs.write(f"{self.path}/freezer.state", "FROZEN")

    def freeze(self, timeout: float) -> bool:
        """Ask for FROZEN until it is reached; False after ``timeout`` seconds. SIGKILL waits for the thaw."""
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            fs.write(f"{self.path}/freezer.state", "FROZEN")
            if fs.text(f"{self.path}/freezer.state") == "FROZEN":
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def thaw(self, timeout: float) -> bool:
        fs.write(f"{self.path}/freezer.state", "THAWED")
        return fs.text(f"{self.path}/freezer.state") == "THAWED"
