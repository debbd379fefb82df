"""imgrun as an ordinary user: who, where, and with which images."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import COMMAND
from ordinary import AsUser, User, Users, World, base, empty_state, image, images, leaks, nothing_left, state_dir, users, world

__all__ = ["base", "image", "images", "leaks", "nothing_left", "state_dir", "users", "world"]


@pytest.fixture(scope="session")
def new_world(base: Path) -> Iterator[Callable[[str], World]]:
    """Makes a world that differs from the usual one by what a shell script does to it."""
    made: dict[str, World] = {}

    def make(script: str) -> World:
        if script not in made:
            made[script] = World(base / "nodes", script)
        return made[script]

    yield make
    for other in made.values():
        other.close()


@pytest.fixture
def new_user_run(
    base: Path, world: World, image: Path, nothing_left: None, request: pytest.FixtureRequest
) -> Iterator[Callable[[User], AsUser]]:
    """Makes the command for a user, whose state directory can be emptied by imgrun at the end."""
    made: list[AsUser] = []

    def make(user: User) -> AsUser:
        directory = Path(tempfile.mkdtemp(dir=base, prefix="test-"))
        os.chown(directory, user.uid, user.gid)
        run = AsUser(user, world, directory, image)
        made.append(run)
        if run.program(*COMMAND, "--help", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait():
            pytest.skip(f"{user.name} may not run {COMMAND[0]} or read the checkout")
        return run

    yield make
    for run in made:
        run.close()
        run.wrap, run.world = (), world
        empty_state(run, run.state)


@pytest.fixture
def run(new_user_run: Callable[[User], AsUser], users: Users) -> AsUser:
    """The command as a user with subordinate ids."""
    return new_user_run(users.ranged)


@pytest.fixture
def run_single(new_user_run: Callable[[User], AsUser], users: Users) -> AsUser:
    """The command as a user without subordinate ids."""
    return new_user_run(users.single)


@pytest.fixture(params=["ranged", "single"])
def run_any(request: pytest.FixtureRequest, new_user_run: Callable[[User], AsUser], users: Users) -> AsUser:
    """Each in turn."""
    return new_user_run(getattr(users, request.param))
