"""docs/compatibility.md, from what the guests sent out: ``python tests/vm/compatibility.py DIRECTORY``, to standard output.

DIRECTORY holds one directory per guest, as a run of the tests leaves them (pytest's ``--basetemp``, below ``vm0``).
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

HEAD = """\
# Compatibility

Written by `tests/vm/compatibility.py` from a run of `./dev vm`: which kernels and systems imgrun was tested on in QEMU
guests, with what outcome. The host that runs the other tests is described in [benchmarks.md](benchmarks.md).
"""
WHAT = {
    "test_start": "start, accounting, id-mapped mounts",
    "test_limits": "every limit, memory verdicts",
    "test_rootless": "ordinary users in a systemd session",
    "test_memory": "rounds before a checkpoint, lazy restore",
    "test_hold": "holding instead of killing",
    "test_checkpoint": "checkpoint and restore",
    "test_counters": "hardware counters",
    "test_init": "an image's own init",
    "test_migration": "checkpoints of another kernel",
}


def outcomes(results: Path) -> dict[str, list[str]]:
    """The verdict of each test by its file: passed, or what else."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        file = (case.get("classname") or "").rpartition(".")[2]
        found.setdefault(file, []).append(next((verdict.tag for verdict in case), "passed"))
    return found


def rows(directory: Path) -> Iterator[str]:
    yield "| system | kernel | machine | Python | CRIU | what | passed | not |"
    yield "| --- | --- | --- | --- | --- | --- | ---: | ---: |"
    for guest in sorted(path for path in directory.iterdir() if (path / "junit.xml").exists()):
        facts = json.loads((guest / "facts.json").read_text())
        host = " | ".join(str(facts.get(key, "-")) for key in ("system", "kernel", "machine", "python", "criu"))
        for file, verdicts in outcomes(guest / "junit.xml").items():
            passed = verdicts.count("passed")
            yield f"| {host} | {WHAT.get(file, file)} | {passed} | {len(verdicts) - passed} |"


def limited(directory: Path) -> Iterator[str]:
    """What doctor finds limited or missing in each guest."""
    for guest in sorted(path for path in directory.iterdir() if (path / "facts.json").exists()):
        facts = json.loads((guest / "facts.json").read_text())
        found = {name: said for name, said in facts.get("doctor", {}).items() if not said.startswith("ok")}
        if found:
            yield f"\n{facts['system']}, Linux {facts['kernel']}:\n"
            yield from (f"- {name}: {said}" for name, said in found.items())


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(HEAD)
    print("\n".join(rows(place)))
    print("\n## What `imgrun doctor` finds limited or missing there")
    print("\n".join(limited(place)))
