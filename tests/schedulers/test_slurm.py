"""imgrun in jobs of Slurm's: an ordinary user's program is preempted, queued again and goes on where it was.

The daemons are real (see slurm_cluster), the batch scripts are those of examples/slurm. The programs print numbered steps,
and wait at some of them for a file, so that each is still running whenever something is to happen to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import eventually, expect
from leaks import read
from ordinary import AsUser, Users, World

from . import slurm_cluster
from .slurm_cluster import Cluster, Submitter

EXAMPLES = Path(__file__).parents[2] / "examples/slurm"
pytestmark = pytest.mark.timeout(900)

MATRIX = """
import hashlib, os, time
os.environ["OPENBLAS_NUM_THREADS"] = "2"
import numpy
a = numpy.random.default_rng(1).standard_normal((200, 200))
for step in range(1, 131):
    a = a @ a.T; a /= numpy.abs(a).max(); a += 1e-3 * numpy.sin(a)
    print("step", step, flush=True)
    time.sleep(0.03)
    while step in (40, 80, 120) and not os.path.exists(f"/work/pass{step}"): time.sleep(0.05)
print("result", hashlib.sha256(a.tobytes()).hexdigest())
"""

POOL = """
import hashlib, multiprocessing, os, time
def chain(n):
    digest = str(n).encode()
    for _ in range(20000): digest = hashlib.sha256(digest).digest()
    return digest
with multiprocessing.Pool(3) as pool:
    total, step = hashlib.sha256(), 0
    for digest in pool.imap(chain, range(130)):
        total.update(digest); step += 1
        print("step", step, flush=True)
        time.sleep(0.03)
        while step in (40, 80, 120) and not os.path.exists(f"/work/pass{step}"): time.sleep(0.05)
print("result", total.hexdigest())
"""

PASSES = (40, 80, 120)


@pytest.fixture(scope="session")
def slot(users: Users) -> Iterator[Path | None]:
    """A memory cgroup that the user may divide, as a site gives one to each job; the cluster's jobs are in it.

    None where cgroup v1 has no memory controller.
    """
    own = next((line.split(":", 2)[2] for line in read(Path("/proc/self/cgroup")).split("\n") if ":memory:" in line), None)
    parent = Path(f"/sys/fs/cgroup/memory{own}")
    if own is None or not os.access(parent, os.W_OK):
        yield None
        return
    path = parent / f"slurm-test-{os.getpid()}"
    path.mkdir()
    for name in ("", "tasks", "cgroup.procs"):
        os.chown(path / name, users.ranged.uid, users.ranged.gid)
    (path / "memory.limit_in_bytes").write_text("2G")
    yield path
    path.rmdir()


@pytest.fixture(scope="session")
def cluster(base: Path, users: Users, world: World, slot: Path | None) -> Iterator[Cluster]:
    if missing := slurm_cluster.missing():
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")

    def enter() -> None:
        if slot is not None:
            (slot / "tasks").write_text("0")

    cluster = Cluster(base / "slurm", world, enter=enter)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def memory_slot(slot: Path | None) -> None:
    if slot is None:
        pytest.skip("no memory controller of cgroup v1 that could be given to a user")


@pytest.fixture
def submitter(cluster: Cluster, run: AsUser) -> Iterator[Submitter]:
    submitter = Submitter(cluster, run)
    yield submitter
    submitter.close()


def steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("step ")]


def result(lines: list[str]) -> str:
    return next((line for line in lines if line.startswith("result ")), f"none in {lines}")


def undisturbed(submitter: Submitter, name: str, program: str) -> str:
    """What the program says when nothing happens to it."""
    directory = submitter.directory(f"{name}-alone", job=program)
    for number in PASSES:
        (directory / f"pass{number}").touch()
    done = submitter.run(
        "start", "--bind", f"{directory}:/work", submitter.run.image, "--", "python3", "/work/job.py", timeout=120
    )
    assert done.status == 0, done
    return result(done.stdout.splitlines())


def test_preempted_twice_and_requeued_once(submitter: Submitter, cluster: Cluster) -> None:
    """In both forms; first where imgrun has to ask for the requeue, then where the site has RequeueExit."""
    jobs = {}
    for script, program in (("batch", MATRIX), ("srun", POOL)):
        directory = submitter.directory(script, job=program)
        jobs[script] = (directory, submitter.sbatch(directory, EXAMPLES / f"{script}.sbatch", "python3", "/work/job.py"))
    for life, wait_at in enumerate(PASSES, 1):
        for directory, job in jobs.values():
            submitter.prints(directory, job, f"step {wait_at - 35}")
        if life < 3:
            cluster.preempt()
        else:
            assert submitter.command(directory, "scontrol", "requeue", *(job for _, job in jobs.values())).status == 0
        for directory, job in jobs.values():
            cluster.reaches(job, "PENDING", restarts=life)
            assert max(steps(submitter.output(directory, job))) <= wait_at
            (directory / f"pass{wait_at}").touch()
        submitter.has_no_process()
        if life == 1:
            cluster.configure("RequeueExit=85")
        for _, job in jobs.values():
            cluster.release(job)
    for (script, (directory, job)), program in zip(jobs.items(), (MATRIX, POOL), strict=True):
        cluster.reaches(job, "COMPLETED")
        lines = submitter.output(directory, job)
        assert steps(lines) == list(range(1, 131)), "each step is printed once, in order"
        assert result(lines) == undisturbed(submitter, script, program)
        assert not (directory / "imgrun-checkpoints").exists()
    record = cluster.command("scontrol", "show", "job", jobs["batch"][1])
    assert "Comment=imgrun: exited 0, wall " in record
    assert "Restarts=3" in record


def test_scancel_leaves_nothing(submitter: Submitter, cluster: Cluster) -> None:
    """The job is frozen, since nothing tells this from a preemption, but Slurm does not queue it again."""
    jobs = {}
    for script in ("batch", "srun", "killed"):
        directory = submitter.directory(script, job=MATRIX)
        example = EXAMPLES / ("srun.sbatch" if script == "srun" else "batch.sbatch")
        jobs[script] = (directory, submitter.sbatch(directory, example, "python3", "/work/job.py"))
    for directory, job in jobs.values():
        submitter.prints(directory, job, "step 5")
    killed_in, killed = jobs.pop("killed")
    assert submitter.command(killed_in, "scancel", "--batch", "--signal=KILL", killed).status == 0
    for directory, job in jobs.values():
        assert submitter.command(directory, "scancel", job).status == 0
    for directory, job in jobs.values():
        cluster.reaches(job, "CANCELLED")
        assert cluster.job(job)["Restarts"] == "0"
        said = submitter.output(directory, job)
        frozen = [line.removeprefix("imgrun: frozen to ") for line in said if line.startswith("imgrun: frozen to ")]
        assert len(frozen) == 1, said
        checkpoint = frozen[0]
        assert submitter.run("check", checkpoint).status == 0
    submitter.has_no_process()
    cluster.reaches(killed, "FAILED")
    assert not any("frozen" in line for line in submitter.output(killed_in, killed))


def test_time_limit(submitter: Submitter, cluster: Cluster) -> None:
    """A job that can be frozen goes on in another slice of time, and one that cannot ends; nothing runs on."""
    directory = submitter.directory("batch", job=MATRIX)
    frozen = submitter.sbatch(directory, EXAMPLES / "batch.sbatch", "python3", "/work/job.py")
    other = submitter.directory("plain", job=MATRIX)
    line = "exec imgrun start --slurm --seccomp default --bind $PWD:/work $IMAGE -- python3 /work/job.py"
    plain = submitter.wrap(other, line, "--mem=500")
    submitter.prints(directory, frozen, "step 5")
    submitter.prints(other, plain, "step 5")
    warning = "imgrun: warning: a preemption loses what the job has done: it cannot be frozen with --seccomp"
    assert submitter.output(other, plain)[0] == warning
    for job in (frozen, plain):
        cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=1", "EndTime=now")
    cluster.reaches(plain, "TIMEOUT")
    cluster.reaches(frozen, "PENDING", restarts=1)
    submitter.has_no_process()
    for number in PASSES:
        (directory / f"pass{number}").touch()
    cluster.release(frozen)
    cluster.reaches(frozen, "COMPLETED")
    assert steps(submitter.output(directory, frozen)) == list(range(1, 131))


def ends_by_memory(submitter: Submitter, cluster: Cluster, mebibytes: int, allotted: str, told: str) -> str:
    """See that a job that fills so much memory ends by that, and says this; its record at Slurm."""
    directory = submitter.directory("d")
    fill = f"import sys; a = bytearray({mebibytes} << 20); print(len(a))"
    job = submitter.sbatch(directory, f"--mem={allotted}", EXAMPLES / "batch.sbatch", "python3", "-c", fill)
    cluster.reaches(job, "FAILED")
    lines = submitter.output(directory, job)
    assert any(line.startswith(f"imgrun: the job ran into {told}") for line in lines), lines
    assert cluster.job(job)["ExitCode"] == "137:0"
    return cluster.command("scontrol", "show", "job", job)


def test_memory_kill(submitter: Submitter, cluster: Cluster, memory_slot: None) -> None:
    """The limit is Slurm's; imgrun keeps it in the cgroup that the site has given to the user, and tells of it."""
    assert "memory-limit 137" in ends_by_memory(submitter, cluster, 900, "100", "its memory limit of 100 MiB")


def test_memory_kill_by_the_slot(submitter: Submitter, cluster: Cluster, memory_slot: None) -> None:
    """The limit of the cgroup that the job was started in, which the job's own does not reach."""
    ends_by_memory(submitter, cluster, 2500, "20000", "the memory limit of 2 GiB of the cgroup above")


def test_array(submitter: Submitter, cluster: Cluster) -> None:
    """Ten tasks are preempted together, and each goes on with its own checkpoint."""
    directory = submitter.directory("d")
    script = "i=$SLURM_ARRAY_TASK_ID; echo begun $i; while [ ! -e /work/pass ]; do sleep 0.1; done; echo result $((i * i))"
    job = submitter.sbatch(directory, EXAMPLES / "array.sbatch", "sh", "-c", script)
    tasks = [f"{job}_{number}" for number in range(10)]
    for number, task in enumerate(tasks):
        submitter.prints(directory, task, f"begun {number}")
    cluster.preempt()
    for task in tasks:
        cluster.reaches(task, "PENDING", restarts=1)
    assert sorted(path.name for path in (directory / "imgrun-checkpoints").iterdir()) == tasks
    (directory / "pass").touch()
    cluster.release(job)
    for number, task in enumerate(tasks):
        cluster.reaches(task, "COMPLETED")
        lines = [line for line in submitter.output(directory, task) if line.startswith(("begun", "result"))]
        assert lines == [f"begun {number}", f"result {number * number}"]


def test_submit(submitter: Submitter, cluster: Cluster) -> None:
    """What --dry-run prints is what is submitted."""
    directory = submitter.directory("d")
    (directory / "job.toml").write_text(f"""
image = "{submitter.run.image}"
command = ["sh", "-c", "echo result $GREETING"]
name = "greeter"
[env]
GREETING = "hello"
[limits]
memory = "300M"
cpus = 1
time_limit = "1h"
""")
    words = ("imgrun", "submit", "--to", "slurm", "--spec", "job.toml", "--option=--partition=low")
    printed = submitter.command(directory, *words, "--dry-run")
    assert printed.status == 0, printed
    for line in ("--job-name=greeter", "--mem=300M", "--signal=B:USR1@60", "--requeue", "--partition=low", "--time=65"):
        assert f"#SBATCH {line}\n" in printed.stdout
    submitted = submitter.command(directory, *words)
    assert submitted.status == 0, submitted
    job = submitted.stdout.split()[-1]
    submitter.jobs.append(job)
    cluster.reaches(job, "COMPLETED")
    assert cluster.job(job)["JobName"] == "greeter"
    assert "result hello" in submitter.output(directory, job)


def test_tasks_of_a_step(submitter: Submitter, cluster: Cluster) -> None:
    """Two tasks of one step are frozen and continued each by itself."""
    directory = submitter.directory("d")
    script = "echo begun; while [ ! -e /work/pass ]; do sleep 0.1; done; echo ended"
    job = submitter.sbatch(directory, "--ntasks=2", EXAMPLES / "srun.sbatch", "sh", "-c", script)
    cluster.await_that(lambda: submitter.output(directory, job).count("begun") == 2, "both tasks run")
    cluster.preempt()
    cluster.reaches(job, "PENDING", restarts=1)
    assert sorted(path.name for path in (directory / "imgrun-checkpoints").iterdir()) == [f"{job}.0.0", f"{job}.0.1"]
    (directory / "pass").touch()
    cluster.release(job)
    cluster.reaches(job, "COMPLETED")
    lines = submitter.output(directory, job)
    assert (lines.count("begun"), lines.count("ended")) == (2, 2), lines
    assert not (directory / "imgrun-checkpoints").exists()


def test_a_node_that_is_taken_away(submitter: Submitter, cluster: Cluster) -> None:
    """Slurm ends what runs there, as it does by TERM, and queues it again; nothing runs on."""
    directory = submitter.directory("d", job=MATRIX)
    job = submitter.sbatch(directory, EXAMPLES / "batch.sbatch", "python3", "/work/job.py")
    submitter.prints(directory, job, "step 5")
    cluster.command("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    try:
        cluster.reaches(job, "PENDING", restarts=1)
        submitter.has_no_process()
    finally:
        cluster.take_node_back()


def test_a_signal_while_a_checkpoint_is_made(submitter: Submitter) -> None:
    """The job is saved again, as it is then, and ends. Where scontrol does not work, that is said."""
    directory = submitter.directory("d")
    fill = "import os, time; a = os.urandom(200 << 20); print('ready', flush=True); time.sleep(1e6)"
    process = submitter.run.popen(
        "start", "--slurm", "--checkpoint-dir", directory / "c", "--checkpoint-every", "0.1s", submitter.run.image, "--",
        "python3", "-c", fill, env={"SLURM_JOB_ID": "1"},
    )  # fmt: skip
    expect(process, "ready")
    eventually(lambda: list(directory.glob("c.*.new")), "a checkpoint is being made")
    for _ in range(2):
        process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 85, stderr
    said = stderr.decode().splitlines()
    assert f"imgrun: frozen to {directory}/c" in said
    assert any("scontrol requeue 1" in line for line in said)
    assert submitter.run("check", directory / "c").status == 0


def test_grace_that_does_not_suffice(submitter: Submitter, cluster: Cluster) -> None:
    directory = submitter.directory("d")
    job = submitter.wrap(directory, "exec imgrun start --slurm --grace 1s $IMAGE -- true", "--mem=4000")
    cluster.reaches(job, "COMPLETED")
    [line] = submitter.output(directory, job)
    assert line.startswith("imgrun: warning: 4000 MiB may not be saved within the 1 s that a preemption leaves: ")
