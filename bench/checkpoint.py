"""How long freezing and continuing take, against CRIU alone and a container runtime, on the same process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial

from bench.harness import Case, Outcome, Unavailable, interleave, last_line, run, run_checked
from bench.place import HERE, Place
from bench.report import Section, Table, milliseconds, size, times

TITLE = "Checkpoint and restore"
CRIU = "criu"
SYNCED = "criu, then sync"
IMGRUN = "imgrun"
LAZY = "imgrun, restore --lazy"
KINDS = {"random": "incompressible", "half": "half zeros"}
SIZES = {False: (64, 1024, 4096), True: (64,)}
ROUNDS = {64: 5, 1024: 3, 4096: 1}
PATIENCE = 120.0
COLUMNS = (("frozen", "frozen"), ("dump", "checkpoint, all"), ("progress", "restore to first progress"))


def measure(place: Place) -> Section:
    section = Section(TITLE)
    section.say(
        """A process that fills so much memory and then, each millisecond, changes a page and says so in a file. It is saved
        and left running: `frozen` is the longest pause it saw, `checkpoint, all` the time of the whole command. Then it is
        killed and continued; `restore to first progress` is from the call to the next sign of life. imgrun's checkpoint
        also has the job's files, a hash of everything, and is on the disk when the command ends; the others leave it in
        the page cache, but for the one that is followed by a sync of its images. All use the same CRIU. imgrun lets a job
        see no memory before it has seen that it is as it was written: all of it before the job runs, or with --lazy each
        piece of a file before the first page of it is given to the job."""
    )
    program = _build(place)
    largest: Outcome | None = None
    for mebibytes in SIZES[place.quick]:
        for kind, words in KINDS.items():
            cases = _cases(place, program, mebibytes, kind)
            outcome = interleave(cases, rounds=2 if place.quick else ROUNDS[mebibytes], warmups=1 if mebibytes < 4096 else 0)
            section.data[f"{mebibytes} MiB, {kind}"] = outcome
            section.add(_table(outcome, f"{mebibytes} MiB, {words}"))
            for case, reason in outcome.refused.items():
                section.find(f"Not measured here: {case}, {mebibytes} MiB {words} ({reason}).")
            if kind == "random":
                largest = outcome
                section.aim(f"{mebibytes} MiB, frozen, vs CRIU alone", outcome.ratio(IMGRUN, CRIU, "frozen"), 1)
                section.aim(f"{mebibytes} MiB, whole checkpoint, vs CRIU alone", outcome.ratio(IMGRUN, CRIU, "dump"), 1)
                synced = outcome.ratio(IMGRUN, SYNCED, "dump")
                section.aim(f"{mebibytes} MiB, whole checkpoint, vs CRIU and a sync of its images", synced, 1)
    if largest is not None:
        section.aim("lazy restore of the largest to first progress", largest.median(LAZY, "progress"), 0.2, unit=" s")
    return section


def _table(outcome: Outcome, heading: str) -> Table:
    table = Table(heading, *(title for _, title in COLUMNS), "bytes")
    for case in outcome.values:
        cells = []
        for name, _ in COLUMNS:
            ratio = "" if case == CRIU else f" ({times(outcome.ratio(case, CRIU, name))})"
            median = outcome.median(case, name)
            cells.append("-" if median is None else milliseconds(median) + ratio)
        table.row(case, *cells, size(outcome.median(case, "bytes")))
    return table


def _cases(place: Place, program: str, mebibytes: int, kind: str) -> dict[str, Case]:
    ways: dict[str, Callable[[Place, str], Way]] = {
        CRIU: Criu, SYNCED: CriuSynced, IMGRUN: Imgrun, LAZY: LazyImgrun, "runc": Runc,
    }  # fmt: skip

    def case(name: str) -> Mapping[str, float]:
        directory = f"{place.directory}/checkpoint"
        shutil.rmtree(directory, ignore_errors=True)
        os.mkdir(directory)
        os.chmod(directory, 0o777)  # a job has ids of its own
        shutil.copy(program, f"{directory}/hog")
        way = ways[name](place, directory)
        try:
            return _once(way, directory, mebibytes, kind)
        finally:
            way.clean_up()
            shutil.rmtree(directory)

    return {name: partial(case, name) for name in ways}


class Way:
    """One way to run the program, save it and bring it back. ``here`` is its directory, which it sees at ``seen_at``."""

    seen_at = ""

    def __init__(self, place: Place, here: str) -> None:
        self.place = place
        self.here = here
        self.images = f"{here}/images"

    def start(self, words: list[str]) -> None:
        raise NotImplementedError

    def dump(self) -> list[str]:
        """The command that saves it and leaves it running."""
        raise NotImplementedError

    def settle(self) -> None:
        """Do what still belongs to the checkpoint when the command has ended."""

    def kill(self) -> None:
        raise NotImplementedError

    def restore(self) -> list[str]:
        """The command that continues it in the background."""
        raise NotImplementedError

    def clean_up(self) -> None:
        """End what runs, if anything does."""


def _once(way: Way, here: str, mebibytes: int, kind: str) -> dict[str, float]:
    seen = way.seen_at or here
    way.start([f"{seen}/hog", str(mebibytes), kind, f"{seen}/progress"])
    _await(lambda: _progress(here)[0] > 20, "the program does not start")
    began = time.perf_counter()
    done = run(way.dump())
    if done.code != 0:
        raise Unavailable(f"the checkpoint failed: {last_line(done.stderr)}")
    way.settle()
    dump = time.perf_counter() - began
    at_end = _progress(here)[0]
    _await(lambda: _progress(here)[0] > at_end + 2, "the program does not go on after the checkpoint")
    frozen = _progress(here)[1] / 1e9
    way.kill()
    last = _progress(here)[0]
    began = time.perf_counter()
    restoring = subprocess.Popen(
        way.restore(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        # What is restored is older than the last that was seen, and says so.
        _await(lambda: _progress(here)[0] != last or restoring.poll() not in (None, 0), "it is not continued")
        progress = time.perf_counter() - began
        _, words = restoring.communicate(timeout=PATIENCE)
    finally:
        if restoring.poll() is None:
            restoring.kill()
            restoring.wait()
    if restoring.returncode != 0:
        raise Unavailable(f"the restore failed: {last_line(words.decode(errors='replace'))}")
    return {
        "frozen": frozen, "dump": dump, "progress": progress, "restore": time.perf_counter() - began,
        "bytes": float(_bytes(way.images)),
    }  # fmt: skip


def _progress(here: str) -> tuple[int, int]:
    """How often the program has ticked, and its longest pause in nanoseconds."""
    try:
        with open(f"{here}/progress", "rb") as f:
            data = f.read(16)
    except FileNotFoundError:
        return 0, 0
    return struct.unpack("=QQ", data) if len(data) == 16 else (0, 0)


def _await(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(otherwise)
        time.sleep(0.0005)


def _bytes(path: str) -> int:
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(path) for name in names)


def _build(place: Place) -> str:
    program = f"{place.directory}/hog"
    try:
        done = subprocess.run(
            ["gcc", "-O2", "-static", "-o", program, f"{HERE}/hog.c"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise Unavailable("the program needs gcc") from None
    if done.returncode != 0:
        raise Unavailable(f"the program cannot be built: {last_line(done.stderr)}")
    return program


def _criu() -> list[str]:
    """The CRIU that imgrun uses, as a command of the host."""
    try:
        import imgrun_criu
    except ImportError:
        raise Unavailable("imgrun-criu is not installed") from None
    toolbox = str(imgrun_criu.path())
    return [f"{toolbox}/ld.so", "--inhibit-cache", "--library-path", toolbox, f"{toolbox}/criu"]


# -- the ways -----------------------------------------------------------------------------------------------------------


class Criu(Way):
    """CRIU from the command line, on a process of the host."""

    process: subprocess.Popen[bytes] | None = None
    restored = 0

    def start(self, words: list[str]) -> None:
        os.mkdir(self.images)
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(words, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")

    def dump(self) -> list[str]:
        assert self.process is not None
        return [*_criu(), "dump", "--tree", str(self.process.pid), "-D", self.images, "--leave-running", "-v1"]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restore(self) -> list[str]:
        assert self.process is not None
        self.restored = self.process.pid
        return [*_criu(), "restore", "-D", self.images, "--restore-detached", "-v1"]

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if self.restored:
            try:
                with open(f"/proc/{self.restored}/cmdline", "rb") as f:
                    if f.read().startswith(f"{self.here}/hog".encode()):
                        os.kill(self.restored, signal.SIGKILL)
            except OSError:
                pass  # it was not restored


class CriuSynced(Criu):
    """The same, with the images on the disk."""

    def settle(self) -> None:
        for name in os.listdir(self.images):
            fd = os.open(f"{self.images}/{name}", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


class Imgrun(Way):
    """A job with the directory bound into it."""

    seen_at = "/bench"
    start_flags: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def start(self, words: list[str]) -> None:
        flags = ["--detach", "--name", "bench-checkpoint", "--bind", f"{self.here}:{self.seen_at}", *self.start_flags]
        run_checked([*self.place.imgrun, "start", *flags, self.place.image, "--", *words])

    def dump(self) -> list[str]:
        return [*self.place.imgrun, "checkpoint", "--leave-running", "--to", self.images, "bench-checkpoint"]

    def kill(self) -> None:
        run_checked([*self.place.imgrun, "rm", "--force", "bench-checkpoint"])

    def restore(self) -> list[str]:
        return [*self.place.imgrun, "restore", *self.flags, "--detach", self.images]

    def clean_up(self) -> None:
        self.place.remove_jobs()


class LazyImgrun(Imgrun):
    """The same, and its memory follows."""

    flags = ("--lazy",)


class Runc(Way):
    """A container whose root is the same files in a directory."""

    seen_at = "/bench"

    def __init__(self, place: Place, here: str) -> None:
        super().__init__(place, here)
        self.name = f"imgrun-bench-checkpoint-{os.getpid()}"
        self.bundle = f"{here}/bundle"

    def _runc(self, *words: str) -> list[str]:
        path = f"PATH={self.here}:{os.environ.get('PATH', '')}"
        return ["env", path, "runc", "--root", f"{self.here}/runc", *words]

    def start(self, words: list[str]) -> None:
        if shutil.which("runc") is None:
            raise Unavailable("runc is not installed")
        os.makedirs(f"{self.place.tree}{self.seen_at}", exist_ok=True)
        os.mkdir(self.bundle)
        with open(f"{self.here}/criu", "w", encoding="utf-8") as f:
            f.write(f'#!/bin/sh\nexec {" ".join(_criu())} "$@"\n')
        os.chmod(f"{self.here}/criu", 0o755)
        run_checked(["runc", "spec", "--bundle", self.bundle])
        with open(f"{self.bundle}/config.json", encoding="utf-8") as f:
            spec = json.load(f)
        spec["process"] |= {"args": words, "terminal": False}
        spec["root"] = {"path": self.place.tree, "readonly": False}
        spec["mounts"] = [m for m in spec["mounts"] if m["type"] != "cgroup"]
        spec["mounts"].append({"destination": self.seen_at, "type": "bind", "source": self.here, "options": ["rbind", "rw"]})
        with open(f"{self.bundle}/config.json", "w", encoding="utf-8") as f:
            json.dump(spec, f)
        run_checked(self._runc("run", "--detach", "--bundle", self.bundle, self.name))

    def dump(self) -> list[str]:
        return self._runc("checkpoint", "--leave-running", "--image-path", self.images, "--work-path", self.here, self.name)

    def kill(self) -> None:
        run(self._runc("delete", "--force", self.name))

    def restore(self) -> list[str]:
        flags = ("--detach", "--image-path", self.images, "--work-path", self.here, "--bundle", self.bundle)
        return self._runc("restore", *flags, self.name)

    def clean_up(self) -> None:
        run(self._runc("delete", "--force", self.name))
