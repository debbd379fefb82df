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
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(task, write, memory)
    os.close(write)
    with open(read, "rb") as f:
        text = f.read()
    os.waitpid(pid, 0)
    answer: dict[str, Any] = json.loads(text) if text else {"message": "a process of imgrun's was killed"}
    if "result" in answer:
        return answer["result"]
    raise getattr(errors, answer.get("error", "HostError"), HostError)(answer["message"], answer.get("hint") or "try again")


def _child(task: Callable[[], Any], write: int, memory: int | None) -> NoReturn:
    answer: dict[str, Any]
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
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
