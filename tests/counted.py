"""A program for jobs that does a known amount of something (``counted.c``), and jobs that run it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command import Done, Imgrun, eventually

from images import run as run_tool


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A directory with the program ``counted``, which everybody may read."""
    with tempfile.TemporaryDirectory(prefix="imgrun-counted-") as name:
        path = Path(name)
        path.chmod(0o755)
        source = Path(__file__).with_name("counted.c")
        run_tool("cc", "-O1", "-static", "-pthread", "-o", path / "counted", source)
        yield path


class Measured:
    """Jobs that have ``counted`` in /x and their record written down."""

    def __init__(self, run: Imgrun, programs: Path, directory: Path) -> None:
        self.run = run
        self.directory = directory
        self.flags = ("--bind", f"{programs}:/x:ro")
        self.record: dict[str, Any] = {}

    def sh(self, script: str, *flags: str | Path, **options: Any) -> Done:
        """A script in the foreground; its record is in ``record`` then."""
        path = self.directory / "record.json"
        done = self.run.sh(script, *self.flags, "--result", path, *flags, **options)
        self.record = json.loads(path.read_text())
        path.unlink()
        return done

    @property
    def usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = self.record["usage"]
        return usage

    @property
    def counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = self.usage["counts"]
        return counts

    def background(self, script: str, *flags: str | Path) -> str:
        return self.run.background(script, *self.flags, *flags)

    def state(self, job: str) -> str:
        return str(self.inspect(job)["state"])

    def inspect(self, job: str) -> dict[str, Any]:
        done = self.run("inspect", job)
        assert done.status == 0, done
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    def becomes(self, job: str, state: str) -> None:
        eventually(lambda: self.state(job) == state, f"{job} is {state}")

    def prints(self, job: str, line: str) -> None:
        eventually(lambda: line in self.run("logs", job).stdout.splitlines(), f"{job} prints {line!r}")


@pytest.fixture
def measured(run: Imgrun, programs: Path, tmp_path: Path) -> Measured:
    return Measured(run, programs, tmp_path)


needs_criu = pytest.mark.skipif(find_spec("imgrun_criu") is None, reason="imgrun-criu is not installed")
