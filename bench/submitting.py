"""Submitting the benchmark's program to real schedulers, and taking its slot away.

The daemons, and the user whose jobs they are, are those of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.harness import Unavailable
from bench.place import REPOSITORY, Place

EVERY = 5
"""Seconds between periodic checkpoints."""
SLOT = 2000
"""Memory of HTCondor's slots in MiB, as the larger jobs need."""
PATIENCE = 120.0
EXAMPLES = f"{REPOSITORY}/examples"


def await_that(condition: Callable[[], bool], otherwise: str) -> None:
    """Wait for it; an AssertionError, as from the tests' own helpers, says what did not happen."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


class Way:
    """A way to run the program as a job, and to take its slot away. ``here`` is the job's directory."""

    seen_at = ""
    """Where the program sees its directory; where that is, when this is empty."""
    killed = False
    """Whether it is to have a periodic checkpoint before it is disturbed."""

    def __init__(self) -> None:
        self.here = Path()

    def make_directory(self) -> Path:
        """A new directory of the user's, where the next job is submitted."""
        raise NotImplementedError

    def submit(self, words: list[str], mebibytes: int) -> None:
        raise NotImplementedError

    def has_checkpoint(self) -> bool:
        raise NotImplementedError

    def disturb(self) -> None:
        """Take the slot away, and wait until that is free."""
        raise NotImplementedError

    def resume(self) -> float:
        """Let the job start again; the time from which it could."""
        return time.time()

    def end(self) -> None:
        """Wait for the end of the job, whose program ends."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End it where it is, if it is anywhere."""
        raise NotImplementedError


# -- the tests' daemons and users ---------------------------------------------------------------------------------------


def _of_tests(name: str) -> Any:
    """A module of the tests', which have the daemons."""
    directory = f"{REPOSITORY}/tests"
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return import_module(name)


@contextmanager
def _user(place: Place, name: str) -> Iterator[tuple[Any, Path, Path]]:
    """An ordinary user, a new directory that everyone may enter, and a small image in it."""
    users = _of_tests("ordinary").Users()
    try:
        os.chmod(place.short, 0o755)
        directory = Path(place.short, name)
        directory.mkdir()
        images = directory / "images"
        images.mkdir()
        yield users.ranged, directory, _of_tests("images").Images(images).filesystem("squashfs")
    finally:
        users.close()


@contextmanager
def slurm(place: Place) -> Iterator[dict[str, Way]]:
    ordinary, of_slurm = _of_tests("ordinary"), _of_tests("schedulers.slurm_cluster")
    subprocess.run([f"{REPOSITORY}/tools/system-packages", "schedulers"], check=True)
    if lacking := of_slurm.missing():
        raise Unavailable(f"not installed: {', '.join(lacking)}")
    with _user(place, "slurm") as (user, directory, image), ExitStack() as stack:
        world = ordinary.World(directory / "nodes")
        stack.callback(world.close)
        cluster = of_slurm.Cluster(directory / "cluster", world)
        cluster.start()
        stack.callback(cluster.stop)
        cluster.configure("RequeueExit=85")
        home = directory / "home"
        home.mkdir()
        os.chown(home, user.uid, user.gid)
        run = ordinary.AsUser(user, world, home, image)
        stack.callback(run.close)
        submitter = of_slurm.Submitter(cluster, run)
        yield {
            "imgrun start --slurm, preempted": Slurm(submitter, preempted=True),
            "imgrun start --slurm, requeued": Slurm(submitter),
            "imgrun start --slurm, killed": KilledBySlurm(submitter),
            "without imgrun, requeued": PlainSlurm(submitter),
        }


class Slurm(Way):
    """A batch script that is imgrun."""

    seen_at = "/work"

    def __init__(self, submitter: Any, *, preempted: bool = False) -> None:
        super().__init__()
        self.submitter = submitter
        self.cluster = submitter.cluster
        self.preempted = preempted
        self.job = ""

    def make_directory(self) -> Path:
        return Path(self.submitter.directory(f"job-{time.monotonic_ns()}"))

    def submit(self, words: list[str], mebibytes: int) -> None:
        script = f"{EXAMPLES}/slurm/batch.sbatch"
        self.job = self.submitter.sbatch(self.here, f"--mem={2 * mebibytes}", script, *words)

    def disturb(self) -> None:
        if self.preempted:
            self.cluster.preempt()
        else:
            self.cluster.command("scontrol", "requeue", self.job)
        self.await_state("PENDING")

    def await_state(self, *states: str) -> None:
        await_that(lambda: self.cluster.job(self.job)["JobState"] in states, f"the job is not {states[0]}")

    def resume(self) -> float:
        return float(self.cluster.release(self.job))

    def end(self) -> None:
        self.cluster.reaches(self.job, "COMPLETED")

    def abandon(self) -> None:
        self.submitter.close()
        self.submitter.jobs.clear()


class KilledBySlurm(Slurm):
    """As when its node fails: by SIGKILL, and queued again by the administrator."""

    killed = True

    def submit(self, words: list[str], mebibytes: int) -> None:
        start = f"exec imgrun start --slurm --checkpoint-every {EVERY}s --bind $PWD:/work $IMAGE -- {' '.join(words)}"
        self.job = self.submitter.wrap(self.here, start, f"--mem={2 * mebibytes}", "--requeue")

    def has_checkpoint(self) -> bool:
        return any((self.here / "imgrun-checkpoints").glob("*/manifest*"))

    def disturb(self) -> None:
        self.cluster.command("scancel", "--batch", "--signal=KILL", self.job)
        self.await_state("FAILED", "NODE_FAIL")
        self.cluster.command("scontrol", "requeue", self.job)
        self.await_state("PENDING")


class PlainSlurm(Slurm):
    """The program itself."""

    seen_at = ""

    def submit(self, words: list[str], mebibytes: int) -> None:
        self.job = self.submitter.wrap(self.here, f"exec {' '.join(words)}", f"--mem={2 * mebibytes}", "--requeue")


@contextmanager
def htcondor(place: Place) -> Iterator[dict[str, Way]]:
    of_condor = _of_tests("schedulers.htcondor_pool")
    with _user(place, "condor") as (user, directory, image):
        base = directory / "pool"
        base.mkdir()
        settings = f"\nSLOT_TYPE_1 = cpus=1, mem={SLOT}\nMEMORY = $(NUM_SLOTS) * {SLOT}\n"
        pool = of_condor.Pool(base, user, settings)
        try:
            yield {
                "imgrun start --htcondor, evicted": HTCondor(pool, image),
                "imgrun start --htcondor, killed": KilledByHTCondor(pool, image),
                "without imgrun, evicted": PlainHTCondor(pool, image),
            }
        finally:
            pool.close()


class HTCondor(Way):
    """The example, with imgrun as the executable."""

    seen_at = "/bench"
    flags = ""
    vacate: tuple[str, ...] = ("condor_vacate_job",)

    def __init__(self, pool: Any, image: Path) -> None:
        super().__init__()
        self.pool = pool
        self.image = image
        self.job: Any = None

    def make_directory(self) -> Path:
        return Path(self.pool.directory(self.image))

    def submit(self, words: list[str], mebibytes: int) -> None:
        flags = f"--htcondor {self.flags} --bind {self.here}:{self.seen_at}"
        self.job = self.pool.submit(
            self.here, f"{EXAMPLES}/htcondor/job.sub", executable=f"{REPOSITORY}/.venv/bin/imgrun",
            arguments=f'"start {flags} disk.img {" ".join(words)}"', transfer_input_files="disk.img",
            request_memory=str(min(SLOT, 2 * mebibytes)), request_disk="100M",
        )  # fmt: skip

    def has_checkpoint(self) -> bool:
        return any(self.pool.base.glob(f"spool/*/*/cluster{self.job.id.split('.')[0]}.*0/ckpt"))

    def disturb(self) -> None:
        sandbox = self.job.sandbox()
        self.job.act(*self.vacate)
        await_that(lambda: not sandbox.exists(), "the sandbox stays")

    def end(self) -> None:
        self.job.reaches(_of_tests("schedulers.htcondor_pool").COMPLETED)

    def abandon(self) -> None:
        self.pool("condor_rm", "-all")


class KilledByHTCondor(HTCondor):
    """By SIGKILL, without time to be saved."""

    killed = True
    flags = f"--checkpoint-every {EVERY}s"
    vacate = ("condor_vacate_job", "-fast")


class PlainHTCondor(HTCondor):
    """The program itself."""

    seen_at = ""

    def submit(self, words: list[str], mebibytes: int) -> None:
        lines = {
            "executable": words[0], "arguments": " ".join(words[1:]), "transfer_executable": "false",
            "should_transfer_files": "yes", "request_memory": str(min(SLOT, 2 * mebibytes)), "log": "log",
        }  # fmt: skip
        file = self.here / "plain.sub"
        file.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()) + "queue\n")
        self.job = self.pool.submit(self.here, file)
