"""The real command as a process, for the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

COMMAND = (sys.executable, "-m", "imgrun.cli")
PATIENCE = 60.0
"""Seconds after which what should have happened has not."""


class Done(NamedTuple):
    """How a command ended: its exit status (negative for a signal), and what it printed."""

    status: int
    stdout: str
    stderr: str


class Imgrun:
    """Runs imgrun, with one image at hand. Processes that :meth:`popen` leaves are killed by :meth:`close`."""

    def __init__(self, image: Path | None) -> None:
        self.image = str(image)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(
        self,
        *words: str | Path,
        stdin: str | bytes | None = None,
        timeout: float = PATIENCE,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> Done:
        """``imgrun WORDS`` to its end. Its input is empty unless given."""
        if isinstance(stdin, str):
            stdin = stdin.encode()
        process = self.popen(*words, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, env=env, **options)
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"imgrun {words}: no end in {timeout} s: {stdout!r} {stderr!r}") from None
        return Done(process.returncode, text(stdout), text(stderr))

    def popen(self, *words: str | Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """``imgrun WORDS`` with its streams as pipes, unless told otherwise."""
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        streams["bufsize"] = 0  # what readline() had read ahead, communicate() would not return
        process = subprocess.Popen([*COMMAND, *map(str, words)], env={**os.environ, **(env or {})}, **{**streams, **options})
        self._processes.append(process)
        return process

    def start(self, *words: str | Path, **options: Any) -> Done:
        """``imgrun start`` with ``words``: options, then the command after ``--``, and the image put in between."""
        return self("start", *self._with_image(words), **options)

    def sh(self, script: str, *flags: str | Path, **options: Any) -> Done:
        """A script in a job in the foreground."""
        return self("start", *flags, self.image, "--", "sh", "-c", script, **options)

    def background(self, script: str, *flags: str | Path, **options: Any) -> str:
        """A script in a background job; its id."""
        done = self("start", "--detach", *flags, self.image, "--", "sh", "-c", script, **options)
        assert done.status == 0, done
        assert done.stderr == "", done
        return done.stdout.strip()

    def foreground(self, script: str, *flags: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """A script in a foreground job that goes on while the test does."""
        return self.popen("start", *flags, self.image, "--", "sh", "-c", script, **options)

    def _with_image(self, words: tuple[str | Path, ...]) -> list[str | Path]:
        place = words.index("--")
        return [*words[:place], self.image, *words[place:]]

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None and not stream.closed:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass


def text(data: bytes | None) -> str:
    return (data or b"").decode(errors="surrogateescape")


def refused(done: Done, status: int, *words: str, hint: bool = True) -> None:
    """See that imgrun refused as it should: one line that says what is wrong, one that says what to do."""
    assert done.status == status, done
    lines = done.stderr.splitlines()
    assert lines, done
    assert lines[0].startswith("imgrun: "), done
    assert len(lines) == (2 if hint else 1), done
    assert all(line.startswith("  ") and line.strip() for line in lines[1:]), done
    for word in words:
        assert word in lines[0], done


def expect(process: subprocess.Popen[bytes], line: str) -> None:
    """Read the process's output up to this line, which must come."""
    assert process.stdout is not None
    seen = []
    while data := process.stdout.readline():
        seen.append(text(data).rstrip("\r\n"))
        if seen[-1] == line:
            return
    raise AssertionError(f"{line!r} did not come, but {seen}; {process.stderr and process.stderr.read()!r}")


def eventually(condition: Callable[[], Any], what: str = "", timeout: float = PATIENCE) -> Any:
    """Wait until ``condition`` gives something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not happen in {timeout} s: {what or condition}"
        time.sleep(0.005)
    return found


def kill(pid: int, signum: int = signal.SIGKILL) -> bool:
    """Send a signal; whether there was somebody to get it."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True
