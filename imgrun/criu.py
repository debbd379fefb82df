"""CRIU inside the job: a process of the job's own namespaces, and the conversation with it.

CRIU shares every namespace with the tree below the shim, so it saves processes and nothing else; what is around them, imgrun
makes anew from the plan. What is asked of it is imgrun.checkpoints.criu_rpc. Source: criu(8).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.checkpoints import criu_process
from imgrun.checkpoints.criu_messages import NOTIFY, Response, answer
from imgrun.checkpoints.criu_process import IMAGES, TOOLBOX, WORK, Fetcher, put_last_pid_back
from imgrun.checkpoints.identity import HOW_TO_GET_CRIU
from imgrun.errors import CheckpointError, HostError
from imgrun.isolation import namespaces

REAPER = 2
"""The pid, in the job, of the root of the tree that is dumped; it comes back with it."""
LOG = "criu.log"


def toolbox() -> str:
    """The directory with a relocatable CRIU. Raises HostError when it is not installed."""
    try:
        import imgrun_criu
    except ImportError:
        raise HostError("checkpointing needs the package imgrun-criu", HOW_TO_GET_CRIU) from None
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
    environment: Mapping[str, str] = {}
    given: Mapping[str, int] = {}
    """Descriptors for CRIU, by the variables of its environment that have their numbers."""
    fetches: bool = False
    """For a restore: whether memory is to be fetched from the images as the restored processes touch it."""
    init: int = -1
    """The pidfd of the job's PID 1, which is killed when that memory cannot be had."""


class Session:
    """One CRIU process in a job, and the conversation with it.

    ``before`` runs in a process that is about to enter the job's mount namespace, and what it returns in there, before CRIU:
    to put back what mounts hold. ``meanwhile`` runs in ours, while that is being done and CRIU started. ``inside`` is what
    :meth:`in_job` has that process do.
    """

    def __init__(
        self,
        site: Site,
        *,
        before: Callable[[], Callable[[], None]] | None = None,
        meanwhile: Callable[[], None] | None = None,
        inside: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel, theirs = Channel.pair()
        self._socket, criu_end = Channel.pair()
        self.fetches = False
        """Whether the process in the job is there to fetch memory; it cannot be where CRIU cannot make userfaultfds."""
        self._pid = sc.clone(0, site.clone_into)
        if self._pid == 0:
            self._channel.close()
            self._socket.close()
            _host(site, theirs, criu_end, before, inside)
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
        self.fetches = bool(received[0]["fetches"])

    def in_job(self) -> None:
        """Have the process in the job's mount namespace do what it is to do there. Raises CheckpointError."""
        with contextlib.suppress(OSError):  # it is gone, as receive tells
            self._channel.send({"do": True})
        received = self._channel.receive()
        if received is None or "error" in received[0]:
            why = received[0]["error"] if received else "it was killed"
            raise CheckpointError(f"saving what the job keeps in memory failed: {why}", "see the space where it goes")

    def run(
        self,
        request: bytes,
        on_notify: Callable[[str], None] = lambda script: None,
        *,
        beside: Mapping[int, Callable[[], None]] = {},
    ) -> Response | None:
        """Send a request and answer CRIU's notifications until its reply; None when CRIU has died.

        ``beside`` is what is to be done meanwhile when descriptors can be read from.
        """
        fd = self._socket.fileno()
        try:
            os.write(fd, request)
        except (BrokenPipeError, ConnectionResetError):
            return None
        poll = select.poll()
        for other in (fd, *beside):
            poll.register(other, select.POLLIN)
        while True:
            ready = [number for number, _ in poll.poll()]
            for number in ready:
                if number in beside:
                    beside[number]()
            if fd not in ready:
                continue
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
                with contextlib.suppress(OSError):  # what went wrong may be that CRIU is gone
                    os.write(fd, answer(success=False))
                    os.read(fd, 1 << 20)
                raise
            try:
                os.write(fd, answer(success=True))
            except OSError:
                return None  # what was done there has ended it

    def is_alive(self) -> bool:
        """Whether CRIU is there, and with it whatever it holds still."""
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)
        return not poll.poll(0)

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
        """Await that it has ended. What was to fetch memory stays, so that nobody reads zeros, and is killed with the job."""
        self.end()
        if self._pid > 0:
            if self.fetches:
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _host(
    site: Site,
    channel: Channel,
    criu_end: Channel,
    before: Callable[[], Callable[[], None]] | None,
    inside: Callable[[], None],
) -> NoReturn:
    """Enter the job, attach what CRIU needs, run it, and take everything off again."""
    status = 0
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for fd in site.join:
            os.write(fd, b"0")
        put_back = None if before is None else before()
        namespaces.enter(site.namespaces)
        if "user" in site.namespaces:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        os.chdir("/")
        try:
            for mount, place in ((site.toolbox, TOOLBOX), (site.images, IMAGES), (site.work, WORK)):
                _attach(mount, place)
            if put_back is not None:
                put_back()
            environment = {**site.environment, **{name: str(fd) for name, fd in site.given.items()}}
            given = tuple(site.given.values())
            fetcher = Fetcher(given, environment, userns=site.userns) if site.fetches else None
            keep = (criu_end.fileno(), *site.inherit.values(), *given)
            child, last = criu_process.start(("swrk", str(criu_end.fileno())), keep, environment)
            criu_end.close()
            if fetcher is not None and not fetcher.is_ready():
                fetcher = None
            # What a restored process waits for memory with, such as a pipe it reads, nobody else can close before it has it.
            sc.close_others((channel.fileno(), *(fetcher.descriptors() if fetcher else ()), site.init))
            channel.send({"running": True, "fetches": fetcher is not None})
            _serve(channel, child, fetcher, site.init, inside)
            put_last_pid_back(site.last_pid or last)
        finally:
            for place in (TOOLBOX, IMAGES, WORK):
                with contextlib.suppress(HostError):
                    _detach(place)
        if fetcher is not None and not fetcher.ends_well():
            signal.pidfd_send_signal(site.init, signal.SIGKILL)
            status = 1
    except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
        try:
            channel.send({"error": f"{e}"})
        except OSError:
            pass
    finally:
        os._exit(status)


def _open_place(place: str) -> int:
    """/dev is a tmpfs of ours, but the job's root may have changed what is in it."""
    dev = os.open("/dev", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        within = place.removeprefix("/dev/")
        with contextlib.suppress(FileExistsError):
            os.mkdir(within, 0o755, dir_fd=dev)
        resolve = sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS
        return sc.openat2(within, os.O_PATH | os.O_DIRECTORY, dev, resolve=resolve)
    except OSError as e:
        raise HostError(f"{place} in the job is no directory of imgrun's: {e.strerror}", "have the job remove it") from e
    finally:
        os.close(dev)


def _detach(place: str) -> None:
    """Take off what is mounted there, by descriptor: a link of the job's would lead to another mount."""
    while True:
        target = _open_place(place)
        os.fchdir(target)
        os.close(target)
        try:
            sc.umount(".", sc.MNT_DETACH)
        except OSError:
            return  # nothing is mounted there any more
        finally:
            os.chdir("/")


def _attach(mount: int, place: str) -> None:
    _detach(place)  # what is left of one that was killed
    target = _open_place(place)
    sc.move_mount(mount, "", target)
    os.close(target)
    # The job may have renamed the directory in between; it cannot any more.
    found = _open_place(place)
    if not os.path.samestat(os.fstat(found), os.fstat(mount)):
        raise HostError(f"the job has moved {place}", "try again")
    os.close(found)


def _serve(channel: Channel, child: int, fetcher: Fetcher | None, init: int, inside: Callable[[], None]) -> None:
    """Do what is to be done in the job's mount namespace, each time it is asked for, until whoever asks is done."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    news = () if fetcher is None else fetcher.descriptors()
    for fd in news:
        poll.register(fd, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if fetcher is not None and not set(news).isdisjoint(ready):
            for fd in news:
                poll.unregister(fd)
            if not fetcher.ends_well():
                os.kill(child, signal.SIGKILL)
                signal.pidfd_send_signal(init, signal.SIGKILL)  # what has been restored is not to run, nor to wait for ever
        if channel.fileno() not in ready:
            continue
        received = channel.receive()
        if received is None:
            break
        try:
            inside()
            channel.send({"done": True})
        except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
            channel.send({"error": f"{type(e).__name__}: {e}"})
    if os.waitpid(child, os.WNOHANG)[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
