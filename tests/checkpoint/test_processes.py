"""Processes with everything that processes have: it is all there again when they are continued (kinds.c)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from command import expect

from images import tool

from .conftest import Rig

SOURCE = Path(__file__).parent / "kinds.c"


@pytest.fixture(scope="session")
def kinds(base: Path) -> Path:
    """The directory of the program, for --bind."""
    directory = base / "kinds"
    directory.mkdir()
    words = [tool("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-result", "-static", "-o", directory / "kinds"]
    subprocess.run([*words, SOURCE, "-lpthread", "-lrt"], check=True)
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
