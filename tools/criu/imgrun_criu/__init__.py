"""CRIU, its libraries and its dynamic loader in one directory that runs wherever it is put.

Run it as ``DIR/ld.so --library-path DIR DIR/criu ...``. The directory can be attached inside a job,
whose own root file system need not have any of these.
"""

import json
import os
from functools import cache
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def path() -> str:
    """The directory with ``criu``, ``ld.so`` and the libraries."""
    return f"{HERE}/toolbox"


def command() -> list[str]:
    """The words that start this CRIU where it lies."""
    return [f"{path()}/ld.so", "--library-path", path(), f"{path()}/criu"]


@cache
def build() -> dict[str, Any]:
    """What this CRIU was made from: ``version``, ``patches``, ``patches_id``, ``source``, ``sha256``, ``arch``."""
    with open(f"{HERE}/build.json", encoding="utf-8") as f:
        record: dict[str, Any] = json.load(f)
    return record


def __getattr__(name: str) -> str:
    if name == "VERSION":
        return str(build()["version"])
    raise AttributeError(name)
