"""The job's and the machine's ClassAd as HTCondor's starter leaves them beside a job: a line ``Name = value`` for each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

Value = int | float | str | bool

ESCAPE = re.compile(r'\\(["\\nt])')
PLAIN = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}


class Ad:
    """What an ad says literally; attributes that are expressions, undefined or absent are None. Names have no case."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = {name.lower(): value for name, value in values.items()}

    def integer(self, name: str) -> int | None:
        """A number, without its fraction."""
        value = self._values.get(name.lower())
        return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def text(self, name: str) -> str | None:
        value = self._values.get(name.lower())
        return value if isinstance(value, str) else None


def read(path: str | None) -> Ad:
    """The ad in this file; an empty one when there is none, as outside of HTCondor."""
    if not path:
        return Ad({})
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return parse(f.read())
    except OSError:
        return Ad({})


def parse(text: str) -> Ad:
    """An ad in its long form (the "old ClassAd" syntax of condor_q -long)."""
    values: dict[str, Value] = {}
    for line in text.splitlines():
        name, equals, written = line.partition("=")
        value = literal(written.strip()) if equals else None
        if value is not None:
            values[name.strip()] = value
    return Ad(values)


def literal(written: str) -> Value | None:
    """The value of a literal; None for an expression."""
    if written.lower() in ("true", "false"):
        return written.lower() == "true"
    if len(written) > 1 and written[0] == written[-1] == '"' and not re.search(r'(?<!\\)(?:\\\\)*"', written[1:-1]):
        return ESCAPE.sub(lambda found: PLAIN[found[1]], written[1:-1])
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            pass
    return None


def environment_names(written: str) -> list[str]:
    """The variables of an ad's Environment: words ``NAME=value``, where single quotes keep white space together."""
    words = re.findall(r"(?:[^\s']|'(?:[^']|'')*')+", written)
    return [word.partition("=")[0] for word in words if "=" in word]


def of_job() -> Ad:
    """The ad of the job that we are."""
    return read(os.environ.get("_CONDOR_JOB_AD"))


def of_machine() -> Ad:
    """The ad of the slot that we run in."""
    return read(os.environ.get("_CONDOR_MACHINE_AD"))
