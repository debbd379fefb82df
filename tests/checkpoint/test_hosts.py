"""Continued elsewhere: after the host was started anew, and on another host."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import eventually, expect, refused
from ordinary import AsUser, World

from .conftest import AsRoot, Rig
from .test_faults import remade
from .test_freeze import COUNT, numbers

LAST = 150


class Host:
    """Another host, as far as this one can be two: its own mounts, network, PIDs, host name and /run.

    ``script`` is run in it by root first.
    """

    def __init__(self, name: str, script: str = "") -> None:
        self.name = name
        steps = f"hostname {name}; ip link set lo up; mount -t tmpfs -o mode=755 run /run\n{script}\necho ready; exec cat"
        flags = ("--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        self._process = subprocess.Popen(
            ["unshare", *flags, "--propagation", "private", "sh", "-euc", steps], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        expect(self._process, "ready")
        pid = self._process.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def run(self, directory: Path, image: Path) -> AsRoot:
        """The command as root there, with a state directory below ``directory``."""
        run = AsRoot(directory, image)
        run.before = ("nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--uts", "--ipc", "--")
        return run

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def second(base: Path, image: Path) -> Iterator[Rig]:
    """A rig on another host, where the images of this one are not, but at another place."""
    away = base / "elsewhere"
    away.mkdir()
    shutil.copy(image, away / "the-image")
    host = Host("second", f"mount -t tmpfs -o mode=755 nothing {image.parent}")
    run = host.run(away, away / "the-image")
    yield Rig(run, root=True)
    run.close()
    for job in sorted(p.name for p in (run.state / "jobs").glob("*")):
        assert run("rm", "--force", job).status == 0
    host.close()
    shutil.rmtree(away)


def by_cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--archive", "--no-target-directory", source, target], check=True)


def by_tar(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    keep = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse")
    packed = subprocess.run(["tar", *keep, "-C", source, "-cf", "-", "."], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", *keep, "-C", target, "-xpf", "-"], input=packed.stdout, check=True)


@pytest.mark.parametrize("carry", [by_cp, by_tar])
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_there_and_back(rig: Rig, second: Rig, carry: Callable[[Path, Path], None]) -> None:
    script = f"rm /etc/motd; echo mine > /tmp/kept; {COUNT.format(n=LAST)}; test ! -e /etc/motd; cat /tmp/kept; hostname"
    job = rig.run.background(script, "--name", "traveller", "--memory", "64M", "--limits", "best-effort")
    rig.reaches(job, "20")
    carry(rig.freeze(job), second.path("arrived"))
    seen = rig.output(job)

    refused(second.restore(second.path("arrived")), 125, "is not there")
    done = second.restore(second.path("arrived"), "--image", second.image, "--detach")
    assert done.status == 0, done
    job = done.stdout.strip()
    second.reaches(job, "60")
    assert "traveller" in second.run("ps").stdout
    assert "traveller" not in rig.run("ps").stdout
    carry(second.freeze(job, "again"), rig.path("returned"))
    seen += second.output(job)

    done = rig.restore(rig.path("returned"), "--image", rig.image)
    assert done.status == 0, done
    assert [*seen, *done.stdout.splitlines()] == [*numbers(LAST), str(LAST), "mine", "traveller"]


def test_after_the_host_was_started_anew(rig: Rig, base: Path) -> None:
    """Nothing is left of what was running, of the state directory, or in /run."""
    job = rig.run.background(COUNT.format(n=LAST), "--name", "survivor")
    rig.reaches(job, "20")
    target = rig.freeze(job)
    seen = rig.output(job)
    assert rig.run("rm", job).status == 0
    shutil.rmtree(rig.run.state)
    there: Host | World
    if isinstance(rig.run, AsUser):
        there = World(base / "anew", "mount -t tmpfs -o mode=755 run /run; mount -t tmpfs -o mode=1777 memory /dev/shm")
        run: AsRoot | AsUser = AsUser(rig.run.user, there, rig.directory, Path(rig.image))
    else:
        there = Host("anew")
        run = there.run(rig.directory, Path(rig.image))
    done = run("restore", target)
    assert done.status == 0, done
    assert seen + done.stdout.splitlines() == [*numbers(LAST), str(LAST)]
    run.close()
    there.close()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "cpu": (lambda host: host["cpu"]["features"].append("avx99"), "this processor lacks avx99, which the job's had"),
    "kernel": (lambda host: host.update(kernel="99.1.0"), "older than the job's 99.1.0"),
    "criu": (lambda host: host.update(criu="99.1"), "older than the 99.1 that made it"),
    "machine": (lambda host: host.update(machine="vax"), "it was made on vax"),
}


def test_a_host_that_is_another(rig: Rig) -> None:
    """Refused with the true reason before anything is touched; overridden by its name, where that can go well."""
    job = rig.run.background("i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    rig.reaches(job, "2")
    target = rig.freeze(job)
    good = (target / "manifest.json").read_text()
    for name, (change, reason) in CHANGES.items():
        remade(target, lambda m, change=change: change(m["host"]))  # type: ignore[misc]
        refused(rig.restore(target, "--detach"), 125, reason)
        findings = json.loads(rig.run("check", target, "--json").stdout)
        assert [f["name"] for f in findings if f["level"] == "refused"] == [name]
        if name in ("cpu", "kernel", "criu"):
            done = rig.restore(target, "--detach", "--allow", name)
            assert done.status == 0, done
            (again,) = done.stdout.split()
            before = len(rig.output(again))
            eventually(lambda again=again, before=before: len(rig.output(again)) > before)
            assert rig.run("rm", "--force", again).status == 0
        (target / "manifest.json").write_text(good)
    assert rig.run("ps").stdout.count("\n") == 1, "something of it runs"
