"""A job that is frozen in one guest and goes on in another: what both sides know of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guest.conftest import GIVEN, IMAGES, KEEP, Done, Imgrun, complaints

SCRIPT = "echo before >/file; (hold 8 /io/go; cat /file; cat) </dev/null & echo $! >/child; wait; echo ended $(cat /child) $!"
"""A tree of processes with memory, with files of its own, and with a number that has to stay the same."""


def archive(imgrun: Imgrun) -> str:
    return "user.tar" if imgrun.user else "root.tar"


def begin(imgrun: Imgrun, room: Path, kind: str) -> tuple[str, Path]:
    """Start the job and wait until it can be frozen; its id, and the directory where it waits for a file ``go``."""
    io = shared_directory(room)
    words = ("--bind", f"{io}:/io", IMAGES / f"small.{kind}", "--", "sh", "-c", SCRIPT)
    job = imgrun.good("start", "-d", *words).strip()
    imgrun.reaches(job, "ready")
    return job, io


def freezes_without_a_user_namespace(root: Imgrun, room: Path) -> None:
    job = root.good("start", "-d", "--userns", "off", IMAGES / "small.squashfs", "--", "hold", "4", "/go").strip()
    root.reaches(job, "ready")
    root.good("checkpoint", "--to", room / "c", job)
    second = root.good("restore", "-d", room / "c").strip()
    root.good("exec", second, "touch", "/go")
    root.reaches(second, "same")
    root.good("wait", second)


def leave(imgrun: Imgrun, room: Path, job: str) -> Path:
    """Freeze the job to an archive that other guests are given; its path."""
    made = room / archive(imgrun)
    imgrun.good("checkpoint", "--archive", made, job)
    (KEEP / "kernel").write_text(os.uname().release)
    return Path(shutil.move(made, KEEP / made.name))


def shared_directory(room: Path) -> Path:
    io = room / "io"
    io.mkdir()
    io.chmod(0o777)
    return io


def continues(done: Done) -> None:
    assert (done.status, complaints(done)) == (0, ""), done
    same, file, ended = done.stdout.splitlines()
    assert (same, file) == ("same", "before"), done
    before, after = ended.removeprefix("ended ").split()
    assert before == after, done


def given(imgrun: Imgrun, facts: dict[str, Any]) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Each archive of other guests' for this caller, the kernel it was made on, and a record for what becomes of it."""
    guests = sorted(GIVEN.iterdir())
    assert guests, "no other guest has given a checkpoint"
    for guest in guests:
        kernel = (guest / "kernel").read_text()
        record = {"from": kernel, "who": "an ordinary user" if imgrun.user else "root"}
        facts.setdefault("moved", []).append(record)
        yield guest / archive(imgrun), kernel, record
