"""Lazy restores: the job runs before its memory is read, and sees nothing of it that is not as it was (touch.c)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import imgrun_criu
import pytest
from command import Done, eventually, expect, kill, refused

from images import tool

from .conftest import AsRoot, Rig

SOURCE = Path(__file__).parent / "touch.c"
ROOT = pytest.mark.parametrize("rig", ["root"], indirect=True)
USERNS = pytest.mark.parametrize("userns", [(), ("--userns", "off")], ids=["user namespace", "none"])
MIB = 1 << 20
OWN, SHARED = 48, 24
"""MiB of each process, and of both."""
MINE_1, SHARED_1, ITS_1 = 1, 3, 2
COMMANDS = "mine 0\nopen\nfork\nits 40\nshared 20\nmine 45\nmove\n"


@pytest.fixture(scope="session")
def touch(base: Path) -> Path:
    """The directory of the program, for --bind."""
    directory = base / "touch"
    directory.mkdir()
    subprocess.run([tool("gcc"), "-O1", "-static", "-o", directory / "touch", SOURCE], check=True)
    return directory


def frozen(rig: Rig, touch: Path, *flags: str) -> Path:
    words = f"exec /touch/touch {OWN} {SHARED}"
    process = rig.run.foreground(words, "--name", "touch", "--bind", f"{touch}:/touch:ro", *flags)
    expect(process, "ready")
    target = rig.freeze("touch")
    assert process.wait(60) == 85
    return target


def answers(done: Done) -> dict[str, str]:
    return {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in done.stdout.splitlines()}


@ROOT
@USERNS
def test_all_of_its_memory(rig: Rig, touch: Path, userns: tuple[str, ...]) -> None:
    """Of two processes, also where it is first seen by a child, or has been moved before it was there."""
    target = frozen(rig, touch, *userns)
    at_once = rig.restore(target, stdin=COMMANDS)
    assert (at_once.status, at_once.stderr) == (0, "")
    assert {answer for answer in answers(at_once).values() if not answer.isdigit()} == {"good"}
    # It has no more descriptors than otherwise, too.
    assert rig.restore(target, "--lazy", stdin=COMMANDS) == at_once
    assert rig.restore(target, "--lazy", stdin="move\nfork\n").stdout.split() == [
        "move",
        "good",
        "fork",
        "good",
        "all",
        "good",
    ]
    # A checkpoint of the lazy one is as good.
    process = rig.run.popen("restore", "--lazy", target)
    eventually(lambda: "running" in rig.run("ps").stdout)
    again = rig.freeze("touch", "again")
    assert process.wait(60) == 85
    assert rig.restore(again, "--lazy", stdin=COMMANDS) == at_once


def word(whose: int, number: int) -> bytes:
    """As in touch.c."""
    x = (number * 0x9E3779B97F4A7C15 + whose) % 2**64
    return ((x ^ x >> 29) * 0xBF58476D1CE4E5B9 % 2**64).to_bytes(8, "little")


def place_of(target: Path, whose: int, mebibyte: int) -> tuple[Path, int]:
    """The file and where in it this MiB of memory begins."""
    wanted = b"".join(word(whose, mebibyte * MIB // 8 + i) for i in range(4))
    found = [(path, path.read_bytes().find(wanted)) for path in (target / "processes").glob("pages-*.img")]
    return next((path, place) for path, place in found if place >= 0)


def flip(place: tuple[Path, int]) -> None:
    path, offset = place
    with path.open("r+b") as f:
        byte = os.pread(f.fileno(), 1, offset)[0]
        os.pwrite(f.fileno(), bytes([byte ^ 1]), offset)


WHERE: dict[str, Callable[[Path], tuple[Path, int]]] = {
    "the beginning of a file": lambda target: (place_of(target, MINE_1, 0)[0], 0),
    "memory of the first process": lambda target: place_of(target, MINE_1, 45),
    "memory of the second": lambda target: place_of(target, ITS_1, 40),
    "shared memory": lambda target: place_of(target, SHARED_1, 20),
}


@ROOT
@USERNS
@pytest.mark.parametrize("where", WHERE)
def test_a_changed_byte_is_never_seen(rig: Rig, touch: Path, userns: tuple[str, ...], where: str) -> None:
    target = frozen(rig, touch, *userns)
    good = rig.restore(target, "--lazy", stdin=COMMANDS)
    place = WHERE[where](target)
    flip(place)
    done = rig.restore(target, "--lazy", stdin=COMMANDS)
    refused(done, 125, f"{target} cannot be continued here: processes/{place[0].name} was changed")
    assert good.stdout.startswith(done.stdout), "what it did see was right"
    assert not {"its 40", "fork"} <= set(answers(done)), "it has seen what was changed"
    assert "all" not in answers(done)
    assert rig.run("ps").stdout.count("\n") == 1, "something of it runs"
    if "memory of" not in where:
        assert done.stdout == "", "CRIU reads this before the job runs"
    # The same in the background; its record says it.
    started = rig.restore(target, "--lazy", "--detach")
    if started.status == 0:
        job = started.stdout.strip()
        assert rig.run("wait", job).status == 125
        assert f"processes/{place[0].name} was changed" in rig.run("inspect", job).stdout
        assert rig.run("rm", job).status == 0
    else:
        refused(started, 125, f"processes/{place[0].name} was changed")
    flip(place)
    assert rig.restore(target, "--lazy", stdin=COMMANDS) == good


@ROOT
def test_a_job_that_ends_or_loses_its_memory(rig: Rig, touch: Path) -> None:
    target = frozen(rig, touch)
    job = rig.restore(target, "--lazy", "--detach").stdout.strip()
    assert rig.run("rm", "--force", job).status == 0
    # What fetches memory is a child of the supervisor beside PID 1, with CRIU below it; stopped, it cannot be done already.
    for victim in ("child", "CRIU"):
        process = rig.run.popen("restore", "--lazy", target)
        eventually(lambda: "running" in rig.run("ps").stdout)
        fetchers = [(pid, word) for pid in kids(process.pid) for word in kids(pid) if b"lazy-pages" in words(word)]
        if fetchers:
            assert kill(fetchers[0][victim == "CRIU"], signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 125, errors
            assert b"served the job from outside ended" in errors
        else:
            process.communicate(timeout=60)  # it was quicker than we are
            assert process.returncode == 0


def kids(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@ROOT
@USERNS
def test_a_criu_that_does_not_verify(rig: Rig, touch: Path, userns: tuple[str, ...]) -> None:
    """All is hashed before the job runs, lazily restored or not."""
    target = frozen(rig, touch, *userns)
    site = rig.make("site")
    site.chmod(0o755)
    shutil.copytree(imgrun_criu.HERE, site / "imgrun_criu")
    record = json.loads((site / "imgrun_criu/build.json").read_text())
    record["patches"] = [patch for patch in record["patches"] if "verify" not in patch]
    (site / "imgrun_criu/build.json").write_text(json.dumps(record))
    env = {"PYTHONPATH": str(site)}
    done = rig.restore(target, "--lazy", stdin=COMMANDS, env=env)
    assert (done.status, "bad" in done.stdout) == (0, False), done
    assert ("not lazily" in done.stderr) == (not userns), done
    flip(place_of(target, ITS_1, 40))
    done = rig.restore(target, "--lazy", stdin=COMMANDS, env=env)
    refused(done, 125, "was changed")
    assert done.stdout == ""


@ROOT
@USERNS
def test_without_the_device(rig: Rig, touch: Path, userns: tuple[str, ...]) -> None:
    """As before Linux 6.1: in a user namespace the memory is read first, and it is CRIU that sees what was changed."""
    target = frozen(rig, touch, *userns)
    assert isinstance(rig.run, AsRoot)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(rig.path("device")))  # what cannot be opened
    hide = f'mount --bind {rig.path("device")} /dev/userfaultfd && exec "$@"'
    rig.run.before = ("unshare", "--mount", "sh", "-c", hide, "sh")
    done = rig.restore(target, "--lazy", stdin=COMMANDS)
    assert (done.status, "bad" in done.stdout) == (0, False), done
    assert ("not lazily" in done.stderr) == (not userns), done
    place = place_of(target, ITS_1, 40)
    flip(place)
    done = rig.restore(target, "--lazy", stdin=COMMANDS)
    refused(done, 125, f"{target} cannot be continued here: processes/{place[0].name} was changed")
    assert "its 40" not in done.stdout
    if not userns:
        assert done.stdout == ""
    rig.run.before = ()


@pytest.mark.parametrize("rig", ["user"], indirect=True)
def test_an_ordinary_user(rig: Rig, touch: Path) -> None:
    """Nobody may be told of forks but who has rights over the host: the memory is read first."""
    target = frozen(rig, touch)
    done = rig.restore(target, "--lazy", stdin=COMMANDS)
    assert (done.status, "bad" in done.stdout) == (0, False), done
    assert "not lazily" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done
    flip(place_of(target, ITS_1, 40))
    done = rig.restore(target, "--lazy", stdin=COMMANDS)
    refused(done, 125, f"{target} cannot be continued here: ", "was changed")
    assert done.stdout == ""
