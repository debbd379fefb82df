"""CRIU inside the job: a process of the job's own namespaces, and the conversation with it.

CRIU shares every namespace with the tree below the shim, so it saves processes and nothing else; what is around them, imgrun
makes anew from the plan. What is asked of it is imgrun.checkpoints.criu_rpc. Source: criu(8).
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoints.criu_log import explain
from imgrun.checkpoints.criu_messages import NOTIFY, Response, answer
from imgrun.errors import CheckpointError, HostError, JobStateError
from imgrun.isolation import namespaces
from imgrun.isolation.mounts import NO_ACCESS_TO_DEVICES, new_filesystem

REAPER = 2
"""The pid, in the job, of the root of the tree that is dumped; it comes back with it."""
BELOW_LAST_PID = 4000
"""How far below the largest pid CRIU and its children get theirs: hardly ever where those are that it restores."""
TOOLBOX = "/dev/imgrun/criu"
IMAGES = "/dev/imgrun/checkpoint"
WORK = "/dev/imgrun/work"
"""Where they are attached in the job, for as long as CRIU runs."""
LOG = "criu.log"
FETCH_LOG = "lazy.log"
FETCH = "fetch"
"""Asks the process in the job to have memory fetched from the images as the restored processes touch it."""


def toolbox() -> str:
    """The directory with a relocatable CRIU. Raises HostError when it is not installed."""
    try:
        import imgrun_criu
    except ImportError:
        raise HostError("checkpointing needs the package imgrun-criu", "pip install imgrun-criu, or ./dev setup") from None
    return str(imgrun_criu.path())


def log_level() -> int:
    """How much CRIU is to write down. At 4, a line for each few pages takes a fifth of the time that a job stands still."""
    return 4 if os.environ.get("IMGRUN_DEBUG") else 3


class Site(NamedTuple):
    """Where CRIU is to run: the job's namespaces, and what it sees there."""

    namespaces: dict[str, int]
    toolbox: int
    """A detached mount of the toolbox."""
    images: int
    """A detached mount of the directory for CRIU's files, with owners as the job sees them."""
    work: int
    """The same for what is not part of the checkpoint: CRIU's log and statistics."""
    userns: bool
    """Whether the job has a user namespace, so that CRIU has no rights over the host."""
    join: tuple[int, ...] = ()
    """Of the job's cgroups: for a restore, whose processes stay where CRIU is."""
    clone_into: int = -1
    last_pid: int = 0
    """For a restore: the last pid that the job had given out."""
    inherit: Mapping[str, int] = {}
    """Descriptors for a restore, by what the dump called them."""


class Session:
    """One CRIU process in a job, and the conversation with it.

    ``before`` runs first, in the process that is in the job's mount namespace: to put back what mounts hold. ``meanwhile``
    runs in ours, while that is being done and CRIU started.
    """

    def __init__(
        self, site: Site, *, before: Callable[[], None] | None = None, meanwhile: Callable[[], None] | None = None
    ) -> None:
        self._channel, theirs = Channel.pair()
        self._socket, criu_end = Channel.pair()
        self._pid = sc.clone(0, site.clone_into)
        if self._pid == 0:
            self._channel.close()
            self._socket.close()
            _host(site, theirs, criu_end, before)
        theirs.close()
        criu_end.close()
        if meanwhile is not None:
            try:
                meanwhile()
            except BaseException:
                self.close()
                raise
        received = self._channel.receive()
        if received is None or "error" in received[0]:
            why = received[0]["error"] if received else "it was killed"
            self.close()
            raise HostError(f"CRIU cannot be started in the job: {why}", "run again with --debug for the details")

    def in_job(self, what: str) -> None:
        """Have the process in the job's mount namespace do one of its tasks, by name. Raises CheckpointError."""
        self._channel.send({"do": what})
        received = self._channel.receive()
        if received is None or "error" in received[0]:
            why = received[0]["error"] if received else "it was killed"
            doing = "its memory cannot be fetched" if what == FETCH else "saving what the job keeps in memory failed"
            raise CheckpointError(f"{doing}: {why}", "see the space where it goes")

    def run(self, request: bytes, on_notify: Callable[[str], None] = lambda script: None) -> Response | None:
        """Send a request and answer CRIU's notifications until its reply; None when CRIU has died."""
        fd = self._socket.fileno()
        os.write(fd, request)
        while True:
            try:
                data = os.read(fd, 1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            response = Response.parse(data)
            if response.kind != NOTIFY:
                return response
            try:
                on_notify(response.script)
            except BaseException:
                os.write(fd, answer(success=False))
                os.read(fd, 1 << 20)
                raise
            try:
                os.write(fd, answer(success=True))
            except OSError:
                return None  # what was done there has ended it

    def leave(self) -> int:
        """Let CRIU's host process stay for as long as it fetches memory; its pid. It ends with 0 when all is there."""
        self._socket.close()
        self._channel.close()
        pid, self._pid = self._pid, 0
        return pid

    def end(self) -> None:
        """Have CRIU's host process end, and take what it attached with it."""
        self._socket.close()
        self._channel.close()

    def close(self) -> None:
        """Await that it has ended."""
        self.end()
        if self._pid > 0:
            os.waitpid(self._pid, 0)
            self._pid = 0


def _host(site: Site, channel: Channel, criu_end: Channel, before: Callable[[], None] | None) -> NoReturn:
    """Enter the job, attach what CRIU needs, run it, and take everything off again."""
    status = 0
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for fd in site.join:
            os.write(fd, b"0")
        namespaces.enter(site.namespaces)
        if "user" in site.namespaces:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        os.chdir("/")
        for mount, place in ((site.toolbox, TOOLBOX), (site.images, IMAGES), (site.work, WORK)):
            _attach(mount, place)
        try:
            if before is not None:
                before()
            tell, told = os.pipe2(os.O_CLOEXEC)
            child = _clone_aside()
            if child == 0:
                _become_criu(("swrk", str(criu_end.fileno())), (criu_end.fileno(), *site.inherit.values()), told)
            os.close(told)
            criu_end.close()
            last = os.read(tell, 32)
            channel.send({"running": True})
            fetcher = _serve(channel, child)
            _put_last_pid_back(site.last_pid or int(last or b"0"))
        finally:
            for place in (TOOLBOX, IMAGES, WORK):
                _detach(place)
        if fetcher:
            status = _await_fetcher(fetcher)
    except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
        try:
            channel.send({"error": f"{e}"})
        except OSError:
            pass
    finally:
        os._exit(status)


def _detach(place: str) -> None:
    while True:
        try:
            sc.umount(place, sc.MNT_DETACH)
        except OSError:
            return  # nothing is mounted there any more


def _attach(mount: int, place: str) -> None:
    # /dev is a tmpfs of ours, but the job's root may have changed what is in it.
    dev = os.open("/dev", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    within = place.removeprefix("/dev/")
    try:
        os.mkdir(within, 0o755, dir_fd=dev)
    except FileExistsError:
        pass
    _detach(place)  # what is left of one that was killed
    target = sc.openat2(within, os.O_PATH | os.O_DIRECTORY, dev, resolve=sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS)
    sc.move_mount(mount, "", target)
    os.close(target)
    os.close(dev)


def _clone_aside() -> int:
    """Fork with a pid that the tree does not have."""
    for aside in range(0, BELOW_LAST_PID // 2, 100):
        try:
            return sc.clone(0, pid=first_pid() + aside)
        except FileExistsError:
            continue  # of an earlier one that was killed, and is not reaped yet
        except OSError as e:
            if e.errno == errno.ENOMEM:  # what the kernel says when a PID namespace has no init any more
                raise JobStateError("the job is ending", "see 'imgrun inspect' for how") from e
            raise
    raise CheckpointError("the job has used up its pids", "end some of its processes")


def first_pid() -> int:
    """The least pid in the job that CRIU may have; its children have the ones after that."""
    with open("/proc/sys/kernel/pid_max", "rb") as f:
        return max(int(f.read()) - BELOW_LAST_PID, 1000)


def _become_criu(arguments: tuple[str, ...], keep: tuple[int, ...], told: int) -> None:
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        # CRIU's own children must not take pids that it is to restore.
        os.write(told, str(_swap_last_pid(os.getpid())).encode())
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(signum, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        sc.close_range_cloexec(3)
        for fd in keep:
            os.set_inheritable(fd, True)
        # No settings and no plug-ins of the job's own: they would run with CRIU's rights.
        words = [f"{TOOLBOX}/ld.so", "--inhibit-cache", "--library-path", TOOLBOX, f"{TOOLBOX}/criu"]
        words += ["--no-default-config", "--work-dir", WORK, *arguments]
        os.execve(words[0], words, {"PATH": TOOLBOX, "CRIU_LIBS_DIR": WORK})
    finally:
        os._exit(127)


def _swap_last_pid(pid: int) -> int:
    """Have the next process of our PID namespace get the pid after ``pid`` (proc(5), ns_last_pid); returns the old one.

    Through a proc of our own: the job's may have it read-only.
    """
    proc = new_filesystem("proc", {}, NO_ACCESS_TO_DEVICES | sc.MOUNT_ATTR_NOEXEC)
    fd = os.open("sys/kernel/ns_last_pid", os.O_RDWR | os.O_CLOEXEC, dir_fd=proc)
    last = int(os.pread(fd, 32, 0))
    os.pwrite(fd, str(pid).encode(), 0)
    os.close(fd)
    os.close(proc)
    return last


def _put_last_pid_back(last: int) -> None:
    """The job's next pids follow on those it had, not on CRIU's."""
    child = sc.clone(0)
    if child == 0:
        try:
            _swap_last_pid(last)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


TASKS: dict[str, Callable[[], None]] = {}
"""What can be asked of the process in the job's mount namespace; imgrun.checkpoint fills it before a session is made."""


def _serve(channel: Channel, child: int) -> int:
    """Do what is asked in the job's mount namespace, until whoever asks is done. Returns the pid of what fetches memory."""
    fetcher = 0
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while poll.poll():
        received = channel.receive()
        if received is None:
            break
        try:
            if received[0]["do"] == FETCH:
                fetcher = _start_fetcher()
            else:
                TASKS[received[0]["do"]]()
            channel.send({"done": True})
        except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
            channel.send({"error": f"{type(e).__name__}: {e}"})
    if os.waitpid(child, os.WNOHANG)[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return fetcher


def _start_fetcher() -> int:
    """CRIU's other half of a lazy restore, which gives the processes their memory (criu(8), lazy-pages)."""
    ready, tell = os.pipe2(os.O_CLOEXEC)
    unused, told = os.pipe2(os.O_CLOEXEC)
    child = _clone_aside()
    if child == 0:
        log = ("--log-file", FETCH_LOG, f"-v{log_level()}", "--images-dir", IMAGES)
        _become_criu(("lazy-pages", *log, "--status-fd", str(tell)), (tell,), told)
    for fd in (tell, told, unused):
        os.close(fd)
    listens = os.read(ready, 1)
    os.close(ready)
    if not listens:
        os.waitpid(child, 0)
        raise OSError(errno.ECHILD, f"CRIU's lazy-pages ended: {explain(f'{WORK}/{FETCH_LOG}')}")
    return child


def _await_fetcher(fetcher: int) -> int:
    """Wait until all memory is there: 0. If not and the job lives, what it has not seen yet would read as zeros: 1."""
    sc.close_others(())
    ended = os.waitpid(fetcher, 0)[1]
    if ended == 0:
        return 0
    try:
        if sc.clone(0) == 0:
            os._exit(0)
    except OSError:
        return 0  # the kernel has ended both: no process can be made in a PID namespace without an init
    return 1
