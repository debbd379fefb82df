"""Work in a process apart: with the rights of the job's root, which an ordinary user has only in a namespace, and with no
more memory than it should need, where it reads what others have written.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from imgrun import errors
from imgrun import syscalls as sc
from imgrun.errors import HostError, ImgrunError


def apart(task: Callable[[], Any], *, memory: int | None = None) -> Any:
    """Call ``task`` in a child and return what it returns, which JSON can say. It has all ids that the caller can give.

    ``memory`` is how many bytes more than now it may have. Raises what it raises: an ImgrunError as it is, and HostError
    for any other.
    """
    return Beside(task, all_ids=True, memory=memory).result()


class Beside:
    """A ``task`` in a child, beside what the caller does meanwhile."""

    def __init__(self, task: Callable[[], Any], *, all_ids: bool = False, memory: int | None = None) -> None:
        """Begin. With ``all_ids`` it has all ids that the caller can give; ``memory`` as of :func:`apart`."""
        self._read, write = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read)
            _child(task, write, all_ids, memory)
        os.close(write)

    def result(self) -> Any:
        """Wait for it; what ``task`` returned, or raised, as of :func:`apart`. For one call only."""
        with open(self._read, "rb") as f:
            text = f.read()
        self._reap()
        answer: dict[str, Any] = json.loads(text) if text else {"message": "a process of imgrun's was killed"}
        if "result" in answer:
            return answer["result"]
        kind = getattr(errors, answer.get("error", "HostError"), HostError)
        raise kind(answer["message"], answer.get("hint") or "try again")

    def cancel(self) -> None:
        """End it, if nobody has waited for it."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.close(self._read)
            self._reap()

    def _reap(self) -> None:
        os.waitpid(self._pid, 0)
        self._pid = 0


def _child(task: Callable[[], Any], write: int, all_ids: bool, memory: int | None) -> NoReturn:
    answer: dict[str, Any]
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        if all_ids:
            _become_root()
        if memory is not None:
            _limit(memory)
        answer = {"result": task()}
    except ImgrunError as e:
        answer = {"error": type(e).__name__, "message": e.message, "hint": e.hint}
    except MemoryError:
        answer = {"message": "it would take more memory than it should"}
    except Exception as e:  # noqa: BLE001 - the caller must hear of it
        if os.environ.get("IMGRUN_DEBUG"):
            import traceback

            traceback.print_exc()
        answer = {"message": f"{type(e).__name__}: {e}"}
    except BaseException:  # noqa: BLE001
        answer = {"message": "interrupted"}
    try:
        with open(write, "wb") as f:
            f.write(json.dumps(answer).encode())
    finally:
        os._exit(0)


def _become_root() -> None:
    """What a job left may belong to any of the ids it had."""
    from imgrun.isolation import rootless

    if not rootless.is_host_root():
        rootless.enter()


def _limit(memory: int) -> None:
    import resource

    with open("/proc/self/statm", "rb") as f:
        now = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
