"""Background jobs and what can be done with running ones: ps, inspect, logs, wait, exec, signal, stop, rm, gc."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest
from command import COMMAND, Done, Imgrun, eventually, expect, refused
from conftest import records

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FOREVER = "while :; do sleep 0.05; done"
UNTIL_GO = "until test -e /tmp/go; do sleep 0.02; done"


def go(run: Imgrun, job: str) -> None:
    """Let a job go on that is at UNTIL_GO."""
    assert run("exec", job, "touch", "/tmp/go").status == 0


def inspect(run: Imgrun, job: str) -> dict[str, object]:
    done = run("inspect", job)
    assert done.status == 0, done
    record: dict[str, object] = json.loads(done.stdout)
    return record


def test_a_life_in_the_background(run: Imgrun, state_dir: Path) -> None:
    job = run.background(f"echo out; echo err >&2; cat; {UNTIL_GO}; exit 3", "--name", "n")
    assert len(job) == 12
    (listed,) = json.loads(run("ps", "--json").stdout)
    assert (listed["id"], listed["name"], listed["state"]) == (job, "n", "running")
    assert run("ps", "-q").stdout == f"{job}\n"
    header, row = run("ps").stdout.splitlines()
    assert header.split() == ["ID", "NAME", "STATE", "SINCE", "IMAGE", "COMMAND"]
    assert row.split()[:3] == [job, "n", "running"]
    go(run, "n")
    assert run("wait", job[:5]) == (3, "3\n", "")
    assert run("logs", "n") == (0, "out\n", "err\n")
    assert run("logs", "--stdout", "n") == (0, "out\n", "")
    assert run("logs", "--stderr", "n") == (0, "", "err\n")
    assert run("ps", "-q").stdout == ""
    assert run("ps", "-a").stdout.splitlines()[1].split()[:4] == [job, "n", "exited", "3"]
    record = inspect(run, "n")
    assert (record["id"], record["state"], record["name"]) == (job, "finished", "n")
    assert record["result"]["reason"] == "exited"  # type: ignore[index]
    assert not (state_dir / "jobs" / job / "scratch").exists()
    assert run("rm", "n") == (0, f"{job}\n", "")
    assert records(state_dir) == []
    refused(run("inspect", job), 125, job)


def test_detach_returns_when_the_command_runs(run: Imgrun, tmp_path: Path) -> None:
    refused(run.start("-d", "--", "nope"), 127, "nope")
    refused(run.start("-d", "--user", "nobody-here", "--", "true"), 125, "nobody-here")
    assert run("ps", "-aq").stdout == "", "a failed start leaves no record"


def test_detached_jobs_do_not_hold_the_callers_streams(run: Imgrun) -> None:
    """Neither the pipes of the three standard streams nor any other descriptor."""
    read, write = os.pipe()
    process = run.popen("start", "-d", run.image, "--", "sleep", "1000", pass_fds=[write])
    os.close(write)
    stdout, _ = process.communicate(timeout=30)  # reads to the end of both
    os.set_blocking(read, False)
    assert eventually(lambda: end_of(read), "the end of an inherited pipe")
    os.close(read)
    assert run("ps", "-q").stdout == stdout.decode()


def end_of(fd: int) -> bool:
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False


def test_a_detached_job_survives_the_callers_session(run: Imgrun) -> None:
    process = run.popen("start", "-d", run.image, "--", "sh", "-c", "sleep 0.5; echo end", start_new_session=True)
    assert process.stdout is not None
    job = process.stdout.readline().decode().strip()
    os.killpg(process.pid, signal.SIGHUP)  # not waited for yet, so the group is certainly still its own
    assert process.wait(30) in (0, -signal.SIGHUP)
    assert run("wait", job).status == 0
    assert run("logs", job).stdout == "end\n"


def test_a_terminal_in_the_background(run: Imgrun) -> None:
    job = run.background("tty; echo err >&2; echo end", "-t")
    assert run("wait", job, "--timeout", "20s").status == 0
    assert run("logs", job).stdout.replace("\r", "").splitlines() == ["/dev/pts/0", "err", "end"]


def test_rm_flag_forgets_the_job(run: Imgrun, state_dir: Path) -> None:
    job = run.background("sleep 0.3", "--rm")
    run("wait", job)
    eventually(lambda: records(state_dir) == [], "a job started with --rm is forgotten")
    run.sh("exit 3", "--no-rm", "--name", "kept")
    assert inspect(run, "kept")["result"]["exit_code"] == 3  # type: ignore[index]


def test_logs_follow(run: Imgrun) -> None:
    job = run.background(f"echo 1; {UNTIL_GO}; for i in 2 3 4; do echo $i; sleep 0.1; done; echo last >&2")
    follower = run.popen("logs", "-f", job)
    assert follower.stdout is not None
    assert follower.stdout.readline() == b"1\n"
    go(run, job)
    stdout, stderr = follower.communicate(timeout=30)
    assert (follower.returncode, stdout, stderr) == (0, b"2\n3\n4\n", b"last\n")


def test_logs_of_any_bytes_and_to_a_closed_pipe(run: Imgrun) -> None:
    job = run.background("printf '\\377\\000x'; yes | head -c 1000000")
    run("wait", job)
    process = run.popen("logs", job)
    stdout, _ = process.communicate(timeout=30)
    assert stdout == b"\xff\0x" + b"y\n" * 500_000
    process = run.popen("logs", job)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_wait(run: Imgrun) -> None:
    jobs = [run.background(f"sleep 0.{i}; exit {i}") for i in (3, 1)]
    assert run("wait", *jobs) == (1, "3\n1\n", "")
    results = json.loads(run("wait", "--json", *jobs).stdout)
    assert [r["exit_code"] for r in results] == [3, 1]
    job = run.background(FOREVER)
    done = run("wait", "--timeout", "300ms", job)
    assert done.status == 124
    assert done.stderr.startswith("imgrun: ")
    refused(run("wait", job, "nope"), 125, "nope")


# -- exec --------------------------------------------------------------------------------------------------------------


def test_exec(run: Imgrun) -> None:
    job = run.background(FOREVER, "--name", "n", "--env", "A=1", "--user", "user", "--workdir", "/usr", "--tmpfs", "/t")
    script = "echo $A$B $(id -u) $(pwd) $(hostname) $IMGRUN_JOB_ID; ls -d /t; cat /proc/1/comm; echo e >&2; exit 7"
    done = run("exec", "-e", "B=2", "n", "sh", "-c", script)
    assert done == (7, f"12 1000 /usr n {job}\n/t\nimgrun-init\n", "e\n")
    assert run("exec", "-u", "root", "-w", "/etc", "n", "--", "sh", "-c", "id -u; pwd").stdout == "0\n/etc\n"
    assert run("exec", "n", "cat", stdin="unseen") == (0, "", "")
    assert run("exec", "-i", "n", "cat", stdin="seen").stdout == "seen"
    assert run("exec", "n", "sh", "-c", "kill -TERM $$").status == 143
    refused(run("exec", "n", "nope"), 127, "nope")
    refused(run("exec", "n", "/etc/motd"), 126, "/etc/motd")
    refused(run("exec", "-w", "/nope", "n", "true"), 125, "/nope")
    refused(run("exec", "-u", "nobody-here", "n", "true"), 125, "nobody-here")
    run("stop", "-t", "0", "n")
    refused(run("exec", "n", "true"), 125, "not running")


def test_exec_has_the_jobs_restrictions(run: Imgrun) -> None:
    script = (
        "grep -E '^(Cap|NoNewPrivs)' /proc/self/status; ulimit -n; umask; cat /proc/self/oom_score_adj;"
        "sed 's/.*://' /proc/self/cgroup | sort -u; ls /proc/self/fd"
    )
    flags = ("--rlimit", "nofile=77", "--memory", "64M", "--pids", "50")
    run.background(FOREVER, "--name", "n", *flags)
    inside = run("exec", "n", "sh", "-c", script)
    assert inside.status == 0, inside
    job = run.background(f"{{ {script}; }} > /tmp/o; {FOREVER}", "--name", "m", *flags)
    eventually(lambda: run("exec", job, "sh", "-c", "test -s /tmp/o").status == 0)
    assert inside.stdout == run("exec", job, "cat", "/tmp/o").stdout
    same = "test $(readlink /proc/self/ns/$n) = $(readlink /proc/3/ns/$n) || echo $n"
    names = "mnt pid uts ipc user cgroup net"
    assert run("exec", "n", "sh", "-c", f"for n in {names}; do {same}; done") == (0, "", "")


def test_exec_streams(run: Imgrun) -> None:
    run.background(FOREVER, "--name", "n")
    data = os.urandom(1 << 20) * 4
    process = run.popen("exec", "-i", "n", "cat")
    stdout, stderr = process.communicate(data, timeout=60)
    assert (process.returncode, stdout == data, stderr) == (0, True, b"")
    process = run.popen("exec", "n", "yes")
    assert process.stdout is not None
    process.stdout.read(4)
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE


def test_exec_in_a_terminal(run: Imgrun) -> None:
    run.background(FOREVER, "--name", "n")
    pid, master = pty.fork()
    script = "tty; stty size; trap 'stty size; exit 6' INT; echo ready; while :; do sleep 0.05; done"
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, "exec", "-it", "n", "sh", "-c", script])
    output = b""

    def until(words: bytes) -> None:
        nonlocal output
        while words not in output:
            output += os.read(master, 4096)

    guard = threading.Timer(30, os.kill, (pid, signal.SIGKILL))
    guard.start()
    until(b"ready\r\n")
    assert b"/dev/pts/" in output
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 111, 0, 0))
    time.sleep(0.3)
    os.write(master, b"\x03")
    until(b"44 111\r\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    guard.cancel()
    os.close(master)


def test_signals_reach_what_exec_runs(run: Imgrun) -> None:
    run.background(FOREVER, "--name", "n")
    process = run.popen("exec", "n", "sh", "-c", f"trap 'echo got; exit 5' USR1; echo ready; {FOREVER}")
    expect(process, "ready")
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=30)[0] == b"got\n"
    assert process.returncode == 5


def test_what_exec_runs_ends_with_who_asked_for_it(run: Imgrun) -> None:
    run.background(FOREVER, "--name", "n")
    process = run.popen("exec", "n", "sh", "-c", "echo ready; exec sleep 1000")
    expect(process, "ready")
    process.kill()
    process.wait()
    eventually(lambda: "sleep 1000" not in run("exec", "n", "ps").stdout, "the end of what exec ran")


def test_what_exec_runs_ends_with_the_job(run: Imgrun) -> None:
    run.background(FOREVER, "--name", "n")
    process = run.popen("exec", "n", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    expect(process, "ready")
    assert run("stop", "n").status == 0
    assert process.wait(30) == 137


# -- signal, stop, rm --------------------------------------------------------------------------------------------------


def test_signal(run: Imgrun) -> None:
    job = run.background(f"trap 'echo hup' HUP; trap 'echo usr; exit 4' USR1; echo ready; {FOREVER}")
    eventually(lambda: run("logs", job).stdout)
    assert run("signal", job, "HUP") == (0, "", "")
    eventually(lambda: "hup" in run("logs", job).stdout)
    assert run("signal", job, "10").status == 0
    assert run("wait", job).status == 4
    assert run("logs", job).stdout == "ready\nhup\nusr\n"
    refused(run("signal", job, "TERM"), 125, job)
    refused(run("signal", job, "NOPE"), 125, "NOPE")


def test_signal_stop_and_continue(run: Imgrun) -> None:
    job = run.background("while :; do echo x; sleep 0.02; done")
    eventually(lambda: run("logs", job).stdout)
    run("signal", job, "STOP")
    time.sleep(0.3)
    size = len(run("logs", job).stdout)
    time.sleep(0.3)
    assert len(run("logs", job).stdout) == size, "stopped"
    run("signal", job, "CONT")
    eventually(lambda: len(run("logs", job).stdout) > size)


def test_stop(run: Imgrun) -> None:
    job = run.background(f"trap 'echo bye; exit 0' TERM; echo ready; {FOREVER}")
    eventually(lambda: run("logs", job).stdout)
    assert run("stop", job) == (0, f"{job}\n", "")
    assert run("logs", job).stdout == "ready\nbye\n"
    result = inspect(run, job)["result"]
    assert (result["reason"], result["exit_code"]) == ("stopped", 0)  # type: ignore[index]


def test_stop_kills_after_its_timeout(run: Imgrun) -> None:
    job = run.background(f"trap 'echo no' TERM; echo ready; {FOREVER}")
    eventually(lambda: run("logs", job).stdout)
    began = time.monotonic()
    assert run("stop", "-t", "500ms", job).status == 0
    assert time.monotonic() - began >= 0.5
    result = inspect(run, job)["result"]
    assert (result["reason"], result["signal"]) == ("stopped", 9)  # type: ignore[index]
    assert run("wait", job).status == 137


def test_stop_signal_and_timeout_of_the_spec(run: Imgrun) -> None:
    job = run.background(f"trap 'exit 8' INT; trap '' TERM; echo ready; {FOREVER}", "--stop-signal", "INT")
    other = run.background("trap '' TERM; echo ready; while :; do sleep 0.05; done", "--stop-timeout", "0")
    for each in (job, other):
        eventually(lambda each=each: run("logs", each).stdout)
    assert run("stop", job, other).status == 0
    assert (run("wait", job).status, run("wait", other).status) == (8, 137)


def test_rm(run: Imgrun, state_dir: Path) -> None:
    running, finished = run.background(FOREVER), run.background("true")
    run("wait", finished)
    refused(run("rm", running), 125, "running")
    assert run("rm", "--all").stdout == f"{finished}\n"
    assert run("rm", "-f", running, "nope").stdout == f"{running}\n"
    assert records(state_dir) == []


def test_rm_of_a_job_that_is_about_to_start_or_to_end(run: Imgrun, state_dir: Path) -> None:
    for i in range(8):
        starting = run.popen("start", "-d", "--name", "n", run.image, "--", "sh", "-c", f"sleep 0.0{i}")
        eventually(lambda: "names/n" in records(state_dir))
        assert run("rm", "-f", "n").status == 0
        assert starting.wait(30) == 0
        assert records(state_dir) == []


def test_gc(run: Imgrun, state_dir: Path) -> None:
    kept, forgotten = run.background(FOREVER), run.background(FOREVER, "--rm")
    alive, finished = run.background(FOREVER), run.background("true")
    run("wait", finished)
    for job in (kept, forgotten):
        os.kill(int(str(inspect(run, job)["supervisor"])), signal.SIGKILL)
    eventually(lambda: "lost" in run("inspect", kept).stdout)
    done = run("gc")
    assert set(done.stdout.split()) <= {kept, forgotten}
    assert inspect(run, kept)["result"]["reason"] == "lost"  # type: ignore[index]
    assert run("wait", kept).status == 125
    refused(run("inspect", forgotten), 125)
    assert sorted(run("ps", "-aq").stdout.split()) == sorted([kept, alive, finished])
    assert run("gc", "--older-than", "1h").stdout == ""
    assert sorted(run("gc", "--older-than", "0").stdout.split()) == sorted([kept, finished])
    assert run("ps", "-aq").stdout.split() == [alive]


def test_time_limit_in_the_background(run: Imgrun) -> None:
    job = run.background(FOREVER, "--time-limit", "200ms")
    assert run("wait", job).status == 124
    assert inspect(run, job)["result"]["reason"] == "time-limit"  # type: ignore[index]


# -- names and concurrency ---------------------------------------------------------------------------------------------


def test_a_name_is_free_again_when_its_job_is_gone(run: Imgrun) -> None:
    job = run.background("true", "--name", "n")
    run("wait", job)
    refused(run.sh("true", "--name", "n"), 125, "'n'")
    run("rm", "n")
    assert run.sh("true", "--name", "n").status == 0
    assert run.sh("true", "--name", "n").status == 0


def test_twenty_starts_with_one_name(run: Imgrun) -> None:
    processes = [run.popen("start", "-d", "--name", "n", run.image, "--", "sleep", "60") for _ in range(20)]
    ends = [Done(*_end(process)) for process in processes]
    assert sorted(done.status for done in ends) == [0] + [125] * 19
    for done in ends:
        if done.status:
            refused(done, 125, "'n'")
    assert len(run("ps", "-aq").stdout.split()) == 1


def _end(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout.decode(), stderr.decode()


def test_listing_while_jobs_come_and_go(run: Imgrun) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            run.sh("true", "--name", f"n{threading.get_ident()}")

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            for words in (("ps", "-a"), ("ps", "-a", "--json"), ("gc",)):
                done = run(*words)
                assert (done.status, done.stderr) == (0, ""), done
    finally:
        stop.set()
        for thread in threads:
            thread.join()
