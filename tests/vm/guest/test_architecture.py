"""On another architecture too: a job is frozen, and goes on."""

from __future__ import annotations

from pathlib import Path

from guest.conftest import IMAGES, Imgrun
from guest.moving import begin, continues


def test_freezes_and_continues(root: Imgrun, room: Path) -> None:
    job, io = begin(root, room, "squashfs")
    root.good("checkpoint", "--archive", room / "c.tar", job)
    second = root.good("restore", "-d", room / "c.tar").strip()
    root.good("checkpoint", "--to", room / "c", second)
    (io / "go").touch()
    continues(root("restore", room / "c"))


def test_without_a_user_namespace(root: Imgrun, room: Path) -> None:
    job = root.good("start", "-d", "--userns", "off", IMAGES / "small.squashfs", "--", "hold", "4", "/go").strip()
    root.reaches(job, "ready")
    root.good("checkpoint", "--to", room / "c", job)
    second = root.good("restore", "-d", room / "c").strip()
    root.good("exec", second, "touch", "/go")
    root.reaches(second, "same")
    root.good("wait", second)
