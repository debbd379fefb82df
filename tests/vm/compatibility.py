"""docs/compatibility.md, from what the guests sent out: ``python tests/vm/compatibility.py DIRECTORY``, to standard output.

DIRECTORY holds one directory per guest, as a run of the tests leaves them (pytest's ``--basetemp``, below ``vm0``).
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEAD = """\
# Compatibility

Written by `tests/vm/compatibility.py` from what the guests of `IMGRUN_VM_ALL=1 ./dev vm` left: which kernels and systems
imgrun was tested on in QEMU, with what outcome. The host of the other tests is described in [benchmarks.md](benchmarks.md).
"""
TAIL = """
## What is not supported

- Linux before 5.19 (and before 5.14 nothing starts), and hosts where cgroup v1 and v2 are both absent: `imgrun doctor` says
  what a host lacks.
- A checkpoint of one kind of processor (x86_64, aarch64) on the other: refused by `imgrun check`.
- A checkpoint from a newer kernel is refused on an older one; `--allow kernel` tries it, see the table above.
- Hardware counters where the machine has none, as in most virtual machines: they are null in the record.
- Freezing with a distribution's CRIU: it lacks the patches of imgrun-criu (and 4.1.1 failed on aarch64).

Not tested, and so not known: the kernels of RHEL and Ubuntu, and processors other than these two kinds.
"""
WHAT = {
    "test_start": "start, accounting, id-mapped mounts",
    "test_limits": "every limit, memory verdicts",
    "test_rootless": "ordinary users in a systemd session",
    "test_memory": "rounds before a checkpoint, lazy restore",
    "test_hold": "holding instead of killing",
    "test_checkpoint": "checkpoint and restore",
    "test_architecture": "checkpoint and restore",
    "test_leaving": "checkpoint to an archive, and restore",
    "test_counters": "hardware counters",
    "test_init": "an image's own init",
    "test_from_older": "checkpoints of an older kernel",
    "test_from_newer": "checkpoints of newer kernels",
}


class Run(NamedTuple):
    """What one guest sent out."""

    facts: dict[str, Any]
    outcomes: dict[str, list[str]]
    """The verdict of each test by its file: passed, or what else."""

    @property
    def host(self) -> str:
        return " | ".join(str(self.facts.get(key, "-")) for key in ("system", "kernel", "machine", "python", "criu"))


def runs(directory: Path) -> list[Run]:
    found = []
    for guest in sorted(path for path in directory.iterdir() if (path / "junit.xml").exists()):
        outcomes: dict[str, list[str]] = {}
        for case in ElementTree.parse(guest / "junit.xml").iter("testcase"):
            file = (case.get("classname") or "").rpartition(".")[2]
            outcomes.setdefault(file, []).append(next((verdict.tag for verdict in case), "passed"))
        found.append(Run(json.loads((guest / "facts.json").read_text()), outcomes))
    return sorted(found, key=lambda run: (run.facts["machine"] != "x86_64", version(run.facts["kernel"])))


def version(kernel: str) -> list[int]:
    return [int(word) for word in kernel.partition("-")[0].partition("+")[0].split(".")]


def tested(found: list[Run]) -> Iterator[str]:
    yield "| system | kernel | machine | Python | CRIU | what | passed | not |"
    yield "| --- | --- | --- | --- | --- | --- | ---: | ---: |"
    together: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for host in dict.fromkeys(run.host for run in found):
        for file in WHAT:
            for run in found:
                if run.host == host:
                    together[host, file] += run.outcomes.get(file, [])
    for (host, file), verdicts in together.items():
        if verdicts:
            passed = verdicts.count("passed")
            yield f"| {host} | {WHAT[file]} | {passed} | {len(verdicts) - passed} |"


def moved(found: list[Run]) -> Iterator[str]:
    """What became of the checkpoints that one guest made and another was given."""
    yield "| frozen on | continued on | by | outcome |"
    yield "| --- | --- | --- | --- |"
    for run in found:
        for record in run.facts.get("moved", ()):
            outcome = record.get("outcome", "not as it should").replace("\n", " ").replace("|", "/")
            yield f"| {record['from']} | {run.facts['kernel']} | {record['who']} | {outcome} |"


def limited(found: list[Run]) -> Iterator[str]:
    """What doctor finds limited or missing in each guest."""
    for run in found:
        checks = {name: said for name, said in run.facts.get("doctor", {}).items() if not said.startswith("ok")}
        if checks:
            yield f"\n{run.facts['system']}, Linux {run.facts['kernel']}:\n"
            yield from (f"- {name}: {said}" for name, said in checks.items())


if __name__ == "__main__":
    guests = runs(Path(sys.argv[1]))
    print(HEAD)
    print("\n".join(tested(guests)))
    print("\n## Checkpoints that went from one kernel to another\n")
    print("\n".join(moved(guests)))
    print("\n## What `imgrun doctor` finds limited or missing there")
    print("\n".join(limited(guests)))
    print(TAIL, end="")
