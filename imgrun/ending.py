"""How a job ended: from what its init reported, the supervisor did and the kernel says, to one record."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NamedTuple

from imgrun.errors import ImgrunError
from imgrun.init_shim import Exited, Record, Signaled
from imgrun.result import Reason, Result, Usage
from imgrun.spec import JobSpec
from imgrun.state import JobDir, now

if TYPE_CHECKING:
    from imgrun.launch import Launch

IMAGE_INIT_ENDS = {signal.SIGINT: "powered off", signal.SIGHUP: "asked for a restart"}
"""How the kernel ends an init that calls reboot(2) in its PID namespace."""


class Exit(NamedTuple):
    """The end of the command, or of the image's init."""

    code: int | None
    signal: int | None
    message: str | None = None


def exit_of(last: Record | None, wait_status: int, init: str) -> Exit:
    """What the init reported last decides; without a report, how the init itself ended (wait(2))."""
    if isinstance(last, Exited):
        return Exit(last.code, None)
    if isinstance(last, Signaled):
        return Exit(None, last.signal)
    if not os.WIFSIGNALED(wait_status):
        return Exit(os.WEXITSTATUS(wait_status), None)
    signum = os.WTERMSIG(wait_status)
    if init == "image" and signum in IMAGE_INIT_ENDS:
        return Exit(0, None, f"the image's init {IMAGE_INIT_ENDS[signal.Signals(signum)]}")
    return Exit(None, signum)


class Ending(NamedTuple):
    """What the record of a job is made of."""

    job: JobDir
    spec: JobSpec
    launch: Launch | None
    started_at: str | None

    def record(self, reason: Reason, end: Exit, usage: Usage, hint: str | None = None) -> Result:
        launch = self.launch
        return Result(
            id=self.job.id, name=self.spec.name, image=self.spec.image, command=self.spec.command, reason=reason,
            exit_code=end.code, signal=end.signal, message=end.message, hint=hint, started_at=self.started_at,
            finished_at=now(), hostname=launch.hostname if launch else None, usage=usage,
            warnings=tuple(launch.warnings) if launch else (), timings=dict(launch.timings) if launch else {},
        )  # fmt: skip

    def ended(self, decided: Reason | None, end: Exit, usage: Usage, frozen_to: str | None) -> Result:
        """The record of a job that ran. ``decided`` is why the supervisor ended it, if it did."""
        launch = self.launch
        assert launch is not None
        reason: Reason = decided or ("exited" if end.signal is None else "signaled")
        if end.signal == signal.SIGKILL and decided is None and launch.meter.memory_killed():
            reason = "memory-limit"
        message, hint = end.message, None
        match reason:
            case "memory-limit":
                message, hint = launch.meter.memory_verdict(usage)
            case "checkpointed":
                end = Exit(self.spec.checkpoint_exit_code, None)
                message, hint = f"frozen to {frozen_to}", f"'imgrun restore {frozen_to}' continues it"
            case "lost":
                message = "the process that served the image ended, and the job with it"
                hint = f"see {self.job.path}/fuse.log"
            case "time-limit":
                message = f"the job ran into its time limit of {self.spec.time_limit:g} s"
                hint = "give a larger --time-limit"
        return self.record(reason, end._replace(message=message), usage, hint)

    def failed(self, error: ImgrunError) -> Result:
        """The record of a job that never ran, or whose supervisor could not go on."""
        result = self.record("failed-to-start", Exit(None, None, error.message), Usage(), error.hint)
        result.failure_code = error.exit_code
        result.failure_class = type(error).__name__
        return result
