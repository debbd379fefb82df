"""What a preemption will mean for a job, as far as it is known at the start: whether it can be frozen in time."""

from __future__ import annotations

from collections.abc import Callable

from imgrun.spec import JobSpec

SAVED = 150 << 20
"""Bytes of memory that a freeze surely saves in a second (bench/schedulers.py measures it)."""
CARRIED = 60 << 20
"""The same where HTCondor has to carry them to the submit machine after that, which its time limit includes."""


def seconds(memory: int, rate: int) -> int:
    """How long it may take to save so many bytes."""
    return -(-memory // rate)


def warn_if_short(spec: JobSpec, memory: int, grace: float | None, rate: int, event: str, warn: Callable[[str], None]) -> None:
    """Say at the start that ``event`` may lose work, when this memory may not be saved in the seconds that it leaves.

    ``grace`` is None where that is not known. Periodic checkpoints bound what is lost.
    """
    if grace is None or spec.checkpoint_every is not None or seconds(memory, rate) <= grace:
        return
    warn(f"{memory >> 20} MiB may not be saved within the {grace:g} s that {event} leaves: "
         "periodic checkpoints (--checkpoint-every) would bound what is lost")  # fmt: skip
