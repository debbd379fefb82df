"""What the first process of a job does between its birth and the shim: it makes itself at home, then becomes PID 1.

It runs in the job's new namespaces, a copy of the supervisor by clone3(2). It must not return.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import resource
import select
import signal
import struct
from typing import NamedTuple, NoReturn

from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.errors import ImgrunError
from imgrun.init_shim import SHIM, not_executed
from imgrun.isolation import limits, mounts, network, security
from imgrun.isolation.namespaces import stop_importing
from imgrun.passwd import User

TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441


class Setup(NamedTuple):
    """All that the child needs; descriptors are inherited."""

    channel: Channel
    supervisors_end: Channel
    operations: list[mounts.Operation]
    fds: dict[str, int]
    """The prepared mounts, by the names that the operations know."""
    hostname: str
    user: User
    userns: bool
    host_ids: bool
    """Whether the job's root has the host's id 0."""
    drop_groups: bool
    own_network: bool
    join: tuple[int, ...]
    """v1 ``tasks`` files: writing 0 moves the writer, without the lock that moving another process takes."""
    stdio: tuple[int, ...]
    """Standard input, output and error; -1 is the job's own /dev/null."""
    tty: bool
    status: int
    argv: list[str]
    """Of the shim."""
    env: dict[str, str]
    capabilities: frozenset[str]
    filter: security.SeccompFilter | None


def become_init(setup: Setup) -> NoReturn:
    """Do it all. Failures are sent to the supervisor as the errors they are."""
    try:
        _become_init(setup)
    except ImgrunError as e:
        _tell(setup.channel, type(e).__name__, e.message, e.hint)
    except OSError as e:
        error = not_executed(e, "setting up the job")
        _tell(setup.channel, type(error).__name__, error.message, error.hint)
    except BaseException as e:
        _tell(setup.channel, "StartError", f"setting up the job failed: {type(e).__name__}: {e}", "this is a bug")
        if os.environ.get("IMGRUN_DEBUG"):
            raise
    os._exit(125)


def _tell(channel: Channel, kind: str, message: str, hint: str | None) -> None:
    try:
        channel.send({"error": kind, "message": message, "hint": hint})
    except OSError:
        pass  # the supervisor is gone, and so shall we be


def _become_init(setup: Setup) -> None:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    # The shim forwards what comes from now on.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    # With our copy of its end open, the supervisor's death would go unnoticed.
    setup.supervisors_end.close()
    if setup.channel.receive() is None:
        os._exit(125)
    for fd in setup.join:
        os.write(fd, b"0")
        os.close(fd)
    limits.raise_oom_score(above=limits.ABOVE_SUPERVISOR)
    if setup.userns:
        os.setresgid(0, 0, 0)
        if setup.drop_groups:
            os.setgroups([])
        os.setresuid(0, 0, 0)
    sc.unshare(sc.CLONE_NEWCGROUP)
    security.fresh_keyring()
    if setup.userns and setup.host_ids:
        security.forbid_user_namespaces()
    _socket.sethostname(setup.hostname)
    if setup.own_network:
        network.bring_loopback_up()
    stop_importing()
    mounts.execute_all(setup.operations, mounts.Context(setup.fds))
    if setup.tty:
        setup.channel.send({"terminal": True}, [open_terminal(setup.user.uid)])
    else:
        for target, fd in enumerate(setup.stdio):
            os.dup2(fd if fd >= 0 else os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), target)
    os.umask(limits.UMASK)
    security.drop_capabilities(setup.capabilities)
    security.no_new_privs()
    # Changing ids and capabilities cleared it.
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if _closed(setup.channel):
        os._exit(125)
    sc.close_range_cloexec(3)
    os.set_inheritable(setup.status, True)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    # What we did so far is not the job's; the supervisor notes where its counters stand.
    setup.channel.send({"spent": [spent.ru_utime, spent.ru_stime]})
    if setup.channel.receive() is None:
        os._exit(125)
    if setup.filter is not None:
        setup.filter.load()
    os.execve(SHIM, setup.argv, setup.env)


def _closed(channel: Channel) -> bool:
    """Whether the supervisor died before the parent-death signal was set."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def open_terminal(uid: int) -> int:
    """Make a pseudoterminal of the job's own devpts our standard streams, so that it has a name there.

    Returns the other side, for the supervisor.
    """
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, uid, -1)
    for target in (0, 1, 2):
        os.dup2(slave, target)
    return master
