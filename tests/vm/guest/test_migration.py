"""A checkpoint from another kernel is continued here, or refused before anything is tried, with the true reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from guest.conftest import GIVEN, IMAGES, Imgrun


def test_a_checkpoint_from_another_kernel(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    (origin,) = sorted(GIVEN.iterdir())
    checkpoint = origin / "root"
    theirs = json.loads((checkpoint / "manifest.json").read_text())
    io = room / "io"
    io.mkdir()
    (io / "go").touch()
    done = root("restore", "--bind", f"{io}:/io", checkpoint) if _may_rebind(root) else root("restore", checkpoint)
    kernel = theirs.get("host", {}).get("kernel") or theirs.get("kernel")
    facts["migration"] = {"from": origin.name, "kernel": kernel, "status": done.status, "said": done.stderr.strip()}
    assert done.status == 0, done
    assert "same" in done.stdout.splitlines()
    assert kernel != os.uname().release
    assert IMAGES.exists()


def _may_rebind(root: Imgrun) -> bool:
    return "--bind" in root.good("restore", "--help")
