"""Making the job's namespaces, and entering them (namespaces(7), clone3(2), setns(2))."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from imgrun import syscalls as sc
from imgrun.errors import HostError, JobStateError
from imgrun.isolation.userns import IdMap, write_maps

ENTER_ORDER = ("user", "cgroup", "ipc", "uts", "net", "pid", "mnt")
"""The user namespace first: its root may enter the others. The mount namespace last: paths change with it."""


def job_flags(*, userns: bool, own_network: bool) -> int:
    """The clone flags of a job. Its cgroup namespace is made later, by itself, once it is in its cgroups."""
    flags = sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWUTS | sc.CLONE_NEWIPC
    if userns:
        flags |= sc.CLONE_NEWUSER
    if own_network:
        flags |= sc.CLONE_NEWNET
    return flags


def spawn(flags: int, child: Callable[[], None], cgroup_fd: int = -1) -> int:
    """Run ``child`` as the first process of new namespaces and return its pid. It must not return.

    Raises HostError when the kernel or its settings forbid the namespaces.
    """
    try:
        pid = sc.clone(flags, cgroup_fd)
    except OSError as e:
        raise _refused(e) from e
    if pid:
        return pid
    try:
        child()
    finally:
        os._exit(125)


def _refused(e: OSError) -> HostError:
    return HostError(
        f"the kernel refused new namespaces: {e.strerror}",
        "look at user.max_user_namespaces and its like in /proc/sys/user; 'imgrun doctor' checks them",
    )


def userns_descriptor(ids: IdMap) -> int:
    """A user namespace with this map and no process in it, for id-mapped mounts (mount_setattr(2))."""
    try:
        pid = sc.userns_holder()
    except OSError as e:
        raise _refused(e) from e
    try:
        write_maps(pid, ids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def open_all(pid: int) -> dict[str, int]:
    """Descriptors of those namespaces of ``pid`` that differ from the caller's, in the order to enter them.

    Raises JobStateError when the process is gone, and OSError where we can open no more.
    """
    found: dict[str, int] = {}
    try:
        for name in ENTER_ORDER:
            theirs = os.stat(f"/proc/{pid}/ns/{name}")
            ours = os.stat(f"/proc/self/ns/{name}")
            if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
                found[name] = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        for fd in found.values():
            os.close(fd)
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise JobStateError("the job ended meanwhile", "see 'imgrun inspect' for how") from e
    return found


def stop_importing() -> None:
    """From now on nothing is imported: modules would come from the job's own files, and run with our rights."""
    sys.meta_path.clear()


def enter(descriptors: dict[str, int]) -> None:
    """Join the namespaces. The PID namespace counts for the caller's next children only."""
    stop_importing()
    for fd in descriptors.values():
        sc.setns(fd)
