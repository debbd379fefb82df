"""Sizes, durations and lists of CPUs as people write them.

Each parser takes the text and ``what`` it stands for (an option's name, for the message), and raises SpecError.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from imgrun.errors import SpecError

_SIZES: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", 1):
    _SIZES |= dict.fromkeys((_letter, _letter + "b", _letter + "ib"), 1 << 10 * _power)
_MAX_SIZE = 2**63 - 1
# 8192 is the largest NR_CPUS that the kernel can be configured with.
MAX_CPU = 8191
_SECONDS = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0, "sec": 1.0, "ms": 0.001}
# The kernel's time limits and Python's clocks are safe with this; nobody means more than a thousand years.
_MAX_SECONDS = 1000 * 366 * 86400.0


def parse_size(text: str, what: str = "size") -> int:
    """Bytes: "4096", "512M", "1.5GiB". Units are powers of 1024 and in either case, with or without "B" or "iB"."""
    number, unit = _leading_number(text)
    if not number:
        _refuse(what, text, "a size", "write a number of bytes, or a number with K, M, G or T, as in 512M")
    scale = _SIZES.get(unit.lower())
    if scale is None:
        _refuse(what, text, "a size", f"the unit {unit[:20]!r} is not one of K, M, G, T, P, E")
    whole, _, part = number.partition(".")
    if scale == 1 and part.strip("0"):
        _refuse(what, text, "a size", "there is no part of a byte; did you forget the unit?")
    size = int(whole + part) * scale // int("1" + "0" * len(part))
    if size > _MAX_SIZE:
        raise SpecError(f"{what}: {text} is too large", "sizes end below 8E")
    return size


def format_size(size: int) -> str:
    """``size`` bytes as people read them: "16 MiB", "1.5 GiB", "300 KiB", "12 B"."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1023.5:
            break
        value, unit = value / 1024, larger
    shown = f"{value:.1f}".removesuffix(".0") if value < 99.95 else f"{value:.0f}"
    return f"{shown} {unit}"


def parse_duration(text: str, what: str = "duration") -> float:
    """Seconds: "90", "1.5h", "1h30m", "2d", "500ms". Units are w d h m s ms, largest first, each at most once."""
    hint = "write seconds, or numbers with w, d, h, m, s, ms, as in 90, 10m, 1h30m, 2d"
    rest, seconds, smallest = text, 0.0, float("inf")
    while rest or rest is text:
        number, rest = _leading_number(rest)
        if not number:
            _refuse(what, text, "a duration", hint)
        end = 0
        while rest[end : end + 1].isalpha():
            end += 1
        unit, rest = rest[:end].lower(), rest[end:]
        if not unit and (rest or smallest <= _SECONDS["w"]):
            _refuse(what, text, "a duration", f"the number {number} has no unit; {hint}")
        scale = _SECONDS.get(unit or "s")
        if scale is None:
            _refuse(what, text, "a duration", f"the unit {unit[:20]!r} is unknown; {hint}")
        if scale >= smallest:
            _refuse(what, text, "a duration", f"units go from the largest to the smallest, each once; {hint}")
        smallest = scale
        seconds += float(number) * scale
    if seconds > _MAX_SECONDS:
        raise SpecError(f"{what}: {text} is too long", "leave the limit out if there is none")
    return seconds


def parse_cpu_list(text: str, what: str = "cpu list") -> list[int]:
    """CPU numbers, sorted and each once: "0", "0-3,8". As in cpuset(7), "List format"."""
    hint = "write numbers and ranges with commas, as in 0-3,8"
    cpus: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            _refuse(what, text, "a list of CPUs", hint)
        low, high = int(first), int(last) if dash else int(first)
        if high > MAX_CPU:
            raise SpecError(f"{what}: there is no CPU {high}", f"CPU numbers end at {MAX_CPU}")
        if low > high:
            _refuse(what, text, "a list of CPUs", f"the range {item} runs backwards")
        cpus.update(range(low, high + 1))
    return sorted(cpus)


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The shortest text that ``parse_cpu_list`` reads as ``cpus``; empty for none."""
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _leading_number(text: str) -> tuple[str, str]:
    """Split ``text`` after the decimal number it begins with; that is empty if it does not begin with one."""
    end = 0
    while end < len(text) and text[end] in "0123456789.":
        end += 1
    number = text[:end]
    if number.count(".") > 1 or number[:1] in ("", ".") or number.endswith(".") or end > 40:
        return "", text
    return number, text[end:]


def _refuse(what: str, text: str, kind: str, hint: str) -> NoReturn:
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise SpecError(f"{what}: {shown!r} is not {kind}", hint)
