"""The spec as TOML: the example of the design, every key, and errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgrun.errors import SpecError
from imgrun.isolation.cgroups.limits import IoMax
from imgrun.isolation.limits import Rlimit
from imgrun.spec import JobSpec, Mount
from imgrun.specfile import load


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.toml"


def parse(path: Path, text: str) -> JobSpec:
    path.write_text(text)
    return JobSpec(**load(str(path)))


def test_all_of_it(path: Path) -> None:
    here = path.parent
    spec = parse(
        path,
        """
        image = "ubuntu.img"
        command = ["./analyse", "data.csv"]
        name = "n"
        hostname = "worker-7"
        user = "user"
        workdir = "/tmp"
        root = "read-only"
        partition = "2"
        scratch_size = "64M"
        userns = "off"
        init = "none"
        network = "none"
        seccomp = "default"
        tty = true
        stop_signal = "INT"
        stop_timeout = "5s"

        [env]
        OMP_NUM_THREADS = "2"
        NUMBER = 3
        FLAG = true

        [limits]
        memory = "2G"
        swap = 0
        cpus = 2
        cpu_weight = 50
        cpuset = "0"
        pids = 100
        io_weight = 10
        time_limit = "1h"
        io_max = [{device = "/dev/sda", rbps = "10M", wiops = 5}]
        [limits.rlimits]
        nofile = "10:20"
        core = 0

        [[mounts]]
        type = "bind"
        src = "data"
        dst = "/data"
        ro = true
        [[mounts]]
        type = "tmpfs"
        dst = "/fast"
        size = "1M"
        [[mounts]]
        type = "image"
        src = "/other.img"
        dst = "/other"
        partition = 2
        """,
    )
    assert spec == JobSpec(
        image=f"{here}/ubuntu.img", command=("./analyse", "data.csv"), name="n", hostname="worker-7", user="user",
        workdir="/tmp", root="read-only", partition="2", scratch_size=64 << 20, userns="off", init="none",
        network="none", seccomp="default", tty=True, stop_signal=2, stop_timeout=5.0,
        env={"OMP_NUM_THREADS": "2", "NUMBER": "3", "FLAG": "true"},
        memory=2 << 30, swap=0, cpus=2.0, cpu_weight=50, cpuset="0", pids=100, io_weight=10, time_limit=3600.0,
        io_max=(IoMax("/dev/sda", rbps=10 << 20, wiops=5),), rlimits=(Rlimit("nofile", 10, 20), Rlimit("core", 0, 0)),
        mounts=(
            Mount("bind", "/data", f"{here}/data", ro=True),
            Mount("tmpfs", "/fast", size=1 << 20),
            Mount("image", "/other", "/other.img", ro=True, partition="2"),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named", "hinted"),
    [
        ("imagee = 'x'", "imagee", "image"),
        ("memory = '1G'", "memory", "[limits]"),
        ("[limits]\nmemroy = '1G'", "limits.memroy", "limits.memory"),
        ("limits = 3", "limits", "[limits]"),
        ("env = 3", "env", "[env]"),
        ("[env]\nA = [1]", "env.A", "A ="),
        ("image = 3", "image", "write image"),
        ("command = 'x'", "command", "write command"),
        ("command = [1]", "command", "write command"),
        ("tty = 'yes'", "tty", "true"),
        ("checkpoint_dir = 5", "checkpoint_dir", "write checkpoint_dir"),
        ("stop_signal = 'NOPE'", "NOPE", ""),
        ("mounts = 3", "mounts", "[[mounts]]"),
        ("mounts = [3]", "mounts", "[[mounts]]"),
        ("[[mounts]]\ntype = 'bind'\nsrc='/s'", "mount 1", "dst"),
        ("[[mounts]]\ndst='/d'\nsrc=3", "mount 1", "src"),
        ("[[mounts]]\ndst='/d'\nsrc='/s'\nro='maybe'", "mount 1", ""),
        ("[[mounts]]\ntype='tmpfs'\ndst='/d'\nsize=-1", "mount 1", ""),
        ("[[mounts]]\ntype=['x']\ndst='/d'", "mount 1", ""),
        ("[limits]\nio_max = 'x'", "io_max", "[["),
        ("[limits]\nio_max = [{rbps = 1}]", "io_max", "device"),
        ("[limits]\nio_max = [{device = '/d', speed = 1}]", "limits.io_max.speed", ""),
        ("[limits]\nio_max = [{device = '/d', rbps = 'x'}]", "rbps", ""),
        ("[limits]\nrlimits = ['nofile=1']", "rlimits", "[rlimits]"),
        ("[limits.rlimits]\nnofiles = 1", "nofiles", ""),
        ("[limits]\nmemory = true", "memory", ""),
        ("[limits]\nmemory = []", "memory", ""),
        ("[limits]\ncpus = 'x'", "cpus", ""),
        ("[limits]\ncpus = true", "cpus", ""),
        ("stop_timeout = []", "stop-timeout", ""),
        ("scratch_size = {}", "scratch-size", ""),
        ("partition = [1]", "partition", ""),
        ("a = ", "not valid TOML", ""),
        ("a = '\ud800'", "not valid TOML", ""),
    ],
)
def test_refused(path: Path, text: str, named: str, hinted: str) -> None:
    if not text.startswith("command ="):
        text = f"command = ['c']\n{text}"
    if not text.startswith("image =") and "\nimage =" not in text:
        text = f"image = 'i'\n{text}"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SpecError) as caught:
        JobSpec(**load(str(path)))
    assert named in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert hinted in caught.value.hint


def test_the_file_is_named(path: Path) -> None:
    with pytest.raises(SpecError, match=str(path)):
        load(str(path))
    path.mkdir()
    with pytest.raises(SpecError, match=str(path)):
        load(str(path))
    path.rmdir()
    path.write_text("x = 1")
    with pytest.raises(SpecError, match=str(path)):
        load(str(path))


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    "image command name hostname user workdir root partition scratch_size userns init network seccomp tty stop_signal "
    "stop_timeout env limits mounts".split()
)
LIMITS = st.dictionaries(
    st.sampled_from("memory swap cpus cpu_weight cpuset pids io_weight io_max time_limit rlimits".split()), VALUES, max_size=3
)
MOUNT = st.dictionaries(st.sampled_from("type src dst ro idmap size partition".split()), VALUES, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=4), LIMITS, st.lists(MOUNT, max_size=2))
def test_any_table_is_understood_or_refused(
    path: Path, top: dict[str, Any], limits: dict[str, Any], mounts: list[Any]
) -> None:
    from imgrun.specfile import from_table

    table = {"image": "i", "command": ["c"], "limits": limits, "mounts": mounts, **top}
    try:
        spec = JobSpec(**from_table(table, str(path)))
    except SpecError:
        return
    assert JobSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
