"""cgroup v2: the job's directory in the unified hierarchy.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import os

from imgrun.errors import LimitError
from imgrun.isolation.cgroups import dirs, fs
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups import place as cgroup_place
from imgrun.isolation.cgroups.limits import Limits
from imgrun.isolation.cgroups.usage import CgroupUsage, MemoryEvents, seconds

IO_WEIGHTS = ("io.weight", "io.bfq.weight")
"""For disks with the I/O cost controller, and for those with the BFQ scheduler: a kernel may have both, one or none."""


class V2Directory:
    """The job's directory in the unified hierarchy. Without any controller it freezes, kills, and counts CPU time."""

    version = 2

    def __init__(self, path: str) -> None:
        self.path = path
        self.controls: frozenset[str] = frozenset(("freeze", "cpuacct"))

    def prepare(self) -> None:
        """Learn what the directory has now; have the kernel kill the job as a whole if it must kill for memory."""
        self.look()
        if "memory" in self.controls:
            try:
                fs.write(f"{self.path}/memory.oom.group", "1")
            except OSError:  # since 4.19; without it the supervisor ends what the kernel leaves
                pass

    def look(self) -> None:
        self.controls = frozenset((fs.text(f"{self.path}/cgroup.controllers") or "").split()) | {"freeze", "cpuacct"}

    def apply(self, limits: Limits, *, live: bool = False) -> None:
        """Write the limits. ``live``: also take back those that ``limits`` does not have. Raises LimitError."""
        if live:
            self._refuse_killing(limits)
            cgroup_place.hand_out_more(self.path, frozenset(lim.needed(limits)))
            self.prepare()
        for controller, option, name, value, default in self._settings(limits):
            if controller not in self.controls:
                continue
            if name in IO_WEIGHTS and not os.path.exists(f"{self.path}/{name}"):
                continue
            if value is not None:
                lim.put(self.path, name, value, option)
            elif live and os.path.exists(f"{self.path}/{name}"):
                lim.put(self.path, name, default, option)
        if "io" in self.controls:
            self._apply_io_max(limits, live)

    def _settings(self, limits: Limits) -> list[tuple[str, str, str, str | None, str]]:
        """(controller, option, file, value or None, the kernel's default) of each limit that is one file."""
        quota = None if limits.cpus is None else "{} {}".format(*lim.quota(limits.cpus))
        bfq_weight = None if limits.io_weight is None else lim.bfq_weight(limits.io_weight)

        def word(value: int | None) -> str | None:
            return None if value is None else str(value)

        return [
            ("memory", "--memory", "memory.max", word(limits.memory), "max"),
            ("memory", "--swap", "memory.swap.max", word(limits.swap), "max"),
            ("cpu", "--cpus", "cpu.max", quota, f"max {lim.PERIOD}"),
            ("cpu", "--cpu-weight", "cpu.weight", word(limits.cpu_weight), "100"),
            ("cpuset", "--cpuset", "cpuset.cpus", limits.cpuset, "\n"),
            ("pids", "--pids", "pids.max", word(limits.pids), "max"),
            ("io", "--io-weight", "io.weight", word(limits.io_weight), "100"),
            ("io", "--io-weight", "io.bfq.weight", word(bfq_weight), "100"),
        ]

    def _apply_io_max(self, limits: Limits, live: bool) -> None:
        rules: dict[str, dict[str, int | None]] = {}
        if live:
            for line in (fs.text(f"{self.path}/io.max") or "").splitlines():
                rules[line.split(" ")[0]] = {}
        for entry in limits.io_max:
            rule = rules.setdefault(lim.disk_of(entry.device), {})
            for key in lim.IO_RATES:
                if getattr(entry, key) is not None:
                    rule[key] = getattr(entry, key)
        for disk, rule in rules.items():
            rates = " ".join(f"{key}={rule.get(key) or 'max'}" for key in lim.IO_RATES)
            lim.put(self.path, "io.max", f"{disk} {rates}", "--io-max")

    def _refuse_killing(self, limits: Limits) -> None:
        """The kernel kills at once when ``memory.max`` is set below what cannot be given back: refuse that instead."""
        if limits.memory is None or "memory" not in self.controls:
            return
        stat = fs.keyed(f"{self.path}/memory.stat")
        cache = stat.get("file", 0) - stat.get("shmem", 0)
        kept = (fs.number(f"{self.path}/memory.current") or 0) - max(cache, 0)
        if kept > limits.memory:
            raise LimitError(
                f"--memory {limits.memory}: the job holds {kept} bytes already and would be killed",
                "free memory in the job first, or choose a higher limit",
            )

    def delegate(self, uid: int, gid: int) -> None:
        """Let this user make cgroups inside the job's and move processes among them, but not change its limits."""
        for name in ("", "/cgroup.procs", "/cgroup.threads", "/cgroup.subtree_control"):
            os.chown(f"{self.path}{name}", uid, gid)

    # ---- reading

    def usage(self) -> CgroupUsage:
        cpu = fs.keyed(f"{self.path}/cpu.stat")
        values: dict[str, int | float | None] = {
            "user_seconds": seconds(cpu.get("user_usec")),
            "system_seconds": seconds(cpu.get("system_usec")),
        }
        if "cpu" in self.controls and not (fs.text(f"{self.path}/cpu.max") or "max").startswith("max"):
            values.update(
                periods=cpu.get("nr_periods"),
                throttled_periods=cpu.get("nr_throttled"),
                throttled_seconds=seconds(cpu.get("throttled_usec")),
            )
        if "memory" in self.controls:
            stat = fs.keyed(f"{self.path}/memory.stat")
            values.update(
                memory_current=fs.number(f"{self.path}/memory.current"),
                memory_peak=fs.number(f"{self.path}/memory.peak"),
                memory_anon=stat.get("anon"),
                memory_file=stat.get("file"),
                memory_shmem=stat.get("shmem"),
                memory_kernel=stat.get("kernel"),
                swap_current=fs.number(f"{self.path}/memory.swap.current"),
                swap_peak=fs.number(f"{self.path}/memory.swap.peak"),
            )
        if "pids" in self.controls:
            values.update(
                pids_current=fs.number(f"{self.path}/pids.current"),
                pids_peak=fs.number(f"{self.path}/pids.peak"),
                pids_refused=fs.keyed(f"{self.path}/pids.events").get("max"),
            )
        if "io" in self.controls and (io := fs.text(f"{self.path}/io.stat")) is not None:
            sums = sum_io(io)
            values.update(
                read_bytes=sums["rbytes"],
                written_bytes=sums["wbytes"],
                read_operations=sums["rios"],
                write_operations=sums["wios"],
            )
        for resource in ("cpu", "memory", "io"):
            stalls = parse_pressure(fs.text(f"{self.path}/{resource}.pressure") or "")
            for kind, total in stalls.items():
                values[f"{resource}_{kind}_stalled"] = seconds(total)
        return CgroupUsage(**values)  # type: ignore[arg-type]

    def memory_events(self) -> MemoryEvents:
        return MemoryEvents(
            kills=fs.keyed(f"{self.path}/memory.events").get("oom_kill"),
            at_limit=fs.keyed(f"{self.path}/memory.events.local").get("max"),
        )

    def open_memory_events(self) -> int:
        """A descriptor of memory.events, read once, so that it polls POLLPRI when something happens after this."""
        fd = os.open(f"{self.path}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        os.pread(fd, 4096, 0)
        return fd

    def hold_when_full(self) -> None:
        limit = fs.number(f"{self.path}/memory.max")
        high = "max" if limit is None else str(limit - max(limit // 16, 1 << 20))
        lim.put(self.path, "memory.high", high, "--oom hold")

    def kill_when_full(self) -> None:
        lim.put(self.path, "memory.high", "max", "--oom kill")

    def is_full(self) -> bool:
        high = fs.number(f"{self.path}/memory.high")
        if high is None:
            return False
        stat = fs.keyed(f"{self.path}/memory.stat")
        kept = stat.get("unevictable", 0) + stat.get("kernel", 0) - stat.get("slab_reclaimable", 0)
        if not self._can_swap():
            kept += stat.get("anon", 0) + stat.get("shmem", 0)
        return kept * 64 >= high * 63

    def _can_swap(self) -> bool:
        limit = fs.number(f"{self.path}/memory.swap.max")
        if limit is not None and (fs.number(f"{self.path}/memory.swap.current") or 0) >= limit:
            return False
        for line in (fs.text("/proc/meminfo") or "").splitlines():
            if line.startswith("SwapFree:"):
                return int(line.split()[1]) > 0
        return False

    # ---- freezing and killing

    def begin_freeze(self) -> None:
        fs.write(f"{self.path}/cgroup.freeze", "1")

    def freeze(self, timeout: float) -> bool:
        fs.write(f"{self.path}/cgroup.freeze", "1")
        return dirs.wait_for(f"{self.path}/cgroup.events", "frozen", 1, timeout)

    def thaw(self, timeout: float) -> bool:
        fs.write(f"{self.path}/cgroup.freeze", "0")
        return dirs.wait_for(f"{self.path}/cgroup.events", "frozen", 0, timeout)

    def kill(self) -> bool:
        """Kill everything in and below the directory, forks in flight included; False where the kernel cannot."""
        try:
            fs.write(f"{self.path}/cgroup.kill", "1")
        except OSError:
            return False
        return True


def sum_io(stat: str) -> dict[str, int]:
    """``io.stat`` added up: ``MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...`` for each disk."""
    sums = {"rbytes": 0, "wbytes": 0, "rios": 0, "wios": 0}
    for line in stat.splitlines():
        for word in line.split(" ")[1:]:
            key, _, value = word.partition("=")
            if key in sums and value.isdigit():
                sums[key] += int(value)
    return sums


def parse_pressure(text: str) -> dict[str, int]:
    """Total stall time in microseconds by kind: ``some avg10=0.00 avg60=0.00 avg300=0.00 total=N`` and ``full ...``."""
    totals = {}
    for line in text.splitlines():
        kind, _, total = line.partition(" ")[0], *line.rpartition("total=")[1:]
        if kind in ("some", "full") and total.isdigit():
            totals[kind] = int(total)
    return totals
