"""``imgrun start --htcondor`` where no HTCondor is, as in a first try of a job: it runs, and nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import Imgrun, refused

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs, with its state there too, as by default."""
    monkeypatch.delenv("IMGRUN_STATE_DIR")
    path = tmp_path / "here"
    path.mkdir()
    path.chmod(0o777)  # root of the job is not the host's
    return path


def test_a_job(run: Imgrun, here: Path) -> None:
    done = run.sh("echo ran >out; exit 3", "--htcondor", cwd=here)
    assert done.status == 3, done
    assert os.listdir(here) == ["out"]


@pytest.mark.parametrize("words", [("--dry-run",), ("--memory", "lots"), ("--tty",), ("--workdir", "/nowhere")])
def test_what_does_not_start(run: Imgrun, here: Path, words: tuple[str, ...]) -> None:
    done = run.sh("true", "--htcondor", *words, cwd=here)
    assert (done.status == 0) == (words == ("--dry-run",)), done
    assert os.listdir(here) == []


def test_without_an_image(run: Imgrun, here: Path) -> None:
    done = run("start", "--htcondor", here / "none.img", "--", "true", cwd=here)
    assert done.status == 125, done
    assert "none.img" in done.stderr
    assert os.listdir(here) == []


def test_where_nobody_may_write(run: Imgrun, here: Path) -> None:
    refused(run.sh("true", "--htcondor", cwd="/sys"), 125, "the sandbox /sys cannot be written to")


def test_another_job_beside_it(run: Imgrun, here: Path) -> None:
    """Which has its state in the same directory."""
    (here / ".imgrun/state/jobs/0123456789ab").mkdir(parents=True)
    assert run.sh("true", "--htcondor", cwd=here).status == 0
    assert (here / ".imgrun/state/jobs/0123456789ab").is_dir()
