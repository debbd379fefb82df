"""What a mounted root holds: which operating system, for which processor, with which init. The root is hostile input.

Every path is resolved with the root as ``/`` (openat2(2), RESOLVE_IN_ROOT), opened without waiting, and read only when
it is a regular file, and only its first bytes.
Sources: os-release(5), elf(5), Documentation/admin-guide/binfmt-misc.rst.
"""

from __future__ import annotations

import os
import signal
import stat
from typing import NamedTuple

from imgrun import passwd
from imgrun import syscalls as sc
from imgrun.errors import CommandNotFound, ImageArchError

INITS = ("/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/bin/init", "/init")
SIGRTMIN = 34
INIT_STOP_SIGNALS = {"systemd": SIGRTMIN + 3, "busybox": int(signal.SIGUSR2)}
"""What makes an init power off: systemd(1), busybox's init; others take SIGPWR (init(8))."""

OS_RELEASE = ("etc/os-release", "usr/lib/os-release")
OS_RELEASE_LIMIT = 64 << 10
PROGRAMS = (
    "bin/sh",
    "usr/bin/env",
    "bin/bash",
    "bin/busybox",
    "sbin/init",
    "usr/lib/systemd/systemd",
    "bin/ls",
    "usr/bin/python3",
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-linux-aarch64.so.1",
    "lib/ld-linux-armhf.so.3",
    "lib64/ld64.so.2",
    "lib/ld64.so.1",
    "lib/ld-linux-riscv64-lp64d.so.1",
    "lib/ld-linux.so.2",
)
HEADER = 128
INSIDE = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS

# e_machine, 64-bit, little-endian -> what uname -m says there. elf(5); values from the ELF machine registry.
MACHINES = {
    (62, True, True): "x86_64",
    (62, False, True): "x86_64",
    (3, False, True): "i686",
    (183, True, True): "aarch64",
    (40, False, True): "armv7l",
    (243, True, True): "riscv64",
    (243, False, True): "riscv32",
    (21, True, True): "ppc64le",
    (21, True, False): "ppc64",
    (20, False, False): "ppc",
    (22, True, False): "s390x",
    (22, False, False): "s390",
    (258, True, True): "loongarch64",
    (8, True, True): "mips64el",
    (8, True, False): "mips64",
    (8, False, True): "mipsel",
    (8, False, False): "mips",
    (50, True, True): "ia64",
    (36902, True, True): "alpha",
}
# What else a kernel runs. 32-bit ARM on aarch64 depends on the processor: not promised, and not refused.
ALSO_RUNS = {
    "x86_64": ("i686",),
    "aarch64": ("armv7l",),
    "ppc64": ("ppc",),
    "s390x": ("s390",),
    "mips64": ("mips",),
    "mips64el": ("mipsel",),
}
BINFMT = "/proc/sys/fs/binfmt_misc"


class OsInfo(NamedTuple):
    """An operating system. Unknown is empty; ``architectures`` are in the names of ``uname -m``, the main one first."""

    name: str
    id: str
    version: str
    architectures: tuple[str, ...]
    header: bytes = b""
    """The first bytes of the program that told the architecture."""


def identify(root_fd: int) -> OsInfo:
    """The operating system in the root that ``root_fd`` (O_PATH does) is open on.

    Programs are looked at until one is for this host, so a usual image costs a read or two.
    """
    release = {}
    for path in OS_RELEASE:
        data = _read(root_fd, path, OS_RELEASE_LIMIT)
        if data is not None:
            release = parse_os_release(data)
            break
    here = host_machine()
    architectures: dict[str, bytes] = {}
    for path in PROGRAMS:
        header = _read(root_fd, path, HEADER) or b""
        machine = machine_of(header)
        if machine:
            architectures.setdefault(machine, header)
        if machine == here:
            break
    name = release.get("PRETTY_NAME") or release.get("NAME", "")
    version = release.get("VERSION_ID", "")
    return OsInfo(name, release.get("ID", ""), version, tuple(architectures), next(iter(architectures.values()), b""))


def has_os_release(root_fd: int) -> bool:
    """Whether this is the root of an operating system, by the rule of os-release(5)."""
    for path in OS_RELEASE:
        try:
            os.close(sc.openat2(path, os.O_PATH, root_fd))
            return True
        except OSError:
            continue
    return False


def check_architecture(os_info: OsInfo) -> None:
    """Raise ImageArchError when none of the image's programs can run here, not even by a registered emulator."""
    if not os_info.architectures:
        return
    here = host_machine()
    runnable = {here, *ALSO_RUNS.get(here, ())}
    if runnable.isdisjoint(os_info.architectures) and not _emulated(os_info.header):
        raise ImageArchError(
            f"the image is for {os_info.architectures[0]}, this host is {here}",
            f"use an image for {here}, or install qemu-user-static with binfmt_misc",
        )


def host_machine() -> str:
    """This host's architecture as a key of ALSO_RUNS: the i386 and ARM families by one name each."""
    machine = os.uname().machine
    if machine in ("i386", "i486", "i586"):
        return "i686"
    if machine.startswith("armv") and machine.endswith("l"):
        return "armv7l"
    return machine


def parse_os_release(data: bytes) -> dict[str, str]:
    """The assignments of os-release(5). Malformed lines are passed over; what cannot be printed is replaced."""
    found: dict[str, str] = {}
    for line in data.decode(errors="replace").splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key.replace("_", "").isalnum() and not key.startswith("#"):
            found[key] = _unquoted(value)[:256]
    return found


def _unquoted(value: str) -> str:
    quote = value[:1]
    if quote in ("'", '"') and len(value) >= 2 and value.endswith(quote):
        value = value[1:-1]
    if quote != "'":
        plain, escaped = [], False
        for c in value:
            escaped = c == "\\" and not escaped
            if not escaped:
                plain.append(c)
        value = "".join(plain)
    return "".join(c if c.isprintable() else "?" for c in value)


def machine_of(header: bytes) -> str | None:
    """The architecture of an ELF file by its first bytes; None when it is none or of an unknown kind."""
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    little = header[5] == 1
    machine = int.from_bytes(header[18:20], "little" if little else "big")
    return MACHINES.get((machine, header[4] == 2, little))


def _read(root_fd: int, path: str, limit: int) -> bytes | None:
    """The first ``limit`` bytes of a regular file in the root; None when there is none that can be read."""
    try:
        fd = sc.openat2(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, root_fd, resolve=INSIDE)
    except OSError:
        return None
    try:
        return os.read(fd, limit) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _emulated(header: bytes) -> bool:
    """Whether binfmt_misc has an interpreter for programs with this header that works in any root (flag F)."""
    try:
        names = os.listdir(BINFMT)
    except OSError:
        return False
    for name in names:
        if name in ("register", "status"):
            continue
        try:
            with open(f"{BINFMT}/{name}", encoding="ascii", errors="replace") as f:
                lines = f.read().splitlines()
        except OSError:
            continue
        entry = dict(line.split(" ", 1) for line in lines if " " in line)
        if "enabled" not in lines or "F" not in entry.get("flags:", "") or "magic" not in entry:
            continue
        if _matches(header, int(entry.get("offset", "0")), entry["magic"], entry.get("mask")):
            return True
    return False


def _matches(header: bytes, offset: int, magic_hex: str, mask_hex: str | None) -> bool:
    magic = bytes.fromhex(magic_hex)
    mask = bytes.fromhex(mask_hex) if mask_hex else b"\xff" * len(magic)
    part = header[offset : offset + len(magic)]
    if len(part) < len(magic):
        return False
    return all(a & m == b & m for a, b, m in zip(part, magic, mask, strict=False))


def find_init(root_fd: int) -> tuple[str, int]:
    """The path of the root's own init, and the signal that makes it power off. Raises CommandNotFound."""
    for path in INITS:
        target = passwd.resolve(root_fd, path)
        if target is not None:
            kind = next((kind for kind in INIT_STOP_SIGNALS if kind in target), None)
            return path, INIT_STOP_SIGNALS[kind] if kind else int(signal.SIGPWR)
    raise CommandNotFound(f"the image has no init ({', '.join(INITS)})", "install one, or use --init shim")
