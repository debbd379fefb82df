"""What the supervisor prepares for the plan with its own rights: detached mounts, never visible in the host's tree.

A detached mount (open_tree(2) with OPEN_TREE_CLONE, fsmount(2)) belongs to no mount namespace, so nothing is left to unmount
when a start fails, and only a mount that was never attached can be id-mapped (mount_setattr(2)).
"""

from __future__ import annotations

import errno
import os
import stat

from imgrun import syscalls as sc
from imgrun.errors import HostError, PrivilegeError, SpecError
from imgrun.helper import Helper
from imgrun.image import Image, ImageInfo, open_image
from imgrun.isolation.namespaces import userns_descriptor
from imgrun.isolation.userns import IdMap, IdRange
from imgrun.spec import Mount, RootMode
from imgrun.storage.scratch import Scratch

OVERLAY_OF_ID_MAPPED = (5, 19)
"""Since then an overlay takes id-mapped layers (Documentation/filesystems/idmappings.rst)."""


class IdMapUnsupported(HostError):
    """This file system's mounts cannot be id-mapped by this kernel."""


def id_map(mount_fd: int, userns_fd: int, what: str) -> None:
    """Show the mount's files with the owners that the user namespace maps them to. Raises IdMapUnsupported."""
    try:
        sc.mount_setattr(mount_fd, set=sc.MOUNT_ATTR_IDMAP, userns_fd=userns_fd)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
            raise IdMapUnsupported(
                f"this kernel cannot id-map {what}", "use --userns off, or a newer kernel, or another file system"
            ) from e
        raise


class Source:
    """One prepared mount, under the name by which an operation of the plan takes it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def describe(self) -> str:
        raise NotImplementedError

    def open(self, userns_fd: int | None) -> int:
        """The detached mount. ``userns_fd`` is the job's user namespace, None when it has none or ids are the host's."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what :meth:`open` took beside the descriptor it returned."""


class RootImage(Source):
    """The image's root file system. What it is made from is known before it is mounted."""

    def __init__(self, info: ImageInfo, use: RootMode, mount_fd: int = -1) -> None:
        super().__init__("image")
        self.info = info
        self.use = use
        self._mount_fd = mount_fd

    def describe(self) -> str:
        what = self.info.fstype or "directory"
        where = f"partition {self.info.partition} of {self.info.path}" if self.info.partition else self.info.path
        return f"mount {where} ({what}), {'writable' if self.use == 'writable' else 'read-only'}"

    def open(self, userns_fd: int | None) -> int:
        if userns_fd is not None:
            if self.use != "writable" and sc.kernel_version() < OVERLAY_OF_ID_MAPPED:
                raise IdMapUnsupported("an overlay cannot lie on id-mapped layers before Linux 5.19", "use --userns off")
            id_map(self._mount_fd, userns_fd, f"the file system of {self.info.path}")
        return self._mount_fd


class Union(Source):
    """The root as a file server composes it from image and scratch (imgrun.storage.union)."""

    def __init__(self, mount_fd: int) -> None:
        super().__init__("image")
        self._mount_fd = mount_fd

    def describe(self) -> str:
        return "compose the root by fuse-overlayfs"

    def open(self, userns_fd: int | None) -> int:
        return self._mount_fd


class ScratchDir(Source):
    def __init__(self, scratch: Scratch | None, size: int | None) -> None:
        super().__init__("scratch")
        self.scratch = scratch
        self.size = size

    @classmethod
    def planned(cls, size: int | None) -> ScratchDir:
        """For a description only."""
        return cls(None, size)

    def describe(self) -> str:
        if self.size is None:
            return "make the job's scratch, a directory of its state"
        return f"make the job's scratch, a file system of {self.size} bytes"

    def open(self, userns_fd: int | None) -> int:
        assert self.scratch is not None
        mount = self.scratch.mount()
        if userns_fd is not None:
            id_map(mount, userns_fd, "the file system that holds imgrun's state")
        return mount


class Shim(Source):
    def __init__(self, path: str) -> None:
        super().__init__("shim")
        self.path = path

    def describe(self) -> str:
        return f"clone {self.path}, read-only"

    def open(self, userns_fd: int | None) -> int:
        mount = sc.open_tree(self.path, sc.OPEN_TREE_CLONE)
        sc.mount_setattr(mount, set=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
        return mount


class HostSys(Source):
    """The host's sysfs alone: where the caller may, without the cgroup and debug file systems mounted in it."""

    def __init__(self) -> None:
        super().__init__("sys")

    def describe(self) -> str:
        return "clone the host's /sys"

    def open(self, userns_fd: int | None) -> int:
        try:
            return sc.open_tree("/sys", sc.OPEN_TREE_CLONE)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            # In a user namespace what is mounted on it may not be taken off.
            return sc.open_tree("/sys", sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE)


class Bind(Source):
    """A host file or directory, with everything mounted below it."""

    def __init__(self, key: str, mount: Mount, owner: tuple[int, int] | None) -> None:
        super().__init__(key)
        self.mount = mount
        self.owner = owner
        """For ``idmap``: the host's ids of the job's user, whom the source's owner is shown as."""

    def describe(self) -> str:
        return f"clone {self.mount.describe()}"

    def open(self, userns_fd: int | None) -> int:
        source = self.mount.src
        try:
            here = os.open(source, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SpecError(f"bind source {source} does not exist", "create it, or mend the path") from None
        except OSError as e:
            raise SpecError(f"bind source {source} cannot be used: {e.strerror}", "choose another") from e
        try:
            status = os.fstat(here)
            tree = sc.clone_mount(here, recursive=True)
        except PermissionError as e:
            raise PrivilegeError(f"bind source {source} cannot be mounted: {e.strerror}", "run 'imgrun doctor'") from e
        finally:
            os.close(here)
        attributes = sc.MOUNT_ATTR_NOSUID
        if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            attributes |= sc.MOUNT_ATTR_NODEV
        if self.mount.ro:
            attributes |= sc.MOUNT_ATTR_RDONLY
        sc.mount_setattr(tree, set=attributes, recursive=True)
        if self.mount.idmap and self.owner is not None:
            uid, gid = self.owner
            single = userns_descriptor(IdMap((IdRange(status.st_uid, uid, 1),), (IdRange(status.st_gid, gid, 1),)))
            try:
                id_map(tree, single, f"the file system of {source}")
            finally:
                os.close(single)
        return tree


class OtherImage(Source):
    """Another image, read-only, at a directory of the job."""

    def __init__(self, key: str, mount: Mount) -> None:
        super().__init__(key)
        self.mount = mount
        self.serve_in: str | None = None
        """Without the host's root: a directory to be made for the file server (see imgrun.image.open_image)."""
        self._image: Image | None = None

    @property
    def server(self) -> Helper | None:
        return self._image.server if self._image is not None else None

    def describe(self) -> str:
        return f"mount {self.mount.describe()}"

    def open(self, userns_fd: int | None) -> int:
        if self.serve_in is not None:
            os.mkdir(self.serve_in, 0o700)
        self._image = open_image(self.mount.src, "read-only", self.mount.partition, serve_in=self.serve_in)
        mount = self._image.mount()
        if userns_fd is not None:
            id_map(mount, userns_fd, f"the file system of {self.mount.src}")
        return mount

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
            self._image = None
