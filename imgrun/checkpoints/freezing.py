"""A checkpoint in the making, beside a supervisor that goes on relaying: the work is done by a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

from imgrun import checkpoint, errors
from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoints.manifest import load
from imgrun.checkpoints.subject import How, Subject, building_archive, building_place
from imgrun.errors import CheckpointError, ImgrunError
from imgrun.state import now
from imgrun.storage.trees import remove_tree


class Freezing:
    """One checkpoint under way. ``asker`` is who wants to know how it went; None when it is the supervisor itself."""

    def __init__(self, subject: Subject, target: str, how: How, asker: Channel | None) -> None:
        self.leave_running = how.leave_running
        self.target = target
        self.building = [building_place(subject, target, how)]
        """What is to be removed when it does not come to its end."""
        if (unfinished := building_archive(subject, target, how)) is not None:
            self.building.append(unfinished)
        self.asker = asker
        self._began = now()
        self._job = subject.id
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
        answer: dict[str, Any] = received[0] if received else self._killed()
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

    def _killed(self) -> dict[str, Any]:
        """What to say when the process was killed: the checkpoint may be there all the same, and the job in it alone."""
        for path in self.building:
            remove_tree(path)
        try:
            manifest = load(self.target).manifest
        except ImgrunError:
            manifest = {}
        if not self.leave_running and manifest.get("job") == self._job and manifest["created_at"] >= self._began:
            warning = "what the job wrote to disk is not hashed: the process that did it was killed"
            return {"ok": True, "timings": [], "warnings": [warning], "statistics": manifest["statistics"]}
        return {"error": "CheckpointError", "message": "the process that made the checkpoint was killed", "hint": "try again"}


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
