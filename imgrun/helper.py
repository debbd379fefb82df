"""Programs that work for a job from outside it: file servers, the network's other end.

Each is a child of the supervisor: the job's PID namespace does not show it, and it is killed when the supervisor is.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from imgrun import syscalls as sc


def find_program(name: str) -> str | None:
    """The path of a program, looked for where the caller looks and where administrators' programs are."""
    for directory in [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]:
        path = f"{directory}/{name}"
        if directory.startswith("/") and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


class Helper:
    """One running program; its messages are in ``log``."""

    def __init__(self, pid: int, program: str, log: str) -> None:
        self.pid = pid
        self.program = program
        self.log = log

    @classmethod
    def run(cls, argv: list[str], log: str, keep: tuple[int, ...] = ()) -> Helper:
        """Start ``argv``, whose first word is a path, with none of our descriptors but ``keep``."""
        pid = os.fork()
        if pid == 0:
            _become(argv, log, keep)
        return cls(pid, os.path.basename(argv[0]), log)

    def await_ready(self, ready: Callable[[], bool], seconds: float, news: int = -1) -> bool:
        """Wait until ``ready``; False when the program ended before, TimeoutError when it takes longer than that.

        ``news`` is a descriptor whose POLLPRI says that it is worth asking now, such as that of a table of mounts.
        """
        deadline = time.monotonic() + seconds
        ended = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            if news >= 0:
                poll.register(news, select.POLLPRI)
            pause = 1
            while not ready():
                if any(fd == ended for fd, _ in poll.poll(pause)):
                    return False
                if time.monotonic() > deadline:
                    raise TimeoutError
                pause = min(pause * 2, 20)
            return True
        finally:
            os.close(ended)

    def last_words(self) -> str:
        """The last line of its messages."""
        try:
            with open(self.log, "rb") as f:
                lines = [line for line in f.read(1 << 16).decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return lines[-1].strip() if lines else "it said nothing"

    def has_failed(self, *, wait: bool = False) -> bool:
        """Reap it after its end, if need be ``wait`` for that, and tell whether it was anything but an orderly one."""
        if self.pid <= 0:
            return False
        pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        if not pid:
            return False
        self.pid = 0
        return status != 0

    def flush(self, seconds: float) -> None:
        """Give it time to end by itself, so that what it has still to write is written."""
        deadline = time.monotonic() + seconds
        while self.pid > 0 and time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                return
            time.sleep(0.005)

    def close(self) -> None:
        """End it at once."""
        if self.pid > 0:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            os.waitpid(self.pid, 0)
            self.pid = 0


def _become(argv: list[str], log: str, keep: tuple[int, ...]) -> None:
    try:
        os.setsid()
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(signum, signal.SIG_DFL)  # what is ignored stays ignored over execve(2)
        null = os.open("/dev/null", os.O_RDWR)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, fd in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, fd)
        sc.close_others(keep)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.chdir("/")
        os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"})
    finally:
        os._exit(127)
