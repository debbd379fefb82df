"""Freezing and continuing on this kernel, as root and as an ordinary user."""

from __future__ import annotations

from pathlib import Path

from guest.conftest import Imgrun
from guest.moving import begin, continues, freezes_without_a_user_namespace, leave


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
    freezes_without_a_user_namespace(root, room)
