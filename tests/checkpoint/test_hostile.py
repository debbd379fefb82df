"""What a job does to the places in its /dev where CRIU is attached gives it no rights, and runs nothing of its own as CRIU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import eventually, refused

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


@WHO
def test_a_program_of_the_jobs_in_criu_s_place_is_not_run(rig: Rig, flags: tuple[str, ...]) -> None:
    """However often the directory is renamed and another one put there while it is being used."""
    put = "mkdir /dev/mine; printf '#!/bin/sh\\ntouch /tmp/ran\\n' >/dev/mine/ld.so; chmod 755 /dev/mine/ld.so"
    copy = "[ -d /dev/m ] || cp -r /dev/mine /dev/m"
    swap = f"{copy}; mv /dev/imgrun-criu /dev/x$i && mv /dev/m /dev/imgrun-criu; rm -rf /dev/x$i"
    job = rig.run.background(f"{put}; echo begun; i=0; while :; do i=$((i+1)); {swap}; done 2>/dev/null", *flags)
    rig.reaches(job, "begun")
    target = rig.path("c")
    for _ in range(20):
        done = rig.run("checkpoint", "--leave-running", "--to", target, job)
        assert done.status in (0, 125), done
        assert rig.run("exec", job, "test", "-e", "/tmp/ran").status == 1, done
    assert rig.run("exec", job, "test", "-d", "/dev/mine").status == 0
    assert Path(target).exists() or done.status
    shutil.rmtree(target, ignore_errors=True)
    eventually(lambda: rig.run("stop", "--timeout", "0", job).status == 0)
