"""How ``imgrun doctor`` tries what imgrun needs: each function does it for real, and says in a few words what it found.

What cannot be had is raised: HostError or OSError, or Limited where it can be had in part. Nothing stays of a trial: what
changes a process is done in a child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import NoReturn

from imgrun import identity, init_shim
from imgrun import syscalls as sc
from imgrun.errors import HostError, ImgrunError
from imgrun.helper import find_program
from imgrun.isolation import cgroup_fs, namespaces, security, sources, userns
from imgrun.isolation.cgroup_limits import Limits
from imgrun.isolation.cgroup_plan import plan
from imgrun.pmu import counters, events
from imgrun.storage import blkid, fuse, loop, mount, union
from imgrun.storage.scratch import Scratch

OLDEST_KERNEL = (5, 14)
PROGRAM_SECONDS = 10.0
SCRATCH_SIZE = 4 << 20
FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "squashfs", "erofs")


class Limited(Exception):  # noqa: N818 - not an error: a need that is met in part
    """The need is met in part: what was found, what that costs, what to do."""


def in_child(work: Callable[[], str]) -> str:
    """Do it in a child, which is what changes; what it returns or raises comes back. The caller has one thread."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _answer(work, write)
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


def _answer(work: Callable[[], str], fd: int) -> NoReturn:
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        said: tuple[str, tuple[object, ...]]
        try:
            said = ("ok", (work(),))
        except Limited as e:
            said = ("limited", e.args)
        except ImgrunError as e:
            said = ("error", (e.message, e.hint))
        except OSError as e:
            said = ("os", (e.errno, e.strerror, e.filename if isinstance(e.filename, str) else None))
        except Exception as e:  # noqa: BLE001 - all of it is for the process that asked
            said = ("error", (f"it could not be tried: {type(e).__name__}: {e}",))
        os.write(fd, json.dumps(said).encode())
    finally:
        os._exit(0)


# -- the host ----------------------------------------------------------------------------------------------------------


def setting(name: str) -> str:
    """A kernel setting by its path below /proc/sys; empty where there is none."""
    return cgroup_fs.text(f"/proc/sys/{name}") or ""


def user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def free_ids() -> int:
    """The first subordinate id that no range of /etc/subuid or /etc/subgid has."""
    first = 100000
    for path in ("/etc/subuid", "/etc/subgid"):
        for row in (line.split(":") for line in (cgroup_fs.text(path) or "").splitlines()):
            if len(row) == 3 and row[1].isdigit() and row[2].isdigit():
                first = max(first, int(row[1]) + int(row[2]))
    return first


def file_system_of(path: str) -> str:
    """The kind of file system that ``path`` is on."""
    path = os.path.realpath(path)
    try:
        import libmount
    except ImportError:
        found = ("", "unknown")
        for line in (cgroup_fs.text("/proc/self/mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            place = cgroup_fs.unescape(before.split(" ")[4])
            if f"{path}/".startswith(f"{place.rstrip('/')}/") and len(place) >= len(found[0]):
                found = (place, after.split(" ")[0])
        return found[1]
    return str(libmount.Table("/proc/self/mountinfo").find_mountpoint(path, libmount.MNT_ITER_BACKWARD).fstype)


def kernel() -> str:
    release = os.uname().release
    if identity.version_tuple(release) < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        raise Limited(release, f"imgrun is made for {oldest} and later", "see below what works, and use a newer kernel")
    return release


def runs(program: str) -> str:
    """Whether a helper program is there and can be executed; where it is."""
    path = find_program(program)
    if path is None:
        raise HostError(f"{program} is not installed")
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run([path, "--help"], stdin=quiet, stdout=quiet, stderr=quiet, timeout=PROGRAM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise HostError(f"{path} hangs") from None
    if done.returncode in (126, 127) or done.returncode < 0:
        raise HostError(f"{path} is there and does not run: exit status {done.returncode}")
    return path


def shim() -> str:
    program = init_shim.program()
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_inheritable(write, True)
    argv = init_shim.arguments(
        ["true"], status_fd=write, role="exec", uid=os.geteuid(), gid=os.getegid(), groups=None
    )  # fmt: skip
    pid = os.posix_spawn(program, argv, {"PATH": "/usr/bin:/bin"})
    os.close(write)
    with open(read, "rb") as f:
        said = f.read(256).decode(errors="replace").strip()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise HostError(f"{program} cannot start a program: {said or status}")
    return program


# -- mounts ------------------------------------------------------------------------------------------------------------


def mount_interface() -> str:
    step = "fsopen"
    try:
        context = sc.fsopen("tmpfs")
        sc.fsconfig_create(context)
        step = "fsmount"
        made = sc.fsmount(context)
        step = "mount_setattr"
        sc.mount_setattr(made, set=sc.MOUNT_ATTR_RDONLY)
        step = "open_tree"
        sc.open_tree("/", sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE)
        step = "openat2"
        sc.openat2("/", os.O_PATH, made)
    except OSError as e:
        raise HostError(f"{step} is refused: {e.strerror}") from e
    return "fsopen, fsmount, mount_setattr, open_tree, openat2"


def state_mount(directory: str, ids: userns.IdMap | None) -> int:
    """A detached mount of the trials' directory, id-mapped where ``ids`` are given."""
    if not os.path.isdir(directory):
        raise HostError("not tried: there is no state directory", "see its own line")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    made = mount.directory(fd, read_only=False)
    if ids is not None:
        sources.id_map(made, namespaces.userns_descriptor(ids), f"mounts of {file_system_of(directory)}")
    return made


def id_mapped(directory: str) -> str:
    state_mount(directory, userns.hold_range().ids)
    return f"on {file_system_of(directory)}"


def overlay_of_user(directory: str) -> str:
    """As the supervisor sees whether it needs fuse-overlayfs. In its namespaces; returns "kernel", "fuse" or "none"."""
    state_mount(directory, None)
    if union.kernel_can(f"{directory}/union"):
        return "kernel"
    return "fuse" if find_program("fuse-overlayfs") else "none"


def overlay_of_root(directory: str) -> str:
    """As a job's first process makes it, with the state's mount attached in namespaces of its own.

    Returns "mapped", "identity" (only where the layers are not id-mapped) or "none".
    """
    held = userns.hold_range()
    for ids, answer in ((held.ids, "mapped"), (userns.identity(), "identity")):
        try:
            layers = state_mount(directory, None if ids.identity else ids)
        except sources.IdMapUnsupported:
            continue
        told, tell = os.pipe2(os.O_CLOEXEC)
        pid = sc.clone(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
        if pid == 0:
            os.close(tell)
            _make_overlay(layers, told)
        try:
            userns.write_maps(pid, ids)
            os.write(tell, b"x")
        finally:
            os.close(tell)
            status = os.waitpid(pid, 0)[1]
        if status == 0:
            return answer
    return "none"


def _make_overlay(layers: int, told: int) -> NoReturn:
    status = 1
    try:
        if os.read(told, 1):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
            sc.move_mount(layers, "/sys")  # it exists everywhere, and no module is imported from it
            status = 0 if union.kernel_can("/sys/union") else 1
    finally:
        os._exit(status)


def formats(*, served: bool) -> str:
    """Which image formats the kernel mounts; ``served`` says that FUSE servers do it instead."""
    have = [name for name in FILE_SYSTEMS if mount.kernel_has(name) is not False]
    lacking = [name for name in FILE_SYSTEMS if name not in have]
    if served:
        return f"directories, and what is served: {', '.join(fuse.SERVERS)}"
    if not have:
        raise HostError(f"this kernel has none of {', '.join(lacking)}")
    if lacking:
        names = ", ".join(lacking)
        advice = f"modprobe {lacking[0]}, or a kernel that has it"
        raise Limited(f"{', '.join(have)}; not {names}", f"images in {names} are refused", advice)
    return ", ".join(have)


def loop_device() -> str:
    memory = os.memfd_create("imgrun-doctor", os.MFD_CLOEXEC)
    try:
        os.truncate(memory, 1 << 20)
        device = loop.attach(memory, "a file in memory", read_only=True)
        try:
            return f"{device.source} was free"
        finally:
            device.close()
    finally:
        os.close(memory)


def sized_scratch(directory: str) -> str:
    os.close(state_mount(directory, None))
    scratch = Scratch.create(f"{directory}/scratch", SCRATCH_SIZE)
    try:
        os.close(scratch.mount())
    finally:
        scratch.remove()
    return "made by mke2fs, and mounted"


def fuse_device() -> str:
    fuse.check_device()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    context = sc.fsopen("fuse")
    for key, value in (("fd", str(device)), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")):
        sc.fsconfig(context, key, value)
    sc.fsconfig_create(context)
    sc.fsmount(context)
    return "opened, and a file system of it mounted"


# -- libraries and programs --------------------------------------------------------------------------------------------


def libblkid() -> str:
    memory = os.memfd_create("imgrun-doctor", os.MFD_CLOEXEC)
    try:
        os.truncate(memory, 1 << 20)
        os.pwrite(memory, (1 << 10).to_bytes(4, "little") + bytes(52) + b"\x53\xef", 1024)
        blkid.signature(memory, 0, 1 << 20, "a file in memory")
    finally:
        os.close(memory)
    return "libblkid.so.1 recognises images"


def libseccomp() -> str:
    made = security.seccomp_filter("default")
    made.load()
    return "the filter is loaded"


def pasta() -> str:
    path = runs("pasta")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        advice = "modprobe tun; chmod 666 /dev/net/tun"
        raise Limited(f"{path}, but /dev/net/tun: {e.strerror}", "--network private is refused", advice) from e
    return path


def criu() -> str:
    try:
        import imgrun_criu
        import pycriu  # noqa: F401
    except ImportError as e:
        raise HostError(f"the Python package {e.name} is not installed") from e
    done = subprocess.run(
        [*imgrun_criu.command(), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PROGRAM_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise HostError(f"CRIU does not run: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    patches = len(imgrun_criu.build().get("patches", ()))
    found = f"{imgrun_criu.VERSION} with {patches} patches of imgrun's"
    if not os.path.exists("/proc/sys/kernel/ns_last_pid"):
        raise Limited(found, "this kernel cannot restore processes", "use a kernel with CONFIG_CHECKPOINT_RESTORE")
    return found


# -- accounting --------------------------------------------------------------------------------------------------------


def clone_into_cgroup() -> str:
    unified = next((tree for tree in cgroup_fs.discover() if tree.version == 2), None)
    if unified is None:
        raise HostError("cgroup v2 is not mounted")
    fd = os.open(unified.own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pid = sc.clone(0, fd)
    finally:
        os.close(fd)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return f"in {unified.own}"


def performance_counters(*, hardware: bool) -> str:
    """The events of one kind, in the scope in which a job's are counted."""
    place = plan(Limits(), accounting=True).place
    if place is not None and place.kind != "none":
        fd = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            opened = counters.Counters.of_cgroup(fd)
        finally:
            os.close(fd)
    else:
        opened = counters.Counters.of_process(os.getpid())
    opened.close()
    names = [event.name for event in events.EVENTS if event.hardware is hardware]
    counted = [name for name in names if name not in opened.refused]
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name in opened.refused:
            reasons.setdefault(counters.explain(opened.refused[name]), []).append(name)
    refused = "; ".join(f"not {', '.join(who)}: {why}" for why, who in reasons.items())
    paranoid = setting("kernel/perf_event_paranoid")
    allowed = f"sysctl -w kernel.perf_event_paranoid=1 (it is {paranoid or 'unknown'})"
    advice = allowed if "not allowed" in refused else "use a host, or a virtual machine, that has them"
    if not counted:
        raise HostError(refused.replace("not ", "no ", 1), advice)
    found = ", ".join(counted) + (f"; {refused}" if refused else "")
    if refused:
        raise Limited(found, "what is not counted is null in results", advice)
    if opened.user_only and hardware:
        raise Limited(f"{found}, in user space only", "the kernel's part is not counted", allowed)
    return found


def lingering() -> str:
    if not os.path.exists(f"/var/lib/systemd/linger/{user_name()}"):
        raise HostError("your services end with your last login")
    return "your services outlive your logins"
