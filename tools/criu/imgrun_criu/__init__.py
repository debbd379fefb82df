"""CRIU, its libraries and its dynamic loader in one directory that runs wherever it is put.

Run it as ``DIR/ld.so --library-path DIR DIR/criu ...``. The directory can be attached inside a job,
whose own root file system need not have any of these.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any


def path() -> str:
    """The directory with ``criu``, ``ld.so`` and the libraries."""
    return str(Path(__file__).parent / "toolbox")


def command() -> list[str]:
    """The words that start this CRIU where it lies."""
    return [f"{path()}/ld.so", "--library-path", path(), f"{path()}/criu"]


@cache
def build() -> dict[str, Any]:
    """What this CRIU was made from: ``version``, ``patches``, ``patches_id``, ``source``, ``sha256``, ``arch``."""
    record: dict[str, Any] = json.loads((Path(__file__).parent / "build.json").read_text())
    return record


def __getattr__(name: str) -> str:
    if name == "VERSION":
        return str(build()["version"])
    raise AttributeError(name)
