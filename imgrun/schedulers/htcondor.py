"""A job of HTCondor's, which checkpoints itself (``imgrun start --htcondor``, and ``imgrun-singularity``).

The protocol, as the manual has it under "Self-Checkpointing Applications": the job exits with checkpoint_exit_code when its
checkpoint is complete; the starter carries transfer_checkpoint_files to the submit host and starts the same command again,
here at once, or after an eviction in the sandbox of another host. So this module

- keeps the checkpoint as the file ``ckpt`` of the sandbox, complete or absent (htcondor_files says why a file);
- freezes at the signal that HTCondor evicts and holds with (kill_sig), and ends with that code after each periodic checkpoint;
- sees that whatever transfer_output_files lists is there at an eviction, since a listed file that is missing holds the job;
- sees that what earlier lives have written looks changed in this one (htcondor_files says why);
- keeps all of imgrun's own in the sandbox, which the starter removes;
- shows the job its sandbox at one place, so that a continued job finds it there whatever its path on the host is.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from imgrun.checkpoints.refusals import unfreezable
from imgrun.errors import HostError, ImgrunError, LimitError, SpecError
from imgrun.isolation.cgroups.limits import Limits
from imgrun.isolation.rootless import is_host_root
from imgrun.result import Result
from imgrun.schedulers import htcondor_chirp as chirp
from imgrun.schedulers import htcondor_files as files
from imgrun.schedulers import job_ad
from imgrun.schedulers.preemption import CARRIED, warn_if_short
from imgrun.spec import JobSpec, Mount
from imgrun.storage.trees import remove_tree

CHECKPOINT = "ckpt"
OWN = ".imgrun"
"""The directory in the sandbox for what is imgrun's own: its state, and the checkpoint while it is made or used."""
OF_HTCONDOR = (OWN, ".docker_sock", ".chirp.config", ".job.ad", ".machine.ad", ".update.ad", ".execution_overlay.ad")
PLACE = "/srv"
"""Where the job sees its sandbox."""
PLACE_VARIABLE = "_CONDOR_SCRATCH_DIR"
STREAMS = ("_condor_stdout", "_condor_stderr")
"""The files in the sandbox that are the job's output, unless it is streamed."""

Foreground = Callable[..., int]
Warn = Callable[[str], None]


class Site:
    """The sandbox and the ads of this job."""

    def __init__(self, directory: str, warn: Warn, checkpoint: str = CHECKPOINT) -> None:
        self.sandbox = directory
        self.warn = warn
        self.job = job_ad.of_job()
        self.machine = job_ad.of_machine()
        self.target = os.path.join(directory, checkpoint)
        """The file that HTCondor transfers."""
        self.own = f"{directory}/{OWN}"
        self.checkpoint = f"{self.own}/checkpoint"
        """Where the job is frozen to and continued from."""
        self._is_new = not os.path.exists(self.own)
        """Whether HTCondor has just brought the sandbox, and this is no further life in it after a periodic checkpoint."""
        self._outputs = _list(self.job.text("TransferOutput"))
        self._began_ns = 0
        self._make_missing([checkpoint])

    @classmethod
    def here(cls, warn: Warn, checkpoint: str = CHECKPOINT) -> Site:
        """The one that the environment tells of; outside of HTCondor, the current directory."""
        return cls(os.path.abspath(os.environ.get(PLACE_VARIABLE) or os.getcwd()), warn, checkpoint)

    def _touched(self) -> str:
        """A file whose time is now, by the clock of the sandbox's file system."""
        path = f"{self.own}/began"
        with open(path, "wb"):
            os.utime(path)
        return path

    # -- what is asked for --------------------------------------------------------------------------------------------

    def spec(self, asked: JobSpec) -> JobSpec:
        """What is asked for, with what a job here needs and the slot gives. Raises SpecError."""
        changes: dict[str, Any] = {"checkpoint_dir": self.checkpoint}
        if asked.tty:
            raise SpecError("a job of HTCondor's has no terminal", "leave --tty out")
        code = self.job.integer("SuccessCheckpointExitCode")
        if why := unfreezable(asked):
            self.warn(f"an eviction loses what the job has done: {why}")
            changes |= {"checkpoint_dir": None, "checkpoint_signal": None, "checkpoint_every": None}
        elif self._carries_checkpoints(code):
            changes["checkpoint_exit_code"] = code
            changes["checkpoint_signal"] = asked.checkpoint_signal or (self._kill_signal(),)
        else:
            changes |= {"checkpoint_signal": None, "checkpoint_every": None}
        changes |= self._limits(asked)
        if all(mount.src != self.sandbox for mount in asked.mounts):
            if any(mount.dst == PLACE for mount in asked.mounts):
                raise SpecError(f"{PLACE} is where the job sees its sandbox", "choose another target for your mount")
            changes["mounts"] = (*asked.mounts, Mount("bind", PLACE, self.sandbox))
            changes["workdir"] = asked.workdir or PLACE
            changes["env"] = {PLACE_VARIABLE: PLACE, **self._environment(), **asked.env}
        spec = asked.with_changes(**changes)
        self._warn_of_short_grace(spec)
        return spec

    def _limits(self, asked: JobSpec) -> dict[str, Any]:
        """What the slot has, as far as it can be kept here; what the site itself enforces holds as well."""
        from imgrun.isolation.cgroups.cgroup import check_limits

        memory = self.machine.integer("Memory") or self.job.integer("RequestMemory")
        cpus = self.machine.integer("Cpus") or self.job.integer("RequestCpus")
        disk = self.machine.integer("Disk")
        found: dict[str, Any] = {"memory": memory << 20 if memory else None, "cpus": float(cpus) if cpus else None}
        changes: dict[str, Any] = {}
        for name, value in found.items():
            if value is None or getattr(asked, name) is not None:
                continue
            try:
                check_limits(Limits(**{name: value}))
            except LimitError:
                continue  # nobody has asked for it
            changes[name] = value
        if disk and asked.scratch_size is None and asked.root != "writable" and is_host_root():
            changes["scratch_size"] = disk << 10
        if asked.limits() == Limits():
            changes["limits_mode"] = "best-effort"
        return changes

    def _environment(self) -> dict[str, str]:
        """What the submit file sets for the job."""
        names = job_ad.environment_names(self.job.text("Environment") or "")
        return {name: os.environ[name] for name in names if name in os.environ}

    def _carries_checkpoints(self, code: int | None) -> bool:
        name = os.path.relpath(self.target, self.sandbox)
        if (self.job.text("Iwd") or self.sandbox) != self.sandbox:
            self.warn("the job cannot be frozen: HTCondor transfers no files for it (should_transfer_files = yes)")
            return False
        if code is not None and name in _list(self.job.text("TransferCheckpoint")):
            lacking = ""
            if self.job.text("WhenToTransferOutput") != "ON_EXIT_OR_EVICT":
                lacking = "when_to_transfer_output = ON_EXIT_OR_EVICT"
            elif self._outputs and name not in self._outputs:
                lacking = f"{name} among its transfer_output_files"
            if lacking:
                self.warn(f"an eviction loses the work since the last periodic checkpoint: the submit file lacks {lacking}")
            return True
        self.warn("the job cannot be frozen: the submit file lacks "
                  f"checkpoint_exit_code = 85 or transfer_checkpoint_files = {name}")  # fmt: skip
        return False

    def _make_missing(self, names: list[str]) -> None:
        """Make those of the names that HTCondor would miss."""
        for name in names:
            path = os.path.join(self.sandbox, name)
            if name in self._outputs and not os.path.lexists(path) and os.path.isdir(os.path.dirname(path)):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def _remove_made(self) -> None:
        """Take away what :meth:`_make_missing` made, after the job's own files were put back."""
        for name in self._outputs:
            path = os.path.join(self.sandbox, name)
            if path == self.target or not os.path.isfile(path):
                continue
            status = os.stat(path)
            if status.st_size == 0 and status.st_ctime_ns < self._began_ns:
                os.unlink(path)

    def _kill_signal(self) -> int:
        from imgrun.signals import parse_signal

        return parse_signal(self.job.text("KillSig") or "SIGTERM")

    def _warn_of_short_grace(self, spec: JobSpec) -> None:
        """A job that cannot be saved in time has only its periodic checkpoints."""
        limits = (self.job.integer("JobMaxVacateTime"), self.machine.integer("MachineMaxVacateTime"))
        grace = min((seconds for seconds in limits if seconds is not None), default=None)
        if spec.checkpoint_signal is not None and spec.memory is not None:
            warn_if_short(spec, spec.memory, grace, CARRIED, "an eviction", self.warn)

    # -- the life of the job ------------------------------------------------------------------------------------------

    def run(self, asked: JobSpec, foreground: Foreground, flags: dict[str, Any], result_file: str | None = None) -> int:
        """Continue the job where its checkpoint is, else start it; returns the exit status."""
        try:
            os.makedirs(self.own, mode=0o700, exist_ok=True)
            self._began_ns = os.stat(self._touched()).st_ctime_ns
        except OSError as e:
            why = f"the sandbox {self.sandbox} cannot be written to: {e.strerror}"
            raise HostError(why, "run it in a directory of yours") from e
        try:
            return self._run(asked, foreground, flags, result_file)
        finally:
            if not os.environ.get(PLACE_VARIABLE):
                self._remove_own()

    def _remove_own(self) -> None:
        """Outside of HTCondor nobody removes a sandbox. What another job in the same directory has there stays."""
        with contextlib.suppress(OSError, ImgrunError):
            remove_tree(self.checkpoint)
            os.unlink(f"{self.own}/began")
            for name in ("state/jobs", "state/names", "state/live", "state", ""):
                if os.path.isdir(f"{self.own}/{name}"):
                    os.rmdir(f"{self.own}/{name}")

    def _run(self, asked: JobSpec, foreground: Foreground, flags: dict[str, Any], result_file: str | None) -> int:
        from imgrun.state import no_upper_layer

        if not no_upper_layer(self.sandbox):
            os.environ.setdefault("IMGRUN_STATE_DIR", f"{self.own}/state")
        if chirp.available() and not chirp.installed():
            self.warn("the job's ad is not told of its usage: pip install htchirp")
        chirp.update({"ImgrunHoldReason": None})
        if self._is_new:
            for name in STREAMS:
                files.make_newer(f"{self.sandbox}/{name}")
        found = None
        try:
            spec = self.spec(asked)
            # Until the supervisor listens, an eviction waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, spec.checkpoint_signal or ())
            if os.path.exists(self.target) and os.path.getsize(self.target):
                from imgrun.checkpoints.manifest import load
                from imgrun.checkpoints.preflight import as_asked, require

                files.unpack(self.target, self.checkpoint, self.sandbox, newer=self._is_new)
                self._remove_made()
                saved = load(self.checkpoint)
                spec = self._in_its_place(spec, saved.spec)
                found = as_asked(saved, spec)
                for warning in require(found):
                    self.warn(warning)
        except ImgrunError as e:
            chirp.update({"ImgrunHoldReason": e.message})
            raise
        return foreground(spec, False, result_file, flags, checkpoint=found, at_end=self.ended, stop_at_checkpoint=True)

    def _in_its_place(self, spec: JobSpec, saved: JobSpec) -> JobSpec:
        """The spec with the sandbox where the job saw it when it was frozen, which may be its path on that host."""
        place = saved.env.get(PLACE_VARIABLE)
        if place is not None:
            mounts = tuple(m._replace(dst=place) if m.src == self.sandbox else m for m in spec.mounts)
            spec = spec.with_changes(mounts=mounts, env={**spec.env, PLACE_VARIABLE: place})
        return spec.with_changes(scratch_size=saved.scratch_size)

    def ended(self, result: Result) -> None:
        """Hand the checkpoint over, and tell HTCondor what there is to tell."""
        if result.reason == "checkpointed":
            # HTCondor says it in the job's log; what imgrun would say is of a directory that goes.
            result.message = result.hint = None
            try:
                files.pack(self.checkpoint, self.target, self.sandbox, self._written())
                self._make_missing(self._outputs)
            except ImgrunError as e:
                # The checkpoint before it is still there, and so the job goes on from that.
                result.warnings = (*result.warnings, f"this checkpoint is lost: {e.message}")
        elif os.path.lexists(self.target):
            # What is here at the job's end goes to its submitter. HTCondor keeps its own copy while the job is in the queue.
            os.unlink(self.target)
            self._make_missing([os.path.relpath(self.target, self.sandbox)])
        try:
            remove_tree(self.checkpoint)
        except ImgrunError as e:
            result.warnings = (*result.warnings, e.message)
        ad = chirp.of_result(result)
        if result.reason == "checkpointed":
            from imgrun.checkpoints.identity import processor

            # For requirements: where the checkpoint can be continued.
            ad["ImgrunCpuFeatures"] = ",".join(processor()["features"])
        chirp.update(ad)

    def _written(self) -> list[str]:
        """The files of the sandbox that are the job's: all that is newer than its start here."""
        found = []
        for entry in os.scandir(self.sandbox):
            if entry.name in OF_HTCONDOR or entry.name.startswith("_condor_") or entry.path == self.target:
                continue
            if self._is_newer(entry.path):
                found.append(entry.name)
        return found

    def _is_newer(self, path: str) -> bool:
        if os.lstat(path).st_ctime_ns >= self._began_ns:
            return True
        for directory, _, names in os.walk(path):
            if any(os.lstat(f"{directory}/{name}").st_ctime_ns >= self._began_ns for name in (".", *names)):
                return True
        return False


def _list(text: str | None) -> list[str]:
    """The names of an attribute that lists files."""
    return [word.strip().rstrip("/") for word in (text or "").split(",") if word.strip()]
