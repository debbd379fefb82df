"""A time series of what a job uses, small enough to be kept with its record (``--sample``).

It has fewer than ``MOST`` points: when it is full every second one goes, and points come half as often from then on.
What a sum such as the processor time was at a point is the sum since the job's first start, over all its lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "wall_seconds", "cpu_seconds", "memory", "pids", "read_bytes", "written_bytes", "instructions", "cycles",
)  # fmt: skip
"""What a point is made of: seconds, bytes and counts; None for what is not measured. ``memory`` is the present level."""
MOST = 513
"""Odd, so that the last point stays when every second one goes, and all have the same distance."""


class Series:
    """The points of one job."""

    def __init__(self, interval: float, earlier: Mapping[str, Any] | None = None, most: int = MOST) -> None:
        """Take a point each ``interval`` seconds, and go on from the series of an earlier life of the job."""
        self.interval = interval
        self._most = most
        self._points: list[list[Any]] = []
        if earlier is not None and list(earlier.get("columns", ())) == list(COLUMNS):
            self._points = [list(point) for point in earlier.get("points", ()) if len(point) == len(COLUMNS)][-most:]
            self.interval = max(interval, float(earlier.get("interval", 0)))

    def add(self, values: Mapping[str, Any]) -> None:
        self._points.append([values.get(name) for name in COLUMNS])
        if len(self._points) >= self._most:
            del self._points[1::2]
            self.interval *= 2

    def to_dict(self) -> dict[str, Any]:
        return {"interval": self.interval, "columns": list(COLUMNS), "points": [list(point) for point in self._points]}
