"""The shim itself, in real PID namespaces: what it reports, forwards, reaps and lets through."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pty
import resource
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgrun import init_shim
from imgrun import syscalls as sc
from imgrun.errors import CommandNotExecutable, CommandNotFound
from imgrun.init_shim import Exited, Record, Signaled, Started, StatusReader, StepFailed
from imgrun.isolation.limits import Rlimit
from imgrun.isolation.security import drop_capabilities

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces without a user namespace need root")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
EVERY_SIGNAL = range(1, 65)
# SIGCHLD is the shim's own business; 32 and 33 are glibc's, and no Python program can wait for them.
NOT_FORWARDED = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, 32, 33)
NOT_DEADLY = (
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip
PATIENCE = 60.0


def block_signals() -> set[signal.Signals]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


class Job:
    """The shim as PID 1 of a new PID namespace, with this process as its supervisor."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        stdin: int | None = None,
        argv: Callable[[int], list[str]] | None = None,
        **options: object,
    ) -> None:
        self.role = options.get("role", "init")
        self._status, status = os.pipe2(os.O_CLOEXEC)
        self.output, output = os.pipe2(os.O_CLOEXEC)
        if argv is None:
            arguments = init_shim.arguments(command, status_fd=status, **options)  # type: ignore[arg-type]
        else:
            arguments = argv(status)
        program = init_shim.program()
        mask = block_signals()
        self.pid = sc.clone(sc.CLONE_NEWPID)
        if self.pid == 0:
            try:
                sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
                os.dup2(stdin if stdin is not None else os.open("/dev/null", os.O_RDONLY), 0)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.set_inheritable(status, True)
                if prepare:
                    prepare()
                os.execve(program, arguments, {"PATH": PATH} if env is None else env)
            finally:
                os._exit(99)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(status)
        os.close(output)
        self._reader = StatusReader(self.role)  # type: ignore[arg-type]
        self._records: list[Record] = []
        self._open = True
        self.waited: int | None = None

    def record(self) -> Record | None:
        """The next record; None at the end."""
        deadline = time.monotonic() + PATIENCE
        while not self._records and self._open:
            assert select.select([self._status], [], [], deadline - time.monotonic())[0], "no record came"
            data = os.read(self._status, 4096)
            self._records += self._reader.feed(data)
            self._open = bool(data)
        return self._records.pop(0) if self._records else None

    def started(self) -> Started:
        record = self.record()
        assert isinstance(record, Started), record
        return record

    def result(self) -> list[Record]:
        """All further records, when PID 1 has ended."""
        records = []
        while (record := self.record()) is not None:
            records.append(record)
        self.wait()
        return records

    def wait(self) -> int:
        if self.waited is None:
            self.waited = os.waitpid(self.pid, 0)[1]
        return self.waited

    def read(self) -> str:
        """The output up to its end."""
        parts = []
        while part := os.read(self.output, 65536):
            parts.append(part)
        return b"".join(parts).decode()

    def line(self) -> str:
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([self.output], [], [], PATIENCE)[0], f"no line came after {text!r}"
            byte = os.read(self.output, 1)
            assert byte, f"the output ended after {text!r}"
            text += byte
        return text.decode().rstrip("\n")

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def reaper(self) -> int:
        """Its pid here."""
        (pid,) = children(self.pid)
        return pid

    def command(self) -> int:
        return children(self.reaper())[0]

    def close(self) -> None:
        if self.waited is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._status)
        os.close(self.output)


Start = Callable[..., Job]


@pytest.fixture
def start() -> Iterator[Start]:
    jobs: list[Job] = []

    def run(*command: str, **options: object) -> Job:
        jobs.append(Job(list(command), **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield run
    for job in jobs:
        job.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A job's standard input, and what the test writes to it by."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status_of(pid: int | str, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key + ":"))


def descriptors(pid: int) -> list[int]:
    return sorted(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    """Ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", code)


# How it ends


def test_every_exit_code(start: Start) -> None:
    for code in range(256):
        job = Job(["/bin/sh", "-c", f"exit {code}"])
        try:
            job.started()
            assert job.result() == [Exited(code)]
            assert os.waitstatus_to_exitcode(job.wait()) == code
        finally:
            job.close()


@pytest.mark.parametrize("number", [n for n in EVERY_SIGNAL if n not in NOT_DEADLY])
def test_every_deadly_signal(start: Start, number: int) -> None:
    job = start("/bin/sh", "-c", f"kill -{number} $$; sleep 100")
    job.started()
    assert job.result() == [Signaled(number)]
    assert os.waitstatus_to_exitcode(job.wait()) == 128 + number


@pytest.mark.parametrize("number", NOT_DEADLY)
def test_other_signals_do_not_end_it(start: Start, number: int) -> None:
    job = start("/bin/sh", "-c", f"(sleep 0.05; kill -CONT $$) & kill -{number:d} $$; wait; exit 7")
    job.started()
    assert job.result() == [Exited(7)]


def test_a_crash_leaves_no_core_of_the_shim(start: Start, tmp_path: Path) -> None:
    before = set(os.listdir("/"))

    def allow_cores() -> None:
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    job = start("/bin/sh", "-c", "kill -SEGV $$", cwd=str(tmp_path), prepare=allow_cores)
    job.started()
    assert job.result() == [Signaled(signal.SIGSEGV)]
    assert set(os.listdir("/")) == before


def test_the_reapers_death_ends_the_job(start: Start) -> None:
    job = start("sleep", "100")
    job.started()
    command = job.command()
    os.kill(job.reaper(), signal.SIGKILL)
    assert job.result() == [Signaled(signal.SIGKILL)]
    assert gone(command)


def test_the_anchors_death_gives_no_record(start: Start) -> None:
    job = start("sleep", "100")
    job.started()
    reaper, command = job.reaper(), job.command()
    job.kill(signal.SIGKILL)
    assert job.result() == []
    assert os.WTERMSIG(job.wait()) == signal.SIGKILL
    assert gone(reaper)
    assert gone(command)


def test_a_stopped_command_is_not_an_ended_one(start: Start, pipe: tuple[int, int]) -> None:
    job = start("/bin/sh", "-c", "echo ready; read line; exit 3", stdin=pipe[0])
    job.started()
    job.line()
    command = job.command()
    job.kill(signal.SIGTSTP)
    os.kill(command, signal.SIGSTOP)
    until(lambda: status_of(command, "State").startswith("T"), "stopped")
    os.write(pipe[1], b"go\n")
    time.sleep(0.05)
    assert job.waited is None
    assert not gone(command)
    job.kill(signal.SIGCONT)
    assert job.result() == [Exited(3)]


# Signals


def test_every_signal_is_forwarded(start: Start) -> None:
    job = start(
        *python(
            "import signal\n"
            "every = signal.valid_signals() - {9, 19}\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, every)\n"
            "print('ready', flush=True)\n"
            "while True: print(int(signal.sigwaitinfo(every).si_signo), flush=True)\n"
        )
    )
    job.started()
    assert job.line() == "ready"
    for number in EVERY_SIGNAL:
        if number not in NOT_FORWARDED:
            job.kill(number)
            assert job.line() == str(number)


RECEIVE_QUEUED = """
import ctypes, signal, sys
libc = ctypes.CDLL(None)
mask = ctypes.create_string_buffer(128)
libc.sigemptyset(mask); libc.sigaddset(mask, 40); libc.sigaddset(mask, 10)
libc.sigprocmask(0, mask, None)
print('ready', flush=True)
info = ctypes.create_string_buffer(128)
for _ in range(200):
    while libc.sigwaitinfo(mask, info) != 40: pass
    print(int.from_bytes(info[24:28], 'little'), int.from_bytes(info[8:12], 'little', signed=True), flush=True)
"""


def test_queued_signals_keep_number_order_and_value(start: Start) -> None:
    job = start(sys.executable, "-I", "-c", RECEIVE_QUEUED)
    job.started()
    assert job.line() == "ready"
    libc = ctypes.CDLL(None, use_errno=True)
    for value in range(200):
        assert libc.sigqueue(job.pid, 40, ctypes.c_void_p(value)) == 0
        job.kill(signal.SIGCHLD)
    assert [job.line() for _ in range(200)] == [f"{value} -1" for value in range(200)]


def test_signals_from_before_the_exec_are_not_lost(start: Start) -> None:
    def early() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    job = start("sleep", "100", prepare=early)
    assert job.started()
    assert job.result() == [Signaled(signal.SIGTERM)]


def test_a_caller_that_blocked_nothing(start: Start) -> None:
    job = start("sleep", "100", prepare=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, []))
    job.started()
    job.kill(signal.SIGUSR2)
    assert job.result() == [Signaled(signal.SIGUSR2)]


def test_a_signal_at_any_moment_of_the_start_arrives(start: Start) -> None:
    for i in range(150):
        job = Job(["sleep", "100"])
        try:
            time.sleep(i * 0.00002)
            job.kill(signal.SIGUSR1)
            job.started()
            assert job.result() == [Signaled(signal.SIGUSR1)]
        finally:
            job.close()


def test_a_flood_of_sigchld_hides_no_end(start: Start) -> None:
    job = start("/bin/sh", "-c", "i=0; while [ $i -lt 300 ]; do (true) & i=$((i+1)); done; wait; exit 5")
    job.started()
    reaper = job.reaper()
    try:
        while not select.select([job._status], [], [], 0)[0]:
            for pid in (job.pid, reaper):
                os.kill(pid, signal.SIGCHLD)
    except ProcessLookupError:
        pass  # the reaper has ended
    assert job.result() == [Exited(5)]


# Orphans and zombies


def test_orphans_go_to_the_reaper_and_end_with_the_job(start: Start, pipe: tuple[int, int]) -> None:
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    while os.getppid() != 2: time.sleep(0.001)\n"
        "    print('adopted', flush=True)\n"
        "    time.sleep(1000)\n"
        "os.wait()\n"
        "os.read(0, 1)\n"
    )
    job = start(*python(code), stdin=pipe[0])
    assert job.started() == Started(2)
    assert job.line() == "adopted"
    command, daemon = sorted(children(job.reaper()))
    assert status_of(daemon, "NSpid").split()[1:] == ["5"]
    os.write(pipe[1], b"x")
    assert job.result() == [Exited(0)]
    assert gone(command)
    assert gone(daemon)


def test_ten_thousand_orphaned_zombies_are_reaped(start: Start, pipe: tuple[int, int]) -> None:
    code = (
        "import os\n"
        "if os.fork() == 0:\n"
        "    for _ in range(10000):\n"
        "        if os.fork() == 0: os._exit(0)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('storm', flush=True)\n"
        "os.read(0, 1)\n"
        "os._exit(9)\n"
    )
    job = start(*python(code), stdin=pipe[0])
    job.started()
    assert job.line() == "storm"
    reaper, command = job.reaper(), job.command()
    until(lambda: children(reaper) == [command], "all zombies are reaped")
    os.write(pipe[1], b"x")
    assert job.result() == [Exited(9)]


def test_the_anchor_reaps_what_the_reaper_is_not_above(start: Start) -> None:
    """A process that was put into the namespace from outside, and lost its parent."""
    job = start("sleep", "100")
    job.started()
    namespace = os.open(f"/proc/{job.pid}/ns/pid", os.O_RDONLY)
    entering = os.fork()
    if entering == 0:
        try:
            sc.setns(namespace)
            if os.fork() == 0:
                if os.fork() == 0:
                    time.sleep(0.1)
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(entering, 0)[1]) == 0
    os.close(namespace)
    reaper = [pid for pid in children(job.pid) if status_of(pid, "Name") == init_shim.REAPER_NAME]
    until(lambda: children(job.pid) == reaper, "the stranger is reaped")


# The supervisor


@pytest.mark.parametrize(("role", "uid"), [("init", 0), ("init", 1234), ("exec", 0), ("exec", 1234)])
def test_the_job_dies_with_its_supervisor(role: str, uid: int) -> None:
    reading, writing = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            job = Job(["/bin/sh", "-c", "sleep 1000 & wait"], role=role, uid=uid)
            job.started()
            top = job.pid if role == "exec" else job.command()
            until(lambda: children(top), "the grandchild runs")
            pids = [job.pid, top, *children(top)] + ([job.reaper()] if role == "init" else [])
            os.write(writing, " ".join(map(str, pids)).encode())
            time.sleep(1000)
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(reading, 1000).split()]
    os.close(reading)
    os.close(writing)
    assert pids
    assert not any(gone(pid) for pid in pids)
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    until(lambda: all(gone(pid) for pid in pids), "the job is gone")


def test_a_supervisor_that_died_before_the_anchor_began(tmp_path: Path) -> None:
    """No parent-death signal comes any more: only the status pipe tells."""
    reading, writing = os.pipe()
    ready, go = os.pipe()
    pid = sc.clone(sc.CLONE_NEWPID)
    if pid == 0:
        try:
            os.close(reading)
            os.close(go)
            os.read(ready, 1)
            os.set_inheritable(writing, True)
            marker = str(tmp_path / "ran")
            os.execve(init_shim.program(), init_shim.arguments(["touch", marker], status_fd=writing), {"PATH": PATH})
        finally:
            os._exit(99)
    for fd in (reading, writing, ready, go):
        os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 125
    assert not os.listdir(tmp_path)


# What the command is given


def test_nothing_but_the_standard_descriptors(start: Start, pipe: tuple[int, int]) -> None:
    def clutter() -> None:
        for number in (20, 77, 300):
            os.dup2(0, number, inheritable=True)

    job = start(
        *python("import os\nprint(os.listdir('/proc/self/fd'), flush=True)\nos.read(0, 1)"),
        prepare=clutter,
        stdin=pipe[0],
    )
    job.started()
    assert job.line() == "['0', '1', '2', '3']", "3 is what it lists them by"
    assert descriptors(job.reaper()) == [0, 1, 2]
    assert len(descriptors(job.pid)) == 1, "the anchor holds the status only"


def test_closed_standard_descriptors_become_dev_null(start: Start) -> None:
    def close() -> None:
        os.closerange(0, 3)

    job = start("sleep", "100", prepare=close)
    job.started()

    for pid in (job.reaper(), job.command()):
        until(lambda pid=pid: descriptors(pid) == [0, 1, 2], "it has loaded its libraries")  # type: ignore[misc]
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3


def test_default_signals_and_an_empty_mask(start: Start) -> None:
    def ignore() -> None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR1, signal.SIGINT, 50):
            signal.signal(number, signal.SIG_IGN)

    job = start("cat", "/proc/self/status", prepare=ignore)
    job.started()
    masks = dict(line.split(":\t") for line in job.read().splitlines() if line.startswith("Sig"))
    assert {masks[key] for key in ("SigPnd", "SigBlk", "SigIgn", "SigCgt")} == {"0" * 16}


def test_environment_is_what_was_given(start: Start) -> None:
    job = start("/usr/bin/env", env={"A": "1", "B": "two words"})
    job.started()
    assert sorted(job.read().splitlines()) == ["A=1", "B=two words"]


def test_sessions(start: Start) -> None:
    job = start("sleep", "100")
    job.started()
    reaper, command = job.reaper(), job.command()
    assert os.getsid(reaper) == os.getpgid(reaper) == reaper
    assert os.getsid(command) == os.getpgid(command) == command
    assert os.getsid(job.pid) == job.pid


def test_terminal(start: Start) -> None:
    master, slave = pty.openpty()
    code = (
        "import os\n"
        "assert os.tcgetpgrp(0) == os.getpgrp() == os.getsid(0) == os.getpid()\n"
        "os.open('/dev/tty', os.O_RDWR)\n"
        "print('ready', flush=True)\n"
        "os.read(0, 1)\n"
    )
    job = start(*python(code), tty=True, stdin=slave)
    job.started()
    assert job.line() == "ready"
    os.write(master, b"\x03")
    assert job.result() == [Signaled(signal.SIGINT)]
    os.close(master)
    os.close(slave)


def test_terminal_resize_reaches_the_command(start: Start) -> None:
    master, slave = pty.openpty()
    job = start(
        "/bin/sh", "-c", "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done", tty=True, stdin=slave
    )
    job.started()
    assert job.line() == "ready"
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    assert job.line() == "33 99"
    os.close(master)
    os.close(slave)


def test_ids(start: Start) -> None:
    job = start("grep", "-E", "^(Uid|Gid|Groups|CapEff)", "/proc/self/status", uid=1234, gid=567, groups=[5, 10, 77])
    job.started()
    assert job.read().split() == [
        "Uid:", *["1234"] * 4, "Gid:", *["567"] * 4, "Groups:", "5", "10", "77", "CapEff:", "0" * 16,
    ]  # fmt: skip


def test_groups_none_many_and_kept(start: Start) -> None:
    many = list(range(5000, 6500))
    for given, expected in (((), []), (many, many), (None, [3, 4])):
        job = start(
            *python("import os; print(sorted(os.getgroups()))"),
            groups=given,
            prepare=lambda: os.setgroups([3, 4]),
        )
        job.started()
        assert job.read().strip() == str(expected)


def test_rlimits_are_the_commands_alone(start: Start) -> None:
    limits = [Rlimit("nofile", 100, 200), Rlimit("core", 0, 0), Rlimit("nproc", 1, 1), Rlimit("cpu", 5, None)]
    job = start("sleep", "100", rlimits=limits, uid=1234)
    job.started()
    assert limits_of(job.command()) >= {
        ("Max open files", "100", "200"), ("Max core file size", "0", "0"), ("Max processes", "1", "1"),
        ("Max cpu time", "5", "unlimited"),
    }  # fmt: skip
    assert limits_of(job.pid) == limits_of(job.reaper()) == limits_of(os.getpid())


def limits_of(pid: int) -> set[tuple[str, str, str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {(line[:26].strip(), *line[26:].split()[:2]) for line in lines}  # type: ignore[misc]


def test_working_directory(start: Start, tmp_path: Path) -> None:
    job = start("pwd", cwd=str(tmp_path))
    job.started()
    assert job.read() == f"{tmp_path}\n"


def test_working_directory_is_entered_as_the_user(start: Start, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert start("pwd", cwd=str(tmp_path), uid=1234).record() == StepFailed("cwd", errno.EACCES)


# Finding the command


def script(path: Path, text: str, mode: int = 0o755) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_search_in_path(start: Start, tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    script(tmp_path / "a" / "tool", "#!/bin/sh\necho a\n", 0o644)
    script(tmp_path / "b" / "tool", "#!/bin/sh\necho b $1\n")
    script(tmp_path / "c" / "tool", "#!/bin/sh\necho c\n")
    script(tmp_path / "a" / "plain", "text\n", 0o644)
    path = f"/nonexistent:/etc/passwd:{'x' * 5000}:{a}:{b}:{c}"

    def run(name: str, path: str, cwd: str = "/") -> str | StepFailed:
        job = start(name, "one", env={"PATH": path}, cwd=cwd)
        record = job.record()
        return record if isinstance(record, StepFailed) else job.read().strip()

    assert run("tool", path) == "b one"
    assert run("tool", f"{c}:{b}") == "c"
    assert run("tool", f":{b}", cwd=c) == "c", "an empty entry is the working directory"
    assert run("tool", f"{a}/nothing:", cwd=c) == "c"
    assert run("./tool", "/nonexistent", cwd=c) == "c"
    assert run("plain", path) == StepFailed("exec", errno.EACCES)
    assert run("nothing", path) == StepFailed("exec", errno.ENOENT)
    assert run("", path) == StepFailed("exec", errno.ENOENT)


def test_search_without_path(start: Start) -> None:
    job = start("sh", "-c", "echo found", env={})
    job.started()
    assert job.read() == "found\n"


def test_script_without_interpreter_line(start: Start, tmp_path: Path) -> None:
    path = script(tmp_path / "script", 'echo "$0" "$#" "$2"\nexit 4\n')
    job = start(path, "one", "two words")
    job.started()
    assert job.read() == f"{path} 2 two words\n"
    assert job.result() == [Exited(4)]


def test_what_cannot_be_executed(start: Start, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 9 + struct.pack("<HHI", 2, 0xF00D, 1) + b"\0" * 200)
    foreign.chmod(0o755)
    true = Path("/bin/true").read_bytes()
    loader = next(name for name in (b"/lib64/ld-linux-x86-64.so.2", b"/lib/ld-linux-aarch64.so.1") if name in true)
    loaderless = tmp_path / "loaderless"
    loaderless.write_bytes(true.replace(loader, b"/" + b"x" * (len(loader) - 1)))
    loaderless.chmod(0o755)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    def failure(command: str, **options: object) -> object:
        job = start(command, **options)
        record = job.record()
        assert job.result() == []
        assert os.waitstatus_to_exitcode(job.wait()) == 125
        return record

    assert failure("/nonexistent") == StepFailed("exec", errno.ENOENT)
    assert failure("/etc/passwd/x") == StepFailed("exec", errno.ENOTDIR)
    assert failure(str(loop)) == StepFailed("exec", errno.ELOOP)
    assert failure("/etc") == StepFailed("exec", errno.EACCES)
    assert failure("/etc/passwd") == StepFailed("exec", errno.EACCES)
    assert failure("/dev/null") == StepFailed("exec", errno.EACCES)
    assert failure(str(foreign)) == StepFailed("exec", errno.ENOEXEC)
    assert failure(str(loaderless)) == StepFailed("interpreter", errno.ENOENT)
    assert failure(script(tmp_path / "lost", "#!/no/such/interpreter\n")) == StepFailed("interpreter", errno.ENOENT)
    assert failure("true", cwd="/nonexistent") == StepFailed("cwd", errno.ENOENT)
    assert failure("true", tty=True) == StepFailed("tty", errno.ENOTTY)
    nr_open = int(Path("/proc/sys/fs/nr_open").read_text())
    limit = Rlimit("nofile", nr_open + 1, nr_open + 1)
    assert failure("true", rlimits=[limit]) == StepFailed("rlimit", errno.EPERM)
    assert isinstance(init_shim.failure(StepFailed("exec", errno.ENOENT), ["x"]), CommandNotFound)
    assert isinstance(init_shim.failure(StepFailed("exec", errno.ENOEXEC), ["x"]), CommandNotExecutable)


def test_malformed_arguments(start: Start) -> None:
    for index, bad in (
        (1, "anchor"), (3, "-1"), (3, "4294967295"), (3, ""), (4, "x"), (5, "1,"), (5, "1x2"), (5, "1 2"), (5, "1,,2"),
        (5, "a"), (6, "7:1"),
        (6, "7:1:2,x"), (6, "7:1:99999999999999999999"),
    ):  # fmt: skip

        def argv(status: int, index: int = index, bad: str = bad) -> list[str]:
            good = init_shim.arguments(["true"], status_fd=status)
            return [*good[:index], bad, *good[index + 1 :]]

        job = start(argv=argv)
        assert job.record() == StepFailed("arguments", errno.EINVAL), (index, bad)
        assert job.result() == []


def test_without_a_status_descriptor(start: Start) -> None:
    for status in ("2", "999", "x", ""):
        job = start(argv=lambda _, status=status: [init_shim.NAME, "init", status, "0", "0", "", "", "0", "/", "true"])
        assert job.result() == []
        assert os.waitstatus_to_exitcode(job.wait()) == 125


# The role without a process that stays


def test_exec_role_is_pid_1(start: Start) -> None:
    job = start("/bin/sh", "-c", "echo $$; exit 6", role="exec")
    assert job.started() == Started(0)
    assert job.read() == "1\n"
    assert job.result() == []
    assert os.waitstatus_to_exitcode(job.wait()) == 6


def test_exec_role_reports_failures(start: Start) -> None:
    job = start("nonexistent-command", role="exec")
    assert job.record() == StepFailed("exec", errno.ENOENT)
    assert job.result() == []
    assert os.waitstatus_to_exitcode(job.wait()) == 125


# What it is


def test_names_hide_the_commands(start: Start) -> None:
    job = start("sleep", "4321", cwd="/tmp")
    job.started()
    reaper, command = job.reaper(), job.command()
    until(lambda: status_of(reaper, "Name") == init_shim.REAPER_NAME, "the reaper has its name")
    until(lambda: b"4321" not in Path(f"/proc/{reaper}/cmdline").read_bytes(), "the reaper has no arguments")
    assert status_of(job.pid, "Name") == init_shim.NAME
    assert Path(f"/proc/{job.pid}/cmdline").read_bytes().rstrip(b"\0") == init_shim.NAME.encode()
    assert Path(f"/proc/{reaper}/cmdline").read_bytes().rstrip(b"\0") == init_shim.REAPER_NAME.encode()
    assert Path(f"/proc/{command}/cmdline").read_bytes() == b"sleep\0004321\0"


def test_small(start: Start) -> None:
    assert os.path.getsize(init_shim.program()) < 20 << 10
    job = start("sleep", "100")
    job.started()
    for pid in (job.pid, job.reaper()):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        assert pss < 64, "KiB"


def test_the_reaper_is_plain_enough_to_freeze(start: Start) -> None:
    job = start("sleep", "100")
    job.started()
    reaper = job.reaper()
    until(lambda: descriptors(reaper) == [0, 1, 2], "the reaper is set up")
    assert os.readlink(f"/proc/{reaper}/cwd") == "/"
    assert Path(f"/proc/{reaper}/timers").read_text() == ""
    assert len(os.listdir(f"/proc/{reaper}/task")) == 1
    assert status_of(reaper, "SigCgt") == status_of(reaper, "SigIgn") == "0" * 16
    assert status_of(reaper, "Seccomp") == "0"
    maps = Path(f"/proc/{reaper}/maps").read_text()
    assert {line.split()[5] for line in maps.splitlines() if len(line.split()) > 5} <= {
        os.path.realpath(init_shim.program()), "[stack]", "[vvar]", "[vdso]", "[vsyscall]", "[heap]", "[vvar_vclock]",
    }  # fmt: skip


def test_only_a_tracer_reaches_the_status(start: Start, pipe: tuple[int, int]) -> None:
    """The job's root, without CAP_SYS_PTRACE, cannot write a record of its own; the reaper's descriptors it may open."""
    code = (
        "import os\n"
        "for path in input().split():\n"
        "    try: os.open(path, os.O_WRONLY); print('opened')\n"
        "    except OSError as e: print(e.strerror)\n"
    )
    job = start(*python(code), stdin=pipe[0], prepare=drop_capabilities)
    job.started()
    (status,) = descriptors(job.pid)
    os.write(pipe[1], f"/proc/{job.pid}/fd/{status} /proc/{job.reaper()}/fd/1\n".encode())
    assert job.read() == "Permission denied\nopened\n"
