"""The job's streams through the real command: nothing lost, nothing reordered, nobody stuck, whatever they are."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, Imgrun, eventually, expect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20


def feed(fd: int, size: int, piece: bytes) -> threading.Thread:
    """Write ``size`` bytes of repeated ``piece`` to a pipe, in a thread, and close it."""

    def write() -> None:
        with open(fd, "wb", buffering=0) as f:
            for _ in range(size // len(piece)):
                view = memoryview(piece)
                while view:
                    view = view[f.write(view) or 0 :]

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_200_megabytes_through_the_job_and_back(run: Imgrun) -> None:
    piece = os.urandom(MIB)
    process = run.foreground("exec cat")
    assert process.stdin is not None
    assert process.stdout is not None
    writer = feed(os.dup(process.stdin.fileno()), 200 * MIB, piece)
    process.stdin.close()
    seen, size = hashlib.sha256(), 0
    while data := os.read(process.stdout.fileno(), MIB):
        seen.update(data)
        size += len(data)
    writer.join()
    assert process.wait(30) == 0
    wanted = hashlib.sha256()
    for _ in range(200):
        wanted.update(piece)
    assert (size, seen.hexdigest()) == (200 * MIB, wanted.hexdigest())


def test_every_byte_passes(run: Imgrun) -> None:
    data = bytes(range(256)) * 1000
    process = run.foreground("cat; cat /dev/null >&2")
    stdout, stderr = process.communicate(data, timeout=60)
    assert (stdout == data, stderr) == (True, b"")


def test_order_within_each_stream(run: Imgrun) -> None:
    process = run.foreground("i=0; while [ $i -lt 3000 ]; do echo $i; echo $i >&2; i=$((i+1)); done")
    stdout, stderr = process.communicate(timeout=60)
    wanted = [str(i) for i in range(3000)]
    assert stdout.decode().split() == wanted
    assert stderr.decode().split() == wanted


def test_one_pipe_for_both_streams_keeps_all_lines(run: Imgrun) -> None:
    process = run.foreground("for i in $(seq 500); do echo out $i; echo err $i >&2; done", stderr=subprocess.STDOUT)
    stdout, _ = process.communicate(timeout=60)
    lines = stdout.decode().splitlines()
    assert [line for line in lines if line.startswith("out")] == [f"out {i}" for i in range(1, 501)]
    assert [line for line in lines if line.startswith("err")] == [f"err {i}" for i in range(1, 501)]


def test_a_slow_reader_gets_everything(run: Imgrun) -> None:
    process = run.foreground("seq 200000; echo done >&2")
    assert process.stdout is not None
    time.sleep(0.5)
    parts = []
    while data := os.read(process.stdout.fileno(), 1 << 15):
        parts.append(data)
        time.sleep(0.002)
    assert process.wait(30) == 0
    assert b"".join(parts).decode() == "".join(f"{i}\n" for i in range(1, 200001))


def test_a_stream_that_nobody_reads_does_not_hold_up_the_other(run: Imgrun) -> None:
    process = run.foreground("yes >&2 & for i in 1 2 3; do echo $i; sleep 0.1; done; exit 4")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
    assert process.stderr is not None
    while os.read(process.stderr.fileno(), MIB):
        pass
    assert process.wait(30) == 4


def test_output_of_a_job_that_has_ended_waits_for_its_reader(run: Imgrun) -> None:
    process = run.foreground("seq 10000 | head -c 50000")
    time.sleep(1)
    assert process.stdout is not None
    assert len(process.stdout.read()) == 48894
    assert process.wait(30) == 0


def test_who_does_not_read_can_still_interrupt(run: Imgrun) -> None:
    process = run.foreground("yes | head -c 1000000; exit 3")
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    time.sleep(0.5)
    process.terminate()  # ends the job, and a second one those who wait for the reader
    time.sleep(0.5)
    process.terminate()
    eventually(lambda: process.poll() is not None, "the end of a command whose output nobody reads")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_output_breaks_the_pipe_of_the_job(run: Imgrun, stream: str) -> None:
    process = run.foreground("exec yes >&2" if stream == "stderr" else "exec yes")
    closed = getattr(process, stream)
    os.read(closed.fileno(), 2)
    closed.close()
    assert process.wait(30) == 128 + signal.SIGPIPE


def test_a_job_that_ignores_the_broken_pipe_goes_on(run: Imgrun) -> None:
    process = run.foreground("trap '' PIPE; yes 2>/dev/null; echo over >&2; exit 6")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"over\n"
    assert process.wait(30) == 6


def test_a_job_that_does_not_read_its_input_loses_nothing_else(run: Imgrun) -> None:
    process = run.foreground("exec <&-; sleep 0.3; echo end")
    assert process.stdin is not None
    writer = feed(os.dup(process.stdin.fileno()), 4 * MIB, bytes(MIB))
    process.stdin.close()
    assert process.stdout is not None
    assert process.stdout.read() == b"end\n"
    assert process.wait(30) == 0
    writer.join(10)
    assert not writer.is_alive(), "the writer of the input hangs"


@pytest.fixture(autouse=True)
def broken_pipes_in_threads_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


# -- other kinds of streams --------------------------------------------------------------------------------------------


def test_files(run: Imgrun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("before\n")
    source = tmp_path / "in"
    source.write_bytes(b"x" * 3 * MIB)
    with out.open("ab") as sink, source.open("rb") as stdin:
        assert run.foreground("cat; echo end", stdin=stdin, stdout=sink).wait(30) == 0
    assert out.read_bytes() == b"before\n" + b"x" * 3 * MIB + b"end\n"
    with out.open("wb") as sink:
        assert run.foreground("echo 1; echo 2", stdout=sink).wait(30) == 0
        assert run.foreground("echo 3", stdout=sink).wait(30) == 0
    assert out.read_text() == "1\n2\n3\n", "two commands that share an open file write after one another"


def test_sockets(run: Imgrun) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = run.foreground("cat", stdin=theirs, stdout=theirs)
        theirs.close()
        writer = feed(os.dup(ours.fileno()), 8 * MIB, b"x" * MIB)
        parts = [ours.recv(65536)]
        while sum(map(len, parts)) < 8 * MIB:
            parts.append(ours.recv(65536))
        writer.join()
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
        assert b"".join(parts) == b"x" * 8 * MIB
        assert process.wait(30) == 0


def test_a_full_disk_is_told(run: Imgrun) -> None:
    with open("/dev/full", "wb") as full:
        process = run.foreground("echo lost; exit 3", stdout=full)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3
    assert b"No space left on device" in stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_has_closed(run: Imgrun, tmp_path: Path, closed: str) -> None:
    mark = tmp_path / "mark"
    mark.mkdir(mode=0o777)
    mark.chmod(0o777)
    inside = "cat; echo x; echo y >&2; ls /proc/self/fd > /m/fds"
    words = f"{' '.join(COMMAND)} start --bind {mark}:/m --userns off {run.image} -- sh -c '{inside}' {closed}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=30)
    assert done.returncode == 0, done
    assert (mark / "fds").read_text().split()[:3] == ["0", "1", "2"]


def test_the_flags_of_the_callers_streams_are_left_alone(run: Imgrun) -> None:
    """The shell that started us reads and writes the same pipes; O_NONBLOCK would break it."""
    read, write = os.pipe()
    process = run.foreground("echo ready; cat >&2", stdin=read, stdout=subprocess.PIPE, stderr=write)
    expect(process, "ready")
    for fd in (read, write):
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    process.kill()
    process.wait()
    os.close(read)
    os.close(write)


# -- terminals ---------------------------------------------------------------------------------------------------------


class Terminal:
    """A command with a terminal of its own as its session's, as a terminal emulator gives it."""

    def __init__(self, *words: str) -> None:
        self.output = b""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(COMMAND[0], [*COMMAND, *words])

    def read(self) -> None:
        try:
            self.output += os.read(self.master, 65536)
        except OSError:
            raise AssertionError(f"the command ended: {self.output!r}") from None

    def until(self, words: bytes) -> None:
        deadline = threading.Timer(30, os.kill, (self.pid, signal.SIGKILL))
        deadline.start()
        try:
            while words not in self.output:
                self.read()
        finally:
            deadline.cancel()
        self.output = self.output.partition(words)[2]

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self) -> int:
        """The exit status, once all output is read."""
        try:
            while data := os.read(self.master, 65536):
                self.output += data
        except OSError:
            pass
        pid, status = self.pid, os.waitpid(self.pid, 0)[1]
        self.pid = 0
        assert pid
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    made: list[Terminal] = []
    yield made
    for terminal in made:
        terminal.close()


def test_tty(run: Imgrun, terminals: list[Terminal]) -> None:
    script = "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo three; echo $TERM; read x; echo got $x; exit 5"
    terminals.append(terminal := Terminal("start", "-t", run.image, "--", "sh", "-c", f"sleep 0.2; {script}"))
    terminal.resize(33, 99)
    terminal.until(b"/dev/pts/0\r\n")
    terminal.until(b"33 99\r\n")
    terminal.until(b"three\r\n")
    terminal.type(b"words\r")
    terminal.until(b"got words\r\n")
    assert terminal.wait() == 5


def test_resize_and_ctrl_c_in_a_tty(run: Imgrun, terminals: list[Terminal]) -> None:
    script = "trap 'stty size' WINCH; trap 'echo interrupted; exit 4' INT; echo ready; while :; do sleep 0.05; done"
    terminals.append(terminal := Terminal("start", "-t", run.image, "--", "sh", "-c", script))
    terminal.until(b"ready\r\n")
    terminal.resize(44, 111)
    terminal.until(b"44 111\r\n")
    terminal.type(b"\x03")
    terminal.until(b"interrupted\r\n")
    assert terminal.wait() == 4


def test_the_terminal_is_as_it_was_afterwards(run: Imgrun, terminals: list[Terminal]) -> None:
    for script, status in (("echo ready; read x", 0), ("echo ready; read x; kill -9 $$", 137)):
        terminals.append(terminal := Terminal("start", "-t", run.image, "--", "sh", "-c", script))
        before = termios.tcgetattr(terminal.master)
        terminal.until(b"ready\r\n")
        assert termios.tcgetattr(terminal.master) != before, "raw while the job runs"
        terminal.type(b"\r")
        assert terminal.wait() == status
        assert termios.tcgetattr(terminal.master) == before


def test_ctrl_c_without_tty_arrives_once(run: Imgrun, terminals: list[Terminal]) -> None:
    """The terminal signals its whole foreground group; the job must get it from the supervisor only."""
    terminals.append(terminal := Terminal("start", "/", "--", "/usr/bin/python3", "-c", COUNT))
    terminal.until(b"ready\r\n")
    for i in range(1, 11):
        terminal.type(b"\x03")
        terminal.until(b"#%d\r\n" % i)
        time.sleep(0.05)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.wait() == 143
    assert b"#" not in terminal.output


COUNT = """
import os, signal, time
count = 0
def note(*_):
    global count
    count += 1
    os.write(1, b"#%d\\n" % count)
signal.signal(signal.SIGINT, note)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def test_in_the_background_of_a_terminal(run: Imgrun, terminals: list[Terminal]) -> None:
    """A shell's background job may not read the terminal; that must not stop or end it."""
    pid, master = pty.fork()
    if pid == 0:
        words = " ".join([*COMMAND, "start", run.image, "--", "sh", "-c", "'sleep 0.3; echo end; exit 3'"])
        os.execv("/bin/sh", ["sh", "-m", "-c", f"{words} & wait $!; echo status $?"])
    terminals.append(terminal := Terminal.__new__(Terminal))
    terminal.pid, terminal.master, terminal.output = pid, master, b""
    terminal.type(b"typed\r")
    terminal.until(b"end\r\n")
    terminal.until(b"status 3\r\n")
    assert terminal.wait() == 0


def test_tty_without_a_terminal_of_our_own(run: Imgrun) -> None:
    done = run.sh("tty; read x; echo got $x", "-t", stdin="words\n")
    assert {"/dev/pts/0", "got words"} <= set(done.stdout.replace("\r", "").splitlines())
    assert done.status == 0
