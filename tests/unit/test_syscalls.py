"""What the thin wrappers add to the system calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgrun import syscalls as sc


@pytest.fixture
def renaming(tmp_path: Path) -> Iterator[None]:
    """Processes that rename files without a pause, as on any busy host."""
    pids = []
    for n in range(3):
        one, other = tmp_path / f"one{n}", tmp_path / f"other{n}"
        one.touch()
        pid = os.fork()
        if pid == 0:
            while True:
                os.rename(one, other)
                os.rename(other, one)
        pids.append(pid)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def failures(root: int) -> int:
    failed = 0
    for _ in range(5000):
        try:
            os.close(sc.openat2("a/../b/../file", os.O_PATH, root))
        except BlockingIOError:
            failed += 1
    return failed


def test_a_path_with_dots_is_found_however_busy_the_host(
    tmp_path: Path, renaming: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    root = os.open(tmp_path, os.O_PATH)
    assert failures(root) == 0
    monkeypatch.setattr(sc, "OPENAT2_ATTEMPTS", 1)
    assert failures(root) > 0, "the kernel did not ask to try again: this test shows nothing"
    os.close(root)


def test_what_is_missing_is_missing_at_once(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    with pytest.raises(FileNotFoundError):
        sc.openat2("nothing", os.O_PATH, root)
    os.close(root)
