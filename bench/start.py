"""How long it takes from asking for a command in an image to its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping

from bench import peers
from bench.harness import Case, Outcome, Unavailable, interleave, run_checked
from bench.place import Place
from bench.report import Section, Table, milliseconds, ranking, times

TITLE = "Start"
COMMAND = "imgrun start IMAGE"
LIBRARY = "Job.start(...).wait()"
LIBRARY_START = "of that, Job.start(...)"
BWRAP_CALL = "bwrap by subprocess.run"
ROUNDS = {False: 40, True: 6}


def measure(place: Place) -> Section:
    section = Section(TITLE)
    section.say(
        """`/bin/true` in the same root: from the call to the end of the process. imgrun mounts the image (a loop device,
        ext4, an overlay, a user namespace with id-mapped mounts) and keeps and removes a record; the others are given a
        directory."""
    )
    rounds = ROUNDS[place.quick]
    commands = _measure_commands(place, rounds)
    section.data["commands"] = commands
    section.add(ranking(commands, "wall", peers.REFERENCE, "command"))
    library = interleave(_library_cases(place), rounds=rounds * 2, warmups=3, seconds=30)
    section.data["library"] = library
    section.say("From a Python process that has imported imgrun and started a job before:")
    section.add(_library_table(library))
    section.say("Where the time of a start goes, as `--timings` tells it (medians):")
    section.add(_steps(commands, library))
    section.aim("`imgrun start` vs `systemd-nspawn -D`", commands.ratio(COMMAND, peers.REFERENCE, "wall"), 1)
    section.aim("the library vs `bwrap`", library.ratio(LIBRARY, BWRAP_CALL, "wall"), 3)
    floor = commands.median("python -c pass", "wall")
    if floor is not None:
        section.find(f"Of every start by the command, {milliseconds(floor)} is the Python interpreter itself.")
    section.refusals(commands)
    section.refusals(library)
    return section


# -- the command --------------------------------------------------------------------------------------------------------


def _measure_commands(place: Place, rounds: int) -> Outcome:
    ours = {COMMAND: place.image, "imgrun start DIRECTORY": place.tree}
    if place.squashfs:
        ours["imgrun start SQUASHFS"] = place.squashfs
    cases: dict[str, Case] = {name: _timed_start(place, image) for name, image in ours.items()}
    refused: dict[str, str] = {}
    for name in peers.PEERS:
        try:
            cases[name] = _plain(peers.choose(place, name)(place, ["/bin/true"]))
        except Unavailable as e:
            refused[name] = str(e)
    cases["python -c pass"] = _plain([sys.executable, "-c", "pass"])
    try:
        outcome = interleave(cases, rounds=rounds, seconds=60)
    finally:
        for peer in peers.PEERS.values():
            peer.clean_up(place)
    outcome.refused.update(refused)
    return outcome


def _plain(argv: list[str]) -> Case:
    def case() -> Mapping[str, float]:
        ended = run_checked(argv)
        return {"wall": ended.wall, "cpu": ended.cpu}

    return case


def _timed_start(place: Place, image: str) -> Case:
    def case() -> Mapping[str, float]:
        ended = run_checked([*place.imgrun, "start", "--timings", image, "--", "/bin/true"])
        return {"wall": ended.wall, "cpu": ended.cpu, **_prefixed(parse_timings(ended.stderr))}

    return case


def parse_timings(text: str) -> dict[str, float]:
    """What ``--timings`` printed, in seconds by step."""
    found = {}
    for line in text.splitlines():
        value, unit, step = line.strip().partition(" ms  ")
        if unit:
            try:
                found[step] = float(value) / 1000
            except ValueError:
                continue
    return found


def _prefixed(steps: Mapping[str, float]) -> dict[str, float]:
    return {f"step: {name}": seconds for name, seconds in steps.items()}


# -- the library --------------------------------------------------------------------------------------------------------


def _library_cases(place: Place) -> dict[str, Case]:
    from imgrun import ImgrunError, Job, JobSpec

    spec = JobSpec(image=place.image, command=("/bin/true",))

    def ours() -> Mapping[str, float]:
        began = time.perf_counter()
        try:
            job = Job.start(spec)
            started = time.perf_counter()
            result = job.wait()
        except ImgrunError as e:
            raise Unavailable(str(e)) from e
        ended = time.perf_counter()
        job.remove()
        if result.exit_code != 0:
            raise Unavailable(f"the job ended with {result.reason}")
        steps = {name: value / 1000 for name, value in result.timings.items()}
        return {"wall": ended - began, "start": started - began, **_prefixed(steps)}

    cases: dict[str, Case] = {LIBRARY: ours}
    try:
        argv = peers.choose(place, peers.BWRAP)(place, ["/bin/true"])
    except Unavailable:
        return cases

    def theirs() -> Mapping[str, float]:
        began = time.perf_counter()
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return {"wall": time.perf_counter() - began}

    cases[BWRAP_CALL] = theirs
    return cases


def _library_table(outcome: Outcome) -> Table:
    table = ranking(outcome, "wall", BWRAP_CALL, "call")
    found = outcome.summary(LIBRARY, "start")
    reference = outcome.median(BWRAP_CALL, "wall")
    if found is not None:
        ratio = times(found.median / reference) if reference else "-"
        cells = (milliseconds(found.median), milliseconds(found.low), milliseconds(found.high), ratio, str(found.runs))
        table.rows.insert(1, (LIBRARY_START, *cells))
    return table


# -- where the time goes --------------------------------------------------------------------------------------------------


def _steps(commands: Outcome, library: Outcome) -> Table:
    table = Table("step", COMMAND, "library")
    names = [name for name in commands.values.get(COMMAND, {}) if name.startswith("step: ")]
    rest = {}
    for title, outcome, case in ((COMMAND, commands, COMMAND), ("library", library, LIBRARY)):
        known = [outcome.median(case, name) or 0.0 for name in names]
        total = outcome.median(case, "wall")
        rest[title] = None if total is None else total - sum(known)
    for name in names:
        ours, theirs = commands.median(COMMAND, name), library.median(LIBRARY, name)
        table.row(name.removeprefix("step: "), milliseconds(ours), milliseconds(theirs))
    table.row(
        "before, after and between (command: Python, imports; both: the record, the job's end, clean-up)",
        milliseconds(rest[COMMAND]),
        milliseconds(rest["library"]),
    )
    table.row("all", milliseconds(commands.median(COMMAND, "wall")), milliseconds(library.median(LIBRARY, "wall")))
    return table
