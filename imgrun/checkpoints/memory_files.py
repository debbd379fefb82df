"""What a job keeps in memory file systems: saved, and put back, by a process in its mount namespace, as tar archives.

CRIU does not save what mounts hold. Holes stay holes: what a job has not written takes no memory when it is put back either.
"""

from __future__ import annotations

import os
import tarfile

from imgrun.checkpoints.archive import Writer, attributes_of
from imgrun.checkpoints.criu_process import IMAGES
from imgrun.checkpoints.digests import DIRECTORY, walk

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def save(places: list[str]) -> None:
    for number, place in enumerate(places):
        top = os.open(place, DIRECTORY)
        sink = os.open(f"{IMAGES}/memory-{number}.tar", NEW, 0o600)
        try:
            writer = Writer(sink)
            for entry in walk(top, ["."], os.fstat(top).st_dev):  # and nothing of what is bound into it
                writer.add(entry, entry.path)
            writer.end()
        finally:
            os.close(sink)
            os.close(top)


def restore(places: list[str]) -> None:
    for number, place in enumerate(places):
        # "r:", for to see whether it is compressed takes modules, and nothing is imported in a job.
        with tarfile.open(f"{IMAGES}/memory-{number}.tar", "r:", encoding="utf-8", errors="surrogateescape") as tar:
            # All of it as it was; what it can do wrong it does inside the job.
            tar.extraction_filter = lambda member, _path: member
            tar.extractall(place, numeric_owner=True)  # names of users would be looked up by libraries of the job's own root
            for member in tar:
                for key, value in attributes_of(member):
                    os.setxattr(f"{place}/{member.name}", key, value, follow_symlinks=False)
