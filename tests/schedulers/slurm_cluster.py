"""A Slurm cluster of one node, with real daemons on loopback, for one test session.

Everything of it is in one directory. The daemons are children of the tests, which stop them by their pids; they also die
with the tests' process. They run in the world of :mod:`ordinary`, so jobs find /dev/fuse as on a usual host.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from command import Done, eventually
from leaks import read
from ordinary import AsUser, World

CPUS = 12
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"

ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
"""States of jobs that have ended for good."""
EXPECTED = ("imgrun: warning: ", "imgrun: frozen to ")
"""What imgrun may say of a job that goes on."""
GRACE = 60
"""Seconds between the first signal of a preemption, or of scancel, and the kill: none of the tests waits for their end."""

CONFIG = """\
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={top}/run/munge.socket
CredType=cred/munge
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool
SlurmctldPidFile={top}/run/slurmctld.pid
SlurmdPidFile={top}/run/slurmd.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdLogFile={top}/log/slurmd.log
SlurmctldDebug=debug
SlurmdDebug=debug
# As proctrack/cgroup, the usual choice, this signals what Slurm itself has started, and not all that descends from it.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,defer_batch=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={grace}
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
AccountingStorageType=accounting_storage/none
AccountingStoreFlags=job_comment
JobCompType=jobcomp/none
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=30000 State=UNKNOWN
PartitionName=low  Nodes=n1 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1 Default=NO  PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What of Slurm is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _die_with_tests() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Cluster:
    """The running daemons. ``enter`` is what the node's daemon does first, as going into a cgroup of the site."""

    def __init__(self, top: Path, world: World, *, enter: Callable[[], None] = lambda: None) -> None:
        self.top = top
        self.world = world
        self.config = top / "slurm.conf"
        self._enter = enter
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "log", "run", "munge"):
            (top / name).mkdir(parents=True)
        for name in ("run", "munge"):
            (top / name).chmod(0o711)
        key = top / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        ports = free_ports(2)
        self.config.write_text(CONFIG.format(
            host=socket.gethostname(), ctld_port=ports[0], slurmd_port=ports[1], top=top, grace=GRACE, cpus=CPUS,
        ))  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.config), "PATH": SEARCH}

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs; when that fails nothing stays."""
        try:
            socket_path = self.top / "run/munge.socket"
            self._start(
                "munged", "--foreground", "--force", f"--key-file={self.top}/munge/key", f"--socket={socket_path}",
                f"--pid-file={self.top}/run/munged.pid", f"--log-file={self.top}/log/munged.log",
                f"--seed-file={self.top}/munge/seed", "--num-threads=2",
            )  # fmt: skip
            eventually(socket_path.exists, "munged answers")
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-c", "-N", "n1", enter=self._enter)
            eventually(self._idle, f"the node is idle; see {self.top}/log")
        except BaseException:
            self.stop()
            raise

    def _start(self, *words: str, enter: Callable[[], None] = lambda: None) -> None:
        def before() -> None:
            enter()
            _die_with_tests()

        with open(self.top / f"log/{words[0]}.out", "wb") as out:
            self._daemons[words[0]] = subprocess.Popen(
                ["nsenter", f"--mount=/proc/{self.world.pid}/ns/mnt", "--", *words],
                env=self.environment, cwd="/", stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=before,
                start_new_session=True,
            )  # fmt: skip

    def _idle(self) -> bool:
        for name, daemon in self._daemons.items():
            assert daemon.poll() is None, f"{name} ended: {(self.top / f'log/{name}.out').read_text()}"
        done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=self.environment, capture_output=True, check=False)
        return set(done.stdout.split()) == {b"idle"}

    # -- what its administrator does ----------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        """A command of Slurm's as root; its output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, cwd="/", timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def configure(self, line: str) -> None:
        """Add a line to the configuration of the running cluster."""
        self.config.write_text(f"{self.config.read_text()}{line}\n")
        self.command("scontrol", "reconfigure")
        key, _, value = line.partition("=")
        self.await_that(lambda: re.search(rf"(?m)^{key} *= {value}$", self.command("scontrol", "show", "config")), line)

    def preempt(self) -> None:
        """Run a job that needs the whole node and comes first, to its end."""
        wanted = ("sbatch", "--parsable", "-p", "high", "-n", str(CPUS), "--mem=100", "-o", "/dev/null", "--wrap", "true")
        self.reaches(self.command(*wanted), "COMPLETED")

    def job(self, job: str) -> dict[str, str]:
        """The record of a job; of an array, that of one of its tasks."""
        lines = self.command("scontrol", "--oneliner", "show", "job", job).splitlines()
        return {key: value for key, _, value in (word.partition("=") for word in lines[0].split())}

    def reaches(self, job: str, *states: str, restarts: int = 0) -> None:
        """Wait until the job is in one of the states, in a life after so many."""

        def reached() -> bool:
            record = self.job(job)
            state = record["JobState"]
            if state not in states and state in ENDS:
                raise AssertionError(f"job {job} is {state}, and said: {Path(record['StdOut']).read_text()}")
            return state in states and int(record["Restarts"]) >= restarts

        self.await_that(reached, f"job {job} is {' or '.join(states)}")

    def release(self, job: str) -> float:
        """Let a job that was queued again start now, and not in two minutes; when that was (time.time).

        Not in the second in which it was ended, when its credential is revoked: it would fail.
        """
        time.sleep(2)
        moment = time.time()
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now")
        return moment

    def take_node_back(self) -> None:
        """After it was taken away. It may have come back by itself."""
        words = ["scontrol", "update", "NodeName=n1", "State=RESUME"]
        subprocess.run(words, env=self.environment, capture_output=True, check=False)
        self.await_that(self._idle, "the node is idle")

    @staticmethod
    def await_that(condition: Callable[[], object], what: str) -> None:
        """Wait for it; asking takes a process, so not as often as can be."""

        def ask() -> object:
            found = condition()
            if not found:
                time.sleep(0.2)
            return found

        eventually(ask, what, timeout=150)

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all jobs, then the daemons; munged last, since the others need it for their last words."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                if jobs := self.command("squeue", "-h", "-o", "%A").split():
                    self.command("scancel", *jobs)
                    self.await_that(lambda: not self.command("squeue", "-h"), "all jobs have gone")
        for name in ("slurmd", "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is None:
                continue
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> Iterator[int]:
        """The processes of steps, which are nobody's children; they are told by the configuration they were given."""
        ours = f"SLURM_CONF={self.config}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if ours in (path / "environ").read_bytes().split(b"\0"):
                    yield int(path.name)
            except OSError:
                continue


class Submitter:
    """A user of the cluster, with a directory to submit from."""

    def __init__(self, cluster: Cluster, run: AsUser) -> None:
        self.cluster = cluster
        self.run = run
        self.jobs: list[str] = []

    def directory(self, name: str, **files: str) -> Path:
        path = self.run.directory / name
        path.mkdir()
        for file, content in files.items():
            (path / f"{file}.py").write_text(content)
        os.chown(path, self.run.user.uid, self.run.user.gid)
        return path

    def command(self, directory: Path, *words: str) -> Done:
        """A command as the user, with Slurm's and imgrun's commands at hand."""
        environment = {
            "SLURM_CONF": str(self.cluster.config), "IMAGE": self.run.image,
            "PATH": f"{os.path.dirname(sys.executable)}:{SEARCH}",
        }  # fmt: skip
        process = self.run.program("env", f"--chdir={directory}", *words, env=environment)
        stdout, stderr = process.communicate(timeout=60)
        return Done(process.returncode, stdout.decode(), stderr.decode())

    def sbatch(self, directory: Path, *words: str | Path) -> str:
        done = self.command(directory, "sbatch", "--parsable", *map(str, words))
        assert done.status == 0, done
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def wrap(self, directory: Path, command: str, *words: str) -> str:
        """A batch script of one line."""
        return self.sbatch(directory, *words, "--open-mode=append", "--wrap", command)

    @staticmethod
    def output(directory: Path, job: str) -> list[str]:
        return read(directory / f"slurm-{job}.out").splitlines()

    def prints(self, directory: Path, job: str, line: str) -> None:
        def printed() -> bool:
            lines = self.output(directory, job)
            assert not any(one.startswith("imgrun: ") and not one.startswith(EXPECTED) for one in lines), lines
            return line in lines

        self.cluster.await_that(printed, f"job {job} prints {line!r}")

    def has_no_process(self) -> None:
        self.cluster.await_that(lambda: not self.run.processes(), "no process of the user's is left")

    def close(self) -> None:
        for job in self.jobs:
            self.command(self.run.directory, "scancel", job)
        for job in self.jobs:
            self.cluster.await_that(lambda job=job: not self.cluster.command("squeue", "-h", "-j", job), f"{job} is gone")
