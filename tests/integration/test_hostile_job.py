"""Jobs that try to get out, as their root. Each attempt is also made where it works, by the host's root outside of a job."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import subprocess
import sys
import tempfile
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Imgrun, eventually
from hostile import Hostile, as_user, attack, hostile, userns

from imgrun import init_shim

__all__ = ["attack", "hostile", "userns"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what root may do outside is compared with what it may in a job")

NO_NESTED = "unshare: EPERM"
"""The answer to a user namespace of one's own in a job without one."""


def expected(userns: tuple[str, str], outcomes: dict[str, str]) -> dict[str, str]:
    """Nested attempts end early where there can be no user namespace."""
    if userns[1] == "auto":
        return outcomes
    return {attempt: NO_NESTED if attempt.startswith("nested") else outcome for attempt, outcome in outcomes.items()}


# -- files of the host -------------------------------------------------------------------------------------------------


def test_paths_to_the_host(hostile: Hostile, userns: tuple[str, str]) -> None:
    file = hostile.host.path / "etc/hosts"
    ways = [f"{file}", f"/..{file}", f"/proc/1/root{file}", f"/proc/self/root{file}", f"/proc/1/cwd{file}"]
    assert [hostile.outside("read", way) for way in (ways[0], ways[1], ways[3])] == ["ok"] * 3
    outcomes = hostile.tries(*(f"read {way}" for way in ways), flags=userns)
    assert set(outcomes.values()) <= {"open: ENOENT", "open: EACCES"}, outcomes
    done = hostile.sh("ls -a / > /tmp/a; ls -a /.. > /tmp/b; cmp /tmp/a /tmp/b && stat -c %i / /..", *userns)
    assert done.status == 0, done


def test_leaving_a_chroot_leads_to_the_jobs_root_only(hostile: Hostile, userns: tuple[str, str]) -> None:
    file = hostile.host.path / "etc/hosts"
    in_chroot = ["chroot", str(hostile.tree), "/bin/attack", "chain", str(file)]
    assert subprocess.run(in_chroot, capture_output=True, text=True, check=True).stdout == "ok\n"
    assert hostile.tries(f"chain {file}", flags=userns) == {f"chain {file}": "ENOENT"}


def test_file_handles(hostile: Hostile, userns: tuple[str, str]) -> None:
    """open_by_handle_at(2) needs no path, so it knows no root."""
    if hostile.outside("handle", "/") != "ok":
        pytest.skip("the host's own root cannot be opened by its usual handle: this would show nothing")
    source = hostile.directory / "bound"
    source.mkdir()
    outcomes = hostile.tries("handle /", "handle /bound", flags=(*userns, "--bind", f"{source}:/bound"))
    assert set(outcomes.values()) == {"EPERM"}, outcomes


def test_nothing_is_open_that_is_not_the_jobs(hostile: Hostile, userns: tuple[str, str]) -> None:
    for init in ("shim", "none"):
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        done = hostile.sh(
            "ls -l /proc/self/fd /proc/2/fd 2>/dev/null | sed -n 's/.* -> //p' | sort -u",
            *userns, "--init", init, pass_fds=[writing],
        )  # fmt: skip
        os.close(reading)
        os.close(writing)
        links = done.stdout.split()
        assert links, done
        assert all(link.startswith(("pipe:[", "/dev/null", "/proc/")) for link in links), done


def test_no_working_directory_by_way_of_a_descriptor(hostile: Hostile, userns: tuple[str, str]) -> None:
    """/proc/self/fd/N of whoever makes the job must not be one that leads out."""
    outcomes = set()
    for fd in range(3, 24):
        done = hostile.sh("pwd; ls", *userns, "--workdir", f"/proc/self/fd/{fd}")
        outcomes.add(done.status)
        assert done.stdout == "", (fd, done)
    assert outcomes == {125}


def test_the_shim_is_not_the_jobs_to_change(hostile: Hostile, userns: tuple[str, str]) -> None:
    program = Path(init_shim.program())
    before = hashlib.sha256(program.read_bytes()).digest()
    copy = hostile.directory / "shim"
    copy.write_bytes(program.read_bytes())
    copy.chmod(0o755)
    assert hostile.outside("append", copy) == "ok"
    ways = [f"append {path}" for path in ("/dev/imgrun/init", "/proc/1/exe", "/proc/2/exe")]
    ways += ["chmod /dev/imgrun/init 777", "nested read-write /dev/imgrun/init append /dev/imgrun/init"]
    for init in ("shim", "none"):
        outcomes = hostile.tries(*ways, flags=(*userns, "--init", init))
        assert outcomes["append /dev/imgrun/init"] in ("open: EACCES", "open: EROFS", "open: ETXTBSY")
        assert outcomes["chmod /dev/imgrun/init 777"] == "EROFS"
        if init == "shim":  # else 1 and 2 are the job's own
            assert "ok" not in outcomes.values(), outcomes
    assert hashlib.sha256(program.read_bytes()).digest() == before
    assert os.access(program, os.X_OK)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_read_only_binds(hostile: Hostile, userns: tuple[str, str], kind: str) -> None:
    source = hostile.host.path / ("data" if kind == "directory" else "etc/hosts")
    attempt = "create {}/x" if kind == "directory" else "append {}"
    outside = hostile.directory / "here"
    outside.mkdir() if kind == "directory" else outside.touch()
    own = hostile.directory / "own"
    own.mkdir() if kind == "directory" else own.touch()
    bound = ["bind", str(own), str(outside), "read-only", str(outside)]
    verb = attempt.format(outside).split()
    assert hostile.outside(*bound, *verb).endswith("EROFS")
    assert hostile.outside(*bound, "read-write", str(outside), *verb) == "ok"

    other = "/tmp" if kind == "directory" else "/etc/motd"
    outcomes = {
        attempt.format("/ro"): "EROFS" if kind == "directory" else "open: EROFS",
        "read-write /ro": "remount: EPERM",
        "chmod /ro 777": "EROFS",
        f"nested read-write /ro {attempt.format('/ro')}": "remount: EPERM",
        f"nested bind /ro {other} {attempt.format(other)}": "EROFS" if kind == "directory" else "open: EROFS",
        f"nested bind /ro {other} read-write {other}": "remount: EPERM",
    }
    assert hostile.tries(*outcomes, flags=(*userns, "--bind", f"{source}:/ro:ro")) == expected(userns, outcomes)


def test_what_is_covered_stays_covered(hostile: Hostile, userns: tuple[str, str]) -> None:
    covered = hostile.tree / "covered"
    covered.mkdir()
    (covered / "secret").write_text("secret")
    mounted = ["mount", "tmpfs", str(covered), ""]
    assert hostile.outside(*mounted, "read", f"{covered}/secret") == "open: ENOENT"
    assert hostile.outside(*mounted, "umount", str(covered), "read", f"{covered}/secret") == "ok"
    (hostile.tree / "view").mkdir()
    outcomes = {
        "read /covered/secret": "open: ENOENT",
        "umount /covered": "umount: EPERM",
        "nested umount /covered read /covered/secret": "umount: EINVAL",
        "nested umount /proc": "umount: EINVAL",
        "nested bind-alone / /view read /view/covered/secret": "bind: EINVAL",
        "nested bind / /view read /view/covered/secret": "open: ENOENT",
        "nested bind / /view umount /view/covered read /view/covered/secret": "umount: EINVAL",
    }
    assert hostile.tries(*outcomes, flags=(*userns, "--tmpfs", "/covered")) == expected(userns, outcomes)


def test_the_scratch_is_closed_to_other_users_of_the_host(
    hostile: Hostile, userns: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk the job's root is 0, so a set-uid program of the job is one of the host's root to whoever can reach it."""
    with tempfile.TemporaryDirectory(prefix="imgrun-state-", dir="/var/tmp") as open_directory:
        os.chmod(open_directory, 0o755)
        state = Path(open_directory) / "state"
        state.mkdir(mode=0o755)
        monkeypatch.setenv("IMGRUN_STATE_DIR", str(state))
        command = Imgrun(hostile.image)
        script = "cp /bin/attack /bin/evil; chmod 4755 /bin/evil; cp /bin/evil /tmp/evil; chmod 4755 /tmp/evil; sleep 60"
        job = command.background(script, *userns)
        found = eventually(lambda: sorted(path for path in state.rglob("evil") if path.stat().st_mode & 0o4000))
        assert len(found) <= 2
        assert {path.stat().st_uid for path in found} == {0}
        for path in found:
            assert as_user(1000, hostile.attack, "read", str(path)) == "open: EACCES\n"
            assert as_user(0, hostile.attack, "read", str(path)) == "ok\n"
        assert command("rm", "-f", job).status == 0


def test_each_job_has_ids_of_its_own(hostile: Hostile) -> None:
    """What compares ids only, as limits of users and keyrings do, does not take one job for another, nor for the host."""
    command = Imgrun(hostile.image)
    ranges = []
    for job in [command.background("sleep 60") for _ in range(3)]:
        init = json.loads(command("inspect", job).stdout)["init"]
        (row,) = Path(f"/proc/{init}/uid_map").read_text().splitlines()
        inside, outside, count = map(int, row.split())
        assert (inside, count) == (0, 65536)
        ranges.append(range(outside, outside + count))
    assert all(one.start >= 65536 for one in ranges)
    assert len({one.start // 65536 for one in ranges}) == 3


# -- mounts, devices, namespaces ---------------------------------------------------------------------------------------


def test_what_a_jobs_root_may_not_do(hostile: Hostile, userns: tuple[str, str]) -> None:
    here = hostile.directory / "here"
    here.mkdir()
    outcomes = {
        "mount tmpfs /tmp size=1m": ("mount: EPERM", ["mount", "tmpfs", here, ""]),
        "bind / /tmp": ("bind: EPERM", ["bind", "/etc", here]),
        "umount /tmp": ("umount: EPERM", ["mount", "tmpfs", here, "", "umount", here]),
        "read-write /sys": ("remount: EPERM", ["read-write", "/sys"]),
        "unshare 131072": ("EPERM", ["unshare", "131072"]),
        "setns /proc/self/ns/mnt": ("EPERM", ["setns", "/proc/self/ns/mnt"]),
        "mknod /tmp/disk 60660 7 0": ("EPERM", ["mknod", here / "disk", "60660", "7", "0"]),
        "mknod /dev/mem 20660 1 1": ("EPERM", ["mknod", here / "mem", "20660", "1", "1"]),
        "syslog": ("EPERM", ["syslog"]),
        "chmod /dev/null 600": ("EROFS", ["chmod", here, "700"]),
    }
    assert {tuple(control): hostile.outside(*control) for _, control in outcomes.values()} == {
        tuple(control): "ok" for _, control in outcomes.values()
    }
    assert hostile.tries(*outcomes, "pivot /tmp", flags=userns) == {
        **{attempt: outcome for attempt, (outcome, _) in outcomes.items()},
        "pivot /tmp": "EPERM",
    }


def test_the_hosts_device_nodes_keep_their_modes(hostile: Hostile, userns: tuple[str, str]) -> None:
    before = {name: os.stat(f"/dev/{name}").st_mode for name in os.listdir("/dev") if not name.startswith("pts")}
    done = hostile.sh("chmod 600 /dev/*; chown 7:7 /dev/*; chmod 666 /dev/null; echo x > /dev/null && echo written", *userns)
    assert done.stdout == "written\n"
    command = Imgrun(hostile.image)
    job = command.background("chmod 600 /proc/self/fd/0", *userns)  # its input is /dev/null
    assert command("wait", job).stdout == "1\n"
    assert "Read-only" in command("logs", job).stderr
    assert {name: os.stat(f"/dev/{name}").st_mode for name in before} == before
    assert os.stat("/dev/null").st_uid == 0


# -- the kernel's settings ---------------------------------------------------------------------------------------------

WRITABLE = ("/proc/pressure/",)
"""Writing there sets a watch for oneself (psi.rst)."""
WRITABLE_IN_A_USERNS = (
    "/proc/sys/fs/mqueue/", "/proc/sys/kernel/auto_msgmni", "/proc/sys/kernel/msg", "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/kernel/pid_max", "/proc/sys/kernel/sem", "/proc/sys/kernel/shm", "/proc/sys/kernel/domainname",
    "/proc/sys/kernel/hostname", "/proc/sys/user/", "/proc/sys/kernel/msg_next_id",
)  # fmt: skip
"""Of the job's own IPC, PID, UTS and user namespaces; those of the network are its own, or refused by owner."""


@pytest.mark.parametrize("network", ["none", "host"])
def test_settings_of_the_kernel(hostile: Hostile, userns: tuple[str, str], network: str) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    assert hostile.outside("write", "/proc/sys/kernel/core_pattern", pattern) == "ok"
    script = """
        for path in /proc/*; do
            case $path in /proc/[0-9]*|*self) ;; *) find $path -type f -perm -200 2>/dev/null ;; esac
        done | attack writable
        find /sys -type f -perm -200 2>/dev/null | attack writable
    """
    done = hostile.sh(script, *userns, "--network", network)
    own = (*WRITABLE, *(WRITABLE_IN_A_USERNS if userns[1] == "auto" else ()))
    if userns[1] == "auto" and network == "none":
        own = (*own, "/proc/sys/net/")
    assert [path for path in done.stdout.split() if not path.startswith(own)] == []
    outcomes = hostile.tries(f"write /proc/sys/kernel/core_pattern '{pattern}'", "append /proc/sysrq-trigger", flags=userns)
    assert "ok" not in outcomes.values(), outcomes


# -- control groups ----------------------------------------------------------------------------------------------------


def controller_mount() -> tuple[str, str, str, str]:
    """(file system, options, where it is mounted, a file that holds a limit) of the host's memory controller."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return kind, "memory", before.split()[4], "memory.limit_in_bytes"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return "cgroup2", "", before.split()[4], "memory.max"
    pytest.skip("no cgroup hierarchy has the memory controller here")


@pytest.fixture
def group() -> Iterator[Path]:
    path = Path(controller_mount()[2]) / f"hostile-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()


def test_limits_are_not_the_jobs_to_lift(hostile: Hostile, userns: tuple[str, str], group: Path) -> None:
    kind, options, _, limit = controller_mount()
    value = "-1" if kind == "cgroup" else "max"
    here = hostile.directory / "here"
    here.mkdir()
    mounted = ["mount", kind, str(here), options]
    assert hostile.outside(*mounted, "write", f"{here}/{group.name}/{limit}", value) == "ok"
    outcomes = hostile.tries(
        f"mount {kind} /tmp '{options}'",
        f"nested mount {kind} /tmp '{options}' write /tmp/{limit} {value}",
        f"nested mount {kind} /tmp '{options}' create /tmp/x/y",
        "nested mount cgroup2 /tmp '' write /tmp/cgroup.max.depth 7",
        f"nested mount {kind} /tmp '{options}' append /tmp/release_agent",
        f"nested mount {kind} /tmp '{options}' append /tmp/{group.name}/cgroup.procs",
        flags=(*userns, "--memory", "64M"),
    )
    assert "ok" not in outcomes.values(), outcomes
    script = f"""
        for file in $(find /sys/fs/cgroup -type f); do attack append $file; done | sort -u
        mkdir /sys/fs/cgroup/x /sys/fs/cgroup/*/x
        find /sys/fs/cgroup -name '{group.name}' -o -name release_agent
    """
    done = hostile.sh(script, *userns, "--memory", "64M")
    assert set(done.stdout.split()) <= {"open:", "EROFS", "EACCES"}, done


def test_an_init_divides_its_cgroup_and_keeps_its_limits(hostile: Hostile, userns: tuple[str, str]) -> None:
    init = hostile.tree / "sbin/init"
    init.parent.mkdir()
    init.write_text("""#!/bin/sh
        cd /sys/fs/cgroup
        for file in $(find . -maxdepth 1 -type f -perm -200); do echo $file $(attack append $file); done
        attack nested read-write /sys/fs/cgroup/cgroup.max.depth
        mkdir below && echo made && echo 1 > below/cgroup.max.depth && echo set && rmdir below
    """)
    init.chmod(0o755)
    done = Imgrun(hostile.image)("start", *userns, "--init", "image", hostile.image)
    *files, nested, made, was_set = done.stdout.splitlines()
    allowed = {file.split()[0] for file in files if file.endswith(" ok")}
    assert {"./cgroup.procs", "./cgroup.threads", "./cgroup.subtree_control"} == allowed, done
    assert f"./cgroup.max.depth open: {'EACCES' if userns[1] == 'auto' else 'EROFS'}" in files
    assert nested == (NO_NESTED if userns[1] == "off" else "remount: EPERM")
    assert (made, was_set) == ("made", "set")


def test_other_hierarchies_are_out_of_reach(hostile: Hostile, userns: tuple[str, str]) -> None:
    """A job is in a group of its own only where it must be: elsewhere its root is that of the whole hierarchy."""
    names = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    names = [name for name in names if name]
    if not names:
        pytest.skip("no cgroup v1 hierarchy here")
    attempts = [f"nested mount cgroup /tmp {name} write /tmp/notify_on_release 0" for name in names]
    outcomes = hostile.tries(*attempts, flags=userns)
    assert "ok" not in outcomes.values(), outcomes


# -- processes, keys, sockets, terminals -------------------------------------------------------------------------------


def test_killing(hostile: Hostile, userns: tuple[str, str]) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    assert hostile.outside("kill", str(bystander.pid), "0") == "ok"
    done = hostile.sh(f"attack kill 1 9; attack kill 1 19; attack kill {bystander.pid} 9; ls -d /proc/[0-9]*", *userns)
    first, second, third, *pids = done.stdout.split()
    assert (done.status, first, second, third) == (0, "ok", "ok", "ESRCH")
    assert len(pids) <= 4
    done = hostile.sh("attack kill -1 9; sleep 60", *userns)
    assert done.status == 137
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_tracing_the_first_process(hostile: Hostile, userns: tuple[str, str]) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    assert hostile.outside("ptrace", str(victim.pid)) == "ok"
    victim.kill()
    victim.wait()
    outcomes = hostile.tries("ptrace 1", "read /proc/1/mem", "append /proc/1/mem", "nested ptrace 1", flags=userns)
    assert outcomes["ptrace 1"] == "EPERM"
    assert outcomes["read /proc/1/mem"] == outcomes["append /proc/1/mem"] == "open: EACCES"


def test_keys_of_the_caller(hostile: Hostile, userns: tuple[str, str]) -> None:
    name = f"imgrun-test-{os.getpid()}"
    with_key = [str(hostile.attack), "with-key", name]
    control = subprocess.run([*with_key, str(hostile.attack), "key", name], capture_output=True, text=True, check=True)
    if "ENOSYS" in control.stdout:
        pytest.skip("this kernel has no keys")
    assert control.stdout == "ok\n"
    start = [sys.executable, "-m", "imgrun.cli", "start", *userns, str(hostile.image), "--", "attack", "key", name]
    done = subprocess.run([*with_key, *start], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout in ("ENOKEY\n", "EACCES\n"), done
    job = Imgrun(hostile.image).background("sleep 60", *userns)
    enter = [sys.executable, "-m", "imgrun.cli", "exec", job, "attack", "key", name]
    done = subprocess.run([*with_key, *enter], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout in ("ENOKEY\n", "EACCES\n"), done


def test_abstract_sockets_of_the_host(hostile: Hostile, userns: tuple[str, str]) -> None:
    import socket

    name = f"imgrun-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        attempt = f"abstract {name}"
        assert hostile.tries(attempt, flags=(*userns, "--network", "host")) == {attempt: "ok"}
        assert hostile.tries(attempt, flags=(*userns, "--network", "none")) == {attempt: "ECONNREFUSED"}


class CallersTerminal:
    """A terminal such as a shell has, raw, so that what is typed into it can be read at once."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        fcntl.fcntl(self.slave, fcntl.F_SETFL, os.O_NONBLOCK)

    def run(self, *command: str) -> str:
        """Run a command in a session of its own with this terminal; what it printed."""
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=self.slave, stdout=self.slave, stderr=self.slave
        )
        printed = b""
        os.set_blocking(self.master, False)

        def ended() -> bool:
            nonlocal printed
            try:
                printed += os.read(self.master, 65536)
            except BlockingIOError:
                return process.poll() is not None
            return False

        eventually(ended, "the command's end")
        return printed.decode()

    def typed(self) -> bytes:
        try:
            return os.read(self.slave, 100)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[CallersTerminal]:
    made = CallersTerminal()
    yield made
    made.close()


def test_typing_into_the_callers_terminal(hostile: Hostile, userns: tuple[str, str], terminal: CallersTerminal) -> None:
    assert "ok" in terminal.run(str(hostile.attack), "tiocsti", "0")
    assert terminal.typed() == b"x"

    imgrun = [sys.executable, "-m", "imgrun.cli"]
    types = ["for fd in 0 1 2; do attack tiocsti $fd; attack take-tty $fd; done"]
    start = [*imgrun, "start", *userns]
    command = [str(hostile.image), "--", "sh", "-c", *types]
    for flags in ([], ["--interactive"], ["--tty"]):
        printed = terminal.run(*start, *flags, *command)
        assert printed.split(), flags
        assert "--tty" in flags or set(printed.split()) == {"ENOTTY"}
        assert terminal.typed() == b"", (flags, printed)
    job = Imgrun(hostile.image).background("sleep 60", *userns)
    for flags in ([], ["-i"], ["-t"]):
        printed = terminal.run(*imgrun, "exec", *flags, job, "sh", "-c", *types)
        assert printed.split(), flags
        assert "-t" in flags or set(printed.split()) == {"ENOTTY"}
        assert terminal.typed() == b"", (flags, printed)


# -- entering a hostile job --------------------------------------------------------------------------------------------


def test_exec_is_as_restricted_as_the_job(hostile: Hostile, userns: tuple[str, str]) -> None:
    command = Imgrun(hostile.image)
    look = "grep -E 'Cap|NoNewPrivs|Seccomp:|Uid|Gid|Groups' /proc/self/status; cat /proc/self/uid_map /proc/self/cgroup"
    for seccomp in ("off", "default"):
        job = command.background(f"({look}) > /tmp/look; sleep 60", *userns, "--seccomp", seccomp)
        eventually(lambda job=job: command("exec", job, "test", "-s", "/tmp/look").status == 0)
        assert command("exec", job, "sh", "-c", look).stdout == command("exec", job, "cat", "/tmp/look").stdout
        done = command("exec", job, "sh", "-c", "attack chmod /proc/self/fd/0 600; attack nested; ls -l /proc/self/fd")
        outcomes = done.stdout.split()
        assert outcomes[0] in ("ok", "EROFS"), done  # its own pipe
        links = done.stdout.split(" -> ")[1:]
        assert len(links) >= 3, done
        assert all(link.startswith(("pipe:[", "/proc/")) for link in links), done
    assert os.stat("/dev/null").st_mode & 0o777 == 0o666


def test_who_enters_cannot_be_looked_into(hostile: Hostile, userns: tuple[str, str]) -> None:
    """Between fork and exec, whoever enters is a copy of the caller, with its memory, program and descriptors."""
    secret = f"secret-{os.getpid()}"
    watched = subprocess.Popen([hostile.attack, "snoop", "3", secret], stdout=subprocess.PIPE, text=True)
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1)"], env={"SECRET": secret}, check=True)
    assert set(watched.communicate()[0].split()) == {"environment", "program"}

    command = Imgrun(hostile.image)
    job = command.background(f"attack snoop 600 {secret} & attack snoop 600 {secret} & wait", *userns)
    for _ in range(15):
        assert command("exec", job, "true", env={"SECRET": secret}).status == 0
    assert command("logs", job).stdout == ""
    assert command("rm", "-f", job).status == 0


def test_what_the_job_holds_open_keeps_nobody_waiting(hostile: Hostile, userns: tuple[str, str]) -> None:
    """It may stop whoever enters before the command runs, and get hold of the pipe that tells how that went."""
    command = Imgrun(hostile.image)
    job = command.background("exec attack hold-status", *userns)

    def entered() -> bool:
        assert command("exec", job, "sh", "-c", "echo ran; exit 3") == (3, "ran\n", "")
        return "held" in command("logs", job).stdout

    eventually(entered, "the job has got hold of it", 60)
    assert command("exec", job, "nope").status == 127
    assert command("rm", "-f", job).status == 0


def test_a_job_does_not_run_the_programs_of_its_image_as_the_host(hostile: Hostile, userns: tuple[str, str]) -> None:
    """Neither Python modules nor libraries are searched for in the image by the processes that enter it."""
    evil = hostile.tree / "evil.py"
    evil.write_text("open('/tmp/owned', 'w')\n")
    for place in filter(None, sys.path):
        directory = hostile.tree / place.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name in sys.stdlib_module_names:
            if not (directory / f"{name}.py").exists():
                os.link(evil, directory / f"{name}.py")
    command = Imgrun(hostile.image)
    for flags in ((), ("--network", "none"), ("--rlimit", "nofile=100")):
        job = command.background("sleep 60", *userns, *flags)
        for exec_flags in ((), ("-t",), ("-i",), ("--user", "1000")):
            assert command("exec", *exec_flags, job, "test", "-e", "/tmp/owned").status == 1
        assert command("rm", "-f", job).status == 0
