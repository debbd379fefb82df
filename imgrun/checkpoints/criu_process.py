"""CRIU's processes in a job: how they are started by one that has entered it, and what fetches memory for a lazy restore.

Source: criu(8).
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Mapping
from typing import NoReturn

from imgrun import syscalls as sc
from imgrun.errors import CheckpointError, JobStateError
from imgrun.isolation.mounts import NO_ACCESS_TO_DEVICES, new_filesystem

BELOW_LAST_PID = 4000
"""How far below the largest pid CRIU and its children get theirs: hardly ever where those are that it restores."""
TOOLBOX = "/dev/imgrun-criu"
IMAGES = "/dev/imgrun-checkpoint"
WORK = "/dev/imgrun-work"
"""Where they are attached in the job, for as long as CRIU runs. Directly in /dev, for what holds a mount cannot be renamed: a
directory between could be, by the job, whose own program would then be run in CRIU's place.
"""
FETCH_LOG = "lazy.log"


def log_level() -> int:
    """How much CRIU is to write down. At 4, a line for each few pages takes a fifth of the time that a job stands still."""
    return 4 if os.environ.get("IMGRUN_DEBUG") else 3


def first_pid() -> int:
    """The least pid in the job that CRIU may have; its children have the ones after that."""
    with open("/proc/sys/kernel/pid_max", "rb") as f:
        return max(int(f.read()) - BELOW_LAST_PID, 1000)


def start(
    words: tuple[str, ...], keep: tuple[int, ...], environment: Mapping[str, str], *, stays: bool = False
) -> tuple[int, int]:
    """Start CRIU, with a pid that the tree does not have. Returns it, and the last pid that was given out before.

    Of our descriptors it has those to ``keep``. It ends with its parent, unless it ``stays``.
    """
    tell, told = os.pipe2(os.O_CLOEXEC)
    child = _clone_aside()
    if child == 0:
        _become_criu(words, keep, environment, told, stays)
    os.close(told)
    last = os.read(tell, 32)
    os.close(tell)
    return child, int(last or b"0")


def _clone_aside() -> int:
    """Fork with a pid that the tree does not have."""
    for aside in range(0, BELOW_LAST_PID // 2, 100):
        try:
            return sc.clone(0, pid=first_pid() + aside)
        except FileExistsError:
            continue  # of an earlier one that was killed, and is not reaped yet
        except OSError as e:
            if e.errno == errno.ENOMEM:  # what the kernel says when a PID namespace has no init any more
                raise JobStateError("the job is ending", "see 'imgrun inspect' for how") from e
            raise
    raise CheckpointError("the job has used up its pids", "end some of its processes")


def _become_criu(
    arguments: tuple[str, ...], keep: tuple[int, ...], environment: Mapping[str, str], told: int, stays: bool
) -> NoReturn:
    try:
        if not stays:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        # CRIU's own children must not take pids that it is to restore.
        os.write(told, str(_swap_last_pid(os.getpid())).encode())
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(signum, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        sc.close_range_cloexec(3)
        for fd in keep:
            os.set_inheritable(fd, True)
        # No settings and no plug-ins of the job's own: they would run with CRIU's rights.
        words = [f"{TOOLBOX}/ld.so", "--inhibit-cache", "--library-path", TOOLBOX, f"{TOOLBOX}/criu"]
        words += ["--no-default-config", "--work-dir", WORK, *arguments]
        os.execve(words[0], words, {"PATH": TOOLBOX, "CRIU_LIBS_DIR": WORK, **environment})
    finally:
        os._exit(127)


def _swap_last_pid(pid: int) -> int:
    """Have the next process of our PID namespace get the pid after ``pid`` (proc(5), ns_last_pid); returns the old one.

    Through a proc of our own: the job's may have it read-only.
    """
    proc = new_filesystem("proc", {}, NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)
    fd = os.open("sys/kernel/ns_last_pid", os.O_RDWR | os.O_CLOEXEC, dir_fd=proc)
    last = int(os.pread(fd, 32, 0))
    os.pwrite(fd, str(pid).encode(), 0)
    os.close(fd)
    os.close(proc)
    return last


def put_last_pid_back(last: int) -> None:
    """The job's next pids follow on those it had, not on CRIU's."""
    child = sc.clone(0)
    if child == 0:
        try:
            _swap_last_pid(last)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


class Fetcher:
    """CRIU's other half of a lazy restore, which gives the processes their memory (criu(8), lazy-pages).

    When it cannot, it stays, with whoever waits for some of it, and when it is killed a child of its does: without, they would
    read zeros. They are killed with the job.
    """

    def __init__(self, keep: tuple[int, ...], environment: Mapping[str, str], *, userns: bool) -> None:
        """Begin: without rights over the host, if it is in a ``userns``."""
        self._failed, failed = os.pipe2(os.O_CLOEXEC)
        self._ready, tell = os.pipe2(os.O_CLOEXEC)
        self._well: bool | None = None
        words = ("--log-file", FETCH_LOG, f"-v{log_level()}", "--images-dir", IMAGES, "--status-fd", str(tell))
        unprivileged = ("--unprivileged",) if userns else ()
        environment = {**environment, "CRIU_LAZY_FAILED_FD": str(failed)}
        self._pid, _ = start(("lazy-pages", *words, *unprivileged), (tell, failed, *keep), environment, stays=True)
        self._end = os.pidfd_open(self._pid)
        os.close(tell)
        os.close(failed)

    def is_ready(self) -> bool:
        """Wait until it is; False when it cannot do its work here."""
        listens = os.read(self._ready, 1)
        os.close(self._ready)
        if not listens:
            os.waitpid(self._pid, 0)
        return bool(listens)

    def descriptors(self) -> tuple[int, int]:
        """One of them can be read from when it has failed or ended."""
        return self._failed, self._end

    def ends_well(self) -> bool:
        """Wait until all memory is there, or nobody is who needs it; False when it has failed and the job lives."""
        if self._well is None:
            poll = select.poll()
            for fd in self.descriptors():
                poll.register(fd, select.POLLIN)
            ended = self._end in [fd for fd, _ in poll.poll()] or not os.read(self._failed, 1)
            self._well = ended and (os.waitpid(self._pid, 0)[1] == 0 or not _lives())
        return self._well


def _lives() -> bool:
    """Whether the job's PID namespace still has an init: without, no process can be made in it."""
    try:
        child = sc.clone(0)
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True
