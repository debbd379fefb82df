"""Guests: each is built, booted and run once for the session; every test inside it is a test here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vm.guests import GUESTS
from vm.machine import Outcome, boot
from vm.payload import work_disk

collect_ignore = ["guest"]


class Runs:
    """What the guests that were booted have sent out."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._outcomes: dict[str, Outcome] = {}

    def __call__(self, name: str) -> Outcome:
        """The outcome of this guest, after those whose checkpoints it takes."""
        if name not in self._outcomes:
            guest = GUESTS[name]
            given = {other: self(other).directory / "keep" for other in guest.takes}
            directory = self._directory / name
            directory.mkdir()
            work = work_disk(guest, directory, given)
            self._outcomes[name] = outcome = boot(guest, work, directory)
            work.unlink()
            print(f"vm: {name} ran for {outcome.seconds:.0f} s", flush=True)
        return self._outcomes[name]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if os.geteuid() != 0:
        pytest.skip("needs root, to install packages into a directory")
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    return Runs(tmp_path_factory.mktemp("vm"))
