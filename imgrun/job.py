"""Job: one run of a spec, and what can be done with it. The public API and the command line end here."""

from __future__ import annotations

import contextlib
import os
import signal as signals
import time
from typing import Any, Literal

from imgrun import errors
from imgrun.channel import connect
from imgrun.errors import ImgrunError, JobStateError, NoSpace, SpecError
from imgrun.result import Result, Usage
from imgrun.spec import JobSpec, check_text
from imgrun.state import JobDir, StateRoot, claim, now, process_start
from imgrun.storage.trees import remove_tree

CHANGEABLE = ("memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io_weight", "time_limit")
PATIENCE = 30.0
"""Seconds that a supervisor may take to answer."""


class Job:
    """A job of this user on this host.

    Made by :meth:`start` or :meth:`find`. Safe to use from several threads.
    """

    def __init__(self, directory: JobDir) -> None:
        self._dir = directory

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}>"

    @property
    def id(self) -> str:
        return self._dir.id

    @property
    def name(self) -> str | None:
        return self._dir.name

    @property
    def directory(self) -> str:
        """Where the job's state is; its output is in ``stdout`` and ``stderr`` there, unless it went elsewhere."""
        return self._dir.path

    @classmethod
    def start(cls, spec: JobSpec, *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None) -> Job:
        """Start a job and return once its command runs.

        Descriptors that are not given: input is empty, output is kept with the job (:meth:`output`). The job goes on
        when the calling process ends. Raises what ``imgrun start`` reports: SpecError, ImageError, HostError, ...
        """
        from imgrun.launcher import start_job

        return cls(start_job(spec, (stdin, stdout, stderr)))

    @classmethod
    def restore(
        cls,
        checkpoint: str,
        *,
        image: str | None = None,
        memory: str | None = None,
        binds: tuple[str, ...] = (),
        allow: tuple[str, ...] = (),
        lazy: bool = False,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Job:
        """Continue a job from the checkpoint in this directory or archive and return once it runs; that stays as it is.

        ``image``, ``memory`` and ``binds`` (``NEW:DST``) replace what the job had, ``allow`` names refusals of
        ``imgrun check`` that are to be ignored. With ``lazy`` it runs before all of its memory is read, where the kernel
        allows that. Descriptors as of :meth:`start`. Raises RestoreError, and what ``start`` raises.
        """
        from imgrun.checkpoints import preflight
        from imgrun.checkpoints.unpacking import opened
        from imgrun.launcher import start_job

        check_text("the checkpoint's path", checkpoint)
        changes = {"image": image, "memory": memory, "binds": list(binds), "allow": list(allow), "lazy": lazy}
        with opened(checkpoint, allow) as loaded:
            found = preflight.changed(loaded, image=image, memory=memory, binds=binds, allow=allow, lazy=lazy)
            preflight.require(found, allow)
            request = {"path": found.path, "archive": found.archive} | changes
            return cls(start_job(found.spec, (stdin, stdout, stderr), request))

    @classmethod
    def find(cls, wanted: str) -> Job:
        """The job with this name, id, or unique beginning of an id. Raises JobNotFound."""
        check_text("the job's name", wanted)
        return cls(StateRoot().find(wanted))

    @classmethod
    def all(cls) -> list[Job]:
        """All jobs with a record on this host, oldest first."""
        root = StateRoot()
        jobs = [cls(JobDir(root, job_id)) for job_id in root.ids()]
        return sorted(jobs, key=lambda job: job._dir.read("job.json").get("created_at", ""))

    # -- what is known of it ------------------------------------------------------------------------------------------

    @property
    def spec(self) -> JobSpec:
        """What was asked for. Raises JobStateError when the job's record is gone."""
        record = self._dir.read("spec.json")
        if not record:
            raise self._gone()
        return JobSpec.from_dict(record)

    @property
    def running(self) -> bool:
        """Whether a supervisor owns the job now."""
        return self._dir.alive()

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``held`` (``--oom hold``), ``finished``, or ``lost`` when its supervisor was killed."""
        state = str(self._dir.read("state.json").get("state", "starting"))
        if state in ("starting", "running", "held") and not self.running:
            # It may have ended between the two looks.
            state = str(self._dir.read("state.json").get("state", "lost"))
            return state if state == "finished" else "lost"
        return state

    @property
    def result(self) -> Result | None:
        """The record of its end; None while it runs."""
        record = self._dir.read("result.json")
        return Result.from_dict(record) if record else None

    def inspect(self) -> dict[str, Any]:
        """Everything that is recorded of the job, for JSON."""
        record = {"id": self.id} | self._dir.read("job.json")
        record |= {"name": self.name, "state": self.state, "directory": self.directory}
        live = self._dir.read("state.json")
        for key in ("supervisor", "init", "started_at", "hostname", "cgroups", "hold_reason"):
            record[key] = live.get(key)
        return record | {"spec": self._dir.read("spec.json"), "result": self._dir.read("result.json") or None}

    def output(self, stream: str = "stdout") -> bytes:
        """What the job has written to ``stdout`` or ``stderr`` so far, when that is kept with it."""
        try:
            with open(f"{self.directory}/{stream}", "rb") as f:
                return f.read()
        except FileNotFoundError:
            return b""

    # -- what can be done with it -------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end and return the record. ``timeout`` in seconds; raises TimeoutError when it passes.

        Raises JobStateError when the job's record is gone.
        """
        self.await_end(timeout)
        result = self.result
        if result is None:
            collect(self._dir.root)
            result = self.result
        if result is None:
            raise self._gone()
        return result

    def await_end(self, timeout: float | None = None) -> None:
        """Wait until no supervisor owns the job. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        live = self._dir.read("state.json")
        pid = live.get("supervisor")
        if isinstance(pid, int):
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            import select

            try:
                if process_start(pid) == live.get("supervisor_start", process_start(pid)) and self.running:
                    poll = select.poll()
                    poll.register(fd, select.POLLIN)
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if not poll.poll(None if left is None else left * 1000):
                        raise TimeoutError(f"job {self.id} still runs")
            finally:
                os.close(fd)
        while self.running:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.id} still runs")
            time.sleep(0.01)

    def _request(self, patience: float | None = PATIENCE, fds: tuple[int, ...] = (), /, **message: Any) -> dict[str, Any]:
        try:
            here = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._gone() from None
        try:
            channel = connect(f"/proc/self/fd/{here}/control")
        except OSError as e:
            raise JobStateError(f"job {self.id} is not running", "'imgrun ps --all' shows the states") from e
        finally:
            os.close(here)
        try:
            channel.set_timeout(patience)
            channel.send(message, fds)
            received = channel.receive()
        except OSError as e:
            raise JobStateError(f"job {self.id} does not answer: {e.strerror or e}", "it may just have ended") from e
        finally:
            channel.close()
        answer = received[0] if received else {"error": "it ended"}
        if "message" in answer:
            raise getattr(errors, answer["error"], JobStateError)(answer["message"], answer["hint"])
        if "error" in answer:
            raise JobStateError(f"job {self.id}: {answer['error']}", "'imgrun inspect' shows its state")
        return answer

    def _gone(self) -> JobStateError:
        return JobStateError(f"job {self.id} has ended and its record was removed", "start it with --no-rm to keep it")

    def signal(self, signum: int) -> None:
        """Send a signal to the job's command. SIGKILL ends the whole job. Raises JobStateError when it does not run."""
        _check_signal(signum)
        self._request(request="signal", signal=int(signum))

    def kill(self) -> None:
        """End the whole job at once."""
        self.signal(signals.SIGKILL)

    def stop(self, timeout: float | None = None, signum: int | None = None) -> Result:
        """Ask the job to end (its stop signal), kill it after ``timeout`` seconds, and return the record."""
        self.request_stop(timeout, signum)
        return self.wait()

    def request_stop(self, timeout: float | None = None, signum: int | None = None) -> None:
        """As :meth:`stop`, without waiting."""
        if signum is not None:
            _check_signal(signum)
        self._request(request="stop", timeout=timeout, signal=None if signum is None else int(signum))

    def checkpoint(
        self,
        to: str | None = None,
        *,
        stop: bool = True,
        archive: str | int | None = None,
        compress: bool = False,
        capture_image: bool = False,
        pre_dump: int | Literal["auto"] = 0,
    ) -> dict[str, Any]:
        """Freeze the job to the directory ``to``, or to an ``archive``; it ends, or with ``stop=False`` runs on.

        ``archive`` is a file to be made, or a descriptor to write to; it is compressed when its name ends in ``.zst``, or
        with ``compress``. ``capture_image`` saves a ``--writable`` image too. ``pre_dump`` is the number of rounds in which
        memory is saved before the job is frozen. Returns ``timings`` (step and milliseconds), ``statistics`` (those of the
        manifest) and ``warnings``. Raises CheckpointError when it cannot be done; the job then runs on as before.
        """
        from imgrun.checkpoints.subject import How, must_compress

        if (to is None) == (archive is None):
            raise SpecError("a checkpoint goes to a directory or to an archive", "give one of them")
        fds = (archive,) if isinstance(archive, int) else ()
        target = "-" if fds else os.path.abspath(to if to is not None else str(archive))
        check_text("the checkpoint's path", target)
        if isinstance(archive, str):
            compress = must_compress(archive, compress)
        how = How(
            leave_running=not stop, archive=archive is not None, compress=compress, capture_image=capture_image,
            pre_dump=-1 if pre_dump == "auto" else int(pre_dump),
        )  # fmt: skip
        answer = self._request(None, fds, request="checkpoint", to=target, how=how._asdict())
        if stop:
            self.await_end()
        return {key: answer[key] for key in ("timings", "statistics", "warnings")}

    def stats(self) -> dict[str, Any]:
        """What the job uses now: the fields of Usage so far, and ``memory_current``, ``swap_current``, ``pids_current``.

        Raises JobStateError when it does not run.
        """
        usage: dict[str, Any] = self._request(request="stats")["usage"]
        return usage

    def update(self, **limits: Any) -> list[str]:
        """Change limits of the running job, by the names and in the units of JobSpec; None takes one back.

        A job that is held for memory goes on when it gets more. Returns caveats. Raises LimitError, SpecError,
        JobStateError.
        """
        if unknown := set(limits) - set(CHANGEABLE):
            raise SpecError(f"{min(unknown)} cannot be changed while the job runs", f"these can: {', '.join(CHANGEABLE)}")
        self.spec.with_changes(**limits)  # what no host would take is refused here
        return list(self._request(request="update", changes=limits)["notes"])

    def remove(self, *, force: bool = False) -> None:
        """Remove the record of a finished job; with ``force``, kill it first. Raises JobStateError when it runs."""
        if self.running and not force:
            raise JobStateError(f"job {self.id} is running", "stop it first, or use --force")
        deadline = time.monotonic() + PATIENCE
        while self.running:
            try:
                self.kill()
                self.await_end()
            except JobStateError:
                # Its supervisor has not begun to listen, or listens no more.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        collect(self._dir.root)
        self._dir.remove()

    def cgroup_paths(self) -> list[str]:
        """The job's cgroup directories on the host."""
        return [path for path in self._dir.read("state.json").get("cgroups", []) if isinstance(path, str)]

    def capabilities(self) -> frozenset[str]:
        """What the job's root may do in its namespaces, by the names of capabilities(7) without CAP_."""
        return frozenset(self._dir.read("state.json").get("capabilities", ()))

    def init_pid(self) -> int:
        """The host's pid of the job's PID 1. Raises JobStateError when the job does not run."""
        live = self._dir.read("state.json")
        pid = live.get("init")
        if self.running and isinstance(pid, int) and process_start(pid) == live.get("init_start"):
            return pid
        raise JobStateError(f"job {self.id} is not running", "'imgrun ps --all' shows the states")


def _check_signal(signum: int) -> None:
    if not 0 < signum < signals.NSIG:
        raise SpecError(f"there is no signal {signum}", f"signals are 1 to {signals.NSIG - 1}")


def finish(job: JobDir, *, keep: bool) -> None:
    """The last act of a supervisor: the scratch goes; the record too unless it is to be kept."""
    if keep:
        remove_tree(f"{job.path}/scratch")
        try:
            os.unlink(f"{job.path}/control")
        except FileNotFoundError:
            pass
    else:
        job.remove()
    job.release(ended=True)


def collect(root: StateRoot) -> list[str]:
    """Clean up after supervisors that were killed. Returns the ids of their jobs.

    The kernel has ended the jobs' processes and mounts by then, or does so within moments; cgroup directories and state
    are ours to remove.
    """
    done = []
    if os.path.isdir(f"{root.path}/unpacked"):
        from imgrun.checkpoints.unpacking import remove_leftovers

        remove_leftovers(root)
    for job in root.leftovers():
        if not claim(job):
            continue
        try:
            _collect_one(job)
            done.append(job.id)
        except (ImgrunError, OSError):
            job.release(ended=False)  # the next command tries again
    return done


def _collect_one(job: JobDir) -> None:
    from imgrun.isolation.cgroups.cgroup import remove_leftovers

    live = job.read("state.json")
    _end_init(live)
    hint = _settle_checkpoint(job, live)
    remove_leftovers([path for path in live.get("cgroups", []) if isinstance(path, str)])
    remove_tree(f"{job.path}/scratch")  # first: on a full disk the record needs the room
    keep = bool(job.read("job.json").get("keep"))
    if keep and not job.read("result.json"):
        spec = job.read("spec.json")
        lost = Result(
            id=job.id, name=job.name, image=str(spec.get("image")), command=tuple(spec.get("command", ())),
            reason="lost", exit_code=None, signal=None, message="the job's supervisor was killed, and the job with it",
            hint=hint, started_at=live.get("started_at"), finished_at=now(),
            hostname=live.get("hostname"), usage=Usage(),
        )  # fmt: skip
        job.write("result.json", lost.to_dict())
        job.write("state.json", live | {"state": "finished", "reason": "lost"})
    finish(job, keep=keep)


def _settle_checkpoint(job: JobDir, live: dict[str, Any]) -> str:
    """Put the job's last checkpoint in its place if it was complete, else remove it. Returns what the user can do now."""
    building = [path for path in live.get("building", ()) if isinstance(path, str) and path.endswith(f".{job.id}.new")]
    hint = "start it again"
    if not building:
        return hint
    from imgrun.apart import apart
    from imgrun.checkpoints.placing import adopt

    if isinstance(making := live.get("making"), dict):
        target, identifier = str(making["target"]), str(making["id"])
        try:
            if apart(lambda: adopt(building[0], target, f"{job.path}/scratch", identifier)):
                hint = f"'imgrun restore {target}' continues it"
        except NoSpace:
            raise  # the next command tries again
        except ImgrunError as e:
            return e.message
    for path in building:
        with contextlib.suppress(ImgrunError):
            remove_tree(path)
    return hint


def _end_init(live: dict[str, Any]) -> None:
    """See that PID 1 of a dead supervisor's job is gone: the parent-death signal is on its way to it."""
    pid = live.get("init")
    if not isinstance(pid, int):
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if process_start(pid) == live.get("init_start"):
            import select

            signals.pidfd_send_signal(fd, signals.SIGKILL)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(5000)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
