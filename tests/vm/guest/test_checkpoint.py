"""Freezing and continuing on this kernel, as root and as an ordinary user."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from guest.conftest import IMAGES, KEEP, Imgrun

STATE = "i=0; while [ ! -e /io/go ]; do i=$((i+1)); echo $i >/count; [ $i != 5 ] || echo five; sleep 0.1; done; cat /count"
"""Goes on counting in a file of its own until it is told to end."""


def freezes_and_continues(imgrun: Imgrun, room: Path, kind: str = "squashfs", keep: str = "") -> None:
    """A shell with a child and a program with memory, a file of the job's own, twice frozen."""
    io = room / "io"
    io.mkdir()
    io.chmod(0o777)
    words = ("--bind", f"{io}:/io", IMAGES / f"small.{kind}", "--", "sh", "-c", f"hold 8 /io/go & {STATE}; wait")
    job = imgrun.good("start", "-d", *words).strip()
    imgrun.reaches(job, "ready")
    imgrun.reaches(job, "five")
    imgrun.good("checkpoint", "--to", room / "first", job)
    assert imgrun.record(job)["reason"] == "checkpointed"
    imgrun.good("rm", job)
    if keep:
        save(room / "first", keep)
    second = imgrun.good("restore", "-d", room / "first").strip()
    imgrun.good("checkpoint", "--leave-running", "--to", room / "second", second)  # and goes on
    imgrun.good("checkpoint", "--to", room / "third", second)
    imgrun.good("rm", second)
    (io / "go").touch()
    done = imgrun("restore", room / "third")
    assert (done.status, done.stderr) == (0, ""), done
    lines = done.stdout.splitlines()
    assert sorted(lines)[-1] == "same", done
    assert int(next(line for line in lines if line.isdigit())) >= 5


def save(checkpoint: Path, name: str) -> None:
    """Keep a checkpoint for another guest."""
    subprocess.run(["cp", "-a", checkpoint, KEEP / name], check=True)


def test_as_root(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    freezes_and_continues(root, room, keep="root")
    manifest = json.loads((room / "third/manifest.json").read_text())
    facts["manifest"] = {key: manifest[key] for key in ("kernel", "criu") if key in manifest}


def test_as_root_from_ext4(root: Imgrun, room: Path) -> None:
    freezes_and_continues(root, room, "ext4")


def test_as_an_ordinary_user(user: Imgrun, room: Path) -> None:
    freezes_and_continues(user, room)


def test_as_root_without_a_user_namespace(root: Imgrun, room: Path) -> None:
    job = root.good("start", "-d", "--userns", "off", IMAGES / "small.squashfs", "--", "hold", "4", "/etc/motd2").strip()
    root.reaches(job, "ready")
    root.good("checkpoint", "--to", room / "c", job)
    second = root.good("restore", "-d", room / "c").strip()
    root.good("exec", second, "touch", "/etc/motd2")
    root.reaches(second, "same")
    root.good("wait", second)
    shutil.rmtree(room / "c")
