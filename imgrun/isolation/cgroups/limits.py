"""What a job may use, in imgrun's own terms, and the arithmetic that turns it into what the kernel's files take.

Units: bytes, bytes or operations per second, processors. Weights are on the scale of cgroup v2, 1 to 10000 with 100 as
the default.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from imgrun.errors import LimitError, SpecError
from imgrun.isolation.cgroups import fs
from imgrun.units import format_cpu_list, parse_cpu_list, parse_size

PERIOD = 100_000
"""Microseconds over which a processor quota is counted; the kernel's own default."""

LONG_PERIOD = 1_000_000
SMALLEST_QUOTA = 1_000
"""The kernel takes no quota below 1 ms and no period above 1 s (Documentation/scheduler/sched-bwc.rst)."""

SMALLEST_MEMORY = 1 << 20
LARGEST = (1 << 63) - 1

IO_RATES = ("rbps", "wbps", "riops", "wiops")
"""Bytes and operations per second, read and written."""


class IoMax(NamedTuple):
    """An upper bound of the use of one disk. ``device`` is a block device, or a path on a file system of that disk."""

    device: str
    rbps: int | None = None
    wbps: int | None = None
    riops: int | None = None
    wiops: int | None = None


class Limits(NamedTuple):
    """The limits of a job. None: none of its own; those of the cgroup that imgrun runs in hold in any case."""

    memory: int | None = None
    """Bytes, page cache and kernel memory included, as the kernel counts them."""
    swap: int | None = None
    """Bytes of swap beyond ``memory``; 0 for none."""
    cpus: float | None = None
    """Processor time per time: 1.5 is one and a half processors."""
    cpu_weight: int | None = None
    """The share when others want the processors too."""
    cpuset: str | None = None
    """The processors that may be used: ``0-3,8``."""
    pids: int | None = None
    """Processes and threads, PID 1 and the reaper of the job included."""
    io_weight: int | None = None
    io_max: tuple[IoMax, ...] = ()


def needed(limits: Limits) -> dict[str, list[str]]:
    """The controllers that ``limits`` needs, each with the options that ask for it."""
    asked = (
        ("memory", "--memory", limits.memory is not None),
        ("memory", "--swap", limits.swap is not None),
        ("cpu", "--cpus", limits.cpus is not None),
        ("cpu", "--cpu-weight", limits.cpu_weight is not None),
        ("cpuset", "--cpuset", limits.cpuset is not None),
        ("pids", "--pids", limits.pids is not None),
        ("io", "--io-weight", limits.io_weight is not None),
        ("io", "--io-max", bool(limits.io_max)),
    )
    result: dict[str, list[str]] = {}
    for controller, option, is_asked in asked:
        if is_asked:
            result.setdefault(controller, []).append(option)
    return result


def validate(limits: Limits) -> None:
    """Raise SpecError for a value that no host could take."""

    def within(option: str, value: float | None, low: float, high: float, unit: str = "") -> None:
        if value is not None and not low <= value <= high:
            raise SpecError(f"{option} {value} is out of range", f"give a value from {low:g} to {high:g}{unit}")

    if limits.memory is not None and limits.memory < SMALLEST_MEMORY:
        raise SpecError(f"--memory {limits.memory} bytes is too little for any program", "give at least 1M")
    within("--memory", limits.memory, SMALLEST_MEMORY, LARGEST, " bytes")
    within("--swap", limits.swap, 0, LARGEST, " bytes")
    within("--cpus", limits.cpus, SMALLEST_QUOTA / LONG_PERIOD, 1e6)
    within("--cpu-weight", limits.cpu_weight, 1, 10000)
    within("--io-weight", limits.io_weight, 1, 10000)
    within("--pids", limits.pids, 1, 1 << 22)
    if limits.cpuset is not None:
        parse_cpu_list(limits.cpuset, "--cpuset")
    for entry in limits.io_max:
        rates = entry[1:]
        if all(rate is None for rate in rates):
            raise SpecError(f"--io-max {entry.device} gives no rate", "add rbps=, wbps=, riops= or wiops=.")
        for name, rate in zip(IoMax._fields[1:], rates, strict=True):
            within(f"--io-max {entry.device}: {name}", rate, 1, LARGEST)


def quota(cpus: float) -> tuple[int, int]:
    """``cpus`` as (quota, period) in microseconds. Tiny values get the longest period, for the sake of precision."""
    if cpus * PERIOD >= SMALLEST_QUOTA:
        return round(cpus * PERIOD), PERIOD
    return max(SMALLEST_QUOTA, round(cpus * LONG_PERIOD)), LONG_PERIOD


def shares(weight: int) -> int:
    """A v2 weight as v1 ``cpu.shares``: the kernel's own relation, 100 to 1024, and its lower bound."""
    return max(2, (weight * 1024 + 50) // 100)


def bfq_weight(weight: int) -> int:
    """A v2 weight for BFQ, which has 1 to 1000 and the same default: 100 stays 100, 10000 becomes 1000."""
    return weight if weight <= 100 else 100 + (weight - 100) * 900 // 9900


def parse_io_max(text: str) -> IoMax:
    """``DEVICE:rbps=10M,wiops=100`` as an IoMax; ``DEVICE`` is a block device or a path on one. Raises SpecError."""
    device, colon, rates = text.rpartition(":")
    values: dict[str, int] = {}
    for rate in rates.split(","):
        key, equals, amount = rate.partition("=")
        if not colon or not device or not equals or key not in IO_RATES or key in values:
            raise SpecError(
                f"--io-max {text!r} is not a device with rates",
                "write DEVICE:rbps=SIZE,wbps=SIZE,riops=N,wiops=N with those that are wanted, as in /dev/sda:wbps=10M",
            )
        values[key] = parse_size(amount, f"--io-max {key}")
    return IoMax(device, **values)


def disk_of(path: str, sys: str = "/sys") -> str:
    """The disk that ``path`` is or lies on, as ``MAJOR:MINOR``. A partition counts as its disk: limits apply to disks.

    Raises LimitError when there is none (a network or memory file system) or the path does not exist.
    """
    import stat

    try:
        status = os.stat(path)
    except OSError as error:
        raise LimitError(f"--io-max {path}: {error.strerror}", "name a block device, or a path on a disk") from None
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    if os.major(device) == 0:
        device = _device_of_source(device)
    entry = f"{sys}/dev/block/{os.major(device)}:{os.minor(device)}"
    if not device or not os.path.isdir(entry):
        raise LimitError(
            f"--io-max {path}: no disk is behind it, so its speed cannot be limited",
            "name a block device, such as /dev/sda, or a directory of a file system that is on a disk",
        )
    if os.path.exists(f"{entry}/partition"):
        entry = os.path.dirname(os.path.realpath(entry))
    return fs.read(f"{entry}/dev").strip()


def _device_of_source(device: int) -> int:
    """The block device that a file system with an anonymous device number (btrfs) is mounted from, or 0."""
    import stat

    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in fs.read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        source = fs.unescape(after.split(" ")[1])
        if before.split(" ")[2] == wanted and source.startswith("/dev/"):
            try:
                status = os.stat(source)
            except OSError:
                continue
            if stat.S_ISBLK(status.st_mode):
                return status.st_rdev
    return 0


def weighted_disks(sys: str = "/sys") -> list[str]:
    """The disks that share their time by weight: those that the BFQ scheduler serves."""
    disks = []
    for name in sorted(os.listdir(f"{sys}/block")):
        if "[bfq]" in (fs.text(f"{sys}/block/{name}/queue/scheduler") or ""):
            disks.append(name)
    return disks


def no_weighted_disk() -> LimitError:
    return LimitError(
        "--io-weight cannot be enforced: no disk of this host shares its time by weight",
        "let an administrator choose the BFQ scheduler: echo bfq > /sys/block/DISK/queue/scheduler; or use --io-max",
    )


def refuse_foreign_cpus(cpuset: str, allowed: str, directory: str) -> None:
    """Raise LimitError if ``cpuset`` has processors that are not among those ``allowed`` to ``directory``."""
    foreign = set(parse_cpu_list(cpuset)) - set(parse_cpu_list(allowed) if allowed else ())
    if foreign:
        raise LimitError(
            f"--cpuset {cpuset}: processor {format_cpu_list(foreign)} is not to be had here ({directory})",
            f"choose among {allowed}" if allowed else "leave --cpuset out",
        )


def put(directory: str, name: str, value: str, option: str) -> None:
    """Write a limit. Raises LimitError that names the option, the file and what the kernel said."""
    try:
        fs.write(f"{directory}/{name}", value)
    except FileNotFoundError:
        raise LimitError(
            f"{option} cannot be enforced: this kernel has no {name}", f"leave {option} out, or use another kernel"
        ) from None
    except OSError as error:
        hints = {
            errno.EBUSY: "the job uses more than that already: free memory first, or choose a higher limit",
            errno.EINVAL: "the cgroup that imgrun runs in allows less: ask for less there, or for more from it",
            errno.ENODEV: "it must be a whole disk",
        }
        raise LimitError(
            f"{option}: the kernel refused {value!r} for {directory}/{name}: {error.strerror}",
            hints.get(error.errno or 0, "see `imgrun doctor` for what can be limited here"),
        ) from None
