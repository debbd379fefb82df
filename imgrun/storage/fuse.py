"""File systems of images without the host's root: a FUSE server per job, in the supervisor's own user and mount namespace.

The server is the supervisor's child: outside the job's PID namespace, so the job cannot see it, and killed with the
supervisor. Source: fuse(8), mount_namespaces(7).
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from typing import NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import HostError, ImageDamaged, ImageFormatError, PrivilegeError

START_SECONDS = 20.0
OPTIONS = "allow_other,default_permissions"


class Kind(NamedTuple):
    """A server program: its package, and how it is told what to serve."""

    program: str
    package: str
    arguments: tuple[str, ...]


SERVERS = {
    "squashfs": Kind("squashfuse_ll", "squashfuse", ("-f", "-o", "ro,offset={offset}," + OPTIONS, "{path}", "{target}")),
    "ext4": Kind("fuse2fs", "fuse2fs", ("-f", "-o", "{mode},offset={offset}," + OPTIONS, "{path}", "{target}")),
    "erofs": Kind("erofsfuse", "erofsfuse", ("-f", "--offset={offset}", "-o", "ro," + OPTIONS, "{path}", "{target}")),
}


class Server:
    """A running file server. ``close`` ends it; so does the death of its parent."""

    def __init__(self, pid: int, program: str) -> None:
        self.pid = pid
        self.program = program

    def close(self) -> None:
        if self.pid > 0:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            os.waitpid(self.pid, 0)
            self.pid = 0

    def has_failed(self) -> bool:
        """Reap it after its end: whether that was for another reason than that its last mount has gone."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return False
        self.pid = 0
        return status != 0

    def flush(self, seconds: float) -> None:
        """Wait until it has ended by itself, as it does once its last mount is gone, so that writes are complete."""
        deadline = time.monotonic() + seconds
        while self.pid > 0 and time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                return
            time.sleep(0.005)


def serve(fstype: str, fd: int, offset: int, *, writable: bool, directory: str, name: str) -> tuple[int, Server]:
    """Serve the file system at ``offset`` of the file ``fd`` and return a detached mount of it with its server.

    The server inherits ``fd``, and with it the lock on the image.

    ``directory`` is an existing one of ours for the server's mount point and messages. Raises HostError when the server
    program or /dev/fuse is missing, ImageFormatError when no server serves ``fstype``, ImageDamaged when it refuses.
    """
    kind = SERVERS.get(fstype)
    if kind is None:
        raise ImageFormatError(
            f"{name} is {fstype}, which only root can mount", "make a squashfs of its files, or ask for root"
        )
    program = shutil.which(kind.program)
    if program is None:
        raise HostError(
            f"{name} is {fstype}, and {kind.program}, which serves it without root, is not installed",
            f"install {kind.package}, or make a squashfs of the image's files",
        )
    check_device()
    target = f"{directory}/image"
    os.mkdir(target, 0o700)
    words = {"path": f"/proc/self/fd/{fd}", "offset": str(offset), "target": target, "mode": "rw" if writable else "ro,norecovery"}
    argv = [program, *(argument.format_map(words) for argument in kind.arguments)]
    return start(argv, target, f"{directory}/fuse.log", name, keep=(fd,))


def start(argv: list[str], target: str, log: str, name: str, keep: tuple[int, ...] = ()) -> tuple[int, Server]:
    """Run a file server that mounts itself on ``target``; returns the mount, taken off there again, and the server."""
    before = os.stat(target).st_dev
    pid = os.fork()
    if pid == 0:
        _become_server(argv, log, keep)
    server = Server(pid, os.path.basename(argv[0]))
    try:
        _await_mount(server, target, before, log, name)
        here = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mount = sc.clone_mount(here, recursive=False)
        finally:
            os.close(here)
        sc.umount(target, sc.MNT_DETACH)
        os.rmdir(target)
        return mount, server
    except BaseException:
        server.close()
        raise


def _become_server(argv: list[str], log: str, keep: tuple[int, ...]) -> None:
    try:
        os.setsid()
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        null = os.open("/dev/null", os.O_RDWR)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, fd in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, fd)
        sc.close_others(keep)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.chdir("/")
        os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"})
    finally:
        os._exit(127)


def _await_mount(server: Server, target: str, before: int, log: str, name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    ended = os.pidfd_open(server.pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    try:
        pause = 1
        while os.stat(target).st_dev == before:
            if poll.poll(pause):
                raise ImageDamaged(f"{name}: {server.program} refused it: {_last_line(log)}", "check the image")
            if time.monotonic() > deadline:
                raise HostError(f"{server.program} did not serve {name} within {START_SECONDS:g} s", f"see {log}")
            pause = min(pause * 2, 20)
    finally:
        os.close(ended)


def _last_line(log: str) -> str:
    try:
        with open(log, "rb") as f:
            lines = [line for line in f.read(1 << 16).decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it said nothing"


def check_device() -> None:
    """Raise an error that says what is wrong with /dev/fuse, if something is."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError("this host has no /dev/fuse", "ask your administrator: modprobe fuse") from None
    except OSError as e:
        raise PrivilegeError(
            f"/dev/fuse cannot be opened: {e.strerror}", "ask your administrator: chmod 666 /dev/fuse, as udev does"
        ) from e
