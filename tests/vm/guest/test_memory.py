"""What only some kernels can: tracking changed memory for rounds before a checkpoint, and userfaultfd in a user namespace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guest.conftest import IMAGES, Imgrun

MEGABYTES = 32


def rounds_and_lazily(imgrun: Imgrun, room: Path, rounds: str, *, root: bool = True) -> None:
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
    done = imgrun("restore", "--lazy", room / "c")
    assert (done.status, done.stdout) == (0, "same\n"), done
    assert ("not lazily" in done.stderr) == (not root), done


def test_as_root_after_two_rounds(root: Imgrun, room: Path) -> None:
    rounds_and_lazily(root, room, "2")


def test_as_root_after_as_many_as_help(root: Imgrun, room: Path) -> None:
    rounds_and_lazily(root, room, "auto")


def test_as_an_ordinary_user(user: Imgrun, room: Path) -> None:
    rounds_and_lazily(user, room, "2", root=False)
