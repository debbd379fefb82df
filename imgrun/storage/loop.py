"""Loop devices: a file, or a part of one, as a block device.

A device is freed by the kernel when its last user is gone (LO_FLAGS_AUTOCLEAR): an open descriptor, or a mount made
from it. Nothing here waits for udev. Source: loop(4), drivers/block/loop.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from typing import NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import HostError, NoSpace, PrivilegeError
from imgrun.storage.retry import attempt

LOOP_MAJOR = 7
BLKROGET = 0x125E
BLKSSZGET = 0x1268
RACE_SECONDS = 10.0
CONTROL = "/dev/loop-control"


class Device:
    """An open loop device. ``shared`` tells that another job had already bound it."""

    __slots__ = ("fd", "number", "shared")

    def __init__(self, number: int, fd: int, *, shared: bool) -> None:
        self.number = number
        self.fd = fd
        self.shared = shared

    @property
    def source(self) -> str:
        """A path of the block device, for mounting it: its name, or where /dev lacks that, its descriptor."""
        name = f"/dev/loop{self.number}"
        try:
            if os.stat(name).st_rdev == os.fstat(self.fd).st_rdev:
                return name
        except OSError:
            pass
        return f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Binding(NamedTuple):
    """A loop device that is bound to an image, by whomever."""

    number: int
    read_only: bool
    block_size: int
    status: sc.LoopStatus


def attach(
    image_fd: int,
    name: str,
    *,
    offset: int = 0,
    size: int = 0,
    block_size: int = 512,
    read_only: bool,
    direct_io: bool = True,
) -> Device:
    """Bind a loop device to ``size`` bytes (0: all) at ``offset`` of an open file, or share one that is bound so.

    Only read-only devices are shared: then all users of an image have one page cache and one superblock. Direct I/O is
    asked for, and done where the file's file system can. Raises NoSpace when there is no free device, HostError or
    PrivilegeError when there are none at all or none for the caller.
    """
    control = _open_control()
    try:
        _take_turn(control)
        if read_only:
            shared = _find(image_fd, offset, size, block_size)
            if shared is not None:
                return shared
        flags = sc.LO_FLAGS_AUTOCLEAR | (sc.LO_FLAGS_READ_ONLY if read_only else 0)
        flags |= sc.LO_FLAGS_DIRECT_IO if direct_io else 0

        def bind() -> Device:
            number = _free_number(control)
            fd = _open_device(number, os.O_RDONLY if read_only else os.O_RDWR)
            try:
                sc.loop_configure(fd, image_fd, offset=offset, size=size, block_size=block_size, flags=flags, name=name)
            except BaseException:
                os.close(fd)
                raise
            return Device(number, fd, shared=False)

        try:
            return attempt(bind, _is_race, RACE_SECONDS)
        except OSError as e:
            raise _failed(e, name) from e
    finally:
        os.close(control)


def bindings(image_fd: int) -> list[Binding]:
    """All loop devices that are bound to this file, found by its inode, under whatever name they were made."""
    image = os.fstat(image_fd)
    found = []
    for number in _bound_numbers():
        try:
            fd = _open_device(number, os.O_RDONLY)
        except (OSError, NoSpace):
            continue
        try:
            status = sc.loop_get_status(fd)
            if (status.device, status.inode) == (image.st_dev, image.st_ino):
                found.append(Binding(number, _ioctl_int(fd, BLKROGET) != 0, _ioctl_int(fd, BLKSSZGET), status))
        except OSError:
            continue
        finally:
            os.close(fd)
    return found


def wait_until_unused(device: Device, seconds: float) -> bool:
    """Wait until nothing is mounted from the device any more, which is then written out. False when time is over."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            # A mounted block device is claimed; a second claim is refused.
            os.close(os.open(f"/proc/self/fd/{device.fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            return True
        except OSError as e:
            if e.errno != errno.EBUSY:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)


def wait_until_unmounted(number: int, seconds: float) -> bool:
    """The same for a device that somebody else has bound."""
    try:
        fd = _open_device(number, os.O_RDONLY)
    except OSError:
        return True  # it has gone
    try:
        return wait_until_unused(Device(number, fd, shared=True), seconds)
    finally:
        os.close(fd)


def _find(image_fd: int, offset: int, size: int, block_size: int) -> Device | None:
    for binding in bindings(image_fd):
        if not _serves(binding, offset, size, block_size):
            continue
        try:
            fd = _open_device(binding.number, os.O_RDONLY)
        except (OSError, NoSpace):
            continue
        # Between the look and the open it may have been freed, and bound to something else; from here on it stays.
        try:
            still = sc.loop_get_status(fd) == binding.status
        except OSError:
            still = False
        if still:
            return Device(binding.number, fd, shared=True)
        os.close(fd)
    return None


def _serves(binding: Binding, offset: int, size: int, block_size: int) -> bool:
    status = binding.status
    return binding.read_only and binding.block_size <= block_size and (status.offset, status.size) == (offset, size)


def _bound_numbers() -> list[int]:
    try:
        names = [name[4:] for name in os.listdir("/sys/block") if name.startswith("loop")]
    except OSError:
        return []
    return sorted(int(n) for n in names if n.isdigit() and os.access(f"/sys/block/loop{n}/loop", os.F_OK))


def _open_control() -> int:
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM):
            raise PrivilegeError("the caller may not attach loop devices", "run imgrun as root") from e
        raise HostError(
            f"this host has no loop devices: {CONTROL}: {e.strerror}",
            "load the loop module (modprobe loop); inside a container, give it /dev/loop-control and /dev/loop*",
        ) from e


def _take_turn(control: int) -> None:
    """One imgrun at a time looks for a device: two starts of one image must end up with the same one.

    Whoever stopped inside this short moment must not stop the rest: after a while it goes on without.
    """
    deadline = time.monotonic() + RACE_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(control, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.001)


def _free_number(control: int) -> int:
    try:
        return sc.loop_get_free(control)
    except OSError as e:
        if e.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError("the caller may not attach loop devices", "run imgrun as root") from e
        raise _none_free(e.strerror) from e


def _open_device(number: int, flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(f"/dev/loop{number}", flags)
    except FileNotFoundError:
        return _open_without_node(number, flags)


def _open_without_node(number: int, flags: int) -> int:
    """Open a loop device that /dev has no node for, as in a container with a /dev of its own."""
    node = f"/dev/.imgrun-loop{number}-{os.getpid()}"
    try:
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
        try:
            return os.open(node, flags)
        finally:
            os.unlink(node)
    except OSError as e:
        raise _none_free(f"/dev/loop{number} is missing here and cannot be made: {e.strerror}") from e


def _none_free(why: str | None) -> NoSpace:
    return NoSpace(
        f"there is no free loop device: {why}",
        "see which are in use with 'losetup -a'; inside a container, give it /dev/loop0 and so on",
    )


def _is_race(e: BaseException) -> bool:
    # ENXIO: the device is being taken down by its last user.
    return isinstance(e, OSError) and e.errno in (errno.EBUSY, errno.EAGAIN, errno.ENXIO)


def _failed(e: OSError, name: str) -> HostError:
    if _is_race(e):
        return NoSpace(
            f"no loop device could be taken for {name} in {RACE_SECONDS:.0f} seconds: {e.strerror}",
            "see which are in use with 'losetup -a', and try again",
        )
    if e.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"the caller may not attach {name} to a loop device", "run imgrun as root")
    return HostError(f"{name} cannot be attached to a loop device: {e.strerror}", "'dmesg | tail' may say more")


def _ioctl_int(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little", signed=True)
