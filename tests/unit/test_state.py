"""The state root: names, locks and leftovers, and what is said when it cannot be used."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import records

from imgrun import job as jobs
from imgrun.errors import HostError, JobNotFound, NameInUse, NoSpace, PrivilegeError
from imgrun.state import JobDir, StateRoot, claim, default_root, now, process_start, state_error


@pytest.fixture
def root(state_dir: Path) -> StateRoot:
    return StateRoot(str(state_dir))


def make(root: StateRoot, name: str | None = None, *, keep: bool = True) -> JobDir:
    return root.create({"image": "/i", "command": ["true"], **({"name": name} if name else {})}, keep=keep)


def die(job: JobDir) -> None:
    """What the death of a supervisor does."""
    os.close(job.lock_fd)
    job.lock_fd = -1


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGRUN_STATE_DIR", "rel")
    assert default_root() == f"{os.getcwd()}/rel"
    monkeypatch.delenv("IMGRUN_STATE_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root() == "/var/lib/imgrun"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_root() == "/home/me/.local/state/imgrun"
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_root() == "/x/imgrun"
    monkeypatch.setenv("XDG_STATE_HOME", "rel")
    assert default_root() == "/home/me/.local/state/imgrun"
    monkeypatch.setenv("HOME", "rel")
    assert default_root() == f"{os.getcwd()}/rel/.local/state/imgrun"


def test_a_new_job_is_alive_and_private(root: StateRoot) -> None:
    job = make(root, "n")
    assert job.alive()
    assert job.name == "n"
    assert root.ids() == [job.id]
    assert root.leftovers() == []
    assert os.stat(root.path).st_mode & 0o777 == os.stat(job.path).st_mode & 0o777 == 0o700
    assert not claim(job), "a live job was taken for dead"


def test_the_end_of_a_job_leaves_nothing(root: StateRoot) -> None:
    job = make(root, "n")
    job.remove()
    job.release(ended=True)
    assert records(Path(root.path)) == []
    assert not job.alive()


def test_a_dead_supervisor_leaves_something_that_is_found_once(root: StateRoot) -> None:
    job = make(root)
    die(job)
    assert not job.alive()
    (found,) = root.leftovers()
    assert found.id == job.id
    assert claim(found)
    assert not claim(JobDir(root, job.id)), "claimed twice"
    assert job.alive(), "while it is cleaned, nobody else may touch it"
    found.release(ended=True)
    assert root.leftovers() == []


def test_collect_keeps_the_record_of_a_lost_job_that_is_to_be_kept(root: StateRoot) -> None:
    kept, dropped = make(root, "kept"), make(root, "dropped", keep=False)
    for job in (kept, dropped):
        (Path(job.path) / "scratch/upper").mkdir(parents=True)
        die(job)
    assert sorted(jobs.collect(root)) == sorted([kept.id, dropped.id])
    assert records(Path(root.path)) == [f"jobs/{kept.id}", "names/kept"]
    assert sorted(os.listdir(kept.path)) == ["job.json", "result.json", "spec.json", "state.json"]
    assert json.loads((Path(kept.path) / "result.json").read_text())["reason"] == "lost"
    assert jobs.collect(root) == []


@pytest.mark.parametrize("torn", ["spec.json", "job.json", "state.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"keep": 1, "cgroups": [1, "/x"], "init": "x"}'])
def test_collect_copes_with_torn_records(root: StateRoot, torn: str, content: str) -> None:
    job = make(root, "n")
    (Path(job.path) / torn).write_text(content)
    die(job)
    assert jobs.collect(root) == [job.id]
    assert not job.alive()
    if torn == "spec.json" and "keep" not in content:
        job.remove()
        assert records(Path(root.path)) == []


def test_a_supervisor_that_dies_while_it_takes_its_lock_leaves_nothing_for_long(root: StateRoot) -> None:
    root.prepare()
    fresh, old = Path(root.path, "live/.0123456789ab"), Path(root.path, "live/.ba9876543210")
    for path in (fresh, old):
        path.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    jobs.collect(root)
    assert not old.exists()
    assert fresh.exists(), "this one may be about to be locked"
    fresh.unlink()


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_are_unique(root: StateRoot) -> None:
    first = make(root, "n")
    with pytest.raises(NameInUse, match=first.id):
        make(root, "n")
    assert len(records(Path(root.path))) == 3, "the second start left something"
    first.remove()
    first.release(ended=True)
    make(root, "n")


def test_names_are_unique_under_a_race(root: StateRoot) -> None:
    root.prepare()
    barrier = threading.Barrier(16)
    results: list[JobDir | NameInUse] = []

    def start() -> None:
        barrier.wait()
        try:
            results.append(make(root, "n"))
        except NameInUse as e:
            results.append(e)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert sum(isinstance(r, JobDir) for r in results) == 1


def test_a_name_without_a_job_is_free(root: StateRoot) -> None:
    root.prepare()
    os.symlink("0123456789ab", f"{root.path}/names/n")
    assert root.find(make(root, "n").id).name == "n"


def test_a_name_that_another_has_just_taken_over_is_not_taken_from_it(
    root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts find the same stale name; the second to act must see the first's."""
    root.prepare()
    os.symlink("0123456789ab", f"{root.path}/names/n")
    look = StateRoot._linked
    rivals: list[JobDir] = []

    def look_slowly(link: str) -> str | None:
        found = look(link)
        if not rivals:
            monkeypatch.setattr(StateRoot, "_linked", staticmethod(look))
            rivals.append(make(root, "n"))
        return found

    monkeypatch.setattr(StateRoot, "_linked", staticmethod(look_slowly))
    with pytest.raises(NameInUse):
        make(root, "n")
    assert root.find("n").id == rivals[0].id


def test_find(root: StateRoot) -> None:
    job = make(root, "n")
    for wanted in ("n", job.id, job.id[:3]):
        assert root.find(wanted).id == job.id
    for wanted in ("", ".", "..", "../n", "n/", "zz", "/", ".x"):
        with pytest.raises(JobNotFound):
            root.find(wanted)


def test_find_says_when_a_prefix_is_not_enough(root: StateRoot) -> None:
    root.prepare()
    for job_id in ("aaaa", "aabb", "aa"):
        os.mkdir(f"{root.path}/jobs/{job_id}")
    with pytest.raises(JobNotFound, match="3 jobs"):
        root.find("a")
    assert root.find("aa").id == "aa", "a whole id is never ambiguous"
    assert root.find("aab").id == "aabb"


def test_a_name_goes_before_an_id(root: StateRoot) -> None:
    first = make(root)
    second = make(root, first.id[:6])
    assert root.find(first.id[:6]).id == second.id


# -- files -------------------------------------------------------------------------------------------------------------


def test_write_is_complete_or_absent(root: StateRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(root)
    job.write("state.json", {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(NoSpace):
        job.write("state.json", {"a": 2})
    monkeypatch.undo()
    assert job.read("state.json") == {"a": 1}


def test_read_of_what_is_not_there(root: StateRoot) -> None:
    job = make(root)
    assert job.read("absent.json") == {}
    (Path(job.path) / "x.json").write_bytes(b"\xff")
    assert job.read("x.json") == {}


def test_prepare_refuses_a_directory_that_others_can_write(state_dir: Path) -> None:
    state_dir.mkdir()
    state_dir.chmod(0o777)
    with pytest.raises(PrivilegeError, match="not yours alone"):
        StateRoot(str(state_dir)).prepare()


def test_prepare_refuses_what_is_no_directory(state_dir: Path) -> None:
    state_dir.touch()
    with pytest.raises(HostError, match=str(state_dir)):
        StateRoot(str(state_dir)).prepare()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EROFS, PrivilegeError), (errno.EACCES, PrivilegeError),
     (errno.EIO, HostError)],
)  # fmt: skip
def test_state_error(number: int, kind: type[Exception]) -> None:
    error = state_error(OSError(number, os.strerror(number)), "/x")
    assert type(error) is kind
    assert "/x" in error.message
    assert error.hint


def test_process_start_names_a_process() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(1) != process_start(os.getpid())
    assert process_start(2**22 + 1) is None


def test_now() -> None:
    stamp = now()
    assert len(stamp) == len("2026-01-02T03:04:05.678Z")
    assert stamp.endswith("Z")
    assert now() >= stamp
