"""How a job ended: from what its init reported, the supervisor did and the kernel says, to one record."""

from __future__ import annotations

import os
import signal
from collections.abc import Set
from typing import TYPE_CHECKING, NamedTuple

from imgrun.errors import ImgrunError
from imgrun.init_shim import Exited, Record, Signaled
from imgrun.result import Reason, Result, Usage
from imgrun.spec import JobSpec
from imgrun.state import JobDir, now
from imgrun.units import format_size

if TYPE_CHECKING:
    from imgrun.launch import Launch

FULL = 64 << 10
"""Fewer free bytes than this are none."""
IMAGE_INIT_ENDS = {signal.SIGINT: "powered off", signal.SIGHUP: "asked for a restart"}
"""How the kernel ends an init that calls reboot(2) in its PID namespace."""


class Exit(NamedTuple):
    """The end of the command, or of the image's init."""

    code: int | None
    signal: int | None
    message: str | None = None
    reported: bool = True
    """Whether the job's init has lived to tell."""


FOREIGN = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""Signals that end a program and mostly come from somebody else."""


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

    def ended(
        self, decided: Reason | None, end: Exit, usage: Usage, frozen_to: str | None, sent: Set[int] = frozenset()
    ) -> Result:
        """The record of a job that ran. ``decided`` is why the supervisor ended it, if it did; ``sent`` its signals."""
        launch = self.launch
        assert launch is not None
        reason: Reason = decided or ("exited" if end.signal is None else "signaled")
        if decided is None and launch.meter.memory_killed():
            reason = "memory-limit"
        message, hint = end.message, None
        match reason:
            case "memory-limit":
                verdict = launch.meter.memory_verdict(usage.memory_peak)
                reason = "host-memory" if verdict.host else reason
                message, hint = verdict.message, verdict.hint
            case "checkpointed":
                end = Exit(self.spec.checkpoint_exit_code, None)
                message, hint = f"frozen to {frozen_to}", f"'imgrun restore {frozen_to}' continues it"
                if frozen_to == "-":
                    message, hint = "frozen to an archive, written to standard output", "'imgrun restore FILE' continues it"
            case "lost":
                message = "a process that served the job from outside ended, and the job with it"
                kept = self.job.read("job.json").get("keep")
                hint = f"see {self.job.path}/fuse.log, or criu/lazy.log there" if kept else "--no-rm keeps what it logged"
                if (changed := launch.changed_memory()) is not None:
                    message, hint = changed
            case "time-limit":
                message = f"the job ran into its time limit of {self.spec.time_limit:g} s"
                hint = "give a larger --time-limit"
            case "signaled" | "exited" if not end.reported and signal.SIGKILL not in sent:
                reason, message, hint = _init_lost(end)
            case "signaled" if end.signal in FOREIGN and end.signal not in sent and not self.spec.tty:
                name = signal.Signals(end.signal).name
                message = f"the command was killed by {name}, which imgrun did not send"
                hint = "a process of the job did, or somebody on this host"
        launch.warnings += shortages(self.spec, launch, usage)
        return self.record(reason, end._replace(message=message), usage, hint)

    def failed(self, error: ImgrunError) -> Result:
        """The record of a job that never ran, or whose supervisor could not go on."""
        if self.launch is not None and self.launch.has_meter and self.launch.meter.memory_killed():
            verdict = self.launch.meter.memory_verdict(None)
            end = Exit(None, signal.SIGKILL, f"{verdict.message}, before its command ran")
            return self.record("host-memory" if verdict.host else "memory-limit", end, Usage(), verdict.hint)
        result = self.record("failed-to-start", Exit(None, None, error.message), Usage(), error.hint)
        result.failure_code = error.exit_code
        result.failure_class = type(error).__name__
        return result


def _init_lost(end: Exit) -> tuple[Reason, str, str]:
    """What it means that the job's init has ended without a report. Nobody inside the job can make it (pid_namespaces(7))."""
    if end.signal == signal.SIGKILL:
        return "signaled", "the job was killed from outside: its init got a SIGKILL that imgrun did not send", "see who did"
    how = f"by {signal.Signals(end.signal).name}" if end.signal else f"with {end.code}"
    return "lost", f"the job's init ended {how} and did not say how the command did", "this is a bug of imgrun's shim"


def shortages(spec: JobSpec, launch: Launch, usage: Usage) -> list[str]:
    """What the job was short of and may have failed for, as warnings."""
    found = []
    if usage.pids_refused:
        limit = f"the limit of {spec.pids} processes" if spec.pids else "a limit of processes above the job's own"
        found.append(f"{limit} kept the job from starting a process {usage.pids_refused} times: give a larger --pids")
    free = launch.scratch.free()
    if free is not None and free < max(FULL, (spec.scratch_size or 0) // 1000):
        if spec.scratch_size is not None:
            what, advice = f"scratch of {format_size(spec.scratch_size)}", "give a larger --scratch-size"
        else:
            what, advice = "disk", f"free some of the one that holds {launch.scratch.path}"
        found.append(f"the job's {what} was full at its end, and writes may have failed: {advice}")
    return found
