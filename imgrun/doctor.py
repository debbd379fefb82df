"""``imgrun doctor``: everything imgrun needs of this host, tried as a job would, and what to do about what is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from imgrun import init_shim, probes
from imgrun import syscalls as sc
from imgrun.checkpoints.identity import HOW_TO_GET_CRIU
from imgrun.errors import ImgrunError
from imgrun.helper import find_program
from imgrun.isolation import network, rootless, security
from imgrun.state import StateRoot
from imgrun.storage import fuse, mount

State = Literal["ok", "limited", "missing"]
LITTLE_SPACE = 256 << 20
FEW_NAMESPACES = 64
ROOT_CAPABILITIES = {
    "SYS_RESOURCE": "hard limits cannot be raised (--rlimit), nor a job be spared by the out-of-memory killer",
    "NET_ADMIN": "--network none and private do not work with --userns off",
    "SYS_PTRACE": "'exec' and checkpoints of other users' jobs do not work",
    "MKNOD": "image builds cannot make device nodes",
    "CHECKPOINT_RESTORE": "checkpoints with --userns off need CAP_SYS_ADMIN instead",
}
"""What root may lack, as in a container, beside what nothing works without; and what that costs."""


class Check(NamedTuple):
    """One need of imgrun's. ``needed``: no job starts without it."""

    name: str
    state: State
    detail: str
    cost: str = ""
    """What does not work, when the state is not ok."""
    advice: str = ""
    needed: bool = False


def examine() -> list[Check]:
    """Try everything. Nothing of the host is changed, except that imgrun's state directory is made."""
    root = rootless.is_host_root()
    state, place = _state_directory()
    namespaces = list(_namespaces(root))
    found = [_kernel(), _caller(root), *namespaces, *_namespace_limits(root), state]
    if root or namespaces[0].state != "missing":
        found += [_mount_api(), _overlay(root, place)]
    found += [*_images(root, place), _loop(root), _fuse(root)]
    found += [*_cgroups(), _clone_into_cgroup(), _pidfd(), _shim(), _blkid(), _mke2fs()]
    found += [_seccomp(), _counters(), _private_network(), _checkpoints()]
    return [*found, _trial(place)]


def works(checks: list[Check]) -> bool:
    """Whether ``imgrun start`` works here."""
    return all(check.state != "missing" for check in checks if check.needed)


def _from(name: str, tried: probes.Tried, cost: str, advice: str, *, needed: bool = False) -> Check:
    if tried.ok:
        return Check(name, "ok", tried.words, needed=needed)
    state: State = "missing" if needed else "limited"
    return Check(name, state, tried.words, cost, tried.hint or advice, needed)


# -- the kernel and the caller -----------------------------------------------------------------------------------------


def _kernel() -> Check:
    host = os.uname()
    detail = f"{host.sysname} {host.release} on {host.machine}"
    if host.machine not in ("x86_64", "aarch64"):
        return Check("kernel", "missing", detail, "imgrun's init is not made for it", "use x86_64 or aarch64", True)
    return Check("kernel", "ok", detail, needed=True)


def _caller(root: bool) -> Check:
    if not root:
        who = "root without rights over the host" if os.geteuid() == 0 else f"an ordinary user, uid {os.geteuid()}"
        return Check("caller", "ok", f"{who}: images are served by FUSE, ids come from a user namespace")
    held = sc.capget()[0]
    lacking = [name for name in ROOT_CAPABILITIES if not held >> security.CAPABILITIES.index(name) & 1]
    if not lacking:
        return Check("caller", "ok", "root, with every capability that imgrun uses")
    detail = f"root without {', '.join(f'CAP_{name}' for name in lacking)}"
    cost = "; ".join(ROOT_CAPABILITIES[name] for name in lacking)
    return Check("caller", "limited", detail, cost, "give them to the container or service that imgrun runs in")


def _namespaces(root: bool) -> Iterator[Check]:
    needs = "no job can be isolated"
    tried = probes.in_child(probes.user_namespace)
    cost = "only --userns off works" if root else needs
    check = _from("user namespace", tried._replace(hint=""), cost, _user_advice(), needed=not root)
    if tried.ok and "no subordinate ids" in tried.words:
        advice = "ask your administrator: usermod --add-subuids and --add-subgids, and the package uidmap"
        check = Check("user namespace", "limited", "made, with a single id", "apt, su and --user fail in jobs", advice, True)
    yield check
    if check.state == "missing":
        return  # what else is tried takes one
    for kind, flag in probes.NAMESPACES.items():
        tried = probes.in_child(lambda flag=flag: probes.namespace(flag))  # type: ignore[misc]
        advice = f"use a kernel with it, and a user.max_{_limit_name(kind)}_namespaces above 0"
        yield _from(f"{kind} namespace", tried, needs, advice, needed=True)


def _limit_name(kind: str) -> str:
    return {"mount": "mnt", "network": "net"}.get(kind, kind.lower())


def _setting(name: str) -> int | None:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as f:
            return int(f.read())
    except (OSError, ValueError):
        return None


def _user_advice() -> str:
    if _setting("kernel/unprivileged_userns_clone") == 0:
        return "ask your administrator: sysctl kernel.unprivileged_userns_clone=1"
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == 1:
        return (
            "ask your administrator: an AppArmor profile for imgrun, or sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return "ask your administrator: sysctl user.max_user_namespaces"


def _namespace_limits(root: bool) -> Iterator[Check]:
    limits = {kind: _setting(f"user/max_{_limit_name(kind)}_namespaces") for kind in ("user", *probes.NAMESPACES)}
    known = {kind: value for kind, value in limits.items() if value is not None}
    few = [kind for kind, value in known.items() if value < FEW_NAMESPACES]
    detail = f"at least {min(known.values())} of each kind" if known else "not told"
    if few:
        detail = ", ".join(f"{kind} {known[kind]}" for kind in few)
        keys = " ".join(f"user.max_{_limit_name(kind)}_namespaces" for kind in few)
        yield Check("namespace limits", "limited", detail, "few jobs can run at a time, or none", f"raise with sysctl: {keys}")
    else:
        yield Check("namespace limits", "ok", detail)
    restricted = _setting("kernel/unprivileged_userns_clone") == 0 or (
        _setting("kernel/apparmor_restrict_unprivileged_userns") == 1
    )
    if root and restricted:
        detail = "user namespaces are for root only on this host"
        yield Check("ordinary users", "limited", detail, "imgrun works for root only", _user_advice())


def _pidfd() -> Check:
    def probe() -> str:
        os.close(os.pidfd_open(os.getpid()))
        return "pidfd_open"

    return _from("pidfd", probes.attempt(probe), "no job can be watched", "use Linux 5.14 or newer", needed=True)


def _mount_api() -> Check:
    tried = probes.in_child(probes.mount_api)
    advice = "use Linux 5.14 or newer; in a container, allow these system calls in its seccomp profile"
    return _from("mount API", tried, "no job can be given its files", advice, needed=True)


# -- storage -----------------------------------------------------------------------------------------------------------


def _state_directory() -> tuple[Check, str | None]:
    """The check, and the directory when it is of use."""
    root = StateRoot()
    name, advice = "state directory", "set IMGRUN_STATE_DIR to a directory of yours on a local disk"
    try:
        root.prepare()
    except ImgrunError as e:
        return Check(name, "missing", e.message, "no job can be recorded", e.hint or advice, True), None
    status = os.statvfs(root.path)
    free = status.f_bavail * status.f_frsize
    detail = f"{root.path} on {probes.file_system_of(root.path)}, {free / (1 << 30):.1f} GiB free"
    if free < LITTLE_SPACE:
        return Check(
            name, "limited", detail, "jobs have little room to write", "free some, or set IMGRUN_STATE_DIR", True
        ), root.path
    return Check(name, "ok", detail, needed=True), root.path


def _overlay(root: bool, state: str | None) -> Check:
    name = "overlay"
    if state is None:
        return Check(name, "limited", "not tried: there is no state directory", "unknown", "see above")
    tried = probes.attempt(lambda: probes.overlay(state))
    if tried.ok:
        return Check(name, "ok", tried.words)
    if root:
        cost = "jobs share the host's ids in their user namespace, or need --userns off or --writable"
        return Check(
            name, "limited", tried.words, cost, tried.hint or "use Linux 5.19 or newer, and ext4, xfs or btrfs for the state"
        )
    if find_program("fuse-overlayfs"):
        return Check(
            name, "limited", f"{tried.words}; fuse-overlayfs is there", "the job's root is slower", "use Linux 5.13 or newer"
        )
    return Check(
        name,
        "missing",
        tried.words,
        "only --writable works",
        "install fuse-overlayfs, or set IMGRUN_STATE_DIR to a local disk",
    )


def _images(root: bool, state: str | None) -> Iterator[Check]:
    for fstype in probes.MAKERS:
        name, cost = f"{fstype} images", "images of this format cannot be used"
        if not root:
            yield _served(name, fstype, cost)
        elif mount.kernel_has(fstype) is False:
            yield Check(name, "missing", "not in this kernel", cost, f"modprobe {fstype}, or copy such images into ext4")
        elif state is None:
            yield Check(name, "limited", "in this kernel; not tried, as there is no state directory", "unknown", "see above")
        else:
            yield _mounted(name, fstype, state, cost)


def _mounted(name: str, fstype: str, state: str, cost: str) -> Check:
    try:
        return Check(name, "ok", probes.image_format(fstype, state))
    except FileNotFoundError as e:
        return Check(name, "ok", f"in this kernel; {e}")
    except ImgrunError as e:
        if "id-map" in e.message:
            cost = "jobs of such images share the host's ids in their user namespace"
        return Check(name, "limited", e.message, cost, e.hint or "use another format")
    except OSError as e:
        return Check(name, "limited", e.strerror or str(e), cost, "use another format")


def _served(name: str, fstype: str, cost: str) -> Check:
    server = fuse.SERVERS.get(fstype)
    if server is None:
        return Check(name, "missing", "only root can mount it", cost, "make a squashfs of the image's files")
    program = find_program(server.program)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Check(name, "missing", f"{server.program} would serve it by FUSE, which is not available", cost, "see FUSE")
    if program is None:
        return Check(name, "missing", f"{server.program} is not installed", cost, f"install {server.package}")
    return Check(name, "ok", f"served by {program}")


def _loop(root: bool) -> Check:
    name = "loop devices"
    if not root:
        return Check(name, "ok", "not used: FUSE takes their place")

    def probe() -> str:
        import errno

        from imgrun.storage.loop import CONTROL

        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            number = sc.loop_get_free(control)
        finally:
            os.close(control)
        try:
            os.close(os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            raise OSError(e.errno or errno.EIO, f"/dev/loop{number}: {e.strerror}") from e
        return f"{CONTROL}, and /dev/loop{number} is free"

    advice = "modprobe loop; in a container, give it /dev/loop-control and loop devices"
    return _from(name, probes.attempt(probe), "only directories work as images", advice)


def _fuse(root: bool) -> Check:
    def probe() -> str:
        fuse.check_device()
        return "/dev/fuse can be opened"

    cost = "no FUSE in jobs, nor jobs in jobs" if root else "only directories work as images"
    return _from("FUSE", probes.attempt(probe), cost, "modprobe fuse")


def _mke2fs() -> Check:
    program = find_program("mke2fs")
    if program is None:
        return Check("mke2fs", "limited", "not installed", "--scratch-size does not work", "install e2fsprogs")
    return Check("mke2fs", "ok", program)


def _blkid() -> Check:
    def probe() -> str:
        from imgrun.storage.blkid import signature

        with open(__file__, "rb") as f:
            signature(f.fileno(), 0, os.fstat(f.fileno()).st_size, __file__)
        return "reads what a file holds"

    return _from(
        "libblkid", probes.attempt(probe), "image files cannot be told", "install util-linux's libblkid1", needed=True
    )


# -- the rest ----------------------------------------------------------------------------------------------------------


def _shim() -> Check:
    def probe() -> str:
        program = init_shim.program()
        status = os.waitpid(os.posix_spawn(program, [program], {}), 0)[1]
        if os.waitstatus_to_exitcode(status) != 125:
            raise OSError(0, f"{program} does not run as it should (status {status})")
        return program

    return _from("init", probes.attempt(probe), "no job has a first process", "install imgrun again", needed=True)


def _cgroups() -> Iterator[Check]:
    from imgrun.isolation.cgroups.doctor import examine as examine_cgroups

    try:
        findings = examine_cgroups()
    except (ImgrunError, OSError) as e:
        yield Check("cgroups", "limited", str(e), "no limit can be enforced", "see 'imgrun start --debug'")
        return
    for finding in findings:
        state: State = "ok" if finding.ok else "limited"
        cost = "" if finding.ok else "asked for, it refuses the job" if "limit" in finding.name else "not available"
        yield Check(finding.name, state, finding.detail, cost, finding.advice)


def _clone_into_cgroup() -> Check:
    advice = "mount cgroup v2, or start imgrun in a delegated cgroup (systemd-run --user --scope)"
    tried = probes.in_child(probes.clone_into_cgroup)
    return _from("cgroup for each job", tried, "jobs are not accounted or limited as a whole", advice)


def _seccomp() -> Check:
    tried = probes.in_child(probes.seccomp)
    return _from("system call filter", tried, "--seccomp and --userns off do not work", "install libseccomp2 (2.5 or newer)")


def _counters() -> Check:
    from imgrun.pmu.counters import Counters, explain

    name, paranoid = "hardware counters", _setting("kernel/perf_event_paranoid")
    setting = f"kernel.perf_event_paranoid is {paranoid}"
    cost = "cycles and instructions are null in results; --pmu require fails"
    try:
        counters = Counters.of_process(os.getpid())
    except OSError as e:
        return Check(name, "limited", e.strerror or str(e), cost, "sysctl kernel.perf_event_paranoid=2 or less")
    try:
        refused = {event: explain(number) for event, number in counters.refused.items()}
    finally:
        counters.close()
    reasons: dict[str, list[str]] = {}
    for event, reason in refused.items():
        reasons.setdefault(reason, []).append(event)
    told = "; ".join([*(f"no {', '.join(events)}: {reason}" for reason, events in reasons.items()), setting])
    missing = next((event for event in ("cycles", "instructions") if event in refused), None)
    if missing is None:
        return Check(name, "ok", told if reasons else f"every event; {setting}")
    absent = "no such counter" in refused[missing]
    advice = "run on hardware, or a virtual machine with a PMU" if absent else "sysctl kernel.perf_event_paranoid=2 or less"
    return Check(name, "limited", told, cost, advice)


def _private_network() -> Check:
    tried = probes.attempt(network.find_pasta)
    return _from("private network", tried, "--network private does not work", "install passt")


def _checkpoints() -> Check:
    name, cost = "checkpoints", "jobs cannot be frozen and continued"
    try:
        import imgrun_criu

        return Check(name, "ok", f"CRIU {imgrun_criu.build()['version']}, of imgrun-criu")
    except ImportError:
        pass
    except Exception as e:  # noqa: BLE001 - someone else's package: whatever is wrong with it
        return Check(name, "limited", f"imgrun-criu is damaged: {e}", cost, "install it again")
    program = find_program("criu")
    detail = "imgrun-criu is not installed" + (f"; {program} is not used, as it cannot be taken into a job" if program else "")
    return Check(name, "limited", detail, cost, HOW_TO_GET_CRIU)


def _trial(state: str | None) -> Check:
    """A job, from start to end, in a directory with one program."""
    name = "a job"
    if state is None:
        return Check(name, "missing", "not tried: there is no state directory", "nothing starts", "see above", True)
    tried = probes.attempt(lambda: probes.trial_job(state))
    return _from(name, tried, "nothing starts", "see what is missing above", needed=True)


Reporter = Callable[[str], None]


def report(checks: list[Check], say: Reporter) -> None:
    """For people: a line for each need, and one with the cost and the advice where it is not met."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        say(f"{check.state:<8} {check.name:<{width}}  {check.detail}")
        if check.state != "ok":
            say(f"{'':<8} {'':<{width}}  {'; '.join(filter(None, (check.cost, check.advice)))}")
