"""A checkpoint in the making, beside a supervisor that goes on relaying: the work is done by a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import Any, NoReturn

from imgrun import checkpoint, errors
from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoints.placing import adopt, publish
from imgrun.checkpoints.subject import How, Subject, building_archive, building_place
from imgrun.errors import CheckpointError, ImgrunError, JobStateError
from imgrun.isolation.processes import is_dying
from imgrun.storage.trees import remove_tree

KILLED = {"error": "CheckpointError", "message": "the process that made the checkpoint was killed", "hint": "try again"}
LACKING = "may lack what comes last: hashes of the job's files, the image"
PATIENCE = 60
"""Seconds for a job that was killed to be gone; it may have much memory to give back."""


class Freezing:
    """One checkpoint. ``asker`` is who wants to know how it went; None when it is the supervisor itself."""

    def __init__(self, subject: Subject, target: str, how: How, asker: Channel | None) -> None:
        self.target = target
        self.how = how
        self.identifier = os.urandom(8).hex()
        """What its manifest is known by."""
        self.building = [building_place(subject, target, how)]
        """What is to be removed when it does not come to its end."""
        if (unfinished := building_archive(subject, target, how)) is not None:
            self.building.append(unfinished)
        self.asker = asker
        self.alone: dict[str, Any] | None = None
        """CRIU's statistics, once all is saved and the job is being ended: from then on it is in the checkpoint alone."""
        self.warnings: list[str] = []
        self._subject = subject
        self._init = -1
        self._channel: Channel
        self._pid = 0
        self._answer: dict[str, Any] = {}

    def begin(self) -> None:
        """Raises JobStateError, and OSError where there is no room for one more process."""
        try:
            self._init = os.pidfd_open(self._subject.init)
        except ProcessLookupError:
            raise JobStateError("the job is ending", "see 'imgrun inspect' for how") from None
        self._channel, theirs = Channel.pair()
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self._init)
            self._channel.close()
            theirs.close()
            raise
        if self._pid == 0:
            self._channel.close()
            self._work(theirs, parent)
        theirs.close()

    def fileno(self) -> int:
        """Readable when there is news of it."""
        return self._channel.fileno()

    def is_done(self) -> bool:
        """Take the news, and tell whether it has ended."""
        received = self._channel.receive()
        if received is not None and "alone" in received[0]:
            self.alone = received[0]["alone"]
            return False
        self._answer = received[0] if received and received[0] else KILLED
        return True

    def finish(self) -> ImgrunError | None:
        """Take note of the outcome, and pass it on to the asker. Returns what went wrong."""
        self._channel.close()
        os.waitpid(self._pid, 0)
        answer = self._rescued(self._answer) if "error" in self._answer else self._answer
        os.close(self._init)
        if self.asker is not None:
            with contextlib.suppress(OSError):  # whoever asked has gone
                self.asker.send(answer)
        if "error" not in answer:
            self.warnings = list(answer["warnings"])
            return None
        return _error(answer)

    def _rescued(self, failure: dict[str, Any]) -> dict[str, Any]:
        """What to say of a failure: the checkpoint may be complete all the same, and the job in it alone."""
        place, scratch = self.building[0], self._subject.scratch
        alone = self.alone is not None and self._ends()
        good = alone and self.how.archive
        try:
            if not self.how.archive:
                if alone:
                    with contextlib.suppress(OSError):  # it has its name, or is not adopted then
                        publish(place)
                good = adopt(place, self.target, scratch, self.identifier)
        except (ImgrunError, OSError) as e:
            failure = _described(e)
        if not alone or self.how.archive:
            for path in self.building:
                with contextlib.suppress(ImgrunError):
                    remove_tree(path)
        if not good:
            self.alone = self.alone if alone else None
            if alone and place not in failure["message"]:
                failure = failure | {"message": f"{failure['message']}; the job has ended, and what was saved is {place}"}
            return failure
        warnings = [f"{failure['message']}; it is good, but {LACKING}"]
        return {"ok": True, "timings": [], "warnings": warnings, "statistics": self.alone or {}}

    def _ends(self) -> bool:
        """Whether the job was killed, if its maker came to that; then it has ended when this returns."""
        ended = select.poll()
        ended.register(self._init, select.POLLIN)
        for _ in range(2):
            if ended.poll(0) or is_dying(self._subject.init):
                ended.poll(PATIENCE * 1000)
                return True
            time.sleep(0.05)
        return False

    def _work(self, channel: Channel, parent: int) -> NoReturn:
        answer: dict[str, Any] = {}
        try:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(0)
            signal.set_wakeup_fd(-1)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)  # they are meant for the supervisor

            def alone(statistics: dict[str, Any]) -> None:
                channel.send({"alone": statistics})

            saved = checkpoint.save(self._subject, self.target, self.how, self.identifier, alone)
            statistics = saved.manifest["statistics"]
            answer = {"ok": True, "timings": saved.timings, "warnings": saved.warnings, "statistics": statistics}
        except Exception as e:  # noqa: BLE001 - the supervisor must hear of it
            answer = _described(e)
        finally:
            try:
                channel.send(answer)
            finally:
                os._exit(0)


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, ImgrunError):
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    if os.environ.get("IMGRUN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    return {"error": "CheckpointError", "message": f"the checkpoint failed: {error!r}", "hint": "this is a bug"}


def _error(answer: dict[str, Any]) -> ImgrunError:
    kind: type[ImgrunError] = getattr(errors, answer["error"], CheckpointError)
    return kind(answer["message"], answer["hint"])
