"""Jobs of HTCondor's daemons: checkpointed, evicted, held, removed, and continued where they were."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import eventually, kill
from ordinary import Users

from images import Images
from imgrun.schedulers import htcondor_files as files

from .htcondor_pool import CHECKOUT, COMPLETED, HELD, MEMORY, Job, Pool, until

pytestmark = pytest.mark.timeout(900)

EXAMPLES = CHECKOUT / "examples/htcondor"
IMGRUN = f"{CHECKOUT}/.venv/bin/imgrun"

COUNT = """#!/bin/sh
echo begin
n=0
while [ ! -e go ]; do
    n=$((n + 1)); echo $n; echo $n >> out.dat; echo $n >> /root/inside
    sleep 0.05
done
cmp out.dat /root/inside && echo same
"""
"""Counts until it is told to end. Each number is printed, kept in the sandbox and in the image's own root."""

SILENT = """#!/bin/sh
echo begin
echo complaint >&2
echo kept > kept.dat
n=0
while [ ! -e go ]; do n=$((n + 1)); echo $n > pulse; sleep 0.05; done
"""
"""Says all that it has to say in its first life; ``pulse`` shows that it goes on."""

TOLD = """#!/bin/sh
trap 'echo told > told.dat; exit 1' TERM
echo begin
while [ ! -e go ]; do sleep 0.05; done
"""
"""Knows itself what to do when it has to go."""

NUMPY = """
import hashlib, os, threading, time
import numpy
results = [None] * 2
def work(n):
    a = numpy.random.default_rng(n).standard_normal((200, 200))
    for i in range(300):
        a = a @ a.T; a /= numpy.abs(a).max(); a += 1e-3 * numpy.sin(a)
        print("step", flush=True); time.sleep(0.02)
    results[n] = hashlib.sha256(a.tobytes()).hexdigest()
threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
[t.start() for t in threads]
while not os.path.exists("go"):
    time.sleep(0.05)
[t.join() for t in threads]
open("result", "w").write(" ".join(results))
"""

PROCESSES = """
STEPS = 1500
import hashlib, multiprocessing, os, time
def work(n):
    digest = hashlib.sha256(str(n).encode())
    for i in range(2000):
        digest.update(digest.digest())
    time.sleep(0.01)
    return digest.hexdigest()
with multiprocessing.Pool(3) as pool:
    total = hashlib.sha256()
    for line in pool.imap(work, range(STEPS)):
        total.update(line.encode())
        print("step", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.05)
open("result", "w").write(total.hexdigest())
"""


@pytest.fixture(scope="module")
def pool(users: Users) -> Iterator[Pool]:
    # Not below the base of the other tests: the daemons are no leak.
    with tempfile.TemporaryDirectory(prefix="imgrun-condor-") as top:
        os.chmod(top, 0o755)
        base = Path(top) / "pool"
        base.mkdir()
        # A site that lets jobs set attributes of these names.
        pool = Pool(base, users.ranged, "\nCHIRP_DELAYED_UPDATE_PREFIX = Chirp*, Site*\n")
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def small(images: Images) -> Path:
    return images.filesystem("squashfs")


@pytest.fixture(autouse=True)
def empty_queue(pool: Pool) -> Iterator[None]:
    yield
    pool("condor_rm", "-all")
    until(lambda: pool("condor_q", "-af", "ClusterId").stdout == "", lambda: "the queue is empty")
    until(lambda: not list(pool.base.glob("execute/dir_*")), lambda: "every sandbox is gone")


def submit(pool: Pool, image: Path, flags: str = "", script: str = COUNT, **changes: str) -> Job:
    """The example job with another script and other flags."""
    arguments = f'"start --htcondor {flags} disk.img sh job.sh"'
    given = {"executable": IMGRUN, "arguments": arguments, "request_memory": "200", "request_disk": "10M", **changes}
    return pool.submit(pool.directory(image, job_sh=script), EXAMPLES / "job.sub", **given)


def contained(pool: Pool, image: Path, script: str) -> Job:
    """A job whose container is the image; its submit file says nothing of imgrun or checkpoints, submit.conf does."""
    directory = pool.directory(image, job_sh=script)
    return pool.submit(directory, EXAMPLES / "container.sub", request_memory="200", request_disk="10M")


def progress(job: Job, more: int = 5) -> None:
    """Wait until the job, running, has printed so many more lines than now."""
    until(job.runs, lambda: f"{job.id} runs: {job.why()}")
    lines = eventually(lambda: job.live() and len(job.live().splitlines()), f"{job.id} prints something")
    eventually(lambda: len(job.live().splitlines()) >= lines + more, f"{job.id} makes progress")


def moves(job: Job, act: str) -> None:
    """Evict the job, and wait until it has another sandbox."""
    before = job.sandbox()
    assert before is not None
    job.act(act)
    until(lambda: job.runs() and job.sandbox() != before, lambda: f"{job.id} runs elsewhere: {job.why()}")


def moves_on(job: Job, act: str, more: int = 5) -> None:
    """Evict the job, and wait until it makes progress in another sandbox."""
    moves(job, act)
    progress(job, more)


def finish(job: Job) -> None:
    """Tell the job to end, and see that it has lost nothing and done nothing twice."""
    sandbox = eventually(job.sandbox)
    (sandbox / "go").touch()
    job.reaches(COMPLETED)
    assert job.ad()["ExitCode"] == 0, job.output()[-300:] + job.output("err")
    lines = job.output().splitlines()
    assert (lines[0], lines[-1]) == ("begin", "same"), job.output()[-300:]
    count = len(lines) - 2
    assert lines[1:-1] == [str(n + 1) for n in range(count)]
    assert (job.directory / "out.dat").read_text().split() == lines[1:-1]
    assert not (job.directory / "ckpt").exists(), "the checkpoint is no output"


def beats(job: Job) -> int:
    """How often SILENT has gone round."""
    return int(job.live("pulse").strip() or 0)


def goes_on(job: Job) -> None:
    """Wait until SILENT, which runs nowhere or somewhere, has done something."""
    until(job.runs, lambda: f"{job.id} runs: {job.why()}")
    before = eventually(lambda: beats(job), f"{job.id} is there again")
    eventually(lambda: beats(job) > before + 2, f"{job.id} goes on")


def checkpoints(job: Job) -> int:
    ad = job.ad()
    assert ad["JobStatus"] != HELD, job.why()
    return int(ad.get("CheckpointNumber", -1)) + 1


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_periodic_checkpoints(pool: Pool, small: Path) -> None:
    job = submit(pool, small, "--checkpoint-every 2s")
    until(lambda: checkpoints(job) >= 2, lambda: f"two checkpoints reach the submit machine: {job.why()}")
    progress(job)
    finish(job)
    ad = job.ad()
    assert ad["NumJobStarts"] == 1, "the machine was not left"
    assert ad["ChirpImgrunReason"] == "exited"


def test_evicted_and_continued_elsewhere(pool: Pool, small: Path) -> None:
    job = submit(pool, small)
    progress(job)
    moves_on(job, "condor_vacate_job")
    moves_on(job, "condor_vacate_job")
    finish(job)
    # Its ad, in the history: of all its lives together.
    ad = job.ad()
    assert ad["NumJobStarts"] == 3
    assert ad["JobStatus"] == COMPLETED
    assert ad["ChirpImgrunReason"] == "exited"
    assert ad["ChirpRemoteUserCpu"] + ad["ChirpRemoteSysCpu"] > 0
    assert ad["ChirpRemoteWallClockTime"] > 15 * 0.05
    assert ad["ChirpMemoryUsagePeak"] > 0
    assert "ChirpRemoteInstructions" in ad, "undefined where there is no counter, but there"
    assert "sse2" in ad["ChirpImgrunCpuFeatures"] or "fp" in ad["ChirpImgrunCpuFeatures"]


@pytest.mark.parametrize("form", ["start", "container"])
def test_what_was_said_before_an_eviction_is_there_in_the_end(pool: Pool, small: Path, form: str) -> None:
    """HTCondor sends home what has changed in the job's last life; what it has said and written before is not lost."""
    job = submit(pool, small, script=SILENT) if form == "start" else contained(pool, small, SILENT)
    for _ in range(2):
        goes_on(job)
        moves(job, "condor_vacate_job")
        eventually(lambda: job.live() == "begin\n", "what was said is brought")
    goes_on(job)
    (eventually(job.sandbox) / "go").touch()
    job.reaches(COMPLETED)
    assert job.output() == "begin\n"
    assert job.output("err") == "complaint\n"
    assert job.output("kept.dat") == "kept\n"


def test_files_that_were_put_back_look_newer_than_those_that_were_brought(tmp_path: Path) -> None:
    """By a second, where they would look the same to HTCondor; and only in a sandbox that was just brought."""
    for name in ("checkpoint", "first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first/kept").write_text("first")
    os.utime(tmp_path / "first/kept", (100, 100.5))
    files.pack(f"{tmp_path}/checkpoint", f"{tmp_path}/ckpt", f"{tmp_path}/first", ["kept"])
    kept = tmp_path / "second/kept"
    for brought, newer, then in ((100, True, 101.5), (102, True, 100.5), (100, False, 100.5)):
        kept.write_text("brought")
        os.utime(kept, (brought, brought))
        files.unpack(f"{tmp_path}/ckpt", f"{tmp_path}/checkpoint", f"{tmp_path}/second", newer=newer)
        assert (kept.read_text(), kept.stat().st_mtime) == ("first", then)


def test_held_and_released(pool: Pool, small: Path) -> None:
    job = submit(pool, small)
    progress(job)
    job.act("condor_hold")
    job.reaches(HELD)
    until(lambda: job.sandbox() is None, lambda: "it has left the machine")
    job.act("condor_release")
    until(lambda: job.sandbox() is not None, lambda: f"it runs again: {job.why()}")
    progress(job)
    finish(job)


def test_an_eviction_that_takes_too_long_costs_what_was_done_since_the_last_checkpoint(pool: Pool, small: Path) -> None:
    job = submit(pool, small, "--checkpoint-every 2s", job_max_vacate_time="1")
    until(lambda: checkpoints(job) >= 1, lambda: f"a checkpoint reaches the submit machine: {job.why()}")
    progress(job)
    # It does not get to its freeze, but is killed.
    eventually(lambda: [pid for pid in supervisors_in(job) if kill(pid, signal.SIGSTOP)])
    moves_on(job, "condor_vacate_job")
    finish(job)
    assert "Job was evicted" in job.output("log")
    # What SIGKILL leaves of imgrun's: empty cgroups, which a site takes away with the slot's.
    pool.remove_empty_cgroups()


def supervisors_in(job: Job) -> list[int]:
    """The job's imgrun, and what it has forked for a moment, by their pids here."""
    sandbox = str(job.sandbox())
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == sandbox and b"--htcondor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_a_job_that_cannot_be_frozen_gets_the_signal_itself(pool: Pool, small: Path) -> None:
    job = submit(pool, small, "--seccomp default", TOLD)
    until(lambda: job.live() == "begin\n", lambda: f"{job.id} runs: {job.why()}")
    assert "an eviction loses what the job has done: it cannot be frozen with --seccomp" in job.live("_condor_stderr")
    moves(job, "condor_vacate_job")
    eventually(lambda: job.live("told.dat") == "told\n", "what it wrote at the signal is brought")
    eventually(lambda: job.live() == "begin\n" * 2, "it starts anew")


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_removed_job_leaves_nothing(pool: Pool, small: Path) -> None:
    job = submit(pool, small)
    progress(job)
    spool = pool.base / "spool"
    assert job.sandbox() is not None
    job.act("condor_rm")
    until(lambda: job.sandbox() is None, lambda: "its sandbox is gone")
    cluster = job.id.split(".")[0]
    until(lambda: not [p for p in spool.rglob("*") if p.name.startswith(f"cluster{cluster}.")], lambda: "its spool is empty")
    assert "ckpt" not in [path.name for path in job.directory.iterdir()]
    for cgroup in pool.cgroups:
        eventually(lambda cgroup=cgroup: not [p for p in cgroup.iterdir() if p.is_dir()], f"no cgroup is left in {cgroup}")


def test_a_memory_kill_is_the_reason_of_the_hold(pool: Pool, small: Path) -> None:
    script = "head -c 300000000 /dev/zero | tail -n 1 | wc -c"
    job = submit(pool, small, "--memory 48M", script)
    job.reaches(HELD)
    shown = pool("condor_q", "-hold", job.id).stdout
    assert "the job ran into its memory limit of 48 MiB" in shown
    assert job.ad()["HoldReasonSubCode"] == 137


def test_the_slot_limits_the_memory(pool: Pool, small: Path) -> None:
    job = submit(pool, small, script="head -c 600000000 /dev/zero | tail -n 1 | wc -c")
    job.reaches(HELD)
    assert f"memory limit of {MEMORY} MiB" in job.ad()["HoldReason"]


def test_a_job_that_cannot_start_is_held_and_told_why(pool: Pool, small: Path) -> None:
    job = submit(pool, small, arguments='"start --htcondor job.sh sh job.sh"')
    job.reaches(HELD)
    assert "job.sh" in job.ad()["HoldReason"]


def test_attributes_have_the_names_that_the_site_allows(pool: Pool, small: Path) -> None:
    """Where it does not, nothing is set, nothing is said, and the job runs all the same."""
    prefixes = ("Site", "Other")
    jobs = [
        submit(pool, small, script="echo done", environment=f'"IMGRUN_CHIRP_PREFIX={prefix}"') for prefix in prefixes
    ]  # fmt: skip
    for job in jobs:
        job.reaches(COMPLETED)
        assert (job.output(), job.output("err")) == ("done\n", "")
    allowed, forbidden = (job.ad() for job in jobs)
    assert allowed["SiteImgrunReason"] == "exited"
    assert allowed["SiteRemoteWallClockTime"] > 0
    for name in (*allowed, *forbidden):
        assert not name.startswith(("ChirpImgrun", "ChirpRemote", "Other"))


# -- the site's container runtime --------------------------------------------------------------------------------------


def test_a_disk_image_as_a_container(pool: Pool, small: Path) -> None:
    job = contained(pool, small, COUNT)
    progress(job)
    moves_on(job, "condor_vacate_job")
    finish(job)


# -- real programs -----------------------------------------------------------------------------------------------------


def test_results_are_those_of_an_undisturbed_run(pool: Pool, image: Path) -> None:
    """Bit for bit, of a program with threads and of one with processes."""
    pairs = []
    for program in (NUMPY, PROCESSES):
        script = f"exec python3 -c '{program}'"
        pairs.append([submit(pool, image, script=script, request_disk="500M") for _ in range(2)])
    for _, evicted in pairs:
        progress(evicted)
    for _ in range(2):
        for _, evicted in pairs:
            moves_on(evicted, "condor_vacate_job", more=0)
    for job in (job for pair in pairs for job in pair):
        until(job.runs, lambda job=job: f"{job.id} runs: {job.why()}")
        (eventually(job.sandbox) / "go").touch()
    for undisturbed, evicted in pairs:
        for job in (undisturbed, evicted):
            job.reaches(COMPLETED)
            assert job.ad()["ExitCode"] == 0, job.output("err")
        assert evicted.ad()["NumJobStarts"] == 3
        results = [(job.directory / "result").read_text() for job in (undisturbed, evicted)]
        assert results[0] == results[1]
        assert len(results[0]) >= 64
        assert undisturbed.output() == evicted.output()


# -- submitting --------------------------------------------------------------------------------------------------------


def test_submitted_from_a_spec(pool: Pool, small: Path) -> None:
    spec = 'image = "disk.img"\ncommand = ["sh", "job.sh"]\nname = "counting"\n[limits]\nmemory = "100M"\n'
    directory = pool.directory(small, job_sh=COUNT, job_toml=spec)
    (directory / "data").mkdir()
    words = (IMGRUN, "submit", "--to", "htcondor", "--spec", directory / "job.toml")
    transfer = ("--option", "transfer_input_files = job.toml, disk.img, job.sh")
    shown = pool(*words, *transfer, "--dry-run").stdout
    assert "checkpoint_exit_code = 85" in shown
    assert "transfer_input_files = job.toml, disk.img\n" in shown
    job = pool.submitted(directory, pool(*words, *transfer))
    progress(job)
    moves_on(job, "condor_vacate_job")
    sandbox = eventually(job.sandbox)
    (sandbox / "go").touch()
    job.reaches(COMPLETED)
    assert job.output(f"counting.{job.id.split('.')[0]}.out").splitlines()[-1] == "same"
