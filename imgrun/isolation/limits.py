"""What a process may use (getrlimit(2)), whom the out-of-memory killer prefers (proc(5)), and the file mode mask.

Resource limits are set by the shim, in the command's process alone: a small RLIMIT_CPU, RLIMIT_AS or RLIMIT_NPROC
must not hit the processes that set up and hold the job. The supervisor calls ``check`` before anything of the job
exists; the shim can then lower them in a user namespace, where nobody could raise them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from imgrun.errors import LimitError, SpecError
from imgrun.units import parse_duration, parse_size

# The numbers are those of asm-generic/resource.h, which x86-64 and arm64 share.
RLIMITS = {
    "as": 9,
    "core": 4,
    "cpu": 0,
    "data": 2,
    "fsize": 1,
    "locks": 10,
    "memlock": 8,
    "msgqueue": 12,
    "nice": 13,
    "nofile": 7,
    "nproc": 6,
    "rss": 5,
    "rtprio": 14,
    "rttime": 15,
    "sigpending": 11,
    "stack": 3,
}
_BYTES = frozenset(("as", "core", "data", "fsize", "memlock", "msgqueue", "rss", "stack"))
# 2**64 - 1 means unlimited, and Python's resource module takes signed numbers.
_LARGEST = 2**63 - 1

UMASK = 0o022
OOM_SCORE_ADJ = 500
ABOVE_SUPERVISOR = 100
"""How much the job's score is above the supervisor's, whatever that has inherited."""
HIGHEST_OOM_SCORE = 1000


class Rlimit(NamedTuple):
    """One resource limit, in the kernel's units: bytes, seconds (cpu), microseconds (rttime), or a plain number.

    None is unlimited.
    """

    name: str
    soft: int | None
    hard: int | None

    @property
    def resource(self) -> int:
        """The kernel's number of the resource."""
        return RLIMITS[self.name]

    def __str__(self) -> str:
        soft, hard = ("unlimited" if value is None else str(value) for value in (self.soft, self.hard))
        return f"{self.name}={soft}" if soft == hard else f"{self.name}={soft}:{hard}"


def parse_rlimit(text: str, what: str = "--rlimit") -> Rlimit:
    """Read NAME=SOFT[:HARD]: "nofile=1024:4096", "core=unlimited", "stack=64M", "cpu=1h30m".

    One value is both limits. Raises SpecError.
    """
    name, equals, values = text.partition("=")
    name = name.lower().removeprefix("rlimit_")
    if not equals:
        raise SpecError(f"{what}: {text!r} is not NAME=LIMIT", "write it as in nofile=1024 or nofile=1024:4096")
    if name not in RLIMITS:
        raise SpecError(f"{what}: there is no resource limit {name!r}", f"there are {', '.join(RLIMITS)}")
    soft_text, colon, hard_text = values.partition(":")
    soft = _value(name, soft_text, what)
    hard = _value(name, hard_text, what) if colon else soft
    if hard is not None and (soft is None or soft > hard):
        raise SpecError(f"{what}: {text!r} has a soft limit above its hard limit", "write the soft one first: SOFT:HARD")
    return Rlimit(name, soft, hard)


def _value(name: str, text: str, what: str) -> int | None:
    if text in ("unlimited", "infinity", "-1"):
        return None
    label = f"{what} {name}"
    if name in _BYTES:
        return parse_size(text, label)
    if name == "cpu" and not text.isdigit():
        return max(1, round(parse_duration(text, label)))
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > _LARGEST:
        raise SpecError(f"{label}: {text!r} is not a number", "write a whole number, or unlimited")
    return int(text)


def check(limits: Iterable[Rlimit]) -> None:
    """See that every limit can be had, raising this process's own hard limits where one has to be.

    Children inherit the raised hard limits; the soft ones, which count, are left alone. To be called by the supervisor,
    outside of any new user namespace. Raises LimitError, one that the caller may not have or the kernel does not allow.
    """
    import resource

    for limit in limits:
        soft, hard = resource.getrlimit(limit.resource)
        wanted = _number(limit.hard)
        if hard == resource.RLIM_INFINITY or (wanted != resource.RLIM_INFINITY and wanted <= hard):
            continue
        try:
            resource.setrlimit(limit.resource, (soft, wanted))
        except (OSError, ValueError):  # Python tells EPERM and EINVAL as ValueError
            raise _refused(limit, hard) from None


def _refused(limit: Rlimit, hard: int) -> LimitError:
    asked = "unlimited" if limit.hard is None else limit.hard
    if limit.name == "nofile":
        try:
            with open("/proc/sys/fs/nr_open") as file:
                largest = int(file.read())
        except (OSError, ValueError):
            largest = 0
        if largest and (limit.hard is None or limit.hard > largest):
            return LimitError(
                f"--rlimit nofile={asked}: this kernel allows at most {largest} open files per process",
                f"ask for {largest} or fewer (the sysctl fs.nr_open sets this)",
            )
    return LimitError(
        f"--rlimit {limit.name}={asked}: the hard limit here is {hard}, and raising it needs CAP_SYS_RESOURCE",
        f"ask for {hard} or less, or have the hard limit raised (limits.conf, or systemd's Limit{limit.name.upper()}=)",
    )


def apply(limits: Iterable[Rlimit], pid: int = 0) -> None:
    """Set the limits of the process ``pid`` (0: this one) by prlimit(2). Raises LimitError."""
    import resource

    for limit in limits:
        values = _number(limit.soft), _number(limit.hard)
        try:
            resource.prlimit(pid, limit.resource, values)
        except (OSError, ValueError):
            raise _refused(limit, resource.prlimit(pid, limit.resource)[1]) from None


def _number(limit: int | None) -> int:
    return -1 if limit is None else limit


def raise_oom_score(score: int = OOM_SCORE_ADJ, above: int = 0) -> None:
    """Have the out-of-memory killer prefer this process and its children to the rest of the host.

    The score (0 to 1000, proc(5), oom_score_adj) is only ever raised, which needs no privilege: to ``score``, and by
    ``above`` at least. To be called before this process changes its ids: after that, its files in /proc belong to root.
    Raises OSError.
    """
    fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    try:
        present = int(os.read(fd, 16))
        score = max(score, min(present + above, HIGHEST_OOM_SCORE))
        if present < score:
            os.pwrite(fd, str(score).encode(), 0)
    finally:
        os.close(fd)
