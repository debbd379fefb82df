"""What is told of kills for memory: whose limit it was, by files as the kernel shows them, and the words."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from forked import in_child
from hypothesis import given
from hypothesis import strategies as st

from imgrun import syscalls as sc
from imgrun.accounting import kernel_log, verdict
from imgrun.accounting.kernel_log import KernelLog, Told, own_ids
from imgrun.accounting.processes import Process, largest
from imgrun.accounting.verdict import MemoryWatch, next_size
from imgrun.isolation.cgroups import fs, oom
from imgrun.isolation.cgroups.cgroup import JobCgroup
from imgrun.isolation.cgroups.oom import Culprit, Levels
from imgrun.isolation.cgroups.v1 import V1Directory
from imgrun.isolation.cgroups.v2 import V2Directory
from imgrun.isolation.userns import IdMap, IdRange, write_maps
from imgrun.units import format_size, parse_size

MIB = 1 << 20


class Tree:
    """A part of a cgroup v2 hierarchy as files: the mount point, a slot, and a job in it."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.slot, self.job = top, top / "slot", top / "slot/imgrun-j"
        self.job.mkdir(parents=True)
        mount = fs.Mount(2, (), "/", str(top), 0, True)
        monkeypatch.setattr(oom.fs, "parse_mounts", lambda text: [mount])
        for path, limit in ((self.slot, str(512 * MIB)), (self.job, str(64 * MIB))):
            (path / "memory.max").write_text(f"{limit}\n")
            self.events(path)
        self.directory = V2Directory(str(self.job))
        self.directory.controls = frozenset(("memory", "freeze"))

    def events(self, path: Path, *, out: int = 0, out_below: int = 0, kills: int = 0) -> None:
        (path / "memory.events.local").write_text(f"low 0\nhigh 0\nmax 7\noom {out}\noom_kill {kills}\n")
        (path / "memory.events").write_text(f"low 0\nhigh 0\nmax 7\noom {out + out_below}\noom_kill {kills}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path / "cgroup", monkeypatch)


# -- whose limit --------------------------------------------------------------------------------------------------------


def levels_of(directory: V1Directory | V2Directory, *, event: bool = False) -> Levels:
    return Levels(directory, lambda: event)


def test_v2_the_jobs_own(tree: Tree) -> None:
    levels = levels_of(tree.directory)
    tree.events(tree.job, out=1, kills=1)
    tree.events(tree.slot, out_below=1)
    assert levels.culprit() == Culprit("job", str(tree.job), 64 * MIB)


def test_v2_the_slots(tree: Tree) -> None:
    tree.events(tree.slot, out=3)  # of jobs before this one
    levels = levels_of(tree.directory)
    assert levels.at_own_limit()
    tree.events(tree.job, kills=1)
    assert levels.culprit() == Culprit("host")
    tree.events(tree.slot, out=4)
    assert levels.culprit() == Culprit("above", str(tree.slot), 512 * MIB)
    assert not levels.at_own_limit()


def test_v2_where_a_part_of_the_hierarchy_is_mounted_its_top_is_a_slot_too(tree: Tree) -> None:
    (tree.top / "memory.max").write_text(f"{128 * MIB}\n")
    tree.events(tree.top)
    levels = levels_of(tree.directory)
    tree.events(tree.top, out=1)
    assert levels.culprit() == Culprit("above", str(tree.top), 128 * MIB)


def test_v2_a_limit_that_the_job_set_inside_itself_is_its_own_matter(tree: Tree) -> None:
    watch = MemoryWatch(JobCgroup([tree.directory]), os.getpid())
    tree.events(tree.job, out_below=1, kills=1)
    assert not watch.killed()
    tree.events(tree.job, out=1, kills=1)
    assert watch.killed()
    watch.close()


def test_v1_without_a_limit_of_its_own_it_was_the_tightest_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cgroups above may not be watched."""
    job = tmp_path / "outer/slot/imgrun-j"
    job.mkdir(parents=True)
    for path, limit in ((tmp_path / "outer", 900 * MIB), (job.parent, 700 * MIB), (job, (1 << 63) - 4096)):
        (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    mount = fs.Mount(1, ("memory",), "/", str(tmp_path), 0, True)
    monkeypatch.setattr(oom.fs, "parse_mounts", lambda text: [mount])
    levels = levels_of(V1Directory(str(job), ("memory",)))
    assert levels.culprit() == Culprit("host"), "no event has come"
    levels.note_event()
    assert levels.culprit() == Culprit("above", str(job.parent), 700 * MIB)
    (job / "memory.limit_in_bytes").write_text(f"{64 * MIB}\n")
    levels.note_event()
    assert levels.culprit().whose == "above", "its own limit was never met"
    (job / "memory.failcnt").write_text("3\n")
    levels.note_event()
    assert levels.culprit() == Culprit("job", str(job), 64 * MIB)
    assert levels.at_own_limit()


@pytest.mark.parametrize(("event", "whose"), [(False, "host"), (True, "job")])
def test_v1_a_job_that_fills_its_limit_with_page_cache_has_not_run_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: bool, whose: str
) -> None:
    """The kernel tells the cgroup when a limit is why it kills, and not when the host has no memory."""
    job = tmp_path / "imgrun-j"
    job.mkdir()
    files = {"limit_in_bytes": 64 * MIB, "max_usage_in_bytes": 64 * MIB, "failcnt": 12345}
    for name, value in files.items():
        (job / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "release_agent").touch()  # which the root of a hierarchy has
    mount = fs.Mount(1, ("memory",), "/", str(tmp_path), 0, True)
    monkeypatch.setattr(oom.fs, "parse_mounts", lambda text: [mount])
    assert levels_of(V1Directory(str(job), ("memory",)), event=event).culprit().whose == whose


# -- holding with v2 ----------------------------------------------------------------------------------------------------


def test_v2_is_slowed_down_before_its_limit_and_full_when_nothing_can_be_taken_back(tree: Tree) -> None:
    (tree.job / "memory.high").write_text("max\n")
    assert not tree.directory.is_full()
    tree.directory.hold_when_full()
    high = int((tree.job / "memory.high").read_text())
    assert 60 * MIB <= high < 64 * MIB
    (tree.job / "memory.swap.max").write_text("0\n")
    for anon, cache, full in ((10 * MIB, 50 * MIB, False), (high - 2 * MIB, 2 * MIB, False), (high, 0, True)):
        (tree.job / "memory.stat").write_text(f"anon {anon}\nfile {cache}\nshmem 0\nkernel 4096\nslab_reclaimable 4096\n")
        assert tree.directory.is_full() == full
    (tree.job / "memory.max").write_text(f"{256 * MIB}\n")
    tree.directory.hold_when_full()
    assert not tree.directory.is_full(), "with more memory it is not"
    (tree.job / "memory.max").write_text("max\n")
    tree.directory.hold_when_full()
    assert (tree.job / "memory.high").read_text().startswith("max")


# -- the words ----------------------------------------------------------------------------------------------------------


def watch_of(tree: Tree) -> MemoryWatch:
    return MemoryWatch(JobCgroup([tree.directory]), os.getpid())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel's log says."""
    lines: list[str] = []
    real = os.read

    def read(fd: int, size: int) -> bytes:
        if fd != 999:
            return real(fd, size)
        if not lines:
            raise BlockingIOError
        return f"6,1,2,-;{lines.pop(0)}\n SUBSYSTEM=x\n".encode()

    def silent(self: KernelLog, name: str, ids: range) -> None:
        self._name, self._ids, self._fd, self._same_pids = name, ids, 999, True

    monkeypatch.setattr(KernelLog, "__init__", silent)
    monkeypatch.setattr(KernelLog, "close", lambda self: None)
    monkeypatch.setattr(kernel_log.os, "read", read)
    return lines


OOM = "oom-kill:constraint=CONSTRAINT_MEMCG,cpuset=/,mems_allowed=0,oom_memcg=/slot,task_memcg=/slot/{},task=x,pid=7,uid=0"
KILLED = (
    "Memory cgroup out of memory: Killed process 7 ({}) total-vm:9kB, anon-rss:40960kB, file-rss:1024kB, shmem-rss:0kB, "
    "UID:{} pgtables:9kB oom_score_adj:500"
)


def test_what_was_killed_is_in_the_kernels_log(tree: Tree, log: list[str]) -> None:
    watch = watch_of(tree)
    tree.events(tree.job, out=1, kills=1)
    watch.largest = [Process("sh", 3, 80 << 10, 9)]
    log += [OOM.format("imgrun-other"), KILLED.format("other", 0), "noise", OOM.format("imgrun-j"), KILLED.format("a) (b", 0)]
    told = watch.verdict(None, 64 * MIB)
    assert "largest processes then: a) (b 41 MiB, sh (pid 3) 80 KiB" in told.message
    assert "other" not in told.message
    assert told.hint == "ask for more, such as --memory 96M"


def test_a_log_that_leaves_out_lines_is_read_by_user(tree: Tree, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "own_ids", lambda init: range(5000, 6000))
    watch = watch_of(tree)
    tree.events(tree.job, out=1, kills=1)
    log += [KILLED.format("theirs", 4999), OOM.format("imgrun-j"), KILLED.format("ours", 5500), KILLED.format("theirs", 0)]
    told = watch.verdict(None, 64 * MIB)
    assert "ours 41 MiB" in told.message
    assert "theirs" not in told.message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give ids to a user namespace")
def test_which_ids_are_the_jobs_alone() -> None:
    """Those of its user namespace, unless its supervisor is in that too, as an ordinary user's is: with all he runs."""
    ids = (IdRange(0, 5000, 10),)
    job = sc.userns_holder()
    try:
        write_maps(job, IdMap(ids, ids))
        assert own_ids(job) == range(5000, 5010)
        assert own_ids(os.getpid()) == range(0)

        def inside() -> None:
            fd = os.open(f"/proc/{job}/ns/user", os.O_RDONLY)
            sc.setns(fd, sc.CLONE_NEWUSER)
            assert own_ids(os.getpid()) == range(0)

        in_child(inside)
    finally:
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)


def killed(pid: int, name: str, mib: int) -> str:
    sizes = f"total-vm:922588kB, anon-rss:{mib << 10}kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:1272kB oom_score_adj:500"
    return f"Out of memory: Killed process {pid} ({name}) {sizes}"


def test_all_that_the_kernel_killed_together(tree: Tree, log: list[str]) -> None:
    """As 6.1 prints it: the chosen one twice, and the others once. What was seen had given back its memory, or not yet."""
    watch = watch_of(tree)
    tree.events(tree.job, kills=1)
    watch.largest = [Process("hold", 5, 200 * MIB, 180), Process("hold", 4, 0, 179), Process("hold", 6, 0, 181)]
    end = " are going to be killed due to memory.oom.group set"
    chosen = OOM.format("imgrun-j").replace("oom_memcg=/slot", "global_oom")
    log += [
        chosen, killed(181, "hold", 617), f"Tasks in /slot/imgrun-j{end}",
        killed(176, "imgrun-init", 1), killed(178, "sleep", 1), killed(179, "hold", 600), killed(181, "hold", 580),
        f"Tasks in /slot/imgrun-other{end}", killed(300, "other", 1000),
    ]  # fmt: skip
    told = watch.verdict(None, 1800 * MIB)
    assert told.message.endswith(
        "its largest processes then: hold (pid 6) 617 MiB, hold (pid 4) 600 MiB, hold (pid 5) 200 MiB"
    )


def test_where_the_logs_pids_are_not_ours_it_names_nobody(tree: Tree, log: list[str]) -> None:
    watch = watch_of(tree)
    assert watch._log is not None
    watch._log._same_pids = False
    tree.events(tree.job, kills=1)
    watch.largest = [Process("hold", 5, 60 * MIB, 12)]
    log += [OOM.format("imgrun-j"), killed(181, "hold", 61)]
    told = watch.verdict(None, 64 * MIB)
    assert told.message.endswith("its largest processes then: hold (pid 5) 60 MiB")


def test_no_wrong_lead_where_the_largest_was_gone(tree: Tree, log: list[str]) -> None:
    watch = watch_of(tree)
    tree.events(tree.job, out=1, kills=1)
    watch.largest = [Process("sh", 3, 80 << 10, 9)]
    assert "largest" not in watch.verdict(None, 64 * MIB).message


def test_the_hosts_memory(tree: Tree, log: list[str]) -> None:
    watch = watch_of(tree)
    tree.events(tree.job, kills=1)
    told = watch.verdict(64 * MIB, 20 * MIB)
    assert told.host
    assert told.message.startswith("the host ran out of memory, and the kernel killed it; its peak was 20 MiB")
    log.append(OOM.format("imgrun-j"))
    told = watch.verdict(64 * MIB, 20 * MIB)
    assert not told.host, "the log knows of a cgroup that cannot be seen"
    assert "not to be seen here" in told.message


def test_a_log_that_may_not_be_read_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(kernel_log.os, "open", refuse)
    assert KernelLog("x", range(0)).read() == Told()


def test_the_largest_of_these_processes() -> None:
    (found,) = largest({os.getpid(), 1 << 22})
    assert found.memory > MIB
    assert found.pid > 0


@given(st.integers(MIB, 1 << 45))
def test_what_to_ask_for_is_half_as_much_again_in_a_round_figure(size: int) -> None:
    wanted = parse_size(next_size(size))
    assert 1.5 * size <= wanted <= max(1.5 * size * 1.11, 1.5 * size + MIB)
    assert len(next_size(size).strip("MG0")) <= 4


@given(st.integers(0, 1 << 60))
def test_sizes_as_people_read_them(size: int) -> None:
    number, unit = format_size(size).split()
    assert parse_size(f"{number}{unit}" if unit != "B" else number) == pytest.approx(size, rel=0.06)
    assert float(number) < 1024
