"""``imgrun doctor`` on this host, and on the same host with something taken away: it tells what ``start`` then does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, Done, Imgrun
from ordinary import World

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to take things away in a mount namespace")


class Host:
    """This host, changed in a mount namespace. ``wrap`` are words before the commands."""

    def __init__(self, world: World | None, state: Path, image: Path) -> None:
        self.wrap = [] if world is None else ["nsenter", f"--mount=/proc/{world.pid}/ns/mnt", "--"]
        self.state = state
        self.image = image

    def run(self, *words: str | Path) -> Done:
        done = subprocess.run(
            [*self.wrap, *COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=90,
            env={**os.environ, "IMGRUN_STATE_DIR": str(self.state)},
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def doctor(self) -> tuple[int, dict[str, dict[str, Any]]]:
        done = self.run("doctor", "--json")
        assert done.stderr == "", done
        record = json.loads(done.stdout)
        assert done.status == (0 if record["works"] else 1)
        return done.status, {check["name"]: check for check in record["checks"]}

    def start(self, *flags: str) -> int:
        return self.run("start", *flags, self.image, "--", "true").status


@pytest.fixture
def host(state_dir: Path, image: Path) -> Host:
    return Host(None, state_dir, image)


@pytest.fixture
def changed(tmp_path: Path, state_dir: Path, image: Path) -> Iterator[Callable[[str], Host]]:
    """Makes a host by what a shell script does to the mounts of this one."""
    worlds = []

    def make(script: str) -> Host:
        worlds.append(World(tmp_path / "nodes", script))
        return Host(worlds[-1], state_dir, image)

    yield make
    for world in worlds:
        world.close()


def cover(program: str) -> str:
    return f"mount --bind /dev/null $(readlink -f $(command -v {program} || echo /usr/sbin/{program}))"


def test_here_it_works(host: Host) -> None:
    status, checks = host.doctor()
    assert (status, host.start()) == (0, 0)
    for name, check in checks.items():
        assert check["state"] == "ok" or not check["needed"], name
    assert checks["a job"]["detail"].startswith("started and ended")
    for kind in ("ext4", "xfs", "btrfs", "squashfs", "erofs"):
        assert "id-mapped" in checks[f"{kind} images"]["detail"], kind
    assert str(host.state) in checks["state directory"]["detail"]


def test_it_is_for_people_too(run: Imgrun) -> None:
    done = run("doctor")
    assert (done.status, done.stderr) == (0, "")
    assert all(line.startswith(("ok       ", "limited  ", "missing  ", " " * 9)) for line in done.stdout.splitlines())


@pytest.mark.parametrize("way", ["nowhere", "read-only"])
def test_no_state_directory(changed: Callable[[str], Host], tmp_path: Path, way: str) -> None:
    if way == "nowhere":
        host = changed("")
        host.state = Path("/proc/nowhere")
    else:
        (tmp_path / "closed").mkdir()
        host = changed(f"mount -t tmpfs -o ro closed {tmp_path}/closed")
        host.state = tmp_path / "closed/state"
    status, checks = host.doctor()
    assert (status, host.start()) == (1, 125)
    assert {name for name, check in checks.items() if check["needed"] and check["state"] == "missing"} == {
        "state directory",
        "a job",
    }
    assert "IMGRUN_STATE_DIR" in checks["state directory"]["advice"]


def test_a_state_directory_that_can_hold_no_overlay(changed: Callable[[str], Host], tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    host = changed(f"mount -t overlay -o {options} none {tmp_path}/merged")
    host.state = tmp_path / "merged/state"
    status, checks = host.doctor()
    assert "on overlay" in checks["state directory"]["detail"]
    assert checks["overlay"]["state"] == "limited", checks["overlay"]
    assert (status == 0) == (host.start() == 0)


def test_a_small_state_directory(changed: Callable[[str], Host], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    host = changed(f"mount -t tmpfs -o size=40m,mode=755 small {tmp_path}/small")
    host.state = tmp_path / "small/state"
    _, checks = host.doctor()
    assert checks["state directory"]["state"] == "limited"
    assert "on tmpfs" in checks["state directory"]["detail"]


LOOP = "mount --bind /dev/null /dev/loop-control"
FUSE = "mount --bind /dev/fuse /dev/fuse; mount -o remount,bind,nodev /dev/fuse"
CGROUPS = "for tree in $(cut -d' ' -f5 /proc/self/mountinfo | grep ^/sys/fs/cgroup | sort -r); do umount -l $tree; done"
IMAGES = {f"{kind} images" for kind in ("ext4", "xfs", "btrfs", "squashfs", "erofs")}
LIMITS = {"memory limit", "process limit", "processor quota", "freeze and kill", "cgroup for each job"}


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (LOOP, {"loop devices", *IMAGES}),
        (FUSE, {"FUSE"}),
        (cover("pasta"), {"private network"}),
        (cover("mke2fs"), {"mke2fs"}),
        (CGROUPS, LIMITS),
    ],
    ids=["loop", "fuse", "pasta", "mke2fs", "cgroups"],
)
def test_what_only_limits(changed: Callable[[str], Host], host: Host, script: str, names: set[str]) -> None:
    _, before = host.doctor()
    here = changed(script)
    status, checks = here.doctor()
    assert status == 0
    worse = {name for name, check in checks.items() if check["state"] != "ok" and before[name]["state"] == "ok"}
    assert names <= worse, worse
    for name in worse:
        assert checks[name]["advice"], name
        assert checks[name]["cost"], name
    assert (here.start() == 0) == ("ext4 images" not in worse)


def test_without_user_namespaces(host: Host, tmp_path: Path) -> None:
    """In a user namespace the limit can be set for what is below it, and the host's stays."""
    host.wrap = ["unshare", "--user", "--map-root-user", "sh", "-c",
                 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" "$@"']  # fmt: skip
    status, checks = host.doctor()
    assert (status, host.start()) == (1, 125)
    assert checks["user namespace"]["state"] == "missing"
    assert "user 0" in checks["namespace limits"]["detail"]
    assert checks["a job"]["state"] == "missing"


def test_root_without_its_rights(host: Host) -> None:
    host.wrap = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    status, checks = host.doctor()
    assert "without rights over the host" in checks["caller"]["detail"]
    assert (status == 0) == (checks["a job"]["state"] == "ok")
    host.wrap = ["setpriv", "--bounding-set=-mknod", "--inh-caps=-mknod"]
    _, checks = host.doctor()
    assert checks["caller"]["state"] == "limited"
    assert "CAP_MKNOD" in checks["caller"]["detail"]
