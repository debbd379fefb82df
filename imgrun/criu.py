"""CRIU inside the job: one dump or restore of the tree below the shim, as a process of the job's own namespaces.

CRIU shares every namespace with the tree, so it saves processes and nothing else; what is around them, imgrun makes anew
from the plan. Sources: criu(8), the RPC definitions of its release (images/rpc.proto).
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.errors import CheckpointError, HostError, JobStateError, RestoreError
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
CPU_FEATURES = 1 | 4
"""Of the processor, its way to save floating point registers and its instructions must be there again (criu(8))."""
GHOST_LIMIT = 256 << 20
"""Bytes of an unlinked but open file that is saved with the processes; larger ones make the dump fail."""


WATCHED = ("/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/run", "/opt")
"""Where a file that is watched by inotify is looked for, beside /etc and /var, when the kernel does not say its path."""


def toolbox() -> str:
    """The directory with a relocatable CRIU. Raises HostError when it is not installed."""
    try:
        import imgrun_criu
    except ImportError:
        raise HostError("checkpointing needs the package imgrun-criu", "pip install imgrun-criu, or ./dev setup") from None
    return str(imgrun_criu.path())


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

    ``before`` and ``after`` run in the process that is in the job's mount namespace: to put back and to save what mounts
    hold. Each may be None.
    """

    def __init__(self, site: Site, *, before: Callable[[], None] | None = None) -> None:
        self._channel, theirs = Channel.pair()
        self._socket, criu_end = Channel.pair()
        self._pid = sc.clone(0, site.clone_into)
        if self._pid == 0:
            self._channel.close()
            self._socket.close()
            _host(site, theirs, criu_end, before)
        theirs.close()
        criu_end.close()
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
            raise CheckpointError(f"saving what the job keeps in memory failed: {why}", "see the space where it goes")

    def run(self, request: Any, on_notify: Callable[[str], None]) -> Any:
        """Send a request and answer CRIU's notifications until its reply; None when CRIU has died."""
        import pycriu.rpc_pb2 as rpc

        fd = self._socket.fileno()
        os.write(fd, request.SerializeToString())
        while True:
            try:
                data = os.read(fd, 1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            response = rpc.criu_resp()
            response.ParseFromString(data)
            if response.type != rpc.NOTIFY:
                return response
            answer = rpc.criu_req(type=rpc.NOTIFY, notify_success=True)
            try:
                on_notify(response.notify.script)
            except BaseException:
                answer.notify_success = False
                os.write(fd, answer.SerializeToString())
                os.read(fd, 1 << 20)
                raise
            try:
                os.write(fd, answer.SerializeToString())
            except OSError:
                return None  # what was done there has ended it

    def close(self) -> None:
        """End CRIU's host process; it takes what it attached with it."""
        self._socket.close()
        self._channel.close()
        if self._pid > 0:
            os.waitpid(self._pid, 0)
            self._pid = 0


def _host(site: Site, channel: Channel, criu_end: Channel, before: Callable[[], None] | None) -> NoReturn:
    """Enter the job, attach what CRIU needs, run it, and take everything off again."""
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
                _become_criu(site, criu_end, told)
            os.close(told)
            criu_end.close()
            last = os.read(tell, 32)
            channel.send({"running": True})
            _serve(channel, child)
            _put_last_pid_back(site.last_pid or int(last or b"0"))
        finally:
            for place in (TOOLBOX, IMAGES, WORK):
                _detach(place)
    except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
        try:
            channel.send({"error": f"{e}"})
        except OSError:
            pass
    finally:
        os._exit(0)


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


def _become_criu(site: Site, criu_end: Channel, told: int) -> None:
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
        for fd in (criu_end.fileno(), *site.inherit.values()):
            os.set_inheritable(fd, True)
        # No settings and no plug-ins of the job's own: they would run with CRIU's rights.
        words = [f"{TOOLBOX}/ld.so", "--inhibit-cache", "--library-path", TOOLBOX, f"{TOOLBOX}/criu"]
        words += ["--no-default-config", "--work-dir", WORK, "swrk", str(criu_end.fileno())]
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


def _serve(channel: Channel, child: int) -> None:
    """Do what is asked in the job's mount namespace, until whoever asks is done or CRIU has ended."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while poll.poll():
        received = channel.receive()
        if received is None:
            break
        try:
            TASKS[received[0]["do"]]()
            channel.send({"done": True})
        except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
            channel.send({"error": f"{type(e).__name__}: {e}"})
    if os.waitpid(child, os.WNOHANG)[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def options(site: Site, log: str) -> Any:
    """What dump and restore have in common."""
    import pycriu.rpc_pb2 as rpc

    opts = rpc.criu_opts(images_dir_fd=-1)
    opts.images_dir = IMAGES
    opts.log_level = 4
    opts.log_file = os.path.basename(log)
    opts.unprivileged = site.userns
    opts.manage_cgroups = False
    opts.manage_cgroups_mode = rpc.IGNORE
    opts.network_lock = rpc.SKIP
    opts.tcp_established = True
    opts.file_locks = True
    opts.link_remap = True
    opts.irmap_scan_paths.extend(WATCHED)
    opts.ghost_limit = GHOST_LIMIT
    opts.notify_scripts = True
    opts.cpu_cap = CPU_FEATURES
    return opts


def dump(site: Site, *, frozen: Callable[[Session], None], log: str, kept: str) -> None:
    """Save the tree. ``frozen`` is called while every process of it stands still, with its memory saved.

    When ``frozen`` returns, the tree runs on, unless ``frozen`` has killed it, CRIU included: its images are complete by
    then. When ``frozen`` raises, the tree runs on. Raises CheckpointError; the job then runs on as if nothing had been.
    ``kept`` is where the log will be found after that.
    """
    import pycriu.rpc_pb2 as rpc

    session = Session(site)
    complete = False
    try:
        request = rpc.criu_req(type=rpc.DUMP)
        request.opts.CopyFrom(options(site, log))
        request.opts.pid = REAPER
        request.opts.leave_running = True

        def on_notify(script: str) -> None:
            nonlocal complete
            if script == "post-dump":
                frozen(session)
                complete = True

        response = session.run(request, on_notify)
        if not complete:
            cause = "it was killed" if response is None else explain(log, response.cr_errmsg)
            raise CheckpointError(f"CRIU could not save the job's processes: {cause}", f"its log is {kept}")
    finally:
        session.close()


def restore(site: Site, *, before: Callable[[], None], log: str) -> None:
    """Bring the tree back to life, as it was. Raises RestoreError; nothing of it runs then."""
    import pycriu.rpc_pb2 as rpc

    session = Session(site, before=before)
    try:
        request = rpc.criu_req(type=rpc.RESTORE)
        request.opts.CopyFrom(options(site, log))
        for key, fd in site.inherit.items():
            request.opts.inherit_fd.add(key=key, fd=fd)
        response = session.run(request, lambda script: None)
        if response is None or not response.success:
            cause = "it was killed" if response is None else explain(log, response.cr_errmsg)
            raise RestoreError(f"CRIU could not bring the job's processes back: {cause}", f"its log is {log}")
    finally:
        session.close()


KNOWN = (
    ("Can't dump ghost file", "an unlinked file that is still open is too large to be saved with it"),
    ("Can't lookup mount", "it has a file open on a mount that it cannot see any more"),
    ("seccomp", "a process has a system call filter, which only root outside a user namespace can suspend"),
    ("inotify", "it watches a file by inotify that cannot be found again by its path"),
    ("fanotify", "it watches files by fanotify"),
    ("io_uring", "it uses io_uring"),
    ("TCP repair mode", "it has a TCP connection on the host's network, which needs --userns off, or a network of its own"),
    ("sysvipc", "it uses System V shared memory, semaphores or message queues"),
    ("Unsupported", "it uses something that CRIU cannot save"),
    ("No space left", "there is no space left for the checkpoint"),
    ("Can't find pid", "a process id that it had is taken"),
)
"""What lines of CRIU's log mean to a person."""


HARMLESS = ("net: Unexpected error: -1", "Can't setup RLIMIT_NOFILE", "can't get apparmor", "Can't open /proc/sys/net/")
"""What CRIU logs as errors while it finds out what the kernel can do."""


def explain(log: str, said: str = "") -> str:
    """The cause of a failure in one sentence: from what CRIU logged as errors, the first, since the rest follows from it.

    ``said`` is what it told over its socket, when there is no log.
    """
    try:
        with open(log, encoding="utf-8", errors="replace") as f:
            errors = [line.rstrip() for line in f if "Error" in line or "Err " in line]
    except OSError:
        return said or "it left no log"
    errors = [line for line in errors if not any(word in line for word in HARMLESS)]
    for mark, meaning in KNOWN:
        for line in errors:
            if mark in line:
                return f"{meaning} ({line.partition('): ')[2] or line})"
    return errors[0].partition("): ")[2] or errors[0] if errors else said or "it gave no reason"
