"""Starting jobs in the background: from the command line by a fork, from a Python program by a small server process.

A supervisor must have one thread and be no child that its caller has to wait for. A program that uses the library may
have many threads, so it never forks itself: the first ``Job.start`` executes this module as a server, which has the
imports done and forks a supervisor per request. The server ends when the program does; its supervisors go on.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from imgrun import errors, syscalls
from imgrun.channel import Channel
from imgrun.errors import HostError, ImgrunError, StartError
from imgrun.job import collect, finish
from imgrun.spec import JobSpec
from imgrun.state import JobDir, StateRoot
from imgrun.streams import Stdio
from imgrun.supervisor import Supervisor

if TYPE_CHECKING:
    from imgrun.checkpoints.manifest import Checkpoint

_lock = threading.Lock()
_server: Channel | None = None
_server_pid = 0


def supervise(
    job: JobDir, spec: JobSpec, stdio: Stdio, ready: Channel, *, keep: bool, checkpoint: Checkpoint | None = None
) -> None:
    """Be the supervisor of a background job: report on ``ready`` when it has started, or why not; live to its end."""
    os.setsid()
    started = False

    def report() -> None:
        nonlocal started
        started = True
        _report(ready, {"started": True})

    result = Supervisor(job, spec, stdio, on_started=report, checkpoint=checkpoint).run()
    try:
        finish(job, keep=keep and started)
    finally:
        if not started:  # told last: then nothing of it is left, and its name is free
            _report(ready, {"error": result.failure_class, "message": result.message, "hint": result.hint})


def _report(ready: Channel, message: dict[str, Any]) -> None:
    try:
        ready.send(message)
    except OSError:
        pass  # whoever asked has gone; the job goes on
    ready.close()


def await_start(ready: Channel) -> None:
    """Wait for a supervisor's report. Raises what it failed with."""
    received = ready.receive()
    if received is None:
        raise StartError("the job's supervisor was killed while it started", "start it again")
    message = received[0]
    if "error" in message:
        raise getattr(errors, str(message["error"]), StartError)(message["message"], message["hint"])


def open_output(job: JobDir, name: str) -> int:
    """The file that keeps an output stream with the job."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(f"{job.path}/{name}", flags, 0o600)


def start_detached(spec: JobSpec, *, keep: bool, checkpoint: Checkpoint | None = None) -> JobDir:
    """Start a job in the background from a process with one thread; returns once its command runs."""
    root = StateRoot()
    collect(root)
    job = root.create(spec.to_dict(), keep=keep, continues=checkpoint is not None)
    ready, theirs = Channel.pair()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        try:
            ready.close()
            if os.fork() == 0:
                null = os.open("/dev/null", os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                # What else the caller had open, such as a lock of a shell script's, must not live as long as the job.
                syscalls.close_others([job.lock_fd, theirs.fileno()])
                stdio = Stdio(-1, open_output(job, "stdout"), open_output(job, "stderr"))
                supervise(job, spec, stdio, theirs, keep=keep, checkpoint=checkpoint)
        finally:
            os._exit(0)
    theirs.close()
    job.release(ended=False)
    os.wait()
    try:
        await_start(ready)
    finally:
        ready.close()
    return job


# -- for the library --------------------------------------------------------------------------------------------------


def start_job(
    spec: JobSpec, streams: tuple[int | None, int | None, int | None], checkpoint: dict[str, Any] | None = None
) -> JobDir:
    """Start a job in the background from any process; with ``checkpoint``, its path and changes, continue that."""
    root = StateRoot()
    collect(root)
    job = root.create(spec.to_dict(), keep=True, continues=checkpoint is not None)
    ready, theirs = Channel.pair()
    opened: list[int] = []
    try:
        fds = [job.lock_fd, theirs.fileno()]
        for name, given in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            if given is None:
                given = os.open("/dev/null", os.O_RDONLY) if name == "stdin" else open_output(job, name)
                opened.append(given)
            fds.append(given)
        _ask_server({"job": job.id, "root": root.path, "checkpoint": checkpoint}, fds)
    except BaseException:
        ready.close()
        job.remove()
        job.release(ended=True)
        raise
    finally:
        theirs.close()
        for fd in opened:
            os.close(fd)
    job.release(ended=False)
    try:
        await_start(ready)
    finally:
        ready.close()
    return job


def _ask_server(message: dict[str, Any], fds: list[int]) -> None:
    global _server
    for attempt in (1, 2):
        with _lock:
            if _server_pid != os.getpid():
                close_server()  # that of the program we were forked from
            if _server is None:
                _server = _start_server()
            server = _server
        try:
            server.send(message, fds)
            return
        except OSError as e:
            with _lock:
                if _server is server:
                    close_server()
            if attempt == 2:
                raise HostError(f"imgrun's launcher process does not answer: {e.strerror}", "try again") from e


def close_server() -> None:
    """Let the server end, once it has done what it was asked."""
    global _server
    if _server is not None:
        _server.close()
        _server = None


def _start_server() -> Channel:
    import atexit
    import fcntl
    import subprocess

    global _server_pid
    if not sys.executable:
        raise HostError("this Python does not know its own executable", "set sys.executable, or use the command line")
    ours, theirs = Channel.pair()
    # Not one of the standard three, which a program may have closed, and which the server gets anew.
    fd = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    theirs.close()
    try:
        # It leaves the server behind: the program never has a child that it does not know, and may wait for all it has.
        subprocess.run(
            [sys.executable, "-P", "-m", "imgrun.launcher", str(fd)],
            pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
    finally:
        os.close(fd)
    if _server_pid == 0:
        atexit.register(close_server)
    _server_pid = os.getpid()
    return ours


def serve(channel: Channel) -> None:
    """Fork a supervisor for each request until the program that asks is gone."""
    # So that no supervisor has to import them.
    import imgrun.accounting.verdict  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # What is there now is there for good: collecting it would only copy the pages that supervisors share with us.
    gc.collect()
    gc.freeze()
    gc.disable()
    while (received := channel.receive()) is not None:
        message, fds = received
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                channel.close()
                _serve_one(message, fds)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def _serve_one(message: dict[str, Any], fds: list[int]) -> None:
    lock_fd, ready_fd, *streams = fds
    ready = Channel.from_fd(ready_fd)
    if not os.environ.get("IMGRUN_DEBUG"):
        os.dup2(1, 2)  # the program's errors, which may be a pipe that somebody reads to its end
    try:
        job = JobDir(StateRoot(message["root"]), message["job"])
        job.lock_fd = lock_fd
        spec = JobSpec.from_dict(job.read("spec.json"))
        checkpoint = _load(message.get("checkpoint"))
    except (ImgrunError, KeyError, TypeError) as e:
        _report(ready, {"error": "StartError", "message": f"the launcher got a bad request: {e}", "hint": None})
        return
    supervise(job, spec, Stdio(*streams), ready, keep=True, checkpoint=checkpoint)


def _load(request: dict[str, Any] | None) -> Checkpoint | None:
    """The checkpoint that is asked for; whoever asks has looked whether it can be continued."""
    if request is None:
        return None
    from imgrun.checkpoints import manifest, preflight

    return preflight.changed(
        manifest.load(request["path"])._replace(archive=request["archive"]), image=request["image"],
        memory=request["memory"], binds=tuple(request["binds"]), allow=tuple(request["allow"]), lazy=request["lazy"],
    )  # fmt: skip


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    os.chdir("/")
    while os.open("/dev/null", os.O_RDWR) < 3:
        pass  # none of the standard three is to be taken for something else
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    syscalls.close_others([int(sys.argv[1])])
    serve(Channel.from_fd(int(sys.argv[1])))
