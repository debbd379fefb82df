"""A checkpoint that an older kernel made is continued on this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guest.conftest import Imgrun
from guest.moving import continues, given, shared_directory


def goes_on(imgrun: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    io = shared_directory(room)
    (io / "go").touch()
    for archive, kernel, record in given(imgrun, facts):
        done = imgrun("restore", "--bind", f"{io}:/io", archive)
        record["outcome"] = "continued" if done.status == 0 else done.stderr.strip()
        continues(done)
        assert f", and was {kernel}\n" in imgrun("check", archive).stdout


def test_as_root(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    goes_on(root, room, facts)


def test_as_an_ordinary_user(user: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    goes_on(user, room, facts)
