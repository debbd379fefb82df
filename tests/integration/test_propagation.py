"""Where mounts are shared, as systemd makes them all, a job's mounts stay in the job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SCRIPT = """
set -e
mount --make-rshared /
cut -d ' ' -f 3- /proc/self/mountinfo | sort >"$1/before"
"$2" -m imgrun.cli start --bind "$1/given:/given" --tmpfs /given/own "$3" -- true
cut -d ' ' -f 3- /proc/self/mountinfo | sort >"$1/after"
"""


def test_no_mount_comes_back_from_a_job(tmp_path: Path, image: Path) -> None:
    (tmp_path / "given/own").mkdir(parents=True)
    words = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", tmp_path, sys.executable, image]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()
