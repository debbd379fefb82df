"""Building an image from a recipe: content, last touches, file system, partition table, and then its name.

The image is made in a hidden directory beside its final name and gets that name when it is complete. Whatever ends a
build before that, nothing of it stays; only a SIGKILL leaves directories, which the next build there removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imgrun.building import base, cache, mirror, mkfs, partitioned, tree
from imgrun.building.recipe import Recipe
from imgrun.building.tools import ToolFailed, Tools, no_space, no_space_in
from imgrun.building.workdir import temporary_place, workdir
from imgrun.errors import HostError, ImageBusy, PrivilegeError, SpecError
from imgrun.storage import guest, lock

_MAKERS = {"xfs": "mkfs.xfs", "btrfs": "mkfs.btrfs", "squashfs": "mksquashfs", "erofs": "mkfs.erofs"}
_CACHED = ("debian", "ubuntu", "fedora")


class Built(NamedTuple):
    """A finished image. Sizes in bytes: of the file, on the disk, and of what it holds; ``seconds`` the build took.

    ``cached`` tells whether the packages came from the cache; None for a source without packages.
    """

    path: str
    format: str
    table: str
    size: int
    allocated: int
    content: int
    cached: bool | None
    seconds: float


def build(
    recipe: Recipe,
    out: str,
    *,
    force: bool = False,
    use_cache: bool = True,
    progress: Callable[[str], None] | None = None,
    debug: Callable[[str], None] | None = None,
) -> Built:
    """Make the image file ``out`` from ``recipe``.

    An existing ``out`` is replaced only with ``force``, and never while a job uses it. Without ``use_cache`` packages
    are fetched anew. ``progress`` is given a line of text at each step, ``debug`` all that the programs say.
    Raises SpecError, HostError and its kinds, ImageBusy; and KeyboardInterrupt passes through, with nothing left.
    """
    started = time.monotonic()
    tools = Tools(progress, debug)
    mkfs.source_date()
    out = os.path.realpath(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(tools))
        stack.enter_context(_reserved(out, force))
        _require_programs(recipe, tools)
        tools.require_owner_ids()
        name = os.path.basename(out)
        place = stack.enter_context(workdir(tools, os.path.dirname(out), f".{name[:200]}.imgrun-", 0o700))
        # Others may pass through, as apt's downloader has a user of its own; each thing below has its own mode.
        scratch = stack.enter_context(workdir(tools, temporary_place(), "imgrun-build-", 0o711))
        tools.temporary = scratch
        private = os.path.join(scratch, "private")
        content_tree = os.path.join(private, "tree")
        os.mkdir(private, 0o700)
        os.mkdir(content_tree, 0o755)
        cached = _fill(recipe, tools, content_tree, scratch, fresh=not use_cache)
        content = _finish(recipe, tools, content_tree)
        image = _make_image(recipe, tools, content, place)
        status = _complete(image, out, force=force, sparse=recipe.image.sparse)
    return Built(
        path=out,
        format=recipe.image.format,
        table=recipe.image.table,
        size=status.st_size,
        allocated=status.st_blocks * 512,
        content=content.bytes,
        cached=cached,
        seconds=round(time.monotonic() - started, 3),
    )


@contextlib.contextmanager
def _explained(tools: Tools) -> Iterator[None]:
    """Turn what the operating system refuses outside of any program into one line."""
    try:
        yield
    except OSError as error:
        path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else tools.temporary
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space_in(path) from None
        raise HostError(f"{path or 'the build'}: {error.strerror or error}", "--debug shows where it happened") from error


@contextlib.contextmanager
def _reserved(out: str, force: bool) -> Iterator[None]:
    """Refuse a target that cannot be written or replaced; hold an existing one so that no job starts from it."""
    try:
        is_file = stat.S_ISREG(os.stat(out).st_mode)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(out)):
            raise SpecError(f"{out}: there is no directory {os.path.dirname(out)}", "make it first") from None
        yield
        return
    except OSError as error:
        raise HostError(f"{out} cannot be written: {error.strerror}", "choose another name") from None
    if not is_file:
        raise SpecError(f"{out} exists and is not a file", "choose another name")
    if not force:
        raise SpecError(f"{out} exists", "--force replaces it; or choose another name")
    try:
        fd = os.open(out, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"{out} cannot be replaced: {error.strerror}", "choose another name") from None
    try:
        try:
            lock.hold(fd, out, exclusive=True, wait=0)
            lock.refuse_attached(fd, out, exclusive=True, wait=0)
        except ImageBusy:
            users = f" by process {', '.join(map(str, pids))}" if (pids := lock.holders(fd)) else ""
            raise ImageBusy(f"{out} is in use{users}", "wait for that to end ('imgrun ps'), or choose another name") from None
        yield
    finally:
        os.close(fd)


def _require_programs(recipe: Recipe, tools: Tools) -> None:
    """Ask for what the last steps need before the first one takes its minutes."""
    if recipe.image.format == "xfs" and not tools.root:
        raise PrivilegeError("an xfs image can only be made as root", "run the build as root, or choose ext4")
    tools.find(_MAKERS.get(recipe.image.format, "mke2fs"))
    if recipe.image.table != "none":
        tools.find("sfdisk")


def _fill(recipe: Recipe, tools: Tools, content_tree: str, scratch: str, *, fresh: bool) -> bool | None:
    if recipe.source.type not in _CACHED:
        base.fill(recipe, tools, content_tree)
        return None
    tar, cached = cache.base(
        recipe,
        lambda path: base.make_tar(recipe, tools, path, scratch),
        fresh=fresh,
        fallback=os.path.join(scratch, "base.tar"),
        progress=tools.progress,
    )
    try:
        base.unpack(tools, tar, content_tree)
    except ToolFailed as error:
        raise no_space(error, content_tree) or HostError(
            f"{tar} cannot be unpacked: {error.summary()}", "--no-cache makes it anew"
        ) from None
    return cached


def _finish(recipe: Recipe, tools: Tools, content_tree: str) -> mkfs.Content:
    """The recipe's own files and removals, and what every image needs (see tree.py)."""
    request = {
        "files": [entry._asdict() for entry in recipe.files],
        "remove": recipe.remove,
        "epoch": mkfs.source_date(),
        "secret": mirror.SECRET if recipe.source.type in _CACHED else None,
    }
    command = [sys.executable, "-I", tree.__file__, content_tree]
    try:
        found = json.loads(tools.run(command, as_owner=True, stdin=json.dumps(request).encode()))
    except ToolFailed as error:
        raise no_space(error, content_tree) or SpecError(f"{recipe.origin}: {error.summary()}") from None
    if found["dropped"]:
        tools.progress(f"left out {found['dropped']} device nodes and sockets")
    return mkfs.Content(content_tree, found["bytes"], found["inodes"])


def _make_image(recipe: Recipe, tools: Tools, content: mkfs.Content, place: str) -> str:
    """Make the image in the directory ``place`` and return its path."""
    options = recipe.image
    tools.progress(f"making the {options.format} file system for {content.bytes >> 20} MiB in {content.inodes} files")
    filesystem = _empty_file(os.path.join(place, "filesystem"))
    mkfs.make(recipe, tools, content, filesystem)
    if options.table == "none":
        return filesystem
    whole = _empty_file(os.path.join(place, "disk"))
    partitioned.wrap(tools, filesystem, whole, options, _machine(content.tree))
    return whole


def _machine(content_tree: str) -> str:
    fd = os.open(content_tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        architectures = guest.identify(fd).architectures
    finally:
        os.close(fd)
    here = guest.host_machine()
    return here if not architectures or here in architectures else architectures[0]


def _empty_file(path: str) -> str:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    return path


def _complete(image: str, out: str, *, force: bool, sparse: bool) -> os.stat_result:
    """Bring the image to the disk and give it its name."""
    try:
        fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not sparse:
                os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
            os.fsync(fd)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if force:
            os.replace(image, out)
        else:
            _rename_to_new(image, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space_in(os.path.dirname(out)) from None
        raise HostError(f"{out} cannot be written: {error.strerror}", "choose another name") from None
    return status


def _rename_to_new(image: str, out: str) -> None:
    try:
        os.link(image, out)
    except FileExistsError:
        raise SpecError(f"{out} has appeared meanwhile", "--force replaces it; or choose another name") from None
    except OSError:
        # A file system without links.
        if os.path.lexists(out):
            raise SpecError(f"{out} has appeared meanwhile", "--force replaces it; or choose another name") from None
        os.rename(image, out)
