"""The events that are counted, and the rates that are derived from them.

Source: perf_event_open(2) and include/uapi/linux/perf_event.h for the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

HARDWARE, SOFTWARE, HW_CACHE = 0, 1, 3
_DTLB_READ_MISS = 3 | 0 << 8 | 1 << 16


class Event(NamedTuple):
    """One event, by imgrun's name for it."""

    name: str
    type: int
    config: int


GROUPS: tuple[tuple[Event, ...], ...] = (
    # What a rate is made of is counted together, so that both counts are of the same time.
    (Event("cycles", HARDWARE, 0), Event("instructions", HARDWARE, 1)),
    (Event("branches", HARDWARE, 4), Event("branch_misses", HARDWARE, 5)),
    (Event("cache_references", HARDWARE, 2), Event("cache_misses", HARDWARE, 3)),
    (Event("stalled_cycles", HARDWARE, 7),),
    (Event("dtlb_misses", HW_CACHE, _DTLB_READ_MISS),),
    (Event("task_clock", SOFTWARE, 1),),
    (Event("page_faults", SOFTWARE, 2),),
    (Event("context_switches", SOFTWARE, 3),),
    (Event("cpu_migrations", SOFTWARE, 4),),
)
EVENTS = tuple(event for group in GROUPS for event in group)


class Rates(NamedTuple):
    """Ratios of counts; None where a count is missing or the divisor is 0."""

    ipc: float | None
    """Instructions per cycle."""
    cache_hit_rate: float | None
    """Last-level cache references that were not misses, of all."""
    branch_instruction_rate: float | None
    """Branches of all instructions."""
    branch_misprediction_rate: float | None
    """Mispredicted branches of all branches."""


PARTS = {
    "ipc": ("instructions", "cycles"),
    "cache_hit_rate": ("cache_misses", "cache_references"),
    "branch_instruction_rate": ("branches", "instructions"),
    "branch_misprediction_rate": ("branch_misses", "branches"),
}
"""What each rate is made of: part and whole."""


def rates(counts: Mapping[str, int | None]) -> Rates:
    """The rates that ``counts`` allow."""

    def ratio(rate: str) -> float | None:
        a, b = (counts.get(name) for name in PARTS[rate])
        return None if a is None or not b else a / b

    misses = ratio("cache_hit_rate")
    return Rates(
        ipc=ratio("ipc"),
        cache_hit_rate=None if misses is None else max(0.0, 1.0 - misses),
        branch_instruction_rate=ratio("branch_instruction_rate"),
        branch_misprediction_rate=ratio("branch_misprediction_rate"),
    )


def joined(
    earlier: Mapping[str, int | None], earlier_rates: Mapping[str, float | None], later: Mapping[str, int | None]
) -> tuple[dict[str, int | None], dict[str, float | None], bool]:
    """The counts of two lives of a job together, their rates, and whether some count is of one of the two only.

    A rate whose two counts are not of the same lives is None.
    """
    counts: dict[str, int | None] = {}
    partial = False
    for name in {**earlier, **later}:
        a, b = earlier.get(name), later.get(name)
        partial = partial or (a is None) != (b is None)
        counts[name] = b if a is None else a if b is None else a + b
    found: dict[str, float | None] = rates(counts)._asdict()
    for rate, names in PARTS.items():
        uneven = any(len({life.get(name) is None for name in names}) > 1 for life in (earlier, later))
        was_uneven = rate in earlier_rates and earlier_rates[rate] is None and bool(earlier.get(names[1]))
        if uneven or was_uneven:
            found[rate] = None
    return counts, found, partial
