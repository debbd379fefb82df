"""Work in a process of its own, for what a test cannot take back: another user, other namespaces, another cgroup."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from imgrun import syscalls as sc


def become(uid: int) -> None:
    """Be this user, with the group of the same number and no other; 0 changes nothing."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def in_child(work: Callable[[], Any], *, uid: int = 0, flags: int = 0) -> None:
    """See that ``work`` succeeds in a child that is this user, in new namespaces. What is wrong with it is printed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            become(uid)
            if flags:
                sc.unshare(flags)
            if flags & sc.CLONE_NEWNS:
                sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 (the child of a fork must not go on as the test)
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def sleeper() -> Iterator[int]:
    """The pid of a child that does nothing, for a while that ends with this at the latest."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
