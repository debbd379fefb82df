"""What is asked of CRIU: a dump, rounds of memory before it, a restore at once or lazily, and what it can do here.

Sources: criu(8), the RPC definitions of its release (images/rpc.proto).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from imgrun.checkpoints import criu_messages as messages
from imgrun.checkpoints.ahead import Ahead
from imgrun.checkpoints.criu_log import PASSING, explain
from imgrun.checkpoints.criu_messages import Response, Value
from imgrun.checkpoints.criu_process import FETCH_LOG, IMAGES, log_level
from imgrun.checkpoints.lazily import Granter, Lazily
from imgrun.criu import REAPER, Session, Site
from imgrun.errors import CheckpointError, RestoreError
from imgrun.storage.trees import remove_tree

CPU_FEATURES = 1 | 4
"""Of the processor, its way to save floating point registers and its instructions must be there again (criu(8))."""
GHOST_LIMIT = 256 << 20
"""Bytes of an unlinked but open file that is saved with the processes; larger ones make the dump fail."""
WATCHED = ("/tmp", "/var/tmp", "/dev/shm", "/root", "/home", "/srv", "/run", "/opt")
"""Where a file that is watched by inotify is looked for, beside /etc and /var, when the kernel does not say its path."""
STATISTICS = "stats-dump"
EARLIER = "stats-rounds"
MOST_ROUNDS = 6
TRIES = 20
PAUSE = 0.05
"""Seconds between two of them."""
ENOUGH = 8 << 20
"""Bytes of memory that are saved in less time than a round takes."""


def options(site: Site, log: str) -> dict[str, Value]:
    """What dump and restore have in common."""
    return {
        "images_dir_fd": -1,
        "images_dir": IMAGES,
        "log_level": log_level(),
        "log_file": os.path.basename(log),
        "unprivileged": site.userns,
        "manage_cgroups": False,
        "manage_cgroups_mode": messages.CGROUPS_IGNORE,
        "network_lock": messages.NETWORK_LOCK_SKIP,
        "tcp_established": True,
        "file_locks": True,
        "link_remap": True,
        "irmap_scan_paths": WATCHED,
        "ghost_limit": GHOST_LIMIT,
        "notify_scripts": True,
        "cpu_cap": CPU_FEATURES,
    }


def can(session: Session, feature: str) -> bool:
    """Whether CRIU has a feature here: ``mem_track``, ``lazy_pages``."""
    response = session.run(messages.feature_check(feature))
    return response is not None and feature in response.features


class _Passing(CheckpointError):
    """It may be otherwise in a moment."""


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
    ahead: Ahead
    """Is begun when CRIU runs."""
    prepare: Callable[[], None]
    """Is called while CRIU is being started."""
    inside: Callable[[], None]
    """Is what the session does in the job's mount namespace."""

    def run(self, site: Callable[[], Site], *, frozen: Callable[[Session], bool]) -> Session:
        """Save the tree at a ``site``, made for each try: what passes in a moment is waited for.

        ``frozen`` is called while every process of it stands still, with its memory saved. When it returns, the tree runs
        on, unless it says that it has killed it, CRIU included: the images are complete by then. When it raises, the tree
        runs on. Returns the session, which is ending and has to be closed. Raises CheckpointError; the job then runs on as
        if nothing had been.
        """
        for _ in range(TRIES):
            try:
                return self._try(site(), frozen)
            except _Passing:
                self.ahead.stop()
                for name in os.listdir(self.images):
                    remove_tree(f"{self.images}/{name}")
                time.sleep(PAUSE)
        return self._try(site(), frozen)

    def _try(self, site: Site, frozen: Callable[[Session], bool]) -> Session:
        session = Session(site, meanwhile=self._meanwhile, inside=self.inside)
        ended = False
        try:
            self.ahead.start()  # not before: a process with threads cannot be forked
            self.mark("start of CRIU")
            parent = self._pre_dump(session, site) if self.rounds else None
            asked = options(site, self.log) | {"pid": REAPER, "leave_running": True}
            if parent is not None:
                asked |= {"track_mem": True, "parent_img": parent}

            def on_notify(script: str) -> None:
                nonlocal ended
                if script == "post-dump":
                    ended = frozen(session)

            response = session.run(messages.request(messages.DUMP, asked), on_notify)
            # If CRIU is gone, the tree may have run on while the rest was saved.
            if not ended and (response is None or not response.success):
                raise self._failure(response, self.log)
        except BaseException:
            session.close()
            raise
        session.end()
        return session

    def _meanwhile(self) -> None:
        messages.load()
        self.prepare()

    def _failure(self, response: Response | None, log: str) -> CheckpointError:
        cause = "it was killed" if response is None else explain(log, response.message)
        kind = _Passing if PASSING in cause else CheckpointError
        return kind(f"CRIU could not save the job's processes: {cause}", f"its log is {self.kept}")

    def _pre_dump(self, session: Session, site: Site) -> str | None:
        """Save memory in rounds while the tree runs, each what has changed since the one before; the last one's place."""
        if not can(session, "mem_track"):
            self.warn("this kernel does not track changed memory (CONFIG_MEM_SOFT_DIRTY): no --pre-dump, all is saved at once")
            return None
        before = 0
        for number in range(1, (self.rounds if self.rounds > 0 else MOST_ROUNDS) + 1):
            place = f"{self.images}/pre-{number}"
            os.mkdir(place, 0o700)
            log = f"{os.path.dirname(self.log)}/pre-{number}.log"
            asked = options(site, log) | {"pid": REAPER, "images_dir": f"{IMAGES}/pre-{number}", "track_mem": True}
            if number > 1:
                asked["parent_img"] = f"../pre-{number - 1}"
            response = session.run(messages.request(messages.PRE_DUMP, asked))
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
    found, earlier = messages.statistics(f"{work}/{STATISTICS}"), messages.statistics(f"{work}/{EARLIER}")
    result: dict[str, Any] = {}
    for name, theirs in names.items():
        value = found.get(theirs)
        if value is not None:
            # It goes on counting from one dump of a session to the next.
            value = max(value - earlier.get(theirs, 0), 0)
        result[name] = value / 1e6 if value is not None and name.endswith("_seconds") else value
    return result


def restore(
    site: Site, *, before: Callable[[], Callable[[], None]], log: str, lazily: Lazily | None, restored: Callable[[], None]
) -> int | None:
    """Bring the tree back to life, as it was. Raises RestoreError; nothing of it runs then.

    ``restored`` is called when all is in place and nothing of it runs yet, nor ever does if it raises.
    With ``lazily`` it runs before its memory is read. Returns the pid of the child that stays until all of it is; None where
    it was not lazy, also because it cannot be.
    """
    granter = None if lazily is None or lazily.device < 0 else Granter(lazily.device)
    beside = {} if granter is None else {granter.fileno(): granter.answer}
    given = {} if granter is None else granter.given
    fetch_log = f"{os.path.dirname(log)}/{FETCH_LOG}"
    session = None
    try:
        site = site._replace(fetches=lazily is not None, given=given)
        session = Session(site, before=before, meanwhile=messages.load)
        asked = options(site, log) | {"inherit_fd": [messages.inherited(key, fd) for key, fd in site.inherit.items()]}
        if session.fetches:
            asked["lazy_pages"] = True
        elif granter is not None:
            raise RestoreError(f"its memory cannot be fetched while it runs: {explain(fetch_log)}", "restore without --lazy")

        def on_notify(script: str) -> None:
            if script == "post-restore":
                restored()

        response = session.run(messages.request(messages.RESTORE, asked), on_notify, beside=beside)
        if response is None or not response.success:
            cause = "it was killed" if response is None else explain(log, response.message)
            if response is None and session.fetches:
                cause = explain(fetch_log, cause)  # for then it is killed
            raise RestoreError(f"CRIU could not bring the job's processes back: {cause}")
        return session.leave() if session.fetches else None
    finally:
        if session is not None:
            session.close()
        if granter is not None:
            granter.close()
