"""Ordinary users for the tests, and the command run as one of them.

Two users are made for a session and found again by the next: one with subordinate ids, one without. A lock keeps two
sessions at once from having the same. The commands run in a private mount namespace whose /dev/fuse and /dev/net/tun may
be opened by everyone, as udev makes them on a usual host; the host's own nodes stay as they are.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import COMMAND, Imgrun
from leaks import Leaks, read

from images import Images, sha256

PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
RANGE = 65536
LOCKS = "/run/lock/imgrun-tests"


class User(NamedTuple):
    """Somebody without a privilege."""

    name: str
    uid: int
    gid: int
    home: str
    ranges: tuple[tuple[int, int], ...]
    """(first, count) of the subordinate ids; none for who has none."""

    def owns(self, uid: int) -> bool:
        return uid == self.uid or any(first <= uid < first + count for first, count in self.ranges)


class Users:
    """The users of this session; :meth:`close` lets another session have them."""

    def __init__(self) -> None:
        os.makedirs(LOCKS, mode=0o700, exist_ok=True)
        for number in range(100):
            self._lock = os.open(f"{LOCKS}/{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                os.close(self._lock)
        self.ranged = make_user(f"imgrun-test{number}", subordinate=True)
        self.single = make_user(f"imgrun-test{number}-1", subordinate=False)

    def close(self) -> None:
        os.close(self._lock)


def make_user(name: str, *, subordinate: bool) -> User:
    """The user of this name, made if there is none yet."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        ids = [] if subordinate else ["-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"]
        subprocess.run(["useradd", "-m", "-s", "/bin/sh", *ids, name], check=True, capture_output=True)
        entry = pwd.getpwnam(name)
    if subordinate and not _ranges(name):
        first = max((int(line.split(":")[1]) + int(line.split(":")[2]) for line in _table()), default=100000)
        span = f"{first}-{first + RANGE - 1}"
        subprocess.run(["usermod", "--add-subuids", span, "--add-subgids", span, name], check=True, capture_output=True)
    ranges = _ranges(name)
    assert bool(ranges) == subordinate, f"{name} has the subordinate ids {ranges}"
    return User(name, entry.pw_uid, entry.pw_gid, entry.pw_dir, ranges)


def _table() -> list[str]:
    return read(Path("/etc/subuid")).split()


def _ranges(name: str) -> tuple[tuple[int, int], ...]:
    rows = [line.split(":") for line in _table()]
    return tuple((int(first), int(count)) for who, first, count in rows if who == name)


def _way_to_the_checkout(place: str) -> str:
    """Commands that let everyone reach the checkout where it lies in somebody's closed directory."""
    checkout = Path(__file__).parents[1]
    closed = next((parent for parent in reversed(checkout.parents) if not parent.stat().st_mode & 0o001), None)
    if closed is None:
        return ""
    return f"""
            mkdir {place}
            mount --bind {checkout} {place}
            mount -t tmpfs -o mode=755 way {closed}
            mkdir -p {checkout}
            mount --move {place} {checkout}
    """


class World:
    """A mount namespace for commands to run in: the host's, changed by a shell script that root runs in it."""

    def __init__(self, scratch: Path, script: str = "") -> None:
        scratch.mkdir(exist_ok=True)
        nodes = f"""
            mount -t tmpfs -o mode=755 nodes {scratch}
            mknod -m 666 {scratch}/fuse c 10 229
            mknod -m 666 {scratch}/tun c 10 200
            [ ! -e /dev/fuse ] || mount --bind {scratch}/fuse /dev/fuse
            [ ! -e /dev/net/tun ] || mount --bind {scratch}/tun /dev/net/tun
            {_way_to_the_checkout(f"{scratch}/checkout")}
            umount -l {scratch}
        """
        self._process = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-euc", f"{nodes}\n{script}\necho ready; exec cat >&2"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = self._process.pid

    def words(self, user: User) -> list[str]:
        """What goes before a command to run it here as the user. It stays one process."""
        return [
            "nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--",
            "setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups", "--inh-caps=-all", "--",
        ]  # fmt: skip

    def close(self) -> None:
        self._process.communicate()


class AsUser(Imgrun):
    """Runs imgrun as an ordinary user, with a state directory and an environment of the user's own.

    ``wrap`` of a call are words before the command, as ``unshare -U``.
    """

    def __init__(self, user: User, world: World, directory: Path, image: Path) -> None:
        super().__init__(image)
        self.user = user
        self.world = world
        self.directory = directory
        self.state = directory / "state"
        self.wrap: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        return {"HOME": self.user.home, "USER": self.user.name, "PATH": PATH, "IMGRUN_STATE_DIR": str(self.state)}

    def popen(self, *words: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        return self.program(*self.wrap, *COMMAND, *words, env=env, **options)

    def program(self, *words: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Any program as the user."""
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        streams["bufsize"] = 0  # what readline() had read ahead, communicate() would not return
        process = subprocess.Popen(
            [*self.world.words(self.user), *map(str, words)],
            env={**self.environment(), **(env or {})}, cwd="/", **{**streams, **options},
        )  # fmt: skip
        self._processes.append(process)
        return process

    def processes(self, name: str = "") -> list[int]:
        """The user's processes, those with subordinate ids too, whose command has this name."""
        return [pid for pid in processes_of(self.user) if not name or read(Path(f"/proc/{pid}/comm")).strip() == name]


def processes_of(*users: User) -> list[int]:
    """All processes that have a real uid of one of the users."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        uids = [line.split()[1] for line in read(Path(f"/proc/{pid}/status")).splitlines() if line.startswith("Uid:")]
        if uids and any(user.owns(int(uids[0])) for user in users):
            found.append(pid)
    return sorted(found)


class UserLeaks(Leaks):
    """What the users' jobs left behind: also any process of theirs at all."""

    def __init__(self, base: Path, users: Users) -> None:
        super().__init__(base, (users.ranged.uid, users.single.uid))
        self._users = users

    def left(self) -> list[str]:
        processes = [
            f"process {pid}: {read(Path(f'/proc/{pid}/cmdline')).replace(chr(0), ' ')}"
            for pid in processes_of(self._users.ranged, self._users.single)
        ]
        return [*super().left(), *processes]


def empty_state(run: Imgrun, state: Path) -> None:
    """See that imgrun leaves nothing in its state directory when it is asked to."""
    if not (state / "jobs").exists():
        return
    if jobs := sorted(os.listdir(state / "jobs")):
        assert run("rm", "--force", *jobs).status == 0
    assert run("gc").status == 0
    left = sorted(str(path.relative_to(state)) for path in state.glob("*/*"))
    assert left == [], "imgrun cannot clean its state directory"


def has_route() -> bool:
    """Whether there is a way out that a private network could lead to."""
    rows = [line.split() for line in read(Path("/proc/net/route")).splitlines()[1:]]
    return any(row[1] == "0" * 8 for row in rows)


# -- fixtures, for the directories of tests whose conftest imports them ---------------------------------------------------


@pytest.fixture(scope="session")
def users() -> Iterator[Users]:
    users = Users()
    yield users
    users.close()


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A directory that the users can reach, as they cannot that of pytest's. Its path is short: there may be sockets in it."""
    top = Path(tempfile.mkdtemp(prefix="imgrun-tests-"))
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
def leaks(base: Path, users: Users, world: World) -> Iterator[UserLeaks]:
    leaks = UserLeaks(base, users)
    yield leaks
    leaks.check()


@pytest.fixture(autouse=True)
def nothing_left(leaks: UserLeaks) -> Iterator[None]:
    """No test leaves a process of the users, a mount, a cgroup or a loop device."""
    yield
    leaks.check()


@pytest.fixture
def state_dir() -> None:
    """Whoever runs imgrun has a state directory of his own."""


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
