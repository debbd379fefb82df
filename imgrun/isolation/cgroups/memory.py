"""The memory of a job: what happens at its limit, and how that is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from imgrun.errors import LimitError
from imgrun.isolation.cgroups.usage import MemoryEvents

if TYPE_CHECKING:
    from imgrun.isolation.cgroups import v1, v2
    from imgrun.isolation.cgroups.oom import Levels


class JobMemory:
    """The limit of one job's memory and the kills for it; where there is no such cgroup, nothing happens and is told."""

    def __init__(self, find: Callable[[], v1.V1Directory | v2.V2Directory | None]) -> None:
        """``find`` gives the directory that has the controller. With v2, a running job may come to have one."""
        self._find = find
        self._event_fd = -1
        self._levels: Levels | None = None

    @property
    def _directory(self) -> v1.V1Directory | v2.V2Directory | None:
        return self._find()

    def kills(self) -> int | None:
        """How many of the job's processes the kernel killed for want of memory, whoever's memory it was."""
        return self.events().kills

    def events(self) -> MemoryEvents:
        return MemoryEvents() if self._directory is None else self._directory.memory_events()

    def event_source(self) -> tuple[int, int]:
        """A descriptor for epoll and the events to wait for, or (-1, 0) if this host reports none. ``close`` closes it.

        Call ``events`` after ``acknowledge``. v1: EPOLLIN when an allocation failed at a limit, before a process is killed
        for it, and when the directory goes. v2: EPOLLPRI when a count changes; a job that lives at its limit on page cache
        changes one up to a hundred times a second.
        """
        if self._directory is None:
            return -1, 0
        if self._event_fd < 0:
            try:
                self._event_fd = self._directory.open_memory_events()
            except OSError:
                return -1, 0
        return self._event_fd, (0x001 if self._directory.version == 1 else 0x002)

    def has_event(self) -> bool:
        """Whether an event has come that was not acknowledged. Those before the first ``event_source`` are not known."""
        import select

        if self._event_fd < 0:
            return False
        poll = select.poll()
        poll.register(*self.event_source())
        return bool(poll.poll(0))

    def acknowledge(self) -> None:
        """Take note of an event, so that epoll waits for the next."""
        if self._event_fd >= 0 and self._directory is not None:
            try:
                if self._directory.version == 1:
                    os.eventfd_read(self._event_fd)
                else:
                    os.pread(self._event_fd, 4096, 0)
            except OSError:  # nothing to read, or the directory is gone
                pass

    def hold_when_full(self) -> None:
        """Have the job wait at its memory limit instead of being killed there. Raises LimitError.

        v1: the kernel lets wait who needs memory; system calls that do may fail with ENOMEM. v2: it slows the job down from
        a little below the limit on, and ``is_full`` is to be asked at each event; call this again when the limit changes.
        """
        if self._directory is None:
            raise LimitError("--oom hold needs a memory limit, and there is none here", "see `imgrun doctor`")
        self._directory.hold_when_full()

    def kill_when_full(self) -> None:
        """Take :meth:`hold_when_full` back: the kernel kills at the limit again, also who waits there now."""
        if self._directory is not None:
            self._directory.kill_when_full()

    def is_full(self) -> bool:
        """Whether the job waits at its own memory limit, and there is nothing that could be taken back from it."""
        return self._directory is not None and self._directory.is_full()

    def levels(self) -> Levels | None:
        """What tells whose limit a kill for memory was, if it came after the first call; None without a memory cgroup."""
        from imgrun.isolation.cgroups.oom import Levels

        if self._levels is None and self._directory is not None:
            self._levels = Levels(self._directory, self.has_event)
        return self._levels

    def close(self) -> None:
        if self._levels is not None:
            self._levels.close()
        self._levels = None
        if self._event_fd >= 0:
            os.close(self._event_fd)
        self._event_fd = -1
