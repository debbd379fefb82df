"""What a preemption costs under real schedulers: until the slot is free, until the job goes on, and of its work."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.harness import Case, Outcome, Unavailable, interleave, last_line
from bench.place import HERE, Place
from bench.report import Section, Table
from bench.submitting import EVERY, Way, await_that, htcondor, slurm

TITLE = "Preempted by a scheduler"
SIZES = {False: (64, 1024), True: (16,)}
"""Of the job's memory, in MiB."""
SMALL = 100
"""Larger jobs are not killed: they would do little else than save themselves so often."""
ROUNDS = {False: 3, True: 1}
TICKS = 50
"""How often the program is to have moved before it is disturbed, and after."""
COLUMNS = (("stops", "to its stop"), ("frees", "from there to the slot free"), ("goes on", "to its going on"),
           ("lost", "work lost"))  # fmt: skip


def measure(place: Place) -> Section:
    section = Section(TITLE)
    section.say(
        f"""An ordinary user's job under real daemons on this machine. Its program fills so much memory with random data, and
        a hundred times a second notes how far it is. `to its stop`: from the administrator's command to the last note;
        `from there to the slot free`: until Slurm has the job in its queue again, or HTCondor has the checkpoint on the
        submit machine and the sandbox is gone. `to its going on`: from then (at Slurm from `scontrol update StartTime=now`,
        without which it waits two minutes) to the next note, the scheduler's own cycles of a second or two included.
        `work lost`: what had been noted and is done again. A job that is killed gets no signal; imgrun then has a
        checkpoint every {EVERY} s. Without imgrun the same program starts from the beginning."""
    )
    program = _build(place)
    for name, opened in (("Slurm", slurm), ("HTCondor", htcondor)):
        with ExitStack() as stack:
            try:
                ways = stack.enter_context(opened(place))
            except (AssertionError, OSError, subprocess.SubprocessError, Unavailable) as e:
                section.find(f"Not measured here: {name} ({last_line(str(e))}).")
                continue
            lost: list[float] = []
            for mebibytes in SIZES[place.quick]:
                cases: dict[str, Case] = {
                    case: partial(_once, way, program, mebibytes)
                    for case, way in ways.items() if mebibytes <= SMALL or not way.killed
                }  # fmt: skip
                outcome = interleave(cases, rounds=ROUNDS[place.quick], warmups=0)
                title = f"{name}, {mebibytes} MiB"
                section.data[title] = outcome
                section.add(_table(outcome, title))
                section.refusals(outcome)
                signalled = (outcome.summary(case, "lost") for case, way in ways.items() if not way.killed)
                lost += [summary.high for summary in signalled if summary is not None]
            section.aim(f"{name}, the most that a preemption by a signal has lost", max(lost, default=None), 0, unit=" s")
    return section


def _table(outcome: Outcome, heading: str) -> Table:
    table = Table(heading, *(title for _, title in COLUMNS), "runs")
    for case, values in outcome.values.items():
        medians = {name: outcome.median(case, name) for name, _ in COLUMNS}
        cells = {name: "-" if median is None else f"{median:.2f} s" for name, median in medians.items()}
        if values and medians["lost"] is None:
            cells["lost"] = "all"
        table.row(case, *cells.values(), str(max((len(found) for found in values.values()), default=0)))
    return table


def _build(place: Place) -> str:
    program = f"{place.short}/pulse"
    subprocess.run(["cc", "-O2", "-static", "-o", program, f"{HERE}/pulse.c"], check=True)
    return program


# -- one job ------------------------------------------------------------------------------------------------------------


def _once(way: Way, program: str, mebibytes: int) -> Mapping[str, float]:
    try:
        way.here = way.make_directory()
        shutil.copy(program, way.here)
        try:
            return _run(way, mebibytes)
        finally:
            way.abandon()
    except AssertionError as e:
        raise Unavailable(last_line(str(e))) from e


def _run(way: Way, mebibytes: int) -> Mapping[str, float]:
    seen = way.seen_at or str(way.here)
    way.submit([f"{seen}/pulse", str(mebibytes), f"{seen}/notes", f"{seen}/stop"], mebibytes)
    _await_notes(way, TICKS, "the program does not start")
    if way.killed:
        await_that(way.has_checkpoint, "there is no checkpoint")
        # At any moment between one checkpoint and the next, but not while one is made.
        time.sleep(random.uniform(0, EVERY))
        _await_notes(way, 1, "the program does not go on after a checkpoint")
    acted = time.time()
    way.disturb()
    freed = time.time()
    resumed = way.resume()
    _await_notes(way, TICKS, "the program does not go on")
    (way.here / "stop").touch()
    way.end()
    return _measured(_notes(way.here), acted, freed, resumed)


def _await_notes(way: Way, more: int, otherwise: str) -> None:
    before = len(_notes(way.here))
    await_that(lambda: len(_notes(way.here)) >= before + more, otherwise)


Note = tuple[int, float]
"""How far the program was, and when."""


def _notes(here: Path) -> list[Note]:
    try:
        lines = (here / "notes").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    words = (line.split() for line in lines if line.endswith("\n"))
    return [(int(count), float(when)) for count, when in words]


def _measured(notes: list[Note], acted: float, freed: float, resumed: float) -> dict[str, float]:
    """What a disturbance has cost, that began at ``acted`` and was over at ``freed``; the job could go on at ``resumed``."""
    before = [note for note in notes if note[1] < freed]
    first = notes[len(before)]
    last = before[-1]
    found = {"stops": last[1] - acted, "frees": freed - last[1], "goes on": first[1] - resumed}
    saved = [when for count, when in before if count == first[0] - 1]
    return {**found, "lost": last[1] - saved[-1]} if saved else found
