"""On another architecture too: a job is frozen, and goes on."""

from __future__ import annotations

from pathlib import Path

from guest.conftest import Imgrun
from guest.moving import begin, continues, freezes_without_a_user_namespace


def test_freezes_and_continues(root: Imgrun, room: Path) -> None:
    job, io = begin(root, room, "squashfs")
    root.good("checkpoint", "--archive", room / "c.tar", job)
    second = root.good("restore", "-d", room / "c.tar").strip()
    root.good("checkpoint", "--to", room / "c", second)
    (io / "go").touch()
    continues(root("restore", room / "c"))


def test_without_a_user_namespace(root: Imgrun, room: Path) -> None:
    freezes_without_a_user_namespace(root, room)
