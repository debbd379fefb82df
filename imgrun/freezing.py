"""A checkpoint in the making, beside a supervisor that goes on relaying: the work is done by a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

from imgrun import checkpoint, errors
from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoint import Subject
from imgrun.errors import CheckpointError, ImgrunError
from imgrun.storage.trees import remove_tree


class Freezing:
    """One checkpoint under way. ``asker`` is who wants to know how it went; None when it is the supervisor itself."""

    def __init__(self, subject: Subject, target: str, *, leave_running: bool, asker: Channel | None) -> None:
        self.leave_running = leave_running
        self.target = target
        self.building = checkpoint.building_place(target, subject.id)
        self.asker = asker
        self._channel, theirs = Channel.pair()
        self._pid = os.fork()
        if self._pid == 0:
            self._channel.close()
            _work(subject, target, leave_running, theirs)
        theirs.close()

    def fileno(self) -> int:
        """Readable when it is done."""
        return self._channel.fileno()

    def finish(self) -> ImgrunError | None:
        """Take note of the outcome, and pass it on to the asker. Returns what went wrong."""
        received = self._channel.receive()
        self._channel.close()
        os.waitpid(self._pid, 0)
        if received is None:
            remove_tree(self.building)
        answer: dict[str, Any] = received[0] if received else {
            "error": "CheckpointError", "message": "the process that made the checkpoint was killed", "hint": "try again"
        }  # fmt: skip
        if self.asker is not None:
            try:
                self.asker.send(answer)
            except OSError:
                pass  # whoever asked has gone
        if "error" not in answer:
            return None
        error: ImgrunError = getattr(errors, answer["error"], CheckpointError)(answer["message"], answer["hint"])
        return error


def _work(subject: Subject, target: str, leave_running: bool, channel: Channel) -> None:
    answer: dict[str, Any] = {"ok": True}
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)  # they are meant for the supervisor
        checkpoint.save(subject, target, leave_running=leave_running)
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
