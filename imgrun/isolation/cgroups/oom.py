"""Who was out of memory when the kernel killed: the job at its own limit, a cgroup above it, or the whole host.

v1: the eventfd of a cgroup's memory.oom_control is written to when that cgroup, or one above it, is out of memory
(Documentation/admin-guide/cgroup-v1/memory.rst). v2: memory.events.local counts in ``oom`` where it was that nothing more
could be had (Documentation/admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

from imgrun.isolation.cgroups import fs, v1, v2

Whose = Literal["job", "above", "host", "inside"]
UNLIMITED = 1 << 60
"""v1 has the largest number of pages for no limit, v2 a word."""


class Culprit(NamedTuple):
    """Who was out of memory. ``inside`` is a cgroup that the job made in its own."""

    whose: Whose
    path: str | None = None
    """Of a cgroup above; None when it cannot be seen from here."""
    limit: int | None = None
    """Bytes."""


class Levels:
    """The job's memory cgroup and those above it, up to where the hierarchy is mounted."""

    def __init__(self, directory: v1.V1Directory | v2.V2Directory, has_event: Callable[[], bool]) -> None:
        """``has_event``: whether the job's own cgroup has had an event that was not noted yet (v1)."""
        self._own = directory
        self._has_event = has_event
        self._above: list[str] = []
        """From the outermost to the job's parent."""
        mount = fs.mount_of(directory.path, fs.parse_mounts(fs.read("/proc/self/mountinfo")))
        top = mount.path if mount is not None else os.path.dirname(directory.path)
        path = os.path.dirname(directory.path)
        while len(path) > len(top):
            self._above.insert(0, path)
            path = os.path.dirname(path)
        # Where only a part of the hierarchy is mounted, its top is somebody's cgroup as well.
        is_root = directory.version == 1 and os.path.exists(f"{top}/release_agent")
        if not is_root and os.path.exists(f"{top}/{self._limit_file}"):
            self._above.insert(0, top)
        self._blind = not is_root
        """Whether there are cgroups above that cannot be watched, or were not yet when an event came."""
        self._fired: Culprit | None = None
        self._events: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        for path in self._above:
            if isinstance(directory, v1.V1Directory):
                try:
                    self._events[path] = v1.V1Directory(path, directory.controllers).open_memory_events()
                except OSError:  # not ours to watch
                    self._blind = True
            else:
                self._counts[path] = self._times_out(path)
        self._blind |= has_event()

    @property
    def _limit_file(self) -> str:
        return "memory.limit_in_bytes" if self._own.version == 1 else "memory.max"

    @staticmethod
    def _times_out(path: str) -> int:
        return fs.keyed(f"{path}/memory.events.local").get("oom", 0)

    def _limit(self, path: str) -> int | None:
        limit = fs.number(f"{path}/{self._limit_file}")
        return limit if limit is not None and limit < UNLIMITED else None

    def note_event(self) -> None:
        """Find out who it was that was out of memory just now: to be called at each event of the job's own cgroup."""
        if self._own.version == 2:
            return  # its counts stay
        fired = []
        for path, event in self._events.items():
            try:
                os.eventfd_read(event)
                fired.append(path)
            except BlockingIOError:
                continue
        if fired:
            self._fired = Culprit("above", fired[0], self._limit(fired[0]))
        elif self._blind and not self._own_was_full():
            self._fired = self._tightest_above()
        else:
            self._fired = Culprit("job", self._own.path, self._limit(self._own.path))

    def _own_was_full(self) -> bool:
        """Whether the job has ever met its own limit, which can be read where others cannot be watched."""
        limit = self._limit(self._own.path)
        peak = fs.number(f"{self._own.path}/memory.max_usage_in_bytes")
        # That of memory and swap together counts too.
        return limit is not None and (v1.was_full(peak, limit) or bool(self._own.memory_events().at_limit))

    def _tightest_above(self) -> Culprit:
        """The cgroup above with the least limit, where none of them could be watched; if none has one, one out of sight."""
        limits = [(limit, path) for path in self._above if (limit := self._limit(path)) is not None]
        return Culprit("above", min(limits)[1], min(limits)[0]) if limits else Culprit("above")

    def at_own_limit(self) -> bool:
        """Whether the last event was of the job's own limit; with v2, whether nobody else's is known to be reached."""
        if self._own.version == 1:
            return self._fired is not None and self._fired.whose == "job"
        return not any(self._times_out(path) > self._counts[path] for path in self._above)

    def culprit(self) -> Culprit:
        """Who it was at the last kill in the job."""
        if self._own.version == 1:
            if self._fired is None and self._has_event():
                self.note_event()  # the job ended before anybody looked, as where it could not even start
            return self._fired or Culprit("host")
        for path in self._above:
            if self._times_out(path) > self._counts[path]:
                return Culprit("above", path, self._limit(path))
        own = self._times_out(self._own.path)
        if own:
            return Culprit("job", self._own.path, self._limit(self._own.path))
        if fs.keyed(f"{self._own.path}/memory.events").get("oom", 0):
            return Culprit("inside")
        return Culprit("host")

    def close(self) -> None:
        for event in self._events.values():
            os.close(event)
        self._events.clear()
