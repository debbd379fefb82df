"""Images: a file or directory that holds a root file system, probed, locked and mounted for one job.

``probe`` tells what a file holds and needs no privilege. ``open_image`` takes the lock and the loop device; the
Image it returns makes detached mounts of the root until it is closed. What cannot be used is refused before anything
is changed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from imgrun import syscalls as sc
from imgrun.errors import ImageError
from imgrun.helper import Helper
from imgrun.storage import disk, fuse, lock, loop, mount, superblock
from imgrun.storage.blkid import Partition
from imgrun.storage.guest import OsInfo, check_architecture, has_os_release, identify
from imgrun.storage.probing import ImageInfo, examine, open_file, probe, refuse_unfit, repair, with_partition

__all__ = [
    "Access",
    "Image",
    "ImageInfo",
    "OsInfo",
    "Partition",
    "check_architecture",
    "identify",
    "inspect",
    "open_image",
    "probe",
]

Access = Literal["overlay", "read-only", "writable"]

WAIT_SECONDS = 2.0
UNMOUNT_SECONDS = 10.0
SUBVOLUMES = ("root", "@")
"""Where the usual installers put the root in a btrfs file system whose top level is not it."""


class Image:
    """An image held for one job: locked, and attached to a loop device. A context manager.

    ``warnings`` are lines for the user about what using it this way means.
    """

    def __init__(
        self, info: ImageInfo, access: Access, lock_fd: int, device: loop.Device | None, serve_in: str | None = None
    ) -> None:
        self.info = info
        self.access = access
        self.lock_fd = lock_fd
        self.device = device
        self.server: Helper | None = None
        """The process that serves the file system, where the kernel may not; when it dies, so does the job."""
        self.mounts_below = False
        """Whether :meth:`mount` gave a directory with what is mounted below it, since it may not be had without."""
        self._serve_in = serve_in
        self.warnings: list[str] = []
        if info.unclean:
            self.warnings.append(f"{info.name}: {info.unclean}; mounting it for writing puts that right")

    def mount(self) -> int:
        """A new detached mount of the root file system, as a descriptor: read-only unless access is ``writable``.

        It was never attached, so it may be id-mapped. Its device nodes do not work. Raises an ImageError, HostError or
        PrivilegeError.
        """
        read_only = self.access != "writable"
        if self._serve_in is not None:
            root, self.server = _serve(self.lock_fd, self.info, self._serve_in, read_only=read_only)
            return root
        if self.device is None:
            try:
                return mount.directory(self.lock_fd, read_only=read_only)
            except mount.MountsBelow:
                self.mounts_below = True
                return mount.directory(self.lock_fd, read_only=read_only, below=True)
        return _mount_root(self.device, self.info, read_only=read_only)

    def close(self) -> None:
        """Let the image go. After writing, waits until the kernel has written all of it out: close its mounts first."""
        if self.device is not None:
            if self.access == "writable":
                loop.wait_until_unused(self.device, UNMOUNT_SECONDS)
            self.device.close()
        if self.server is not None:
            if self.access == "writable":
                self.server.flush(UNMOUNT_SECONDS)
            self.server.close()
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_image(
    path: str,
    access: Access,
    partition: str | None = None,
    *,
    wait: float = WAIT_SECONDS,
    direct_io: bool | None = None,
    serve_in: str | None = None,
) -> Image:
    """Lock the image, for as long as this process holds it, and attach its loop device. Nothing is mounted yet.

    ``serve_in`` is for callers without the host's root, in a user and mount namespace of their own: FUSE servers take
    the place of loop devices and work in that directory. ``direct_io`` is off unless writing: what one job has read of
    an image is then in the host's page cache for the next, although the loop device goes in between.

    Waits up to ``wait`` seconds for a user that excludes this one. Raises what ``probe`` raises, ImageBusy, and
    HostError or PrivilegeError when there is no loop device to be had.
    """
    writable = access == "writable"
    direct_io = writable if direct_io is None else direct_io
    fd = open_file(path, writable=writable)
    try:
        lock.hold(fd, path, exclusive=writable, wait=wait)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            return Image(examine(fd, path, partition), access, fd, None)
        lock.refuse_attached(fd, path, exclusive=writable, wait=wait)
        info = examine(fd, path, partition)
        if info.needs_mount_probe:
            info = _decide_by_content(fd, info, direct_io, serve_in)
        refuse_unfit(info, writable)
        if serve_in is not None:
            return Image(info, access, fd, None, serve_in)
        return Image(info, access, fd, _attach(fd, info, not writable, direct_io))
    except BaseException:
        os.close(fd)
        raise


def inspect(path: str, partition: str | None = None) -> dict[str, Any]:
    """A record of all that can be told about an image, and whether it can run here. Unknown is None.

    Looks inside by mounting it read-only, as a job would. Raises ImageMissing; ``reason`` tells what else is wrong.
    """
    from imgrun.storage.report import report

    return report(path, partition)


def _attach(fd: int, info: ImageInfo, read_only: bool, direct_io: bool) -> loop.Device:
    # The size limit of a bare file system is left at "all", which is also what other tools use: the device is shared.
    size = 0 if info.partition is None else info.size
    return loop.attach(
        fd,
        info.path,
        offset=info.offset,
        size=size,
        block_size=info.sector_size,
        read_only=read_only,
        direct_io=direct_io,
    )


def _mount_root(device: loop.Device, info: ImageInfo, *, read_only: bool, peek: bool = False) -> int:
    """Mount the root file system. An unfinished journal is an error on a read-only mount, but ``peek`` looks past it.

    The read-only loop device guarantees that nothing is written, whatever a file system may want to.
    """
    fstype = superblock.DRIVERS[info.fstype or ""]
    options: dict[str, str | None] = {}
    if fstype == "ext4" and read_only:
        options["noload"] = None
    elif fstype == "xfs":
        # Copies of an image have the same UUID, and may be in use at the same time.
        options["nouuid"] = None
        if peek:
            options["norecovery"] = None
    elif fstype == "btrfs" and peek:
        options["rescue"] = "nologreplay"

    def make() -> int:
        return mount.file_system(
            fstype, device.source, options, read_only=read_only, name=info.name, hint=lambda: repair(info)
        )

    root = make()
    if fstype == "btrfs":
        subvolume = _root_subvolume(root)
        if subvolume:
            os.close(root)
            options["subvol"] = subvolume
            root = make()
    return root


def _root_subvolume(top: int) -> str | None:
    if has_os_release(top):
        return None
    for name in SUBVOLUMES:
        try:
            fd = sc.openat2(name, os.O_PATH | os.O_DIRECTORY, top, resolve=sc.RESOLVE_BENEATH | sc.RESOLVE_NO_SYMLINKS)
        except OSError:
            continue
        try:
            if has_os_release(fd):
                return name
        finally:
            os.close(fd)
    return None


def _serve(fd: int, info: ImageInfo, directory: str, *, read_only: bool) -> tuple[int, Helper]:
    driver = superblock.DRIVERS[info.fstype or ""]
    return fuse.serve(driver, fd, info.offset, writable=not read_only, directory=directory, name=info.name)


@contextmanager
def _peek(fd: int, info: ImageInfo, direct_io: bool, serve_in: str | None) -> Iterator[int]:
    """The root of a file system to be looked at, read-only, past an unfinished journal."""
    server: Helper | None = None
    device: loop.Device | None = None
    root = -1
    try:
        if serve_in is not None:
            root, server = _serve(fd, info, serve_in, read_only=True)
        else:
            device = _attach(fd, info, True, direct_io)
            root = _mount_root(device, info, read_only=True, peek=True)
        yield root
    finally:
        if root >= 0:
            os.close(root)
        if device is not None:
            device.close()
        if server is not None:
            server.close()


def _decide_by_content(fd: int, info: ImageInfo, direct_io: bool, serve_in: str | None) -> ImageInfo:
    """Look into each candidate partition, read-only, for an os-release file."""
    roots = []
    for candidate in info.partitions:
        if candidate.fstype not in superblock.DRIVERS:
            continue
        try:
            one = with_partition(fd, info._replace(needs_mount_probe=False), candidate)
            with _peek(fd, one, direct_io, serve_in) as root:
                if has_os_release(root):
                    roots.append(one)
        except ImageError:
            # A partition that cannot be looked into is not the root, unless it is named.
            continue
    if len(roots) == 1:
        return roots[0]
    table = disk.Table(info.table or "", 0, info.partitions)
    if roots:
        found = [p for p in info.partitions if p.number in {one.partition for one in roots}]
        raise disk.several(table, info.path, found, "partitions that hold an operating system")
    raise disk.none_found(table, info.path)
