"""The control socket of a running job: other imgrun commands ask its supervisor for things there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from imgrun.channel import Channel, accept, listen
from imgrun.errors import HostError, ImgrunError

Answer = Callable[[dict[str, Any], Channel, list[int]], dict[str, Any] | None]
"""What does a request, which came with descriptors; None when the answer comes later, by the channel."""


class Control:
    """The socket and those who are connected to it; nobody but root and the job's owner is heard."""

    def __init__(self, directory: str, answer: Answer) -> None:
        self._answer = answer
        self._askers: dict[int, Channel] = {}
        here = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Through the descriptor: a socket's address has room for 107 bytes only.
            self._socket = listen(f"/proc/self/fd/{here}/control")
        except OSError as e:
            raise HostError(f"cannot make the control socket {directory}/control: {e.strerror}", "set IMGRUN_STATE_DIR") from e
        finally:
            os.close(here)

    def handlers(self) -> Iterable[tuple[int, Callable[[], None]]]:
        """The descriptors to be polled for input, and what to call when there is some."""
        yield self._socket.fileno(), self._admit
        for fd, asker in self._askers.items():
            yield fd, lambda asker=asker: self._serve(asker)  # type: ignore[misc]

    def _admit(self) -> None:
        channel = accept(self._socket)
        if channel.peer_uid() not in (0, os.geteuid()):
            channel.close()
            return
        self._askers[channel.fileno()] = channel

    def _serve(self, asker: Channel) -> None:
        try:
            received = asker.receive()
        except (OSError, ValueError):
            received = None
        if received is None:
            del self._askers[asker.fileno()]
            asker.close()
            return
        message, fds = received
        try:
            answer = self._answer(message, asker, fds)
        except ImgrunError as e:
            answer = {"error": type(e).__name__, "message": e.message, "hint": e.hint}
        except (KeyError, TypeError, ValueError, OSError) as e:
            answer = {"error": f"malformed request: {e}"}  # whatever was asked, the job goes on
        finally:
            for fd in fds:
                os.close(fd)
        if answer is not None:
            try:
                asker.send(answer)
            except OSError:
                pass  # whoever asked has gone

    def close(self) -> None:
        self._socket.close()
