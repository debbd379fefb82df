"""The machine that was measured, in a few lines."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

VERSIONS = {
    "systemd-nspawn": ("systemd-nspawn", "--version"),
    "runc": ("runc", "--version"),
    "crun": ("crun", "--version"),
    "podman": ("podman", "--version"),
    "bubblewrap": ("bwrap", "--version"),
}


def facts(directory: str) -> list[tuple[str, str]]:
    """What matters of this machine, as names and values; ``directory`` is where files are written."""
    return [
        ("system", f"{_os_name()}, Linux {platform.release()}, {platform.machine()}"),
        ("processor", f"{len(os.sched_getaffinity(0))} x {_field('/proc/cpuinfo', 'model name')}"),
        ("memory", f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) >> 20} GiB"),
        ("disk", f"{file_system(directory)}, {_scheduler(directory)}"),
        ("cgroups", _cgroups()),
        ("Python", platform.python_version()),
        ("imgrun", _own_version()),
        *((name, _first_line(command)) for name, command in VERSIONS.items()),
    ]


def load() -> float:
    """How many processes wanted to run in the last minute: with others at work, figures are theirs too."""
    return os.getloadavg()[0]


def file_system(path: str) -> str:
    """The type of the file system that holds ``path``."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8") as f:
        for line in f:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return "unknown"


def _scheduler(path: str) -> str:
    device = os.stat(path).st_dev
    queue = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for base in (queue, os.path.dirname(queue)):
        try:
            with open(f"{base}/queue/rotational", encoding="ascii") as f:
                kind = "rotating" if f.read().strip() == "1" else "not rotating"
        except OSError:
            continue
        return f"{os.path.basename(base)} ({kind}, as the kernel sees it)"
    return "no block device"


def _cgroups() -> str:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "v2"
    return "hybrid" if os.path.isdir("/sys/fs/cgroup/unified") else "v1"


def _os_name() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")


def _own_version() -> str:
    try:
        return version("imgrun")
    except PackageNotFoundError:
        return "unknown"


def _field(path: str, name: str) -> str:
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return "unknown"


def _first_line(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "not installed"
    return done.stdout.partition("\n")[0].strip() or "unknown"
