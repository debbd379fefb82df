"""What it costs to account a job, and how long a memory kill takes to be told."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from functools import partial

from bench.harness import Case, Outcome, Unavailable, interleave
from bench.place import HERE, Place
from bench.report import Section, Table, milliseconds

TITLE = "Accounting"
WORK = {"processor loop": ("loop", {False: 600, True: 150}), "forks": ("forks", {False: 4000, True: 800})}
"""What is timed inside the job, and how much of it in a full and in a quick run."""
AIMS = {"processor loop": 0.5, "forks": 2.0}
"""By how many per cent counting may slow it down."""
ROUNDS = {False: 15, True: 4}
WATCHED = {False: 60.0, True: 8.0}
"""Seconds for which an idle job is watched."""
TICK = os.sysconf("SC_CLK_TCK")


def measure(place: Place) -> Section:
    section = Section(TITLE)
    program = _compile(place)
    section.say(
        """The same work in a job with `--pmu auto` and with `--pmu off`: the processor time that the program itself notes,
        the smallest of interleaved runs, since other work on the machine only ever adds."""
    )
    table = Table("work", "not counted", "counted", "slower by")
    for name, (what, amounts) in WORK.items():
        cases: dict[str, Case] = {
            pmu: partial(_work, place, program, pmu, what, amounts[place.quick]) for pmu in ("off", "auto")
        }
        outcome = interleave(cases, rounds=ROUNDS[place.quick], seconds=120)
        section.data[name] = outcome
        off, on = (outcome.summary(pmu, "seconds") for pmu in ("off", "auto"))
        slower = (on.low / off.low - 1) * 100 if on and off else None
        shown = "-" if slower is None else f"{slower:.2f} %"
        table.row(name, milliseconds(off and off.low), milliseconds(on and on.low), shown)
        section.aim(f"slow-down of the {name} by counting", slower, AIMS[name], unit=" %")
        section.refusals(outcome)
    section.add(table)
    watched = Outcome()
    watched.add("supervisor", _supervisor(place))
    section.data["supervisor"] = watched
    share = watched.median("supervisor", "share")
    name = f"the supervisor of an idle job with `--sample 1s`, for {WATCHED[place.quick]:.0f} s"
    section.aim(name, share, 0.2, unit=" % of a core")
    kills = interleave({"kill": lambda: _kill(place, program)}, rounds=ROUNDS[place.quick], seconds=60)
    section.data["kill"] = kills
    found = kills.summary("kill", "seconds")
    name = "from the kernel's memory kill to the end of `imgrun start`, median"
    section.aim(name, found and found.median * 1000, 100, unit=" ms")
    section.refusals(kills)
    return section


def _compile(place: Place) -> str:
    program = f"{place.directory}/spin"
    subprocess.run(["cc", "-O1", "-static", "-o", program, f"{HERE}/spin.c"], check=True)
    return program


def _start(place: Place, program: str, *words: str) -> list[str]:
    return [*place.imgrun, "start", "--bind", f"{program}:/spin:ro", *words[:-1], place.image, "--", *words[-1].split()]


def _work(place: Place, program: str, pmu: str, what: str, amount: int) -> Mapping[str, float]:
    words = _start(place, program, "--pmu", pmu, f"/spin {what} {amount}")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(done.stderr.strip().partition("\n")[0])
    return {"seconds": float(done.stdout)}


def _supervisor(place: Place) -> Mapping[str, float]:
    """The processor time of a supervisor in per cent of a core, once its job runs."""
    from imgrun import Job, JobSpec

    job = Job.start(JobSpec(image=place.image, command=("sleep", "1000"), sample=1.0))
    try:
        pid = job.inspect()["supervisor"]
        time.sleep(1)
        began, before = time.monotonic(), _cpu(pid)
        time.sleep(WATCHED[place.quick])
        return {"share": (_cpu(pid) - before) / (time.monotonic() - began) * 100}
    finally:
        job.remove(force=True)


def _cpu(pid: int) -> float:
    """The processor time of a process's threads, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as f:
        return int(f.read().split()[0]) / 1e9


def _kill(place: Place, program: str) -> Mapping[str, float]:
    """From the moment at which the kernel counts the kill to the end of the command."""
    from imgrun import Job
    from imgrun.isolation.cgroups.cgroup import reopen

    go = f"{place.directory}/go"
    os.makedirs(go, exist_ok=True)
    flags = ("--memory", "64M", "--swap", "0", "--name", "killed", "--bind", f"{go}:/go:ro")
    words = _start(place, program, *flags, "/spin fill 200 /go/on")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise Unavailable("no memory limit can be kept here")
        cgroup = reopen(Job.find("killed").cgroup_paths())
        with open(f"{go}/on", "w", encoding="ascii"):
            pass
        while not cgroup.memory.kills() and process.poll() is None:
            pass
        began = time.monotonic()
        process.wait()
        return {"seconds": time.monotonic() - began}
    finally:
        process.communicate()
        if os.path.exists(f"{go}/on"):
            os.unlink(f"{go}/on")
