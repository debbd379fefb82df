"""Whatever part of an ordinary user's job is killed, nothing of it stays, and one line says what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command import PATIENCE, Done, eventually, expect, kill, refused
from leaks import read
from ordinary import AsUser, has_route

from images import Images

WORK = (
    "mkdir -p /d/e/g; touch /d/e/f; chown -R 1000:1000 /d/e 2>/dev/null; chmod 0 /d/e; touch /tmp/f;"
    "(setsid sleep 1000 &); echo ready; sleep 1000"
)
"""Leaves files of a subordinate id, in a directory that its owner may not enter, and a daemon."""


def begin(run: AsUser, *flags: str, image: object = None) -> tuple[str, dict[str, int]]:
    """A background job at work; its id, and the pids of its supervisor and init."""
    done = run("start", "-d", *flags, str(image or run.image), "--", "sh", "-c", WORK)
    assert done.status == 0, done
    job = done.stdout.strip()
    eventually(lambda: "ready" in run("logs", job).stdout)
    record = json.loads(run("inspect", job).stdout)
    return job, {"supervisor": record["supervisor"], "init": record["init"]}


def gone(run: AsUser) -> None:
    eventually(lambda: run.processes() == [], "all processes of the user are gone")


def test_the_supervisor(run_any: AsUser) -> None:
    run = run_any
    job, pids = begin(run)
    assert run.processes("squashfuse_ll")
    kill(pids["supervisor"])
    gone(run)
    assert "lost" in run("ps", "--all").stdout
    done = run("wait", job)
    assert done.status == 125, done
    assert not (run.state / "jobs" / job / "scratch").exists(), "files of other ids are removed, too"
    assert run("rm", job).status == 0
    assert list(run.state.glob("*/*")) == []


def test_the_supervisor_and_gc(run_any: AsUser) -> None:
    _, pids = begin(run_any, "--rm")
    kill(pids["supervisor"])
    gone(run_any)
    assert run_any("gc").status == 0
    assert list(run_any.state.glob("*/*")) == []


def test_a_foreground_supervisor(run: AsUser) -> None:
    process = run.foreground(WORK)
    expect(process, "ready")
    process.kill()
    process.wait()
    gone(run)
    # The next job cleans up, without being asked.
    assert run.sh("true").status == 0
    assert list(run.state.glob("*/*")) == []


@pytest.mark.parametrize("kind", ["squashfs", "ext4"])
def test_the_file_server(run_any: AsUser, images: Images, kind: str) -> None:
    run = run_any
    job, _ = begin(run, image=images.filesystem(kind))
    (server,) = run.processes("squashfuse_ll") or run.processes("fuse2fs")
    kill(server)
    done = run("wait", job)
    assert done.status == 125, done
    result = json.loads(run("inspect", job).stdout)["result"]
    assert result["reason"] == "lost"
    assert "served the job from outside" in result["message"]
    gone(run)


@pytest.mark.parametrize("program", ["squashfuse_ll", "fuse-overlayfs", "fuse2fs"], ids=["image", "overlay", "another image"])
def test_a_server_of_a_foreground_job(run: AsUser, images: Images, program: str) -> None:
    another = ("--mount", f"type=image,src={images.data()},dst=/data") if program == "fuse2fs" else ()
    env = {"IMGRUN_OVERLAY": "fuse"} if program == "fuse-overlayfs" else {}
    process = run.foreground(WORK, *another, env=env)
    expect(process, "ready")
    (server,) = run.processes(program)
    kill(server)
    _, stderr = process.communicate(timeout=PATIENCE)
    # A union by fuse-overlayfs is told of before it.
    told = "".join(line for line in stderr.decode().splitlines(keepends=True) if "warning" not in line)
    refused(Done(process.returncode, "", told), 125, "served the job from outside")
    gone(run)


def test_pid_1(run_any: AsUser) -> None:
    job, pids = begin(run_any)
    kill(pids["init"])
    assert run_any("wait", job).status == 137
    gone(run_any)


@pytest.mark.parametrize("depth", [1, 2], ids=["reaper", "command"])
def test_what_is_below_pid_1(run_any: AsUser, depth: int) -> None:
    job, pids = begin(run_any)
    victim = pids["init"]
    for _ in range(depth):
        victim = int(read(Path(f"/proc/{victim}/task/{victim}/children")).split()[0])
    kill(victim)
    assert run_any("wait", job).status == 137
    gone(run_any)
    assert json.loads(run_any("inspect", job).stdout)["result"]["signal"] == signal.SIGKILL


def test_pasta(run: AsUser) -> None:
    """The job goes on, without its network."""
    if not has_route():
        pytest.skip("this machine has no default route that a private network could lead out by")
    job, _ = begin(run, "--network", "private")
    (pasta,) = [pid for pid in run.processes() if read(Path(f"/proc/{pid}/comm")).startswith(("pasta", "passt"))]
    kill(pasta)
    assert run("exec", job, "echo", "on").stdout == "on\n"
    assert run("stop", "--timeout", "1s", job).status == 0
    gone(run)


def test_all_at_once(run: AsUser) -> None:
    for _ in range(3):
        begin(run)
    for pid in run.processes():
        kill(pid)
    gone(run)
    assert run("gc").status == 0
    assert list(run.state.glob("live/*")) == []


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_start_that_is_killed_anywhere(run: AsUser, delay: float) -> None:
    process = run.foreground("sleep 1000")
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    gone(run)
    assert run("gc").status == 0
    # What was to become a lock may be too young to be known as dead.
    assert [path for path in run.state.glob("*/*") if path.parent.name != "live"] == []
    for path in run.state.glob("live/.*"):
        path.unlink()


def test_a_failed_start(run: AsUser, images: Images) -> None:
    attempts: tuple[Callable[[], object], ...] = (
        lambda: run.sh("true", "--bind", "/nope:/d"),
        lambda: run.start("--", "nope"),
        lambda: run.sh("true", "--workdir", "/nope"),
        lambda: run("start", images.filesystem("ext4"), "--", "nope"),
        lambda: run.sh("true", "--bind", "/etc/hostname:/etc"),
        lambda: run.sh("true", "--mount", "type=image,src=/nope.img,dst=/d"),
    )
    for attempt in attempts:
        attempt()
        assert list(run.state.glob("*/*")) == []
        assert run.processes() == []


@pytest.mark.parametrize("victim", ["supervisor", "server"])
def test_a_writer_that_is_killed_leaves_an_image_that_says_so(run: AsUser, images: Images, victim: str) -> None:
    """Nobody runs from, or writes into, what may be damaged; after a repair it can be used again."""
    image = images.copy(images.filesystem("ext4"), run.directory / "w.img")
    os.chown(image, run.user.uid, run.user.gid)
    script = "for i in $(seq 50); do mkdir /d$i; echo $i > /d$i/f; done; echo ready; while :; do echo x > /d1/f; done"
    process = run.popen("start", "--writable", image, "--", "sh", "-c", script)
    expect(process, "ready")
    kill(process.pid if victim == "supervisor" else run.processes("fuse2fs")[0])
    process.wait(30)
    gone(run)
    for flags in ((), ("--writable",)):
        done = run("start", *flags, image, "--", "true")
        refused(done, 125, str(image), "not clean")
        assert "e2fsck" in done.stderr
    assert subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False).returncode in (0, 1, 2)
    assert run("start", image, "--", "cat", "/etc/motd").stdout == "of the image\n"
