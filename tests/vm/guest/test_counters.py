"""Hardware counters, where the processor has those for instructions and cycles and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guest.conftest import CGROUPS, IMAGES, Imgrun

TURNS = 20_000_000
INSTRUCTIONS = 4 * TURNS
"""Of the loop in spin.c."""


def counted(imgrun: Imgrun, record: Path, *words: str | Path) -> dict[str, Any]:
    done = imgrun("start", "--pmu", "require", "--result", record, *words, IMAGES / "small.squashfs", "--", "spin", str(TURNS))
    assert (done.status, done.stdout, done.stderr) == (0, "done\n", ""), done
    return dict(json.loads(record.read_text())["usage"])


def test_counters_of_a_cgroup(root: Imgrun, room: Path, facts: dict[str, Any]) -> None:
    usage = counted(root, room / "result.json")
    facts["counts"] = usage["counts"]
    assert usage["counted"].split()[0] == "cgroup"
    within(usage["counts"]["instructions"])
    assert abs(usage["rates"]["ipc"] - 0.5) < 0.01  # shift=1: each instruction takes two cycles
    for name in ("branches", "branch_misses", "cache_references", "cache_misses"):
        assert usage["counts"][name] is None
    assert usage["rates"]["branch_instruction_rate"] is None
    assert usage["rates"]["cache_hit_rate"] is None


def within(instructions: int) -> None:
    assert INSTRUCTIONS <= instructions <= INSTRUCTIONS * 1.02
