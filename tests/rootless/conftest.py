"""imgrun as an ordinary user: who, where, and with which images."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import COMMAND
from ordinary import AsUser, User, UserLeaks, Users, World

from images import Images, sha256


@pytest.fixture(scope="session")
def users() -> Iterator[Users]:
    users = Users()
    yield users
    users.close()


@pytest.fixture(scope="session")
def base(users: Users) -> Iterator[Path]:
    """A directory that the users can reach, as they cannot that of pytest's."""
    top = Path(tempfile.mkdtemp(prefix="imgrun-rootless-"))
    top.chmod(0o755)
    path = top / "session"
    path.mkdir()
    yield path
    shutil.rmtree(top)


@pytest.fixture(scope="session")
def world(base: Path, users: Users) -> Iterator[World]:
    world = World(base / "nodes")
    yield world
    world.close()


@pytest.fixture(scope="session")
def new_world(base: Path) -> Iterator[Callable[[str], World]]:
    """Makes a world that differs from the usual one by what a shell script does to it."""
    made: dict[str, World] = {}

    def make(script: str) -> World:
        if script not in made:
            made[script] = World(base / "nodes", script)
        return made[script]

    yield make
    for world in made.values():
        world.close()


@pytest.fixture(scope="session")
def leaks(base: Path, users: Users, world: World) -> Iterator[UserLeaks]:
    leaks = UserLeaks(base, users)
    yield leaks
    leaks.check()


@pytest.fixture(autouse=True)
def nothing_left(leaks: UserLeaks) -> Iterator[None]:
    """No test leaves a process of the users, a mount, a cgroup or a loop device."""
    yield
    leaks.check()


@pytest.fixture(scope="session")
def images(base: Path) -> Images:
    (base / "images").mkdir()
    return Images(base / "images")


@pytest.fixture(scope="session")
def image(images: Images) -> Iterator[Path]:
    """The squashfs that most tests use. No byte of it ever changes."""
    path = images.filesystem("squashfs")
    before = sha256(path)
    yield path
    assert sha256(path) == before


@pytest.fixture
def state_dir() -> None:
    """Each user has a state directory of his own: see ``run``."""


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
        if (run.state / "jobs").exists():
            for words in (("rm", "--force", *sorted(os.listdir(run.state / "jobs"))), ("gc",)):
                if words != ("rm", "--force"):
                    assert run(*words).status == 0, words
            left = sorted(str(path.relative_to(run.state)) for path in run.state.glob("*/*"))
            assert left == [], "imgrun cannot clean its state directory"


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
