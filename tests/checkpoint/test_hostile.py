"""What a job does to the places in its /dev where CRIU is attached gives it no rights, and runs nothing of its own as CRIU."""

from __future__ import annotations

import contextlib
import os

import pytest
from command import refused

from imgrun import criu
from imgrun import syscalls as sc
from imgrun.apart import apart
from imgrun.errors import HostError
from imgrun.isolation.mounts import new_filesystem

from .conftest import Rig

PLACES = ("/dev/imgrun-criu", "/dev/imgrun-checkpoint", "/dev/imgrun-work")
TICK = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"
WHO = pytest.mark.parametrize(
    ("rig", "flags"), [("root", ()), ("root", ("--userns", "off")), ("user", ())], ids=["root", "root-no-userns", "user"],
    indirect=["rig"],
)  # fmt: skip


@WHO
@pytest.mark.parametrize("place", PLACES)
def test_a_link_to_a_mount_takes_nothing_off(rig: Rig, flags: tuple[str, ...], place: str) -> None:
    cover = "/proc/sys" if flags else "/tmp"
    job = rig.run.background(f"ln -s {cover} {place}; {TICK}", *flags)
    rig.reaches(job, "2")
    mounts = rig.run("exec", job, "cat", "/proc/self/mountinfo").stdout
    assert f" {cover} r" in mounts
    refused(rig.run("checkpoint", "--to", rig.path("c"), job), 125, f"{place} in the job is no directory of imgrun's")
    assert rig.run("exec", job, "cat", "/proc/self/mountinfo").stdout == mounts
    assert rig.run("exec", job, "sh", "-c", ": >>/proc/sys/kernel/core_pattern").status != 0
    rig.run("exec", job, "rm", place)
    rig.freeze(job)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory_that_the_job_renames_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its being opened and the mount: what the job has put there instead is not taken for CRIU."""
    real = sc.move_mount

    def renamed(mount: int, target: str, directory: int) -> None:
        os.rename(PLACES[0], "/dev/mine")
        os.mkdir(PLACES[0])
        real(mount, target, directory)

    def attach(mount: int) -> str:
        try:
            criu._attach(mount, PLACES[0])
        except HostError as e:
            return e.message
        with contextlib.suppress(OSError):
            os.rename(PLACES[0], "/dev/mine")
            return "it can be renamed"
        return "attached"

    def in_a_dev_of_its_own() -> list[str]:
        sc.unshare(sc.CLONE_NEWNS)
        sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
        sc.move_mount(new_filesystem("tmpfs", {}), "/dev")
        first = attach(new_filesystem("tmpfs", {}))
        monkeypatch.setattr(sc, "move_mount", renamed)
        criu._detach(PLACES[0])
        return [first, attach(new_filesystem("tmpfs", {}))]

    assert apart(in_a_dev_of_its_own) == ["attached", f"the job has moved {PLACES[0]}"]
