"""The plan of a job: from a spec, everything that will be mounted and set up, in order, before anything is done.

One plan serves execution, ``--dry-run`` and the debug log.
"""

from __future__ import annotations

from imgrun.isolation import mounts as m
from imgrun.isolation import system
from imgrun.isolation.network import NAMESERVER
from imgrun.isolation.sources import Bind, HostSys, OtherImage, Source, Union
from imgrun.spec import JobSpec


class Plan:
    """``sources`` are opened by the supervisor, ``operations`` run in the job's namespaces; both in order."""

    def __init__(self, sources: list[Source], operations: list[m.Operation]) -> None:
        self.sources = sources
        self.operations = operations

    def lines(self) -> list[str]:
        """What will be done, a line each, for people."""
        prepared = [f"supervisor: {source.describe()}" for source in self.sources]
        return prepared + [f"job: {operation.describe()}" for operation in self.operations]


def hosts_file(hostname: str) -> bytes:
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n".encode()


def resolv_conf(network: str) -> bytes:
    """The host's own where the network is, else that of the network there is."""
    if network == "none":
        return b"# no network in this job\n"
    if network == "private":
        return f"nameserver {NAMESERVER}\n".encode()
    try:
        with open("/etc/resolv.conf", "rb") as f:
            return f.read(1 << 16)
    except OSError:
        return b"# the host has no /etc/resolv.conf\n"


def build_plan(
    spec: JobSpec,
    *,
    hostname: str,
    base_sources: list[Source],
    cgroup_views: tuple[tuple[str, str], ...],
    owner: tuple[int, int] | None,
    again: bool = False,
    host_ids: bool = False,
) -> Plan:
    """The plan for ``spec``. ``owner`` is the host's ids of the job's user, for id-mapped binds.

    ``again`` is for a job that continues: its files in /etc are among those it brings with it. ``host_ids``:
    the job's root has the host's id 0, which owns most files in /proc and /sys.
    """
    own_network = spec.network != "host"
    sources = [*base_sources, HostSys()]
    ops: list[m.Operation] = [m.Isolate(), m.Scratch()]
    composed = any(isinstance(source, Union) for source in base_sources)
    ops.append(m.Root(ours=composed) if composed or spec.root == "writable" else m.Overlay())
    ops += [system.Proc(), system.Sys(own_network)]
    ops += [system.CgroupView(cgroup_views, writable=spec.init == "image"), system.Dev()]
    if host_ids:
        from imgrun.isolation.security import MASKED_PATHS, READONLY_PATHS

        ops += [system.Hide(path) for path in MASKED_PATHS]
        ops += [system.Protect(path) for path in READONLY_PATHS]
    ops += [m.FromScratch("tmp", "/tmp"), m.FromScratch("var-tmp", "/var/tmp")]
    if spec.init == "image":
        # What systemd would mount if it could; it takes what is there.
        ops += [m.Tmpfs("/run", mode=0o755), m.Tmpfs("/run/lock", size=5 << 20)]
    etc: list[m.Operation] = [
        system.EtcFile("hostname", f"{hostname}\n".encode()),
        system.EtcFile("hosts", hosts_file(hostname)),
        system.EtcFile("resolv.conf", resolv_conf(spec.network)),
    ]
    if not again or spec.root == "writable":
        ops += etc
    # Shorter targets first, so that a mount on a directory never hides one inside it.
    for i, mount in enumerate(sorted(spec.mounts, key=lambda mount: mount.dst.count("/"))):
        if mount.type == "tmpfs":
            ops.append(m.Tmpfs(mount.dst, mount.size))
            continue
        key = f"mount{i}"
        sources.append(Bind(key, mount, owner) if mount.type == "bind" else OtherImage(key, mount))
        ops.append(m.Given(key, mount.dst, mount.describe()))
    if spec.root == "read-only":
        ops.append(m.ReadOnlyRoot())
    ops.append(m.EnterRoot())
    return Plan(sources, ops)
