"""Running the programs that an image build needs: found or asked for by package, killed with us, their words kept."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from imgrun.errors import HostError, NoSpace, PrivilegeError

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT_VARIABLES = (
    "HOME", "USER", "LOGNAME", "SOURCE_DATE_EPOCH", "http_proxy", "https_proxy", "ftp_proxy", "no_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
_PACKAGES = {
    "apt-get": "apt", "mkfs.btrfs": "btrfs-progs", "mkfs.erofs": "erofs-utils", "mkfs.xfs": "xfsprogs",
    "mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs", "newuidmap": "uidmap", "rm": "coreutils",
    "cp": "coreutils", "setpriv": "util-linux", "sfdisk": "fdisk", "unshare": "util-linux",
}  # fmt: skip
_KEPT_LINES = 200
_SIGNS = (re.compile(r"^E: "), re.compile(r"\b[Ee]rror\b"), re.compile(r": \S"))
"""What tells a line that says why a program failed, the surest first."""
_IDLE = re.compile(r"^[IW]: |Exiting with failure status|Error is not recoverable")
_LITTLE_SPACE = 4 << 20


class ToolFailed(Exception):
    """A program ended with an error. ``lines`` are the last of what it wrote, stderr before stdout."""

    def __init__(self, program: str, status: int, lines: Sequence[str]) -> None:
        super().__init__(f"{program} ended with status {status}")
        self.program = program
        self.status = status
        self.lines = list(lines)

    @property
    def complete(self) -> bool:
        """Whether ``lines`` are all there were."""
        return len(self.lines) < _KEPT_LINES

    def summary(self) -> str:
        """The line that says most about why, else how it ended."""
        said = [line.strip() for line in self.lines if line.strip() and not _IDLE.search(line)]
        for sign in _SIGNS:
            for number, line in enumerate(said):
                if sign.search(line):
                    more = said[number + 1 : number + 3] if line.endswith(":") else []
                    return " ".join([line, *more]).removeprefix("E: ").lstrip("-* ")[:300]
        if said:
            return said[-1][:300]
        if self.status < 0:
            return f"{self.program} was killed by {signal.Signals(-self.status).name}"
        return str(self)


class Tools:
    """Runs programs for one build.

    ``progress`` is given every line a program writes to stderr that ``interesting`` (see :meth:`run`) turns into
    words for the user; ``debug`` every command and every line.
    """

    def __init__(self, progress: Callable[[str], None] | None = None, debug: Callable[[str], None] | None = None) -> None:
        self.progress: Callable[[str], None] = progress or (lambda line: None)
        self._debug: Callable[[str], None] = debug or (lambda line: None)
        self.root = os.geteuid() == 0
        self.temporary = ""
        self._path = ":".join(filter(None, (os.environ.get("PATH"), _SYSTEM_PATH)))

    def find(self, program: str) -> str:
        """The path of a program. Raises HostError that names its package."""
        path = shutil.which(program, path=self._path)
        if path is None:
            package = _PACKAGES.get(program, program)
            raise HostError(f"the program {program} is not installed", f"install the package {package}")
        return path

    def run(
        self,
        argv: Sequence[str],
        *,
        as_owner: bool = False,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        interesting: Callable[[str], str | None] | None = None,
    ) -> str:
        """Run a program to its end and return what it wrote to stdout.

        It runs in a session of its own and never outlives this call; with ``as_owner``, as the owner of all ids that
        the image's files have. Raises ToolFailed, HostError.
        """
        program = os.path.basename(argv[0])
        self.find(argv[0])
        full = [*(self.as_owner() if as_owner else ()), *argv]
        self._debug(f"+ {shlex.join(full)}")
        with _memory_file() as given, _memory_file() as written:
            given.write(stdin)
            given.seek(0)
            process: subprocess.Popen[bytes] | None = None
            lines: list[str] = []
            try:
                with undisturbed():  # or it would run, and nobody know of it
                    process = subprocess.Popen(
                        full, executable=self.find(full[0]), stdin=given, stdout=written, stderr=subprocess.PIPE,
                        env=self._environment(env or {}), pass_fds=tuple(pass_fds), start_new_session=True,
                    )  # fmt: skip
                assert process.stderr is not None
                lines = self._read_lines(process.stderr, interesting)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            finally:
                status = _end_session(process) if process is not None else 0
            written.seek(0)
            output = written.read().decode(errors="replace")
            if status != 0:
                said = output.splitlines()[-_KEPT_LINES:]
                for line in said:
                    self._debug(line)
                raise ToolFailed(program, status, [*lines, *said])
            return output

    def as_owner(self) -> list[str]:
        """What to put before a command that handles files of every owner.

        For an ordinary user: a user namespace in which the user is root and the subordinate ids are the others.
        """
        return [] if self.root else ["unshare", "--user", "--map-root-user", "--map-auto", "--"]

    def confined(self) -> list[str]:
        """What to put before a command that starts programs of others: whatever those leave running dies with it.

        Its mounts and processes are its own, and end when this process does, however that comes about.
        """
        if not self.root:
            return []
        return [
            "setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "--",
        ]  # fmt: skip

    def require_owner_ids(self) -> None:
        """Raise PrivilegeError when this user has no subordinate ids to build an image with."""
        if self.root:
            return
        for program in ("unshare", "newuidmap"):
            self.find(program)
        try:
            self.run(["true"], as_owner=True)
        except ToolFailed as error:
            raise PrivilegeError(
                f"building an image as an ordinary user needs subordinate ids: {error.summary()}",
                "run it as root, or have an administrator add you to /etc/subuid and /etc/subgid",
            ) from None

    def remove_tree(self, path: str) -> None:
        """Remove a directory that may hold files of every owner. Raises HostError."""
        try:
            self.run(["rm", "-rf", "--one-file-system", "--", path], as_owner=True)
        except ToolFailed as error:
            raise HostError(f"{path} could not be removed: {error.summary()}", "remove it by hand") from None

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        temporary = {"TMPDIR": self.temporary} if self.temporary else {}
        return {**kept, "PATH": self._path, "LC_ALL": "C.UTF-8", "TERM": "dumb", **temporary, **more}

    def _read_lines(self, stream: IO[bytes], interesting: Callable[[str], str | None] | None) -> list[str]:
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        while raw := stream.readline(1 << 16):
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            self._debug(line)
            words = interesting(line) if interesting else None
            if words:
                self.progress(words)
        return list(lines)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that Python handles are kept until the end of it, and handled then."""
    if threading.current_thread() is not threading.main_thread():
        yield  # they are not for this one
        return
    came: list[int] = []
    found = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            before[late](late, None)


def _memory_file() -> IO[bytes]:
    """A file for the streams of a program; unlike a pipe it blocks nobody, and no disk can be too full for it."""
    return open(os.memfd_create("imgrun", os.MFD_CLOEXEC), "w+b", buffering=0)


def _end_session(process: subprocess.Popen[bytes]) -> int:
    """Kill what is left of the session that ``process`` leads, and return how ``process`` ended."""
    # The leader is not reaped yet, so its number is still its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stderr is not None:
        process.stderr.close()
    return process.wait()


def no_space(error: ToolFailed, *places: str) -> NoSpace | None:
    """The NoSpace behind a failed program that wrote to the directories ``places``, if that is why it failed."""
    for place in places:
        if is_full(place):
            return no_space_in(place)
    if any("No space left on device" in line or "Disk quota exceeded" in line for line in error.lines):
        return no_space_in(places[0])
    return None


def is_full(place: str) -> bool:
    """Whether the file system of ``place`` has next to nothing left."""
    free = os.statvfs(place)
    return free.f_bavail * free.f_frsize < _LITTLE_SPACE or (free.f_files > 0 and free.f_favail == 0)


def no_space_in(place: str) -> NoSpace:
    """The NoSpace for the file system that holds ``place``."""
    return NoSpace(f"no space left on the file system of {place}", "free some, or choose another place")
