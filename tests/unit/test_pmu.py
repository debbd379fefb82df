"""Counters: what becomes of what the kernel answers. A stand-in for perf_event_open(2) plays hosts that have a PMU."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun import syscalls as sc
from imgrun.errors import HostError
from imgrun.pmu import counters
from imgrun.pmu.counters import Counters
from imgrun.pmu.events import EVENTS, GROUPS, PARTS, SOFTWARE, joined, rates

READS = 100
HARDWARE = {event.name for event in EVENTS if event.type != SOFTWARE}
Values = dict[str, tuple[int, int, int]]
"""(count, time enabled, time running) by event."""


class StandIn:
    """Answers as the kernel does, for a host that has the events in ``values``."""

    def __init__(self, values: Values, *, kernel_too: bool = True) -> None:
        self.values = values
        self.kernel_too = kernel_too
        self.calls: list[dict[str, Any]] = []
        self.opened: list[int] = []

    def __call__(
        self, type: int, config: int, pid: int, cpu: int, group: int, flags: int, *, inherit: bool, enable_on_exec: bool,
        exclude_kernel: bool,
    ) -> int:  # fmt: skip
        name = next((e.name for e in EVENTS if (e.type, e.config) == (type, config)), None)
        self.calls.append({"name": name, "pid": pid, "cpu": cpu, "group": group, "flags": flags, "inherit": inherit})
        if (pid == -1 and cpu == -1) or (flags & sc.PERF_FLAG_PID_CGROUP and cpu == -1):
            raise OSError(errno.EINVAL, "")
        if group != -1 and group not in self.opened:
            raise OSError(errno.EBADF, "")
        if not self.kernel_too and not exclude_kernel:
            raise OSError(errno.EACCES, "")
        if name is None or name not in self.values:
            raise OSError(errno.ENOENT, "")
        if not flags & sc.PERF_FLAG_PID_CGROUP and pid > 0 and not os.path.exists(f"/proc/{pid}"):
            raise OSError(errno.ESRCH, "")
        read, write = os.pipe()
        os.write(write, struct.pack("QQQ", *self.values[name]) * READS)
        os.close(write)
        self.opened.append(read)
        return read


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    before = len(os.listdir("/proc/self/fd"))

    def install(values: Values, **options: Any) -> StandIn:
        made = StandIn(values, **options)
        monkeypatch.setattr(sc, "perf_event_open", made)
        return made

    yield install
    assert len(os.listdir("/proc/self/fd")) == before, "counters stay open"


ALL: Values = {event.name: (1000 + number, 10, 10) for number, event in enumerate(EVENTS)}


def read(made: Counters) -> counters.Counts:
    try:
        return made.read()
    finally:
        made.close()


# -- the stand-in itself ------------------------------------------------------------------------------------------------


def outcome(call: Callable[..., int], arguments: tuple[int, ...], **options: bool) -> tuple[int, bool]:
    """The errno, or 0; and whether what is read has the form that is expected."""
    try:
        fd = call(*arguments, **options)
    except OSError as e:
        return e.errno or -1, False
    try:
        data = os.read(fd, 1 << 10)[:24]
        _, enabled, running = struct.unpack("QQQ", data)
        return 0, running <= enabled
    finally:
        os.close(fd)


GONE = 1 << 22
"""No process has this pid: it is the kernel's PID_MAX_LIMIT."""


@pytest.mark.parametrize("config", [event.config for event in EVENTS if event.type == SOFTWARE])
@pytest.mark.parametrize(("pid", "cpu", "group"), [(0, -1, -1), (0, 0, -1), (-1, -1, -1), (GONE, -1, -1), (0, -1, 9999)])
def test_the_stand_in_answers_as_the_kernel_does(config: int, pid: int, cpu: int, group: int) -> None:
    """For software events, which every host has."""
    arguments = (SOFTWARE, config, pid, cpu, group, 0)
    options = {"inherit": False, "enable_on_exec": False, "exclude_kernel": False}
    real = outcome(sc.perf_event_open, arguments, **options)
    if real[0] in (errno.EACCES, errno.EPERM):
        options["exclude_kernel"] = True
        real = outcome(sc.perf_event_open, arguments, **options)
    if real[0] in (errno.EACCES, errno.EPERM, errno.ENOSYS):
        pytest.skip("no counting here at all")
    assert outcome(StandIn(ALL), arguments, **options) == real


def test_real_counters_of_this_process() -> None:
    made = Counters.of_process(os.getpid())
    try:
        if "page_faults" in made.refused:
            pytest.skip("no counting here at all")
        made.add_tasks([os.getpid()])  # those of of_process begin with an exec
        first = made.read().counts
        data = bytearray(64 << 20)
        data[:: os.sysconf("SC_PAGE_SIZE")] = b"\1" * len(data[:: os.sysconf("SC_PAGE_SIZE")])
        second = made.read().counts
        for name in ("page_faults", "task_clock"):
            assert (second[name] or 0) > (first[name] or 0)
    finally:
        made.close()


# -- opening ------------------------------------------------------------------------------------------------------------


def test_a_cgroup_is_counted_on_every_cpu(stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "online_cpus", lambda: [0, 1, 5])
    host = stand_in(ALL)
    found = read(Counters.of_cgroup(7))
    assert found.counts == {name: 3 * value[0] for name, value in ALL.items()}
    assert (found.scope, found.user_only, found.scaled) == ("cgroup", False, False)
    assert {call["cpu"] for call in host.calls} == {0, 1, 5}
    assert all(call["pid"] == 7 and call["flags"] & sc.PERF_FLAG_PID_CGROUP for call in host.calls)
    assert not any(call["inherit"] for call in host.calls)


def test_what_makes_a_rate_is_counted_together(stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "online_cpus", lambda: [0])
    host = stand_in(ALL)
    Counters.of_cgroup(7).close()
    leaders = [call["group"] == -1 for call in host.calls]
    assert leaders == [event is group[0] for group in GROUPS for event in group]


def test_a_cpu_that_comes_is_counted_and_one_that_goes_keeps_its_count(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = [0]
    monkeypatch.setattr(counters, "online_cpus", lambda: list(online))
    stand_in({"page_faults": (10, 1, 1)})
    made = Counters.of_cgroup(7)
    assert made.read().counts["page_faults"] == 10
    online[:] = [1]
    assert made.read().counts["page_faults"] == 20
    assert read(made).counts["page_faults"] == 20


def test_a_process_is_counted_with_its_children_from_its_exec_on(stand_in: Callable[..., StandIn]) -> None:
    host = stand_in(ALL)
    found = read(Counters.of_process(os.getpid()))
    assert found.scope == "inherited"
    assert all(call["inherit"] and call["group"] == -1 and call["cpu"] == -1 for call in host.calls)
    assert found.counts == {name: value[0] for name, value in ALL.items()}


def test_restored_threads_are_added(stand_in: Callable[..., StandIn]) -> None:
    stand_in(ALL)
    made = Counters.of_process(os.getpid())
    made.add_tasks([os.getpid(), GONE])  # one has ended meanwhile
    assert read(made).counts["cycles"] == 2 * ALL["cycles"][0]


def test_what_the_host_lacks_is_none(stand_in: Callable[..., StandIn]) -> None:
    stand_in({name: value for name, value in ALL.items() if name not in HARDWARE})
    made = Counters.of_process(os.getpid())
    assert made.refused == dict.fromkeys(HARDWARE, errno.ENOENT)
    with pytest.raises(HostError, match="does not count cycles"):
        made.require_hardware()
    found = read(made)
    assert {name for name, count in found.counts.items() if count is None} == HARDWARE
    assert set(rates(found.counts)) == {None}


def test_a_part_of_a_pmu(stand_in: Callable[..., StandIn]) -> None:
    """As in many virtual machines: instructions and cycles, and nothing else."""
    stand_in({name: ALL[name] for name in ("cycles", "instructions", "task_clock")})
    made = Counters.of_process(os.getpid())
    made.require_hardware()
    found = rates(read(made).counts)
    assert found.ipc == ALL["instructions"][0] / ALL["cycles"][0]
    assert found[1:] == (None, None, None)


def test_user_space_only_where_no_more_is_allowed(stand_in: Callable[..., StandIn]) -> None:
    """What happens in the kernel alone would then be counted as 0: it is not counted."""
    stand_in(ALL, kernel_too=False)
    made = Counters.of_process(os.getpid())
    assert made.refused == dict.fromkeys(counters.IN_KERNEL, errno.EACCES)
    found = read(made)
    assert found.user_only
    assert found.counts["instructions"] == ALL["instructions"][0]
    assert found.counts["context_switches"] is None


# -- multiplexing -------------------------------------------------------------------------------------------------------


def test_counts_are_scaled_to_the_time_that_was_not_counted(stand_in: Callable[..., StandIn]) -> None:
    stand_in({"cycles": (300, 1000, 250), "instructions": (600, 1000, 250), "page_faults": (7, 1000, 1000)})
    found = read(Counters.of_process(os.getpid()))
    assert found.scaled
    assert (found.counts["cycles"], found.counts["instructions"], found.counts["page_faults"]) == (1200, 2400, 7)
    assert rates(found.counts).ipc == 2.0


def test_an_event_that_got_no_turn_was_not_counted(stand_in: Callable[..., StandIn]) -> None:
    stand_in({"cycles": (0, 1000, 0), "instructions": (5, 1000, 1000), "branches": (0, 0, 0)})
    found = read(Counters.of_process(os.getpid()))
    assert (found.counts["cycles"], found.counts["instructions"]) == (None, 5)
    assert found.counts["branches"] == 0, "the job did not run at all"


# -- lives together -----------------------------------------------------------------------------------------------------

COUNTS = st.fixed_dictionaries({event.name: st.none() | st.integers(0, 1 << 50) for event in EVENTS})


@given(COUNTS, COUNTS)
def test_two_lives_are_added_up(first: dict[str, int | None], second: dict[str, int | None]) -> None:
    counts, found, partial = joined(first, rates(first)._asdict(), second)
    for name, count in counts.items():
        known = [life[name] for life in (first, second) if life[name] is not None]
        assert count == (sum(known) if known else None)  # type: ignore[arg-type]
    assert partial == any((first[name] is None) != (second[name] is None) for name in counts)
    for rate, (part, whole) in PARTS.items():
        uneven = any((life[part] is None) != (life[whole] is None) for life in (first, second))
        assert found[rate] is None or (not uneven and found[rate] == getattr(rates(counts), rate))


def test_a_rate_of_unequal_parts_is_none_for_good() -> None:
    first: dict[str, int | None] = {"instructions": 100, "cycles": None}
    whole: dict[str, int | None] = {"instructions": 100, "cycles": 50}
    counts, found, partial = joined(first, rates(first)._asdict(), whole)
    assert (counts, found["ipc"], partial) == ({"instructions": 200, "cycles": 50}, None, True)
    counts, found, _ = joined(counts, found, whole)
    assert (counts["cycles"], found["ipc"]) == (100, None)
