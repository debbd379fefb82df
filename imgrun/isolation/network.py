"""The job's network: the host's own, a namespace with only loopback, or one of its own through pasta.

Sources: netdevice(7), network_namespaces(7), pasta(1).
"""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from imgrun.errors import HostError, StartError
from imgrun.helper import Helper, find_program

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def bring_loopback_up() -> None:
    """Set ``lo`` up in the calling thread's network namespace. CRIU's own checks need it, as do most programs."""
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("h", fcntl.ioctl(sock.fileno(), SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(sock.fileno(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
    finally:
        sock.close()


NAMESERVER = "169.254.1.1"
"""Where a job with a private network asks for names; pasta passes it on to the host's own servers."""
PASTA_SECONDS = 10.0


def find_pasta() -> str:
    """The path of pasta. Raises HostError when it is not installed."""
    program = find_program("pasta")
    if program is None:
        raise HostError("--network private needs pasta, which is not installed", "install the package passt")
    return program


def connect_private(program: str, pid: int, log: str, *, as_root: bool) -> Helper:
    """Give the network namespace of ``pid`` an address and a way out, by a pasta of the supervisor's.

    Nothing listens for the job on the host, and the host's loopback is not reachable from it. Raises StartError.
    """
    argv = [program, "--foreground", "--quiet", "--config-net", "--no-map-gw", "--dns-forward", NAMESERVER]
    for forward in ("-t", "-u", "-T", "-U"):
        argv += [forward, "none"]
    if as_root:
        argv += ["--runas", "0"]
    # By descriptor: pasta itself may not look into /proc of a process that has more capabilities.
    netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    argv += ["--netns-only", "--netns", f"/proc/self/fd/{netns}"]
    pasta = Helper.run(argv, log, (netns,))
    os.close(netns)
    try:
        if pasta.await_ready(lambda: _has_default_route(pid), PASTA_SECONDS):
            return pasta
        why = pasta.last_words()
    except TimeoutError:
        why = f"nothing happened in {PASTA_SECONDS:g} s; {pasta.last_words()}"
    pasta.close()
    raise StartError(f"pasta could not connect the job's network: {why}", "use --network host or none")


def _has_default_route(pid: int) -> bool:
    """Whether routes beyond loopback exist in the network namespace of ``pid`` (proc(5), /proc/net/route)."""
    for table, column in (("route", 1), ("ipv6_route", 0)):
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as f:
                rows = [line.split() for line in f]
        except OSError:
            continue
        if any(len(row) > column and row[-1] != "lo" and set(row[column]) == {"0"} for row in rows):
            return True
    return False
