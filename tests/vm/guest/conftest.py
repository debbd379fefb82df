"""What the tests inside a guest share: imgrun as somebody, somewhere in the cgroup hierarchy."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

IMAGES = Path("/vm/images")
OUT = Path("/out")
KEEP = OUT / "keep"
"""What is put there reaches the guests that take this one's checkpoints, as GIVEN / NAME."""
GIVEN = Path("/vm/given")
PATIENCE = 150.0
"""Seconds of the guest's time. Its Python is 30 times slower than the host's."""
CGROUPS = Path("/sys/fs/cgroup")

SESSION = ("systemd-run", "--quiet", "--scope", "--slice=user-1000.slice", "--uid=1000", "--gid=1000")
USER_ENVIRONMENT = {"HOME": "/home/u", "USER": "u", "XDG_RUNTIME_DIR": "/run/user/1000", "PATH": os.environ.get("PATH", "")}


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


SQUASHFS_HAS_ID_MAPS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 2)
FALLBACK = "imgrun: warning: this kernel cannot id-map the file system of"


def complaints(done: Done) -> str:
    """What was said, apart from what must be said of a squashfs on an older kernel."""
    lines = done.stderr.splitlines()
    return "\n".join(line for line in lines if SQUASHFS_HAS_ID_MAPS or not line.startswith(FALLBACK))


class Imgrun:
    """``imgrun`` as root or as the ordinary user, by way of other programs that decide its cgroup."""

    def __init__(self, state: Path, way: tuple[str, ...] = (), user: bool = False) -> None:
        self.state = state
        self.user = user
        self.way = way
        self._processes: list[subprocess.Popen[str]] = []

    def popen(self, *words: str | Path) -> subprocess.Popen[str]:
        env = {**os.environ, **(USER_ENVIRONMENT if self.user else {}), "IMGRUN_STATE_DIR": str(self.state)}
        env.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            [*self.way, "imgrun", *map(str, words)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd="/",
        )  # fmt: skip
        self._processes.append(process)
        return process

    def __call__(self, *words: str | Path, timeout: float = PATIENCE) -> Done:
        process = self.popen(*words)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"imgrun {words}: no end in {timeout} s: {stdout!r} {stderr!r}") from None
        return Done(process.returncode, stdout, stderr)

    def good(self, *words: str | Path) -> str:
        """Run it, which must succeed without a word of complaint; its output."""
        done = self(*words)
        assert (done.status, complaints(done)) == (0, ""), done
        return done.stdout

    def record(self, job: str) -> dict[str, Any]:
        return dict(json.loads(self.good("inspect", job))["result"])

    def reaches(self, job: str, line: str) -> None:
        """Wait until the job has printed this line. Its file is looked at: ``imgrun logs`` takes a second here."""
        printed = self.state / "jobs" / job / "stdout"
        eventually(lambda: line in printed.read_text().splitlines(), lambda: f"{job} prints {line}: {self('logs', job)}")

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        if (self.state / "jobs").exists() and (jobs := sorted(os.listdir(self.state / "jobs"))):
            assert self("rm", "--force", *jobs).status == 0


def eventually(condition: Callable[[], Any], what: Callable[[], str]) -> Any:
    """Wait for the condition. ``what`` tells, at the end of all patience, what it was and how things stand."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not happen in {PATIENCE} s: {what()}"
        time.sleep(0.5)
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell a failure at once: should a later test hang, the console still has it."""
    if report.failed:
        print(f"\n{report.longreprtext[-3000:]}", flush=True)


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory that everybody may use."""
    path = Path(tempfile.mkdtemp(prefix="room-", dir="/var/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make(room: Path) -> Iterator[Callable[..., Imgrun]]:
    """Makes an ``Imgrun``; what it leaves is removed at the end, and then no cgroup nor mount of a job may be there."""
    made: list[Imgrun] = []
    before = mounts()

    def make(*way: str, user: bool = False, name: str = "state") -> Imgrun:
        made.append(Imgrun(room / f"{name}-{'u' if user else 'root'}", way, user))
        return made[-1]

    yield make
    for imgrun in made:
        imgrun.close()
    eventually(lambda: not list(job_cgroups()), lambda: f"cgroups go: {list(job_cgroups())}")
    # Under systemd all mounts are shared: one that a job makes must not come back to the host.
    assert mounts() == before, "a job changed the host's mounts"


def mounts() -> list[str]:
    """The host's mounts, but those that systemd itself makes when they are needed."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted(line.split(" ", 2)[2] for line in lines if " /run/credentials/" not in line and " /proc/sys/fs/" not in line)


def job_cgroups() -> Iterator[Path]:
    for path, names, _ in os.walk(CGROUPS):  # which passes over what goes meanwhile
        yield from (Path(path, name) for name in names if name.startswith("imgrun-") and name != "imgrun-host")


@pytest.fixture
def root(make: Callable[..., Imgrun]) -> Imgrun:
    """As root, in a delegated unit."""
    return make()


@pytest.fixture
def user(make: Callable[..., Imgrun]) -> Imgrun:
    """As an ordinary user in a login session."""
    return make(*SESSION, user=True)


@pytest.fixture(scope="session", autouse=True)
def facts() -> Iterator[dict[str, Any]]:
    """What the guest is, and what was found out about it, for the table of docs/compatibility.md."""
    import imgrun_criu

    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    build = json.loads(Path(imgrun_criu.__file__).with_name("build.json").read_text())
    facts: dict[str, Any] = {
        "kernel": platform.release(), "machine": platform.machine(), "python": platform.python_version(),
        "system": release["PRETTY_NAME"].strip('"'), "criu": f"{build['version']} ({len(build['patches'])} patches)",
    }  # fmt: skip
    yield facts
    (OUT / "facts.json").write_text(json.dumps(facts, indent=2))
