"""A file system in a file, filled from a directory. No loop device is needed, except for xfs."""

from __future__ import annotations

import os
from typing import NamedTuple

from imgrun.building.recipe import ImageOptions, Recipe
from imgrun.building.tools import ToolFailed, Tools, is_full, no_space, no_space_in
from imgrun.errors import HostError, ImgrunError, NoSpace, SpecError
from imgrun.storage import loop, mount

# Said in full, so that every release of mke2fs makes a file system that every kernel imgrun supports can mount.
_EXT_FEATURES = {
    "ext2": "ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
    "ext3": "has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
    "ext4": "has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
    "huge_file,dir_nlink,extra_isize,metadata_csum",
}
_ALIGNMENT = 4 << 20
_XFS_SMALLEST = 300 << 20
_UNMOUNT_SECONDS = 60.0


class Content(NamedTuple):
    """A file tree and its measure: bytes in whole blocks of 4096, and the number of inodes."""

    tree: str
    bytes: int
    inodes: int


def make(recipe: Recipe, tools: Tools, content: Content, target: str) -> None:
    """Turn the empty file ``target`` into the recipe's file system with ``content``. Raises SpecError, HostError."""
    options = recipe.image
    makers = {"xfs": _xfs, "btrfs": _btrfs, "squashfs": _squashfs, "erofs": _erofs}
    size = None if options.format in ("squashfs", "erofs") else options.size or automatic_size(options.format, content)
    if options.size is not None and content.bytes > options.size:
        raise _too_small(recipe, content)
    place = os.path.dirname(target)
    _check_room(place, content.bytes // 4 if size is None else content.bytes)
    if size is not None:
        _truncate(target, size)
    try:
        makers.get(options.format, _ext)(tools, content, target, options)
    except ToolFailed as error:
        # Where the new file system has a size, "no space" can be about that.
        full = no_space_in(place) if is_full(place) else None if size is not None else no_space(error, place)
        raise full or _failure(recipe, content, error) from None


def automatic_size(format: str, content: Content) -> int:
    """Bytes for a file system that holds ``content`` and has room for a quarter more, and at least 128 MiB."""
    room = max(content.bytes // 4, 128 << 20)
    size = content.bytes + content.inodes * 512 + room
    if format == "btrfs":
        size += content.bytes // 4 + (128 << 20)
    if format == "xfs":
        size = max(size + (64 << 20), _XFS_SMALLEST)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def source_date() -> int | None:
    """The time to give to everything, from SOURCE_DATE_EPOCH (reproducible-builds.org). Raises SpecError."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 31:
        raise SpecError(f"SOURCE_DATE_EPOCH is {text!r}", "it must be seconds since 1970")
    return int(text)


def _ext(tools: Tools, content: Content, target: str, options: ImageOptions) -> None:
    extended = ["lazy_itable_init=0", "lazy_journal_init=1", "root_owner=0:0"]
    if options.uuid:
        extended.append(f"hash_seed={options.uuid}")
    inodes = max(content.inodes * 5 // 4 + 1024, os.stat(target).st_size // 16384)
    command = [
        "mke2fs", "-q", "-F", "-t", options.format, "-O", f"none,{_EXT_FEATURES[options.format]}", "-b", "4096",
        "-I", "256", "-m", "0", "-N", str(inodes), "-E", ",".join(extended), "-d", content.tree,
        *_optional("-L", options.label), *_optional("-U", options.uuid), target,
    ]  # fmt: skip
    tools.run(command, as_owner=True)


def _btrfs(tools: Tools, content: Content, target: str, options: ImageOptions) -> None:
    command = [
        "mkfs.btrfs", "--quiet", "--force", "--rootdir", content.tree, *_optional("--label", options.label),
        *_optional("--uuid", options.uuid), target,
    ]  # fmt: skip
    tools.run(command, as_owner=True)


def _squashfs(tools: Tools, content: Content, target: str, options: ImageOptions) -> None:
    command = [
        "mksquashfs", content.tree, target, "-noappend", "-quiet", "-no-progress", "-comp", "zstd",
        "-Xcompression-level", "6",
    ]  # fmt: skip
    tools.run(command, as_owner=True)


def _erofs(tools: Tools, content: Content, target: str, options: ImageOptions) -> None:
    epoch = source_date()
    command = [
        "mkfs.erofs", "-zlz4hc", *_optional("-U", options.uuid), *([] if epoch is None else [f"-T{epoch}"]),
        target, content.tree,
    ]  # fmt: skip
    tools.run(command, as_owner=True)


def _xfs(tools: Tools, content: Content, target: str, options: ImageOptions) -> None:
    # mkfs.xfs cannot take a directory, or forgets times and attributes; so the kernel has to write it.
    uuid = ["-m", f"uuid={options.uuid}"] if options.uuid else []
    tools.run(["mkfs.xfs", "-q", "-f", *uuid, *_optional("-L", options.label), target])
    with open(target, "r+b") as file:
        device = loop.attach(file.fileno(), target, read_only=False, direct_io=False)
    try:
        mount_fd = mount.file_system("xfs", device.source, {}, read_only=False, name=target)
        try:
            copy = ["cp", "--archive", "--", os.path.join(content.tree, "."), f"/proc/self/fd/{mount_fd}/"]
            tools.run(copy, pass_fds=[mount_fd])
        finally:
            os.close(mount_fd)
        if not loop.wait_until_unused(device, _UNMOUNT_SECONDS):
            raise HostError(f"{target} is still mounted", "another process copied this one's mounts: see 'losetup -a'")
    finally:
        device.close()


def _optional(option: str, value: str) -> list[str]:
    return [option, value] if value else []


def _truncate(path: str, size: int) -> None:
    try:
        os.truncate(path, size)
    except OSError as error:
        raise HostError(
            f"a file of {size >> 20} MiB cannot be made in {os.path.dirname(path)}: {error.strerror}",
            "choose a smaller image.size, or another place",
        ) from None


def _check_room(place: str, needed: int) -> None:
    free = os.statvfs(place)
    if free.f_bavail * free.f_frsize < needed:
        error: NoSpace = no_space_in(place)
        raise NoSpace(f"{error.message}: the image needs about {needed >> 20} MiB", error.hint)


def _too_small(recipe: Recipe, content: Content) -> SpecError:
    needed = automatic_size(recipe.image.format, content) >> 20
    return SpecError(
        f"{recipe.origin}: image.size: {(recipe.image.size or 0) >> 20} MiB is too small for the content",
        f'say "auto", or about {needed}M',
    )


def _failure(recipe: Recipe, content: Content, error: ToolFailed) -> ImgrunError:
    text = "\n".join(error.lines)
    signs = ("Could not allocate", "No space left on device", "not enough free space", "too small", "size is too")
    if recipe.image.size is not None and any(sign in text for sign in signs):
        return _too_small(recipe, content)
    return HostError(
        f"the {recipe.image.format} file system could not be made: {error.program}: {error.summary()}",
        "--debug shows all it said",
    )
