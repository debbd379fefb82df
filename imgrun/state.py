"""The state root: one directory per job, what is written there, and how the leftovers of a killed supervisor are found.

ROOT/jobs/ID/        job.json spec.json state.json result.json control stdout stderr scratch/
ROOT/names/NAME      a symbolic link to the id: a name is unique because a link can be made once
ROOT/live/ID         locked (flock) by the job's supervisor for its life: locked means alive, unlocked means leftovers
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import Any

from imgrun.errors import HostError, ImgrunError, JobNotFound, NameInUse, NoSpace, PrivilegeError
from imgrun.storage.trees import remove_tree
from imgrun.syscalls import fs_magic

ID_BYTES = 6
YOUNG = 60.0
"""Seconds within which a supervisor certainly takes the lock whose file it has made."""
NO_UPPER_LAYER = (0x794C7630, 0x6969, 0x65735546, 0x0BD00BD0, 0x47504653, 0xFF534D42, 0xFE534D42, 0x01021997, 0x5346414F)
"""File systems that an overlay cannot write to (statfs(2)): overlay, NFS, FUSE, Lustre, GPFS, CIFS, SMB2, 9p, AFS."""


def default_root() -> str:
    """IMGRUN_STATE_DIR, else /var/lib/imgrun for root and $XDG_STATE_HOME/imgrun for others.

    Where those are on a file system that cannot be the upper layer of an overlay, it is a directory in /var/tmp: on a
    network file system, or in a container whose root is itself an overlay, as in a job of imgrun's.
    """
    if chosen := os.environ.get("IMGRUN_STATE_DIR"):
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        usual = "/var/lib/imgrun"
    else:
        home = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(home):  # then it is to be passed over (XDG Base Directory Specification)
            home = os.path.abspath(os.path.expanduser("~/.local/state"))
        usual = os.path.join(home, "imgrun")
    if no_upper_layer(usual) and not no_upper_layer("/var/tmp"):
        return f"/var/tmp/imgrun-{os.geteuid()}"
    return usual


def no_upper_layer(path: str) -> bool:
    """Whether what is or will be at the absolute ``path`` is on a file system that cannot be an overlay's upper layer."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    try:
        return fs_magic(path) in NO_UPPER_LAYER
    except OSError:
        return False


def state_error(e: OSError, path: str) -> ImgrunError:
    """What an OSError on the state root means to the user."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left for imgrun's state in {path}", "free some, or set IMGRUN_STATE_DIR to another disk")
    if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return PrivilegeError(
            f"cannot write imgrun's state in {path}: {e.strerror}", "set IMGRUN_STATE_DIR to a directory of yours"
        )
    return HostError(f"cannot use imgrun's state directory {path}: {e.strerror}", "set IMGRUN_STATE_DIR to another one")


class JobDir:
    """The directory of one job."""

    def __init__(self, root: StateRoot, job_id: str) -> None:
        self.root = root
        self.id = job_id
        self.path = f"{root.path}/jobs/{job_id}"
        self.lock_fd = -1

    @property
    def name(self) -> str | None:
        """The job's name, when it has a usable one."""
        name = self.read("spec.json").get("name")
        return name if isinstance(name, str) and "/" not in name else None

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a JSON file that is complete or absent."""
        temporary = f"{self.path}/.{name}.{os.getpid()}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as f:
                f.write(json.dumps(record).encode() + b"\n")
            os.rename(temporary, f"{self.path}/{name}")
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise state_error(e, self.path) from e

    def read(self, name: str) -> dict[str, Any]:
        """The JSON file's content; empty when it is absent or unreadable."""
        try:
            with open(f"{self.path}/{name}", encoding="utf-8") as f:
                record = json.load(f)
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def hold(self) -> None:
        """Lock the job as alive while ``lock_fd``, or a copy of it in another process, is open."""
        live = f"{self.root.path}/live"
        try:
            fd = os.open(f"{live}/.{self.id}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Under its own name only once it is locked: unlocked would mean leftovers.
            os.rename(f"{live}/.{self.id}", f"{live}/{self.id}")
        except OSError as e:
            raise state_error(e, self.root.path) from e
        self.lock_fd = fd

    def release(self, *, ended: bool) -> None:
        """Let go of the lock; with ``ended``, also say that nothing of the job needs cleaning."""
        if ended:
            try:
                os.unlink(f"{self.root.path}/live/{self.id}")
            except FileNotFoundError:
                pass
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def alive(self) -> bool:
        """Whether a supervisor owns the job now."""
        try:
            fd = os.open(f"{self.root.path}/live/{self.id}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def remove(self) -> None:
        """Remove everything of the job from the state root. The caller knows that it is not alive."""
        names = f"{self.root.path}/names"
        name = self.name
        # Without its spec, which its supervisor did not live to write, only the names themselves tell.
        candidates = _list(names) if not self.read("spec.json") else [name] if name is not None else []
        for candidate in candidates:
            try:
                if os.readlink(f"{names}/{candidate}") == self.id:
                    os.unlink(f"{names}/{candidate}")
            except OSError:
                pass
        remove_tree(self.path)


class StateRoot:
    """All jobs of one user on one host."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path or default_root()

    def prepare(self) -> None:
        """Make the directories. Raises an error that names the root and what to do."""
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            for name in ("jobs", "names", "live"):
                try:
                    os.mkdir(f"{self.path}/{name}", 0o700)
                except FileExistsError:
                    pass
            owner = os.stat(self.path)
        except OSError as e:
            raise state_error(e, self.path) from e
        if owner.st_uid != os.geteuid() or owner.st_mode & 0o022:
            raise PrivilegeError(
                f"imgrun's state directory {self.path} is not yours alone",
                f"chown it to yourself and 'chmod go-w' it, or set IMGRUN_STATE_DIR; it is owned by uid {owner.st_uid}",
            )

    def create(self, spec: dict[str, Any], *, keep: bool, continues: bool = False) -> JobDir:
        """A new job's directory, held as alive, with its spec and its name.

        ``keep`` says that its record stays after its end until someone removes it. One that ``continues`` a checkpoint
        takes its name over from a job that has ended with one. Raises NameInUse.
        """
        self.prepare()
        while True:
            job = JobDir(self, os.urandom(ID_BYTES).hex())
            job.hold()
            try:
                os.mkdir(job.path, 0o700)
                break
            except FileExistsError:
                job.release(ended=False)
            except OSError as e:
                job.release(ended=True)
                raise state_error(e, self.path) from e
        try:
            name = spec.get("name")
            if name is not None:
                self._take_name(name, job.id, continues)
            job.write("spec.json", spec)
            job.write("job.json", {"id": job.id, "keep": keep, "created_at": now()})
        except BaseException:
            job.remove()
            job.release(ended=True)
            raise
        return job

    def _take_name(self, name: str, job_id: str, continues: bool) -> None:
        link = f"{self.path}/names/{name}"
        for _ in range(2):
            try:
                os.symlink(job_id, link)
                return
            except FileExistsError:
                holder = self._named(name)
                if holder is not None and not (continues and self._frozen(holder)):
                    # A continued job has the name of its first life.
                    hint = f"'imgrun rm {name}' frees it, with --force while that job runs"
                    hint = hint if continues else f"choose another; or {hint}"
                    raise NameInUse(f"the name {name!r} is in use by job {holder}", hint) from None
                self._drop_stale(name, frozen=continues)
            except OSError as e:
                raise state_error(e, self.path) from e
        raise NameInUse(f"the name {name!r} is in use", "choose another")

    def _named(self, name: str) -> str | None:
        """The id of the job with this name, if there is one."""
        holder = self._linked(f"{self.path}/names/{name}")
        return holder if holder is not None and os.path.isdir(f"{self.path}/jobs/{holder}") else None

    def _frozen(self, job_id: str) -> bool:
        """Whether the job has ended with a checkpoint, so that another may be what continues it."""
        return JobDir(self, job_id).read("result.json").get("reason") == "checkpointed"

    def _drop_stale(self, name: str, *, frozen: bool) -> None:
        """Remove the name of a job that is no more. One at a time: nobody removes what another has just taken.

        With ``frozen``, of one that has ended with a checkpoint too: its record is found by its id then.
        """
        fd = os.open(f"{self.path}/names", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            holder = self._named(name)
            if holder is None or (frozen and self._frozen(holder)):
                os.unlink(f"{self.path}/names/{name}")
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)

    @staticmethod
    def _linked(link: str) -> str | None:
        try:
            return os.readlink(link)
        except OSError:
            return None

    def ids(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(f"{self.path}/jobs") if not name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise state_error(e, self.path) from e

    def find(self, wanted: str) -> JobDir:
        """The job with this name, id or unique prefix of an id. Raises JobNotFound."""
        if wanted and "/" not in wanted and not wanted.startswith("."):
            holder = self._named(wanted)
            if holder is not None:
                return JobDir(self, holder)
            matches = [job_id for job_id in self.ids() if job_id.startswith(wanted)]
            if len(matches) == 1 or wanted in matches:
                return JobDir(self, wanted if wanted in matches else matches[0])
            if matches:
                raise JobNotFound(f"{wanted!r} begins the ids of {len(matches)} jobs", "give more of the id")
        raise JobNotFound(f"no job {wanted!r}", "'imgrun ps --all' lists those there are")

    def leftovers(self) -> list[JobDir]:
        """Jobs whose supervisor is gone without having cleaned up."""
        names = _list(f"{self.path}/live")
        for name in names:
            if name[0] == ".":
                self._drop_unborn(f"{self.path}/live/{name}")
        return [job for name in names if name[0] != "." and not (job := JobDir(self, name)).alive()]

    @staticmethod
    def _drop_unborn(path: str) -> None:
        """Remove what was to become a lock, unless it is so young that it may yet."""
        try:
            if time.time() - os.stat(path).st_mtime > YOUNG:
                os.unlink(path)
        except OSError:
            pass


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def claim(job: JobDir) -> bool:
    """Lock a dead job for cleaning; False when it is alive, or someone else cleans it already."""
    try:
        fd = os.open(f"{job.root.path}/live/{job.id}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    job.lock_fd = fd
    return True


def process_start(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot: with the pid it names the process for good (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def now() -> str:
    """The time as RFC 3339 text, UTC, to the millisecond."""
    t = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(t))}.{int(t % 1 * 1000):03d}Z"
