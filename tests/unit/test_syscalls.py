"""What the thin wrappers add to the system calls."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from imgrun import syscalls as sc


class Busy:
    """The real library on a host so busy with renames that the kernel asks for another try ``times`` times.

    Whether it does ask cannot be had on demand (openat2(2), EAGAIN).
    """

    def __init__(self, real: Any, times: int) -> None:
        self._real = real
        self.left = times

    def ig_openat2(self, *arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            return -errno.EAGAIN
        return self._real.ig_openat2(*arguments)


@pytest.mark.parametrize(
    ("release", "version"), [("6.1.0-50-amd64", (6, 1)), ("6.12-rc1", (6, 12)), ("6.18.44-fc-v669", (6, 18)), ("7.0+", (7, 0))]
)
def test_the_version_of_a_kernel(release: str, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    host = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*host[:2], release, *host[3:])))
    assert sc.kernel_version() == version


def test_a_path_with_dots_is_found_however_busy_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    root = os.open(tmp_path, os.O_PATH)
    busy = Busy(sc._lib, sc.OPENAT2_ATTEMPTS - 1)
    monkeypatch.setattr(sc, "_lib", busy)
    os.close(sc.openat2("a/../file", os.O_PATH, root))
    assert busy.left == 0
    busy.left = sc.OPENAT2_ATTEMPTS
    with pytest.raises(BlockingIOError):
        sc.openat2("a/../file", os.O_PATH, root)
    os.close(root)
