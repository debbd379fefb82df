"""JobSpec: what is accepted, in which plain form it ends, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.errors import SpecError
from imgrun.isolation.cgroups.limits import IoMax
from imgrun.isolation.limits import Rlimit
from imgrun.job import Job
from imgrun.session import execute
from imgrun.spec import RESERVED_TARGETS, JobSpec, Mount, parse_bind, parse_io_max, parse_mount, parse_tmpfs
from imgrun.state import JobDir, StateRoot

NAMES = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,62}", fullmatch=True)
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20)
PATHS = st.lists(st.from_regex(r"[a-z0-9_-]{1,8}", fullmatch=True), min_size=1, max_size=4).map(lambda p: "/t/" + "/".join(p))


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**{"image": "/i.img", "command": ("true",), **changes})


def test_plain_forms() -> None:
    made = spec(
        image="dir/x.img", command=["a", "b"], memory="2G", swap="0", scratch_size="64M", cpus="1.5", cpu_weight="200",
        cpuset="3,0-1", pids="7", io_weight=50, time_limit="1h30m", stop_timeout="500ms", partition=2, env={"A": 1},
        rlimits=["nofile=10:20"], mounts=[Mount("bind", "/a//b/./c", "src")],
    )  # fmt: skip
    assert made.image == f"{os.getcwd()}/dir/x.img"
    assert made.command == ("a", "b")
    assert (made.memory, made.swap, made.scratch_size) == (2 << 30, 0, 64 << 20)
    assert (made.cpus, made.cpu_weight, made.cpuset, made.pids, made.io_weight) == (1.5, 200, "0-1,3", 7, 50)
    assert (made.time_limit, made.stop_timeout) == (5400.0, 0.5)
    assert made.partition == "2"
    assert made.env == {"A": "1"}
    assert made.rlimits == (Rlimit("nofile", 10, 20),)
    assert made.mounts == (Mount("bind", "/a/b/c", f"{os.getcwd()}/src"),)


def test_image_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert spec(image="~/x.img").image == "/home/me/x.img"
    assert spec(mounts=[Mount("bind", "/d", "~/data")]).mounts[0].src == "/home/me/data"


def test_a_command_may_be_one_word() -> None:
    assert spec(command="true").command == ("true",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image": ""}, "image"),
        ({"command": ()}, "command"),
        ({"command": ("a\0b",)}, "NUL"),
        ({"command": ("true",), "init": "image"}, "command"),
        ({"root": "rw"}, "root"),
        ({"userns": "on"}, "userns"),
        ({"network": "bridge"}, "network"),
        ({"seccomp": "on"}, "seccomp"),
        ({"init": "systemd"}, "init"),
        ({"root": "writable", "scratch_size": "64M"}, "--scratch-size"),
        ({"memory": "1023K"}, "memory"),
        ({"memory": "-1"}, "memory"),
        ({"memory": -1}, "memory"),
        ({"memory": "lots"}, "memory"),
        ({"scratch_size": "1M"}, "scratch-size"),
        ({"cpus": 0}, "cpus"),
        ({"cpus": float("nan")}, "cpus"),
        ({"cpus": float("inf")}, "cpus"),
        ({"cpus": "two"}, "cpus"),
        ({"cpu_weight": 0}, "cpu-weight"),
        ({"cpu_weight": 10001}, "cpu-weight"),
        ({"pids": 0}, "pids"),
        ({"pids": "1.5"}, "pids"),
        ({"pids": 1.5}, "pids"),
        ({"checkpoint_exit_code": 256}, "checkpoint-exit-code"),
        ({"checkpoint_exit_code": "a"}, "checkpoint-exit-code"),
        ({"io_weight": "x"}, "io-weight"),
        ({"cpuset": "1-0"}, "cpuset"),
        ({"time_limit": "soon"}, "time-limit"),
        ({"stop_timeout": "-1s"}, "stop-timeout"),
        ({"rlimits": ["nofile=20:10"]}, "nofile"),
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"name": "naïve"}, "name"),
        ({"hostname": "a b"}, "hostname"),
        ({"hostname": "a" * 64}, "hostname"),
        ({"workdir": "tmp"}, "workdir"),
        ({"env": {"": "x"}}, "environment"),
        ({"env": {"A=B": "x"}}, "environment"),
        ({"env": {"A": "x\0"}}, "environment"),
        ({"mounts": [Mount("bind", "rel", "/s")]}, "rel"),
        ({"mounts": [Mount("bind", "/a/../b", "/s")]}, "/a/../b"),
        ({"mounts": [Mount("bind", "/a", "")]}, "source"),
        ({"mounts": [Mount("tmpfs", "/a", "/s")]}, "source"),
        ({"mounts": [Mount("tmpfs", "/a", size=0)]}, "size"),
        ({"mounts": [Mount("tmpfs", "/a"), Mount("bind", "/a/", "/s")]}, "two mounts"),
        *(
            (changes, told)
            for no, told in (("\0", "NUL byte"), ("\udfff", r"no character: '\\udfff'"))
            for changes in (
                {"image": f"/i{no}"}, {"command": ("a", f"a{no}b")}, {"user": f"u{no}"}, {"workdir": f"/{no}"},
                {"partition": no}, {"checkpoint_dir": f"/c{no}"}, {"env": {f"A{no}": "x"}}, {"env": {"A": f"x{no}"}},
                {"mounts": [Mount("bind", f"/a{no}", "/s")]}, {"mounts": [Mount("bind", "/a", f"/s{no}")]},
                {"mounts": [Mount("image", "/a", "/s", partition=no)]}, {"io_max": [IoMax(f"/dev/sda{no}", rbps=1)]},
            )
        ),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named) as caught:
        spec(**changes)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("target", [*RESERVED_TARGETS, "//", "/proc/", "/proc/sys", "/sys/x/y", "/dev/pts/0", "/./dev/"])
def test_targets_that_are_ours(target: str) -> None:
    with pytest.raises(SpecError, match="imgrun's own"):
        spec(mounts=[Mount("tmpfs", target)])


@pytest.mark.parametrize("changes", [{"image": "/i\0.img"}, {"workdir": "/a\0b"}, {"user": "a\0b"}, {"partition": "a\0b"}])
def test_nul_bytes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        spec(**changes)


def test_the_image_init_needs_no_command() -> None:
    assert spec(init="image", command=()).command == ()


def test_a_spec_is_frozen() -> None:
    with pytest.raises(AttributeError):
        spec().memory = 1  # type: ignore[misc]


def test_with_changes_checks_again() -> None:
    assert spec().with_changes(memory="1G").memory == 1 << 30
    with pytest.raises(SpecError):
        spec().with_changes(memory="1")


def test_env_is_not_shared_with_the_caller() -> None:
    env = {"A": "1"}
    made = spec(env=env)
    env["A"] = "2"
    assert made.env == {"A": "1"}


MOUNTS = st.one_of(
    st.builds(Mount, st.just("bind"), PATHS, PATHS, st.booleans(), st.booleans(), st.none(), st.none()),
    st.builds(Mount, st.just("tmpfs"), PATHS, st.just(""), st.just(False), st.just(False),
              st.none() | st.integers(1, 2**62), st.none()),
    st.builds(Mount, st.just("image"), PATHS, PATHS, st.just(True), st.just(False), st.none(), st.none() | st.just("2")),
)  # fmt: skip
SPECS = st.fixed_dictionaries(
    {"image": PATHS, "command": st.lists(WORDS, min_size=1, max_size=4)},
    optional={
        "name": NAMES, "hostname": NAMES, "user": NAMES, "workdir": PATHS, "env": st.dictionaries(NAMES, WORDS),
        "root": st.sampled_from(["overlay", "read-only"]), "partition": NAMES,
        "scratch_size": st.integers(4 << 20, 1 << 50), "mounts": st.lists(MOUNTS, unique_by=lambda m: m.dst, max_size=4),
        "memory": st.integers(1 << 20, 1 << 50), "swap": st.integers(0, 1 << 50), "cpus": st.floats(0.01, 1000),
        "cpu_weight": st.integers(1, 10000), "cpuset": st.just("0-3,7"), "pids": st.integers(1, 1 << 20),
        "io_weight": st.integers(1, 10000), "time_limit": st.integers(0, 10**6), "tty": st.booleans(),
        "io_max": st.lists(st.builds(IoMax, PATHS, rbps=st.integers(1, 1 << 40)), max_size=2),
        "rlimits": st.lists(st.builds(Rlimit, st.just("core"), st.integers(0, 5), st.integers(5, 9)), max_size=2),
        "userns": st.sampled_from(["auto", "off"]), "init": st.sampled_from(["shim", "none"]),
        "network": st.sampled_from(["host", "none"]), "seccomp": st.sampled_from(["off", "default"]),
        "stop_signal": st.integers(1, 64), "stop_timeout": st.integers(0, 10**6),
    },
)  # fmt: skip


@given(SPECS)
def test_the_record_is_json_and_gives_the_spec_back(fields: dict[str, Any]) -> None:
    fields["io_max"] = tuple(fields.get("io_max", ()))
    made = JobSpec(**fields)
    assert JobSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_record_leaves_defaults_out() -> None:
    assert spec().to_dict() == {"image": "/i.img", "command": ["true"]}


# -- mounts as text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/s:/d", Mount("bind", "/d", "/s")),
        ("/s", Mount("bind", "/s", "/s")),
        ("/s:/d:ro", Mount("bind", "/d", "/s", ro=True)),
        ("/s:/d:rw", Mount("bind", "/d", "/s")),
        ("/s:/d:ro,idmap", Mount("bind", "/d", "/s", ro=True, idmap=True)),
        ("rel:/d", Mount("bind", "/d", "rel")),
    ],
)
def test_bind(text: str, mount: Mount) -> None:
    assert parse_bind(text) == mount


@pytest.mark.parametrize("text", ["", ":/d", "/s:/d:xx", "/s:/d:ro,rw", "/s:/d:ro:z", "/s:/d:"])
def test_bind_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_bind(text)


def test_tmpfs() -> None:
    assert parse_tmpfs("/d") == Mount("tmpfs", "/d")
    assert parse_tmpfs("/d:64M") == Mount("tmpfs", "/d", size=64 << 20)
    assert parse_tmpfs("/d:size=64M") == Mount("tmpfs", "/d", size=64 << 20)
    with pytest.raises(SpecError, match="/d"):
        parse_tmpfs("/d:big")


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("type=bind,src=/s,dst=/d", Mount("bind", "/d", "/s")),
        ("source=/s,target=/d,readonly", Mount("bind", "/d", "/s", ro=True)),
        ("type=bind,src=/s,destination=/d,ro=false,idmap=1", Mount("bind", "/d", "/s", idmap=True)),
        ("type=bind,src=/with:colon,dst=/d", Mount("bind", "/d", "/with:colon")),
        ("type=tmpfs,dst=/d,size=1M", Mount("tmpfs", "/d", size=1 << 20)),
        ("type=image,src=/s.img,dst=/d,partition=2", Mount("image", "/d", "/s.img", ro=True, partition="2")),
    ],
)
def test_mount(text: str, mount: Mount) -> None:
    assert parse_mount(text) == mount


@pytest.mark.parametrize(
    "text",
    [
        "", "type=bind", "type=nfs,src=/s,dst=/d", "type=bind,src=/s,dst=/d,size=1M", "type=tmpfs,dst=/d,ro",
        "type=tmpfs,dst=/d,size", "type=bind,src=/s,dst", "type=bind,src,dst=/d", "type=bind,src=/s,dst=/d,ro=maybe",
        "type=image,src=/s,dst=/d,rw", "type", "type=bind,src=/s,dst=/d,src=/other",
    ],
)  # fmt: skip
def test_mount_refused(text: str) -> None:
    with pytest.raises(SpecError):
        JobSpec(image="/i", command=("c",), mounts=(parse_mount(text),))


def test_io_max() -> None:
    assert parse_io_max("/dev/sda:rbps=10M,wiops=100") == IoMax("/dev/sda", rbps=10 << 20, wiops=100)
    assert parse_io_max("/dev/a:b:rbps=1").device == "/dev/a:b"
    for text in ("", "/dev/sda", "/dev/sda:", "/dev/sda:rbps", "/dev/sda:device=1", "/dev/sda:speed=1", "/dev/sda:rbps=x"):
        with pytest.raises(SpecError):
            parse_io_max(text)


@given(st.text(max_size=40))
def test_mount_parsers_refuse_or_understand(text: str) -> None:
    for parse in (parse_bind, parse_tmpfs, parse_mount, parse_io_max):
        try:
            JobSpec(image="/i", command=("c",), **{("io_max" if parse is parse_io_max else "mounts"): (parse(text),)})
        except SpecError:
            pass


@pytest.mark.parametrize("no", ["\0", "\udfff"])
def test_refused_by_the_library_too(tmp_path: Path, no: str) -> None:
    """Before it asks whether there is such a job."""
    job = Job(JobDir(StateRoot(str(tmp_path)), "0123456789ab"))
    calls: list[Callable[[], object]] = [
        lambda: Job.find(f"a{no}"),
        lambda: Job.restore(f"/c{no}"),
        lambda: job.checkpoint(f"/c{no}"),
        lambda: job.checkpoint(archive=f"/c{no}"),
        lambda: execute(job, ("a", f"b{no}")),
        lambda: execute(job, ("a",), user=f"u{no}"),
        lambda: execute(job, ("a",), workdir=f"/w{no}"),
        lambda: execute(job, ("a",), env={"A": no}),
    ]
    for call in calls:
        with pytest.raises(SpecError, match=r"holds (a NUL byte|what is no character)") as caught:
            call()
        assert caught.value.hint == "remove it"
        assert caught.value.message.isascii()
        assert caught.value.message.isprintable()
