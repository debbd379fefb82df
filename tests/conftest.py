"""What all tests share: a state directory for each, the command, an image, and the look for what was left behind."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("command", "forked", "images", "leaks")

from command import Imgrun  # noqa: E402
from leaks import Leaks  # noqa: E402

from images import Images, clean_afterwards, images  # noqa: E402

__all__ = ["clean_afterwards", "images"]

settings.register_profile("imgrun", deadline=None)
settings.load_profile("imgrun")

REQUIRED = os.environ.get("IMGRUN_CI_REQUIRE", "") not in ("", "0")


# -- where nothing may be missing, a skip is a failure -----------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"IMGRUN_CI_REQUIRE is set, and this was skipped: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"IMGRUN_CI_REQUIRE is set, and this was skipped: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> object:
    return longrepr[2] if isinstance(longrepr, tuple) else longrepr


# -- who must run them --------------------------------------------------------------------------------------------------

OF_ROOT = {
    "checkpoint": "needs root, to be root and to become an ordinary user",
    "rootless": "needs root, to become an ordinary user",
    "schedulers": "needs root, to start a scheduler's daemons and become an ordinary user",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        for part in OF_ROOT.keys() & set(item.path.parts):
            item.add_marker(pytest.mark.skip(reason=OF_ROOT[part]))


# -- what is left behind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaks]:
    """Looks for what jobs of this session left on the machine; also once at the session's end."""
    leaks = Leaks(tmp_path_factory.getbasetemp())
    yield leaks
    leaks.check()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No integration test leaves a loop device, mount, cgroup or process, whatever it does to imgrun."""
    if "integration" not in request.path.parts or os.geteuid() != 0:
        yield
        return
    leaks: Leaks = request.getfixturevalue("leaks")
    yield
    leaks.check()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def state_dir(
    request: pytest.FixtureRequest, nothing_left: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The test's own state directory, for the command and the library alike. At the end it can be emptied by imgrun."""
    path = tmp_path / "state"
    monkeypatch.setenv("IMGRUN_STATE_DIR", str(path))
    yield path
    if "integration" in request.path.parts and (path / "live").exists():
        from imgrun.job import Job, collect
        from imgrun.state import StateRoot

        root = StateRoot(str(path))
        for job in Job.all():
            job.remove(force=True)
        collect(root)
        assert records(path) == [], "imgrun cannot clean its state directory"


def records(state: Path) -> list[str]:
    """All that is kept of jobs in a state directory, by relative paths."""
    return sorted(str(path.relative_to(state)) for path in state.glob("*/*"))


@pytest.fixture(scope="session")
def image(images: Images) -> Path:
    """A small ext4 image with busybox. Not to be changed."""
    return images.filesystem("ext4")


@pytest.fixture
def run(request: pytest.FixtureRequest, state_dir: Path) -> Iterator[Imgrun]:
    """The command, with ``image``."""
    imgrun = Imgrun(request.getfixturevalue("image"))
    yield imgrun
    imgrun.close()
