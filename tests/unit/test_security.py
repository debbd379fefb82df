"""The system call filter, by running its program on every kind of call; and the tables."""

from __future__ import annotations

import errno
import functools
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun import syscalls as sc
from imgrun.errors import HostError, SpecError
from imgrun.isolation import security
from imgrun.native import _seccomp

ALLOW = 0x7FFF0000
DENY = 0x00050000 | errno.EPERM
NO_SUCH_CALL = 0x00050000 | errno.ENOSYS

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
X86, X32, ARM = 0x40000003, 0xC000003E, 0x40000028
ON_X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="about the other system call tables of x86-64")

WORDS = st.integers(0, 2**64 - 1)


@functools.cache
def program(allow: frozenset[str] = frozenset()) -> tuple[tuple[int, int, int, int], ...]:
    made = security.seccomp_filter("default", allow)
    fd = os.memfd_create("filter")
    assert made._lib.seccomp_export_bpf(made._ctx, fd) == 0
    made.close()
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb") as file:
        return tuple(struct.iter_unpack("=HBBI", file.read()))


def decide(number: int, *args: int, arch: int = NATIVE, allow: frozenset[str] = frozenset()) -> int:
    """What the kernel would answer: the filter is a classic BPF program over struct seccomp_data (seccomp(2))."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    code, at, accumulator = program(allow), 0, 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        match operation:
            case 0x20:  # load a word
                (accumulator,) = struct.unpack_from("=I", data, k)
            case 0x54:  # and
                accumulator &= k
            case 0x05:  # jump
                at += k
            case 0x15:  # jump if equal
                at += if_true if accumulator == k else if_false
            case 0x25:  # jump if greater
                at += if_true if accumulator > k else if_false
            case 0x35:  # jump if greater or equal
                at += if_true if accumulator >= k else if_false
            case 0x45:  # jump if any bit is set
                at += if_true if accumulator & k else if_false
            case 0x06:  # return
                return k
            case other:
                raise AssertionError(f"unknown operation {other:#x}")


def resolve(name: str) -> int:
    lib, _ = security._libseccomp()
    return int(lib.seccomp_syscall_resolve_name(name.encode()))


def test_denied_system_calls() -> None:
    assert list(security.DENIED_SYSCALLS) != []
    here = [(name, resolve(name)) for name in security.DENIED_SYSCALLS]
    present = {name: number for name, number in here if number >= 0}
    assert len(present) > 40
    for name, number in present.items():
        assert decide(number) == DENY, name
    assert decide(resolve("clone3")) == NO_SUCH_CALL


@given(st.integers(0, 500), st.lists(WORDS, max_size=6))
def test_all_other_calls_are_allowed(number: int, args: list[int]) -> None:
    special = {*security.DENIED_SYSCALLS, "clone", "clone3", "unshare", "ioctl", "socket", "personality"}
    if number not in {resolve(name) for name in special}:
        assert decide(number, *args) == ALLOW


@given(WORDS)
def test_clone_makes_no_namespaces(flags: int) -> None:
    namespaces = (
        sc.CLONE_NEWNS | sc.CLONE_NEWUTS | sc.CLONE_NEWIPC | sc.CLONE_NEWUSER | sc.CLONE_NEWPID | sc.CLONE_NEWNET
        | sc.CLONE_NEWCGROUP
    )  # fmt: skip
    for value in (flags, flags & ~namespaces):
        assert decide(resolve("clone"), value) == (DENY if value & namespaces else ALLOW)
        time_too = namespaces | 0x80
        assert decide(resolve("unshare"), value) == (DENY if value & time_too else ALLOW)


@given(st.integers(0, 2**32 - 1))
def test_the_upper_half_of_an_argument_hides_nothing(upper: int) -> None:
    for command in (0x5412, 0x541C):
        assert decide(resolve("ioctl"), 0, command | upper << 32) == DENY
    assert decide(resolve("ioctl"), 0, 0x5413 | upper << 32) == ALLOW
    assert decide(resolve("socket"), 40 | upper << 32) == DENY
    assert decide(resolve("socket"), 2 | upper << 32) == ALLOW
    assert decide(resolve("unshare"), sc.CLONE_NEWUSER | upper << 32) == DENY
    assert decide(resolve("personality"), 0x400000 | upper << 32) == DENY
    assert decide(resolve("personality"), 0xFFFFFFFF | upper << 32) == ALLOW


ALLOWED_PERSONALITIES = {0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF}


@given(
    st.one_of(
        st.sampled_from(sorted(ALLOWED_PERSONALITIES)),
        st.integers(0, 2**32 - 1),
        st.builds(lambda bit: 1 << bit, st.integers(0, 31)),
        st.builds(lambda bit: 0xFFFFFFFF ^ 1 << bit, st.integers(0, 31)),
        st.builds(lambda a, b: a | 1 << b, st.sampled_from(sorted(ALLOWED_PERSONALITIES)), st.integers(0, 31)),
    )
)
def test_personalities(value: int) -> None:
    assert decide(resolve("personality"), value) == (ALLOW if value in ALLOWED_PERSONALITIES else DENY)


# Numbers of arch/x86/entry/syscalls/syscall_32.tbl
ON_I386 = {
    "mount": 21, "umount": 22, "stime": 25, "umount2": 52, "settimeofday": 79, "swapon": 87, "reboot": 88, "iopl": 110,
    "init_module": 128, "pivot_root": 217, "kexec_load": 283, "keyctl": 288, "perf_event_open": 336, "setns": 346,
    "bpf": 357, "clock_settime64": 404, "io_uring_setup": 425, "open_tree": 428,
}  # fmt: skip


@ON_X86
def test_32_bit_calls_are_no_way_around() -> None:
    for name, number in ON_I386.items():
        assert decide(number, arch=X86) == DENY, name
    assert decide(435, arch=X86) == NO_SUCH_CALL, "clone3"
    assert decide(120, 0x10000000, arch=X86) == DENY, "clone"
    assert decide(120, 0x11, arch=X86) == ALLOW, "clone"
    assert decide(310, 0x10000000, arch=X86) == DENY, "unshare"
    assert decide(54, 0, 0x5412, arch=X86) == DENY, "ioctl"
    assert decide(136, 0x400000, arch=X86) == DENY, "personality"
    assert decide(136, 0xFFFFFFFF, arch=X86) == ALLOW, "personality"
    for number in (1, 2, 3, 4, 5, 6, 11, 45, 102, 192):
        assert decide(number, arch=X86) == ALLOW
    for number in (155, 165, 166, 169, 250, 298, 308, 321, 528):
        assert decide(0x40000000 | number, arch=X32) == DENY, "x32"
    assert decide(0x40000000 | 39, arch=X32) == ALLOW, "x32"


def test_an_unknown_architecture_is_killed() -> None:
    assert decide(0, arch=0x12345678) == 0x00000000


def test_exceptions() -> None:
    reboot = resolve("reboot")
    assert decide(reboot, allow=frozenset(["reboot"])) == ALLOW
    assert decide(resolve("mount"), allow=frozenset(["reboot"])) == DENY


def test_a_filter_needs_no_privilege_and_lasts() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            security.seccomp_filter().load()
            status = Path("/proc/self/status").read_text()
            assert "Seccomp:\t2\n" in status
            assert "NoNewPrivs:\t1\n" in status
            if os.fork() == 0:
                os.execv("/bin/sh", ["sh", "-c", 'grep -q "Seccomp:.2" /proc/self/status'])
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_unknown_profile() -> None:
    with pytest.raises(SpecError, match="docker"):
        security.seccomp_filter("docker")


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def dlopen(self, name: str) -> None:
            raise OSError(f"cannot load library {name!r}")

    monkeypatch.setattr(_seccomp, "ffi", Nothing())
    with pytest.raises(HostError) as caught:
        security.seccomp_filter()
    assert "libseccomp.so.2" in caught.value.message
    assert "libseccomp2" in (caught.value.hint or "")


def test_capability_numbers() -> None:
    header = Path("/usr/include/linux/capability.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define CAP_")]
    numbers = {words[1][4:]: int(words[2]) for words in lines if len(words) > 2 and words[2].isdigit()}
    for number, name in enumerate(security.CAPABILITIES):
        assert numbers[name] == number
    assert set(security.CAPABILITIES) >= security.DEFAULT_CAPABILITIES


def test_unknown_capability() -> None:
    with pytest.raises(SpecError, match="CAP_KILL"):
        security.drop_capabilities(["CAP_KILL"])


def test_path_tables() -> None:
    both = (*security.MASKED_PATHS, *security.READONLY_PATHS)
    assert len(set(both)) == len(both)
    assert all(path.startswith(("/proc/", "/sys/")) and os.path.normpath(path) == path for path in both)
