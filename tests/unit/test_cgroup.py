"""cgroups without privileges: parsing, arithmetic, the choice of a place, on texts and trees in the kernel's formats.

The stand-ins for cgroup2 directories have the names and contents that Documentation/admin-guide/cgroup-v2.rst gives;
tests/integration/test_cgroup.py and the guests of tests/vm use real ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.errors import HostError, LimitError, SpecError
from imgrun.isolation.cgroups import cgroup, fs
from imgrun.isolation.cgroups import dirs as cgroup_dirs
from imgrun.isolation.cgroups import limits as lim
from imgrun.isolation.cgroups import place as cgroup_place
from imgrun.isolation.cgroups import systemd as cgroup_systemd
from imgrun.isolation.cgroups.cgroup import CgroupUsage, IoMax, Limits
from imgrun.isolation.cgroups.v1 import V1Directory, controls_of
from imgrun.isolation.cgroups.v2 import V2Directory, parse_pressure, sum_io

HYBRID = """\
23 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /slot1 /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids ro,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/with\\040blank rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""

MEMBERSHIP = """\
9:name=systemd:/user.slice
8:pids:/a:b
4:memory:/slot1/job
2:cpu,cpuacct:/
0::/user.slice/user-1000.slice/session-3.scope
"""


# ---- finding hierarchies ----------------------------------------------------------------------------------------


def test_mounts_are_told_from_mountinfo() -> None:
    mounts = fs.parse_mounts(HYBRID)
    assert [(mount.version, mount.controllers, mount.root, mount.path, mount.writable) for mount in mounts] == [
        (1, ("cpu", "cpuacct"), "/", "/sys/fs/cgroup/cpu,cpuacct", True),
        (1, ("memory",), "/slot1", "/sys/fs/cgroup/memory", True),
        (1, ("pids",), "/", "/sys/fs/cgroup/pids", False),
        (1, (), "/", "/sys/fs/cgroup/systemd", True),
        (2, (), "/", "/sys/fs/cgroup/with blank", True),
    ]
    assert mounts[0].device == os.makedev(0, 29)


def test_membership_of_co_mounted_controllers_and_of_v2() -> None:
    membership = fs.parse_membership(MEMBERSHIP)
    assert membership["cpu"] == membership["cpuacct"] == "/"
    assert membership["pids"] == "/a:b"
    assert membership[""] == "/user.slice/user-1000.slice/session-3.scope"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_unescape_undoes_what_the_kernel_does(text: str) -> None:
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in text)
    assert fs.unescape(escaped) == text


@pytest.mark.parametrize(
    ("root", "own", "where"),
    [
        ("/", "/", "/m"),
        ("/", "/a/b", "/m/a/b"),
        ("/a", "/a", "/m"),
        ("/a", "/a/b", "/m/b"),
        ("/a", "/ab", None),
        ("/a", "/", None),
        ("/", "/../other", None),
        ("/..", "/", None),
    ],
)
def test_where_a_cgroup_is_below_a_mount(root: str, own: str, where: str | None) -> None:
    assert fs.locate(fs.Mount(2, (), root, "/m", 1, True), own) == where


def test_discover_takes_only_what_is_really_there(tmp_path: Path) -> None:
    """A directory on another device than mountinfo says is what a later mount has covered."""
    device = os.stat(tmp_path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / "memory/job").mkdir(parents=True)
    (tmp_path / "again/job").mkdir(parents=True)
    (tmp_path / "pids").mkdir()
    (tmp_path / "cgroup").write_text("1:memory:/job\n2:pids:/\n3:cpu:/gone\n0::/\n")
    (tmp_path / "mountinfo").write_text(
        f"1 1 {number} / {tmp_path}/memory ro - cgroup cgroup rw,memory\n"
        f"2 1 {number} / {tmp_path}/again rw - cgroup cgroup rw,memory\n"
        f"3 1 0:999 / {tmp_path}/pids rw - cgroup cgroup rw,pids\n"
        f"4 1 {number} / {tmp_path}/cpu rw - cgroup cgroup rw,cpu\n"
    )
    assert fs.discover(str(tmp_path)) == [fs.Tree(1, ("memory",), f"{tmp_path}/again", f"{tmp_path}/again/job", True)]


def test_the_innermost_mount_holds_a_path() -> None:
    mounts = [fs.Mount(1, (), "/", "/c", 1, True), fs.Mount(2, (), "/", "/c/unified", 2, True)]
    assert fs.mount_of("/c/unified/imgrun-x", mounts) == mounts[1]
    assert fs.mount_of("/c/unifiedx/imgrun-x", mounts) == mounts[0]
    assert fs.mount_of("/etc", mounts) is None
    assert fs.mount_of("/c/../etc/imgrun-x", mounts) is None


def test_names_of_controllers_are_those_of_v2() -> None:
    assert controls_of(("blkio", "freezer", "memory")) == {"io", "freeze", "memory"}


# ---- arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [(1, (100_000, 100_000)), (2.5, (250_000, 100_000)), (0.01, (1_000, 100_000)), (0.005, (5_000, 1_000_000)),
     (0.001, (1_000, 1_000_000))],
)  # fmt: skip
def test_quota(cpus: float, expected: tuple[int, int]) -> None:
    assert lim.quota(cpus) == expected


@given(st.floats(0.001, 10_000))
def test_a_quota_is_what_was_asked_and_what_the_kernel_takes(cpus: float) -> None:
    quota, period = lim.quota(cpus)
    assert quota >= 1_000
    assert 1_000 <= period <= 1_000_000
    assert quota / period == pytest.approx(cpus, rel=0.0005, abs=0.000_001)


def test_weights_of_v1() -> None:
    assert [lim.shares(weight) for weight in (1, 100, 200, 10_000)] == [10, 1024, 2048, 102_400]
    assert [lim.bfq_weight(weight) for weight in (1, 100, 10_000)] == [1, 100, 1000]


def test_limits_need_their_controllers() -> None:
    assert lim.needed(Limits()) == {}
    assert lim.needed(Limits(memory=1 << 30, swap=0, cpus=1, io_max=(IoMax("/", rbps=1),))) == {
        "memory": ["--memory", "--swap"],
        "cpu": ["--cpus"],
        "io": ["--io-max"],
    }


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(memory=4096), "--memory"),
        (Limits(swap=-1), "--swap"),
        (Limits(cpus=0), "--cpus"),
        (Limits(cpus=0.0001), "--cpus"),
        (Limits(cpu_weight=0), "--cpu-weight"),
        (Limits(cpu_weight=10_001), "--cpu-weight"),
        (Limits(io_weight=0), "--io-weight"),
        (Limits(pids=0), "--pids"),
        (Limits(cpuset="x"), "--cpuset"),
        (Limits(cpuset=""), "--cpuset"),
        (Limits(cpuset="3-1"), "--cpuset"),
        (Limits(io_max=(IoMax("/dev/sda"),)), "--io-max"),
        (Limits(io_max=(IoMax("/dev/sda", rbps=0),)), "--io-max"),
    ],
)
def test_what_no_host_takes_is_a_spec_error(limits: Limits, told: str) -> None:
    with pytest.raises(SpecError, match=told) as error:
        cgroup.check_limits(limits)
    assert error.value.hint


def test_io_max_as_written() -> None:
    assert lim.parse_io_max("/dev/sda:rbps=10M,wiops=100") == IoMax("/dev/sda", rbps=10 << 20, wiops=100)
    assert lim.parse_io_max("/mnt/a:b:wbps=1K") == IoMax("/mnt/a:b", wbps=1024)
    for text in ("/dev/sda", "/dev/sda:", ":rbps=1", "/dev/sda:speed=1", "/dev/sda:rbps", "/dev/sda:rbps=1,rbps=2"):
        with pytest.raises(SpecError, match="--io-max"):
            lim.parse_io_max(text)


def test_the_disk_of_a_partition(tmp_path: Path) -> None:
    """Limits apply to disks: a partition is looked up in a tree such as /sys."""
    device = os.stat(tmp_path).st_dev
    disk = tmp_path / "sys/devices/virtual/sdx"
    (disk / "sdx1").mkdir(parents=True)
    (disk / "dev").write_text("8:64\n")
    (disk / "sdx1/dev").write_text(f"{os.major(device)}:{os.minor(device)}\n")
    (disk / "sdx1/partition").write_text("1\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    entry = tmp_path / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    entry.symlink_to(disk / "sdx1")
    if os.major(device) == 0:
        pytest.skip("the temporary directory is not on a disk")
    assert lim.disk_of(str(tmp_path), f"{tmp_path}/sys") == "8:64"
    entry.unlink()
    entry.symlink_to(disk)
    assert lim.disk_of(str(tmp_path), f"{tmp_path}/sys") == "8:64"


def test_no_disk_behind_a_path() -> None:
    with pytest.raises(LimitError, match="no disk is behind it"):
        lim.disk_of("/proc")
    with pytest.raises(LimitError, match="No such file"):
        lim.disk_of("/nonexistent")


# ---- reading ----------------------------------------------------------------------------------------------------


def test_io_stat_is_added_up_over_disks() -> None:
    stat = (
        "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n"
        "8:0 rbytes=90430464 wbytes=299008000 rios=8950 wios=1252 dbytes=50331648 dios=3021\n"
        "7:0 \n"
    )
    assert sum_io(stat) == {"rbytes": 91889664, "wbytes": 613781504, "rios": 9142, "wios": 1605}


def test_pressure() -> None:
    text = "some avg10=1.00 avg60=0.10 avg300=0.00 total=1234567\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=17\n"
    assert parse_pressure(text) == {"some": 1234567, "full": 17}
    assert parse_pressure("") == {}


def test_usage_is_none_where_nothing_was_measured(tmp_path: Path) -> None:
    assert set(V2Directory(str(tmp_path / "gone")).usage()) == {None}
    assert set(V1Directory(str(tmp_path / "gone"), fs.V1_CONTROLLERS).usage()) == {None}
    assert set(cgroup.reopen([]).usage()) == {None}


def test_what_one_hierarchy_does_not_know_another_does() -> None:
    first, second = CgroupUsage(user_seconds=0.0), CgroupUsage(user_seconds=1.0, memory_peak=7)
    assert first.or_else(second) == CgroupUsage(user_seconds=0.0, memory_peak=7)


def fill(directory: Path, files: dict[str, str]) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return str(directory)


V2_FILES = {
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    "cgroup.subtree_control": "",
    "cgroup.procs": "",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cpu.stat": "usage_usec 3500000\nuser_usec 3000000\nsystem_usec 500000\nnice_usec 0\nnr_periods 10\n"
    "nr_throttled 4\nthrottled_usec 250000\nnr_bursts 0\nburst_usec 0\n",
    "cpu.max": "max 100000\n",
    "cpu.weight": "100\n",
    "cpuset.cpus": "\n",
    "io.max": "",
    "io.bfq.weight": "default 100\n",
    "io.weight": "default 100\n",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.swap.current": "0\n",
    "memory.oom.group": "0\n",
    "memory.stat": "anon 1024\nfile 2048\nkernel 512\nshmem 16\n",
    "memory.events": "low 0\nhigh 0\nmax 5\noom 2\noom_kill 3\noom_group_kill 1\n",
    "memory.events.local": "low 0\nhigh 0\nmax 5\noom 1\noom_kill 2\noom_group_kill 1\n",
    "pids.max": "max\n",
    "pids.current": "1\n",
    "pids.peak": "9\n",
    "pids.events": "max 6\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0 avg60=0 avg300=0 total=4\n",
}


def v2_job(tmp_path: Path, **changes: str) -> V2Directory:
    files = {**V2_FILES, **{name.replace("__", "."): text for name, text in changes.items()}}
    job = V2Directory(fill(tmp_path / "imgrun-x", files))
    job.look()
    return job


def content(job: V2Directory, name: str) -> str:
    return Path(job.path, name).read_text()


def test_v2_usage(tmp_path: Path) -> None:
    job = v2_job(tmp_path)
    assert job.usage() == CgroupUsage(
        user_seconds=3.0, system_seconds=0.5, memory_current=4096, memory_peak=8192, memory_anon=1024,
        memory_file=2048, memory_shmem=16, memory_kernel=512, swap_current=0, read_bytes=1, written_bytes=2,
        read_operations=3, write_operations=4, pids_current=1, pids_peak=9, pids_refused=6,
        memory_some_stalled=5e-6, memory_full_stalled=4e-6,
    )  # fmt: skip
    assert job.memory_events() == cgroup.MemoryEvents(kills=3, at_limit=5)
    limited = v2_job(tmp_path, cpu__max="50000 100000\n").usage()
    assert (limited.periods, limited.throttled_periods, limited.throttled_seconds) == (10, 4, 0.25)


def test_v2_limits_are_written_and_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lim, "disk_of", lambda path: {"/a": "8:0", "/b": "8:16"}[path])
    job = v2_job(tmp_path)
    job.prepare()
    assert content(job, "memory.oom.group")[0] == "1"
    job.apply(
        Limits(
            memory=1 << 30, swap=0, cpus=1.5, cpu_weight=300, cpuset="0-1", pids=77, io_weight=10_000,
            io_max=(IoMax("/a", rbps=10), IoMax("/a", wiops=20)),
        )
    )  # fmt: skip

    # A plain file keeps what a shorter write does not cover; the kernel takes each write as a whole.
    def written(name: str, text: str) -> None:
        assert content(job, name).startswith(text)

    written("memory.max", "1073741824")
    written("memory.swap.max", "0")
    written("cpu.max", "150000 100000")
    written("cpu.weight", "300")
    written("cpuset.cpus", "0-1")
    written("pids.max", "77")
    written("io.weight", "10000")
    written("io.bfq.weight", "1000")
    written("io.max", "8:0 rbps=10 wbps=max riops=max wiops=20")

    Path(job.path, "io.max").write_text("8:0 rbps=10 wbps=max riops=max wiops=20\n")
    job.apply(Limits(pids=5), live=True)
    written("memory.max", "max")
    written("memory.swap.max", "max")
    written("cpu.max", "max 100000")
    written("cpu.weight", "100")
    written("cpuset.cpus", "\n")
    written("pids.max", "5")
    written("io.max", "8:0 rbps=max wbps=max riops=max wiops=max")


def test_v2_memory_is_not_lowered_below_what_the_job_holds(tmp_path: Path) -> None:
    stat = "anon 300000000\nfile 200000000\nshmem 50000000\n"
    job = v2_job(tmp_path, memory__current="500000000\n", memory__stat=stat)
    job.apply(Limits(memory=351_000_000), live=True)
    with pytest.raises(LimitError, match="holds 350000000 bytes already"):
        job.apply(Limits(memory=349_000_000), live=True)


def test_v2_writes_nothing_of_controllers_that_it_has_not(tmp_path: Path) -> None:
    job = v2_job(tmp_path, cgroup__controllers="pids\n")
    job.apply(Limits(memory=1 << 30, pids=3))
    assert content(job, "memory.max") == "max\n"
    assert content(job, "pids.max").startswith("3")
    assert job.usage().memory_peak is None


def test_v2_memory_that_a_running_job_comes_to_have_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its parent had nothing to hand out when it started."""
    monkeypatch.setattr(cgroup, "bound_to_v1", lambda controller: False)
    directory = v2_job(tmp_path, cgroup__controllers="pids\n")
    job = cgroup.JobCgroup([directory])
    assert (job.memory.kills(), job.memory.event_source(), job.memory.levels()) == (None, (-1, 0), None)
    Path(directory.path, "cgroup.controllers").write_text("memory pids\n")
    job.set_limits(Limits(memory=1 << 30))
    assert job.memory.kills() == 3
    assert job.memory.event_source()[0] >= 0
    assert job.memory.levels() is not None
    assert content(directory, "memory.oom.group")[0] == "1", "it dies as a whole"
    job.close()


# ---- v1's order of writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "limits", "order"),
    [
        (1 << 62, Limits(memory=1 << 30, swap=0), ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
        (1 << 29, Limits(memory=1 << 30, swap=0), ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
        (1 << 31, Limits(memory=1 << 30, swap=0), ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
        (1 << 30, Limits(), ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
    ],
)
def test_v1_memory_with_swap_is_never_less_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, limits: Limits, order: list[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(lim, "put", lambda directory, name, value, option: written.append(name))
    path = fill(tmp_path / "imgrun-x", {"memory.memsw.limit_in_bytes": f"{before}\n"})
    V1Directory(path, ("memory",)).apply(limits, live=True)
    assert written == order


# ---- where a job may go under systemd ---------------------------------------------------------------------------


class Host:
    """A v2 hierarchy with a login session, a service and a delegated service, in a directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.systemd = True
        self.uid = 0
        monkeypatch.setattr(cgroup_place, "under_systemd", lambda: self.systemd)
        monkeypatch.setattr(os, "geteuid", lambda: self.uid)
        self.unwritable: set[str] = set()
        monkeypatch.setattr(fs, "may_write", lambda path: not any(path.startswith(bad) for bad in self.unwritable))
        self.make("", "cpuset cpu io memory pids", "cpu io memory pids")

    def make(self, path: str, controllers: str, handed_out: str = "", **files: str) -> str:
        listed = {"cgroup.controllers": controllers, "cgroup.subtree_control": handed_out, "cgroup.procs": ""}
        files = {name.replace("__", "."): text for name, text in files.items()}
        return fill(self.root / path.lstrip("/"), {**listed, **files})

    def delegate(self, path: str) -> None:
        os.setxattr(self.root / path.lstrip("/"), "user.delegate", b"1")

    def choose(self, own: str, *wanted: str, writable: bool = True) -> cgroup_place.Place:
        tree = fs.Tree(2, (), str(self.root), str(self.root / own.lstrip("/")), writable)
        return cgroup_place.choose(tree, frozenset(wanted))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path / "cgroup", monkeypatch)


def test_without_systemd_the_own_cgroup_is_ours(host: Host) -> None:
    host.systemd = False
    host.make("slot", "memory pids")
    place = host.choose("slot", "memory", "io")
    assert (place.kind, place.controllers) == ("managed", {"memory", "pids"})


def test_supervisors_in_the_leaf_share_its_parent(host: Host) -> None:
    host.systemd = False
    host.make("slot", "memory", "memory")
    host.make("slot/imgrun-host", "memory")
    assert host.choose("slot/imgrun-host", "memory").parent == str(host.root / "slot")


def test_a_delegated_service_is_divided_and_what_is_below_it_too(host: Host) -> None:
    host.make("system.slice", "memory pids", "memory pids")
    host.make("system.slice/batch.service", "memory pids")
    host.make("system.slice/batch.service/slot1", "memory pids")
    assert host.choose("system.slice/batch.service", "memory").kind == "plain"
    try:
        host.delegate("system.slice/batch.service")
    except OSError:
        pytest.skip("no user xattrs in the temporary directory")
    assert host.choose("system.slice/batch.service", "memory").kind == "managed"
    assert host.choose("system.slice/batch.service/slot1", "memory").kind == "managed"


def test_a_login_session_gets_a_scope(host: Host) -> None:
    host.make("user.slice/user-0.slice/session-3.scope", "memory pids")
    place = host.choose("user.slice/user-0.slice/session-3.scope", "memory")
    assert (place.kind, place.controllers) == ("scope", {"cpuset", "cpu", "io", "memory", "pids"})


def test_a_scope_with_limits_is_not_left(host: Host) -> None:
    scope = "system.slice/run-1.scope"
    host.make(scope, "memory pids", memory__max="max\n", cpu__max="max 100000\n", cpuset__cpus="\n", pids__max="99\n")
    assert host.choose(scope, "memory").kind == "scope"
    host.make(scope, "memory pids", memory__max="1073741824\n")
    place = host.choose(scope, "memory")
    assert (place.kind, place.controllers) == ("plain", frozenset())
    with pytest.raises(LimitError, match=r"--memory cannot be enforced.*run-1\.scope is not delegated") as error:
        cgroup_place.check(
            fs.Tree(2, (), str(host.root), place.parent, True), place, Limits(memory=1 << 30), "memory", ["--memory"]
        )
    assert "Delegate=yes" in str(error.value.hint)


def test_a_service_that_is_not_delegated_is_neither_left_nor_divided(host: Host) -> None:
    host.make("system.slice/cron.service", "memory pids")
    place = host.choose("system.slice/cron.service", "memory")
    assert (place.kind, place.parent) == ("plain", str(host.root / "system.slice/cron.service"))


def test_nothing_is_asked_of_systemd_when_v2_has_nothing_to_give(host: Host) -> None:
    """The hybrid layout: every wanted controller is in v1, and a plain directory does."""
    host.make("", "hugetlb")
    host.make("user.slice/user-0.slice/session-3.scope", "")
    assert host.choose("user.slice/user-0.slice/session-3.scope", "memory").kind == "managed"


def test_the_root_is_systemds_and_that_of_a_container_is_its_own(host: Host) -> None:
    assert host.choose("", "cpuset").kind == "plain"
    host.make("", "cpuset cpu io memory pids", cgroup__type="domain\n")
    assert host.choose("", "cpuset").kind == "managed"


def test_a_user_in_a_session_and_in_a_batch_job(host: Host) -> None:
    host.uid = 1000
    manager = "user.slice/user-1000.slice/user@1000.service"
    host.make(manager, "memory pids")
    host.make("user.slice/user-1000.slice/session-3.scope", "memory pids")
    host.make("system.slice/slurmstepd.scope/job_1/step_0", "memory")
    host.unwritable = {str(host.root / "user.slice/user-1000.slice/session-3.scope"), str(host.root / "system.slice")}
    place = host.choose("user.slice/user-1000.slice/session-3.scope", "memory")
    assert (place.kind, place.controllers) == ("scope", {"memory", "pids"})
    place = host.choose("system.slice/slurmstepd.scope/job_1/step_0", "memory")
    assert (place.kind, place.controllers) == ("none", frozenset())
    assert "not this user's" in place.reason


def test_nothing_can_be_below_a_threaded_cgroup(host: Host) -> None:
    host.systemd = False
    host.make("slot", "cpu", "cpu", cgroup__type="domain threaded\n")
    place = host.choose("slot", "cpu")
    assert (place.kind, place.controllers) == ("none", frozenset())
    assert "is domain threaded" in place.reason


def test_a_read_only_mount(host: Host) -> None:
    host.systemd = False
    host.make("slot", "memory")
    place = host.choose("slot", "memory", writable=False)
    assert place.kind == "none"
    assert "read-only" in place.reason


def test_the_call_to_systemd_is_well_formed() -> None:
    command = cgroup_systemd.scope_command("imgrun-x.scope", 42, "user-1000.slice", user=True)
    assert command[:2] == ["busctl", "--user"]
    at = command.index("ssa(sv)a(sa(sv))")
    name, mode, count, *properties = command[at + 1 :]
    assert (name, mode) == ("imgrun-x.scope", "fail")
    names = []
    while len(properties) > 1:
        names.append(properties[0])
        signature = properties[1]
        assert signature in ("s", "b", "au")
        taken = 3 if signature != "au" else 3 + int(properties[2])
        properties = properties[taken:]
    assert properties == ["0"]  # no auxiliary units
    assert int(count) == len(names)
    assert set(names) >= {"PIDs", "Delegate", "Slice"}


# ---- removing -----------------------------------------------------------------------------------------------------


def test_removing_never_follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "precious/inside").mkdir(parents=True)
    (tmp_path / "imgrun-x/nested").mkdir(parents=True)
    (tmp_path / "imgrun-x/link").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="not empty"):
        cgroup_dirs.remove_tree(str(tmp_path / "imgrun-x"))
    assert (tmp_path / "precious/inside").is_dir()
    assert not (tmp_path / "imgrun-x/nested").exists()
    (tmp_path / "imgrun-y").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="Not a directory"):
        cgroup_dirs.remove_tree(str(tmp_path / "imgrun-y"))
    assert (tmp_path / "precious/inside").is_dir()


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    cgroup_dirs.remove_tree(str(tmp_path / "gone"))


def test_recorded_paths_outside_of_cgroup_file_systems_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "imgrun-x").mkdir()
    cgroup.remove_leftovers([str(tmp_path / "imgrun-x"), "/sys/fs/cgroup", "/sys/fs/cgroup/../../../etc/imgrun-x", ""])
    assert (tmp_path / "imgrun-x").is_dir()


def test_patience_ends(tmp_path: Path) -> None:
    (tmp_path / "imgrun-x").mkdir()
    (tmp_path / "imgrun-x/file").write_text("")
    with pytest.raises(HostError, match=r"still in use: .*imgrun-x"):
        cgroup_dirs.remove_patiently([str(tmp_path / "imgrun-x")], 0.05)


def test_a_job_without_any_cgroup_can_be_asked_everything() -> None:
    job = cgroup.JobCgroup([])
    assert job.paths == job.views == ()
    assert job.clone_into == -1
    assert job.join_descriptors() == []
    assert job.memory.event_source() == (-1, 0)
    assert job.memory.kills() is None
    with pytest.raises(HostError, match="cannot be frozen"):
        job.freeze()
    job.thaw()
    job.kill()
    job.remove()
