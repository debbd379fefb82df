"""``imgrun doctor``: what imgrun needs of this host, for this caller, each need tried as a job would have it.

Nothing stays of a trial: what changes a process is tried in a child, what takes a directory has one of its own below the
state directory, which is removed. Only the state directory itself is made where there is none, as by any start.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from imgrun import syscalls as sc
from imgrun.errors import HostError, ImgrunError
from imgrun.helper import find_program
from imgrun.isolation import cgroup, namespaces, rootless, security, sources, userns
from imgrun.isolation.cgroup_place import under_systemd
from imgrun.state import NO_UPPER_LAYER, StateRoot, state_error
from imgrun.storage import fuse, mount, union
from imgrun.storage.scratch import Scratch
from imgrun.storage.trees import remove_tree

Status = Literal["ok", "limited", "missing"]
OLDEST_KERNEL = (5, 14)
PROGRAM_SECONDS = 10.0
SCRATCH_SIZE = 4 << 20
FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "squashfs", "erofs")
NAMESPACES = (
    ("user", sc.CLONE_NEWUSER), ("mnt", sc.CLONE_NEWNS), ("pid", sc.CLONE_NEWPID), ("uts", sc.CLONE_NEWUTS),
    ("ipc", sc.CLONE_NEWIPC), ("cgroup", sc.CLONE_NEWCGROUP), ("net", sc.CLONE_NEWNET),
)  # fmt: skip
ESSENTIAL = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID", "SETPCAP", "MKNOD")
USEFUL = {
    "SYS_RESOURCE": "--rlimit cannot raise a hard limit",
    "SYS_PTRACE": "exec, checkpoint and the accounting of jobs may be refused",
    "NET_ADMIN": "--network private is refused",
}
ANYWHERE = "checked in a container? then the outer one withholds it: its seccomp filter, or its capabilities"


class Need(NamedTuple):
    """One thing imgrun needs. ``required`` says that ``start`` fails without it, for this caller."""

    name: str
    status: Status
    detail: str
    """What was found."""
    costs: str = ""
    """What does not work, or works worse; empty when the need is met."""
    advice: str = ""
    required: bool = False


class Limited(Exception):
    """The need is met in part: what was found, what that costs, what to do."""


class Trial(NamedTuple):
    """How a need is tried: ``run`` returns what it found, or raises Limited, ImgrunError or OSError."""

    name: str
    run: Callable[[], str]
    costs: str
    advice: str
    required: bool = False
    otherwise: Status = "missing"

    def judge(self) -> Need:
        detail, costs, advice, status = "", self.costs, self.advice, self.otherwise
        try:
            return Need(self.name, "ok", self.run(), required=self.required)
        except Limited as e:
            detail, costs, advice = e.args
            status = "limited"
        except ImgrunError as e:
            detail, advice = e.message, e.hint or self.advice
        except OSError as e:
            detail = f"{e.filename}: {e.strerror}" if e.filename else f"refused: {e.strerror}"
        except Exception as e:  # noqa: BLE001 - a host that surprises us is still to be described
            detail = f"it could not be tried: {type(e).__name__}: {e}"
        return Need(self.name, status, detail, costs, advice, self.required)


def works(needs: list[Need]) -> bool:
    """Whether ``start`` works here for this caller."""
    return not any(need.required and need.status == "missing" for need in needs)


def examine() -> list[Need]:
    """Try every need. The caller must have one thread; raises nothing for what a host lacks."""
    host = _Host()
    try:
        needs = [trial.judge() for trial in host.trials()]
    finally:
        host.close()
    place = next(i for i, need in enumerate(needs) if need.name == "performance counters")
    return [*needs[:place], *_cgroups(), *needs[place:]]


def _cgroups() -> list[Need]:
    costs = "what needs it is refused; --limits best-effort goes on without a limit"
    try:
        found = cgroup.doctor()
    except (ImgrunError, OSError, ValueError) as e:
        return [Need("cgroups", "missing", str(e), costs, "mount cgroup v2 at /sys/fs/cgroup")]
    return [Need(f.name, "ok" if f.ok else "missing", f.detail, "" if f.ok else costs, f.advice) for f in found]


class _Host:
    """This host, as this caller meets it."""

    def __init__(self) -> None:
        try:
            self.root = rootless.is_host_root()
        except OSError:
            self.root = False
        self.state = StateRoot().path
        self.directory = f"{self.state}/.doctor-{os.getpid()}"
        self.ask = "" if self.root else "ask your administrator: "

    def close(self) -> None:
        try:
            remove_tree(self.directory)
        except ImgrunError:
            pass  # its own line has said what is wrong with the state directory

    def trials(self) -> Iterator[Trial]:
        root, ask = self.root, self.ask
        yield Trial("kernel", _kernel, "", "")
        yield Trial("caller", self._caller, "jobs cannot be set up", "run imgrun with all of root's capabilities", root)
        yield Trial("init program", _shim, "no job can be started", "reinstall imgrun", True)
        yield Trial("state directory", self._state, "no job can be started", "set IMGRUN_STATE_DIR to another one", True)
        for kind, flag in NAMESPACES:
            optional = kind == "net"
            costs = "--network none and private are refused" if optional else "no job can be started"
            yield Trial(f"{kind} namespace", lambda k=kind, f=flag: self._namespace(k, f), costs, ANYWHERE, not optional)  # type: ignore[misc]
        yield Trial("mount interface", lambda: self._apart(_mount_interface), "no job can be started", ask + ANYWHERE, True)
        if root:
            yield Trial(
                "id-mapped mounts", lambda: _in_child(self._id_mapped), "a job's user namespace has the host's own ids",
                "use a kernel and a file system for IMGRUN_STATE_DIR that have them (ext4, xfs, btrfs)", False, "limited",
            )  # fmt: skip
        else:
            yield Trial("subordinate ids", self._ids, "no job can be started", ask + "see newuidmap(1)", True)
        yield Trial(
            "overlay", self._overlay, "only --read-only, and --writable on a copy of an image, work",
            "set IMGRUN_STATE_DIR to a local disk (ext4, xfs, btrfs)" + ("" if root else ", or install fuse-overlayfs"), True,
        )  # fmt: skip
        yield Trial("image formats", lambda: _file_systems(root), "", ask + "modprobe them", root)
        if root:
            yield Trial("loop devices", _loop, "only directories can be images", "modprobe loop", True)
            yield Trial("sized scratch", self._scratch, "--scratch-size is refused", "install e2fsprogs")
        else:
            costs = "images cannot be built in the format ext4"
            yield Trial("mke2fs", lambda: _runs("mke2fs"), costs, ask + "install e2fsprogs")
        others = "ordinary users' jobs cannot use image files" if root else "only directories can be images"
        yield Trial("/dev/fuse", lambda: self._apart(_fuse), others, ask + "chmod 666 /dev/fuse, as udev does", not root)
        yield from self._servers()
        costs = "image files are refused, as what is in them cannot be told"
        yield Trial("libblkid", _blkid, costs, ask + "install libblkid1 (Debian) or libblkid (Fedora)", True)
        yield Trial("libseccomp", lambda: _in_child(_seccomp), "--seccomp and --userns off are refused", ask + "install it")
        yield Trial("pasta", _pasta, "--network private is refused", ask + "install passt")
        costs = "a job joins its cgroups a little later, or has none of its own"
        yield Trial("clone3 into a cgroup", _clone_into, costs, ask + "mount cgroup v2, and delegate it", False, "limited")
        for name, hardware in (("performance counters", True), ("software counters", False)):
            costs = "what they count is null in results; --pmu require is refused" if hardware else "they are null in results"
            yield Trial(name, lambda h=hardware: _counters(h), costs, "")  # type: ignore[misc]
        yield Trial("CRIU", _criu, "jobs cannot be frozen, nor checkpoints continued", "pip install imgrun-criu pycriu")
        if not root and under_systemd():
            costs = "background jobs may end with your last login"
            yield Trial("lingering", _linger, costs, ask + f"loginctl enable-linger {_name()}", False, "limited")

    def _servers(self) -> Iterator[Trial]:
        whose = "ordinary users' " if self.root else ""
        none = not any(find_program(kind.program) for kind in fuse.SERVERS.values())
        for fstype, kind in fuse.SERVERS.items():
            costs = f"{whose}{fstype} images are refused"
            run = lambda program=kind.program: _runs(program)  # noqa: E731
            yield Trial(kind.program, run, costs, f"{self.ask}install {kind.package}", none and not self.root)
        costs = f"{whose}jobs are refused where the kernel's overlay is, as on network file systems"
        yield Trial("fuse-overlayfs", lambda: _runs("fuse-overlayfs"), costs, f"{self.ask}install fuse-overlayfs")

    def _caller(self) -> str:
        if not self.root:
            return f"{_name()}, an ordinary user: a job has a user namespace of yours"
        effective = sc.capget()[0]
        lacking = {name for i, name in enumerate(security.CAPABILITIES) if not effective >> i & 1}
        if gone := [name for name in ESSENTIAL if name in lacking]:
            raise HostError(f"root without CAP_{', CAP_'.join(gone)}")
        if less := [name for name in USEFUL if name in lacking]:
            raise Limited(
                f"root without CAP_{', CAP_'.join(less)}", "; ".join(USEFUL[name] for name in less),
                "give imgrun's service or container these capabilities, if they are wanted",
            )  # fmt: skip
        return "root, with the capabilities that imgrun uses"

    def _state(self) -> str:
        StateRoot(self.state).prepare()
        try:
            os.mkdir(self.directory, 0o700)
            space = os.statvfs(self.directory)
        except OSError as e:
            raise state_error(e, self.state) from e
        found = f"{self.state} on {_fstype(self.state)}, {space.f_bavail * space.f_frsize / 2**30:.1f} GiB free"
        if sc.fs_magic(self.directory) in NO_UPPER_LAYER:
            raise Limited(found, "the kernel's overlay cannot write there", "set IMGRUN_STATE_DIR to a local disk")
        return found

    def _namespace(self, kind: str, flag: int) -> str:
        most = _setting(f"user/max_{kind}_namespaces")
        try:
            pid = sc.clone(flag if self.root else flag | sc.CLONE_NEWUSER)
        except OSError as e:
            raise HostError(f"refused: {e.strerror}", self.ask + self._permit(kind, most, e.errno)) from e
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return f"at most {most or '?'} of them (user.max_{kind}_namespaces)"

    def _permit(self, kind: str, most: str, number: int | None) -> str:
        """What lets the caller have a namespace of this kind."""
        for name, limit in (("user", _setting("user/max_user_namespaces")), (kind, most)):
            if limit == "0" and (name == kind or not self.root):
                return f"sysctl -w user.max_{name}_namespaces=15000"
        if number in (errno.ENOSPC, errno.EUSERS):
            return f"raise user.max_{kind}_namespaces, here or in the outer namespace"
        for name, bad, good in (("unprivileged_userns_clone", "0", "1"), ("apparmor_restrict_unprivileged_userns", "1", "0")):
            if not self.root and _setting(f"kernel/{name}") == bad:
                return f"sysctl -w kernel.{name}={good}"
        if number in (errno.EINVAL, errno.ENOSYS):
            return f"use a kernel that has {kind} namespaces"
        return ANYWHERE

    def _apart(self, work: Callable[[], str]) -> str:
        """Do it with a supervisor's rights: the host's root's, or those of one's own namespace."""

        def entered() -> str:
            if not self.root:
                rootless.enter()
            return work()

        return _in_child(entered)

    def _ids(self) -> str:
        given = userns.subordinate_ranges("/etc/subuid", _name()) and userns.subordinate_ranges("/etc/subgid", _name())
        if given:
            advice = "install newuidmap (Debian: uidmap, Fedora: shadow-utils)"
        else:
            first = _free_ids()
            span = f"{first}-{first + userns.RANGE - 1}"
            advice = f"usermod --add-subuids {span} --add-subgids {span} {_name()}"
            advice += f", or the line '{_name()}:{first}:{userns.RANGE}' in /etc/subuid and /etc/subgid"
            advice += "" if find_program("newuidmap") else "; and install newuidmap (Debian: uidmap)"

        def work() -> str:
            ids, warnings = rootless.enter()
            if warnings:
                costs = "a job has a single id, so apt, su and --user fail in it"
                raise Limited("you have none" if not given else "newuidmap is missing", costs, self.ask + advice)
            return f"{sum(r.size for r in ids.uids)} ids by newuidmap and /etc/subuid"

        return _in_child(work)

    def _probe_mount(self, ids: userns.IdMap | None) -> int:
        if not os.path.isdir(self.directory):
            raise HostError("not tried: there is no state directory", "see its own line")
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        made = mount.directory(fd, read_only=False)
        if ids is not None:
            sources.id_map(made, namespaces.userns_descriptor(ids), f"mounts of {_fstype(self.directory)}")
        return made

    def _id_mapped(self) -> str:
        self._probe_mount(userns.hold_range().ids)
        return f"on {_fstype(self.directory)}"

    def _overlay(self) -> str:
        if self.root:
            if _in_child(self._overlay_of_root) == "mapped":
                return "in a user namespace, of id-mapped layers"
            costs = "a job's user namespace has the host's own ids"
            raise Limited("only without id-mapped layers", costs, "use a kernel of 5.19 or later")
        if self._apart(lambda: "yes" if self._union() else "no") == "yes":
            return "in a user namespace, with userxattr"
        if find_program("fuse-overlayfs") is None:
            raise HostError("the kernel refuses it, and fuse-overlayfs is not installed")
        advice = "set IMGRUN_STATE_DIR to a local disk, or use a kernel of 5.14 or later"
        raise Limited("the kernel refuses it; fuse-overlayfs takes its place", "jobs read and write more slowly", advice)

    def _union(self) -> bool:
        os.close(self._probe_mount(None))
        return union.kernel_can(f"{self.directory}/union")

    def _overlay_of_root(self) -> str:
        """As a job's first process makes it: the state's mount attached in namespaces of its own, and layers from it."""
        held = userns.hold_range()
        for ids, answer in ((held.ids, "mapped"), (userns.identity(), "identity")):
            try:
                layers = self._probe_mount(None if ids.identity else ids)
            except sources.IdMapUnsupported:
                continue
            told, tell = os.pipe2(os.O_CLOEXEC)
            pid = sc.clone(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
            if pid == 0:
                _become_overlay(layers, told)
            userns.write_maps(pid, ids)
            os.write(tell, b"x")
            if os.waitpid(pid, 0)[1] == 0:
                return answer
        raise HostError("the kernel refuses it in a user namespace")

    def _scratch(self) -> str:
        self._probe_mount(None)
        scratch = Scratch.create(f"{self.directory}/scratch", SCRATCH_SIZE)
        try:
            os.close(scratch.mount())
        finally:
            scratch.remove()
        return "made by mke2fs, and mounted"


def _become_overlay(layers: int, told: int) -> None:
    status = 1
    try:
        os.read(told, 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
        sc.move_mount(layers, "/sys")  # a place that exists everywhere, and from which nothing is imported
        status = 0 if union.kernel_can("/sys/union") else 1
    finally:
        os._exit(status)


def _in_child(work: Callable[[], str]) -> str:
    """Do it in a child, which is what changes; what it returns or raises comes back."""
    read, write = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _answer(work, write, parent)
    os.close(write)
    with open(read, "rb") as f:
        said = f.read()
    status = os.waitpid(pid, 0)[1]
    if not said:
        raise HostError(f"the trial died: {os.waitstatus_to_exitcode(status)}", "'dmesg | tail' may say more")
    kind, words = json.loads(said)
    if kind == "ok":
        return str(words[0])
    raise {"limited": Limited, "os": OSError}.get(kind, HostError)(*words)
