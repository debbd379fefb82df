"""Hardware counters, where the processor has those for instructions and cycles and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guest.conftest import CGROUPS, IMAGES, Imgrun

TURNS = 20_000_000
PER_TURN = 4
"""Instructions, of the loop in spin.c."""


def counted(imgrun: Imgrun, record: Path, turns: int, *words: str | Path) -> dict[str, Any]:
    done = imgrun("start", "--pmu", "require", "--result", record, *words, IMAGES / "small.squashfs", "--", "spin", str(turns))
    assert (done.status, done.stdout, done.stderr) == (0, "done\n", ""), done
    return dict(json.loads(record.read_text())["usage"])


def counts_the_loop(imgrun: Imgrun, record: Path, *words: str | Path) -> dict[str, Any]:
    """Whether the loop is counted as it is: what a job has besides, its start and the kernel's work, is in both runs."""
    once, thrice = (counted(imgrun, record, turns, *words) for turns in (TURNS, 3 * TURNS))
    loop = thrice["counts"]["instructions"] - once["counts"]["instructions"]
    assert abs(loop / (2 * TURNS * PER_TURN) - 1) < 0.02, (once, thrice)
    assert once["counts"]["instructions"] > TURNS * PER_TURN
    assert abs(thrice["rates"]["ipc"] - 0.5) < 0.01  # shift=1: each instruction takes two cycles
    return thrice


def test_counters_of_a_cgroup(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    usage = counts_the_loop(root, room / "result.json")
    facts["counts"] = usage["counts"]
    assert usage["counted"].split()[0] == "cgroup"
    for name in ("branches", "branch_misses", "cache_references", "cache_misses"):
        assert usage["counts"][name] is None
    assert usage["rates"]["branch_instruction_rate"] is None
    assert usage["rates"]["cache_hit_rate"] is None


def test_counters_of_a_task(root: Imgrun, room: Path) -> None:
    """In the root of the hierarchy of a host whose cgroups are not to be changed: counted from the first process on."""
    before = (CGROUPS / "cgroup.subtree_control").read_text()
    counts_the_loop(root, room / "result.json", "--limits", "best-effort")
    assert before == (CGROUPS / "cgroup.subtree_control").read_text()


def test_what_is_not_counted_is_undefined(root: Imgrun, room: Path) -> None:
    ad = room / "ad"
    root.good("start", "--classad", ad, IMAGES / "small.squashfs", "--", "spin", "1000000")
    lines = dict(line.split(" = ", 1) for line in ad.read_text().splitlines())
    assert int(lines["RemoteInstructions"]) >= 4_000_000
    assert lines["RemoteCpuCacheHitRate"] == lines["RemoteCpuBranchPredictionMissRate"] == "undefined"


def test_an_image_for_another_processor_is_refused(root: Imgrun) -> None:
    done = root("start", IMAGES / "foreign.squashfs", "--", "true")
    assert done.status == 125
    assert "x86_64" in done.stderr.splitlines()[0], done
