"""Where the record of a job is written: ``--result`` and ``--classad``."""

from __future__ import annotations

import os

from imgrun.errors import ImgrunError, SpecError


def check_place(path: str) -> str:
    """``path`` as an absolute one, once it is seen that something can be written there. Raises SpecError."""
    if own_descriptor(path) is not None:
        return path
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path) and os.access(path, os.W_OK):
        return path
    place = os.path.abspath(path)
    directory = os.path.dirname(place)
    if not path or not os.path.isdir(directory) or os.path.isdir(path):
        raise SpecError(f"cannot write the result to {path or 'no file'}", "give a file in a directory that exists")
    if not os.access(directory, os.W_OK):
        raise SpecError(f"cannot write the result to {path}: no permission", "give a file in a directory of yours")
    return place


def write_whole(path: str, text: str) -> None:
    """Write a file that is complete or absent; a device, a pipe or a descriptor of ours is written to as it is."""
    descriptor = own_descriptor(path)
    as_it_is = descriptor is not None or (os.path.exists(path) and not os.path.isfile(path))
    place = path if as_it_is else f"{path}.{os.urandom(4).hex()}.tmp"
    try:
        # In a directory like /tmp nobody else shall have put a link there.
        with open(place if descriptor is None else os.dup(descriptor), "w" if as_it_is else "x", encoding="utf-8") as f:
            f.write(text)
        if not as_it_is:
            os.rename(place, path)
    except OSError as e:
        try:
            if not as_it_is:
                os.unlink(place)
        except OSError:
            pass
        raise ImgrunError(f"cannot write the result to {path}: {e.strerror}", "the job itself has ended") from e


def own_descriptor(path: str) -> int | None:
    """The descriptor of ours that ``path`` names, if it does. Raises SpecError when our caller has not given us that.

    A file behind it is not ours to replace, nor to be written from its start.
    """
    if path in ("/dev/stdout", "/dev/stderr"):
        return 1 if path == "/dev/stdout" else 2
    directory, _, name = path.rpartition("/")
    if directory not in ("/dev/fd", "/proc/self/fd") or not name.isascii() or not name.isdigit():
        return None
    try:
        given = os.get_inheritable(int(name))  # what we have opened ourselves is not
    except (OSError, OverflowError):
        given = False
    if not given:
        raise SpecError(f"{path} is not open", f"open it: {name}>FILE; or give a file")
    return int(name)
