"""Guests' files from Debian packages, kept in ``$IMGRUN_CACHE/vm`` by what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from imgrun.building import mirror
from imgrun.building.tools import Tools

LAYOUT = 2
CACHE = Path(os.environ.get("IMGRUN_CACHE") or Path.home() / ".cache/imgrun-dev") / "vm"
BUILD_SECONDS = 600


class Packages(NamedTuple):
    """Packages of a release. With ``variant`` extract they are only unpacked, for any architecture."""

    release: str
    architecture: str
    variant: str
    include: tuple[str, ...]


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a program to its end; what it printed. A failure is told with its last words."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False, cwd=cwd,
        env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([LAYOUT, *parts], default=str).encode()).hexdigest()[:12]


def cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The file or directory ``name-key`` of the cache; made under another name first when it is not there."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{key}"
    if path.exists():
        os.utime(path)
        return path
    for old in CACHE.glob(f"{name}-????????????"):
        remove(old)
    part = CACHE / f"{name}.part"
    remove(part)
    began = time.monotonic()
    make(part)
    part.rename(path)
    print(f"vm: made {path.name} in {time.monotonic() - began:.0f} s", flush=True)
    return path


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unpacked(packages: Packages, tree: Path) -> Path:
    """Install or unpack the packages into ``tree``."""
    lines = mirror.source_lines(Tools(), "debian", packages.release, ("main",))
    run(
        "mmdebstrap", "--quiet", "--mode=root", "--format=directory", f"--variant={packages.variant}",
        f"--architectures={packages.architecture}", f"--include={','.join(packages.include)}",
        # A mirror that is kept as it was some weeks ago serves as well here.
        '--aptopt=Acquire::Check-Valid-Until "false"', packages.release, tree, *lines,
        env={**mirror.proxy_environment(Tools()), "DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    return tree
