"""The checkpoints of a running job: who asks for them, one at a time, and what follows from how each ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from imgrun.channel import Channel
from imgrun.errors import CheckpointError, HostError, ImgrunError
from imgrun.spec import JobSpec
from imgrun.state import JobDir

if TYPE_CHECKING:
    from imgrun.checkpoints.freezing import Freezing
    from imgrun.checkpoints.subject import How, Subject


class Owner(Protocol):
    """Whoever has the job: what the freezer needs of it."""

    running: bool

    def subject(self) -> Subject:
        """The job as it is to be saved now. Raises ImgrunError when it cannot be."""

    def make_room(self) -> None:
        """A checkpoint begins: what waits for memory must get it."""

    def take_room_back(self) -> None:
        """It has ended, and the job goes on."""

    def note(self, text: str) -> None:
        """Keep it for the record."""

    def tell(self, text: str) -> None:
        """Say it at once as well: nobody has asked for what it is about."""


class Freezer:
    """Makes the checkpoints of one job, each in a process of its own (imgrun.checkpoints.freezing)."""

    def __init__(self, job: JobDir, spec: JobSpec, owner: Owner, *, stop_when_due: bool) -> None:
        """``stop_when_due``: the checkpoints of ``checkpoint_every`` end the job, for a scheduler that starts it again."""
        self.under_way: Freezing | None = None
        self.frozen_to: str | None = None
        """Where the checkpoint is that ended the job."""
        self.unplaced: ImgrunError | None = None
        """Why the checkpoint that ended the job has not got its name."""
        self._job = job
        self._every = spec.checkpoint_every
        self._target = spec.checkpoint_dir
        self._owner = owner
        self._stop_when_due = stop_when_due
        self._next_at: float | None = None
        self._end_next = False

    def begin(self, target: str, how: How, asker: Channel | None) -> None:
        """Begin a checkpoint. When ``under_way`` is readable, ``hear`` is to be called."""
        try:
            from imgrun.checkpoints.freezing import Freezing

            if self.under_way is not None:
                raise CheckpointError(f"job {self._job.id} is being checkpointed already", "wait for that to end")
            freezing = Freezing(self._owner.subject(), target, how, asker)
            self._note_place(freezing)
            self._owner.make_room()
            try:
                freezing.begin()
            except (ImgrunError, OSError):
                self._owner.take_room_back()
                raise
        except (ImgrunError, OSError, ImportError) as e:  # a module that cannot be opened is not found, either
            why = getattr(e, "strerror", None) or e
            error = e if isinstance(e, ImgrunError) else HostError(f"it cannot be begun: {why}", "try again")
            if asker is None:
                self._owner.tell(f"no checkpoint: {error.message}")
                return
            with contextlib.suppress(OSError):  # whoever asked has gone
                asker.send({"error": type(error).__name__, "message": error.message, "hint": error.hint})
            return
        self.under_way = freezing

    def _note_place(self, freezing: Freezing) -> None:
        """For whoever cleans up, if this process is killed."""
        making = None if freezing.how.archive else {"target": freezing.target, "id": freezing.identifier}
        record = self._job.read("state.json") | {"building": freezing.building, "making": making}
        try:
            self._job.write("state.json", record)
        except ImgrunError as e:
            self._owner.note(e.message)

    def hear(self) -> None:
        """There is news of the checkpoint under way: take note of how it went, if it has ended."""
        freezing = self.under_way
        assert freezing is not None
        if not freezing.is_done():
            return
        self.under_way = None
        error = freezing.finish()
        for warning in freezing.warnings:
            self._owner.note(warning)
        if error is not None:
            say: Callable[[str], None] = self._owner.note if freezing.asker else self._owner.tell
            say(f"checkpoint failed: {error.message}")
            if freezing.alone is not None:
                self.unplaced = error
                return
        elif not freezing.how.leave_running:
            self.frozen_to = freezing.target
            return
        self._owner.take_room_back()
        if self._end_next and self._owner.running:
            self.freeze_and_end()

    def freeze_and_end(self) -> None:
        """What a checkpoint signal asks for. Schedulers send it more than once, and whatever is being done."""
        if self.under_way is None:
            self._end_next = False
            self._freeze(leave_running=False)
        elif self.under_way.how.leave_running:
            self._end_next = True  # once that is done

    def start_clock(self, moment: float) -> None:
        """From now on the time of ``checkpoint_every`` runs."""
        if self._every is not None:
            self._next_at = moment + self._every

    @property
    def due(self) -> float | None:
        """When the next checkpoint is to be made that time asks for; None while one is being made."""
        return None if self.under_way is not None else self._next_at

    def freeze_when_due(self, moment: float) -> None:
        """The newest good checkpoint stays until the next is complete."""
        if self.due is not None and moment >= self.due:
            self.start_clock(moment)
            self._freeze(leave_running=not self._stop_when_due)

    def _freeze(self, *, leave_running: bool) -> None:
        """Begin a checkpoint that nobody waits for, to where the spec says."""
        from imgrun.checkpoints.subject import How

        if self._target is not None:
            self.begin(self._target, How(leave_running=leave_running), None)
