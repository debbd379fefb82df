"""Where it is measured: one root in several forms, kept in the cache, and a directory for what comes and goes.

The root is a small Debian with a compiler (image.toml), or what the cache has of Debian images, or busybox. Its forms have
the same files: an ext4 image, that image's files in a directory, and a squashfs of those.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from glob import glob
from types import TracebackType

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.dirname(os.path.abspath(__file__))


class CannotMeasure(Exception):
    """The host lacks something without which there is nothing to measure."""


class Place:
    """A context manager: the forms of the root, and ``directory``, which is gone with everything in it at the end.

    ``short`` is another such directory, for programs that refuse long paths.
    """

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick
        self.cache = os.path.join(_cache(), "bench")
        self.image = self.tree = self.squashfs = self.directory = self.short = ""
        self.imgrun = _command()

    @property
    def state(self) -> str:
        return f"{self.directory}/state"

    def __enter__(self) -> Place:
        if os.geteuid() != 0:
            raise CannotMeasure("the benchmarks need root: peers, and mounting an image without FUSE, do")
        os.makedirs(self.cache, exist_ok=True)
        # Users do not compile Python at every start, and nor do those who develop it and leave no bytecode behind.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        self._make_roots()
        self.directory = tempfile.mkdtemp(prefix="run-", dir=self.cache)
        self.short = tempfile.mkdtemp(prefix="ib-", dir="/tmp")
        os.environ["IMGRUN_STATE_DIR"] = self.state
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove_jobs()
        shutil.rmtree(self.short)
        shutil.rmtree(self.directory)

    def remove_jobs(self) -> None:
        """End and forget all jobs of this run, whatever state they are in."""
        from imgrun import ImgrunError, Job

        for job in Job.all():
            try:
                job.remove(force=True)
            except ImgrunError as e:
                print(f"bench: {e}", file=sys.stderr)

    def copy_image(self, name: str) -> str:
        """A copy of the ext4 image that may be written to, its holes kept."""
        target = f"{self.directory}/{name}"
        _copy(self.image, target)
        return target

    def has(self, path: str) -> bool:
        """Whether the root has this file."""
        return os.path.lexists(self.tree + path)

    # -- the root ---------------------------------------------------------------------------------------------------------

    def _make_roots(self) -> None:
        image = self.built("image.toml", f"{HERE}/image.toml") or self._cached_debian()
        image = image or self.built("busybox.toml", f"{REPOSITORY}/images/busybox.toml")
        if image is None:
            raise CannotMeasure("no image could be built, see above")
        self.image = image
        self.tree = once(image.removesuffix(".img") + ".tree", lambda path: self.unpack(image, path))
        if shutil.which("mksquashfs"):
            self.squashfs = once(image.removesuffix(".img") + ".squashfs", lambda path: self.squash(self.tree, path))

    def built(self, name: str, recipe: str) -> str | None:
        """The image that a recipe makes, made now if the recipe changed; None when it cannot be made."""
        with open(recipe, "rb") as f:
            key = hashlib.sha256(f.read()).hexdigest()[:12]
        path = f"{self.cache}/{name.removesuffix('.toml')}-{key}.img"
        if not os.path.exists(path):
            print(f"bench: building {path}, once", file=sys.stderr)
            environment = {**os.environ, "IMGRUN_CACHE": _cache()}
            done = subprocess.run([*self.imgrun, "image", "build", recipe, path], env=environment, check=False)
            if done.returncode != 0:
                return None
        return path

    def _cached_debian(self) -> str | None:
        found = sorted(glob(f"{_cache()}/images/debian-*.img"))
        return once(f"{self.cache}/debian.img", lambda path: _copy(found[-1], path)) if found else None

    def unpack(self, image: str, target: str) -> None:
        """Copy all files of an image into a new directory."""
        from imgrun.image import open_image

        os.mkdir(target)
        with open_image(image, "read-only") as held:
            # Never in the mount table: what is reached through the descriptor goes with it.
            root = held.mount()
            try:
                source = f"/proc/self/fd/{root}/."
                subprocess.run(["cp", "--archive", "--", source, target], pass_fds=[root], check=True)
            finally:
                os.close(root)

    def squash(self, tree: str, target: str) -> None:
        command = ["mksquashfs", tree, target, "-noappend", "-quiet", "-no-progress", "-comp", "zstd"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def once(path: str, make: Callable[[str], object]) -> str:
    """The path, made under another name and renamed unless it is there."""
    if not os.path.exists(path):
        unfinished = f"{path}.{os.getpid()}"
        make(unfinished)
        os.rename(unfinished, path)
    return path


def _copy(source: str, target: str) -> None:
    subprocess.run(["cp", "--sparse=always", "--", source, target], check=True)


def _cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("IMGRUN_CACHE") or os.path.join(home, "imgrun-dev")


def _command() -> tuple[str, ...]:
    script = os.path.join(os.path.dirname(sys.executable), "imgrun")
    return (script,) if os.path.exists(script) else (sys.executable, "-m", "imgrun.cli")
