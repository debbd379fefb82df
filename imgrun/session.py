"""Another command in a running job: ``imgrun exec``.

The command gets the job's namespaces, cgroup, limits and restrictions, but is none of its processes: it is started by, and
dies with, whoever asked for it, and is not part of what is frozen.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from imgrun import errors, init_shim, passwd
from imgrun import syscalls as sc
from imgrun.channel import Channel
from imgrun.environment import login_environment
from imgrun.errors import HostError, ImgrunError, JobStateError, PrivilegeError, StartError
from imgrun.init_shim import SHIM, StatusReader, StepFailed
from imgrun.isolation import limits, namespaces, security, userns
from imgrun.isolation.cgroups.cgroup import JobCgroup, reopen
from imgrun.isolation.cgroups.place import come_near
from imgrun.isolation.child import open_terminal
from imgrun.job import Job
from imgrun.relay import OUT, Pump, Relay, Terminal, own_description, set_nonblocking
from imgrun.spec import check_text, check_workdir, checked_env
from imgrun.supervisor import FORWARDED


class Entry(NamedTuple):
    """What the process that enters the job needs."""

    channel: Channel
    namespaces: dict[str, int]
    join: tuple[int, ...]
    capabilities: frozenset[str]
    user: passwd.User
    argv: list[str]
    env: dict[str, str]
    tty: bool
    status: int
    drop_groups: bool
    filter: security.SeccompFilter | None


def execute(
    job: Job,
    command: tuple[str, ...],
    *,
    user: str | None = None,
    workdir: str | None = None,
    env: Mapping[str, str] | None = None,
    tty: bool = False,
    stdin: bool = False,
) -> int:
    """Run ``command`` in the job with our standard streams and return its exit status (128+N for signal N).

    Raises JobStateError when the job does not run, SpecError, CommandNotFound and the like as ``start`` does.
    """
    check_text("the command", *command)
    check_text("user", user or "")
    given = dict(checked_env(env or {}))
    if workdir is not None:
        check_workdir(workdir)
    init = job.init_pid()
    descriptors = namespaces.open_all(init)
    spec = job.spec
    try:
        root = os.open(f"/proc/{init}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise JobStateError(f"job {job.id} ended meanwhile", "see 'imgrun inspect' for how") from e
    who = passwd.lookup(root, user or spec.user or "0")
    os.close(root)
    gids = userns.gids_of(init)
    may_set_groups = sum(map(len, gids)) > 1
    who = who._replace(groups=tuple(g for g in who.groups if any(g in ids for ids in gids)))
    _check_mapped(init, who)
    cwd = workdir or spec.workdir or "/"
    cgroup = reopen(job.cgroup_paths())
    ours, theirs = Channel.pair()
    status_read, status_write = os.pipe2(os.O_CLOEXEC)
    entry = Entry(
        channel=theirs, namespaces=descriptors, join=tuple(cgroup.join_descriptors()),
        capabilities=job.capabilities(), user=who,
        argv=init_shim.arguments(
            command, status_fd=status_write, role="exec", uid=who.uid, gid=who.gid,
            groups=who.groups if may_set_groups else None, cwd=cwd, tty=tty, rlimits=spec.rlimits,
        ),
        env={**login_environment(who, job.id, tty=tty), **spec.env, **given}, tty=tty, status=status_write,
        drop_groups=may_set_groups, filter=security.filter_for(seccomp=spec.seccomp, userns=spec.userns, init=spec.init),
    )  # fmt: skip
    pid = _spawn(job, lambda: _enter(entry, ours), cgroup)
    theirs.close()
    os.close(status_write)
    for fd in (*entry.join, *descriptors.values()):
        os.close(fd)
    cgroup.close()
    return _accompany(pid, ours, status_read, command, cwd, who.name, stdin)


def _spawn(job: Job, enter: Callable[[], None], cgroup: JobCgroup) -> int:
    """A process in the job's cgroups that runs ``enter``. From another session of the user's, it gets there by systemd."""
    divided = near = False
    while True:
        try:
            return namespaces.spawn(0, enter, cgroup.clone_into)
        except HostError as e:
            why = e.__cause__.errno if isinstance(e.__cause__, OSError) else None
            if why == errno.EBUSY and not divided:
                # An init that has handed out controllers below the job's cgroup keeps processes out of its top.
                divided = cgroup.enter_beside(job.init_pid())
                if divided:
                    continue
            if why not in (errno.EACCES, errno.EPERM):
                raise JobStateError(f"job {job.id} cannot be entered: {e.message}", "it may just have ended") from e
        if near or not (near := come_near(cgroup.paths[0])):
            break
    raise PrivilegeError(
        f"job {job.id} cannot be entered: the kernel lets no process of this session into its cgroup",
        "do it from the session or batch slot that the job was started in",
    )


def _check_mapped(init: int, who: passwd.User) -> None:
    for name, number in (("uid_map", who.uid), ("gid_map", who.gid)):
        try:
            with open(f"/proc/{init}/{name}", encoding="ascii") as f:
                rows = [[int(word) for word in line.split()] for line in f]
        except OSError as e:
            raise JobStateError("the job ended meanwhile", "see 'imgrun inspect' for how") from e
        if not any(inside <= number < inside + size for inside, _, size in rows):
            raise PrivilegeError(
                f"--user {who.name}: id {number} is not among the job's ids", "choose another; --user 0 is its root"
            )


# -- in the process that enters ---------------------------------------------------------------------------------------


def _enter(entry: Entry, supervisors_end: Channel) -> NoReturn:
    try:
        supervisors_end.close()
        _enter_and_run(entry)
    except (ImgrunError, OSError) as e:
        _report(entry.channel, e)
    os._exit(125)


def _report(channel: Channel, e: ImgrunError | OSError) -> None:
    if not isinstance(e, ImgrunError):
        e = init_shim.not_executed(e, "entering the job")
    channel.send({"error": type(e).__name__, "message": e.message, "hint": e.hint})


def _enter_and_run(entry: Entry) -> None:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()  # signals of the caller's terminal reach us by way of the caller only
    limits.raise_oom_score()
    for fd in entry.join:
        os.write(fd, b"0")
    namespaces.enter(entry.namespaces)
    if "user" in entry.namespaces:
        os.setresgid(0, 0, 0)
        if entry.drop_groups:
            os.setgroups([])
        os.setresuid(0, 0, 0)
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)  # the change of ids has cleared it
    os.chdir("/")
    security.fresh_keyring()
    # The job's processes shall not look into this copy of the caller before it is the shim; exec ends that.
    sc.prctl(sc.PR_SET_DUMPABLE, 0)
    if entry.tty:
        entry.channel.send({"terminal": True}, [open_terminal(entry.user.uid)])
    else:
        others = _open_streams(entry.user.uid)
        entry.channel.send({"streams": True}, others)
        for fd in others:
            os.close(fd)
    # A process of the job's PID namespace, which we ourselves are not; we stay to tell how it ended.
    child = sc.clone(0)
    if child == 0:
        try:
            _run(entry)
        except (ImgrunError, OSError) as e:
            _report(entry.channel, e)
        finally:
            os._exit(125)
    os.close(entry.status)
    entry.channel.close()
    for signum in FORWARDED:
        signal.signal(signum, lambda number, _frame: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _open_streams(uid: int) -> list[int]:
    """Make pipes of the job's own our standard streams, so that it gets no descriptor of the caller's.

    Returns the other sides.
    """
    others = []
    for target in (0, 1, 2):
        read, write = os.pipe2(os.O_CLOEXEC)
        ours, other = (read, write) if target == 0 else (write, read)
        os.fchown(ours, uid, -1)  # it may open it anew, by /dev/stdout
        os.dup2(ours, target)
        os.close(ours)
        others.append(other)
    return others


def _run(entry: Entry) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    os.umask(limits.UMASK)
    security.drop_capabilities(entry.capabilities)
    security.no_new_privs()
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    sc.close_range_cloexec(3)
    os.set_inheritable(entry.status, True)
    if entry.filter is not None:
        entry.filter.load()
    os.execve(SHIM, entry.argv, entry.env)


# -- in the process that asked ----------------------------------------------------------------------------------------


def _accompany(pid: int, channel: Channel, status: int, command: tuple[str, ...], cwd: str, user: str, stdin: bool) -> int:
    """Wait for the command, passing on signals, its input and its output."""
    relay = Relay()
    terminal: Terminal | None = None
    streams: list[int] = []
    master = -1
    wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for signum in FORWARDED:
        signal.signal(signum, lambda *_: None)
    try:
        while (received := channel.receive()) is not None:
            message, fds = received
            if "error" in message:
                os.waitpid(pid, 0)
                raise getattr(errors, message["error"], StartError)(message["message"], message["hint"])
            streams = fds
        for fd in streams:
            set_nonblocking(fd)
        if len(streams) == 1:
            (master,) = streams
            if os.isatty(0):
                terminal = Terminal(0)
                terminal.copy_size(master)
            streams = [os.dup(master), master]
            stdin = True
        if stdin:
            relay.inputs.append(Pump(own_description(0, os.O_RDONLY), streams[0]))
        else:
            os.close(streams[0])
        for fd, source in enumerate(streams[1:], 1):
            relay.outputs.append(Pump(source, own_description(fd, os.O_WRONLY)))
        code = _loop(pid, relay, wake, terminal, master)
        for why in relay.failures():
            _warn(f"the command's output could not be written, and the rest is lost: {why}")
        if (failed := _why_not_started(status)) is not None:
            raise init_shim.failure(failed, command, cwd=cwd, user=user)
        return code
    finally:
        if terminal is not None:
            terminal.restore()


def _why_not_started(status: int) -> StepFailed | None:
    """What the shim reported, read after the end; None when the command ran.

    The pipe's end is not waited for: the job may have got hold of the other side.
    """
    os.set_blocking(status, False)
    try:
        records = StatusReader("exec").feed(os.read(status, 4096))
    except BlockingIOError:
        return None
    return next((record for record in records if isinstance(record, StepFailed)), None)


def _loop(pid: int, relay: Relay, wake: int, terminal: Terminal | None, master: int) -> int:
    ended = os.pidfd_open(pid)
    running, status = True, 0
    while running or relay.outputs_open():
        poll = select.poll()
        waiting = relay.register(poll)
        poll.register(wake, select.POLLIN)
        if running:
            poll.register(ended, select.POLLIN)
        ready = poll.poll(None if running or _undelivered(relay) else 0)
        if not ready:
            break  # what it started in the background may keep its output open
        for fd, _ in ready:
            if fd in waiting:
                waiting[fd].move()
            elif fd == ended:
                running = False
                status = os.waitpid(pid, 0)[1]
                relay.stop_input()
            elif fd == wake:
                for signum in os.read(wake, 4096):
                    if signum == signal.SIGWINCH and terminal is not None:
                        terminal.copy_size(master)
                    elif running:
                        _pass_on(pid, signum)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _warn(text: str) -> None:
    try:
        os.write(2, f"imgrun: warning: {text}\n".encode())
    except OSError:
        pass  # that may be the output which cannot be written


def _undelivered(relay: Relay) -> bool:
    """Whether output that was read waits for its reader."""
    return any(interest is not None and interest[1] == OUT for interest in (p.interest() for p in relay.outputs))


def _pass_on(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except OSError as e:
        if e.errno != errno.ESRCH:
            raise
