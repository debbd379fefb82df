"""A job starts, is accounted and leaves nothing; in each place of the hierarchy where imgrun may be called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest.conftest import CGROUPS, FALLBACK, IMAGES, SQUASHFS_HAS_ID_MAPS, Imgrun, complaints

Make = Callable[..., Imgrun]


def test_doctor_finds_nothing_missing(root: Imgrun, facts: dict[str, Any]) -> None:
    done = root("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    facts["doctor"] = {name: f"{check['state']}: {check['detail']}" for name, check in checks.items()}
    assert [name for name, check in checks.items() if check["state"] == "missing" and check.get("needed")] == [], done


def test_a_job_is_alone_and_accounted(root: Imgrun, room: Path) -> None:
    record = room / "result.json"
    script = "echo $$; hostname; cat /proc/self/cgroup; id -u; spin 3000000; exit 7"
    done = root("start", "--hostname", "inside", "--result", record, IMAGES / "small.squashfs", "--", "sh", "-c", script)
    assert (done.status, complaints(done)) == (7, ""), done
    assert done.stdout.splitlines() == ["3", "inside", "0::/", "0", "done"]
    result = json.loads(record.read_text())
    assert (result["reason"], result["exit_code"]) == ("exited", 7)
    usage = result["usage"]
    assert usage["user_seconds"] > 0
    assert (usage["memory_peak"] or 0) > 0, usage
    assert usage["source"] == "cgroup"


def test_an_image_on_a_loop_device_is_idmapped(root: Imgrun) -> None:
    """Root of the image is root in the job and nobody in particular on the host; a bind mount is mapped when asked."""
    script = "stat -c %u:%g /bin/busybox; head -n 1 /proc/self/uid_map; touch /new; stat -c %u /new"
    lines = root.good("start", IMAGES / "small.ext4", "--", "sh", "-c", script).splitlines()
    assert (lines[0], lines[2]) == ("0:0", "0")
    inside, outside, _ = map(int, lines[1].split())
    assert inside == 0
    assert outside != 0


def test_what_this_kernel_cannot_map_has_the_ids_of_the_host(root: Imgrun) -> None:
    """squashfs has id-mapped mounts from 6.2 on; the job runs all the same, and it is said."""
    done = root("start", IMAGES / "small.squashfs", "--", "head", "-n", "1", "/proc/self/uid_map")
    assert done.status == 0, done
    assert (done.stderr == "") if SQUASHFS_HAS_ID_MAPS else done.stderr.startswith(FALLBACK)
    assert (int(done.stdout.split()[1]) != 0) == SQUASHFS_HAS_ID_MAPS, done


def test_a_mount_is_idmapped_on_request(root: Imgrun, room: Path) -> None:
    (room / "given").mkdir()
    (room / "given/mine").touch()
    mount = f"type=bind,src={room / 'given'},dst=/given,idmap"
    script = "stat -c %u /given/mine; touch /given/new"
    assert root.good("start", "--mount", mount, IMAGES / "small.ext4", "--", "sh", "-c", script) == "0\n"
    assert (room / "given/new").stat().st_uid == 0


def test_an_image_of_another_architecture_is_refused(root: Imgrun) -> None:
    done = root("start", IMAGES / "foreign.squashfs", "--", "true")
    assert done.status == 125
    assert "aarch64" in done.stderr.splitlines()[0], done
    assert "x86_64" in done.stderr, done


def test_only_the_unified_hierarchy_is_there() -> None:
    assert (CGROUPS / "cgroup.controllers").exists(), "this guest is to have cgroup v2 only"
    assert " cgroup " not in Path("/proc/mounts").read_text()
