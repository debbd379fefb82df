"""Rooms: a root with the work program (work.c) waiting in it, so that file work is timed without what a start costs."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Callable
from typing import Any

from bench.harness import Unavailable
from bench.place import HERE, Place

PATIENCE = 300.0
"""Seconds for one command."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Room:
    """One running work program. A context manager: it ends with the block."""

    def __init__(self, words: int, answers: int, end: Callable[[], object]) -> None:
        self._words = words
        self._answers = answers
        self._end = end
        self._rest = b""

    def ask(self, *words: object) -> float:
        """Have a command of work.c done; the seconds it took. Raises Unavailable with what went wrong."""
        os.write(self._words, (" ".join(map(str, words)) + "\n").encode())
        while b"\n" not in self._rest:
            if not select.select([self._answers], [], [], PATIENCE)[0]:
                raise Unavailable(f"no answer to {words[0]!r} within {PATIENCE:.0f} s")
            data = os.read(self._answers, 65536)
            if not data:
                raise Unavailable(f"the work program ended during {words[0]!r}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        verdict, _, value = line.decode(errors="replace").partition(" ")
        if verdict != "ok":
            raise Unavailable(value)
        return float(value)

    def close(self) -> None:
        os.close(self._words)
        self._end()
        os.close(self._answers)

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def build_program(place: Place) -> str:
    """The work program, static, so that it runs in any root. Raises Unavailable."""
    program = f"{place.directory}/work"
    if not os.path.exists(program):
        command = ["gcc", "-O2", "-static", "-o", program, f"{HERE}/work.c"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Unavailable("the work program needs gcc") from None
        if done.returncode != 0:
            raise Unavailable(f"the work program cannot be built: {done.stderr.strip()[:200]}")
    return program


def in_directory(place: Place, directory: str, *, enter: bool) -> Room:
    """A plain process of the host: chrooted to ``directory``, or only working there."""
    words, ours = os.pipe()
    answers, theirs = os.pipe()
    command = [build_program(place), *([directory] if enter else [])]
    process = subprocess.Popen(command, stdin=words, stdout=theirs, cwd=directory, env={"PATH": PATH})
    os.close(words)
    os.close(theirs)
    return Room(ours, answers, process.wait)


def in_job(place: Place, image: str, **spec: Any) -> Room:
    """A job of the library on ``image``. Raises Unavailable when it cannot be started."""
    from imgrun import ImgrunError, Job, JobSpec, Mount

    words, ours = os.pipe()
    answers, theirs = os.pipe()
    program = Mount("bind", "/imgrun-bench-work", build_program(place), ro=True)
    try:
        job = Job.start(
            JobSpec(image=image, command=("/imgrun-bench-work",), mounts=(program,), **spec), stdin=words, stdout=theirs
        )
    except ImgrunError as e:
        os.close(ours)
        os.close(answers)
        raise Unavailable(str(e)) from e
    finally:
        os.close(words)
        os.close(theirs)

    def end() -> None:
        job.wait(timeout=60)
        job.remove()

    return Room(ours, answers, end)


def forget_cached(level: int = 1) -> None:
    """Have all that is written reach the disk, and the kernel forget what it keeps of files: 1 contents, 3 names as well."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
        f.write(str(level))
