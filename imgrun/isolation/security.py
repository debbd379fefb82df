"""What a job may not do: capabilities, set-uid programs, keys of the caller, system calls, paths of the kernel.

Order in the job's first process: ``fresh_keyring``, the mount plan, ``drop_capabilities``, ``no_new_privs``, and the
filter's ``load`` last, since it denies what the steps before it need. Sources: capabilities(7), prctl(2), keyrings(7),
seccomp(2), seccomp_rule_add(3).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable
from typing import Any

from imgrun import syscalls as sc
from imgrun.errors import HostError, SpecError

CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""In the kernel's order: the index is the number."""

DEFAULT_CAPABILITIES = frozenset((
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
))  # fmt: skip
"""What the root of a job keeps, as that of a podman container. ``--init image`` adds SYS_BOOT: it powers off."""

# With the host's own ids the job's root is the host's for every check that looks at ids alone, as those of most files
# in /proc and /sys do. With others, its ids own nothing there, so nothing has to be covered; and nothing must be, as the
# kernel lets a nested user namespace mount a /proc or /sys of its own only where none of the outer one is covered.
MASKED_PATHS = (
    "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/kpagecgroup", "/proc/kpagecount",
    "/proc/kpageflags", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
    "/proc/timer_stats", "/sys/dev/block", "/sys/devices/virtual/powercap", "/sys/firmware", "/sys/fs/selinux",
)  # fmt: skip
"""Covered by nothing (/dev/null, an empty directory) in a job with the host's ids; not all exist everywhere."""

READONLY_PATHS = (
    "/proc/asound", "/proc/bus", "/proc/dynamic_debug", "/proc/fs", "/proc/irq", "/proc/mtrr", "/proc/sys",
    "/proc/sysrq-trigger",
)  # fmt: skip
"""Made read-only in a job with the host's ids."""

DENIED_SYSCALLS = (
    # the kernel itself
    "create_module", "delete_module", "finit_module", "get_kernel_syms", "init_module", "kexec_file_load",
    "kexec_load", "query_module", "reboot",
    # the machine: accounting, swap, quota, ports, log, time
    "_sysctl", "acct", "clock_adjtime", "clock_adjtime64", "clock_settime", "clock_settime64", "ioperm", "iopl",
    "nfsservctl", "quotactl", "quotactl_fd", "settimeofday", "stime", "swapoff", "swapon", "sysfs", "syslog",
    "uselib", "ustat", "vhangup", "vm86", "vm86old",
    # mounts
    "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount", "open_by_handle_at",
    "open_tree", "open_tree_attr", "pivot_root", "setns", "umount", "umount2",
    # kernel interfaces with a history: keys are not namespaced, the others are wide
    "add_key", "bpf", "fanotify_init", "io_uring_enter", "io_uring_register", "io_uring_setup", "keyctl",
    "lookup_dcookie", "perf_event_open", "request_key", "userfaultfd",
)  # fmt: skip
"""Refused with EPERM by the filter "default". Memory policy, ptrace and process_vm_* are not: batch jobs use them."""

_CLONE_NEWTIME = 0x80
_CLONE_FLAGS = (
    sc.CLONE_NEWNS, sc.CLONE_NEWCGROUP, sc.CLONE_NEWUTS, sc.CLONE_NEWIPC, sc.CLONE_NEWUSER, sc.CLONE_NEWPID,
    sc.CLONE_NEWNET,
)  # fmt: skip
_TIOCSTI = 0x5412  # types into the terminal of whoever started the job
_TIOCLINUX = 0x541C  # pastes into a virtual console
_AF_VSOCK = 40  # reaches the hypervisor
# PER_LINUX32 (setarch) and UNAME26; all bits set asks for the present value.
_PERSONALITY_BITS = 0x8 | 0x20000

_ARCH_X86_64, _ARCH_X86, _ARCH_X32 = 0xC000003E, 0x40000003, 0x4000003E
_ARCH_AARCH64, _ARCH_ARM = 0xC00000B7, 0x40000028
# The kernel runs these too; a filter that does not know them would kill their programs.
_OTHER_ARCHITECTURES = {_ARCH_X86_64: (_ARCH_X86, _ARCH_X32), _ARCH_AARCH64: (_ARCH_ARM,)}
_ACT_ALLOW, _ACT_ERRNO = 0x7FFF0000, 0x00050000
_CMP_MASKED_EQ = 7
_ATTR_SSB, _ATTR_OPTIMIZE = 7, 8
_UNKNOWN_SYSCALL = -1


def drop_capabilities(keep: Iterable[str] = DEFAULT_CAPABILITIES) -> None:
    """Leave this process, and all it may become, no other capabilities than ``keep`` (names without CAP_).

    Those it has not are not gained. Needs CAP_SETPCAP in its user namespace. Raises SpecError, OSError.
    """
    kept = 0
    for name in keep:
        if name not in CAPABILITIES:
            raise SpecError(f"there is no capability {name!r}", "names are as in capabilities(7), without CAP_")
        kept |= 1 << CAPABILITIES.index(name)
    number = 0
    while True:
        try:
            present = sc.prctl(sc.PR_CAPBSET_READ, number)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            break  # past the last one of this kernel
        if present and not kept >> number & 1:
            sc.prctl(sc.PR_CAPBSET_DROP, number)
        number += 1
    sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    effective, permitted, _ = sc.capget()
    sc.capset(effective & kept, permitted & kept, 0)


def no_new_privs() -> None:
    """From now on no set-uid program or file capability gives this process or its children anything (prctl(2))."""
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)


def forbid_user_namespaces() -> None:
    """Let none be made below this process's own. Needs CAP_SYS_RESOURCE in it, as undoing it does (namespaces(7))."""
    with open("/proc/sys/user/max_user_namespaces", "wb") as f:
        f.write(b"0")


def fresh_keyring() -> None:
    """Replace the session keyring, which a child shares with its parent, by an empty one. Raises OSError.

    In a user namespace the user's own keyring is another one, too; without one it stays reachable by its user.
    """
    try:
        sc.join_session_keyring()
    except OSError as e:
        if e.errno != errno.ENOSYS:  # a kernel without keys has none to leak
            raise


class SeccompFilter:
    """A system call filter, ready to be loaded into this process or a child of it.

    It is made by the supervisor: the library is the host's, and must not be searched for in an image.
    """

    __slots__ = ("_ctx", "_lib")

    def __init__(self, lib: Any, ctx: Any) -> None:
        self._lib = lib
        self._ctx = ctx

    def load(self) -> None:
        """Filter this process, the programs it executes and its children, for ever; sets no_new_privs.

        Raises HostError when the kernel does not take it.
        """
        result = self._lib.seccomp_load(self._ctx)
        if result < 0:
            raise HostError(
                f"the kernel refused the system call filter: {os.strerror(-result)}",
                "its configuration needs CONFIG_SECCOMP_FILTER; or leave --seccomp off",
            )

    def close(self) -> None:
        """Free its memory; not needed in a process that ends or executes a program."""
        if self._ctx is not None:
            self._lib.seccomp_release(self._ctx)
            self._ctx = None


def filter_for(*, seccomp: str, userns: str, init: str) -> SeccompFilter | None:
    """The filter of a job with these options of its spec. Raises HostError when libseccomp is missing or refuses."""
    if seccomp != "off":
        return seccomp_filter(seccomp, ("reboot",) if init == "image" else ())
    return seccomp_filter("userns") if userns == "off" else None


def seccomp_filter(profile: str = "default", allow: Collection[str] = ()) -> SeccompFilter:
    """Make a filter. "default" denies what container engines deny, except for the system calls in ``allow``.

    "userns" denies new user namespaces only: what a job without one needs. The host's root in a namespace of its own
    may mount cgroup file systems, and its ids then let it lift the limits of its job.

    It is a list of what is denied (EPERM), not of what is allowed: calls that are newer than it are let through.
    clone3 is answered with ENOSYS, as its flags cannot be looked at; C libraries then use clone. ``--init image``
    allows "reboot".

    A process with a filter cannot be frozen from inside a user namespace: suspending a filter takes CAP_SYS_ADMIN
    over the host. So jobs are filtered only on request.

    Raises SpecError for an unknown profile, HostError when libseccomp is missing or refuses.
    """
    if profile not in ("default", "userns"):
        raise SpecError(f"there is no system call filter {profile!r}", "choose one of: off, default")
    lib, ffi = _libseccomp()
    ctx = lib.seccomp_init(_ACT_ALLOW)
    if ctx == ffi.NULL:
        raise HostError("libseccomp cannot make a filter", "leave --seccomp off")
    made = SeccompFilter(lib, ctx)
    try:
        _fill(lib, ffi, ctx, profile, frozenset(allow))
    except BaseException:
        made.close()
        raise
    return made


def _libseccomp() -> tuple[Any, Any]:
    from imgrun.native._seccomp import ffi

    try:
        return ffi.dlopen("libseccomp.so.2"), ffi
    except OSError as e:
        raise HostError(
            "the library libseccomp.so.2 is not on this host",
            "install it (Debian: libseccomp2, Fedora: libseccomp), or do without --seccomp and --userns off",
        ) from e


def _fill(lib: Any, ffi: Any, ctx: Any, profile: str, allow: frozenset[str]) -> None:
    def checked(result: int, what: str) -> None:
        if result < 0 and result != -errno.EEXIST:
            raise HostError(
                f"libseccomp refused a part of the filter ({what}): {os.strerror(-result)}",
                "update libseccomp (2.5 or newer), or leave --seccomp off",
            )

    def deny(name: str, argument: int = 0, mask: int = 0, value: int = 0, error: int = errno.EPERM) -> None:
        """Deny a call, or with a mask: where these bits of the argument have this value.

        The kernel ignores the upper half of most arguments, so comparing all of it could be got around.
        """
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if name in allow or number == _UNKNOWN_SYSCALL:
            return
        tests = ffi.new("struct scmp_arg_cmp[]", [(argument, _CMP_MASKED_EQ, mask, value)] if mask else [])
        checked(lib.seccomp_rule_add_array(ctx, _ACT_ERRNO | error, number, len(tests), tests), name)

    for architecture in _OTHER_ARCHITECTURES.get(lib.seccomp_arch_native(), ()):
        checked(lib.seccomp_arch_add(ctx, architecture), "architecture")
    # Without this, kernels before 5.16 slow filtered programs down by their protection against Spectre 4.
    lib.seccomp_attr_set(ctx, _ATTR_SSB, 1)
    lib.seccomp_attr_set(ctx, _ATTR_OPTIMIZE, 2)

    for flag in (sc.CLONE_NEWUSER,) if profile == "userns" else _CLONE_FLAGS:
        deny("clone", 0, flag, flag)
        deny("unshare", 0, flag, flag)
    deny("clone3", error=errno.ENOSYS)
    if profile == "userns":
        return
    for name in DENIED_SYSCALLS:
        deny(name)
    deny("unshare", 0, _CLONE_NEWTIME, _CLONE_NEWTIME)  # in clone this bit belongs to the exit signal
    for command in (_TIOCSTI, _TIOCLINUX):
        deny("ioctl", 1, 0xFFFFFFFF, command)
    deny("socket", 0, 0xFFFFFFFF, _AF_VSOCK)
    # The library compares an argument only once in a rule: so bit 31 tells the question, which has all bits,
    # from settings, which have some bit that is not allowed, or bit 31 but not all the others.
    for bit in (1 << n for n in range(31)):
        if not bit & _PERSONALITY_BITS:
            deny("personality", 0, 1 << 31 | bit, bit)
        deny("personality", 0, 1 << 31 | bit, 1 << 31)
