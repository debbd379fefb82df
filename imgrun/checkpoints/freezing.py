"""A checkpoint in the making, beside a supervisor that goes on relaying: the work is done by a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Any

from imgrun import checkpoint, errors
from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoints import manifest
from imgrun.checkpoints.placing import adopt
from imgrun.checkpoints.subject import How, Subject, building_archive, building_place
from imgrun.errors import CheckpointError, ImgrunError, RestoreError
from imgrun.state import now
from imgrun.storage.trees import remove_tree

KILLED = {"error": "CheckpointError", "message": "the process that made the checkpoint was killed", "hint": "try again"}
LACKING = "may lack what comes last: hashes of the job's files, the image"
PATIENCE = 60
"""Seconds for a job that was killed to be gone; it may have much memory to give back."""


class Freezing:
    """One checkpoint under way. ``asker`` is who wants to know how it went; None when it is the supervisor itself."""

    def __init__(self, subject: Subject, target: str, how: How, asker: Channel | None) -> None:
        self.leave_running = how.leave_running
        self.target = target
        self.named = not how.archive
        """Whether what is made gets the target's name when it is complete."""
        self.building = [building_place(subject, target, how)]
        """What is to be removed when it does not come to its end."""
        if (unfinished := building_archive(subject, target, how)) is not None:
            self.building.append(unfinished)
        self.asker = asker
        self._began = now()
        self._subject = subject
        self.warnings: list[str] = []
        self._channel, theirs = Channel.pair()
        self._pid = os.fork()
        if self._pid == 0:
            self._channel.close()
            _work(subject, target, how, theirs)
        theirs.close()

    def fileno(self) -> int:
        """Readable when it is done."""
        return self._channel.fileno()

    def finish(self) -> ImgrunError | None:
        """Take note of the outcome, and pass it on to the asker. Returns what went wrong."""
        received = self._channel.receive()
        self._channel.close()
        os.waitpid(self._pid, 0)
        answer: dict[str, Any] = received[0] if received else KILLED
        if "error" in answer:
            answer = self._rescued(answer)
        if self.asker is not None:
            try:
                self.asker.send(answer)
            except OSError:
                pass  # whoever asked has gone
        if "error" not in answer:
            self.warnings = list(answer["warnings"])
            return None
        error: ImgrunError = getattr(errors, answer["error"], CheckpointError)(answer["message"], answer["hint"])
        return error

    def _rescued(self, failure: dict[str, Any]) -> dict[str, Any]:
        """What to say of a failure: the checkpoint may be complete all the same, and the job in it alone."""
        try:
            if self.named:
                if not self.leave_running and manifest.exists(self.building[0]):
                    self._await_end()
                adopt(self.building[0], self.target, self._subject.scratch)
                made = manifest.load(self.target).manifest
                if made["job"] == self._subject.id and made["created_at"] >= self._began:
                    warnings = [f"{failure['message']}; it is good, but {LACKING}"]
                    return {"ok": True, "timings": [], "warnings": warnings, "statistics": made["statistics"]}
        except RestoreError:
            pass
        except ImgrunError as e:
            return {"error": type(e).__name__, "message": e.message, "hint": e.hint}
        for path in self.building:
            with contextlib.suppress(ImgrunError):
                remove_tree(path)
        return failure

    def _await_end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(self._subject.init)
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.poll(PATIENCE * 1000)
            os.close(ended)


def _work(subject: Subject, target: str, how: How, channel: Channel) -> None:
    answer: dict[str, Any] = {}
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)  # they are meant for the supervisor
        saved = checkpoint.save(subject, target, how)
        statistics = saved.manifest["statistics"]
        answer = {"ok": True, "timings": saved.timings, "warnings": saved.warnings, "statistics": statistics}
    except ImgrunError as e:
        answer = {"error": type(e).__name__, "message": e.message, "hint": e.hint}
    except Exception as e:  # noqa: BLE001 - the supervisor must hear of it
        answer = {"error": "CheckpointError", "message": f"the checkpoint failed: {e!r}", "hint": "this is a bug"}
        if os.environ.get("IMGRUN_DEBUG"):
            import traceback

            traceback.print_exc()
    finally:
        channel.send(answer)
        os._exit(0)
