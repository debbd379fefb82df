"""``--oom hold``: a job that has no memory left stands still until somebody raises its limit, checkpoints it or stops it.

With cgroup v1 the kernel itself does it: whoever needs memory that is not there waits instead of being killed
(memory.oom_control), and the rest of the job is frozen. With cgroup v2 it can only kill. There the job is slowed down from
a little below its limit on (memory.high) and frozen when nothing of what it holds can be taken back; one that asks for a
lot at once may still reach the limit and be killed.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING

from imgrun.errors import HostError, ImgrunError, LimitError
from imgrun.state import JobDir

if TYPE_CHECKING:
    from imgrun.accounting.verdict import Verdict
    from imgrun.isolation.cgroups.cgroup import JobCgroup
    from imgrun.isolation.cgroups.limits import Limits

PATIENCE = 1
"""Seconds that a job may want memory while it starts."""


class Hold:
    """Whether one job is held, and what it takes."""

    def __init__(self, job: JobDir, cgroup: JobCgroup) -> None:
        """Have the kernel not kill the job at its limit. Raises LimitError where it cannot."""
        self._job = job
        self._cgroup = cgroup
        cgroup.memory.hold_when_full()
        self.held: Verdict | None = None
        """Why, while it is."""

    def is_due(self) -> bool:
        """Whether the job waits for memory at its own limit, and is not held yet."""
        return self.held is None and self._cgroup.memory.is_full()

    def wait_for_start(self, status: int) -> None:
        """Return when the shim's report can be read.

        A job that has not even the memory to start is killed for that after a while: nobody could tell why it waits.
        """
        poll = select.poll()
        poll.register(status, select.POLLIN)
        while not poll.poll(PATIENCE * 1000):
            if self._cgroup.memory.is_full():
                self._cgroup.memory.kill_when_full()

    def begin(self, verdict: Verdict) -> None:
        self.held = verdict
        self._cgroup.stop_all()
        self._note("held", verdict.message)

    def renew(self) -> None:
        """The limit has changed."""
        try:
            self._cgroup.memory.hold_when_full()
        except LimitError:
            pass  # it is ending

    def end(self) -> None:
        """Let it go on."""
        if self.held is not None:
            self.held = None
            self._thaw()
            self._note("running", None)

    def give_room(self, limits: Limits, room: int | None = None) -> None:
        """Let a held job go on in more memory than it may have, to be stopped or saved: what it waits for it must get first.

        ``room`` in bytes; None for no limit of its own.
        """
        if self.held is not None and limits.memory is not None:
            memory = None if room is None else limits.memory + room
            try:
                self._cgroup.set_limits(limits._replace(memory=memory, swap=limits.swap if memory else None))
            except LimitError:
                pass  # the cgroup above has no more: the kernel will choose
            self.renew()
            self._thaw()

    def take_back(self, limits: Limits) -> None:
        """After :meth:`give_room`, hold it again: at its own limit, or at what it has come to hold."""
        if self.held is not None:
            self._cgroup.stop_all()
            try:
                self._cgroup.set_limits(limits)
            except LimitError:
                pass  # it holds more than that now; it stands still all the same
            self.renew()

    def _thaw(self) -> None:
        try:
            self._cgroup.thaw()
        except (HostError, OSError):
            pass  # frozen from above too, or gone: not by us

    def _note(self, state: str, reason: str | None) -> None:
        with contextlib.suppress(ImgrunError):  # a full disk of the state's is no reason to end the job
            self._job.write("state.json", self._job.read("state.json") | {"state": state, "hold_reason": reason})
