"""Other ways to freeze and continue: in rounds, with the image, from an older shim; and what is said at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from command import eventually, expect, refused

from images import Images
from imgrun import Job
from imgrun.checkpoints import manifest
from imgrun.checkpoints.audit import audit
from imgrun.errors import JobStateError

from .conftest import Rig

ROOT = pytest.mark.parametrize("rig", ["root"], indirect=True)
MEGABYTES = 64
MEMORY = f"""x=$(dd if=/dev/urandom bs=1M count={MEGABYTES} 2>/dev/null | od -A n -v -t x1 | head -c {MEGABYTES << 20})
echo "$x" | md5sum; echo ready; read go; echo "$x" | md5sum"""


def frozen_with_memory(rig: Rig, *flags: str) -> tuple[str, Path]:
    """A checkpoint of a job that knows the checksum of its memory, and that."""
    process = rig.run.foreground(MEMORY, "--name", "big", *flags)
    assert process.stdout is not None
    first = process.stdout.readline().decode()
    expect(process, "ready")
    target = rig.freeze("big")
    assert process.wait(60) == 85
    return first, target


def test_nothing_runs_with_a_changed_byte_of_memory(rig: Rig) -> None:
    first, target = frozen_with_memory(rig)
    memory = max((target / "processes").glob("pages-*.img"), key=lambda path: path.stat().st_size)
    assert memory.stat().st_size > MEGABYTES << 20, "it is less than what is seen before the processes are restored"

    def flip() -> None:
        with memory.open("r+b") as f:
            f.seek(memory.stat().st_size // 2)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 1]))

    flip()
    done = rig.restore(target, stdin="go\n")
    refused(done, 125, f"{target} cannot be continued here: processes/{memory.name} was changed")
    assert done.stdout == ""
    assert rig.run("ps").stdout.count("\n") == 1, "something of it runs"
    assert f"processes/{memory.name} was changed" in rig.run("check", target).stdout
    flip()
    assert rig.restore(target, stdin="go\n").stdout == first


def test_rounds_beforehand(rig: Rig) -> None:
    """Where the kernel tracks memory, most of it is saved before; where it does not, one line says so."""
    process = rig.run.foreground(MEMORY, "--name", "x")
    assert process.stdout is not None
    first = process.stdout.readline().decode()
    expect(process, "ready")
    refused(rig.run("checkpoint", "--pre-dump", "0", "--to", rig.path("c"), "x"), 125, "no number of rounds")
    done = rig.run("checkpoint", "--pre-dump", "2", "--to", rig.path("c"), "x")
    assert done.status == 0, done
    assert process.wait(60) == 85
    record = json.loads((rig.path("c") / "manifest.json").read_text())
    if done.stderr:
        assert "does not track changed memory" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        assert record["files"]["processes/parent"] == {"link": "pre-2"}
        assert record["files"]["processes/pre-2/parent"] == {"link": "../pre-1"}
        assert record["statistics"]["pages_in_earlier_rounds"] > MEGABYTES * 200
    assert rig.run("check", rig.path("c")).status == 0
    assert rig.restore(rig.path("c"), stdin="go\n").stdout == first


@ROOT
def test_the_image_too(rig: Rig, images: Images) -> None:
    rig.run.image = str(images.copy(images.filesystem("ext4"), rig.path("own.img")))
    process = rig.run.foreground("echo 1 > /new; echo ready; read go; echo $go >> /new; cat /new", "--writable", "--name", "w")
    expect(process, "ready")
    target = rig.freeze("w", "c", "--capture-image")
    assert process.wait(60) == 85
    other = rig.path("other.img")
    assert rig.restore(target, "--image", other, stdin="2\n").stdout == "1\n2\n"
    refused(rig.restore(target, "--image", other, stdin="3\n"), 125, "is not the image that it was")
    # In place, where it is as it was; then no more.
    assert rig.restore(target, stdin="4\n").stdout == "1\n4\n"
    refused(rig.restore(target, stdin="5\n"), 125, "is not the image that it was")
    third = rig.path("third.img")
    assert rig.restore(target, "--image", third, stdin="6\n").stdout == "1\n6\n"
    with (target / "image.img").open("r+b") as f:
        f.seek(1 << 20)
        f.write(b"changed")
    refused(rig.restore(target, "--image", rig.path("fourth.img")), 125, "image.img was changed")


MEMORY_FILES = """
cd /dev/shm; truncate -s 4G hole; echo end >> hole; mkdir dir; echo a > dir/file; ln dir/file second; ln -s dir/file link
mkfifo dir/fifo; chmod 1750 dir; touch -d @86400 dir dir/file; echo mine > /mem/file; echo job > /mem/bound/file
echo ready; read go; echo $go; tail -c 4 hole; stat -c %s hole; du -k hole | cut -f1
readlink link; test -p dir/fifo && cat second; stat -c '%a %Y %h' dir/file; stat -c '%a %Y' dir; cat /mem/file /mem/bound/file
"""


def test_memory_file_systems_as_they_were(rig: Rig) -> None:
    """Holes, which a job can make of any size, stay holes; and what is bound into one is the host's."""
    bound = rig.make("bound")
    bound.chmod(0o777)
    process = rig.run.foreground(MEMORY_FILES, "--name", "x", "--tmpfs", "/mem", "--bind", f"{bound}:/mem/bound")
    expect(process, "ready")
    target = rig.freeze("x")
    assert process.wait(60) == 85
    assert sum(path.lstat().st_size for path in target.rglob("*") if path.is_file()) < 64 << 20
    assert (bound / "file").read_text() == "job\n"
    (bound / "file").write_text("host\n")
    done = rig.restore(target, stdin="go\n")
    words = ["go", "end", "4294967300", "4", "dir/file", "a", "644 86400 2", "1750 86400", "mine", "host"]
    assert (done.status, done.stdout.splitlines()) == (0, words), done


@pytest.mark.parametrize("way", ["replaced", "removed"])
def test_the_image_that_the_job_has_is_the_one_that_counts(rig: Rig, way: str) -> None:
    """Another may have been put at its path since, by renaming."""
    own, kept = rig.path("own.img"), rig.path("kept.img")
    shutil.copy(rig.image, own)
    os.link(own, kept)
    rig.give(own)
    rig.run.image = str(own)
    process = rig.run.foreground("echo ready; read go; echo $go", "--name", "x")
    expect(process, "ready")
    if way == "replaced":
        shutil.copy(kept, rig.path("new.img"))
        with rig.path("new.img").open("r+b") as f:
            f.write(b"another")
        rig.give(rig.path("new.img"))
        rig.path("new.img").rename(own)
    else:
        own.unlink()
    done = rig.run("checkpoint", "--to", rig.path("c"), "x")
    assert (done.status, done.stderr.count("\n")) == (0, 1), done
    assert f"{own} is not the image that the job has" in done.stderr
    assert process.wait(60) == 85
    words = "is not the image that it was" if way == "replaced" else "is not there"
    refused(rig.restore(rig.path("c"), stdin="go\n"), 125, words)
    assert rig.restore(rig.path("c"), "--image", kept, stdin="go\n").stdout == "go\n"


@pytest.mark.parametrize("to", ["--to", "--archive"])
def test_an_image_without_a_name_is_captured(rig: Rig, images: Images, to: str) -> None:
    rig.run.image = str(images.copy(images.filesystem("ext4"), rig.path("own.img")))
    rig.give(rig.path("own.img"))
    process = rig.run.foreground("echo 1 > /new; echo ready; read go; cat /new; echo $go", "--writable", "--name", "w")
    expect(process, "ready")
    rig.path("own.img").unlink()
    done = rig.run("checkpoint", "--capture-image", to, rig.path("c"), "w")
    assert done.status == 0, done
    assert "is not the image that the job has" in done.stderr
    assert process.wait(60) == 85
    done = rig.restore(rig.path("c"), "--image", rig.path("new.img"), stdin="2\n")
    assert (done.status, done.stdout) == (0, "1\n2\n"), done


def test_what_the_job_wrote_is_checked(rig: Rig) -> None:
    script = "echo a > /root/file; ln -s a /root/link; truncate -s 3072G /root/huge; echo ready; read go; cat /root/file"
    process = rig.run.foreground(script, "--name", "x")
    expect(process, "ready")
    target = rig.freeze("x")
    process.wait(60)
    upper = target / "files/upper/root"
    (upper / "file").write_text("b\n")
    refused(rig.restore(target), 125, "files/upper/root/file was changed")
    (upper / "file").write_text("a\n")
    (upper / "new").write_text("a\n")
    refused(rig.restore(target), 125, "files/upper/root/new does not belong there")
    (upper / "new").unlink()
    (upper / "link").unlink()
    refused(rig.restore(target), 125, "files/upper/root/link is missing")
    os.truncate(upper / "huge", 4 << 40)  # too large for a hash
    refused(rig.restore(target), 125, "files/upper/root/huge was changed")
    os.truncate(upper / "huge", 3 << 40)
    (upper / "link").symlink_to("a")
    if not rig.root:
        os.chown(upper / "link", rig.run.user.uid, rig.run.user.gid, follow_symlinks=False)  # type: ignore[union-attr]
    assert rig.restore(target, stdin="go\n").stdout == "a\n"


def test_a_shim_of_another_build(rig: Rig) -> None:
    """An imgrun whose shim has another size continues what an older one has frozen."""
    process = rig.run.foreground("echo ready; read go; echo $go; exit 7", "--name", "x")
    expect(process, "ready")
    target = rig.freeze("x")
    process.wait(60)
    install = rig.make("install")
    install.chmod(0o755)
    shutil.copytree(Path(__file__).parents[2] / "imgrun", install / "imgrun", ignore=shutil.ignore_patterns("__pycache__"))
    with (install / "imgrun/native/imgrun-init").open("ab") as f:
        f.write(bytes(8192))
    for _ in range(2):
        done = rig.restore(target, stdin="go\n", env={"PYTHONPATH": str(install), "PYTHONSAFEPATH": "1"})
        assert (done.status, done.stdout, done.stderr) == (7, "go\n", "")
    again = rig.run.popen("restore", target, env={"PYTHONPATH": str(install), "PYTHONSAFEPATH": "1"})
    eventually(lambda: "running" in rig.run("ps").stdout)
    second = rig.freeze("x", "second")
    assert again.wait(60) == 85
    assert (second / "shim").read_bytes() == (target / "shim").read_bytes()
    assert rig.restore(second, stdin="go\n").stdout == "go\n"


@pytest.mark.parametrize("how", ["signal", "time"])
def test_a_failure_that_nobody_asked_for_is_said_at_once(rig: Rig, how: str) -> None:
    place = rig.path("c")
    flags = ("--checkpoint-signal", "USR1") if how == "signal" else ("--checkpoint-every", "1s")
    process = rig.run.foreground("echo ready; read go", "--checkpoint-dir", place, *flags)
    expect(process, "ready")
    (place / "precious").write_text("mine")
    if how == "signal":
        process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    assert "checkpoint failed" in line
    assert "holds something that is no checkpoint" in line
    (place / "precious").unlink()
    _, errors = process.communicate(b"go\n", timeout=60)
    assert process.returncode == 0
    assert errors.decode().count("checkpoint failed") <= (0 if how == "signal" else 1), errors


def test_a_directory_with_another_job_is_not_continued_by_mistake(rig: Rig) -> None:
    flags = ("--checkpoint-dir", rig.path("c"), "--checkpoint-signal", "USR1")
    process = rig.run.foreground("echo ready; read go; echo $go", *flags)
    expect(process, "ready")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 85
    before = (rig.path("c") / "manifest.json").read_bytes()
    other = rig.run.sh("echo other", *flags)
    refused(other, 125, "holds a job with another command: sh -c echo ready; read go")
    other = rig.run.sh("echo ready; read go; echo $go", "--read-only", *flags)
    refused(other, 125, "holds a job with root 'overlay', and 'read-only' is asked for")
    other = rig.run.sh("echo ready; read go; echo $go", "--seccomp", "default", "--checkpoint-dir", rig.path("c"))
    refused(other, 125, "holds a job with seccomp 'off', and 'default' is asked for")
    assert (rig.path("c") / "manifest.json").read_bytes() == before


def test_of_a_background_job_it_is_in_its_log(rig: Rig) -> None:
    place = rig.path("c")
    job = rig.run.background("sleep 1000", "--checkpoint-dir", place, "--checkpoint-every", "1s")
    (place / "precious").write_text("mine")
    log = rig.run.state / "jobs" / job / "stderr"
    eventually(lambda: "holds something that is no checkpoint" in log.read_text())


def test_timings_and_statistics(rig: Rig) -> None:
    job = rig.run.background("sleep 1000")
    done = rig.run("checkpoint", "--timings", "--to", rig.path("c"), job)
    assert done.status == 0
    target = rig.path("c")
    refused(rig.restore(target, "--detach", "--timings"), 125, "--timings needs the foreground")
    for step in ("start of CRIU", "processes", "files", "hashes", "end of the job", "stood still"):
        assert step in done.stderr, done
    record = json.loads((rig.path("c") / "manifest.json").read_text())["statistics"]
    assert 0 < record["frozen_seconds"] < record["total_seconds"]
    assert record["pages_written"] > 0
    assert record["bytes"] > 0


@ROOT
def test_the_audit_of_a_job_that_ends_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGRUN_STATE_DIR", str(rig.run.state))
    job = Job.find(rig.run.background("sleep 1000"))
    init = job.init_pid()
    job.kill()
    eventually(lambda: not Path(f"/proc/{init}").exists(), "it has ended")
    monkeypatch.setattr(job, "init_pid", lambda: init)  # as it was when it was asked
    with pytest.raises(JobStateError, match="is ending"):
        audit(job)


@ROOT
def test_the_audit_of_large_unlinked_files(rig: Rig) -> None:
    script = "exec 3<>/tmp/x; rm /tmp/x; dd if=/dev/zero bs=1M count=300 >&3 2>/dev/null; echo ready; sleep 1000"
    job = rig.run.background(script, "--scratch-size", "400M")
    rig.reaches(job, "ready")
    found = rig.run("check", job)
    assert found.status == 1
    assert "has the deleted file /tmp/x of 300 MiB open" in found.stdout
    refused(rig.run("checkpoint", "--to", rig.path("c"), job), 125, "too large")


@pytest.mark.parametrize("rig", ["user"], indirect=True)
def test_a_subordinate_range_that_is_too_small(rig: Rig) -> None:
    job = rig.run.background("sleep 1000")
    target = rig.freeze(job)
    path = target / "manifest.json"
    record = json.loads(path.read_text())
    record["ids"]["uid"][-1][2] += 1 << 20
    record["checksum"] = manifest.checksum(record)
    path.write_text(json.dumps(record))
    done = rig.run("check", target)
    assert done.status == 1
    assert "ids, and you have" in done.stdout
