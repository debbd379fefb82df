"""What an ordinary user's job is said to have used, mostly without a cgroup of its own: from its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import eventually
from counted import Measured, needs_criu, programs
from ordinary import AsUser

__all__ = ["programs"]

MIB = 1 << 20


@pytest.fixture
def measured(run: AsUser, programs: Path) -> Measured:
    return Measured(run, programs, run.directory)


def live(measured: Measured, job: str) -> dict[str, Any]:
    done = measured.run("stats", "--no-stream", "--json", job)
    assert done.status == 0, done
    (record,) = json.loads(done.stdout)
    usage: dict[str, Any] = record["usage"]
    return usage


def test_stats_from_processes(measured: Measured) -> None:
    job = measured.background("/x/counted hold 40 /never & while :; do :; done")
    measured.prints(job, "holds")
    usage = live(measured, job)
    assert usage["source"] in ("proc", "cgroup")
    assert 40 * MIB <= usage["memory_current"] < 120 * MIB
    assert usage["pids_current"] >= 4
    eventually(lambda: (live(measured, job)["user_seconds"] or 0) > usage["user_seconds"] + 0.1, "its time goes on")
    assert measured.run("stats", "--no-stream").stdout.splitlines()[1].startswith(job)


def test_samples(measured: Measured) -> None:
    job = measured.background("/x/counted hold 30 /tmp/go", "--sample", "100ms")
    measured.prints(job, "holds")
    eventually(lambda: live(measured, job)["wall_seconds"] > 0.5)
    assert measured.run("exec", job, "touch", "/tmp/go").status == 0
    assert measured.run("wait", job).status == 0
    samples = measured.inspect(job)["result"]["usage"]["samples"]
    rows = [dict(zip(samples["columns"], point, strict=True)) for point in samples["points"]]
    assert max(row["memory"] or 0 for row in rows) >= 30 * MIB
    assert rows[-1]["cpu_seconds"] is not None


def test_what_the_user_may_count_is_counted(measured: Measured) -> None:
    """In user space only, where the host allows no more; a fault on a page is one there too."""
    found = []
    for pages in (1000, 11000):
        done = measured.sh(f"/x/counted touch {pages}")
        assert done.status == 0
        if measured.usage["counts"] is None or measured.counts["page_faults"] is None:
            pytest.skip("nothing is counted for this user")
        found.append(measured.counts["page_faults"])
    assert abs(found[1] - found[0] - 10000) <= 32
    scope, *qualities = measured.usage["counted"].split()
    assert scope in ("inherited", "cgroup")
    if "user" in qualities:
        assert measured.counts["context_switches"] is None


@needs_criu
def test_a_restored_job_is_counted(measured: Measured) -> None:
    """Its processes are not children of its new PID 1; they are counted one by one."""
    wait = "until test -e /tmp/go; do sleep 0.05; done"
    job = measured.background(f"/x/counted touch 20000; echo ready; {wait}; /x/counted touch 30000")
    measured.prints(job, "ready")
    target = measured.directory / "c"
    done = measured.run("checkpoint", "--to", target, job)
    if done.status:
        pytest.skip(f"this user cannot freeze here: {done.stderr}")
    saved = json.loads((target / "manifest.json").read_text())["usage"]
    assert saved["user_seconds"] is not None
    again = measured.run("restore", "--detach", target)
    assert again.status == 0, again
    job = again.stdout.strip()
    assert measured.run("exec", job, "touch", "/tmp/go").status == 0
    assert measured.run("wait", job).status == 0
    usage = measured.inspect(job)["result"]["usage"]
    assert usage["user_seconds"] + usage["system_seconds"] >= saved["user_seconds"] + saved["system_seconds"]
    if saved["counts"] is None or saved["counts"]["page_faults"] is None:
        pytest.skip("nothing is counted for this user")
    assert usage["counts"]["page_faults"] >= saved["counts"]["page_faults"] + 30000
