"""Which partition of a disk is the root.

The order: what the user names; else the one with the root type for this architecture (Discoverable Partitions
Specification of the UAPI group); else the contents decide, which needs a look inside (imgrun.image).
"""

from __future__ import annotations

from imgrun.errors import ImageArchError, PartitionError
from imgrun.storage.blkid import Partition, Table
from imgrun.storage.guest import ALSO_RUNS, host_machine

ROOT_TYPES = {
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "x86_64",
    "44479540-f297-41b2-9af7-d131d5f0458a": "i686",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "aarch64",
    "69dad710-2ce4-4e3c-b16c-21a1d49abed3": "armv7l",
    "72ec70a6-cf74-40e6-bd49-4bda08e8f224": "riscv64",
    "60d5a7fe-8e7d-435c-b714-3dd8162144e1": "riscv32",
    "c31c45e6-3f39-412e-80fb-4809c4980599": "ppc64le",
    "912ade1d-a839-4913-8964-a10eee08fbd2": "ppc64",
    "1de3f1ef-fa98-47b5-8dcd-4a860a654d78": "ppc",
    "5eead9a9-fe09-4a1e-a1d7-520d00531306": "s390x",
    "08a7acea-624c-4a20-91e8-6e0fa67d23f9": "s390",
    "77055800-792c-4f94-b39a-98c91b762bb6": "loongarch64",
    "700bda43-7a34-4507-b179-eeb93d7a7ca3": "mips64el",
    "37c58c8a-d913-4156-a25f-48b1b64e07f0": "mipsel",
    "993d8d3d-f80e-4225-855a-9daf8ed7ea97": "ia64",
    "6523f8ae-3eb1-4e2a-a05a-18b695ae656f": "alpha",
}
NO_AUTO = 1 << 63
"""The attribute of a root partition that is not to be found by its type."""
EMPTY_SLOT = "_empty"
"""The label of a partition kept free for the next version of a system."""


def numbered(table: Table, wanted: str) -> Partition | None:
    """The partition whose number ``wanted`` is."""
    return next((p for p in table.partitions if str(p.number) == wanted), None)


def named(table: Table, wanted: str, path: str) -> Partition:
    """The partition that ``wanted`` names: by label or UUID, its own or its file system's, which must be filled in.

    Raises PartitionError, with the list, when it names none or several.
    """
    low = wanted.lower()
    found = [p for p in table.partitions if wanted in (p.label, p.fs_label) or low in (p.uuid.lower(), p.fs_uuid.lower())]
    if len(found) == 1 and wanted:
        return found[0]
    if found and wanted:
        numbers = ", ".join(str(p.number) for p in found)
        raise PartitionError(f"partitions {numbers} of {path} are all named {wanted!r}", f"give a number: {listing(table)}")
    raise PartitionError(f"{path} has no partition {wanted!r}", f"it has {listing(table)}")


def by_type(table: Table, path: str) -> list[Partition]:
    """The root partitions by their type GUID; none when the contents have to decide.

    Raises ImageArchError when the only root partitions are for other processors.
    """
    here = host_machine()
    roots: dict[str, list[Partition]] = {}
    for p in table.partitions:
        machine = ROOT_TYPES.get(p.type)
        if machine and not p.flags & NO_AUTO and p.label != EMPTY_SLOT:
            roots.setdefault(machine, []).append(p)
    for machine in (here, *ALSO_RUNS.get(here, ())):
        if machine in roots:
            return roots[machine]
    if roots:
        raise ImageArchError(
            f"the root partition of {path} is for {next(iter(roots))}, this host is {here}", f"use an image for {here}"
        )
    return []


def several(table: Table, path: str, candidates: list[Partition], what: str) -> PartitionError:
    numbers = " and ".join(str(p.number) for p in candidates)
    return PartitionError(f"{path} has {len(candidates)} {what}, {numbers}", f"choose one with --partition: {listing(table)}")


def none_found(table: Table, path: str) -> PartitionError:
    if not table.partitions:
        return PartitionError(f"{path} is a disk without any partition", "was it ever installed?")
    return PartitionError(
        f"{path} has no partition that holds a root file system (an os-release file)",
        f"choose one with --partition: {listing(table)}",
    )


def listing(table: Table) -> str:
    """The partitions in one line, for a hint."""
    return "; ".join(describe(p) for p in table.partitions) or "none"


def describe(p: Partition) -> str:
    names = [repr(name) for name in (p.label, p.fs_label) if name]
    return " ".join([str(p.number), *names[:1], _human(p.size), p.fstype or "nothing recognised"])


def _human(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"
