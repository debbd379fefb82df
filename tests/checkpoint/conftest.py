"""Freezing and continuing, each test as root and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, Done, Imgrun, eventually
from ordinary import AsUser, Users, World, base, empty_state, image, images, leaks, nothing_left, state_dir, users, world

__all__ = ["base", "image", "images", "leaks", "nothing_left", "state_dir", "users", "world"]


class AsRoot(Imgrun):
    """Runs imgrun as root, with a state directory below ``directory``."""

    def __init__(self, directory: Path, image: Path) -> None:
        super().__init__(image)
        self.directory = directory
        self.state = directory / "state"
        self.before: tuple[str, ...] = ()
        """Words before the command."""

    def popen(self, *words: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        streams["bufsize"] = 0  # what readline() had read ahead, communicate() would not return
        environment = {**os.environ, "IMGRUN_STATE_DIR": str(self.state), **(env or {})}
        process = subprocess.Popen(
            [*self.before, *COMMAND, *map(str, words)], env=environment, **{**streams, **options}
        )  # fmt: skip
        self._processes.append(process)
        return process


class Rig:
    """The command as somebody, a directory of theirs, and what every test of this kind does."""

    def __init__(self, run: AsRoot | AsUser, root: bool) -> None:
        self.run = run
        self.root = root
        self.directory = run.directory

    @property
    def image(self) -> str:
        return self.run.image

    def path(self, name: str) -> Path:
        """A path in the directory that tests may use."""
        return self.directory / name

    def make(self, name: str, content: str | None = None) -> Path:
        """A file, or without content a directory, that belongs to whoever runs imgrun."""
        path = self.directory / name
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        self.give(path)
        return path

    def give(self, path: Path) -> None:
        if isinstance(self.run, AsUser):
            os.chown(path, self.run.user.uid, self.run.user.gid)

    def output(self, job: str) -> list[str]:
        return self.run("logs", job).stdout.splitlines()

    def reaches(self, job: str, line: str) -> None:
        """Wait until the job has printed this line."""
        eventually(lambda: line in self.output(job), f"{job} prints {line}")

    def freeze(self, job: str, name: str = "c", *words: str) -> Path:
        """Freeze to a directory, which has to succeed."""
        target = self.path(name)
        done = self.run("checkpoint", *words, "--to", target, job)
        assert done == Done(0, "", ""), done
        return target

    def restore(self, target: Path, *words: str | Path, **options: object) -> Done:
        return self.run("restore", *words, target, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["root", "user"])
def rig(
    request: pytest.FixtureRequest, base: Path, users: Users, world: World, image: Path, nothing_left: None
) -> Iterator[Rig]:
    directory = Path(tempfile.mkdtemp(dir=base, prefix=f"{request.param}-"))
    run: AsRoot | AsUser
    if request.param == "root":
        run = AsRoot(directory, image)
    else:
        run = AsUser(users.ranged, world, directory, image)
        os.chown(directory, users.ranged.uid, users.ranged.gid)
    yield Rig(run, request.param == "root")
    run.close()
    empty_state(run, run.state)
