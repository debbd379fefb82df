"""Real schedulers, and imgrun below them as an ordinary user."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ordinary import AsUser, Users, World, base, images, leaks, nothing_left, state_dir, users, world

from images import programs

__all__ = ["base", "images", "leaks", "nothing_left", "state_dir", "users", "world"]


@pytest.fixture(scope="session")
def image(base: Path) -> Path:
    """Where an ordinary user can read it."""
    return programs(base)


@pytest.fixture
def run(base: Path, users: Users, world: World, image: Path, nothing_left: None) -> Iterator[AsUser]:
    """imgrun as an ordinary user with a directory of his own, which imgrun leaves tidy."""
    directory = Path(tempfile.mkdtemp(dir=base, prefix="t-"))
    os.chown(directory, users.ranged.uid, users.ranged.gid)
    run = AsUser(users.ranged, world, directory, image)
    yield run
    run.close()
    if (run.state / "jobs").exists():
        assert run("gc").status == 0
        left = sorted(str(path.relative_to(run.state)) for path in run.state.glob("*/*"))
        assert left == [], "jobs of a scheduler leave something in the state directory"
