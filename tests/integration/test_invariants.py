"""The invariants of the design, attacked: nothing left, nothing half-done, the image is safe, nothing leaks in."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import COMMAND, Imgrun, eventually, expect, kill, refused
from conftest import records
from leaks import Leaks

from images import Images, sha256
from imgrun.isolation.processes import children_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

STUBBORN = "trap '' TERM INT HUP; echo ready; while :; do sleep 0.05; done"


def supervisor_of(run: Imgrun, job: str) -> int:
    return int(json.loads(run("inspect", job).stdout)["supervisor"])


def init_of(run: Imgrun, job: str) -> int:
    return int(json.loads(run("inspect", job).stdout)["init"])


def traces(state: Path) -> set[str]:
    return set(records(state)) if state.exists() else set()


def test_what_these_tests_look_for_is_seen(run: Imgrun, leaks: Leaks) -> None:
    before = leaks.left()
    process = run.foreground(STUBBORN)
    expect(process, "ready")
    seen = "\n".join(line for line in leaks.left() if line not in before)
    for kind in ("a loop device of", "imgrun-init", "imgrun-reaper", "/cgroup/", "-m imgrun.cli start"):
        assert kind in seen


# -- SIGKILL of the supervisor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--scratch-size", "16M", "--network", "none", "--userns", "off")])
def test_supervisor_killed_while_it_starts(run: Imgrun, state_dir: Path, leaks: Leaks, flags: tuple[str, ...]) -> None:
    """At 60 moments between the first trace of the job and its command; often enough to hit every step."""
    rounds = 30 if flags else 60
    duration = min(time_from_first_trace(run, state_dir, flags) for _ in range(3))
    unfinished = 0
    for i in range(rounds):
        before = traces(state_dir)
        process = run.foreground(STUBBORN, *flags, stdin=subprocess.DEVNULL)
        eventually(lambda before=before: traces(state_dir) - before)
        time.sleep(duration * i / rounds)
        process.kill()
        process.wait()
        assert process.stdout is not None
        unfinished += process.stdout.read() == b""
        if i % 10 == 9:
            leaks_but_cgroups_are_gone(leaks)
            run("gc")
            leaks.check()
            assert [r for r in records(state_dir) if not r.startswith("live/.")] == []
    assert unfinished > rounds / 4, "the kills came too late to break anything"


def time_from_first_trace(run: Imgrun, state: Path, flags: tuple[str, ...]) -> float:
    process = run.foreground(STUBBORN, *flags)
    eventually(lambda: traces(state))
    began = time.monotonic()
    expect(process, "ready")
    duration = time.monotonic() - began
    process.kill()
    process.wait()
    run("gc")
    return duration


def leaks_but_cgroups_are_gone(leaks: Leaks) -> None:
    """What the kernel cleans up by itself, before any command of ours has run."""
    eventually(lambda: not [line for line in leaks.left() if "/cgroup" not in line], f"{leaks.left()}")


@pytest.mark.parametrize("script", ["exit 3", "echo x > /tmp/x; mkdir /new"])
def test_supervisor_killed_while_the_job_ends(run: Imgrun, state_dir: Path, script: str) -> None:
    for i in range(12):
        process = run.foreground(f"echo ready; {script}")
        expect(process, "ready")
        time.sleep(i * 0.0015)
        process.kill()
        process.wait()
        run("gc")
        assert records(state_dir) == []


@pytest.mark.parametrize("flags", [(), ("--init", "none"), ("-t",), ("--userns", "off"), ("--scratch-size", "16M")])
def test_supervisor_killed_while_the_job_runs(run: Imgrun, state_dir: Path, leaks: Leaks, flags: tuple[str, ...]) -> None:
    job = run.background(f"(busybox setsid sh -c {shlex.quote(STUBBORN)} &) ; {STUBBORN}", "--name", "n", *flags)
    eventually(lambda: run("logs", job).stdout.count("ready") == 2)
    run("exec", job, "touch", "/tmp/x", "/new")
    pids = everyone(init_of(run, job))
    assert len(pids) >= 3
    os.kill(supervisor_of(run, job), signal.SIGKILL)
    eventually(lambda: not any(is_alive(pid) for pid in pids), "the end of all the job's processes")
    assert run("ps", "-q").stdout == ""
    assert json.loads(run("inspect", job).stdout)["result"]["reason"] == "lost"
    assert run("wait", job).status == 125
    leaks.check()
    assert sorted(p.name for p in (state_dir / "jobs" / job).iterdir() if "scratch" in p.name) == []
    refused(run("signal", job, "TERM"), 125)
    run("rm", job)
    assert records(state_dir) == []


def test_supervisor_killed_while_it_stops_the_job(run: Imgrun, state_dir: Path) -> None:
    for delay in (0.0, 0.05, 0.2, 0.31, 0.35):
        job = run.background(STUBBORN, "--stop-timeout", "300ms")
        eventually(lambda job=job: run("logs", job).stdout)
        supervisor = supervisor_of(run, job)
        stopping = run.popen("stop", job)
        time.sleep(0.1 + delay)
        kill(supervisor)
        assert stopping.wait(30) in (0, 125)
    run("rm", "-fa")
    assert records(state_dir) == []


def everyone(init: int) -> list[int]:
    """All processes below and including PID 1 of a job, as the host sees them."""
    found = [init]
    for pid in found:
        found += children_of(pid)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# -- SIGKILL inside the job --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["shim", "reaper", "command"])
def test_a_process_of_the_job_is_killed(run: Imgrun, state_dir: Path, depth: int) -> None:
    job = run.background(f"(busybox setsid sh -c {shlex.quote(STUBBORN)} &) ; {STUBBORN}", "--rm")
    eventually(lambda: run("logs", job).stdout.count("ready") == 2)
    pids = everyone(init_of(run, job))
    waiting = run.popen("wait", job)
    time.sleep(0.3)
    os.kill(pids[depth], signal.SIGKILL)
    waiting.wait(30)
    assert not any(is_alive(pid) for pid in pids)
    eventually(lambda: records(state_dir) == [])


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["shim", "reaper", "command"])
def test_what_is_said_of_a_kill_inside(run: Imgrun, depth: int) -> None:
    process = run.foreground(STUBBORN, "--name", "n", "--json")
    expect(process, "ready")
    os.kill(everyone(init_of(run, "n"))[depth], signal.SIGKILL)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 137
    result = json.loads(stdout)
    assert (result["reason"], result["signal"], result["exit_code"]) == ("signaled", 9, None)


def test_a_job_that_daemonises_dies_with_its_command(run: Imgrun) -> None:
    daemon = f"busybox setsid sh -c {shlex.quote(f'trap : TERM; ({STUBBORN}) &')}"
    done = run.sh(f"{daemon} > /dev/null 2>&1 & sleep 0.3; echo end; exit 6", timeout=20)
    assert (done.status, done.stdout) == (6, "end\n")
    # One that keeps the output open does not keep the command waiting either.
    done = run.sh(f"{daemon} & sleep 0.3; echo end; exit 6", timeout=20)
    assert (done.status, done.stdout) == (6, "ready\nend\n")


def test_a_job_that_forks_forever(run: Imgrun) -> None:
    """Each of its processes forks as fast as it can, and none gives up."""
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    flags = ("--pids", "40", "--time-limit", "1s", "--stop-timeout", "1s", "--json")
    done = run("start", *flags, "/", "--", "/usr/bin/python3", "-c", bomb)
    assert done.status == 124, done
    usage = json.loads(done.stdout)["usage"]
    assert usage["pids_peak"] in (None, 40)
    assert usage["pids_refused"] is None or usage["pids_refused"] > 0
    assert run.sh("echo fine").stdout == "fine\n"


# -- many at once, many in a row ---------------------------------------------------------------------------------------


def test_fifty_starts_of_one_image_at_once(run: Imgrun, state_dir: Path) -> None:
    processes = [run.foreground(f"echo {i} > /x; cat /x; exit {i}", stdin=subprocess.DEVNULL) for i in range(50)]
    for i, process in enumerate(processes):
        stdout, stderr = process.communicate(timeout=100)
        assert (process.returncode, stdout, stderr) == (i, f"{i}\n".encode(), b"")
    assert records(state_dir) == []


def test_two_hundred_starts_in_a_row(image: Path, state_dir: Path, leaks: Leaks) -> None:
    """From one process, which must not grow either."""
    program = """
import os, sys
from imgrun import Job, JobSpec
def size():
    fds = len(os.listdir("/proc/self/fd"))
    return fds, int(open("/proc/self/statm").read().split()[1]) * 4096 >> 10
for i in range(200):
    job = Job.start(JobSpec(image=sys.argv[1], command=("sh", "-c", "echo x > /x; exit 3")))
    result = job.wait()
    assert result.exit_code == 3, result
    job.remove()
    if i == 20:
        first = size()
print(first, size())
assert size()[0] == first[0], "descriptors"
assert size()[1] < first[1] + 4096, "memory"
"""
    before = set(os.listdir("/run/imgrun/ids")) if os.path.isdir("/run/imgrun/ids") else set()
    done = subprocess.run([sys.executable, "-c", program, image], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done
    assert records(state_dir) == []
    leaks.check()
    assert len(set(os.listdir("/run/imgrun/ids")) - before) < 50, "id ranges are used again"


# -- where the state is ------------------------------------------------------------------------------------------------


def in_private_mounts(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a mount namespace of its own; ``$@`` is the command."""
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *COMMAND, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def small_disk(state: Path, size: str, then: str = "") -> str:
    """A script that runs the command with a state directory of this size, and tells what is left there."""
    made = f"mkdir {state} && mount -t tmpfs -o size={size},mode=700 x {state} && {then or ':'}"
    return f'{made} && "$@"; s=$?; echo left: $(find {state} -type f ! -name filler) >&2; exit $s'


@pytest.mark.parametrize("flags", [(), ("-d",)])
def test_a_full_disk_for_the_state(run: Imgrun, state_dir: Path, flags: tuple[str, ...]) -> None:
    fill = f"{{ dd if=/dev/zero of={state_dir}/filler bs=4k 2>/dev/null; true; }}"
    script = small_disk(state_dir, "256k", fill)
    done = in_private_mounts(script, "start", *flags, run.image, "--", "true")
    lines = done.stderr.splitlines()
    assert done.returncode == 125, done
    assert lines[0].startswith("imgrun: ")
    assert "space" in lines[0]
    assert lines[1].startswith("  ")
    assert lines[2:] == ["left:"]


def test_a_disk_of_any_small_size_for_the_state(run: Imgrun, state_dir: Path) -> None:
    """Whichever write is the one that fails."""
    statuses = set()
    for size in range(16, 112, 12):
        done = in_private_mounts(small_disk(state_dir, f"{size}k"), "start", run.image, "--", "true")
        lines = done.stderr.splitlines()
        assert lines[-1] == "left:", done
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 125), done
        assert done.returncode == 0 or lines[0].startswith("imgrun: "), done
        statuses.add(done.returncode)
        state_dir.rmdir()
    assert statuses == {0, 125}


@pytest.mark.parametrize("keep", [(), ("--no-rm",)])
def test_a_job_that_fills_the_disk_of_its_own_scratch(
    run: Imgrun, state_dir: Path, tmp_path: Path, keep: tuple[str, ...]
) -> None:
    """It gets ENOSPC; its exit status and its result are still told."""
    result = tmp_path / "r.json"
    script = "dd if=/dev/zero of=/tmp/big bs=64k; echo dd $?; dd if=/dev/zero of=/tmp/rest bs=1; exit 7"
    done = in_private_mounts(
        small_disk(state_dir, "2M"), "start", *keep, "--result", result, run.image, "--", "sh", "-c", script
    )
    assert (done.returncode, done.stdout) == (7, "dd 1\n"), done
    assert json.loads(result.read_text())["exit_code"] == 7


def test_a_read_only_state_directory(run: Imgrun, state_dir: Path) -> None:
    for made in ("", f"mkdir {state_dir}/jobs {state_dir}/names {state_dir}/live &&"):
        script = f'mkdir -p {state_dir} && mount -t tmpfs x {state_dir} && {made} mount -o remount,ro {state_dir} && "$@"'
        for flags in ((), ("-d",)):
            done = in_private_mounts(script, "start", *flags, run.image, "--", "true")
            lines = done.stderr.splitlines()
            assert (done.returncode, len(lines)) == (125, 2), done
            assert str(state_dir) in lines[0]
            assert "IMGRUN_STATE_DIR" in lines[1]
        assert in_private_mounts(script, "ps", "-a").returncode == 0


def test_a_state_directory_of_another(run: Imgrun, state_dir: Path) -> None:
    state_dir.mkdir()
    os.chown(state_dir, 1234, 1234)
    refused(run.sh("true"), 125, str(state_dir))
    os.chown(state_dir, 0, 0)
    state_dir.chmod(0o777)
    refused(run.sh("true"), 125, str(state_dir))


# -- the image ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--read-only",), ("--userns", "off"), ("--scratch-size", "16M")])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_the_image_is_not_changed(run: Imgrun, images: Images, kind: str, flags: tuple[str, ...]) -> None:
    image = images.filesystem(kind)
    content, before = sha256(image), unchanged(image)
    script = "echo x > /x; rm -rf /etc/*; chown 5:5 /bin; chmod 0 /root; cat /bin/busybox > /y; sync; kill -9 $$"
    assert run("start", *flags, image, "--", "sh", "-c", script).status == 137
    assert unchanged(image) == before
    assert sha256(image) == content


def unchanged(image: Path) -> tuple[int, int, int]:
    status = image.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_blocks


# -- what a job is given -----------------------------------------------------------------------------------------------


def test_no_descriptor_of_the_caller_reaches_the_job(run: Imgrun, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    fds = [os.open(secret, os.O_RDWR), os.open("/", os.O_RDONLY | os.O_DIRECTORY), *os.pipe()]
    high = os.dup2(fds[0], 200)
    process = run.foreground("ls /proc/self/fd; echo ready; cat", "--name", "n", pass_fds=[*fds, high])
    assert process.stdout is not None
    # The last is that of ls itself, for the directory.
    assert [process.stdout.readline() for _ in range(4)] == [b"0\n", b"1\n", b"2\n", b"3\n"]
    expect(process, "ready")
    init, reaper, command, *_ = everyone(init_of(run, "n"))
    for pid in (reaper, command):
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
        assert all(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("pipe:") for fd in range(3))
    assert [os.readlink(f"/proc/{init}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{init}/fd")] == ["pipe"]
    for fd in (*fds, high):
        os.close(fd)


def test_no_variable_of_the_caller_is_in_any_process_of_the_job(run: Imgrun) -> None:
    process = run.foreground(STUBBORN, "--name", "n", env={"SECRET": "hunter2"})
    expect(process, "ready")
    for pid in everyone(init_of(run, "n"))[:3]:  # shim, reaper and command; those below come and go
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_capabilities_and_privileges(run: Imgrun) -> None:
    script = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status"
    seen = dict(line.split(":\t") for line in run.sh(script).stdout.splitlines())
    assert seen["NoNewPrivs"] == "1"
    assert seen["CapInh"] == seen["CapAmb"] == "0" * 16
    assert seen["CapEff"] == seen["CapPrm"] == seen["CapBnd"]
    assert int(seen["CapEff"], 16).bit_count() < 15
    as_user = dict(line.split(":\t") for line in run.sh(script, "--user", "user").stdout.splitlines())
    assert as_user["CapEff"] == as_user["CapPrm"] == "0" * 16


def test_random_kills_of_anything(run: Imgrun, state_dir: Path) -> None:
    """A seeded storm over several jobs at once; afterwards one gc suffices."""
    chance = random.Random(20240601)
    for _ in range(3):
        jobs = [run.background(STUBBORN, *chance.choice([(), ("--rm",), ("--init", "none")])) for _ in range(4)]
        targets: list[int] = []
        for job in jobs:
            for pid in (supervisor_of(run, job), *everyone(init_of(run, job))):
                with contextlib.suppress(ProcessLookupError):
                    targets.append(os.pidfd_open(pid))
        for fd in chance.sample(targets, len(targets) // 2):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            time.sleep(chance.random() * 0.02)
        for fd in targets:
            os.close(fd)
        run("rm", "-fa")
        run("gc")
        assert run("ps", "-aq").stdout == ""
        assert records(state_dir) == []
