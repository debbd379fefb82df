"""Which inode /proc/PID/maps shows of a mapped file on an overlay: on older kernels that of the layer below.

CRIU without the host's root compares it with that of stat(2), and they must agree (imgrun.criu). On kernels that show the
overlay's own they do with ``xino=on``; on the others (6.1 was seen) with ``xino=off``, which leaves the layer's numbers.
"""

from __future__ import annotations

import mmap
import os

from imgrun.isolation.mounts import new_filesystem


def xino(stage: int) -> str:
    """``on`` or ``off``, by a look at a mapped file. The current directory, ``stage``, has the image at ``lower``.

    Raises OSError when such an overlay cannot be mounted.
    """
    os.mkdir("look", 0o755, dir_fd=stage)
    made = os.open("look/file", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=stage)
    os.write(made, b"x")
    os.close(made)
    # Two file systems, since the overlay numbers the files of a single one as that does.
    overlay = new_filesystem("overlay", {"lowerdir": "look:lower", "xino": "on", "userxattr": None})
    try:
        file = os.open("file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=overlay)
    finally:
        os.close(overlay)
    try:
        with mmap.mmap(file, 1, prot=mmap.PROT_READ), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            number = str(os.fstat(file).st_ino)
            return "on" if any(line.split(maxsplit=5)[4] == number for line in maps) else "off"
    finally:
        os.close(file)
