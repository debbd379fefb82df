"""Image and scratch as one root without the kernel's overlay: fuse-overlayfs, for hosts that refuse the other to users.

Sources: Documentation/filesystems/overlayfs.rst, fuse-overlayfs(1).
"""

from __future__ import annotations

import os

from imgrun import syscalls as sc
from imgrun.errors import HostError
from imgrun.helper import Helper, find_program
from imgrun.isolation.mounts import tmpfs
from imgrun.storage import fuse
from imgrun.storage.scratch import Scratch


def needed(scratch: Scratch, *, mounts_below: bool) -> str:
    """Why the kernel's overlay cannot be used with this scratch, a directory, in words; empty when it can.

    ``mounts_below`` says that the lower layer has mounts in it: the kernel would uncover what they hide, and so refuses.
    """
    if mounts_below:
        return "the kernel refuses an overlay on a directory with mounts below it"
    if os.environ.get("IMGRUN_OVERLAY") == "fuse" or not _kernel_can(scratch.path):
        return "the kernel refuses an overlay here"
    return ""


def _kernel_can(scratch: str) -> bool:
    """Whether the kernel makes an overlay for us with these directories. It is not mounted."""
    try:
        fs = sc.fsopen("overlay")
    except OSError:
        return False
    try:
        for option, name in (("lowerdir", "tmp"), ("upperdir", "upper"), ("workdir", "work")):
            sc.fsconfig(fs, option, f"{scratch}/{name}")
        sc.fsconfig(fs, "userxattr", None)
        sc.fsconfig_create(fs)
        return True
    except OSError:
        return False
    finally:
        os.close(fs)


def _cover_proc(directory: str) -> None:
    """Hide each /proc mounted below ``directory``: its files are opened by the server, which may look into the caller."""
    with open("/proc/self/mountinfo", "rb") as table:
        lines = [line.split(b" ") for line in table]
    for fields in lines:
        point = os.fsdecode(fields[4])
        for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(escaped, character)
        if point.startswith(f"{directory}/") and fields[fields.index(b"-") + 1] == b"proc":
            empty = tmpfs(4096, 0o555)
            sc.move_mount(empty, point)
            os.close(empty)


def serve(image_fd: int, scratch: Scratch, directory: str, why: str) -> tuple[int, Helper]:
    """Serve the union of the mount ``image_fd`` and the scratch; returns a detached mount of it, and the server.

    Takes ``image_fd`` over. Raises HostError, with ``why`` it is needed, when fuse-overlayfs is not installed or cannot
    do it.
    """
    program = find_program("fuse-overlayfs")
    if program is None:
        raise HostError(
            f"{why}, and fuse-overlayfs is not installed",
            "install fuse-overlayfs, use --writable on a copy of the image, or set IMGRUN_STATE_DIR to a local disk",
        )
    fuse.check_device()
    places = {name: f"{directory}/{name}" for name in ("lower", "layers", "union")}
    for path in places.values():
        os.mkdir(path, 0o700)
    layers = scratch.mount()
    try:
        sc.move_mount(image_fd, places["lower"])
        _cover_proc(places["lower"])
        sc.move_mount(layers, places["layers"])
        options = f"lowerdir={places['lower']},upperdir={places['layers']}/upper,workdir={places['layers']}/work"
        argv = [program, "-f", "-o", options + ",allow_other", places["union"]]
        return fuse.start(argv, places["union"], f"{directory}/union.log", "the job's root")
    finally:
        os.close(layers)
        os.close(image_fd)
        for name in ("lower", "layers"):
            try:
                sc.umount(places[name], sc.MNT_DETACH)
            except OSError:
                pass
            os.rmdir(places[name])
