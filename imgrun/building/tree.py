"""The last touches to an image's file tree, made from inside it.

Run as a program: ``python -I tree.py DIRECTORY``, with a JSON object on stdin; uses only the standard library, since it
may run in a user namespace and with the directory as its root. There it can use plain paths: whatever symbolic links
the tree holds, they lead nowhere else.

Given: ``files`` (path, content, link, mode), ``remove`` (shell patterns), ``epoch`` (seconds; no file is younger, or
null), ``secret`` (a pattern of what to cut out of apt's sources, or null). Written to stdout: ``bytes`` (content in
whole blocks of 4096 bytes), ``inodes``, ``dropped`` (device nodes and sockets removed). Fails with a line on stderr.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import stat
import sys
from typing import Any

BLOCK = 4096
DIRECTORIES = {
    "/dev": 0o755, "/etc": 0o755, "/proc": 0o555, "/root": 0o700, "/run": 0o755, "/sys": 0o555, "/tmp": 0o1777,
    "/var": 0o755, "/var/tmp": 0o1777,
}  # fmt: skip
HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


def main() -> int:
    request = json.load(sys.stdin)
    os.chroot(sys.argv[1])
    os.chdir("/")
    os.umask(0o022)
    if not any(os.path.isdir(path) for path in ("/usr", "/bin", "/sbin")):
        return fail("holds no root file system: neither /usr nor /bin nor /sbin")
    for pattern in request["remove"]:
        for path in glob.glob(pattern, include_hidden=True):
            if os.path.lexists(path):  # it may have gone already, by another name: through a linked directory
                remove(path)
    for path, mode in DIRECTORIES.items():
        if not os.path.lexists(path):
            os.mkdir(path)
            os.chmod(path, mode)
        elif not os.path.isdir(path):
            return fail(f"{path} is not a directory")
    for name in os.listdir("/dev"):
        remove(f"/dev/{name}")
    forget_identity()
    if request["secret"]:
        cut("/etc/apt/sources.list", request["secret"])
    for entry in request["files"]:
        try:
            put(entry)
        except OSError as error:
            return fail(f"{entry['path']} cannot be written: {error.strerror}")
    os.chown("/", 0, 0)
    os.chmod("/", 0o755)
    json.dump(survey(request["epoch"]), sys.stdout)
    return 0


def fail(words: str) -> int:
    print(f"the content {words}", file=sys.stderr)
    return 1


def remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def forget_identity() -> None:
    """Leave no trace of one machine; keep what a job's own files will be mounted on."""
    for path, content in (("/etc/machine-id", ""), ("/etc/hostname", ""), ("/etc/resolv.conf", "")):
        if not os.path.islink(path):
            put({"path": path, "content": content, "mode": 0o644})
    if not os.path.lexists("/etc/hosts"):
        put({"path": "/etc/hosts", "content": HOSTS, "mode": 0o644})
    if os.path.isfile("/var/lib/dbus/machine-id") and not os.path.islink("/var/lib/dbus/machine-id"):
        put({"path": "/var/lib/dbus/machine-id", "link": "/etc/machine-id"})


def cut(path: str, pattern: str) -> None:
    """Remove what matches the regular expression from a text file, if there is such a file."""
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
        put({"path": path, "content": re.sub(pattern, "", text), "mode": 0o644})


def put(entry: dict[str, Any]) -> None:
    """Write one file or link in place of whatever is there."""
    path = entry["path"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.lexists(path):
        remove(path)
    if entry.get("link") is not None:
        os.symlink(entry["link"], path)
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(entry["content"])
        os.fchmod(fd, entry["mode"])


def survey(epoch: int | None) -> dict[str, int]:
    """Drop device nodes and sockets, bound the times, and measure what is left."""
    content = inodes = dropped = 0
    seen = set()
    for directory, subdirectories, names in os.walk("/", topdown=False):
        for name in names + [name for name in subdirectories if os.path.islink(os.path.join(directory, name))]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            if kind in (stat.S_IFBLK, stat.S_IFCHR, stat.S_IFSOCK):
                os.unlink(path)
                dropped += 1
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            if status.st_nlink > 1:
                seen.add((status.st_dev, status.st_ino))
            inodes += 1
            content += -(-status.st_size // BLOCK) * BLOCK
            bound_time(path, status, epoch)
        status = os.lstat(directory)
        inodes += 1
        content += max(BLOCK, -(-status.st_size // BLOCK) * BLOCK)
        bound_time(directory, status, epoch)
    return {"bytes": content, "inodes": inodes, "dropped": dropped}


def bound_time(path: str, status: os.stat_result, epoch: int | None) -> None:
    if epoch is not None and status.st_mtime > epoch:
        with contextlib.suppress(OSError):
            os.utime(path, (epoch, epoch), follow_symlinks=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(fail(f"has {error.filename}, and that cannot be changed: {error.strerror}"))
