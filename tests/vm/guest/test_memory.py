"""What only some kernels can: tracking changed memory for rounds before a checkpoint, and userfaultfd for everybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guest.conftest import IMAGES, Imgrun

MEGABYTES = 32


def rounds_and_lazily(imgrun: Imgrun, room: Path, rounds: str) -> None:
    io = room / "io"
    io.mkdir()
    io.chmod(0o777)
    job = imgrun.good(
        "start", "-d", "--bind", f"{io}:/io", IMAGES / "small.squashfs", "--", "hold", str(MEGABYTES), "/io/go"
    ).strip()
    imgrun.reaches(job, "ready")
    done = imgrun("checkpoint", "--pre-dump", rounds, "--timings", "--to", room / "c", job)
    assert done.status == 0, done
    record = json.loads((room / "c/manifest.json").read_text())
    if "does not track changed memory" in done.stderr:
        pytest.skip("this kernel does not track changed memory")
    assert record["files"]["processes/pre-2/parent"] == {"link": "../pre-1"}, done
    assert record["statistics"]["pages_in_earlier_rounds"] > MEGABYTES * 200, record["statistics"]
    assert record["statistics"]["pages_written"] < 4000, record["statistics"]
    assert "refused" not in imgrun.good("check", room / "c")
    (io / "go").touch()
    assert imgrun.good("restore", room / "c") == "same\n"
    Path("/proc/sys/vm/unprivileged_userfaultfd").write_text("1\n")
    try:
        assert imgrun.good("restore", "--lazy", room / "c") == "same\n"
    finally:
        Path("/proc/sys/vm/unprivileged_userfaultfd").write_text("0\n")


def test_as_root_after_two_rounds(root: Imgrun, room: Path) -> None:
    rounds_and_lazily(root, room, "2")


def test_as_root_after_as_many_as_help(root: Imgrun, room: Path) -> None:
    rounds_and_lazily(root, room, "auto")


def test_as_an_ordinary_user(user: Imgrun, room: Path) -> None:
    rounds_and_lazily(user, room, "2")
