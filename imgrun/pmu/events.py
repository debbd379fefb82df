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

    @property
    def hardware(self) -> bool:
        return self.type != SOFTWARE


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


def rates(counts: Mapping[str, int | None]) -> Rates:
    """The rates that ``counts`` allow."""

    def ratio(part: str, whole: str) -> float | None:
        a, b = counts.get(part), counts.get(whole)
        return None if a is None or not b else a / b

    misses = ratio("cache_misses", "cache_references")
    return Rates(
        ipc=ratio("instructions", "cycles"),
        cache_hit_rate=None if misses is None else max(0.0, 1.0 - misses),
        branch_instruction_rate=ratio("branches", "instructions"),
        branch_misprediction_rate=ratio("branch_misses", "branches"),
    )
