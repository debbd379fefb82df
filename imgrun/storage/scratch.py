"""A job's scratch: where all that it writes goes. A directory, or, with a limit, a sparse file with a file system.

With a limit, a job that fills it gets ENOSPC and the host's disk does not fill: the file cannot grow beyond the
limit, and a limit larger than what is free is refused. Either way the scratch is one directory with ``upper`` and
``work`` (the overlay's), ``tmp`` and ``var-tmp`` in it, shown as a detached mount; owners on disk are the image's.
"""

from __future__ import annotations

import errno
import os

from imgrun.errors import HostError, NoSpace, SpecError
from imgrun.storage import loop, mount, trees

DIRECTORIES = (("upper", 0o755), ("work", 0o755), ("tmp", 0o1777), ("var-tmp", 0o1777))
FILE = "scratch.img"
SMALLEST = 1 << 20
BLOCK = 4096
FEATURES = (
    "none", "ext_attr", "dir_index", "filetype", "extent", "64bit", "flex_bg", "large_file", "huge_file", "dir_nlink",
    "extra_isize", "uninit_bg", "sparse_super2",
)  # fmt: skip
# No journal, and nothing written that can wait or be left out: the file system does not outlive the host's next boot.
FORMAT = (
    "-q", "-F", "-b", str(BLOCK), "-I", "256", "-G", "256", "-m", "0",
    "-O", ",".join(FEATURES),
    "-E", "nodiscard,lazy_itable_init=1,num_backup_sb=0",
)  # fmt: skip
OPTIONS: dict[str, str | None] = {"noinit_itable": None, "nobarrier": None, "errors": "remount-ro"}
MKE2FS = ("/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/local/sbin/mke2fs")


class Scratch:
    """One job's scratch. Made by :meth:`create`; the directory stays when it is closed, until it is removed."""

    def __init__(self, path: str, directory: int, size: int | None) -> None:
        self.path = path
        self.size = size
        self._directory = directory
        self._format: _Format | None = None
        self._image = -1
        self._device: loop.Device | None = None
        self._unused = 0

    @classmethod
    def create(cls, path: str, size: int | None = None) -> Scratch:
        """Make the directory ``path`` (mode 0700; its parent exists), bounded to ``size`` bytes when that is given.

        With a size, its file system is still being made when this returns: ``mount`` waits for it. Raises NoSpace
        when the disk has less than ``size`` free, SpecError when ``size`` is too small for a file system.
        """
        if size is not None and size < SMALLEST:
            raise SpecError(f"a scratch of {size} bytes is too small", f"give --scratch-size at least {SMALLEST >> 20}M")
        try:
            os.mkdir(path, 0o700)
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise _failed(e, path) from e
        scratch = cls(path, directory, size)
        try:
            if size is None:
                _make_directories(directory, path)
                scratch._unused = sum(os.stat(name, dir_fd=directory).st_blocks * 512 for name, _ in DIRECTORIES)
            else:
                scratch._begin(size // BLOCK * BLOCK)
        except BaseException:
            scratch.remove()
            raise
        return scratch

    def adopt(self) -> None:
        """Make no file system: that of an earlier scratch is put into the file, or its directories in place of ours."""
        if self._format is not None:
            self._format.abandon()
            self._format = None

    def mount(self) -> int:
        """A new detached mount of the scratch, as a descriptor. It was never attached, so it may be id-mapped.

        Raises NoSpace, HostError, PrivilegeError.
        """
        if self.size is None:
            return mount.directory(self._directory, read_only=False)
        if self._device is None:
            self._device = self._attach()
        root = mount.file_system(
            "ext4", self._device.source, OPTIONS, read_only=False, name=f"{self.path}/{FILE}", hint=lambda: "see dmesg"
        )
        try:
            if _make_directories(root, self.path):
                self._unused = _occupied(root)
        except BaseException:
            os.close(root)
            raise
        return root

    def used(self) -> int | None:
        """The bytes that the job's files occupy; None when there are too many of them to count in a second."""
        if self.size is None:
            occupied = trees.disk_usage(self._directory)
            return None if occupied is None else max(occupied - self._unused, 0)
        if self._device is None:
            return 0
        root = self.mount()
        try:
            return max(_occupied(root) - self._unused, 0)
        finally:
            os.close(root)

    def free(self) -> int | None:
        """The bytes that the job could still write; None when that cannot be told."""
        if self.size is None:
            space = os.fstatvfs(self._directory)
        elif self._device is None:
            return None
        else:
            root = self.mount()
            try:
                space = os.fstatvfs(root)
            finally:
                os.close(root)
        return space.f_bavail * space.f_frsize if space.f_favail or not space.f_files else 0

    def close(self) -> None:
        """Let go of the loop device and descriptors. What was written stays."""
        if self._format is not None:
            self._format.abandon()
            self._format = None
        if self._device is not None:
            self._device.close()
            self._device = None
        for fd in (self._image, self._directory):
            if fd >= 0:
                os.close(fd)
        self._image = self._directory = -1

    def remove(self) -> None:
        """Close it and delete all of it."""
        self.close()
        trees.remove_tree(self.path)

    def _begin(self, size: int) -> None:
        space = os.fstatvfs(self._directory)
        free = space.f_bavail * space.f_frsize
        if size > free:
            raise NoSpace(
                f"a scratch of {size >> 20} MiB does not fit: {self.path} has {free >> 20} MiB free",
                "give a smaller --scratch-size, or set IMGRUN_STATE_DIR to a larger disk",
            )
        try:
            self._image = os.open(FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            os.truncate(self._image, size)
        except OSError as e:
            raise _failed(e, self.path) from e
        self._format = _Format(size)

    def _attach(self) -> loop.Device:
        if self._format is not None:
            try:
                self._format.copy_to(self._image)
            except OSError as e:
                raise _failed(e, self.path) from e
            self._format = None
        return loop.attach(self._image, f"{self.path}/{FILE}", block_size=BLOCK, read_only=False)


class _Format:
    """mke2fs at work in the background, on a file in memory: its fsyncs then wait for no disk."""

    def __init__(self, size: int) -> None:
        program = next((path for path in MKE2FS if os.access(path, os.X_OK)), None)
        if program is None:
            raise HostError("mke2fs is missing, which --scratch-size needs", "install e2fsprogs")
        self._memory = os.memfd_create("imgrun-scratch", os.MFD_CLOEXEC)
        self._messages = os.memfd_create("imgrun-mke2fs", os.MFD_CLOEXEC)
        self._pid = 0
        try:
            os.truncate(self._memory, size)
            actions = [(os.POSIX_SPAWN_DUP2, self._memory, 0)]
            actions += [(os.POSIX_SPAWN_DUP2, self._messages, fd) for fd in (1, 2)]
            self._pid = os.posix_spawn(
                program,
                ["mke2fs", *FORMAT, "/proc/self/fd/0"],
                {"LC_ALL": "C"},
                file_actions=actions,
            )
        except BaseException:
            self.abandon()
            raise

    def copy_to(self, image: int) -> None:
        """Wait for mke2fs, and copy the little that it wrote. Raises HostError with its words when it fails."""
        try:
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
            if status != 0:
                words = os.pread(self._messages, 4096, 0).decode(errors="replace").strip().splitlines()
                raise HostError(
                    f"mke2fs failed: {words[-1] if words else os.waitstatus_to_exitcode(status)}",
                    "run without --scratch-size",
                )
            position = 0
            while True:
                try:
                    start = os.lseek(self._memory, position, os.SEEK_DATA)
                except OSError as e:
                    if e.errno == errno.ENXIO:
                        return
                    raise
                position = os.lseek(self._memory, start, os.SEEK_HOLE)
                while start < position:
                    start += os.pwrite(image, os.pread(self._memory, min(position - start, 1 << 20), start), start)
        finally:
            self.abandon()

    def abandon(self) -> None:
        if self._pid:
            import signal

            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        for fd in (self._memory, self._messages):
            if fd >= 0:
                os.close(fd)
        self._memory = self._messages = -1


def _occupied(root: int) -> int:
    space = os.fstatvfs(root)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


def _make_directories(fd: int, path: str) -> bool:
    """Make those that are missing; whether any was."""
    made = False
    try:
        for name, mode in DIRECTORIES:
            try:
                os.mkdir(name, mode, dir_fd=fd)
            except FileExistsError:
                continue
            # mkdir(2) is subject to the umask.
            os.chmod(name, mode, dir_fd=fd)
            made = True
        return made
    except OSError as e:
        raise _failed(e, path) from e


def _failed(e: OSError, path: str) -> HostError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"there is no space for the job's scratch: {path}: {e.strerror}",
            "free some, or set IMGRUN_STATE_DIR to another disk",
        )
    return HostError(
        f"the job's scratch {path} cannot be made: {e.strerror}", "check the state directory, or set IMGRUN_STATE_DIR"
    )
