"""A job of Slurm's (``imgrun start --slurm``): what it needs to be preempted and to go on where it was.

Slurm sends SIGTERM to what it has started when it preempts, cancels or ends a job at its time limit, and another signal
before that where the job asks for one (sbatch --signal); SIGKILL follows after the grace time of the partition and KillWait.
So this module

- freezes the job at the first of these signals, into a directory that the job's next life finds by its id;
- ends with an exit status for which Slurm requeues, or asks it to, but never for a job that was cancelled;
- takes the limits from what Slurm has allotted.

All that runs stays below the process that Slurm started, and ends with it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from imgrun.checkpoints.refusals import unfreezable
from imgrun.errors import ImgrunError, LimitError, SpecError
from imgrun.isolation.cgroups.limits import Limits
from imgrun.schedulers import slurm_control as control
from imgrun.schedulers.preemption import SAVED, warn_if_short
from imgrun.spec import JobSpec

if TYPE_CHECKING:
    from imgrun.result import Result

DIRECTORY = "imgrun-checkpoints"
"""Where checkpoints go, below the directory that the job was submitted from."""
SIGNALS = (int(signal.SIGTERM), int(signal.SIGUSR1))

Foreground = Callable[..., int]
Warn = Callable[[str], None]


class Site:
    """The Slurm job that this process is a task of, by its environment. Raises SpecError where there is none."""

    def __init__(self, environ: Mapping[str, str], warn: Warn, grace: float | None = None) -> None:
        if not environ.get("SLURM_JOB_ID", "").isdigit():
            raise SpecError("--slurm is for jobs of Slurm's, and SLURM_JOB_ID is not set", "submit it with sbatch or srun")
        self._environ = environ
        self.job = environ["SLURM_JOB_ID"]
        """How Slurm's commands call it. An array's last task has the number of the whole array: those go by their tasks."""
        if (task := self._number("SLURM_ARRAY_TASK_ID")) is not None:
            self.job = f"{environ.get('SLURM_ARRAY_JOB_ID', self.job)}_{task}"
        self.warn = warn
        self.grace = grace
        """Seconds from the first signal to SIGKILL, as the user says; None to ask Slurm."""
        self.checkpoint = f"{self._working_directory()}/{DIRECTORY}/{self.key}"
        """Where the job is frozen to and continued from, when the user names no other place."""
        self._directory: str | None = None
        self._frozen_with: int | None = None

    def _number(self, name: str) -> int | None:
        value = self._environ.get(name, "")
        return int(value) if value.isascii() and value.isdigit() else None

    def _working_directory(self) -> str:
        submitted = self._environ.get("SLURM_SUBMIT_DIR", "")
        return submitted if os.path.isdir(submitted) and os.access(submitted, os.W_OK) else os.getcwd()

    @property
    def key(self) -> str:
        """What tells this task's checkpoint from those of others, the same in every life: JOB[_ARRAYTASK][.STEP[.TASK]]."""
        key = self.job
        step = self._number("SLURM_STEP_ID")
        if step is not None:
            key += f".{step}"
            if (self._number("SLURM_STEP_NUM_TASKS") or 1) > 1:
                key += f".{self._number('SLURM_PROCID') or 0}"
        return key

    # -- what is asked for --------------------------------------------------------------------------------------------

    def spec(self, asked: JobSpec) -> JobSpec:
        """What is asked for, with what a job of Slurm's needs beside it."""
        changes = self._limits(asked)
        why = unfreezable(asked)
        if why is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, asked.checkpoint_signal or SIGNALS)
            self.warn(f"a preemption loses what the job has done: {why}")
            # The directory stays: a checkpoint from another node is not to be passed over.
            return asked.with_changes(**changes, checkpoint_every=None, checkpoint_signal=None)
        if asked.checkpoint_signal is None:
            changes["checkpoint_signal"] = SIGNALS
        spec = asked.with_changes(**changes)
        self._look_ahead(spec)
        return spec

    def _limits(self, asked: JobSpec) -> dict[str, Any]:
        """The allotted memory and processors, as far as they can be kept here; Slurm's own keeping of them holds as well."""
        from imgrun.isolation.cgroups.cgroup import check_limits

        cpus = self._number("SLURM_CPUS_ON_NODE")
        memory = self._number("SLURM_MEM_PER_NODE")
        if memory is None and cpus is not None:
            memory = (self._number("SLURM_MEM_PER_CPU") or 0) * cpus
        found: dict[str, Any] = {}
        if asked.memory is None and memory:
            found["memory"] = memory << 20
        if asked.cpus is None and cpus:
            found["cpus"] = float(cpus)
        changes = {}
        for name, value in found.items():
            try:
                check_limits(Limits(**{name: value}))
            except LimitError:
                continue  # nobody has asked for it
            changes[name] = value
        if changes and asked.limits() == Limits():
            changes["limits_mode"] = "best-effort"
        return changes

    def _look_ahead(self, spec: JobSpec) -> None:
        """Say at the start what would go wrong at a preemption."""
        if self._number("SLURM_PROCID"):
            return  # the step's first task says it
        config = control.config()
        if config.get("ProctrackType") == "proctrack/linuxproc":
            self.warn("this site (proctrack/linuxproc) sends SIGTERM to every process, which may end the job before it is "
                      "saved: use a batch script with --signal=B:USR1@60, which is for imgrun alone")  # fmt: skip
        grace = self.grace if self.grace is not None else self._known_grace(config)
        memory = spec.memory or (self._number("SLURM_MEM_PER_NODE") or 0) << 20
        warn_if_short(spec, memory, grace, SAVED, "a preemption", self.warn)

    def _known_grace(self, config: Mapping[str, str]) -> float | None:
        """What Slurm says. A batch script has the partition's grace time only where the site signals it in the beginning."""
        wait = control.seconds(config.get("KillWait"))
        in_step = self._number("SLURM_STEP_ID") is not None
        if wait is None or not (in_step or "preempt_send_user_signal" in config.get("SlurmctldParameters", "")):
            return wait
        partition = control.show("partition", self._environ.get("SLURM_JOB_PARTITION", ""))
        return wait + (control.seconds(partition.get("GraceTime")) or 0)

    # -- the life of the job ------------------------------------------------------------------------------------------

    def run(self, asked: JobSpec, foreground: Foreground, flags: dict[str, Any], result_file: str | None = None) -> int:
        """Continue the job where its checkpoint is, else start it; returns the exit status."""
        # A preemption may come at any moment: until the job can be frozen, it waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, asked.checkpoint_signal or SIGNALS)
        spec = self.spec(asked)
        found = None
        if spec.checkpoint_dir is not None:
            from imgrun.checkpoints.preflight import earlier_life

            found = earlier_life(spec, self.warn)
        self._directory = spec.checkpoint_dir
        status = foreground(spec, flags["remove"] is False, result_file, flags, checkpoint=found, at_end=self.ended)
        if self._frozen_with is not None:
            self._requeue(self._frozen_with)
        return status

    def ended(self, result: Result) -> None:
        """Tell Slurm what the job has used, and tidy up after a success."""
        if not self._number("SLURM_PROCID"):
            self._comment(result)
        if result.reason == "checkpointed":
            self._frozen_with = result.exit_status
            result.hint = None  # Slurm continues it
        elif result.exit_status == 0 and self._directory == self.checkpoint:
            from imgrun.storage.trees import remove_tree

            try:
                remove_tree(self.checkpoint)
                os.rmdir(os.path.dirname(self.checkpoint))
            except ImgrunError as e:
                result.warnings = (*result.warnings, e.message)
            except OSError:
                pass  # other tasks have theirs there

    def _comment(self, result: Result) -> None:
        """A line in the job's comment, unless somebody else has written there or the site forbids it."""
        from imgrun.schedulers.submission import usage_line

        job = control.show("job", self.job)
        if job and job.get("Comment", "imgrun:").startswith("imgrun:"):
            control.run("update", f"JobId={self.job}", f"Comment=imgrun: {usage_line(result)}")

    def _requeue(self, status: int) -> None:
        """Have Slurm queue the frozen job again, where it would not do so of itself."""
        config = control.config(control.LONG_PATIENCE)
        if not config:
            self.warn(f"the job may not be queued again, since scontrol does not work here: scontrol requeue {self.job}")
            return
        if any(status in control.numbers(config.get(key)) for key in ("RequeueExit", "RequeueExitHold")):
            return
        job = control.show("job", self.job)
        if job.get("BatchFlag") != "1" or not _shall_go_on(job):
            return
        if not control.run("requeue", self.job, patience=control.LONG_PATIENCE):
            self.warn(f"Slurm does not queue the job again: submit it with --requeue, or do 'scontrol requeue {self.job}'")


def _shall_go_on(job: Mapping[str, str]) -> bool:
    """Whether the frozen job is one that nobody has cancelled. One that is being ended at its time limit is COMPLETING."""
    return job.get("JobState") == "RUNNING" or (job.get("JobState"), job.get("Reason")) == ("COMPLETING", "TimeLimit")
