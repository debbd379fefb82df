"""``imgrun check JOB``: whether a running job will freeze, here and with these rights, and if not, what stands in the way.

It looks at what the kernel shows of the job's processes (proc(5)) and disturbs none of them. What it finds is true of the
moment only.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from collections.abc import Iterator

from imgrun.checkpoints.criu_process import first_pid
from imgrun.checkpoints.criu_rpc import GHOST_LIMIT
from imgrun.checkpoints.preflight import Finding, Level
from imgrun.errors import JobStateError
from imgrun.isolation.processes import children_of, members
from imgrun.job import Job

OWN_NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LISTENING = "0A"
DELETED = " (deleted)"
V4_IN_V6 = bytes(10) + b"\xff\xff"
IPC = (("shm", "shared memory"), ("sem", "semaphores"), ("msg", "message queues"))

Trouble = tuple[Level, str, str, str]
"""As a Finding, of one process."""


def audit(job: Job) -> list[Finding]:
    """What stands in the way of freezing the job. Raises JobStateError when it does not run."""
    try:
        return _audit(job, job.init_pid())
    except (FileNotFoundError, ProcessLookupError) as e:
        raise JobStateError(f"job {job.id} is ending", "see 'imgrun inspect' for how") from e


def _audit(job: Job, init: int) -> list[Finding]:
    spec = job.spec
    found: list[Finding] = []
    if spec.init != "shim":
        found.append(Finding("refused", "init", f"it runs with --init {spec.init}", "start it with --init shim"))
    if spec.tty:
        found.append(Finding("refused", "terminal", "it has a terminal", "start it without --tty"))
    if spec.seccomp != "off":
        found.append(Finding("refused", "seccomp", "it has a system call filter", "start it without --seccomp"))
    rights = spec.userns == "off" and os.geteuid() == 0
    tree = _tree(init)
    namespace = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        everyone = dict(members(namespace))
    finally:
        os.close(namespace)
    for pid, inside in everyone.items():
        if pid == init:
            continue
        who = f"process {inside} ({_name(pid)})"
        if inside >= first_pid():
            text = "it was restored lazily, and its memory is still being read"
            found.append(Finding("warning", "lazy", text, "a checkpoint waits until all of it is there"))
            continue
        if pid not in tree:
            text = f"{who} was brought in by 'imgrun exec': it is not frozen, and ends with the job"
            found.append(Finding("warning", "exec", text, "let it end first"))
            continue
        try:
            found += [Finding(level, name, f"{who} {text}", hint) for level, name, text, hint in _process(pid, init, rights)]
        except OSError:
            continue  # it has ended
    found += _system_v(init)
    return found or [Finding("ok", "processes", f"nothing stands in the way: {len(tree)} processes")]


def _tree(init: int) -> set[int]:
    tree: set[int] = set()
    todo = children_of(init)[:1]
    while todo:
        pid = todo.pop()
        tree.add(pid)
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{pid}/task/{thread}/children", "rb") as f:
                    todo += [int(word) for word in f.read().split()]
            except OSError:
                continue
    return tree


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return "?"


def _process(pid: int, init: int, rights: bool) -> Iterator[Trouble]:
    for name in OWN_NAMESPACES:
        if not os.path.samestat(os.stat(f"/proc/{pid}/ns/{name}"), os.stat(f"/proc/{init}/ns/{name}")):
            yield "refused", "namespace", f"has a {name} namespace of its own", "end it, or run it as a job of its own"
    status = _status(pid)
    if status.get("Seccomp", "0") != "0" and not rights:
        hint = "run it without its sandbox, or the job as root with --userns off"
        yield "refused", "seccomp", "has a system call filter", hint
    yield from _descriptors(pid, init, rights)
    yield from _mappings(pid, rights)


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in f)}


def _descriptors(pid: int, init: int, rights: bool) -> Iterator[Trouble]:
    root = _mounts(init)
    connections = _connections(pid)
    repairable = rights or _own_network(init)
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        what = f"in descriptor {fd}"
        if "io_uring" in target:
            yield "refused", "io_uring", f"uses io_uring {what}", "tell the program to do without"
        elif target == "anon_inode:inotify" and not rights:
            yield "warning", "inotify", f"watches files by inotify {what}", "CRIU may not find them again by their paths"
        elif "fanotify" in target and not rights:
            yield "refused", "fanotify", f"watches files by fanotify {what}", "end it"
        elif target.startswith(("/dev/pts/", "/dev/tty")):
            yield "warning", "terminal", f"uses the terminal {target} {what}", "end what uses a terminal"
        elif target.startswith("/dev/") and not target.startswith("/dev/shm/") and target not in PLAIN_DEVICES:
            if _is_device(pid, fd):
                yield "refused", "device", f"uses the device {target} {what}", "have it close that"
        elif target in connections and not repairable:
            hint = "start the job with --network none or private"
            yield "refused", "tcp", f"has a TCP connection on the host's network {what}", hint
        elif target in connections and not _is_loopback(connections[target]):
            hint = "its other end will not wait: have it close that, or be ready to connect anew"
            yield "warning", "tcp", f"has a TCP connection to outside {what}", hint
        elif target.endswith(DELETED) and (size := _unlinked_size(pid, fd)) > GHOST_LIMIT:
            text = f"has the deleted file {target.removesuffix(DELETED)} of {size >> 20} MiB open {what}"
            yield "refused", "deleted", text, f"let it keep its name: without, a file may have {GHOST_LIMIT >> 20} MiB"
        elif target.startswith("/") and _mount_of(pid, fd) not in root:
            yield "refused", "outside", f"has {target} from outside of the job open {what}", "have it close that"
        elif target.startswith(("anon_inode:[perf_event]", "anon_inode:kvm", "anon_inode:bpf")):
            yield "refused", "kernel-object", f"uses {target.partition(':')[2]} {what}", "have it close that"


def _own_network(init: int) -> bool:
    return not os.path.samestat(os.stat(f"/proc/{init}/ns/net"), os.stat("/proc/self/ns/net"))


def _unlinked_size(pid: int, fd: str) -> int:
    """The bytes on disk of a file without a name that a descriptor keeps; 0 for all others."""
    status = os.stat(f"/proc/{pid}/fd/{fd}")
    return status.st_blocks * 512 if status.st_nlink == 0 and stat.S_ISREG(status.st_mode) else 0


def _is_loopback(address: str) -> bool:
    """Of an address as /proc/net/tcp and tcp6 have it: words of four bytes in the machine's order."""
    numbers = b"".join(int(address[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(address), 8))
    return ipaddress.ip_address(numbers).is_loopback or (numbers[:-4] == V4_IN_V6 and numbers[-4] == 127)


def _connections(pid: int) -> dict[str, str]:
    """The TCP connections of the process's network: other ends, by how descriptors name them (proc(5), /proc/net/tcp)."""
    found: dict[str, str] = {}
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{name}", encoding="ascii") as f:
                rows = [line.split() for line in f][1:]
        except OSError:
            continue
        found |= {f"socket:[{row[9]}]": row[2].partition(":")[0] for row in rows if row[3] != LISTENING}
    return found


def _is_device(pid: int, fd: str) -> bool:
    mode = os.stat(f"/proc/{pid}/fd/{fd}").st_mode & 0o170000
    return mode in (0o020000, 0o060000)


def _mounts(pid: int) -> set[str]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="replace") as f:
        return {line.split(" ", 1)[0] for line in f}


def _mount_of(pid: int, fd: str) -> str:
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as f:
        return next((line.split()[1] for line in f if line.startswith("mnt_id:")), "")


def _mappings(pid: int, rights: bool) -> Iterator[Trouble]:
    seen = set()
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as f:
        for line in f:
            fields = line.split(None, 5)
            if len(fields) < 6 or not fields[5].rstrip().endswith(" (deleted)"):
                continue
            path = fields[5].rstrip().removesuffix(" (deleted)")
            in_memory = path.startswith(("/dev/shm/", "/dev/zero", "/SYSV", "/memfd:", "/anon_hugepage"))
            if rights or in_memory or path in seen:
                continue
            seen.add(path)
            yield "refused", "deleted", f"has the deleted file {path} mapped", "let it keep its files, or put them in /dev/shm"


def _system_v(init: int) -> list[Finding]:
    """What is in the job's IPC namespace. Its lists show the namespace of whoever reads them: a child enters it."""
    read, write = os.pipe2(os.O_CLOEXEC)
    fd = os.open(f"/proc/{init}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    users = os.open(f"/proc/{init}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    own = os.stat("/proc/self/ns/user")
    if (pid := os.fork()) == 0:
        try:
            from imgrun import syscalls as sc

            if not os.path.samestat(os.fstat(users), own):
                sc.setns(users)
            sc.setns(fd)
            for name, _ in IPC:
                with open(f"/proc/sysvipc/{name}", "rb") as f:
                    os.write(write, b"%d\n" % (len(f.readlines()) - 1))
        finally:
            os._exit(0)
    for descriptor in (write, fd, users):
        os.close(descriptor)
    os.waitpid(pid, 0)
    with open(read, encoding="ascii") as f:
        counts = [int(line) for line in f]
    return [
        Finding("refused", "system-v", f"the job has {count} System V {what}", "POSIX ones can be frozen (shm_overview(7))")
        for count, (_, what) in zip(counts, IPC, strict=False)
        if count > 0
    ]
