"""The shim: where it is, how it is called, and what it reports (imgrun/native/init.c is the program).

The supervisor binds the program read-only at ``SHIM`` in the job and reads the status records from a pipe whose other
end it hands down. The process that executes the shim blocks all signals before it exists (so that none is lost while
it is set up), sets its parent-death signal, and gives ``arguments(...)`` and the command's environment to ``execve``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from imgrun import native
from imgrun.errors import CommandNotExecutable, CommandNotFound, HostError, ImgrunError, SpecError, StartError
from imgrun.isolation.limits import Rlimit

SHIM = "/dev/imgrun/init"
PROTOCOL = 1
"""Of :func:`arguments` and the status records. A checkpoint has the shim that it was made with, and says which this was."""
NAME = "imgrun-init"
REAPER_NAME = "imgrun-reaper"

_LONGEST_RECORD = 63
_RLIM_INFINITY = 2**64 - 1
_NOT_FOUND = ("ENOENT", "ENOTDIR", "ENAMETOOLONG", "ELOOP")


class Started(NamedTuple):
    """The command runs. ``reaper`` is the root of the job's tree, as a pid inside the job; 0 when there is no shim."""

    reaper: int


class StepFailed(NamedTuple):
    """Nothing was started: ``step`` failed with ``errno``."""

    step: str
    errno: int


class Exited(NamedTuple):
    """The command exited with ``code``, 0 to 255."""

    code: int


class Signaled(NamedTuple):
    """The command was killed by ``signal``."""

    signal: int


Record = Started | StepFailed | Exited | Signaled


def program() -> str:
    """The path of the shim on the host.

    Raises HostError when this installation has none that can be executed.
    """
    path = os.path.join(os.path.dirname(os.path.abspath(native.__file__)), NAME)
    if not os.path.isfile(path):
        raise HostError(
            f"imgrun's own init program is missing: {path}",
            "reinstall imgrun, with a C compiler at hand when it is installed from source",
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise HostError(
            f"imgrun's own init program cannot be executed: {path}",
            f"make it readable and executable for all: chmod 755 {path}",
        )
    return path


def arguments(
    command: Sequence[str],
    *,
    status_fd: int,
    role: Literal["init", "adopt", "exec"] = "init",
    uid: int = 0,
    gid: int = 0,
    groups: Iterable[int] | None = (),
    cwd: str = "/",
    tty: bool = False,
    rlimits: Iterable[Rlimit] = (),
) -> list[str]:
    """The argument vector that makes the shim run ``command`` (name first, searched in the environment's PATH).

    ``role`` "init" stays as PID 1 with a reaper below it; "adopt" waits for a reaper that CRIU
    restores; "exec" is replaced by the command. ``groups`` None keeps the
    caller's supplementary groups, for a user namespace that may not set them. ``tty`` makes standard input the
    controlling terminal. ``cwd`` is entered as the user.
    """
    if not command:
        raise SpecError("there is no command to run", "give one after the image")
    return [
        NAME,
        role,
        str(status_fd),
        str(uid),
        str(gid),
        "-" if groups is None else ",".join(map(str, groups)),
        ",".join(f"{limit.resource}:{_kernel_value(limit.soft)}:{_kernel_value(limit.hard)}" for limit in rlimits),
        "1" if tty else "0",
        cwd,
        *command,
    ]


def _kernel_value(limit: int | None) -> int:
    return _RLIM_INFINITY if limit is None else limit


class StatusReader:
    """Turns the bytes of the status pipe into records."""

    __slots__ = ("_rest", "_role", "_state")

    def __init__(self, role: Literal["init", "exec"] = "init") -> None:
        self._role = role
        self._rest = b""
        self._state: Literal["new", "started", "ended"] = "new"

    def feed(self, data: bytes) -> list[Record]:
        """The records that ``data`` completes; ``b""`` says that the pipe has ended.

        In the role "exec" the end without a record means that the command runs. In the role "init" an end before the
        last record gives no record: the shim was killed, and its wait status says by what.

        Raises StartError when the bytes are not what the shim writes.
        """
        if not data:
            if self._role == "exec" and self._state == "new" and not self._rest:
                self._state = "ended"
                return [Started(0)]
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_RECORD:
            raise _garbled(self._rest)
        return [self._record(line) for line in lines]

    def _record(self, line: bytes) -> Record:
        match self._state, line.split(b" "):
            case "new", [b"started", pid] if pid.isdigit():
                self._state = "started"
                return Started(int(pid))
            case "new", [b"error", step, errno] if errno.isdigit():
                self._state = "ended"
                return StepFailed(step.decode("ascii", "replace"), int(errno))
            case "started", [b"exit", code] if code.isdigit() and int(code) < 256:
                self._state = "ended"
                return Exited(int(code))
            case "started", [b"signal", signal] if signal.isdigit() and 0 < int(signal) < 65:
                self._state = "ended"
                return Signaled(int(signal))
        raise _garbled(line)


def _garbled(line: bytes) -> StartError:
    return StartError(
        f"the shim reported something unknown: {line[:_LONGEST_RECORD]!r}",
        "reinstall imgrun: its init program and its Python modules may be of different versions",
    )


def not_executed(e: OSError, doing: str) -> ImgrunError:
    """What it means that execve(2) of the shim, or a step of ``doing`` before it, failed in the process that becomes it."""
    import errno

    if e.errno == errno.E2BIG:
        return CommandNotExecutable("the command's arguments and environment are too long", "pass them in a file")
    return StartError(f"{doing} failed: {e}", "run again with --debug for the details")


def failure(record: StepFailed, command: Sequence[str], *, cwd: str = "/", user: str = "") -> ImgrunError:
    """What ``record`` means for the user who asked for ``command`` in ``cwd`` as ``user``."""
    import errno

    name = command[0]
    code = errno.errorcode.get(record.errno, str(record.errno))
    reason = os.strerror(record.errno)
    match record.step:
        case "exec" if code in _NOT_FOUND:
            if "/" in name:
                return CommandNotFound(f"no such command in the image: {name}", "check the path inside the image")
            hint = "give its full path, or set PATH with --env PATH=..."
            if name.startswith("-"):
                hint = "what follows the image or job is the command: options of imgrun's stand before it"
            return CommandNotFound(f"command not found in the image: {name!r}", hint)
        case "exec" if code == "EACCES":
            return CommandNotExecutable(
                f"permission denied: {name} in the image is not executable",
                "set its execute permission (also on the directories above it), or name its interpreter first",
            )
        case "exec" if code == "ENOEXEC":
            return CommandNotExecutable(
                f"{name} in the image is not a program for this machine ({os.uname().machine})",
                "use an image and a program built for this processor",
            )
        case "exec" if code == "E2BIG":
            return CommandNotExecutable(f"the arguments and environment of {name} are too long", "pass them in a file")
        case "interpreter":
            return CommandNotExecutable(
                f"{name} exists in the image, but the interpreter or loader it asks for does not",
                "check its first line (#!), or install the libraries of its architecture in the image",
            )
        case "shell":
            return CommandNotExecutable(
                f"{name} is a script without a #! line, and the image's /bin/sh cannot run it: {reason}",
                "begin the script with #! and the path of its interpreter",
            )
        case "exec":
            return CommandNotExecutable(f"cannot execute {name} in the image: {reason}")
        case "cwd":
            return StartError(
                f"cannot enter the working directory {cwd}: {reason}",
                "choose one that exists in the image and that the user may enter: --workdir DIR",
            )
        case "groups" | "gid" | "uid":
            return StartError(
                f"cannot become the user {user or 'asked for'}: {reason}",
                "its user and group ids must be among those of the job's user namespace",
            )
        case "rlimit":
            return StartError(f"cannot set a resource limit of the command: {reason}", "check the --rlimit options")
        case "tty":
            return StartError(f"cannot give the command a controlling terminal: {reason}")
        case "fork":
            return StartError(
                f"the job's first processes cannot be made: {reason}", "a limit on processes is too low (--pids)"
            )
        case step:
            return StartError(f"the shim failed at its step {step!r}: {reason}")
