"""Measuring: interleaved runs, what they sum up to, and how long a process takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

Case = Callable[[], Mapping[str, float]]
"""Does the thing once and returns what was measured, by name. Raises Unavailable when it cannot be done here."""


class Unavailable(Exception):
    """This host cannot do it; the reason is for the report."""


class Summary(NamedTuple):
    """Several measurements of one thing."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Raises ValueError when there is none."""
        known = sorted(values)
        if not known:
            raise ValueError("nothing was measured")
        return cls(statistics.median(known), known[0], known[-1], len(known))

    @property
    def spread(self) -> float:
        """The largest over the smallest."""
        return self.high / self.low if self.low > 0 else float("inf")


class Outcome:
    """What the cases gave: values by case and name, in the order they were measured, and why some gave none."""

    def __init__(self, cases: Iterable[str] = ()) -> None:
        self.values: dict[str, dict[str, list[float]]] = {case: {} for case in cases}
        self.refused: dict[str, str] = {}

    def add(self, case: str, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            self.values.setdefault(case, {}).setdefault(name, []).append(value)

    def refuse(self, case: str, reason: str) -> None:
        self.refused[case] = reason
        self.values.pop(case, None)

    def summary(self, case: str, name: str) -> Summary | None:
        """None when the case, or this of it, was not measured."""
        values = self.values.get(case, {}).get(name)
        return Summary.of(values) if values else None

    def median(self, case: str, name: str) -> float | None:
        found = self.summary(case, name)
        return found.median if found else None

    def ratio(self, case: str, reference: str, name: str) -> float | None:
        """The median of one case over that of another; None when one of them is missing or zero."""
        ours, theirs = self.median(case, name), self.median(reference, name)
        return ours / theirs if ours is not None and theirs else None

    def runs(self) -> int:
        """The largest number of runs of any case."""
        return max((len(v) for names in self.values.values() for v in names.values()), default=0)

    def worst_spread(self) -> float:
        """The largest spread among all that was measured more than once."""
        many = [Summary.of(v) for names in self.values.values() for v in names.values() if len(v) > 1]
        return max((summary.spread for summary in many), default=1.0)


def interleave(
    cases: Mapping[str, Case],
    *,
    rounds: int,
    warmups: int = 1,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run A B C A B C ...: what disturbs the machine for a while disturbs all of them.

    The warm-up rounds do not count. After ``seconds`` no further round begins, but one is always measured.
    """
    outcome = Outcome(cases)
    began = clock()
    for number in range(-warmups, rounds):
        if number > 0 and clock() - began > seconds:
            break
        for name, case in cases.items():
            if name in outcome.refused:
                continue
            try:
                measured = case()
            except Unavailable as e:
                outcome.refuse(name, str(e))
                continue
            if number >= 0:
                outcome.add(name, measured)
    return outcome


class Ended(NamedTuple):
    """How a process ended: exit code (128+N for signal N), seconds of wall and processor time, its last words."""

    code: int
    wall: float
    cpu: float
    stderr: str


def run(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program without input, its output thrown away, and time it. Raises Unavailable when there is no such program.

    Processor time is that of the process and the children it waited for; what it leaves to others is not in it.
    """
    words = os.memfd_create("stderr", os.MFD_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, words, 2),
        ]
        began = time.perf_counter()
        try:
            pid = os.posix_spawnp(argv[0], list(argv), environment or os.environ, file_actions=actions)
        except FileNotFoundError:
            raise Unavailable(f"{argv[0]} is not installed") from None
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - began
        text = os.pread(words, 1 << 16, 0).decode(errors="replace")
    finally:
        os.close(words)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code if code >= 0 else 128 - code, wall, usage.ru_utime + usage.ru_stime, text)


def run_checked(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """As :func:`run`; raises Unavailable, with the program's own words, when it does not exit with 0."""
    ended = run(argv, environment)
    if ended.code != 0:
        raise Unavailable(f"exit status {ended.code}: {last_line(ended.stderr)}")
    return ended


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(it said nothing)"
