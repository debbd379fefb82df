"""What is said when a checkpoint cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from imgrun.checkpoints.refusals import explained
from imgrun.errors import CheckpointError


def test_a_file_system_that_does_not_tell_its_size_is_not_full(tmp_path: Path) -> None:
    assert os.statvfs("/proc").f_bavail == 0
    error = CheckpointError("CRIU failed", "see its log")
    for directory in ("/proc", str(tmp_path)):
        assert explained(error, directory, f"{directory}/c") is error


def test_a_shortage_of_the_hosts_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    for number in (errno.EMFILE, errno.ENOMEM):
        said = explained(OSError(number, os.strerror(number)), str(tmp_path), f"{tmp_path}/c")
        assert said.message == f"the checkpoint could not be made: {os.strerror(number)}"
