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
from leaks import read

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
def test_from_an_archive(rig: Rig, touch: Path) -> None:
    """What was unpacked goes while the memory in it is still being fetched."""
    process = rig.run.foreground(f"exec /touch/touch {OWN} {SHARED}", "--name", "touch", "--bind", f"{touch}:/touch:ro")
    expect(process, "ready")
    archive = rig.path("c.tar")
    assert rig.run("checkpoint", "--archive", archive, "touch") == Done(0, "", "")
    assert process.wait(60) == 85
    at_once = rig.restore(archive, stdin=COMMANDS)
    assert (at_once.status, at_once.stderr, "bad" in at_once.stdout) == (0, "", False), at_once
    process, (_, fetcher) = eventually(lambda: caught(rig, archive))
    eventually(lambda: not os.listdir(rig.run.state / "unpacked"))
    assert kill(fetcher, signal.SIGCONT)
    stdout, stderr = process.communicate(COMMANDS.encode(), timeout=60)
    assert Done(process.returncode, stdout.decode(), stderr.decode()) == at_once


@ROOT
def test_a_job_that_ends_or_loses_its_memory(rig: Rig, touch: Path) -> None:
    target = frozen(rig, touch)
    job = rig.restore(target, "--lazy", "--detach").stdout.strip()
    assert rig.run("rm", "--force", job).status == 0
    for whose in (0, 1):
        process, fetchers = eventually(lambda: caught(rig, target))
        assert kill(fetchers[whose])
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 125, errors
        assert b"served the job from outside ended" in errors


@ROOT
@USERNS
def test_what_fetches_is_killed_while_the_job_is_brought_back(rig: Rig, touch: Path, userns: tuple[str, ...]) -> None:
    """What is there already of the job may wait for memory, and holds the connection by which CRIU would say so."""
    target = frozen(rig, touch, *userns)
    process = rig.run.popen("restore", "--lazy", target)

    def fetcher() -> int:
        found = [pid for child in kids(process.pid) for pid in kids(child)]
        return next((pid for pid in found if "lazy-pages" in read(Path(f"/proc/{pid}/cmdline")) and connected(pid)), 0)

    assert kill(eventually(fetcher, "CRIU fetches"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 125, errors
    at_once = b"CRIU could not bring the job's processes back: it was killed" in errors
    assert at_once or b"served the job from outside ended" in errors, errors


def connected(pid: int) -> bool:
    """Whether it has been asked for memory: it listens no more (proc_pid_net(5), unix)."""
    rows = [line.split() for line in read(Path(f"/proc/{pid}/net/unix")).splitlines() if "lazy-pages" in line]
    return any(row[3] == "00000000" for row in rows)


def caught(rig: Rig, target: Path) -> tuple[subprocess.Popen[bytes], tuple[int, int]] | None:
    """A lazily restored job that runs, and what fetches its memory, which is stopped: a child of the supervisor's, and CRIU
    below that. None when all was there before we looked."""
    process = rig.run.popen("restore", "--lazy", target)
    eventually(lambda: any('"running"' in read(path) for path in (rig.run.state / "jobs").glob("*/state.json")))
    for child in kids(process.pid):
        for fetcher in kids(child):
            if "lazy-pages" in read(Path(f"/proc/{fetcher}/cmdline")) and stopped(fetcher):
                return process, (child, fetcher)
    process.communicate(timeout=60)
    assert process.returncode == 0
    return None


def stopped(pid: int) -> bool:
    """Stop a process; whether it was not ending already."""

    def state() -> str:
        return read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1]

    kill(pid, signal.SIGSTOP)
    eventually(lambda: state() in "TZX")
    return state() == "T"


def kids(pid: int) -> list[int]:
    return [int(word) for word in read(Path(f"/proc/{pid}/task/{pid}/children")).split()]


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
