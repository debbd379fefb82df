"""Signals by the names people give them (signal(7))."""

from __future__ import annotations

import signal

from imgrun.errors import SpecError


def parse_signal(text: str) -> int:
    """``TERM``, ``SIGTERM``, ``15`` or ``RTMIN+3``. Raises SpecError."""
    name = text.upper().removeprefix("SIG")
    if name.isascii() and name.isdigit() and 0 < int(name) < signal.NSIG:
        return int(name)
    base, plus, offset = name.partition("+")
    if base == "RTMIN" and plus and offset.isascii() and offset.isdigit() and signal.SIGRTMIN + int(offset) <= signal.SIGRTMAX:
        return int(signal.SIGRTMIN) + int(offset)
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        raise SpecError(f"unknown signal {text!r}", "give a name as TERM or a number from 1 to 64") from None


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 35`` where there is no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
