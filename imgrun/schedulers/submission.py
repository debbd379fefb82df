"""What submitting to any scheduler shares: how imgrun is called there, and how its use is told in a line."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from imgrun.errors import ImgrunError
from imgrun.units import format_size

if TYPE_CHECKING:
    from imgrun.result import Result


def command() -> str:
    """This imgrun, as a shell understands it."""
    program = os.path.abspath(sys.argv[0])
    if os.path.basename(program) == "imgrun" and os.access(program, os.X_OK):
        return shlex.quote(program)
    return f"{shlex.quote(sys.executable)} -m imgrun.cli"


def with_options(text: str, lines: Iterable[str], last: str) -> str:
    """The text with more lines, before the last one that begins with ``last``."""
    head, found, tail = text.rpartition(f"\n{last}")
    assert found
    return "\n".join((head, *lines)) + found + tail


def submit(words: list[str], text: str, program: str) -> str:
    """Give the text to a scheduler's program on its standard input; what it answers. Raises ImgrunError."""
    import subprocess

    try:
        done = subprocess.run(words, input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise ImgrunError(f"{program} is not here", "submit where the scheduler is, or use --dry-run") from None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise ImgrunError(f"{program} refused: {said[-1] if said else f'exit status {done.returncode}'}", "see --dry-run")
    return done.stdout.decode(errors="replace").strip()


def usage_line(result: Result) -> str:
    """How the job ended and what it used, in a line without quotes."""
    usage = result.usage
    words = [f"{result.reason} {result.exit_status}"]
    if usage.wall_seconds is not None:
        words.append(f"wall {usage.wall_seconds:.0f} s")
    if usage.user_seconds is not None and usage.system_seconds is not None:
        words.append(f"cpu {usage.user_seconds + usage.system_seconds:.1f} s")
    if usage.memory_peak is not None:
        words.append(f"memory {format_size(usage.memory_peak)}")
    if usage.read_bytes is not None and usage.written_bytes is not None:
        words.append(f"read {format_size(usage.read_bytes)}, written {format_size(usage.written_bytes)}")
    counts = usage.counts or {}
    if (instructions := counts.get("instructions")) is not None:
        words.append(f"instructions {instructions}")
    return ", ".join(words)
