"""What is said to CRIU and what it says (its images/rpc.proto), through its own Python package, pycriu.

Importing that takes longer than saving a small job does, so it is not done before it is needed; see :func:`load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

DUMP, RESTORE, PRE_DUMP, NOTIFY, FEATURE_CHECK = 1, 2, 4, 6, 9
"""Kinds of requests, and of what is received."""
CGROUPS_IGNORE = 0
NETWORK_LOCK_SKIP = 3
FEATURES = ("mem_track", "lazy_pages")

Value = int | str | Sequence[str] | Sequence[Mapping[str, int | str]]


class Response(NamedTuple):
    """What CRIU says: how a request went, or with ``NOTIFY`` how far it is."""

    kind: int
    success: bool
    script: str
    """Of a notification: what is happening."""
    features: frozenset[str]
    message: str

    @classmethod
    def parse(cls, data: bytes) -> Response:
        import pycriu

        said = pycriu.rpc.criu_resp.FromString(data)
        features = frozenset(name for name in FEATURES if getattr(said.features, name))
        return cls(said.type, said.success, said.notify.script, features, said.cr_errmsg)


def load() -> None:
    """Do now what takes long the first time."""
    import pycriu  # noqa: F401


def request(kind: int, options: Mapping[str, Value]) -> bytes:
    """A request of a kind, with options by their names in rpc.proto."""
    import pycriu

    asked: bytes = pycriu.rpc.criu_req(type=kind, opts=pycriu.rpc.criu_opts(**options)).SerializePartialToString()
    return asked


def answer(success: bool) -> bytes:
    """To a notification."""
    import pycriu

    said: bytes = pycriu.rpc.criu_req(type=NOTIFY, notify_success=success).SerializeToString()
    return said


def feature_check(feature: str) -> bytes:
    """Asks whether CRIU has a feature here; it goes on listening."""
    import pycriu

    asked: bytes = pycriu.rpc.criu_req(type=FEATURE_CHECK, keep_open=True, features={feature: True}).SerializeToString()
    return asked


def inherited(key: str, fd: int) -> Mapping[str, int | str]:
    """An ``inherit_fd``: a descriptor of CRIU's for what the dump knew by that key."""
    return {"key": key, "fd": fd}


def statistics(path: str) -> dict[str, int]:
    """What CRIU's file with statistics says of a dump, by the names of images/stats.proto; empty when it says nothing."""
    import pycriu

    try:
        with open(path, "rb") as f:
            found: dict[str, int] = pycriu.images.load(f)["entries"][0]["dump"]
            return found
    except (OSError, LookupError, ValueError, pycriu.images.MagicException):
        return {}  # a checkpoint is as good without them
