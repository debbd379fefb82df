"""What Slurm's controller says and does, by scontrol(1). It can be missed: where it does not work, there is no answer."""

from __future__ import annotations

import re
import subprocess

from imgrun.helper import find_program

PATIENCE = 5.0
"""Seconds for an answer that can be missed."""
LONG_PATIENCE = 30.0
"""Seconds for one on which the job's future depends."""
FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z:/]*)=")


def scontrol(*words: str, patience: float = PATIENCE) -> str | None:
    """The output of scontrol; None when it fails, as where it is not installed or the controller does not answer."""
    program = find_program("scontrol")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=patience, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def run(*words: str, patience: float = PATIENCE) -> bool:
    """Do something; whether it was done."""
    return scontrol(*words, patience=patience) is not None


def config(patience: float = PATIENCE) -> dict[str, str]:
    """The controller's configuration."""
    pairs = (line.partition("=") for line in (scontrol("show", "config", patience=patience) or "").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def show(kind: str, name: str) -> dict[str, str]:
    """The record of a job or a partition. Values may have blanks: each goes up to the next key."""
    text = (scontrol("--oneliner", "show", kind, name) or "").strip() if name else ""
    parts = FIELD.split(text)
    return dict(zip(parts[1::2], (value.strip() for value in parts[2::2]), strict=True))


def seconds(text: str | None) -> float | None:
    """``30``, ``30 sec``; None for anything else, such as UNLIMITED."""
    word = (text or "").split(" ")[0]
    return float(word) if word.isascii() and word.isdigit() else None


def numbers(text: str | None) -> set[int]:
    """``85,90-92`` as RequeueExit has it."""
    found: set[int] = set()
    for part in (text or "").split(","):
        first, _, last = part.partition("-")
        if first.isascii() and first.isdigit():
            found.update(range(int(first), (int(last) if last.isdigit() else int(first)) + 1))
    return found
