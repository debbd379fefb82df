"""A pool of real HTCondor daemons on this machine's loopback, in a root, a PID namespace and cgroups of its own.

What the daemons are is in the root that tools/condor-root makes. The checkout and its Python are shown in it, so that jobs
run what is being worked on. When the first process of the pool's PID namespace ends, the kernel ends all the others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command import PATIENCE, Done, eventually, text
from ordinary import User

CHECKOUT = Path(__file__).parents[2]
START = 100.0
"""Seconds for the daemons to find each other on a busy machine."""
SLOTS = 4
MEMORY = 400
"""Of each slot, in MiB."""
REMOVED, COMPLETED, HELD, IDLE, RUNNING = 3, 4, 5, 1, 2
"""JobStatus of condor_q."""

CONFIG = """
CONDOR_HOST = 127.0.0.1
COLLECTOR_HOST = 127.0.0.1:{port}
NETWORK_INTERFACE = 127.0.0.1
BIND_ALL_INTERFACES = False
ENABLE_IPV6 = False
USE_SHARED_PORT = False
UID_DOMAIN = pool
FILESYSTEM_DOMAIN = pool
TRUST_UID_DOMAIN = True
DAEMON_LIST = MASTER COLLECTOR NEGOTIATOR SCHEDD STARTD
LOCAL_CONFIG_DIR =
LOCAL_DIR = {base}
RUN = $(LOCAL_DIR)/run
LOG = $(LOCAL_DIR)/log
LOCK = $(LOCAL_DIR)/lock
SPOOL = $(LOCAL_DIR)/spool
EXECUTE = $(LOCAL_DIR)/execute
CRED_STORE_DIR = $(LOCAL_DIR)/cred
BASE_CGROUP =
include : {checkout}/examples/htcondor/execute.conf
include : {checkout}/examples/htcondor/submit.conf
IMGRUN_BIN = {checkout}/.venv/bin
STARTD_CRON_IMGRUN_ENV = "IMGRUN_STATE_DIR={base}/advertise"
SHADOW_WORKLIFE = 0
NUM_SLOTS = {slots}
NUM_SLOTS_TYPE_1 = {slots}
SLOT_TYPE_1 = cpus=1, mem={memory}
NUM_CPUS = {slots}
MEMORY = $(NUM_SLOTS) * {memory}
START = True
SUSPEND = False
PREEMPT = False
KILL = False
WANT_VACATE = True
RANK = 0
MachineMaxVacateTime = 30
NEGOTIATOR_INTERVAL = 1
NEGOTIATOR_CYCLE_DELAY = 1
NEGOTIATOR_MIN_INTERVAL = 1
SCHEDD_INTERVAL = 1
SCHEDD_MIN_INTERVAL = 1
UPDATE_INTERVAL = 5
STARTER_UPDATE_INTERVAL = 2
CLAIM_WORKLIFE = 3600
BENCHMARKS_JOBLIST =
RunBenchmarks = False
SEC_DEFAULT_AUTHENTICATION_METHODS = FS
ALLOW_READ = *
ALLOW_WRITE = *
ALLOW_DAEMON = *
ALLOW_NEGOTIATOR = *
ALLOW_ADMINISTRATOR = *
"""

# The root stays as it was made: what the daemons write goes to {base}, and the host's users are known in it.
ENTER = """
set -e
cd {root}
mount --bind . . ; cd {root}
mkdir -p host .{checkout} .{python_lib}
touch {launchers}
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount --bind /tmp tmp
mount --bind {base}/passwd etc/passwd
mount --bind {base}/group etc/group
for file in etc/subuid etc/subgid; do [ ! -e /$file ] || {{ touch $file; mount --bind /$file $file; }}; done
mount --bind {checkout} .{checkout}
mount --bind {python_lib} .{python_lib}
for file in {launchers}; do mount --bind {python} $file; done
mount -t tmpfs -o mode=755 nodes host
mknod -m 666 host/fuse c 10 229
[ ! -e dev/fuse ] || mount --bind host/fuse dev/fuse
umount -l host
mount -o remount,bind,ro .
pivot_root . host
cd /
mount -t proc proc /host/proc
umount -l /host
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin CONDOR_CONFIG={base}/condor_config /usr/sbin/condor_master -f
"""


class Pool:
    """One central manager with some slots; jobs are submitted by ``user``. ``settings`` are added to its configuration."""

    def __init__(self, base: Path, user: User, settings: str = "") -> None:
        self.base = base
        self.user = user
        self.cgroups: list[Path] = []
        self._pid = 0
        root = subprocess.run(
            [CHECKOUT / "tools/condor-root"], check=True, capture_output=True, text=True, timeout=600
        ).stdout.strip()
        self._write_configuration(Path(root), settings)
        self._make_cgroups()
        join = "".join(f"echo 0 > {path}/tasks\n" for path in self.cgroups)
        python_lib = Path(os.__file__).parent.resolve()
        python = Path(sys.executable)
        launchers = []
        while python.is_symlink():  # as .venv/bin/python leads to it
            python = python.parent / os.readlink(python)
            if not python.is_relative_to(CHECKOUT):
                launchers.append(f".{python}")
        script = ENTER.format(
            root=root, base=base, checkout=CHECKOUT, python_lib=python_lib,
            python=python.resolve(), launchers=" ".join(launchers),
        )  # fmt: skip
        self._log = (base / "log/pool.out").open("wb")
        self._process = subprocess.Popen(
            ["sh", "-euc", f"{join}exec unshare --mount --pid --fork --kill-child --propagation private sh -euc \"$1\"",
             "sh", script],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            until(self._is_ready, lambda: "the pool has unclaimed slots", START)
        except BaseException:
            self.close()
            raise

    def _write_configuration(self, root: Path, settings: str) -> None:
        base = self.base
        for name in ("run", "log", "lock", "spool", "execute", "cred", "submit", "advertise"):
            (base / name).mkdir()
        for name in ("passwd", "group"):
            there = (root / "etc" / name).read_text().splitlines()
            here = Path("/etc", name).read_text()
            added = [line for line in there if line.startswith("condor:")]
            (base / name).write_text(here + "\n".join(added) + "\n")
        condor = next(line for line in (root / "etc/passwd").read_text().splitlines() if line.startswith("condor:"))
        uid, gid = (int(word) for word in condor.split(":")[2:4])
        for name in ("run", "log", "lock", "spool", "execute", "advertise"):
            os.chown(base / name, uid, gid)
        os.chown(base / "submit", self.user.uid, self.user.gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours = CONFIG.format(base=base, port=port, checkout=CHECKOUT, slots=SLOTS, memory=MEMORY)
        distribution = (root / "etc/condor/condor_config").read_text()
        (base / "condor_config").write_text(distribution + ours + settings)

    def _make_cgroups(self) -> None:
        """Cgroups that are the user's to divide, as a site delegates them; the limits of jobs go below."""
        for controller in ("memory", "cpu", "pids"):
            top = Path("/sys/fs/cgroup") / controller
            if not (top / "tasks").exists():
                continue
            path = top / f"pool-{os.getpid()}-{self.base.name}"
            path.mkdir()
            self.cgroups.append(path)
            for entry in (path, path / "tasks", path / "cgroup.procs"):
                os.chown(entry, self.user.uid, self.user.gid)

    # -- commands -----------------------------------------------------------------------------------------------------

    def _child(self) -> int:
        """The first process in the pool's PID namespace, by its pid here; 0 when there is none yet."""
        if not self._pid:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            self._pid = int(children[0]) if children else 0
        return self._pid

    def popen(self, *words: str | Path, root: bool = False, **options: Any) -> subprocess.Popen[bytes]:
        """A command in the pool's root, as the user."""
        become = [] if root else [
            "setpriv", f"--reuid={self.user.uid}", f"--regid={self.user.gid}", "--init-groups", "--inh-caps=-all", "--",
        ]  # fmt: skip
        enter = ["nsenter", f"--target={self._child()}", "--mount", "--pid", "--wd=/", "--", *become]
        environment = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "CONDOR_CONFIG": f"{self.base}/condor_config", "LC_ALL": "C.UTF-8",
            "HOME": str(self.base / "submit"), "USER": self.user.name, "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*enter, *map(str, words)], env=environment, **{**streams, **options})

    def __call__(self, *words: str | Path, root: bool = False) -> Done:
        process = self.popen(*words, root=root)
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"{words}: no end in {PATIENCE} s") from None
        return Done(process.returncode, text(stdout), text(stderr))

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self.base / "log/pool.out").read_text()
        if not self._child() or not Path(f"/proc/{self._child()}/exe").exists():
            return False
        if not os.readlink(f"/proc/{self._child()}/exe").endswith("condor_master"):
            return False
        done = self("condor_status", "-af", "State", "HasImgrunCheckpoints")
        return done.stdout.split() == ["Unclaimed", "true"] * SLOTS

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def directory(self, image: Path, **files: str) -> Path:
        """A directory of the user's with the image as disk.img, and files; ``_`` in their names is ``.``."""
        directory = self.base / "submit" / str(len(list((self.base / "submit").iterdir())))
        directory.mkdir()
        shutil.copy(image, directory / "disk.img")
        for name, content in files.items():
            (directory / name.replace("_", ".")).write_text(content)
            (directory / name.replace("_", ".")).chmod(0o755)
        for path in (directory, *directory.iterdir()):
            os.chown(path, self.user.uid, self.user.gid)
        return directory

    def submit(self, directory: Path, submit_file: Path, **changes: str) -> Job:
        """Submit a job from this directory, with these commands beside or instead of the file's own."""
        appended = [word for name, value in changes.items() for word in ("-append", f"{name} = {value}")]
        words = ("condor_submit", *appended, submit_file)
        return self.submitted(directory, self("sh", "-c", 'cd "$0" && exec "$@"', directory, *words))

    def submitted(self, directory: Path, done: Done) -> Job:
        """The job that was submitted, by what was said of it."""
        assert done.status == 0, done
        found = re.search(r"submitted to cluster (\d+)", done.stdout)
        assert found, done
        return Job(self, f"{found[1]}.0", directory)

    def remove_empty_cgroups(self) -> None:
        """Remove what is below the user's cgroups, as a site does with those of a slot; processes in it are an error."""
        for path in self.cgroups:
            for directory in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
                eventually(lambda directory=directory: _remove(directory), f"{directory} is empty")

    def close(self) -> None:
        """End every daemon and job, and take the cgroups away."""
        if self._process.poll() is None:
            if self._child():
                os.kill(self._child(), signal.SIGKILL)  # with it the kernel ends the whole namespace
            else:
                self._process.kill()
        self._process.wait()
        self._log.close()
        self.remove_empty_cgroups()
        for path in self.cgroups:
            eventually(lambda path=path: _remove(path), f"{path} is empty")
        self.cgroups = []
        for name in ("execute", "spool"):
            shutil.rmtree(self.base / name)


def until(condition: Callable[[], Any], what: Callable[[], str], seconds: float = PATIENCE) -> Any:
    """As ``eventually``, but asking a few times a second, since each time starts a program."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not happen in {seconds} s: {what()}"
        time.sleep(0.25)
    return found


def _remove(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return not directory.exists()
    return True


class Job:
    """A submitted job."""

    def __init__(self, pool: Pool, id: str, directory: Path) -> None:
        self.pool = pool
        self.id = id
        self.directory = directory

    def ad(self) -> dict[str, Any]:
        """Its ClassAd, from the queue or from the history."""
        for tool in (["condor_q"], ["condor_history", "-match", "1"]):
            done = self.pool(*tool, self.id, "-json")
            if done.status == 0 and done.stdout.strip().startswith("["):
                ads = json.loads(done.stdout)
                if ads:
                    return dict(ads[0])
        return {}

    def runs(self) -> bool:
        """Whether it has a sandbox. A job that is held will not get one."""
        ad = self.ad()
        assert ad.get("JobStatus") != HELD, self.why()
        return self.sandbox() is not None

    def status(self) -> int:
        return int(self.ad().get("JobStatus", 0))

    def reaches(self, status: int, seconds: float = PATIENCE) -> None:
        """Wait until it has this JobStatus."""
        until(lambda: self.status() == status, lambda: f"job {self.id} reaches status {status}: {self.why()}", seconds)

    def why(self) -> str:
        ad = self.ad()
        keys = ("JobStatus", "HoldReason", "LastRejMatchReason", "CheckpointNumber", "NumJobStarts")
        said = (self.live("_condor_stdout")[-200:], self.live("_condor_stderr"))
        return f"{[ad.get(key) for key in keys]} {said}"

    def act(self, tool: str, *words: str) -> None:
        """condor_hold, condor_release, condor_rm, condor_vacate_job."""
        done = self.pool(tool, *words, self.id)
        assert done.status == 0, done

    def output(self, name: str = "out") -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def sandbox(self) -> Path | None:
        """Its directory on the execute side, while it runs."""
        found: Sequence[Path] = sorted(self.pool.base.glob("execute/dir_*"))
        for path in found:
            ad = path / ".job.ad"
            try:
                if re.search(rf"^ClusterId = {self.id.split('.')[0]}$", ad.read_text(), re.M):
                    return path
            except OSError:
                continue
        return None

    def live(self, name: str = "_condor_stdout") -> str:
        """A file of its sandbox, as it is now."""
        sandbox = self.sandbox()
        try:
            return (sandbox / name).read_text() if sandbox else ""
        except OSError:
            return ""
