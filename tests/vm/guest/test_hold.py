"""``--oom hold`` with cgroup v2, where the kernel itself can only kill; and whose limit it was."""

from __future__ import annotations

from pathlib import Path

from guest.conftest import IMAGES, Imgrun, eventually

FLAGS = ("--memory", "64M", "--swap", "0", "--oom", "hold")


def held(imgrun: Imgrun, *words: str | Path) -> str:
    """Start a job that needs more than it may have, and wait until it is held."""
    command = ("sh", "-c", "hold 120 /proc; echo done")
    job = imgrun.good("start", "-d", *FLAGS, *words, IMAGES / "small.squashfs", "--", *command).strip()
    eventually(lambda: f"{job}  -     held" in imgrun("ps").stdout, lambda: f"{job} is held: {imgrun('ps', '-a').stdout}")
    return job


def test_a_held_job_goes_on_with_more_memory(root: Imgrun) -> None:
    job = held(root)
    assert "memory limit of 64 MiB and is held" in root.good("inspect", job)
    root.good("update", "--memory", "256M", job)
    root("wait", job)
    assert root.good("logs", "--stdout", job).endswith("done\n")
    assert root.record(job)["reason"] == "exited"


def test_a_held_job_can_be_stopped(root: Imgrun) -> None:
    job = held(root)
    root.good("stop", "-t", "2", job)
    assert root.record(job)["reason"] == "stopped"
