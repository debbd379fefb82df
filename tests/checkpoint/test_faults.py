"""What goes wrong leaves a job that runs on, or a checkpoint as it was, and says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import eventually, kill, refused

from imgrun.checkpoints import manifest

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
    # Enough memory that the first takes a moment.
    job = rig.run.background("dd if=/dev/urandom of=/dev/shm/x bs=1M count=200 2>/dev/null; echo ready; sleep 1000")
    rig.reaches(job, "ready")
    both = [rig.run.popen("checkpoint", "--leave-running", "--to", rig.path(f"c{n}"), job) for n in (1, 2)]
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 125], errors
    assert "is being checkpointed already" in "".join(errors)


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
    victim = next(iter(children(supervisor, "freezing" if whom == "freezer" else "criu")), 0)
    assert victim, "there is no such process"
    assert kill(victim)
    asking.communicate(timeout=60)
    assert asking.returncode in (0, 125)
    assert (older / "manifest.json").exists()
    if asking.returncode:
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


@pytest.mark.parametrize("whom", ["freezer", "supervisor"])
def test_killed_before_it_has_its_name(rig: Rig, whom: str) -> None:
    """The job has ended, and gives back much memory, which takes a while; what it wrote is still in its scratch."""
    memory = "(head -c 600000000 /dev/zero; echo full >/tmp/full; sleep 1000) | tail -c 600000000 >/dev/null"
    target = rig.path("c")

    def caught() -> str | None:
        job = rig.run.background(f"{memory} & {TICK.replace('echo $i', 'cat /tmp/full; echo $i')}")
        rig.reaches(job, "full")
        supervisor = json.loads(rig.run("inspect", job).stdout)["supervisor"]
        asking = rig.run.popen("checkpoint", "--to", target, job)
        building = f"{target}.{job}.new"
        freezer = eventually(lambda: children(supervisor, "freezing"))[0]
        while asking.poll() is None and not manifest.exists(building):
            pass
        stopped = kill(freezer, signal.SIGSTOP)
        in_time = manifest.exists(building)
        if stopped:
            kill(supervisor if whom == "supervisor" and in_time else freezer, signal.SIGKILL if in_time else signal.SIGCONT)
        errors = asking.communicate(timeout=60)[1].decode()
        if not in_time:
            rig.run("rm", job)
            shutil.rmtree(target)
            return None
        if whom == "freezer":
            assert asking.returncode == 0, errors
            assert "the process that made the checkpoint was killed; it is good" in errors
        else:
            eventually(lambda: "lost" in rig.run("ps", "--all").stdout)
            assert f"imgrun restore {target}" in json.loads(rig.run("inspect", job).stdout)["result"]["hint"]
        return job

    job = next(filter(None, (caught() for _ in range(8))), "")
    assert job, "it had its name too soon each time"
    assert [path.name for path in target.parent.glob("c*")] == ["c"]
    assert rig.run("check", target).status == 0
    restored = rig.run("restore", "--detach", target)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())
    assert rig.output(restored.stdout.strip())[-2:].count("full") == 1


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_name_that_cannot_be_had_any_more(rig: Rig) -> None:
    """The job is in what was made alone by then: it is kept, and said."""
    job = rig.run.background(f"dd if=/dev/urandom of=/dev/shm/x bs=1M count=200 2>/dev/null; {TICK}")
    rig.reaches(job, "2")
    target = rig.freeze(job, "c", "--leave-running")
    asking = rig.run.popen("checkpoint", "--to", target, job)
    building = Path(f"{target}.{job}.new")
    eventually(lambda: any(building.glob("processes/*")), "it is being made")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)
    try:
        said = asking.communicate(timeout=60)[1].decode()
    finally:
        subprocess.run(["umount", target], check=True)
    assert asking.returncode == 125
    assert f"{target} could not be put in its place: Device or resource busy; the whole checkpoint is {building}" in said
    restored = rig.run("restore", "--detach", building)
    assert restored.status == 0, restored
    goes_on(rig, restored.stdout.strip())


def children(supervisor: int, what: str) -> list[int]:
    """The process that freezes, a child of the supervisor that has imgrun's name; and CRIU, two below."""
    found = []
    own = [pid for pid in kids(supervisor) if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if what == "freezing":
        return own
    for pid in own:
        for host in kids(pid):
            found += kids(host)
    return found


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
