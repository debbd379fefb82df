"""What is denied to a job is tried, by real processes in real namespaces; and what it needs still works."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imgrun import init_shim
from imgrun import syscalls as sc
from imgrun.isolation import security

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="most of this needs root to begin with")

libc = ctypes.CDLL(None, use_errno=True)
LONG = ctypes.c_long
DEFAULT_MASK = sum(1 << security.CAPABILITIES.index(name) for name in security.DEFAULT_CAPABILITIES)
NOBODY = 65534


def attempt(work: Callable[[], object]) -> str:
    """What came of it: the text of the result, or the name of the error."""
    try:
        return str(work())
    except OSError as e:
        return errno.errorcode[e.errno or 0]


def in_child(work: Callable[[], object], flags: int = 0) -> str:
    """The same in a process of its own, in new namespaces if asked; a user namespace gets 65536 ids from 300000."""
    reading, writing = os.pipe()
    ready, go = os.pipe()
    pid = sc.clone(flags) if flags else os.fork()
    if pid == 0:
        try:
            os.close(go)
            os.read(ready, 1)
            if flags & sc.CLONE_NEWUSER:
                os.setresgid(0, 0, 0)
                os.setgroups([])
                os.setresuid(0, 0, 0)
            os.write(writing, attempt(work).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.close(ready)
    if flags & sc.CLONE_NEWUSER:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text("0 300000 65536\n")
    os.close(go)
    with open(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def syscall(name: str, *args: int | bytes | None) -> int:
    lib, _ = security._libseccomp()
    number = lib.seccomp_syscall_resolve_name(name.encode())
    assert number >= 0, name
    words = [LONG(arg) if isinstance(arg, int) else arg for arg in args]
    libc.syscall.restype = LONG
    result = int(libc.syscall(LONG(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def own_status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def capability_sets(status: dict[str, str]) -> dict[str, int]:
    return {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}


EXPECTED = {"CapInh": 0, "CapPrm": DEFAULT_MASK, "CapEff": DEFAULT_MASK, "CapBnd": DEFAULT_MASK, "CapAmb": 0}


# Capabilities


@pytest.mark.parametrize("flags", [0, sc.CLONE_NEWUSER], ids=["host", "user namespace"])
def test_root_keeps_the_default_and_no_more(flags: int) -> None:
    def work() -> object:
        security.drop_capabilities()
        return capability_sets(own_status())

    assert in_child(work, flags) == str(EXPECTED)


@pytest.mark.parametrize("flags", [0, sc.CLONE_NEWUSER], ids=["host", "user namespace"])
def test_no_program_of_roots_gets_them_back(flags: int) -> None:
    def work() -> object:
        security.drop_capabilities()
        text = subprocess.run(["cat", "/proc/self/status"], check=True, capture_output=True, text=True).stdout
        return capability_sets(dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line))

    assert in_child(work, flags) == str(EXPECTED)


def test_other_sets() -> None:
    def work(keep: list[str]) -> object:
        security.drop_capabilities(keep)
        return [f"{mask:x}" for mask in capability_sets(own_status()).values()]

    assert in_child(lambda: work([])) == str(["0"] * 5)
    assert in_child(lambda: work(["SYS_BOOT", "CHOWN"])) == str(["0", "400001", "400001", "400001", "0"])
    # What is not there is not gained: this host's root may lack capabilities, and a second drop only takes away.
    assert in_child(lambda: (work(["CHOWN", "SETPCAP"]), work(["CHOWN", "KILL"]))[1]) == str(["0", "1", "1", "1", "0"])


def test_ambient_and_inheritable_are_cleared() -> None:
    def work() -> object:
        effective, permitted, _ = sc.capget()
        sc.capset(effective, permitted, permitted)
        sc.prctl(sc.PR_CAP_AMBIENT, 2, security.CAPABILITIES.index("KILL"))
        before = own_status()["CapAmb"]
        security.drop_capabilities()
        return before != "0" * 16, capability_sets(own_status())

    assert in_child(work) == str((True, EXPECTED))


def test_what_the_kept_ones_are_good_for_and_what_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    def work() -> object:
        security.drop_capabilities()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            return [
                attempt(lambda: os.chown(file, NOBODY, NOBODY)),
                attempt(lambda: os.chroot("/")),
                attempt(lambda: os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))),
                attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
                attempt(lambda: sc.unshare(sc.CLONE_NEWNS)),
                attempt(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
                attempt(lambda: libc_checked("sethostname", b"x", 1)),
                attempt(lambda: server.bind(("127.0.0.1", 0))),
            ]

    assert in_child(work) == str(["None", "None", *["EPERM"] * 5, "None"])


def libc_checked(function: str, *args: object) -> None:
    if getattr(libc, function)(*args) < 0:
        raise OSError(ctypes.get_errno(), function)


# Set-uid programs


@pytest.fixture
def privileged_cat(tmp_path: Path) -> dict[str, str]:
    """Copies of cat: one set-uid root, one with file capabilities."""
    open_to_all(tmp_path)
    found = {}
    for name in ("setuid", "capable"):
        path = tmp_path / name
        shutil.copy("/bin/cat", path)
        path.chmod(0o4755 if name == "setuid" else 0o755)
        found[name] = str(path)
    everything = sc.capget()[1] & 0xFFFFFFFF
    attribute = struct.pack("<5I", 0x02000001, everything, 0, 0, 0)
    os.setxattr(found["capable"], "security.capability", attribute)
    return found


@pytest.mark.parametrize("kind", ["setuid", "capable"])
def test_a_privileged_program_gains_nothing(privileged_cat: dict[str, str], kind: str) -> None:
    def work(restrict: Callable[[], object]) -> object:
        restrict()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        run = subprocess.run([privileged_cat[kind], "/proc/self/status"], capture_output=True, text=True, check=True)
        status = dict(line.split(":\t", 1) for line in run.stdout.splitlines() if ":\t" in line)
        return status["Uid"].split()[1], int(status["CapEff"], 16) != 0

    assert in_child(lambda: work(lambda: None)) == str(("0" if kind == "setuid" else str(NOBODY), True)), "it could"
    assert in_child(lambda: work(security.no_new_privs)) == str((str(NOBODY), False))


def test_no_new_privs_cannot_be_undone() -> None:
    def work() -> object:
        security.no_new_privs()
        return own_status()["NoNewPrivs"], attempt(lambda: sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 0))

    assert in_child(work) == str(("1", "EINVAL"))


# Keys


def test_the_callers_session_keyring_is_not_inherited() -> None:
    session = (1 << 64) - 3  # KEY_SPEC_SESSION_KEYRING

    def visible() -> str:
        return attempt(lambda: syscall("request_key", b"user", b"imgrun-test", None, 0) > 0)

    def work() -> object:
        sc.join_session_keyring()  # what follows shall not be the test runner's
        syscall("add_key", b"user", b"imgrun-test", b"secret", 6, session - (1 << 64))
        inherited = in_child(visible)
        fresh = in_child(lambda: (security.fresh_keyring(), visible())[1])
        return inherited, fresh

    assert in_child(work) == str(("True", "ENOKEY"))


# /proc, where nothing is masked: in a user namespace

UNMASKED = sc.CLONE_NEWUSER | sc.CLONE_NEWNS | sc.CLONE_NEWPID


def mount_proc(directory: str) -> None:
    sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
    context = sc.fsopen("proc")
    sc.fsconfig_create(context)
    sc.move_mount(sc.fsmount(context), directory)


def test_a_user_namespace_protects_proc_by_itself(tmp_path: Path) -> None:
    written = [
        "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/vm/drop_caches", "sys/fs/nr_open", "sysrq-trigger",
        "irq/default_smp_affinity",
    ]  # fmt: skip
    read = ["kcore", "kmsg", "kpageflags", "timer_list"]
    directory = open_to_all(tmp_path)

    def work() -> object:
        mount_proc(directory)
        security.drop_capabilities()
        results = {
            path: attempt(lambda path=path, mode=mode: os.close(os.open(f"{directory}/{path}", mode)))
            for paths, mode in ((written, os.O_WRONLY), (read, os.O_RDONLY))
            for path in paths
        }
        return {path: result for path, result in results.items() if result not in ("EACCES", "EPERM", "ENOENT")}

    assert in_child(work, UNMASKED) == "{}"


def test_an_unmasked_proc_can_be_mounted_again_by_a_nested_user_namespace() -> None:
    def nested() -> object:
        sc.set_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
        context = sc.fsopen("proc")
        sc.fsconfig_create(context)
        os.close(sc.fsmount(context))
        return "mounted"

    def work() -> object:
        mount_proc("/proc")
        security.drop_capabilities()
        security.no_new_privs()
        pid_reading, pid_writing = os.pipe()
        if sc.clone(UNMASKED) == 0:
            os.write(pid_writing, attempt(nested).encode())
            os._exit(0)
        os.close(pid_writing)
        return os.read(pid_reading, 100).decode()

    assert in_child(work, UNMASKED) == "mounted"


def open_to_all(path: Path) -> str:
    """Let other ids reach a directory of pytest's."""
    for directory in (path, *path.parents):
        if directory.stat().st_mode & 0o011 != 0o011:
            directory.chmod(directory.stat().st_mode | 0o011)
    return str(path)


# The filter


def filtered(work: Callable[[], object]) -> Callable[[], object]:
    made = security.seccomp_filter()

    def run() -> object:
        made.load()
        return work()

    return run


# What an ordinary process may do without the filter, or fails otherwise than with EPERM.
ATTEMPTS: dict[str, tuple[Callable[[], object], str]] = {
    "unshare": (lambda: sc.unshare(sc.CLONE_NEWUSER), "EPERM"),
    "clone": (lambda: syscall("clone", sc.CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0) or os._exit(0), "EPERM"),
    "clone3": (lambda: syscall("clone3", 0, 0), "ENOSYS"),
    "setns": (lambda: syscall("setns", -1, 0), "EPERM"),
    "keyctl": (lambda: syscall("keyctl", 0, -3, 0), "EPERM"),
    "bpf": (lambda: syscall("bpf", 9999, 0, 0), "EPERM"),
    "userfaultfd": (lambda: syscall("userfaultfd", 1 << 20), "EPERM"),
    "io_uring_setup": (lambda: syscall("io_uring_setup", 0, 0), "EPERM"),
    "open_by_handle_at": (lambda: syscall("open_by_handle_at", -1, 0, 0), "EPERM"),
    "kexec_load": (lambda: syscall("kexec_load", 0, 99, 0, 0xFFFF), "EPERM"),
    "reboot": (lambda: syscall("reboot", 0, 0, 0, 0), "EPERM"),
    "mount": (lambda: syscall("mount", 0, 0, 0, 0, 0), "EPERM"),
    "umount2": (lambda: syscall("umount2", 0, 0), "EPERM"),
    "fsopen": (lambda: syscall("fsopen", 0, 0), "EPERM"),
    "swapon": (lambda: syscall("swapon", 0, 0), "EPERM"),
    "clock_settime": (lambda: syscall("clock_settime", 99, 0), "EPERM"),
    "personality": (lambda: syscall("personality", 0x0400000), "EPERM"),
    "TIOCSTI": (lambda: libc_checked("ioctl", -1, LONG(0x5412), b"x"), "EPERM"),
    "TIOCSTI with more bits": (lambda: syscall("ioctl", -1, 0x5412 | 1 << 40, 0), "EPERM"),
    "vsock": (lambda: syscall("socket", 40, 1, 0), "EPERM"),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_filter_denies(name: str) -> None:
    work, expected = ATTEMPTS[name]
    assert in_child(work) != expected, "the attempt must mean something: without the filter it ends otherwise"
    assert in_child(filtered(work)) == expected


def test_the_filter_denies_it_to_the_root_of_a_user_namespace() -> None:
    made = security.seccomp_filter()

    def work() -> object:
        allowed = attempt(lambda: mount_proc("/proc"))
        made.load()
        return allowed, attempt(lambda: mount_proc("/proc")), attempt(lambda: sc.unshare(sc.CLONE_NEWUSER))

    assert in_child(work, UNMASKED) == str(("None", "EPERM", "EPERM"))


ORDINARY_WORK = """
import concurrent.futures, multiprocessing, os, resource, socket, subprocess, tempfile, threading, mmap, select
def square(x): return x * x
if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(square, range(100))) == 328350
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert sum(pool.map(square, range(100))) == 328350
    assert subprocess.run(["sh", "-c", "echo a | tr a b | cat"], capture_output=True).stdout == b"b\\n"
    a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); s.listen()
    with tempfile.TemporaryDirectory() as d: os.symlink("x", d + "/y"); os.rename(d + "/y", d + "/z")
    mmap.mmap(-1, 1 << 20).close()
    select.epoll().close()
    os.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1)
    print("fine")
"""


def test_ordinary_work_is_allowed_and_the_shim_too(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(ORDINARY_WORK)
    status, theirs = os.pipe()
    output, their_output = os.pipe()
    made = security.seccomp_filter()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = sc.clone(sc.CLONE_NEWPID)
    if pid == 0:
        try:
            os.dup2(their_output, 1)
            os.dup2(their_output, 2)
            os.set_inheritable(theirs, True)
            security.drop_capabilities()
            security.no_new_privs()
            made.load()
            command = [sys.executable, str(script)]
            argv = init_shim.arguments(command, status_fd=theirs, uid=NOBODY, gid=NOBODY, cwd="/tmp")
            open_to_all(tmp_path)
            os.execve(init_shim.program(), argv, {"PATH": os.environ["PATH"]})
        finally:
            os._exit(99)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(theirs)
    os.close(their_output)
    with open(output, "rb") as text, open(status, "rb") as records:
        assert text.read().decode() == "fine\n"
        assert records.read() == b"started 2\nexit 0\n"
    os.waitpid(pid, 0)


INT_80 = r"""
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    long number = atol(argv[1]), first = strtol(argv[2], 0, 0), result;
    (void)argc;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(first), "c"(0), "d"(0), "S"(0), "D"(0) : "memory");
    printf("%d\n", (int)result);
    return 0;
}
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="about the 32-bit system calls of x86")
def test_32_bit_system_calls_are_filtered_too(tmp_path: Path) -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    source = tmp_path / "int80.c"
    source.write_text(INT_80)
    binary = str(tmp_path / "int80")
    subprocess.run(["cc", "-O", "-o", binary, str(source)], check=True)

    def call(number: int, first: int) -> Callable[[], object]:
        return lambda: int(subprocess.run([binary, str(number), str(first)], check=True, capture_output=True).stdout)

    getpid, keyctl, unshare = 20, 288, 310
    if int(in_child(call(getpid, 0))) < 0:
        pytest.skip("this kernel has no 32-bit system calls")
    assert int(in_child(filtered(call(getpid, 0)))) > 0
    for number, first in ((keyctl, 0), (unshare, sc.CLONE_NEWUSER)):
        assert int(in_child(call(number, first))) != -errno.EPERM
        assert int(in_child(filtered(call(number, first)))) == -errno.EPERM
