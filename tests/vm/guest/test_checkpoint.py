"""Freezing and continuing on this kernel, as root and as an ordinary user."""

from __future__ import annotations

import shutil
from pathlib import Path

from guest.conftest import IMAGES, Imgrun
from guest.moving import begin, continues, leave


def freezes_and_continues(imgrun: Imgrun, room: Path, kind: str) -> None:
    """To an archive, which other guests get too; from it, and on after a checkpoint of what runs; and from a directory."""
    job, io = begin(imgrun, room, kind)
    archive = leave(imgrun, room, job)
    assert imgrun.record(job)["reason"] == "checkpointed"
    second = imgrun("restore", "-d", archive).stdout.strip()
    imgrun.good("checkpoint", "--leave-running", "--to", room / "second", second)
    imgrun.good("checkpoint", "--to", room / "third", second)
    (io / "go").touch()
    continues(imgrun("restore", room / "third"))


def test_as_root(root: Imgrun, room: Path) -> None:
    freezes_and_continues(root, room, "ext4")


def test_as_an_ordinary_user(user: Imgrun, room: Path) -> None:
    freezes_and_continues(user, room, "squashfs")


def test_as_root_without_a_user_namespace(root: Imgrun, room: Path) -> None:
    job = root.good("start", "-d", "--userns", "off", IMAGES / "small.squashfs", "--", "hold", "4", "/etc/motd2").strip()
    root.reaches(job, "ready")
    root.good("checkpoint", "--to", room / "c", job)
    second = root.good("restore", "-d", room / "c").strip()
    root.good("exec", second, "touch", "/etc/motd2")
    root.reaches(second, "same")
    root.good("wait", second)
    shutil.rmtree(room / "c")
