"""A checkpoint gets its name whole and at once, whoever gives it, and the newer one stays."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from imgrun import syscalls as sc
from imgrun.checkpoints import captured, manifest
from imgrun.checkpoints.placing import adopt, publish, put_in_place
from imgrun.errors import CheckpointError
from imgrun.spec import JobSpec

SPEC = JobSpec(image="/i", command=("c",))


def make(path: Path, name: str) -> Path:
    """A complete checkpoint without a job in it, made as ``name``."""
    (path / "files").mkdir(parents=True)
    (path / "processes").mkdir()
    (path / "work").mkdir()
    (path / "work/criu.log").write_text("log")
    record = {
        "format": manifest.FORMAT, "imgrun": "1", "job": name, "id": name, "created_at": "2026-01-01T00:00:00.000Z",
        "spec": SPEC.to_dict(), "layers": [*captured.LAYERS], "memory": captured.memory_places(SPEC), "image": {}, "files": {},
        "statistics": {}, "usage": {"wall_seconds": 0}, "ids": {"uid": []}, "streams": {"0": "", "1": "", "2": ""},
        "host": {"machine": "x", "kernel": "6", "cpu": {"features": []}}, "last_pid": 1, "userns": True, "rootless": False,
        "hostname": "h",
    }  # fmt: skip
    text = json.dumps(record | {"checksum": manifest.checksum(record)}, indent=1)
    (path / manifest.MANIFEST).write_text(text)
    return path


def name_of(path: Path) -> str:
    return str(manifest.load(str(path)).manifest["job"])


@pytest.fixture(params=["at once", "one after the other"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How two names are exchanged: as on a local file system, or on NFS, which has no way to."""
    if request.param != "at once":

        def refuse(one: str, other: str) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), one)

        monkeypatch.setattr(sc, "exchange", refuse)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("older", ["none", "empty", "checkpoint"])
def test_it_gets_its_name_and_what_the_job_wrote(tmp_path: Path, older: str) -> None:
    building, target, scratch = make(tmp_path / "c.j.new", "new"), tmp_path / "c", tmp_path / "scratch"
    (tmp_path / "c.j.new.old").mkdir()  # of one who was killed in between
    if older == "empty":
        target.mkdir()
    elif older == "checkpoint":
        make(target, "old")
    for layer in ("upper", "tmp"):
        (scratch / layer).mkdir(parents=True)
        (scratch / layer / "mine").write_text("scratch")
    (building / "files/tmp").mkdir()
    put_in_place(str(building), str(target), str(scratch))
    assert name_of(target) == "new"
    assert (target / "files/upper/mine").read_text() == "scratch"
    assert not (target / "files/tmp/mine").exists(), "what was saved while the job stood still is not replaced"
    assert sorted(path.name for path in target.iterdir()) == ["dump.log", "files", "manifest.json", "processes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "scratch"]


def test_at_no_moment_is_there_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building, target = make(tmp_path / "c.j.new", "new"), make(tmp_path / "c", "old")
    seen = []
    real = os.rename

    def rename(source: str, to: str) -> None:
        seen.append(name_of(target))
        try:
            real(source, to)
        finally:
            seen.append(name_of(target))

    monkeypatch.setattr(os, "rename", rename)
    put_in_place(str(building), str(target), str(tmp_path / "scratch"))
    assert set(seen) == {"old"}, "by renaming alone it goes away first"
    assert name_of(target) == "new"


def test_files_that_cannot_be_moved_are_copied_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building, scratch = make(tmp_path / "c.j.new", "new"), tmp_path / "scratch"
    (scratch / "upper").mkdir(parents=True)
    (scratch / "upper/mine").write_text("scratch")
    (building / "files/upper.part").mkdir()  # of one who was killed while copying
    real = os.rename

    def rename(source: str, to: str) -> None:
        if source == f"{scratch}/upper":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    put_in_place(str(building), str(tmp_path / "c"), str(scratch))
    assert [path.name for path in (tmp_path / "c/files").iterdir()] == ["upper"]
    assert (tmp_path / "c/files/upper/mine").read_text() == "scratch"


def test_a_name_that_something_else_has_got_meanwhile(tmp_path: Path) -> None:
    building, target = make(tmp_path / "c.j.new", "new"), tmp_path / "c"
    target.write_text("a file")
    with pytest.raises(CheckpointError, match=f"it is no directory; the checkpoint is complete, and is {building}"):
        put_in_place(str(building), str(target), str(tmp_path / "scratch"))
    assert name_of(building) == "new"
    target.unlink()
    assert adopt(str(building), str(target), str(tmp_path / "scratch"), "new")
    assert name_of(target) == "new"


def test_what_was_in_its_place_already_stays_there(tmp_path: Path) -> None:
    """Its maker was killed before it could remove the older one."""
    target, building = make(tmp_path / "c", "new"), make(tmp_path / "c.j.new", "old")
    assert adopt(str(building), str(target), str(tmp_path / "scratch"), "new")
    assert name_of(target) == "new"
    assert not building.exists()


def test_what_is_not_complete_or_somebody_elses_is_not_adopted(tmp_path: Path) -> None:
    building, target = make(tmp_path / "c.j.new", "new"), tmp_path / "c"
    assert not adopt(str(building), str(target), str(tmp_path / "scratch"), "another")
    (building / manifest.MANIFEST).rename(building / "manifest.json.new")
    assert not adopt(str(building), str(target), str(tmp_path / "scratch"), "new")
    publish(str(building))
    if os.geteuid() == 0:
        os.chown(building, 1234, 1234)
        assert not adopt(str(building), str(target), str(tmp_path / "scratch"), "new")
    assert not target.exists()
