"""Usage over several lives of a job, the time series, and the table for people."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.accounting.sampling import COLUMNS, Series
from imgrun.cli import stats
from imgrun.result import Usage


def test_sums_go_on_and_peaks_stay() -> None:
    usage = Usage(user_seconds=1.5, memory_peak=10, memory_full_stalled=0.5, pids_peak=7, read_bytes=None, written_bytes=4)
    usage.follow({
        "user_seconds": 2.0, "memory_peak": 30, "memory_full_stalled": 0.25, "pids_peak": 2, "read_bytes": 5,
        "written_bytes": None, "wall_seconds": 9.0, "scratch_bytes": 9, "source": "rusage", "unknown": 1,
    })  # fmt: skip
    assert (usage.user_seconds, usage.memory_peak, usage.memory_full_stalled, usage.pids_peak) == (3.5, 30, 0.75, 7)
    assert (usage.read_bytes, usage.written_bytes) == (5, 4)
    assert (usage.wall_seconds, usage.scratch_bytes, usage.source) == (None, None, None)


def test_counts_go_on() -> None:
    usage = Usage(counts={"cycles": 10, "instructions": 30, "page_faults": 5}, rates={"ipc": 3.0}, counted="inherited user")
    usage.follow({
        "counts": {"cycles": 10, "instructions": 10, "page_faults": None}, "rates": {"ipc": 1.0}, "counted": "cgroup scaled",
    })  # fmt: skip
    assert usage.counts == {"cycles": 20, "instructions": 40, "page_faults": 5}
    assert usage.rates is not None
    assert usage.rates["ipc"] == 2.0
    assert usage.counted == "inherited user cgroup scaled partial"


def test_a_life_without_counters_leaves_those_of_the_other() -> None:
    counts = {"counts": {"cycles": 10, "instructions": 10}, "rates": {"ipc": 1.0}, "counted": "cgroup"}
    usage = Usage()
    usage.follow(counts)
    assert {name: getattr(usage, name) for name in counts} == counts
    usage = Usage(**counts)  # type: ignore[arg-type]
    usage.follow({"counts": None, "rates": None, "counted": None})
    assert {name: getattr(usage, name) for name in counts} == counts


@given(st.integers(1, 400), st.integers(2, 32).map(lambda half: 2 * half + 1))
def test_a_series_is_bounded_and_of_the_whole_time(points: int, most: int) -> None:
    series = Series(1.0, most=most)
    moment = 0.0
    for _ in range(points):
        series.add({"wall_seconds": moment})
        moment += series.interval
    kept = [point[0] for point in series.to_dict()["points"]]
    assert len(kept) < most
    assert kept[0] == 0.0
    assert kept == sorted(kept)
    steps = {b - a for a, b in pairwise(kept)}
    assert len(steps) <= 1, "evenly spaced"
    assert points < most or len(kept) >= most // 2 - 1


def test_a_series_goes_on() -> None:
    first = Series(1.0, most=9)
    for second in range(10):
        first.add({"wall_seconds": float(second), "memory": second})
    saved = first.to_dict()
    again = Series(1.0, saved, most=9)
    assert again.to_dict() == saved
    assert Series(1.0, {"columns": ["other"], "points": [[1]]}).to_dict() == Series(1.0).to_dict()
    assert Series(1.0, saved | {"points": [["too", "short"]]}).to_dict()["points"] == []


def test_what_is_not_measured_is_none_in_a_series() -> None:
    series = Series(1.0)
    series.add({"wall_seconds": 1.0})
    assert series.to_dict()["points"] == [[1.0] + [None] * (len(COLUMNS) - 1)]


class FakeJob:
    """A job whose measurements are given."""

    id, name, state = "0123456789ab", "n", "running"

    class spec:
        memory = 100 << 20

    def __init__(self, *measured: dict[str, Any]) -> None:
        self._measured = list(measured)

    def stats(self) -> dict[str, Any]:
        return Usage().to_dict() | {"memory_current": None, "pids_current": None} | self._measured.pop(0)


def test_rates_are_of_the_time_since_the_last_line() -> None:
    job: Any = FakeJob(
        {"wall_seconds": 10.0, "user_seconds": 5.0, "system_seconds": 0.0, "read_bytes": 0,
         "counts": {"instructions": 100, "cycles": 100}},
        {"wall_seconds": 12.0, "user_seconds": 6.0, "system_seconds": 1.0, "read_bytes": 1 << 20,
         "counts": {"instructions": 700, "cycles": 400}},
    )  # fmt: skip
    first = stats.measure(job, None)
    assert first is not None
    assert (first["rates"]["cpus"], first["rates"]["ipc"]) == (0.5, 1.0)
    second = stats.measure(job, first)
    assert second is not None
    assert second["rates"] == {
        "cpus": 1.0, "read_bytes_per_second": (1 << 20) / 2, "written_bytes_per_second": None, "ipc": 2.0,
    }  # fmt: skip
    header, row = stats.table([second]).splitlines()
    assert header.split()[:3] == ["ID", "NAME", "CPU"]
    assert row.split() == [job.id, "n", "100.0", "-", "100", "MiB", "-", "512", "KiB/s", "-", "-", "0:07.0", "2.00"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00.0"), (61.26, "1:01.3"), (3725.0, "1:02:05.0")])
def test_times_as_people_read_them(seconds: float, text: str) -> None:
    assert stats._time(seconds) == text
