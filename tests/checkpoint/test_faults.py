"""What goes wrong leaves a job that runs on, or a checkpoint as it was, and says why."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import eventually, expect, kill, refused

from images import Images
from imgrun.checkpoints import manifest
from imgrun.isolation import processes

from .conftest import Rig

TICK = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo $i; sleep 0.02; done"


def goes_on(rig: Rig, job: str) -> None:
    """See that the job runs and makes progress."""
    before = len(rig.output(job))
    eventually(lambda: len(rig.output(job)) > before + 2, f"{job} goes on")


@pytest.fixture
def job(rig: Rig) -> str:
    job = rig.run.background(TICK)
    rig.reaches(job, "2")
    return job


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_a_target_that_is_no_place_for_one(rig: Rig, job: str) -> None:
    full = rig.make("full")
    rig.make("full/precious", "mine")
    rig.make("file", "mine")
    refused(rig.run("checkpoint", "--to", full, job), 125, "holds something that is no checkpoint")
    refused(rig.run("checkpoint", "--to", rig.path("file"), job), 125, "file cannot hold a checkpoint")
    refused(rig.run("checkpoint", "--to", "/proc/c", job), 125, "could not be written to /proc/c")
    assert (full / "precious").read_text() == "mine"
    goes_on(rig, job)
    assert not list(rig.path("").glob("*.new"))


def test_what_is_replaced_is_a_checkpoint_and_nothing_else(rig: Rig, job: str) -> None:
    site = rig.make("site")
    rig.make("site/manifest.json", '{"name": "a web application", "format": 2}')
    words = ("checkpoint", "--leave-running", "--to", site, job)
    refused(rig.run(*words), 125, "holds something that is no checkpoint")
    older = rig.freeze(job, "c", "--leave-running")
    precious = rig.make("c/precious", "mine")
    refused(rig.run("checkpoint", "--leave-running", "--to", older, job), 125, "holds something that is no checkpoint")
    assert precious.read_text() == "mine"
    precious.unlink()
    for change in ({"format": 1}, {"format": 99}):  # of an older imgrun, and a newer one
        remade(older, lambda m, change=change: m.update(change))  # type: ignore[misc]
        rig.freeze(job, "c", "--leave-running")
    flip(older / "manifest.json")
    rig.freeze(job, "c", "--leave-running")
    assert rig.run("check", older).status == 0


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_full_and_a_read_only_disk(rig: Rig, job: str) -> None:
    place = rig.make("disk")
    for options, words in (("size=100k", "no space for the checkpoint"), ("ro", "could not be written")):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        # The supervisor's mount namespace was made before; a second job sees the disk.
        other = rig.run.background(TICK)
        try:
            rig.reaches(other, "2")
            done = rig.run("checkpoint", "--to", place / "c", other)
            assert done.status == 125, done
            assert words in done.stderr or "No space left" in done.stderr, done
            goes_on(rig, other)
            assert [p.name for p in place.iterdir() if not p.name.endswith(".log")] == []
        finally:
            rig.run("rm", "--force", other)
            subprocess.run(["umount", place], check=True)


def test_two_at_once(rig: Rig) -> None:
    job = rig.run.background("echo ready; sleep 1000")
    rig.reaches(job, "ready")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    first = rig.run.popen("checkpoint", "--leave-running", "--to", rig.path("c1"), job)
    freezer = eventually(lambda: children(supervisor, "freezing"))[0]
    assert kill(freezer, signal.SIGSTOP)
    refused(rig.run("checkpoint", "--leave-running", "--to", rig.path("c2"), job), 125, "is being checkpointed already")
    assert kill(freezer, signal.SIGCONT)
    assert first.wait(60) == 0


def test_of_a_job_that_ends_meanwhile(rig: Rig) -> None:
    for delay in (0.1, 0.12, 0.14, 0.16, 0.18):
        job = rig.run.background(f"sleep {delay}; exit 3")
        done = rig.run("checkpoint", "--to", rig.path("c"), job)
        if done.status:
            refused(done, 125)
            assert rig.run("wait", job).status == 3
        else:
            assert rig.run("restore", rig.path("c")).status == 3


@pytest.mark.parametrize("whom", ["criu", "freezer"])
def test_killed_half_way(rig: Rig, whom: str) -> None:
    """No checkpoint is left, an older one stays, and the job runs on or is reported to have ended."""
    fill = "dd if=/dev/urandom of=/dev/shm/x bs=1M count=300 2>/dev/null; echo ready"
    job = rig.run.background(f"{fill}; while :; do echo t; sleep 0.02; done")
    rig.reaches(job, "ready")
    older = rig.freeze(job, "c", "--leave-running")
    before = (older / "manifest.json").read_bytes()
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    asking = rig.run.popen("checkpoint", "--leave-running", "--to", older, job)
    building = Path(f"{older}.{job}.new")
    eventually(lambda: building.exists() and any((building / "processes").glob("memory-*")))
    freezer = children(supervisor, "freezing")[0]
    assert kill(freezer, signal.SIGSTOP)
    assert not (building / "manifest.json").exists(), "it was ready too soon"
    if whom == "freezer":
        assert kill(freezer)
    else:
        (criu,) = children(supervisor, "criu")
        assert kill(criu)
        assert kill(freezer, signal.SIGCONT)
    asking.communicate(timeout=60)
    assert asking.returncode == 125
    assert (older / "manifest.json").read_bytes() == before
    goes_on(rig, job)
    # And it can still be frozen.
    rig.freeze(job, "later")


@pytest.mark.parametrize("whom", ["freezer", "supervisor"])
def test_killed_when_the_job_is_in_the_checkpoint_alone(rig: Rig, whom: str) -> None:
    """What is still done then takes longest with many files; and the checkpoint is good without it."""
    job = rig.run.background(f"mkdir /tmp/d; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); : >/tmp/d/$i; done; {TICK}")
    rig.reaches(job, "5")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    asking = rig.run.popen("checkpoint", "--to", rig.path("c"), job)
    eventually(lambda: manifest.exists(str(rig.path("c"))), "the checkpoint has its name")
    assert kill(supervisor if whom == "supervisor" else children(supervisor, "freezing")[0], signal.SIGKILL)
    errors = asking.communicate(timeout=60)[1].decode()
    record = json.loads((rig.path("c") / "manifest.json").read_text())
    assert "tree" not in record, "it was ready too soon"
    if whom == "freezer":
        assert asking.returncode == 0, errors
        assert "the process that made the checkpoint was killed; it is good, but may lack" in errors
        assert json.loads(rig.run("inspect", job).stdout)["result"]["reason"] == "checkpointed"
    else:
        eventually(lambda: "lost" in rig.run("ps", "--all").stdout)
        rig.run("gc")
    assert rig.run("check", rig.path("c")).status == 0
    restored = rig.run("restore", "--detach", rig.path("c"))
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())


@contextlib.contextmanager
def not_ending(rig: Rig, job: str) -> Iterator[None]:
    """Meanwhile the job's PID 1, once it is killed, cannot end: it waits for a process whose parent, outside, stands still."""
    session = rig.run.popen("exec", job, "sleep", "1000")
    parent = eventually(lambda: parent_of_sleep(session.pid), "the session has begun")
    kill(parent, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(parent, signal.SIGCONT)
        session.kill()
        session.communicate(timeout=60)


def parent_of_sleep(pid: int) -> int:
    for child in kids(pid):
        if Path(f"/proc/{child}/comm").read_text() == "sleep\n":
            return pid
        if found := parent_of_sleep(child):
            return found
    return 0


@pytest.mark.parametrize("whom", ["freezer", "supervisor"])
def test_killed_before_it_has_its_name(rig: Rig, whom: str) -> None:
    """The job is killed; what it wrote is still in its scratch, and another job's checkpoint in the place of its own."""
    other = rig.run.background(TICK)
    rig.reaches(other, "2")
    target = rig.freeze(other, "c")
    job = rig.run.background(f"echo kept >/tmp/mine; {TICK.replace('echo $i', 'cat /tmp/mine; echo $i')}")
    rig.reaches(job, "2")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    with not_ending(rig, job):
        asking = rig.run.popen("checkpoint", "--to", target, job)
        building = f"{target}.{job}.new"
        eventually(lambda: manifest.exists(building), "the job is in the checkpoint alone")
        victim = supervisor if whom == "supervisor" else children(supervisor, "freezing")[0]
        assert kill(victim)
        assert manifest.load(str(target)).manifest["job"] == other
    errors = asking.communicate(timeout=60)[1].decode()
    if whom == "freezer":
        assert asking.returncode == 0, errors
        assert "the process that made the checkpoint was killed; it is good" in errors
    else:
        eventually(lambda: "lost" in rig.run("ps", "--all").stdout)
        assert f"imgrun restore {target}" in json.loads(rig.run("inspect", job).stdout)["result"]["hint"]
    assert [path.name for path in target.parent.glob("c*")] == ["c"]
    assert manifest.load(str(target)).manifest["job"] == job
    assert rig.run("check", target).status == 0
    restored = rig.run("restore", "--detach", target)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())
    assert rig.output(restored.stdout.strip())[-2:].count("kept") == 1


TAKEN = {
    "a mount": (lambda c: subprocess.run(["mount", "-t", "tmpfs", "tmpfs", c], check=True), "cannot be replaced"),
    "a file of the user's": (lambda c: (c / "precious").write_text("mine"), "holds something that is no checkpoint"),
}


@pytest.mark.parametrize("how", TAKEN)
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_name_that_something_else_has_got_meanwhile(rig: Rig, how: str) -> None:
    """The job is in what was made alone by then: it is kept, and said."""
    take, words = TAKEN[how]
    job = rig.run.background(TICK)
    rig.reaches(job, "2")
    target = rig.freeze(job, "c", "--leave-running")
    building = Path(f"{target}.{job}.new")
    with not_ending(rig, job):
        asking = rig.run.popen("checkpoint", "--to", target, job)
        eventually(lambda: manifest.exists(str(building)), "the job is in the checkpoint alone")
        take(target)
    said = asking.communicate(timeout=60)[1].decode()
    if how == "a mount":
        subprocess.run(["umount", target], check=True)
    assert asking.returncode == 125
    assert words in said
    assert f"the checkpoint is complete, and is {building}" in said
    rig.run("wait", job)
    result = json.loads(rig.run("inspect", job).stdout)["result"]
    assert (result["reason"], result["message"]) == ("lost", said.splitlines()[0].removeprefix("imgrun: "))
    restored = rig.run("restore", "--detach", building)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())


def test_a_name_that_cannot_be_had_by_the_next_command_either(rig: Rig) -> None:
    """The supervisor was killed: what was made is kept, and the record says where."""
    job = rig.run.background(TICK)
    rig.reaches(job, "2")
    target = rig.freeze(job, "c", "--leave-running")
    building = Path(f"{target}.{job}.new")
    with not_ending(rig, job):
        asking = rig.run.popen("checkpoint", "--to", target, job)
        eventually(lambda: manifest.exists(str(building)), "the job is in the checkpoint alone")
        (target / "precious").write_text("mine")
        assert kill(json.loads(rig.run("inspect", job).stdout)["supervisor"])
    assert asking.wait(60) == 125
    eventually(lambda: "lost" in rig.run("ps", "--all").stdout)
    hint = eventually(lambda: json.loads(rig.run("inspect", job).stdout)["result"])["hint"]
    assert "holds something that is no checkpoint" in hint
    assert f"the checkpoint is complete, and is {building}" in hint
    assert not (rig.run.state / "jobs" / job / "scratch").exists()
    restored = rig.run("restore", "--detach", building)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_manifest_that_cannot_get_its_name_when_the_job_has_ended(rig: Rig) -> None:
    """Nothing can be renamed in what was made: it stays, and it is said where."""
    job = rig.run.background(TICK)
    rig.reaches(job, "2")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    asking = rig.run.popen("checkpoint", "--to", rig.path("c"), job)
    freezer = eventually(lambda: children(supervisor, "freezing"))[0]
    building = rig.path(f"c.{job}.new")
    eventually(lambda: (building / "work").exists())
    assert kill(freezer, signal.SIGSTOP)
    subprocess.run(["chattr", "+a", building], check=True)
    assert kill(freezer, signal.SIGCONT)
    try:
        said = asking.communicate(timeout=60)[1].decode()
        assert asking.returncode == 125
        assert f"the job has ended, and what was saved is {building}" in said
        assert "bug" not in said
        assert (building / "manifest.json.new").exists()
    finally:
        subprocess.run(["chattr", "-a", building], check=True)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_where_the_supervisor_can_open_no_more(rig: Rig, begun: bool) -> None:
    """Nor read a module: the job runs on, the cause is said, and it can be saved when there is room again."""
    job = rig.run.background(TICK, "--checkpoint-dir", rig.path("d"), "--checkpoint-signal", "USR1")
    rig.reaches(job, "2")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    opened = {int(name) for name in os.listdir(f"/proc/{supervisor}/fd")}
    free = [number for number in range(1024) if number not in opened]
    before = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    # No less than it polls.
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (free[4] if begun else 12, before[1]))
    kill(supervisor, signal.SIGUSR1)
    log = rig.run.state / "jobs" / job / "stderr"
    eventually(lambda: "Too many open files" in log.read_text(), "it is said")
    assert log.read_text().startswith("imgrun: warning: " + ("checkpoint failed" if begun else "no checkpoint")), (
        log.read_text()
    )
    goes_on(rig, job)
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, before)
    rig.freeze(job)


def test_killed_at_the_very_end_of_an_archive(rig: Rig) -> None:
    """It is complete before the job is killed."""
    job = rig.run.background(TICK)
    rig.reaches(job, "2")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    target = rig.path("c.tar")
    with not_ending(rig, job):
        asking = rig.run.popen("checkpoint", "--archive", target, job)
        eventually(target.exists, "the archive has its name")
        eventually(lambda: is_dying(rig, job), "the job is being ended")
        assert kill(children(supervisor, "freezing")[0])
    errors = asking.communicate(timeout=60)[1].decode()
    assert asking.returncode == 0, errors
    assert "the process that made the checkpoint was killed; it is good" in errors
    assert rig.run("wait", job).status == 85
    assert json.loads(rig.run("inspect", job).stdout)["result"]["reason"] == "checkpointed"
    assert not list((rig.run.state / "jobs" / job).glob("*.new"))
    restored = rig.run("restore", "--detach", target)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())


def is_dying(rig: Rig, job: str) -> bool:
    return processes.is_dying(json.loads((rig.run.state / "jobs" / job / "state.json").read_text())["init"])


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_full_disk_below_the_state_directory(rig: Rig) -> None:
    """A checkpoint that nobody waits for is made all the same where its own disk has room, and ends no job if it cannot be."""
    state = rig.make("state")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M,mode=700", "tmpfs", state], check=True)
    try:
        env = {"IMGRUN_STATE_DIR": str(state)}
        script = "dd if=/dev/zero of=/tmp/full bs=4k 2>/dev/null; echo full; read go; rm /tmp/full; echo $go"
        flags = ("--checkpoint-dir", rig.path("c"), "--checkpoint-signal", "USR1")
        process = rig.run.foreground(script, *flags, env=env)
        expect(process, "full")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 85, process.communicate()
        process = rig.run.foreground(script, *flags, env=env)
        assert process.communicate(b"on\n", timeout=60)[0] == b"on\n"
        assert process.returncode == 0
    finally:
        subprocess.run(["umount", state], check=True)


def children(supervisor: int, what: str) -> list[int]:
    """The process that freezes, a child of the supervisor that has imgrun's name; and CRIU, two below."""
    found = []
    own = [pid for pid in kids(supervisor) if b"python" in command_line(pid)]
    if what == "freezing":
        return own
    for pid in own:
        for host in kids(pid):
            found += kids(host)
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kids(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_the_supervisor_killed_half_way(rig: Rig) -> None:
    job = rig.run.background("dd if=/dev/urandom of=/dev/shm/x bs=1M count=300 2>/dev/null; echo ready; sleep 1000")
    rig.reaches(job, "ready")
    supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
    asking = rig.run.popen("checkpoint", "--to", rig.path("c"), job)
    building = rig.path(f"c.{job}.new")
    eventually(lambda: building.exists() and any((building / "processes").glob("*")))
    assert kill(children(supervisor, "freezing")[0], signal.SIGSTOP)
    assert not manifest.exists(str(building)), "it was ready too soon"
    assert kill(supervisor, signal.SIGKILL)
    assert asking.wait(30) == 125
    assert not manifest.exists(str(rig.path("c")))
    assert rig.run("wait", job).status == 125
    assert "lost" in rig.run("ps", "--all").stdout


# -- continuing --------------------------------------------------------------------------------------------------------


def remade(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change the manifest as somebody would who knows how it is made."""
    record = json.loads((path / "manifest.json").read_text())
    change(record)
    record["checksum"] = manifest.checksum(record)
    (path / "manifest.json").write_text(json.dumps(record))


def biggest(path: Path) -> Path:
    return max((path / "processes").iterdir(), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path, target: str) -> None:
    path.rename(path.with_name(f"{path.name}.away")) if path.exists() else None
    path.symlink_to(target)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip(biggest(c)), "was changed"),
    "truncated": (lambda c: os.truncate(biggest(c), 100), "has 100 bytes"),
    "missing": (lambda c: biggest(c).unlink(), "is missing"),
    "added": (lambda c: (c / "processes/more.img").write_text("x"), "does not belong there"),
    "linked": (lambda c: link(biggest(c), "/etc/passwd"), ""),
    "fifo": (lambda c: (biggest(c).unlink(), os.mkfifo(c / "processes/inventory.img.x")), ""),
    "upper linked": (lambda c: link(c / "files/upper", "/etc"), "files/upper is missing, or is no directory"),
    "tmp linked": (lambda c: link(c / "files/tmp", "/tmp"), "files/tmp is missing, or is no directory"),
    "files linked": (lambda c: link(c / "files", "/"), "files is missing, or is no directory"),
    "processes linked": (lambda c: link(c / "processes", "/etc"), ""),
    "manifest flipped": (lambda c: flip(c / "manifest.json"), ""),
    "manifest empty": (lambda c: (c / "manifest.json").write_text(""), "cannot be read"),
    "manifest a list": (lambda c: (c / "manifest.json").write_text("[]"), "has no format"),
    "manifest edited": (
        lambda c: (c / "manifest.json").write_text((c / "manifest.json").read_text().replace('"sh"', '"id"')),
        "was changed after it was written",
    ),
    "manifest newer": (lambda c: remade(c, lambda m: m.update(format=99)), "has format 99"),
    "manifest linked": (lambda c: link(c / "manifest.json", "manifest.json.away"), "cannot be read"),
    "manifest missing": (lambda c: (c / "manifest.json").unlink(), "holds no complete checkpoint"),
    "layers that climb": (lambda c: remade(c, lambda m: m.update(layers=["../../escape"])), ""),
}


def test_a_damaged_checkpoint_is_refused(rig: Rig, job: str) -> None:
    good = rig.freeze(job)
    for name, (damage, words) in DAMAGE.items():
        bad = rig.path("bad")
        subprocess.run(["cp", "-a", good, bad], check=True)
        damage(bad)
        done = rig.restore(bad)
        assert done.status == 125, name
        refused(done, 125)
        assert words in done.stderr, (name, done)
        if "manifest" not in name:
            assert rig.run("check", f"{bad}/.").status in (1, 125), name
        shutil.rmtree(bad)
    assert rig.run("check", good).status == 0
    assert rig.run("ps").stdout.count("\n") == 1, "something of it runs"
    (again,) = rig.restore(good, "--detach").stdout.split()
    goes_on(rig, again)


NONSENSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no machine": lambda m: m["host"].pop("machine"),
    "no processor": lambda m: m["host"].pop("cpu"),
    "no vendor": lambda m: m["host"]["cpu"].pop("vendor"),
    "a kernel that is a number": lambda m: m["host"].update(kernel=6),
    "a CRIU that is a number": lambda m: m["host"].update(criu=4),
    "not whose": lambda m: m.pop("rootless"),
    "no ids": lambda m: m["ids"].pop("uid"),
    "short ids": lambda m: m["ids"].update(uid=[[0]]),
    "ids that are words": lambda m: m["ids"].update(uid=[["a", "b", "c"]]),
    "no time": lambda m: m["usage"].pop("wall_seconds"),
    "a time that is a word": lambda m: m["usage"].update(wall_seconds="long"),
    "no input": lambda m: m["streams"].pop("0"),
    "no error output": lambda m: m["streams"].update({"2": None}),
    "files that are numbers": lambda m: m["files"].update({"shim": 7}),
    "a size that is a word": lambda m: m["files"]["shim"].update(size="big"),
    "a tree that is a list": lambda m: m.update(tree=[]),
    "a mount for writing that is none": lambda m: m["image"].update(mount={}),
}


def test_a_manifest_that_makes_no_sense(rig: Rig, job: str) -> None:
    good = rig.freeze(job)
    before = (good / "manifest.json").read_text()
    for name, change in NONSENSE.items():
        remade(good, change)
        done = rig.restore(good, "--detach")
        refused(done, 125)
        words = ("lacks what it should have", "makes no sense", "it was made by uid b", "shim has")
        assert any(said in done.stderr for said in words), (name, done)
        (good / "manifest.json").write_text(before)
    for name in ("shim", "stdin"):  # which are read as a whole
        length = (good / name).stat().st_size if (good / name).exists() else None
        with (good / name).open("ab") as f:
            f.truncate(1 << 30)
        remade(good, lambda m, name=name: m["files"].update({name: {"size": 1 << 30, "xxh128": ""}}))  # type: ignore[misc]
        refused(rig.restore(good, "--detach"), 125, f"{name} is larger than any that belongs there")
        (good / name).unlink() if length is None else os.truncate(good / name, length)
        (good / "manifest.json").write_text(before)
    assert rig.run("check", good).status == 0


def test_what_it_gets_of_the_host_is_said(rig: Rig) -> None:
    bound = rig.make("bound")
    flags = ("--userns", "off") if rig.root else ()
    job = rig.run.background(TICK, "--bind", f"{bound}:/bound", "--bind", "/etc:/host:ro", "--network", "none", *flags)
    rig.reaches(job, "2")
    found = rig.run("check", rig.freeze(job))
    assert found.status == 0
    for words in (
        "its root is one of the host" if rig.root else "its root is one of a user namespace", "--network none",
        f"{bound}, for /bound, is there, and can be written to", "/etc, for /host, is there, and read-only",
    ):  # fmt: skip
        assert words in found.stdout, found


PLACES: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda m: m.update(layers=["../../../../victim"]),
    "one more": lambda m: m["layers"].append("../../../../victim"),
    "another": lambda m: m.update(layers=["upper", "tmp"]),
    "memory": lambda m: m.update(memory=["/dev/shm", "/root"]),
}

NO_FILES = ("layers", "another")
"""What an archive could not hold with these layers."""


@pytest.mark.parametrize("how", ["directory", "archive"])
def test_no_directory_but_the_jobs_own_is_filled(rig: Rig, job: str, how: str) -> None:
    """What is to be replaced is removed before: here a directory that is there, by the new job's paths and the old one's."""
    victim = rig.make("victim")
    rig.make("victim/precious", "mine")
    place = rig.make("one"), rig.make("one/two")
    good = place[1] / "c"
    rig.freeze(job, "one/two/c")
    before = (good / "manifest.json").read_text()
    for name, change in PLACES.items():

        def changed(m: dict[str, Any], change: Callable[[dict[str, Any]], object] = change) -> None:
            change(m)
            m["files"].pop("files.list")

        remade(good, changed)
        bad = good
        if how == "archive":
            bad = rig.path("c.tar")
            names = [
                "manifest.json",
                "files.list",
                "shim",
                "processes",
                *(["--no-recursion"] if name in NO_FILES else []),
                "files",
            ]
            subprocess.run(["tar", "--format=posix", "-C", good, "-cf", bad, *names], check=True)
            rig.give(bad)
        refused(rig.restore(bad, "--detach"), 125, "has files where no job of its kind has any")
        assert (victim / "precious").read_text() == "mine", name
        (good / "manifest.json").write_text(before)


def test_somebody_elses_checkpoint(rig: Rig, job: str) -> None:
    good = rig.freeze(job)
    owner = good.stat()
    os.chown(good / "processes", 12345, 12345)
    refused(rig.restore(good), 125)
    os.chown(good / "processes", owner.st_uid, owner.st_gid)
    good.chmod(0o777)
    refused(rig.restore(good), 125, "can be written to by others")
    assert rig.restore(good, "--detach", "--allow", "owner").status == 0


def test_twice_at_the_same_time(rig: Rig, job: str) -> None:
    good = rig.freeze(job)
    (first,) = rig.restore(good, "--detach").stdout.split()
    refused(rig.restore(good), 125, "is running")
    done = rig.restore(good, "--detach", "--allow", "second-copy")
    assert done.status == 0, done
    for running in (first, done.stdout.strip()):
        goes_on(rig, running)
        assert rig.run("rm", "--force", running).status == 0
    assert rig.run("check", good).status == 0


def test_a_failure_of_criu_leaves_nothing(rig: Rig, job: str) -> None:
    good = rig.freeze(job)
    # Consistent, but no images of CRIU's.
    for name in ("pstree.img", "inventory.img"):
        (good / "processes" / name).write_bytes(b"nothing")
    remade(good, lambda m: m.update(files=manifest.describe_files(str(good))))
    before = sorted((p.name, p.lstat().st_mtime_ns) for p in good.rglob("*"))
    done = rig.restore(good, "--detach")
    refused(done, 125, "CRIU could not bring the job's processes back")
    log = done.stderr.split("its log is ")[1].strip()
    assert Path(log).stat().st_size > 0
    assert sorted((p.name, p.lstat().st_mtime_ns) for p in good.rglob("*")) == before
    assert rig.run("ps").stdout.count("\n") == 1


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_failure_of_criu_leaves_no_captured_image(rig: Rig, images: Images) -> None:
    """Else the next attempt would take it for one that the job has."""
    image = images.copy(images.filesystem("ext4"), rig.path("own.img"))
    rig.run.image = str(image)
    job = rig.run.background(TICK, "--writable")
    rig.reaches(job, "2")
    good = rig.freeze(job, "c", "--capture-image")
    image.unlink()
    broken = rig.path("broken")
    subprocess.run(["cp", "-a", good, broken], check=True)
    (broken / "processes/inventory.img").write_bytes(b"nothing")
    remade(broken, lambda m: m.update(files=manifest.describe_files(str(broken))))
    put = rig.path("put.img")
    refused(rig.restore(broken, "--image", put), 125, "CRIU could not bring the job's processes back")
    assert not put.exists()
    (again,) = rig.restore(good, "--detach", "--image", put).stdout.split()
    goes_on(rig, again)
    assert rig.run("rm", "--force", again).status == 0
    assert put.exists()


# -- what has changed in between ---------------------------------------------------------------------------------------


def test_what_the_preflight_finds(rig: Rig) -> None:
    data = rig.make("data")
    own = rig.path("own.img")
    shutil.copy(rig.image, own)
    rig.give(own)
    rig.run.image = str(own)
    job = rig.run.background(TICK, "--bind", f"{data}:/data", "--memory", "50M", "--limits", "best-effort")
    rig.reaches(job, "2")
    good = rig.freeze(job)
    found = rig.run("check", good)
    assert found.status == 0, found
    assert "refused" not in found.stdout
    data.rename(rig.path("moved"))
    refused(rig.restore(good), 125, f"{data}, for /data, is not there")
    (first,) = rig.restore(good, "--detach", "--bind", f"{rig.path('moved')}:/data", "--memory", "64M").stdout.split()
    assert json.loads(rig.run("inspect", first).stdout)["spec"]["memory"] == 64 << 20
    assert rig.run("rm", "--force", first).status == 0
    rig.path("moved").rename(data)
    refused(rig.restore(good, "--bind", "/tmp:/nowhere"), 125, "no mount at /nowhere")
    own.rename(rig.path("elsewhere.img"))
    refused(rig.restore(good), 125, "is not there")
    (first,) = rig.restore(good, "--detach", "--image", rig.path("elsewhere.img")).stdout.split()
    assert rig.run("rm", "--force", first).status == 0
    shutil.copy(rig.path("elsewhere.img"), own)
    flip(own)
    assert rig.run("check", good).status in (0, 1)  # a byte in the middle may lie between the samples
    with own.open("ab") as f:
        f.write(bytes(4096))
    done = rig.run("check", good)
    assert done.status == 1
    assert "image-changed" in done.stdout
    refused(rig.restore(good), 125, "is not the image that it was")
    remade(good, lambda m: m["host"]["cpu"]["features"].append("made-up"))  # type: ignore[index]
    refused(rig.restore(good), 125, "lacks made-up")
    remade(good, lambda m: m["host"].update(criu="99.1"))  # type: ignore[attr-defined]
    lines = rig.run("check", good, "--json").stdout
    assert {f["name"] for f in json.loads(lines) if f["level"] == "refused"} == {"cpu", "criu", "image-changed"}


def test_of_a_job_that_is_just_starting(rig: Rig) -> None:
    """At whatever moment it comes: refused in words, and the job goes on; or a checkpoint that can be continued."""
    for number, delay in enumerate((0.0, 0.05, 0.1, 0.2)):
        name = f"young{number}"
        starting = rig.run.popen("start", "--detach", "--name", name, rig.image, "--", "sh", "-c", TICK)
        eventually(lambda name=name: name in rig.run("ps", "--all").stdout)
        time.sleep(delay)
        done = rig.run("checkpoint", "--to", rig.path(name), name)
        assert starting.wait(60) == 0, starting.communicate()
        if done.status:
            refused(done, 125)
            assert not rig.path(name).exists()
            rig.reaches(name, "2")
            rig.freeze(name, name)
        (again,) = rig.restore(rig.path(name), "--detach").stdout.split()
        goes_on(rig, again)
        assert rig.run("rm", "--force", again).status == 0
