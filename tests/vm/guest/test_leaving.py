"""Checkpoints for the guests with other kernels; each goes on here too, which shows that it can."""

from __future__ import annotations

from pathlib import Path

from guest.conftest import Imgrun
from guest.moving import begin, continues, leave


def leaves(imgrun: Imgrun, room: Path, kind: str) -> None:
    job, io = begin(imgrun, room, kind)
    archive = leave(imgrun, room, job)
    (io / "go").touch()
    continues(imgrun("restore", archive))


def test_as_root(root: Imgrun, room: Path) -> None:
    leaves(root, room, "ext4")


def test_as_an_ordinary_user(user: Imgrun, room: Path) -> None:
    leaves(user, room, "squashfs")
