"""Processes with everything that processes have: it is all there again when they are continued (kinds.c, waits.c)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from command import expect

from images import programs, tool

from .conftest import Rig


@pytest.fixture(scope="session")
def kinds(base: Path) -> Path:
    """The directory of the program, for --bind."""
    directory = base / "kinds"
    directory.mkdir()
    return compiled(directory, "kinds.c")


def compiled(directory: Path, source: str) -> Path:
    """The directory, with the program in it that is made of a file beside this one."""
    words = [tool("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-result", "-static"]
    path = Path(__file__).parent / source
    subprocess.run([*words, "-o", directory / path.stem, path, "-lpthread", "-lrt"], check=True)
    return directory


def begin(rig: Rig, kinds: Path, words: str, *flags: str) -> subprocess.Popen[bytes]:
    """The program in a job, from where it has everything and waits for a line."""
    process = rig.run.foreground(f"exec /kinds/kinds {words}", "--name", "kinds", "--bind", f"{kinds}:/kinds:ro", *flags)
    expect(process, "ready")
    return process


def continued(rig: Rig, process: subprocess.Popen[bytes]) -> list[str]:
    """Freeze it, continue it, and give it its line: what it then says."""
    target = rig.freeze("kinds")
    assert process.wait(60) == 85
    done = rig.restore(target, stdin="go\n")
    assert (done.status, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


ALL = ("files", "memory", "signals", "timers", "unread-timer", "events", "inotify", "sockets", "internet", "threads", "self")


@pytest.mark.parametrize(
    ("rig", "flags"), [("root", ()), ("root", ("--userns", "off")), ("user", ())], indirect=["rig"], ids=str
)
def test_everything_that_a_process_has(rig: Rig, kinds: Path, flags: tuple[str, ...]) -> None:
    process = begin(rig, kinds, "things", "--network", "none", *flags)
    assert continued(rig, process) == [f"{thing} ok" for thing in ALL]


def test_connections_that_are_being_made(rig: Rig, kinds: Path) -> None:
    """CRIU cannot save one that is not accepted yet; most of the time there is one here."""
    process = begin(rig, kinds, "knocks", "--network", "none")
    assert continued(rig, process) == ["knocks ok"]


@pytest.mark.parametrize(
    ("what", "answer"), [("threads 1000", "sum 499500"), ("processes 1000", "ended 1000"), ("files 10000", "good 10000")]
)
def test_many(rig: Rig, kinds: Path, what: str, answer: str) -> None:
    process = begin(rig, kinds, what, "--rlimit", "nofile=20000", "--rlimit", "nproc=10000")
    assert continued(rig, process) == [answer]


def test_a_storm_of_signals(rig: Rig, kinds: Path) -> None:
    """Frozen while signals rain on it: each of those that are queued comes once, and in order."""
    process = begin(rig, kinds, "storm")
    for number in range(3):
        rig.freeze("kinds", f"c{number}", "--leave-running")
        assert process.poll() is None
    assert continued(rig, process) == ["storm ok"]


@pytest.mark.parametrize(
    ("rig", "flags"), [("root", ()), ("root", ("--scratch-size", "4G")), ("user", ())], indirect=["rig"], ids=str
)
def test_a_large_sparse_file(rig: Rig, kinds: Path, flags: tuple[str, ...]) -> None:
    process = begin(rig, kinds, "sparse /root/sparse", *flags)
    answer = [f"sparse 3 {2 << 30} yes"]
    copied = rig.freeze("kinds", "copied", "--leave-running")
    assert used(copied) < 64 << 20, "its holes were filled"
    assert continued(rig, process) == answer
    assert used(rig.path("c")) < 64 << 20
    assert rig.restore(copied, stdin="go\n").stdout.splitlines() == answer


def used(path: Path) -> int:
    """The bytes of the disk that a directory takes."""
    return sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for place, _, names in os.walk(path) for name in names)


GO_ON = (
    "clock_nanosleep_until", "ppoll", "ppoll_timed", "select", "select_timed", "pselect_timed", "futex", "condition",
    "condition_timed", "mutex", "mutex_timed", "semaphore", "sigwait", "pause", "sigsuspend", "read_pipe", "read_eventfd",
    "read_signalfd", "read_timerfd", "recv", "accept", "flock", "fcntl_lock", "open_fifo", "waitpid",
)  # fmt: skip
"""As docs/checkpoint.md has it; and what ends with EINTR."""
END = (
    "nanosleep", "clock_nanosleep", "sleep", "usleep", "poll", "poll_timed", "epoll", "epoll_timed", "futex_timed",
    "semaphore_timed", "sigtimedwait", "sigwaitinfo", "read_inotify", "recv_timed",
)  # fmt: skip


def waits(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """How each wait of waits.c stands."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"go\n")
    found = {}
    while (line := process.stdout.readline().decode().split()) != ["end"]:
        found[line[0]] = line[1]
    return found


@pytest.mark.parametrize(
    ("rig", "flags"), [("root", ()), ("root", ("--userns", "off")), ("user", ())], indirect=["rig"], ids=str
)
def test_what_waits_goes_on_waiting(rig: Rig, flags: tuple[str, ...]) -> None:
    place = compiled(rig.make("waits"), "waits.c")
    process = rig.run.foreground("exec /waits/waits", "--name", "w", "--bind", f"{place}:/waits:ro", *flags)
    expect(process, "ready")
    assert waits(process) == dict.fromkeys((*GO_ON, *END), "waits")
    fresh = rig.freeze("w", "fresh", "--leave-running")
    after = waits(process)
    assert {name: after[name] for name in GO_ON} == dict.fromkeys(GO_ON, "waits")
    assert {after[name] for name in END} <= {"EINTR", "waits"}
    assert rig.run("rm", "--force", "w").status == 0
    process.communicate()
    process = rig.run.popen("restore", fresh)
    after = waits(process)
    assert {name: after[name] for name in GO_ON} == dict.fromkeys(GO_ON, "waits")
    assert {after[name] for name in END} <= {"EINTR", "waits"}
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


PYTHON = """
import queue, select, socket, subprocess, sys, threading, time
def polled(kind):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen(); p = kind(); p.register(s); p.poll(1000 if kind is select.epoll else 1000000)
def received():
    a, b = socket.socketpair(); a.settimeout(1000); a.recv(1)
WAITS = {
    "sleep": lambda: time.sleep(1000), "event": lambda: threading.Event().wait(1000),
    "queue": lambda: queue.Queue().get(timeout=1000),
    "lock": lambda: [lock.acquire(), lock.acquire(timeout=1000)], "select": lambda: select.select([], [], [], 1000),
    "poll": lambda: polled(select.poll), "epoll": lambda: polled(select.epoll), "socket": received,
    "child": lambda: subprocess.run(["sleep", "1000"]), "shell": lambda: subprocess.run("sleep 1000; :", shell=True),
    "read": lambda: subprocess.run(["bash", "-c", "read -t 1000 < <(sleep 1000)"]),
}
lock = threading.Lock()
over = []
def wait(name):
    try:
        WAITS[name]()
        over.append(name)
    except BaseException as e:
        over.append(f"{name} {e!r}")
for name in WAITS:
    threading.Thread(target=wait, args=(name,), daemon=True).start()
time.sleep(1)
print("ready", over, flush=True)
for line in sys.stdin:
    time.sleep(1)
    print(over, flush=True)
"""


@pytest.mark.timeout(900)  # it may have to make the image
def test_what_waits_in_python_and_shells(rig: Rig, base: Path) -> None:
    rig.run.image = str(programs(base))
    script = rig.make("waits.py", PYTHON)
    process = rig.run.foreground("exec python3 /waits.py", "--name", "w", "--bind", f"{script}:/waits.py:ro")
    expect(process, "ready []")
    fresh = rig.freeze("w", "fresh", "--leave-running")
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    expect(process, "[]")
    assert rig.run("rm", "--force", "w").status == 0
    process.communicate()
    done = rig.restore(fresh, stdin="go\n")
    assert (done.status, done.stdout) == (0, "[]\n"), done
