"""Cgroups of jobs whose supervisor was killed and whose record is gone: `imgrun gc` finds them, and takes no others.

Another test's or somebody's gc may run beside these, and takes what is old. So what is to be found here is mostly young, and
looked for with an age of nothing, in directories of the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Imgrun, eventually, kill
from forked import in_child, sleeper
from leaks import Leaks, read

from imgrun import syscalls as sc
from imgrun.isolation.cgroups import dirs, fs, orphans
from imgrun.isolation.cgroups.cgroup import JobCgroup, Limits
from imgrun.isolation.cgroups.place import HOST_LEAF

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FOREVER = "echo ready; sleep 1000"


def new_name() -> str:
    return fs.PREFIX + os.urandom(6).hex()


def id_of(path: str) -> str:
    return os.path.basename(path).removeprefix(fs.PREFIX)


def make_old(*paths: str) -> None:
    """As if they had been made two minutes ago."""
    for path in paths:
        os.utime(path, (time.time() - 120,) * 2)


NOW = -1.0
"""An age that everything has."""


class Parent:
    """A directory of ours in each hierarchy, for what is to be found or left; as a job's, for `gc` if this is killed."""

    def __init__(self, mounts: list[fs.Mount]) -> None:
        name = new_name()
        self.paths = [f"{mount.path}/{name}" for mount in mounts]
        for path in self.paths:
            os.mkdir(path)
        self._held = [dirs.hold(path) for path in self.paths]

    def make(self, name: str) -> list[str]:
        paths = [f"{path}/{name}" for path in self.paths]
        for path in paths:
            os.makedirs(path)
        return paths

    def enter(self) -> None:
        """Move this process in."""
        for path in self.paths:
            fs.write(f"{path}/cgroup.procs", "0")

    def sweep(self, age: float = NOW) -> list[str]:
        return orphans.remove_among([below for path in self.paths for below in dirs.subtree(path)], age)

    def close(self) -> None:
        dirs.remove_patiently(self.paths, 5)
        for fd in self._held:
            os.close(fd)


@pytest.fixture
def parent() -> Iterator[Parent]:
    parent = Parent([tree for tree in _roots() if tree.version == 2 or {"memory", "pids", "freezer"} & {*tree.controllers}])
    yield parent
    parent.close()


def _roots() -> list[fs.Mount]:
    return [mount for mount in fs.parse_mounts(fs.read("/proc/self/mountinfo")) if mount.writable and mount.root == "/"]


def begin(run: Imgrun, state: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """A background job with this state directory; its id and record."""
    env = {"IMGRUN_STATE_DIR": str(state)}
    job = run.background(FOREVER, env=env, **options)
    return job, json.loads(run("inspect", job, env=env).stdout)


def processes(paths: list[str]) -> set[int]:
    return set().union(*map(dirs.processes, paths))


# ---- by the command -----------------------------------------------------------------------------------------------


def lose(run: Imgrun, parent: Parent, state: Path) -> tuple[str, list[str]]:
    """A job, killed with its supervisor, without its state directory; its id, and the cgroups that it left in ``parent``."""
    job, record = begin(run, state, preexec_fn=parent.enter)
    paths: list[str] = record["cgroups"]
    assert len([path for path in paths if os.path.dirname(path) in parent.paths]) > 1
    kill(record["supervisor"])
    eventually(lambda: not processes(paths), "the job dies with its supervisor")
    shutil.rmtree(state)
    return job, paths


def test_gc_of_a_job_whose_state_directory_is_gone(run: Imgrun, parent: Parent, tmp_path: Path) -> None:
    live, record = begin(run, tmp_path / "live", preexec_fn=parent.enter)
    others = record["cgroups"]
    for _ in range(5):
        lost, paths = lose(run, parent, tmp_path / "lost")
        assert len(paths) == len(others)
        assert lost not in run("gc").stdout.split(), "so young a cgroup may be of a job that is just starting"
        assert all(map(os.path.isdir, paths))
        make_old(*paths, *others)
        done = run("gc")
        assert (done.status, done.stderr) == (0, "")
        eventually(lambda paths=paths: not any(map(os.path.exists, paths)), "this gc removes them, or one beside it")
        assert live not in done.stdout.split()
        if lost in done.stdout.split():
            break  # else somebody else's was quicker
    else:
        raise AssertionError("the id was not printed")
    env = {"IMGRUN_STATE_DIR": str(tmp_path / "live")}
    assert run("exec", live, "echo", "lives", env=env).stdout == "lives\n"
    assert all(map(os.path.isdir, others))
    assert run("rm", "-f", live, env=env).status == 0
    assert not any(map(os.path.exists, others))


def test_gc_of_the_range_of_ids(run: Imgrun, tmp_path: Path) -> None:
    ranges = {}
    for name in ("lost", "live"):
        _, record = begin(run, tmp_path / name)
        ranges[name] = Path("/run/imgrun/ids", read(Path(f"/proc/{record['init']}/uid_map")).split()[1])
        assert ranges[name].exists()
        if name == "lost":
            kill(record["supervisor"])
            eventually(lambda record=record: not processes(record["cgroups"]))
    assert run("gc").status == 0
    assert [name for name, path in ranges.items() if path.exists()] == ["live"]
    for name in ("lost", "live"):
        assert run("rm", "--all", "--force", env={"IMGRUN_STATE_DIR": str(tmp_path / name)}).status == 0


def test_a_supervisor_holds_every_cgroup_of_its_job(run: Imgrun, tmp_path: Path) -> None:
    """So that it is safe at any moment, also while no process is in it yet, or no more."""
    job, record = begin(run, tmp_path / "state")
    assert record["cgroups"]
    assert [path for path in record["cgroups"] if dirs.claim(path) >= 0] == []
    os.kill(record["supervisor"], signal.SIGSTOP)
    try:
        kill(record["init"])
        eventually(lambda: not processes(record["cgroups"]))
        make_old(*record["cgroups"])
        assert job not in run("gc").stdout.split()
        assert all(map(os.path.isdir, record["cgroups"]))
    finally:
        os.kill(record["supervisor"], signal.SIGCONT)


# ---- what is taken and what is left -------------------------------------------------------------------------------


def test_found_at_any_depth_with_what_is_in_it(parent: Parent) -> None:
    name, deep, inner = new_name(), new_name(), new_name()
    paths = [
        *parent.make(name), *parent.make(f"{name}/a"), *parent.make(f"{name}/{inner}"), *parent.make(f"slot/other/{deep}"),
    ]  # fmt: skip
    assert parent.sweep(age=3600) == []
    assert [path for path in paths if not os.path.isdir(path)] == []
    assert sorted(parent.sweep()) == sorted(map(id_of, (name, deep, inner)))
    assert not any(map(os.path.exists, paths))
    assert all(os.path.isdir(f"{path}/slot/other") for path in parent.paths)


def test_with_a_process_or_a_holder_it_stays(parent: Parent) -> None:
    """The first as a job of an imgrun that does not hold its cgroups."""
    busy, held, around = parent.make(new_name()), parent.make(new_name()), new_name()
    within = parent.make(f"{around}/{new_name()}")
    above = [os.path.dirname(path) for path in within]
    below = [f"{path}/below" for path in busy]
    for path in below:
        os.mkdir(path)
    holds = [dirs.hold(path) for path in [*held, *within]]
    everything = [*busy, *held, *within, *above, *below]
    with sleeper() as pid:
        assert min(holds) >= 0
        for path in busy:
            fs.write(f"{path}/cgroup.procs", str(pid))
        assert parent.sweep() == []
        assert [path for path in everything if not os.path.isdir(path)] == []
    for fd in holds:
        os.close(fd)
    eventually(lambda: not processes(busy))
    eventually(lambda: parent.sweep() is not None and not any(map(os.path.exists, everything)))


def test_a_holder_in_a_container_counts(parent: Parent, tmp_path: Path) -> None:
    """It has a cgroup namespace and mounts of its own, in which the cgroups have other paths."""
    name = new_name()
    paths = parent.make(name)
    mounts = [tree for tree in _roots() if f"{tree.path}/{os.path.basename(parent.paths[0])}" in parent.paths]

    def work() -> None:
        parent.enter()
        sc.unshare(sc.CLONE_NEWCGROUP)
        for tree in mounts:
            point = f"{tmp_path}/v{tree.version}-{'-'.join(tree.controllers)}"
            os.mkdir(point)
            kind = ("cgroup2",) if tree.version == 2 else ("cgroup", "-o", ",".join(tree.controllers))
            subprocess.run(["mount", "-t", *kind, "none", point], check=True)
            assert dirs.hold(f"{point}/{name}") >= 0
        assert parent.sweep() == []

    assert len(mounts) == len(paths)
    in_child(work, flags=sc.CLONE_NEWNS)
    assert all(map(os.path.isdir, paths))
    assert parent.sweep() == [id_of(name)]


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_killed_while_it_was_frozen_dies(parent: Parent, killed: bool) -> None:
    """With the freezer of v1 a signal waits for the thaw. Without one, the job may be of an imgrun that holds no cgroups."""
    if not (above := next((path for path in parent.paths if os.path.exists(f"{path}/freezer.state")), None)):
        pytest.skip("this host has no v1 freezer")
    frozen = f"{above}/{new_name()}"
    os.mkdir(frozen)
    with sleeper() as pid:
        try:
            fs.write(f"{frozen}/cgroup.procs", str(pid))
            fs.write(f"{frozen}/freezer.state", "FROZEN")
            eventually(lambda: fs.text(f"{frozen}/freezer.state") == "FROZEN")
            if killed:
                os.kill(pid, signal.SIGKILL)
            assert parent.sweep() == ([id_of(frozen)] if killed else [])
            assert fs.text(f"{frozen}/freezer.state") == (None if killed else "FROZEN")
        finally:
            if os.path.isdir(frozen):
                fs.write(f"{frozen}/freezer.state", "THAWED")


def test_other_names_stay(parent: Parent) -> None:
    names = (
        "imgrun-",
        "imgrun-abc",
        "imgrun-0123456789AB",
        "imgrun-0123456789abc",
        "imgrun-0123456789ab.scope",
        "0123456789ab",
    )
    paths = [path for name in names for path in parent.make(name)]
    parent.make("imgrun-doctor-123")
    assert parent.sweep() == ["doctor-123"]
    assert [path for path in paths if not os.path.isdir(path)] == []


def test_a_user_removes_what_is_the_users_own(parent: Parent) -> None:
    roots, theirs = parent.make(new_name()), parent.make(f"delegated/{new_name()}")
    for path in theirs:
        os.chown(os.path.dirname(path), 65534, 65534)
        os.chown(path, 65533, 65533)  # as the cgroup of a job with an init of its own, which has another id

    def stranger() -> None:
        assert parent.sweep() == []

    def owner() -> None:
        assert parent.sweep() == [id_of(theirs[0])]

    in_child(stranger, uid=65532)
    assert all(map(os.path.isdir, [*roots, *theirs]))
    in_child(owner, uid=65534)
    assert not any(map(os.path.exists, theirs))
    assert parent.sweep() == [id_of(roots[0])]


def test_who_was_moved_aside_comes_back(parent: Parent) -> None:
    unified = next((path for path in parent.paths if os.path.exists(f"{path}/cgroup.type")), None)
    if unified is None:
        pytest.skip("v2 is not mounted here")
    with sleeper() as pid:
        for others in ((), (f"{unified}/{new_name()}",)):
            for path in (f"{unified}/{HOST_LEAF}", *others):
                os.mkdir(path)
            fs.write(f"{unified}/{HOST_LEAF}/cgroup.procs", str(pid))
            parent.sweep()
            assert dirs.subtree(unified) == [unified]
            assert fs.text(f"{unified}/cgroup.procs") == str(pid)


def test_those_in_another_users_cgroup_are_not_taken_for_leaks_of_these_tests(leaks: Leaks) -> None:
    """A batch system's tests, which may run beside these, leave such for a while."""
    slot = f"{_roots()[0].path}/slot-{os.urandom(6).hex()}"
    path = f"{slot}/{new_name()}"
    os.makedirs(path)
    try:
        assert path in leaks.left()
        os.chown(slot, 65534, 65534)
        assert path not in leaks.left()
    finally:
        dirs.remove_patiently([slot], 5)


# ---- by the next start --------------------------------------------------------------------------------------------


def test_the_next_job_in_the_same_cgroup_removes_them(parent: Parent) -> None:
    """In every hierarchy, beside its own."""
    left = parent.make(new_name())
    young = parent.make(new_name())
    make_old(*left)

    def work() -> None:
        parent.enter()
        job = JobCgroup.create(os.urandom(6).hex(), Limits(pids=10))
        beside = {os.path.dirname(path) for path in job.paths} & set(parent.paths)
        assert beside
        assert [path for path in left if os.path.dirname(path) in beside and os.path.exists(path)] == []
        assert all(map(os.path.isdir, young))
        job.remove()

    in_child(work)


def test_a_start_looks_at_a_few_neighbours(parent: Parent) -> None:
    """Whatever their number: each start at others, since the kernel lists by a hash of the name."""
    for _ in range(dirs.NEIGHBOURS + 8):
        parent.make(new_name())
    own = parent.make(new_name())[0]
    neighbours = [path for path in dirs.subtree(parent.paths[0]) if path not in (own, parent.paths[0])]
    assert not dirs.orphan_beside(own)
    assert dirs.orphan_beside(own, NOW)
    holds = [dirs.hold(path) for path in neighbours]
    assert not dirs.orphan_beside(own, NOW)
    for fd in holds:
        os.close(fd)
