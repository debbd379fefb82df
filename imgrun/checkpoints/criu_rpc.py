"""What is asked of CRIU: a dump, rounds of memory before it, a restore at once or lazily, and what it can do here.

Sources: criu(8), the RPC definitions of its release (images/rpc.proto).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from imgrun.checkpoints.criu_log import explain
from imgrun.criu import FETCH, IMAGES, REAPER, Session, Site
from imgrun.errors import CheckpointError, RestoreError

CPU_FEATURES = 1 | 4
"""Of the processor, its way to save floating point registers and its instructions must be there again (criu(8))."""
GHOST_LIMIT = 256 << 20
"""Bytes of an unlinked but open file that is saved with the processes; larger ones make the dump fail."""
WATCHED = ("/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/run", "/opt")
"""Where a file that is watched by inotify is looked for, beside /etc and /var, when the kernel does not say its path."""
STATISTICS = "stats-dump"
EARLIER = "stats-rounds"
MOST_ROUNDS = 6
ENOUGH = 8 << 20
"""Bytes of memory that are saved in less time than a round takes."""


def options(site: Site, log: str) -> Any:
    """What dump and restore have in common."""
    import pycriu.rpc_pb2 as rpc

    opts = rpc.criu_opts(images_dir_fd=-1)
    opts.images_dir = IMAGES
    opts.log_level = 4
    opts.log_file = os.path.basename(log)
    opts.unprivileged = site.userns
    opts.manage_cgroups = False
    opts.manage_cgroups_mode = rpc.IGNORE
    opts.network_lock = rpc.SKIP
    opts.tcp_established = True
    opts.file_locks = True
    opts.link_remap = True
    opts.irmap_scan_paths.extend(WATCHED)
    opts.ghost_limit = GHOST_LIMIT
    opts.notify_scripts = True
    opts.cpu_cap = CPU_FEATURES
    return opts


def can(session: Session, feature: str) -> bool:
    """Whether CRIU has a feature here: ``mem_track``, ``lazy_pages``."""
    import pycriu.rpc_pb2 as rpc

    request = rpc.criu_req(type=rpc.FEATURE_CHECK, keep_open=True)
    setattr(request.features, feature, True)
    response = session.run(request, lambda script: None)
    return response is not None and bool(getattr(response.features, feature))


class Dump(NamedTuple):
    """One dump of the tree."""

    log: str
    kept: str
    """Where the log will be found after a failure."""
    images: str
    """The directory that CRIU writes to, as it is seen outside of the job."""
    rounds: int
    """Before it, in which memory is saved while the tree runs; -1 for as many as are worth it."""
    mark: Callable[[str], None]
    """Is told of each step that has ended."""
    warn: Callable[[str], None]

    def run(self, site: Site, *, frozen: Callable[[Session], None]) -> None:
        """Save the tree. ``frozen`` is called while every process of it stands still, with its memory saved.

        When ``frozen`` returns, the tree runs on, unless ``frozen`` has killed it, CRIU included: its images are complete
        by then. When ``frozen`` raises, the tree runs on. Raises CheckpointError; the job then runs on as if nothing had
        been.
        """
        import pycriu.rpc_pb2 as rpc

        session = Session(site)
        self.mark("start of CRIU")
        complete = False
        try:
            parent = self._pre_dump(session, site) if self.rounds else None
            request = self._request(rpc.DUMP, site, self.log)
            request.opts.leave_running = True
            if parent is not None:
                request.opts.track_mem = True
                request.opts.parent_img = parent

            def on_notify(script: str) -> None:
                nonlocal complete
                if script == "post-dump":
                    frozen(session)
                    complete = True

            response = session.run(request, on_notify)
            if not complete:
                raise self._failure(response, self.log)
        finally:
            session.close()

    def _request(self, kind: int, site: Site, log: str) -> Any:
        import pycriu.rpc_pb2 as rpc

        request = rpc.criu_req(type=kind)
        request.opts.CopyFrom(options(site, log))
        request.opts.pid = REAPER
        return request

    def _failure(self, response: Any, log: str) -> CheckpointError:
        cause = "it was killed" if response is None else explain(log, response.cr_errmsg)
        return CheckpointError(f"CRIU could not save the job's processes: {cause}", f"its log is {self.kept}")

    def _pre_dump(self, session: Session, site: Site) -> str | None:
        """Save memory in rounds while the tree runs, each what has changed since the one before; the last one's place."""
        import pycriu.rpc_pb2 as rpc

        if not can(session, "mem_track"):
            self.warn("this kernel does not track changed memory (CONFIG_MEM_SOFT_DIRTY): no --pre-dump, all is saved at once")
            return None
        before = 0
        for number in range(1, (self.rounds if self.rounds > 0 else MOST_ROUNDS) + 1):
            place = f"{self.images}/pre-{number}"
            os.mkdir(place, 0o700)
            log = f"{os.path.dirname(self.log)}/pre-{number}.log"
            request = self._request(rpc.PRE_DUMP, site, log)
            request.opts.images_dir = f"{IMAGES}/pre-{number}"
            request.opts.track_mem = True
            if number > 1:
                request.opts.parent_img = f"../pre-{number - 1}"
            response = session.run(request, lambda script: None)
            if response is None or not response.success:
                raise self._failure(response, log)
            size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(place))
            self.mark(f"memory beforehand, round {number}: {size >> 20} MiB")
            if self.rounds < 0 and (size < ENOUGH or (number > 1 and size > before // 2)):
                break  # another round would not make it less
            before = size
        work = os.path.dirname(self.log)
        os.rename(f"{work}/{STATISTICS}", f"{work}/{EARLIER}")
        return f"pre-{number}"


def statistics(work: str) -> dict[str, Any]:
    """What CRIU counted of its last dump, from its directory ``work``: times in seconds, pages of 4 KiB.

    What is not known is None.
    """
    names = {
        "freezing_seconds": "freezing_time", "frozen_seconds": "frozen_time", "memory_seconds": "memdump_time",
        "writing_seconds": "memwrite_time", "pages_scanned": "pages_scanned", "pages_written": "pages_written",
        "pages_in_earlier_rounds": "pages_skipped_parent",
    }  # fmt: skip
    found, earlier = _counts(f"{work}/{STATISTICS}"), _counts(f"{work}/{EARLIER}")
    result: dict[str, Any] = {}
    for name, theirs in names.items():
        value = found.get(theirs)
        if value is not None:
            # It goes on counting from one dump of a session to the next.
            value = max(value - earlier.get(theirs, 0), 0)
        result[name] = value / 1e6 if value is not None and name.endswith("_seconds") else value
    return result


def _counts(path: str) -> dict[str, int]:
    import pycriu

    try:
        with open(path, "rb") as f:
            found: dict[str, int] = pycriu.images.load(f)["entries"][0]["dump"]
            return found
    except (OSError, LookupError, ValueError, pycriu.images.MagicException):
        return {}  # a checkpoint is as good without them


def restore(site: Site, *, before: Callable[[], None], log: str, lazy: bool) -> tuple[int, str | None]:
    """Bring the tree back to life, as it was. Raises RestoreError; nothing of it runs then.

    With ``lazy`` it runs before its memory is read. Returns the pid of the child that stays until all of it is, or 0; and
    why it was not lazy, where that was asked for and could not be.
    """
    import pycriu.rpc_pb2 as rpc

    session = Session(site, before=before)
    why = None
    try:
        request = rpc.criu_req(type=rpc.RESTORE)
        request.opts.CopyFrom(options(site, log))
        for key, fd in site.inherit.items():
            request.opts.inherit_fd.add(key=key, fd=fd)
        if lazy:
            why = None if can(session, "lazy_pages") else LAZY_NEEDS
            if why is None:
                try:
                    session.in_job(FETCH)
                except CheckpointError as e:
                    raise RestoreError(e.message, "restore without --lazy") from e
                request.opts.lazy_pages = True
        response = session.run(request, lambda script: None)
        if response is None or not response.success:
            cause = "it was killed" if response is None else explain(log, response.cr_errmsg)
            raise RestoreError(f"CRIU could not bring the job's processes back: {cause}", f"its log is {log}")
        return (session.leave() if lazy and why is None else 0), why
    finally:
        session.close()


LAZY_NEEDS = (
    "its memory is read first, not lazily: in a user namespace that needs the setting vm.unprivileged_userfaultfd=1 "
    "(else root with --userns off), and a kernel with userfaultfd"
)
