"""The job's input and output: its ends of the pipes or its terminal, the pumps to ours, and what a restored job reads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgrun.relay import Pump, Relay, Terminal, set_nonblocking
from imgrun.spec import JobSpec

if TYPE_CHECKING:
    from imgrun.accounting.verdict import Verdict
    from imgrun.checkpoints.manifest import Checkpoint


class Stdio:
    """Where the job's input comes from and its output goes. Descriptors are the supervisor's own; -1 is nowhere."""

    def __init__(self, stdin: int, stdout: int, stderr: int, terminal: int = -1) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.terminal = terminal
        """The caller's terminal, for ``tty``."""


class Streams:
    """All that flows into and out of one job."""

    def __init__(self, spec: JobSpec, stdio: Stdio, checkpoint: Checkpoint | None) -> None:
        self.relay = Relay()
        self._spec = spec
        self._stdio = stdio
        self._checkpoint = checkpoint
        self._terminal: Terminal | None = None
        self._master = -1

    def make_ends(self, owner: tuple[int, int] | None) -> tuple[int, ...]:
        """The job's ends of its input and output, which belong to ``owner``; the pumps own ours. None for a terminal."""
        if self._spec.tty:
            return ()
        ends = []
        sources = [(self._stdio.stdin, True), (self._stdio.stdout, False), (self._stdio.stderr, False)]
        if self._checkpoint is not None:
            sources[0] = (self._continued_input(self._checkpoint, self._stdio.stdin), True)
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
        return tuple(ends)

    @staticmethod
    def _continued_input(checkpoint: Checkpoint, given: int) -> int:
        """What the job reads after what was saved for it: as given, or nothing more, or none at all as before."""
        from imgrun.checkpoints.continuing import has_more_input, reads_pipe

        if given >= 0 and has_more_input(checkpoint, given):
            return given
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) if reads_pipe(checkpoint) else -1

    def feed_saved_input(self, checkpoint: Checkpoint) -> None:
        """What the job had not read yet comes before what it is given now."""
        from imgrun.checkpoints.continuing import saved_input

        for pump in self.relay.inputs:
            pump.give(saved_input(checkpoint))

    def adopt_terminal(self, master: int) -> None:
        """The other side of the job's own terminal, which the child has made."""
        self._master = master
        set_nonblocking(master)
        if self._stdio.terminal >= 0:
            self._terminal = Terminal(self._stdio.terminal)
            self.resize()
        if self._stdio.stdin >= 0:
            self.relay.inputs.append(Pump(self._stdio.stdin, os.dup(master)))
        if self._stdio.stdout >= 0:
            self.relay.outputs.append(Pump(master, self._stdio.stdout))

    def resize(self) -> None:
        """Give the job's terminal the size of the caller's."""
        if self._terminal is not None:
            self._terminal.copy_size(self._master)

    def say(self, line: bytes) -> bool:
        """Write a line of ours where the job's errors go, if that can be done at once; whether it could."""
        sink = self.relay.outputs[1].sink if len(self.relay.outputs) == 2 and self.relay.outputs[1].open else 2
        try:
            return os.write(sink, line) == len(line)
        except OSError:
            return False

    def resume(self) -> None:
        """Read on from a terminal that may be ours again."""
        for pump in self.relay.inputs:
            pump.resume()

    def unsent(self) -> bytes:
        """Input that was read and that the job has not been given."""
        return b"".join(pump.unsent for pump in self.relay.inputs)

    def source(self) -> int | None:
        """Where input comes from."""
        return next((pump.source for pump in self.relay.inputs), None)

    def tell(self, verdict: Verdict | None) -> None:
        """Say to whoever sees the job's errors what happened to it while it runs."""
        if verdict is not None and self._stdio.stderr >= 0:
            try:
                os.write(self._stdio.stderr, f"imgrun: {verdict.message}\n  {verdict.hint}\n".encode())
            except OSError:
                pass

    def failures(self) -> list[str]:
        """What went wrong with the output, in sentences."""
        return [f"the job's output could not be written, and the rest is lost: {why}" for why in self.relay.failures()]

    def close(self) -> None:
        """Give the terminal back, and end all flow."""
        if self._terminal is not None:
            self._terminal.restore()
            self._terminal = None
        self.relay.close()


def close_all(fds: tuple[int, ...]) -> tuple[int, ...]:
    """Close the job's ends in this process."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)
    return ()
