"""A checkpoint that a newer kernel made is refused on this one before anything is tried; on request it is tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from guest.conftest import Imgrun
from guest.moving import continues, given, shared_directory


def refused_and_allowed(imgrun: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    io = shared_directory(room)
    (io / "go").touch()
    for archive, kernel, record in given(imgrun, facts):
        words = ("--bind", f"{io}:/io", archive)
        done = imgrun("restore", *words)
        assert done.status == 125, done
        reason = f"this kernel is {os.uname().release}, older than the job's {kernel}"
        assert reason in done.stderr, done
        assert "--allow kernel" in done.stderr, done
        allowed = imgrun("restore", "--allow", "kernel", *words)
        record["outcome"] = "refused; continued with --allow kernel" if allowed.status == 0 else allowed.stderr.strip()
        assert reason in allowed.stderr, allowed
        continues(allowed._replace(stderr=""))


def test_as_root(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    refused_and_allowed(root, room, facts)


def test_as_an_ordinary_user(user: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    refused_and_allowed(user, room, facts)
