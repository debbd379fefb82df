"""How the others run a command in a directory that holds a root file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from glob import glob
from typing import NamedTuple

from bench.harness import Unavailable, last_line, run
from bench.place import Place

Build = Callable[[Place, Sequence[str]], list[str]]


class Peer(NamedTuple):
    """``ways`` give the words that run a command in the place's tree, writing the files they need; one of them may work."""

    ways: tuple[Build, ...]
    clean_up: Callable[[Place], None] = lambda place: None


REFERENCE = "systemd-nspawn -D"
BWRAP = "bwrap"


def bwrap(place: Place, command: Sequence[str]) -> list[str]:
    """All namespaces but the network's, as a job has them."""
    mounts = ["--bind", place.tree, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    return ["bwrap", "--unshare-all", "--share-net", "--hostname", "job", "--die-with-parent", *mounts, *command]


def nspawn(place: Place, command: Sequence[str], *more: str) -> list[str]:
    # No machine registration: there need not be a systemd here. The tree stays as it is.
    flags = ["--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--timezone=off", "--console=pipe"]
    return ["systemd-nspawn", *flags, *more, "-D", place.tree, *command]


def nspawn_like_ours(place: Place, command: Sequence[str]) -> list[str]:
    return nspawn(place, command, "--volatile=overlay", "--private-users=pick", "--private-users-ownership=off")


def _oci(place: Place, command: Sequence[str], runtime: str) -> list[str]:
    bundle = f"{place.directory}/bundle-{runtime}"
    os.makedirs(bundle, exist_ok=True)
    config = f"{bundle}/config.json"
    if not os.path.exists(config):
        subprocess.run([runtime, "spec", "--bundle", bundle], check=True)
    with open(config, encoding="utf-8") as f:
        spec = json.load(f)
    spec["process"] |= {"args": list(command), "terminal": False}
    spec["root"] = {"path": place.tree, "readonly": False}
    with open(config, "w", encoding="utf-8") as f:
        json.dump(spec, f)
    state = f"{place.directory}/state-{runtime}"
    return [runtime, "--root", state, "run", "--bundle", bundle, f"imgrun-bench-{runtime}-{os.getpid()}"]


def runc(place: Place, command: Sequence[str]) -> list[str]:
    return _oci(place, command, "runc")


def crun(place: Place, command: Sequence[str]) -> list[str]:
    return _oci(place, command, "crun")


def podman(place: Place, command: Sequence[str], *more: str) -> list[str]:
    flags = ["--rm", "--network=host", f"--cgroup-parent=/imgrun-bench-{os.getpid()}"]
    return [*_podman(place), "run", *flags, *more, "--rootfs", place.tree, *command]


def podman_with_limits(place: Place, command: Sequence[str]) -> list[str]:
    """Where it may not raise its own limits."""
    return podman(place, command, "--ulimit=nofile=1000:1000", "--ulimit=nproc=1000:1000")


def podman_with_runc(place: Place, command: Sequence[str]) -> list[str]:
    words = podman_with_limits(place, command)
    return [words[0], "--runtime=runc", *words[1:]]


def _podman(place: Place) -> list[str]:
    at = place.short
    return ["podman", f"--root={at}/root", f"--runroot={at}/run", f"--tmpdir={at}/tmp", "--cgroup-manager=cgroupfs"]


def _clean_up_podman(place: Place) -> None:
    """It leaves a mount of its storage on itself, and the parent of its cgroups."""
    subprocess.run(["umount", "--lazy", f"{place.short}/root/overlay"], check=False, stderr=subprocess.DEVNULL)
    for group in glob(f"/sys/fs/cgroup/*/imgrun-bench-{os.getpid()}"):
        for directory, _, _ in os.walk(group, topdown=False):
            _remove_cgroup(directory)


def _remove_cgroup(directory: str) -> None:
    """Its monitor process may be in there for a moment longer."""
    deadline = time.monotonic() + 5
    while True:
        try:
            os.rmdir(directory)
            return
        except OSError as e:
            if time.monotonic() > deadline:
                print(f"bench: cannot remove {directory}: {e.strerror}", file=sys.stderr)
                return
        time.sleep(0.02)


PEERS = {
    REFERENCE: Peer((nspawn,)),
    "systemd-nspawn -D, own user namespace, overlay": Peer((nspawn_like_ours,)),
    "runc run": Peer((runc,)),
    "crun run": Peer((crun,)),
    "podman run --rootfs": Peer((podman, podman_with_limits, podman_with_runc), _clean_up_podman),
    BWRAP: Peer((bwrap,)),
}


def choose(place: Place, name: str) -> Build:
    """The way to run this peer that works here, seen to run a command in the root. Raises Unavailable with its words."""
    reason = ""
    for way in PEERS[name].ways:
        try:
            # An exit status that only the command itself can have given.
            ended = run(way(place, ["/bin/sh", "-c", "test -e /etc/os-release && exit 42"]))
        except FileNotFoundError as e:
            raise Unavailable(f"{e.filename} is not installed") from e
        if ended.code == 42:
            return way
        reason = last_line(ended.stderr)
    raise Unavailable(f"it refuses on this host: {reason}")
