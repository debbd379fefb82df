"""What a job of an ordinary user must not reach of the caller's: each statement is attacked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import expect
from ordinary import AsUser, has_route

SECRET = "s3cret-of-the-caller"


@pytest.fixture
def caller_process(run: AsUser) -> int:
    """Another process of the caller's, with a secret in its environment; ended with ``run``."""
    process = run.program("sh", "-c", "echo ready; exec sleep 4321", env={"SECRET": SECRET})
    expect(process, "ready")
    return process.pid


@pytest.fixture
def secret_file(run: AsUser) -> Path:
    path = run.directory / "secret"
    path.write_text(SECRET)
    os.chown(path, run.user.uid, run.user.gid)
    path.chmod(0o600)
    return path


def test_files(run: AsUser, secret_file: Path) -> None:
    """No path leads to them: not the host's, not /proc/*/root or cwd, not .. of the root, nor of a bind."""
    (run.directory / "given").mkdir()
    script = f"""
        cat {secret_file} {run.user.home}/.profile /proc/*/root{secret_file} /proc/*/cwd/{secret_file.name}
        cat /../../..{secret_file} /d/../secret /d/..{secret_file}
        cd /d && cat ../secret
        find / -xdev -name {secret_file.name} -path '*imgrun-rootless*'
    """
    done = run.sh(script, "--bind", f"{run.directory}/given:/d")
    assert done.stdout == "", done


def test_a_bind_can_be_left_by_no_link(run: AsUser, secret_file: Path) -> None:
    given = run.directory / "given"
    given.mkdir()
    os.chown(given, run.user.uid, run.user.gid)
    (given / "link").symlink_to(secret_file)
    (given / "up").symlink_to("../secret")
    assert run.sh("cat /d/link /d/up; ls /d/link/", "--bind", f"{given}:/d").stdout == ""


@pytest.mark.parametrize("flags", [(), ("--init", "none"), ("--network", "none")])
def test_processes(run: AsUser, caller_process: int, flags: tuple[str, ...]) -> None:
    """The caller's processes are neither seen nor signalled nor traced: the supervisor and servers neither."""
    script = f"""
        cat /proc/[0-9]*/comm | grep -c -e python -e squashfuse -e pytest
        kill -9 {caller_process} 2>/dev/null && echo killed
        kill -9 -1 2>/dev/null
        [ ! -e /proc/{caller_process} ] || grep -q sh /proc/{caller_process}/comm || echo seen
        true
    """
    done = run.sh(script, *flags)
    assert done.stdout.split()[:1] == ["0"], done
    assert "seen" not in done.stdout
    assert "killed" not in done.stdout or caller_process < 10
    assert Path(f"/proc/{caller_process}/cmdline").read_bytes() == b"sleep\x004321\x00"


def test_no_pid_of_the_host_means_the_same_inside(run: AsUser) -> None:
    done = run.sh("cd /proc; for p in [0-9]*; do echo $p $(cat $p/comm 2>/dev/null); done")
    names = {line.split()[1] for line in done.stdout.splitlines() if len(line.split()) == 2}
    assert names <= {"imgrun-init", "imgrun-reaper", "sh", "cat"}, done


def test_environment(run: AsUser) -> None:
    """Not in its own environment, and not in that of any process it sees: PID 1 was once a copy of the supervisor."""
    done = run.sh("env; cat /proc/*/environ | tr '\\0' '\\n'", env={"SECRET": SECRET, "SSH_AUTH_SOCK": "/x/agent"})
    assert SECRET not in done.stdout
    assert "SSH_AUTH_SOCK" not in done.stdout
    assert str(run.state) not in done.stdout
    assert "IMGRUN_JOB_ID" in done.stdout


def test_descriptors(run: AsUser, secret_file: Path) -> None:
    """None beyond the three streams, and those are pipes of the job's own."""
    with open(secret_file, encoding="ascii") as held:
        done = run.sh("ls -l /proc/self/fd /proc/1/fd /proc/2/fd", pass_fds=[held.fileno()])
    assert SECRET not in done.stdout
    assert str(run.directory) not in done.stdout
    assert "fuse" not in done.stdout
    assert "/images/" not in done.stdout
    own = done.stdout.split("/proc/self/fd:")[1].split("\n\n")[0]
    # The fourth is that of ls itself.
    assert sum("->" in line for line in own.splitlines()) <= 4, done


def test_descriptors_of_exec(run: AsUser, secret_file: Path) -> None:
    job = run.background("sleep 60")
    with open(secret_file, encoding="ascii") as held:
        done = run("exec", job, "sh", "-c", "ls -l /proc/self/fd; env", pass_fds=[held.fileno()], env={"SECRET": SECRET})
    assert SECRET not in done.stdout
    assert str(run.directory) not in done.stdout


def test_the_memory_of_pid_1_and_of_exec(run: AsUser) -> None:
    """They began as copies of the caller's program, and have become others before the job's own could look."""
    job = run.background("sleep 60")
    for done in (run.sh("cat /proc/[12]/maps /proc/self/maps"), run("exec", job, "cat", "/proc/1/maps", "/proc/self/maps")):
        assert "busybox" in done.stdout
        assert "python" not in done.stdout


KEYS = r"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
ADD, REQUEST = (248, 249) if sys.platform == "linux" and __import__("os").uname().machine == "x86_64" else (217, 218)
if sys.argv[1] == "hold":
    libc.syscall(250 if ADD == 248 else 219, ctypes.c_long(1), None)  # a session keyring of our own
    assert libc.syscall(ADD, b"user", b"imgrun-test", b"secret", ctypes.c_long(6), ctypes.c_long(-3)) > 0
    import os
    os.execvp(sys.argv[2], sys.argv[2:])
print("found" if libc.syscall(REQUEST, b"user", b"imgrun-test", None, ctypes.c_long(0)) > 0 else "none")
"""


def test_keyrings(run: AsUser) -> None:
    """The keys of the caller's session are not the job's. The question is asked by the host's Python, bound in."""
    script = run.directory / "keys.py"
    script.write_text(KEYS)
    python = "/usr/bin/python3"
    run.wrap = (python, str(script), "hold")
    assert run.program(*run.wrap, python, str(script), "ask").communicate()[0] == b"found\n", "it can be had outside"
    given = [path for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)]
    binds = [word for path in given for word in ("--bind", f"{os.path.realpath(path)}:{path}:ro")]
    done = run("start", *binds, "--bind", f"{script}:/keys.py:ro", run.image, "--", python, "/keys.py", "ask")
    assert done == (0, "none\n", "")


def test_sockets(run: AsUser) -> None:
    """A socket in the file system is reached only when given, an abstract one only with the host's network."""
    path = run.directory / "agent"
    server = (
        "import socket, sys\n"
        "a = socket.socket(socket.AF_UNIX); a.bind('\\0imgrun-test-' + sys.argv[2]); a.listen()\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('ready', flush=True); s.accept()"
    )
    process = run.program("/usr/bin/python3", "-c", server, path, run.directory.name)
    expect(process, "ready")
    done = run.sh(f"ls {path}; cat /proc/net/unix", "--network", "none")
    assert done.stdout.count("imgrun-test") == 0, done
    assert str(path) not in done.stdout


SERVER = """
import socket, sys
a = socket.socket(socket.AF_UNIX); a.bind("\\0imgrun-test-" + sys.argv[1]); a.listen()
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True)
while True: s.accept()[0].sendall(b"reached\\n")
"""


@pytest.mark.parametrize("network", ["host", "none", "private"])
def test_the_hosts_loopback(run: AsUser, network: str) -> None:
    """Its services, and its abstract sockets, are for those jobs only that have the host's network."""
    if network == "private" and not has_route():
        pytest.skip("this machine has no default route that a private network could lead out by")
    process = run.program("/usr/bin/python3", "-c", SERVER, run.directory.name)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    script = f"busybox nc 127.0.0.1 {port} </dev/null; grep -c imgrun-test-{run.directory.name} /proc/net/unix"
    done = run.sh(script, "--network", network)
    assert done.stdout.split() == (["reached", "1"] if network == "host" else ["0"]), done


def test_shared_memory(run: AsUser) -> None:
    """That of System V, which any process of the same user could attach to."""
    made = run.program("ipcmk", "--shmem", "4096").communicate()[0].decode().split()[-1]
    try:
        assert made in run.program("ipcs", "--shmems").communicate()[0].decode()
        assert made not in run.sh("busybox ipcs -m").stdout.split()
        assert run.sh("busybox ipcs -m").stdout.count("\n") < 5
    finally:
        run.program("ipcrm", "--shmem-id", made).communicate()


@pytest.mark.parametrize("program", ["mount -t tmpfs x /mnt", "hostname x", "umount /proc", "mknod /tmp/null c 1 3"])
def test_root_inside_may_not(run: AsUser, program: str) -> None:
    assert run.sh(f"mkdir -p /mnt; {program} 2>/dev/null && echo done").stdout == ""


def test_nothing_is_gained_outside(run: AsUser) -> None:
    """What the job's root writes through a bind is the caller's: no set-uid file of root's comes of it."""
    given = run.directory / "given"
    given.mkdir()
    os.chown(given, run.user.uid, run.user.gid)
    assert run.sh("cp /bin/busybox /d/b && chmod 4755 /d/b && mkdir /d/e", "--bind", f"{given}:/d").status == 0
    for path in (given / "b", given / "e"):
        assert path.stat().st_uid == run.user.uid
    assert run.sh("cat /h/shadow; touch /h/x", "--bind", "/etc:/h").stdout == ""


def test_the_hosts_mount_table_never_shows_a_job(run: AsUser) -> None:
    tables = [Path("/proc/self/mountinfo"), Path(f"/proc/{run.world.pid}/mountinfo")]
    before = [table.read_text() for table in tables]
    job = run.background("sleep 60", "--tmpfs", "/t")
    assert [table.read_text() for table in tables] == before
    assert run("exec", job, "true").status == 0


def test_the_servers_are_out_of_the_jobs_reach(run: AsUser) -> None:
    """They are in no namespace of the job's, and what it does to the mount it may do to itself."""
    process = run.foreground("echo ready; cat; cat /etc/motd")
    expect(process, "ready")
    (server,) = run.processes("squashfuse_ll")
    (init,) = run.processes("imgrun-init")
    for name in ("pid", "mnt"):
        assert os.readlink(f"/proc/{server}/ns/{name}") != os.readlink(f"/proc/{init}/ns/{name}")
    assert process.communicate(b"", timeout=30)[0] == b"of the image\n"
