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
from imgrun.channel import Channel, accept, listen
from imgrun.errors import CheckpointError, HostError, ImgrunError, StartError
from imgrun.init_shim import Exited, Record, Signaled, StatusReader, StepFailed
from imgrun.launch import Launch
from imgrun.relay import Pump, Relay, Terminal, set_nonblocking
from imgrun.result import Reason, Result, Usage
from imgrun.spec import JobSpec
from imgrun.state import JobDir, now, process_start
from imgrun.storage.trees import remove_tree

if TYPE_CHECKING:
    from imgrun.freezing import Freezing
    from imgrun.manifest import Checkpoint

FORWARDED = tuple(
    s for s in (
        signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
        signal.SIGCONT, signal.SIGWINCH, signal.SIGPWR, signal.SIGIO, signal.SIGURG, signal.SIGVTALRM, signal.SIGPROF,
    )
)  # fmt: skip
"""Signals to the supervisor that go on to the job."""

IMAGE_INIT_ENDS = {signal.SIGINT: "powered off", signal.SIGHUP: "asked for a restart"}
"""How the kernel ends an init that calls reboot(2) in its PID namespace."""


def _close_all(fds: tuple[int, ...]) -> tuple[int, ...]:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
    return ()


class Stdio:
    """Where the job's input comes from and its output goes. Descriptors are the supervisor's own; -1 is nowhere."""

    def __init__(self, stdin: int, stdout: int, stderr: int, terminal: int = -1) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.terminal = terminal
        """The caller's terminal, for ``tty``."""


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
    ) -> None:
        self.job = job
        self.spec = spec
        self.stdio = stdio
        self.relay = Relay()
        self._on_started = on_started
        self._undo: list[Callable[[], object]] = []
        self._records: list[Record] = []
        self._started_at: str | None = None
        self._began = time.monotonic()
        self._ended = self._began
        self._reason: Reason | None = None
        self._message: str | None = None
        self._deadline: float | None = None
        self._kill_at: float | None = None
        self._freeze_at: float | None = None
        self._terminal: Terminal | None = None
        self._master = -1
        self._launch: Launch | None = None
        self._children: dict[int, Channel] = {}
        self._freezing: Freezing | None = None
        self._checkpoint = checkpoint

    # -- the whole life -----------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Start the job, wait for its end, undo everything, and return the record, which is also written."""
        self._catch_signals()
        try:
            self._start()
            self._loop()
            result = self._result()
        except ImgrunError as e:
            result = self._failed(e)
        except OSError as e:
            result = self._failed(HostError(f"starting the job failed: {e}", "run again with --debug for the details"))
            if os.environ.get("IMGRUN_DEBUG"):
                raise
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

    def _later(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def _clean_up(self) -> None:
        """Undo in reverse order; one failure does not stop the rest."""
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except (ImgrunError, OSError) as e:
                self._note(f"clean-up: {e}")

    def _note(self, text: str) -> None:
        if self._launch is not None:
            self._launch.warnings.append(text)

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        launch = self._launch = Launch(self.job, self.spec, self._checkpoint)
        self._later(launch.close)
        launch.prepare()
        self._record_state("starting")
        self._listen()
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        self._later(lambda: os.close(status_read))
        stdio = self._make_stdio(launch)
        try:
            try:
                launch.spawn(stdio, status_write)
                self._later(launch.end)
            finally:
                os.close(status_write)
            if self._checkpoint is None:
                # Ours would keep the pipes open after the job's death.
                stdio = _close_all(stdio)
            launch.hand_over()
            self._await_shim(launch, status_read)
            if self._checkpoint is not None:
                self._feed_saved_input()
                launch.continue_from(stdio)
        finally:
            _close_all(stdio)
        self._began = time.monotonic() - launch.earlier_seconds
        self._started_at = now()
        if self.spec.time_limit is not None:
            self._deadline = self._began + self.spec.time_limit
        if self.spec.checkpoint_every is not None:
            self._freeze_at = time.monotonic() + self.spec.checkpoint_every
        self._record_state("running")
        if self._on_started is not None:
            self._on_started()

    def _listen(self) -> None:
        path = f"{self.job.path}/control"
        here = os.open(self.job.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Through the descriptor: a socket's address has room for 107 bytes only.
            self._control = listen(f"/proc/self/fd/{here}/control")
        except OSError as e:
            raise HostError(f"cannot make the control socket {path}: {e.strerror}", "set IMGRUN_STATE_DIR") from e
        finally:
            os.close(here)
        self._later(self._control.close)

    def _make_stdio(self, launch: Launch) -> tuple[int, ...]:
        """The job's ends of its input and output; the pumps own ours."""
        if self.spec.tty:
            return ()
        ends = []
        owner = launch.outside_ids()
        sources = [(self.stdio.stdin, True), (self.stdio.stdout, False), (self.stdio.stderr, False)]
        if self._checkpoint is not None:
            sources[0] = (self._continued_input(self.stdio.stdin), True)
        for ours, is_input in sources:
            if ours < 0:
                ends.append(-1)
                continue
            read, write = os.pipe2(os.O_CLOEXEC)
            # The job may open its standard streams anew, by /dev/stdout: they are its own.
            if owner is not None:
                os.fchown(read, *owner)
            if is_input:
                ends.append(read)
                set_nonblocking(write)
                self.relay.inputs.append(Pump(ours, write))
            else:
                ends.append(write)
                set_nonblocking(read)
                self.relay.outputs.append(Pump(read, ours))
        self._later(self.relay.close)
        return tuple(ends)

    def _continued_input(self, given: int) -> int:
        """What the job reads after what was saved for it: as given, or nothing more, or none at all as before."""
        from imgrun.continuing import has_more_input, reads_pipe

        assert self._checkpoint is not None
        if given >= 0 and has_more_input(self._checkpoint, given):
            return given
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) if reads_pipe(self._checkpoint) else -1

    def _feed_saved_input(self) -> None:
        """What the job had not read yet comes before what it is given now."""
        from imgrun.continuing import saved_input

        assert self._checkpoint is not None
        for pump in self.relay.inputs:
            pump.give(saved_input(self._checkpoint))

    def _await_shim(self, launch: Launch, status: int) -> None:
        """Wait until the command runs. Raises what went wrong in the child or the shim."""
        while (received := launch.channel.receive()) is not None:
            message, fds = received
            if "error" in message:
                kind = getattr(errors, message["error"], StartError)
                raise kind(message["message"], message["hint"])
            if "spent" in message:
                launch.meter.note_setup(message["spent"][0], message["spent"][1])
                launch.channel.send({"run": True})
            if "terminal" in message:
                self._adopt_terminal(fds[0])
        launch.mark("namespaces and mounts")
        self._status = status
        self._reader = StatusReader("init" if self.spec.init == "shim" else "exec")
        record = self._next_record()
        if record is None:
            raise StartError("the job's init died before it could start the command", "look for a kill from outside")
        if isinstance(record, StepFailed):
            raise launch.exec_error(record)
        os.set_blocking(status, False)
        launch.mark("exec")

    def _adopt_terminal(self, master: int) -> None:
        self._master = master
        set_nonblocking(master)
        if self.stdio.terminal >= 0:
            self._terminal = Terminal(self.stdio.terminal)
            self._later(self._terminal.restore)
            self._terminal.copy_size(master)
        if self.stdio.stdin >= 0:
            self.relay.inputs.append(Pump(self.stdio.stdin, os.dup(master)))
        if self.stdio.stdout >= 0:
            self.relay.outputs.append(Pump(master, self.stdio.stdout))
        self._later(self.relay.close)

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
        launch = self._launch
        assert launch is not None
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
        launch = self._launch
        assert launch is not None
        ended = os.pidfd_open(launch.pid)
        self._later(lambda: os.close(ended))
        memory = launch.meter.memory_events()
        servers = {os.pidfd_open(helper.pid): helper for helper in launch.servers}
        for pidfd in servers:
            self._later(partial(os.close, pidfd))
        running = True
        while running or self.relay.outputs_open() or self._freezing is not None:
            poll = select.poll()
            waiting = self.relay.register(poll, inputs=self._freezing is None)
            if self._freezing is not None:
                poll.register(self._freezing.fileno(), select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            if running:
                poll.register(ended, select.POLLIN)
                poll.register(self._control.fileno(), select.POLLIN)
                if memory is not None:
                    poll.register(*memory)
                for pidfd in servers:
                    poll.register(pidfd, select.POLLIN)
                for fd in self._children:
                    poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(self._patience() if running else None):
                if fd in waiting:
                    waiting[fd].move()
                elif fd == self._wake:
                    self._forward_signals(running)
                elif fd == ended:
                    running = False
                    self._ended = time.monotonic()
                    _, self._wait_status, self._reaped = os.wait4(launch.pid, 0)
                    launch.pid = 0
                    self.relay.stop_input()
                elif self._freezing is not None and fd == self._freezing.fileno():
                    self._frozen()
                elif fd == self._control.fileno():
                    self._admit()
                elif fd in self._children:
                    self._serve(self._children[fd])
                elif fd in servers:
                    if servers.pop(fd).has_failed():
                        self._end("lost")
                elif memory is not None and fd == memory[0]:
                    launch.meter.acknowledge_memory_event()
                    if launch.meter.memory_killed():
                        self._end("memory-limit")
            if running:
                self._keep_time()

    def _freeze_when_due(self, moment: float) -> None:
        """The checkpoints of ``--checkpoint-every``: the newest good one stays until the next is complete."""
        if self._freeze_at is None or moment < self._freeze_at or self._freezing is not None:
            return
        assert self.spec.checkpoint_every is not None
        assert self.spec.checkpoint_dir is not None
        self._freeze_at = moment + self.spec.checkpoint_every
        self.freeze(self.spec.checkpoint_dir, leave_running=True, asker=None)

    def _patience(self) -> float | None:
        """Milliseconds until the next thing that time decides."""
        due = None if self._freezing is not None else self._freeze_at
        next_at = min((t for t in (self._deadline, self._kill_at, due) if t is not None), default=None)
        return None if next_at is None else max(0.0, (next_at - time.monotonic()) * 1000 + 1)

    def _keep_time(self) -> None:
        moment = time.monotonic()
        if self._deadline is not None and moment >= self._deadline:
            self._deadline = None
            self.stop("time-limit", self._stop_signal(), self.spec.stop_timeout)
        if self._kill_at is not None and moment >= self._kill_at:
            self._kill_at = None
            self._send(signal.SIGKILL)
        self._freeze_when_due(moment)

    def _stop_signal(self) -> int:
        launch = self._launch
        assert launch is not None
        return launch.init_stop_signal or self.spec.stop_signal

    def stop(self, reason: Reason, signum: int, timeout: float) -> None:
        """End the job: first by ``signum``, after ``timeout`` seconds by SIGKILL."""
        if self._reason is None:
            self._reason = reason
        self._kill_at = time.monotonic() + timeout
        self._send(signum)

    def _end(self, reason: Reason) -> None:
        if self._reason is None:
            self._reason = reason
        self._send(signal.SIGKILL)

    def _send(self, signum: int) -> None:
        """Signal the job: its init passes it on to the command. SIGKILL ends the whole job."""
        launch = self._launch
        if launch is not None and launch.pid > 0:
            os.kill(launch.pid, signum)

    def _forward_signals(self, running: bool) -> None:
        try:
            received = os.read(self._wake, 4096)
        except BlockingIOError:
            return
        for signum in received:
            if signum == signal.SIGWINCH and self._terminal is not None:
                self._terminal.copy_size(self._master)
                continue
            if signum == signal.SIGCONT:
                for pump in self.relay.inputs:
                    pump.resume()
            if signum == signal.SIGWINCH or not running:
                if not running and signum in (signal.SIGINT, signal.SIGTERM):
                    self.relay.close()  # the job has ended; only a reader that does not read keeps us
                continue
            if self.spec.checkpoint_dir is not None and signum == self.spec.checkpoint_signal:
                self.freeze(self.spec.checkpoint_dir, leave_running=False, asker=None)
                continue
            self._send(signum)

    # -- requests of other imgrun commands ----------------------------------------------------------------------------

    def _admit(self) -> None:
        channel = accept(self._control)
        if channel.peer_uid() not in (0, os.geteuid()):
            channel.close()
            return
        self._children[channel.fileno()] = channel

    def _serve(self, channel: Channel) -> None:
        try:
            received = channel.receive()
        except (OSError, ValueError):
            received = None
        if received is None:
            del self._children[channel.fileno()]
            channel.close()
            return
        message, fds = received
        for fd in fds:
            os.close(fd)
        try:
            if message.get("request") == "checkpoint":
                self.freeze(str(message["to"]), leave_running=bool(message.get("leave_running")), asker=channel)
                return
            channel.send(self._answer(message))
        except OSError:
            pass  # whoever asked has gone

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked. Whatever that is, the job goes on."""
        try:
            return self._do(message)
        except (KeyError, TypeError, ValueError, OSError) as e:
            return {"error": f"malformed request: {e}"}

    def _do(self, message: dict[str, Any]) -> dict[str, Any]:
        match message.get("request"):
            case "signal":
                self._signal(int(message["signal"]))
            case "stop":
                signum = message.get("signal") or self._stop_signal()
                timeout = message.get("timeout")
                self.stop("stopped", int(signum), self.spec.stop_timeout if timeout is None else float(timeout))
            case other:
                return {"error": f"unknown request {other!r}"}
        return {"ok": True}

    def freeze(self, target: str, *, leave_running: bool, asker: Channel | None) -> None:
        """Begin a checkpoint; the loop goes on, and learns of its end."""
        from imgrun.freezing import Freezing

        launch = self._launch
        assert launch is not None
        try:
            if self._freezing is not None:
                raise CheckpointError(f"job {self.job.id} is being checkpointed already", "wait for that to end")
            launch.check_freezable()
            unsent = b"".join(pump.unsent for pump in self.relay.inputs)
            subject = launch.subject(self._began, next((pump.source for pump in self.relay.inputs), None), unsent)
        except ImgrunError as e:
            if asker is not None:
                asker.send({"error": type(e).__name__, "message": e.message, "hint": e.hint})
            else:
                self._note(f"no checkpoint: {e.message}")
            return
        self._freezing = Freezing(subject, target, leave_running=leave_running, asker=asker)
        # For whoever cleans up, if this process is killed.
        self.job.write("state.json", self.job.read("state.json") | {"building": self._freezing.building})

    def _frozen(self) -> None:
        freezing, self._freezing = self._freezing, None
        assert freezing is not None
        error = freezing.finish()
        if error is not None:
            self._note(f"checkpoint failed: {error.message}")
        elif not freezing.leave_running:
            self._reason = "checkpointed"
            self._frozen_to = freezing.target

    def _signal(self, signum: int) -> None:
        launch = self._launch
        assert launch is not None
        if signum == signal.SIGSTOP and (command := launch.command_pid()):
            os.kill(command, signum)  # an init cannot pass on what it cannot catch
        else:
            self._send(signum)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _result(self) -> Result:
        launch = self._launch
        assert launch is not None
        for pump in self.relay.outputs:
            if pump.failure:
                self._note(f"the job's output could not be written, and the rest is lost: {os.strerror(pump.failure)}")
        exit_code, signum, message = self._how_it_ended()
        reason: Reason = self._reason or ("exited" if signum is None else "signaled")
        if signum == signal.SIGKILL and self._reason is None and launch.meter.memory_killed():
            reason = "memory-limit"
        usage = launch.meter.total(self._ended - self._began, self._reaped)
        usage.scratch_bytes = launch.scratch.used()
        hint = None
        if reason == "memory-limit":
            message, hint = launch.meter.memory_verdict(usage)
        elif reason == "checkpointed":
            exit_code, signum = self.spec.checkpoint_exit_code, None
            message = f"frozen to {self._frozen_to}"
            hint = f"'imgrun restore {self._frozen_to}' continues it"
        elif reason == "lost":
            message, hint = "the process that served the image ended, and the job with it", f"see {self.job.path}/fuse.log"
        elif reason == "time-limit":
            message = f"the job ran into its time limit of {self.spec.time_limit:g} s"
            hint = "give a larger --time-limit"
        return self._record(reason, exit_code, signum, message, hint, usage)

    def _how_it_ended(self) -> tuple[int | None, int | None, str | None]:
        status = self._wait_status
        last: Record | None = None
        while (record := self._next_record()) is not None:
            last = record
        if isinstance(last, Exited):
            return last.code, None, None
        if isinstance(last, Signaled):
            return None, last.signal, None
        if self.spec.init == "image" and os.WIFSIGNALED(status) and os.WTERMSIG(status) in IMAGE_INIT_ENDS:
            return 0, None, f"the image's init {IMAGE_INIT_ENDS[signal.Signals(os.WTERMSIG(status))]}"
        if os.WIFSIGNALED(status):
            return None, os.WTERMSIG(status), None
        return os.WEXITSTATUS(status), None, None

    def _failed(self, e: ImgrunError) -> Result:
        result = self._record("failed-to-start", None, None, e.message, e.hint, Usage())
        result.failure_code = e.exit_code
        result.failure_class = type(e).__name__
        return result

    def _record(
        self, reason: Reason, code: int | None, signum: int | None, message: str | None, hint: str | None, usage: Usage
    ) -> Result:
        launch = self._launch
        return Result(
            id=self.job.id, name=self.spec.name, image=self.spec.image, command=self.spec.command, reason=reason,
            exit_code=code, signal=signum, message=message, hint=hint, started_at=self._started_at, finished_at=now(),
            hostname=launch.hostname if launch else None, usage=usage,
            warnings=tuple(launch.warnings) if launch else (), timings=dict(launch.timings) if launch else {},
        )  # fmt: skip
