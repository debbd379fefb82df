"""The process that owns a job: starts it, relays its output, watches limits and signals, accounts it, cleans up.

It has one thread. It may be killed at any moment: what it made then goes by itself (the job dies with its parent, mounts
with their namespace, the loop device with its last mount), and what does not (cgroup directories, state) is in the job's
state for the next imgrun command to remove.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from imgrun import errors
from imgrun.channel import Channel
from imgrun.checkpoints.freezer import Freezer
from imgrun.control import Control
from imgrun.ending import Ending, exit_of
from imgrun.errors import CheckpointError, HostError, ImgrunError, StartError
from imgrun.init_shim import Exited, Record, Signaled, StatusReader, StepFailed
from imgrun.launch import Launch
from imgrun.result import Reason, Result
from imgrun.spec import JobSpec
from imgrun.state import JobDir, now, process_start
from imgrun.storage.trees import remove_tree
from imgrun.streams import Stdio, Streams, close_all

if TYPE_CHECKING:
    from imgrun.accounting.holding import Hold
    from imgrun.checkpoints.manifest import Checkpoint
    from imgrun.checkpoints.subject import Subject
    from imgrun.helper import Helper

FORWARDED = tuple(
    s for s in (
        signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
        signal.SIGCONT, signal.SIGWINCH, signal.SIGPWR, signal.SIGIO, signal.SIGURG, signal.SIGVTALRM, signal.SIGPROF,
    )
)  # fmt: skip
"""Signals to the supervisor that go on to the job."""


class Supervisor:
    """Runs one job from spec to result."""

    def __init__(
        self,
        job: JobDir,
        spec: JobSpec,
        stdio: Stdio,
        *,
        on_started: Callable[[], None] | None = None,
        checkpoint: Checkpoint | None = None,
        stop_at_checkpoint: bool = False,
    ) -> None:
        self.job = job
        self.spec = spec
        self.streams = Streams(spec, stdio, checkpoint)
        self._on_started = on_started
        self._undo: list[Callable[[], object]] = []
        self._records: list[Record] = []
        self._started_at: str | None = None
        self._began = time.monotonic()
        self._ended = self._began
        self._reason: Reason | None = None
        self._deadline: float | None = None
        self._kill_at: float | None = None
        self.running = False
        self._launch: Launch | None = None
        self._freezer = Freezer(job, spec, self, stop_when_due=stop_at_checkpoint)
        self._checkpoint = checkpoint
        self.told: set[str] = set()
        """Warnings that have been said already."""
        self._hold: Hold | None = None
        self._sent: set[int] = set()
        """The signals that somebody has asked us to send."""

    @property
    def launch(self) -> Launch:
        """What the job holds of the host, once it has been begun."""
        assert self._launch is not None
        return self._launch

    # -- the whole life -----------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Start the job, wait for its end, undo everything, and return the record, which is also written."""
        self._catch_signals()
        try:
            self._start()
            self._loop()
            result = self._result()
        except ImgrunError as e:
            result = self._ending().failed(e)
        except Exception as e:
            if os.environ.get("IMGRUN_DEBUG"):
                raise
            where = "running" if self._started_at else "starting"
            error = HostError(f"{where} the job failed: {e}", "run again with --debug for the details")
            result = self._ending().failed(error)
        finally:
            self._clean_up()
        self._write_down(result)
        return result

    def _write_down(self, result: Result) -> None:
        """Keep the record with the job. What the job wrote goes first, lest a disk that it has filled has no room."""
        try:
            remove_tree(f"{self.job.path}/scratch")
            self.job.write("result.json", result.to_dict())
            last = {"state": "finished", "reason": result.reason, "finished_at": result.finished_at}
            self.job.write("state.json", self.job.read("state.json") | last)
        except ImgrunError as e:
            result.warnings = (*result.warnings, f"the job's record is lost: {e.message}")

    def _catch_signals(self) -> None:
        """Turn signals into bytes of a pipe that the loop reads; none is acted on in between."""
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._later(lambda: os.close(self._wake))
        self._later(lambda: os.close(wake))
        previous = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._later(lambda: signal.set_wakeup_fd(previous))
        for signum in FORWARDED:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, lambda *_: None)
        for signum in (signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(signum, signal.SIG_IGN)
        # Those that came while we were not ready yet were held back.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.spec.checkpoint_signal or ())

    def _later(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def _clean_up(self) -> None:
        """Undo in reverse order; one failure does not stop the rest."""
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except (ImgrunError, OSError) as e:
                self.note(f"clean-up: {e}")

    def note(self, text: str) -> None:
        if self._launch is not None:
            self._launch.warnings.append(text)

    def tell(self, text: str) -> None:
        """Note it, and say it at once where the job's errors go: nobody asked for it, and its end may be far. Once each."""
        if text in self.told:
            return
        self.note(text)
        if self.streams.say(f"imgrun: warning: {text}\n".encode()):
            self.told.add(text)

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        launch = self._launch = Launch(self.job, self.spec, self._checkpoint)
        self._later(launch.close)
        launch.prepare()
        self._record_state("starting")
        self._control = Control(self.job.path, self._answer)
        self._later(self._control.close)
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        self._later(lambda: os.close(status_read))
        stdio = self.streams.make_ends(launch.outside_ids())
        self._later(self.streams.close)
        try:
            try:
                launch.spawn(stdio, status_write)
                self._later(launch.end)
            finally:
                os.close(status_write)
            if self._checkpoint is None:
                # Ours would keep the pipes open after the job's death.
                stdio = close_all(stdio)
            launch.hand_over()
            self._await_shim(launch, status_read)
            if self._checkpoint is not None:
                self.streams.feed_saved_input(self._checkpoint)
                launch.continue_from(stdio)
                launch.meter.count_restored()
                self._hold = launch.hold_when_full()
        finally:
            close_all(stdio)
        self._began = time.monotonic() - launch.earlier_seconds
        self._started_at = now()
        if self.spec.time_limit is not None:
            self._deadline = self._began + self.spec.time_limit
        self._freezer.start_clock(time.monotonic())
        launch.meter.start_sampling(time.monotonic())
        self._record_state("running")
        if self._on_started is not None:
            self._on_started()

    def _await_shim(self, launch: Launch, status: int) -> None:
        """Wait until the command runs. Raises what went wrong in the child or the shim."""
        while (received := launch.channel.receive()) is not None:
            message, fds = received
            if "error" in message:
                kind = getattr(errors, message["error"], StartError)
                raise kind(message["message"], message["hint"])
            if "spent" in message:
                launch.meter.note_setup(message["spent"][0], message["spent"][1])
                if self._checkpoint is None:
                    self._hold = launch.hold_when_full()
                launch.channel.send({"run": True})
            if "terminal" in message:
                self.streams.adopt_terminal(fds[0])
        launch.mark("namespaces and mounts")
        self._status = status
        self._reader = StatusReader("init" if self.spec.init == "shim" else "exec")
        if self._hold is not None:
            self._hold.wait_for_start(status)
        record = self._next_record()
        if record is None:
            raise StartError("the job's init died before it could start the command", "look for a kill from outside")
        if isinstance(record, StepFailed):
            raise launch.exec_error(record)
        os.set_blocking(status, False)
        launch.mark("exec")

    def _next_record(self) -> Record | None:
        """The next line of the shim's report; None at its end, or when there is none yet."""
        while not self._records:
            try:
                data = os.read(self._status, 4096)
            except BlockingIOError:
                return None
            self._records = self._reader.feed(data)
            if not data:
                break
        return self._records.pop(0) if self._records else None

    def _record_state(self, state: str) -> None:
        launch = self.launch
        self.job.write(
            "state.json",
            {
                "state": state,
                "supervisor": os.getpid(),
                "supervisor_start": process_start(os.getpid()),
                "init": launch.pid if launch.pid > 0 else None,
                "init_start": process_start(launch.pid) if launch.pid > 0 else None,
                "started_at": self._started_at,
                "hostname": launch.hostname,
                "cgroups": launch.cgroup_paths,
                "capabilities": sorted(launch.capabilities),
            },
        )

    # -- running ------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        launch = self.launch
        ended = os.pidfd_open(launch.pid)
        self._later(lambda: os.close(ended))
        servers = {os.pidfd_open(helper.pid): helper for helper in launch.servers}
        for pidfd in servers:
            self._later(partial(os.close, pidfd))
        self.running = True
        while self.running or self.streams.relay.outputs_open() or self._freezer.under_way:
            poll = select.poll()
            memory = launch.meter.memory.source() if launch.meter.memory else None
            waiting = self.streams.relay.register(poll, inputs=self._freezer.under_way is None)
            handlers = {fd: pump.move for fd, pump in waiting.items()}
            watched: list[tuple[int, Callable[[], None]]] = [(self._wake, self._forward_signals)]
            if self._freezer.under_way is not None:
                watched.append((self._freezer.under_way.fileno(), self._freezer.hear))
            if self.running:
                watched.append((ended, self._reap))
                watched += self._control.handlers()
                watched += [(fd, partial(self._server_ended, servers, fd)) for fd in servers]
                if memory is not None:
                    poll.register(*memory)
                    handlers[memory[0]] = self._memory_event
            for fd, handler in watched:
                poll.register(fd, select.POLLIN)
                handlers[fd] = handler
            for fd, _ in poll.poll(self._patience() if self.running else None):
                handlers[fd]()
            if self.running:
                self._keep_time()

    def _reap(self) -> None:
        self.running = False
        self._ended = time.monotonic()
        _, self._wait_status, self._reaped = os.wait4(self.launch.pid, 0)
        self.launch.pid = 0
        if self._reason is None and self.launch.lost_its_memory():
            self._reason = "lost"
        self.streams.relay.stop_input()

    def _server_ended(self, servers: dict[int, Helper], fd: int) -> None:
        if servers.pop(fd).has_failed():
            self._end("lost")

    def _memory_event(self) -> None:
        watch = self.launch.meter.memory
        assert watch is not None
        watch.note_event()
        self._see_to_memory(time.monotonic())

    def _see_to_memory(self, moment: float) -> None:
        """After an event: the job as a whole ends with what the kernel killed of it, or waits with what waits for memory."""
        watch = self.launch.meter.memory
        if watch is None or watch.due is None or moment < watch.due:
            return
        if watch.check(moment):
            self._end("memory-limit")
        elif self._hold is not None and self._freezer.under_way is None and watch.at_own_limit() and self._hold.is_due():
            usage = self.launch.meter.so_far(moment - self._began)
            self._hold.begin(watch.held_verdict(self.spec.memory, usage.memory_peak, self.job.id))
            self.streams.tell(self._hold.held)

    def _keep_samples(self, moment: float) -> None:
        if self.launch.meter.sample_due is not None and moment >= self.launch.meter.sample_due:
            self.launch.meter.sample(moment, moment - self._began)

    def _patience(self) -> float | None:
        """Milliseconds until the next thing that time decides."""
        meter = self.launch.meter
        memory_due = meter.memory.due if meter.memory else None
        times = (self._deadline, self._kill_at, self._freezer.due, meter.sample_due, memory_due)
        next_at = min((t for t in times if t is not None), default=None)
        return None if next_at is None else max(0.0, (next_at - time.monotonic()) * 1000 + 1)

    def _keep_time(self) -> None:
        moment = time.monotonic()
        if self._deadline is not None and moment >= self._deadline:
            self._deadline = None
            self.stop("time-limit", self._stop_signal(), self.spec.stop_timeout)
        if self._kill_at is not None and moment >= self._kill_at:
            self._kill_at = None
            self._send(signal.SIGKILL)
        self._see_to_memory(moment)
        self._keep_samples(moment)
        self._freezer.freeze_when_due(moment)

    def _stop_signal(self) -> int:
        return self.launch.init_stop_signal or self.spec.stop_signal

    def stop(self, reason: Reason, signum: int, timeout: float) -> None:
        """End the job: first by ``signum``, after ``timeout`` seconds by SIGKILL."""
        if self._reason is None:
            self._reason = reason
        self._kill_at = time.monotonic() + timeout
        if self._hold is not None:
            self._hold.give_room(self.spec.limits(), room=self.spec.memory)
        self._send(signum)

    def _end(self, reason: Reason) -> None:
        if self._reason is None:
            self._reason = reason
        self._send(signal.SIGKILL)

    def _send(self, signum: int) -> None:
        """Signal the job: its init passes it on to the command. SIGKILL ends the whole job."""
        launch = self._launch
        if launch is not None and launch.pid > 0:
            self._sent.add(signum)
            os.kill(launch.pid, signum)
            if signum == signal.SIGKILL and self._hold is not None:
                self._hold.end()  # what is frozen by cgroup v1 does not even die

    def _forward_signals(self) -> None:
        try:
            received = os.read(self._wake, 4096)
        except BlockingIOError:
            return
        for signum in received:
            if signum == signal.SIGWINCH:
                self.streams.resize()
            elif not self.running:
                if signum in (signal.SIGINT, signal.SIGTERM):
                    self.streams.relay.close()  # the job has ended; only a reader that does not read keeps us
            elif signum in (self.spec.checkpoint_signal or ()):
                self._freezer.freeze_and_end()
            else:
                if signum == signal.SIGCONT:
                    self.streams.resume()
                self._send(signum)

    # -- requests of other imgrun commands ----------------------------------------------------------------------------

    def _answer(self, message: dict[str, Any], asker: Channel, fds: list[int]) -> dict[str, Any] | None:
        match message.get("request"):
            case "signal":
                self._signal(int(message["signal"]))
            case "stop":
                signum = message.get("signal") or self._stop_signal()
                timeout = message.get("timeout")
                self.stop("stopped", int(signum), self.spec.stop_timeout if timeout is None else float(timeout))
            case "checkpoint":
                from imgrun.checkpoints.subject import How

                self._freezer.begin(str(message["to"]), How.asked(message, fds), asker)
                return None
            case "stats":
                return {"ok": True, "usage": self.launch.meter.live(time.monotonic() - self._began)}
            case "update":
                return {"ok": True, "notes": self._update(message["changes"])}
            case other:
                return {"error": f"unknown request {other!r}"}
        return {"ok": True}

    def _update(self, changes: dict[str, Any]) -> list[str]:
        """Change the limits of the running job; one that is held goes on when it gets more memory. Returns caveats."""
        spec = self.spec.with_changes(**changes)
        notes = self.launch.change_limits(spec)
        more = (spec.memory or 0) > (self.spec.memory or 0) or spec.memory is None
        self.spec = self.launch.spec = self.launch.meter.spec = spec
        self.job.write("spec.json", spec.to_dict())
        if "time_limit" in changes:
            self._deadline = None if spec.time_limit is None else self._began + spec.time_limit
        if self._hold is not None:
            self._hold.renew()
            if more:
                self._hold.end()
        return notes

    def _signal(self, signum: int) -> None:
        if signum == signal.SIGSTOP and (command := self.launch.command_pid()):
            self._sent.add(signum)
            os.kill(command, signum)  # an init cannot pass on what it cannot catch
        else:
            self._send(signum)

    # -- what the freezer needs of us ---------------------------------------------------------------------------------

    def subject(self) -> Subject:
        from imgrun.checkpoints.refusals import unfreezable

        if why := unfreezable(self.spec):
            raise CheckpointError(f"the job cannot be saved: {why}", "see 'imgrun check'")
        return self.launch.subject(self._began, self.streams.source(), self.streams.unsent())

    def make_room(self) -> None:
        if self._hold is not None:
            self._hold.give_room(self.spec.limits())

    def take_room_back(self) -> None:
        if self._hold is not None and self._reason is None:
            self._hold.take_back(self.spec.limits())

    # -- the end ------------------------------------------------------------------------------------------------------

    def _result(self) -> Result:
        for failure in self.streams.failures():
            self.note(failure)
        last: Record | None = None
        while (record := self._next_record()) is not None:
            last = record
        end = exit_of(last, self._wait_status, self.spec.init)
        usage = self.launch.meter.total(self._ended - self._began, self._reaped)
        usage.scratch_bytes = self.launch.scratch.used()
        if self.spec.init == "shim" and not isinstance(last, Exited | Signaled):
            end = end._replace(reported=False)
        decided = self._reason if self._freezer.frozen_to is None else "checkpointed"
        result = self._ending().ended(decided, end, usage, self._freezer.frozen_to, self._sent)
        if (error := self._freezer.unplaced) is not None:
            result.reason, result.message, result.hint = "lost", error.message, error.hint
        return result

    def _ending(self) -> Ending:
        return Ending(self.job, self.spec, self._launch, self._started_at)
