"""Many sleeping jobs of one image: how fast they start, what each holds of memory, how fast they are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from bench import peers
from bench.harness import Outcome, Unavailable, interleave, run_checked
from bench.place import Place
from bench.report import Section, Table, milliseconds, size

if TYPE_CHECKING:
    from imgrun import Job

TITLE = "Many jobs of one image"
COMMAND = ("/bin/sleep", "600")
JOBS = {False: 100, True: 20}
ROUNDS = {False: 3, True: 1}
LIBRARY = "Job.start(...)"
DETACH = "imgrun start --detach"
PSS_AIM = 12.0


class Way(NamedTuple):
    """A way to start a job, ``parallel`` at a time."""

    name: str
    start: Callable[[Place], object]
    parallel: int


def measure(place: Place) -> Section:
    section = Section(TITLE)
    count = JOBS[place.quick]
    section.say(
        f"""{count} jobs of `sleep` on one image, which they share: one loop device, one page cache. PSS counts a page that
        several processes share in parts; the supervisor is a Python process outside the job, the shim is its PID 1 and
        reaper. `end of all`: from the first kill until no job and no record is left."""
    )
    ways = [Way(f"{name}, {parallel} at a time", start, parallel) for name, start, parallel in _starters()]
    cases = {way.name: (lambda way=way: _fill_and_empty(place, way, count)) for way in ways}
    outcome = interleave(cases, rounds=ROUNDS[place.quick], warmups=0, seconds=70)
    outcome_peers = interleave({"bwrap": lambda: _bwrap(place, count)}, rounds=ROUNDS[place.quick], warmups=0)
    section.data |= {"imgrun": outcome, "peers": outcome_peers}
    section.add(_table(outcome, outcome_peers))
    _memory(section, outcome, outcome_peers)
    _leftovers(section, outcome)
    section.refusals(outcome)
    section.refusals(outcome_peers)
    return section


def _starters() -> Iterable[tuple[str, Callable[[Place], object], int]]:
    for name, start in ((DETACH, _detach), (LIBRARY, _start)):
        for parallel in (1, 2):
            yield name, start, parallel


def _detach(place: Place) -> object:
    return run_checked([*place.imgrun, "start", "--detach", place.image, "--", *COMMAND])


def _start(place: Place) -> object:
    from imgrun import ImgrunError, Job, JobSpec

    try:
        return Job.start(JobSpec(image=place.image, command=COMMAND))
    except ImgrunError as e:
        raise Unavailable(str(e)) from e


def _fill_and_empty(place: Place, way: Way, count: int) -> dict[str, float]:
    from imgrun import Job

    def one(_: int) -> float:
        began = time.perf_counter()
        way.start(place)
        return time.perf_counter() - began

    measured: dict[str, float] = {}
    began = time.perf_counter()
    try:
        if way.parallel == 1:
            each = [one(i) for i in range(count)]
        else:
            with ThreadPoolExecutor(way.parallel) as pool:
                each = list(pool.map(one, range(count)))
        measured["rate"] = count / (time.perf_counter() - began)
        tenth = max(1, count // 10)
        measured["first"] = sum(each[:tenth]) / tenth
        measured["last"] = sum(each[-tenth:]) / tenth
        jobs = [job for job in Job.all() if job.running]
        if len(jobs) != count:
            raise Unavailable(f"{len(jobs)} of {count} jobs run")
        measured |= _memory_of(jobs)
        measured["loops"] = float(_loop_devices(place.image))
        groups = [path for job in jobs for path in job.cgroup_paths()]
        measured["removal"] = _remove(place, jobs)
        measured["left groups"] = float(sum(os.path.exists(path) for path in groups))
        measured["left loops"] = float(_loop_devices(place.image))
    finally:
        place.remove_jobs()
    return measured


def _remove(place: Place, jobs: list[Job]) -> float:
    """Kill and forget them all; the seconds until nothing of them is left."""
    began = time.perf_counter()
    for job in jobs:
        job.kill()
    for job in jobs:
        job.wait()
    for job in jobs:
        job.remove()
    return time.perf_counter() - began


def _loop_devices(image: str) -> int:
    done = subprocess.run(["losetup", "--associated", image, "--noheadings"], capture_output=True, text=True, check=False)
    return len(done.stdout.splitlines())


# -- memory -------------------------------------------------------------------------------------------------------------


def parse_rollup(text: str) -> dict[str, int]:
    """The sizes of /proc/PID/smaps_rollup (proc_pid_smaps(5)), in bytes."""
    sizes = {}
    for line in text.splitlines()[1:]:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            sizes[name] = int(words[0]) * 1024
    return sizes


def _rollup(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as f:
        return parse_rollup(f.read())


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        return [int(word) for word in f.read().split()]


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8") as f:
        return f.read().strip()


def _memory_of(jobs: list[Job]) -> dict[str, float]:
    """Means over all jobs. The shim is PID 1 and those below it that still run its program, not the command."""
    supervisors, private, shims = 0, 0, 0
    for job in jobs:
        supervisor = _rollup(int(job.inspect()["supervisor"]))
        supervisors += supervisor["Pss"]
        private += supervisor["Private_Dirty"] + supervisor["Private_Clean"]
        init = job.init_pid()
        program = _name(init)
        shims += sum(_rollup(pid)["Pss"] for pid in (init, *_children(init)) if _name(pid) == program)
    return {"supervisor": supervisors / len(jobs), "private": private / len(jobs), "shim": shims / len(jobs)}


def _bwrap(place: Place, count: int) -> dict[str, float]:
    """As many sleeping commands by bwrap: its two processes for each are what supervisor and shim are for us."""
    argv = peers.choose(place, peers.BWRAP)(place, COMMAND)
    running: list[subprocess.Popen[bytes]] = []
    began = time.perf_counter()
    try:
        for _ in range(count):
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            running.append(process)
            _await_command(process.pid)
        rate = count / (time.perf_counter() - began)
        outer = sum(_rollup(process.pid)["Pss"] for process in running) / count
        inner = sum(_rollup(_children(process.pid)[0])["Pss"] for process in running) / count
        began = time.perf_counter()
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.wait()
        return {"rate": rate, "supervisor": outer, "shim": inner, "removal": time.perf_counter() - began}
    finally:
        for process in running:
            process.kill()
            process.wait()


def _await_command(pid: int) -> None:
    """Until the grandchild, which is the command, has been executed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if any(_name(command) == "sleep" for child in _children(pid) for command in _children(child)):
                return
        except OSError:
            pass
        time.sleep(0.0005)
    raise Unavailable("bwrap did not start the command within 30 s")


# -- the report ---------------------------------------------------------------------------------------------------------


def _table(ours: Outcome, theirs: Outcome) -> Table:
    table = Table(
        "way", "starts/s", "first tenth, each", "last tenth, each", "PSS supervisor", "PSS shim", "end of all", "runs"
    )
    for outcome in (ours, theirs):
        for case in outcome.values:
            rate = outcome.summary(case, "rate")
            if rate is None:
                continue
            table.row(
                case,
                f"{rate.median:.1f}",
                milliseconds(outcome.median(case, "first")),
                milliseconds(outcome.median(case, "last")),
                size(outcome.median(case, "supervisor")),
                size(outcome.median(case, "shim")),
                milliseconds(outcome.median(case, "removal")),
                str(rate.runs),
            )
    return table


def _memory(section: Section, ours: Outcome, theirs: Outcome) -> None:
    for name, start in ((DETACH, DETACH), (LIBRARY, LIBRARY)):
        pss = ours.median(f"{start}, 1 at a time", "supervisor")
        value = None if pss is None else pss / (1 << 20)
        section.aim(f"PSS of a supervisor started by `{name}`", value, PSS_AIM, unit=" MiB")
    private = ours.median(f"{LIBRARY}, 1 at a time", "private")
    reference = theirs.median("bwrap", "supervisor")
    if private is not None and reference is not None:
        section.find(
            f"{size(private)} of a library job's supervisor is its own alone; bwrap's outer process has {size(reference)}."
        )


def _leftovers(section: Section, outcome: Outcome) -> None:
    def worst(name: str) -> int:
        return int(max((found.high for case in outcome.values if (found := outcome.summary(case, name))), default=0))

    section.find(
        f"""While they ran, the jobs had {worst("loops")} loop device between them; after the end, {worst("left loops")} loop
        devices and {worst("left groups")} cgroup directories were left."""
    )
