"""Desks: where an ordinary user works, with no privilege at all. One is this host, another a root of apptainer's own.

A desk is a mount (and for another root a PID) namespace. In it /dev/fuse may be opened by everyone, as udev has it on a
usual host, and ``Desk.shared`` is the same directory on each. The host's own nodes and mounts stay as they are.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness import Unavailable
from bench.place import Place
from bench.rooms import PATH, Room, build_program

NAME = "imgrun-bench"
NODES = """
    mount -t tmpfs -o mode=755 nodes /mnt
    mknod -m 666 /mnt/fuse c 10 229
    mount --bind /mnt/fuse {root}/dev/fuse
    umount --lazy /mnt
"""
SHARED = "mkdir -p {root}{shared} && mount --bind {shared} {root}{shared} && mount --rbind {images} {root}{shared}/images"
OTHER = """
    mount --rbind {root} {root} && mount -t proc proc {root}/proc && mount --rbind /sys {root}/sys
    mount -t tmpfs -o mode=755 dev {root}/dev && mkdir {root}/dev/pts {root}/dev/shm
    for node in null zero full random urandom tty; do touch {root}/dev/$node && mount --bind /dev/$node {root}/dev/$node; done
    touch {root}/dev/fuse
    for file in passwd group subuid subgid resolv.conf hosts; do
        touch {root}/etc/$file && mount --bind /etc/$file {root}/etc/$file
    done
    for place in tmp home; do mount -t tmpfs -o mode=1777 $place {root}/$place; done
"""
ENTER = "cd {root} && pivot_root . . && umount --lazy . && cd /"


class Desk:
    """Open one by :func:`desks`."""

    def __init__(self, place: Place, user: pwd.struct_passwd, shared: str, pid: int) -> None:
        self.place = place
        self.user = user
        self.shared = shared
        self._pid = pid

    @property
    def images(self) -> str:
        """Where the images of the cache are here."""
        return f"{self.shared}/images"

    def words(self, *command: str) -> list[str]:
        """What runs a command at this desk as the user."""
        space = f"/proc/{self._pid}/ns"
        ids = (f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--init-groups", "--inh-caps=-all")
        home = f"{self.shared}/home"
        environment = (f"HOME={home}", f"USER={NAME}", f"PATH={PATH}", f"IMGRUN_STATE_DIR={self.shared}/state")
        return [
            "nsenter", f"--mount={space}/mnt", f"--pid={space}/pid", "--",
            "setpriv", *ids, "--", "env", "-i", "-C", home, *environment, *command,
        ]  # fmt: skip

    def room(self, *command: str) -> Room:
        """The work program, which ``command`` runs with its own path as the last word."""
        words, ours = os.pipe()
        answers, theirs = os.pipe()
        process = subprocess.Popen(
            self.words(*command, f"{self.shared}/work"), stdin=words, stdout=theirs, stderr=subprocess.PIPE, text=True
        )
        os.close(words)
        os.close(theirs)
        room = Room(ours, answers, process.communicate)
        try:
            room.ask("run", "true")
        except Unavailable as e:
            room.close()
            assert process.stderr is not None
            raise Unavailable(str(e)) from e
        return room


@contextmanager
def desks(place: Place, *roots: str) -> Iterator[list[Desk]]:
    """A desk at this host, and one in each of these roots, for one user, who is made for the time."""
    user, made = _user()
    shared = f"{place.short}/shared"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        os.chmod(place.short, 0o755)
        for directory in (shared, f"{shared}/images", f"{shared}/home", f"{shared}/state"):
            os.mkdir(directory, 0o755)
        for directory in ("home", "state"):
            os.chown(f"{shared}/{directory}", user.pw_uid, user.pw_gid)
        shutil.copy(build_program(place), f"{shared}/work")
        found = []
        for root in ("", *roots):
            script = "\n".join([OTHER, SHARED, NODES, ENTER] if root else [SHARED, NODES])
            script = script.format(root=root, shared=shared, images=place.cache)
            process = subprocess.Popen(
                [
                    "unshare", "--mount", *(["--pid", "--fork", "--kill-child"] if root else []), "--propagation", "private",
                    "sh", "-euc", f"{script}\necho $$; exec cat",
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            processes.append(process)
            assert process.stdout is not None
            if not process.stdout.readline():
                raise Unavailable(f"no namespace with the root {root or '/'} could be made")
            found.append(Desk(place, user, shared, _youngest(process.pid)))
        yield found
    finally:
        for process in processes:
            process.communicate()
        if made:
            subprocess.run(["userdel", "--remove", NAME], check=False, capture_output=True)


def _user() -> tuple[pwd.struct_passwd, bool]:
    """The user, and whether it was made now. useradd gives it subordinate ids."""
    try:
        return pwd.getpwnam(NAME), False
    except KeyError:
        subprocess.run(["useradd", "--create-home", NAME], check=True, capture_output=True)
        return pwd.getpwnam(NAME), True


def _youngest(pid: int) -> int:
    """The process itself, or the child that it made."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as f:
        children = f.read().split()
    return int(children[0]) if children else pid
