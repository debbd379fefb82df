"""Hostile images and jobs: the image that is made for a test, what is tried, and the host that must not change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Done, Imgrun

from images import build_tree, make_filesystem
from images import run as run_tool

MARK = "of the host"


def compile_attack(directory: Path) -> Path:
    """The program of ``attack.c``, which needs nothing of an image."""
    program = directory / "attack"
    run_tool("cc", "-O1", "-static", "-o", program, Path(__file__).with_name("attack.c"))
    return program


class Host:
    """A directory outside of any job, and whether it is as it was.

    It is not below /tmp or /var: links to it would lead through what they take the place of.
    """

    def __init__(self) -> None:
        self.path = path = Path(tempfile.mkdtemp(prefix="imgrun-host-", dir="/srv"))
        for name in ("etc", "tmp", "var/tmp", "proc", "sys", "dev", "data"):
            (path / name).mkdir(parents=True)
        for name in ("hosts", "hostname", "resolv.conf", "passwd"):
            (path / "etc" / name).write_text(MARK)
            (path / "etc" / name).chmod(0o666)
        (path / "data").chmod(0o777)
        self._before = self.snapshot()

    def snapshot(self) -> dict[str, tuple[object, ...]]:
        """Everything that could change, by path."""
        found = {}
        for path in (self.path, *sorted(self.path.rglob("*"))):
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content)
        return found

    def check(self) -> None:
        assert self.snapshot() == self._before, "a job changed the host"

    def remove(self) -> None:
        shutil.rmtree(self.path)


class Hostile:
    """An image being made, the command to start it, and a host to watch."""

    def __init__(self, directory: Path, attack: Path, command: Imgrun) -> None:
        self.directory = directory
        self.tree = build_tree(directory / "tree")
        self.host = Host()
        self.attack = attack
        shutil.copy(attack, self.tree / "bin/attack")
        self._command = command
        self._image: Path | None = None

    @property
    def image(self) -> Path:
        if self._image is None:
            self._image = make_filesystem("ext4", self.directory / "image", self.tree)
        return self._image

    def replace(self, name: str) -> Path:
        """The path of something in the image, which is removed first."""
        path = self.tree / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return path

    def start(self, *words: str | Path, **options: object) -> Done:
        """``imgrun start`` with flags, ``--`` and a command. The host must be as before."""
        place = words.index("--")
        done = self._command("start", *words[:place], self.image, *words[place:], **options)
        self.host.check()
        return done

    def sh(self, script: str, *flags: str | Path, **options: object) -> Done:
        return self.start(*flags, "--", "/bin/busybox", "sh", "-c", script, **options)

    def tries(self, *attempts: str, flags: tuple[str | Path, ...] = ()) -> dict[str, str]:
        """What comes of each attempt (the words of ``attack``) in one job."""
        done = self.sh("\n".join(f"/bin/attack {attempt}" for attempt in attempts), *flags)
        outcomes = done.stdout.splitlines()
        assert len(outcomes) == len(attempts), done
        return dict(zip(attempts, outcomes, strict=True))

    def outside(self, *words: str | Path) -> str:
        """What comes of the same on the host: by root, in a mount namespace of its own so that nothing stays."""
        command = ["unshare", "--mount", "--propagation", "private", str(self.attack), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.directory, timeout=30)
        assert done.returncode == 0, done
        return done.stdout.strip()


def as_user(uid: int, program: Path, *words: str) -> str:
    """The output of a program that an ordinary user executes, wherever it lies."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(program, os.O_RDONLY)
            os.dup2(writing, 1)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.execve(fd, [program.name, *words], {})
        finally:
            os._exit(99)
    os.close(writing)
    with open(reading) as f:
        output = f.read()
    assert os.waitpid(pid, 0)[1] == 0
    return output


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_attack(tmp_path_factory.mktemp("attack"))


@pytest.fixture
def hostile(tmp_path: Path, attack: Path, run: Imgrun) -> Iterator[Hostile]:
    made = Hostile(tmp_path, attack, run)
    yield made
    made.host.check()
    made.host.remove()


@pytest.fixture(params=["auto", "off"])
def userns(request: pytest.FixtureRequest) -> tuple[str, str]:
    return ("--userns", request.param)
