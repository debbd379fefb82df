"""``imgrun start`` from the command line to the job: exit status, identity, streams, and what is printed about it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from command import Imgrun, eventually, expect, refused
from conftest import records

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_output_and_exit_status(run: Imgrun) -> None:
    done = run.sh("echo out; echo err >&2; exit 7")
    assert done == (7, "out\n", "err\n")


@pytest.mark.parametrize("code", [0, 1, 2, 100, 125, 126, 127, 128, 255])
def test_exit_codes_are_the_commands_own(run: Imgrun, code: int) -> None:
    assert run.sh(f"exit {code}") == (code, "", "")


@pytest.mark.parametrize("signum", ["TERM", "KILL", "INT", "SEGV", "PIPE", "HUP", "USR1", "ABRT"])
def test_a_signal_is_128_and_its_number(run: Imgrun, signum: str) -> None:
    done = run.sh(f"kill -{signum} $$; sleep 60")
    assert done[:2] == (128 + signal.Signals[f"SIG{signum}"], "")
    if signum in ("TERM", "KILL", "INT", "HUP"):  # which mostly come from somebody else
        refused(done, done.status, f"SIG{signum}, which imgrun did not send")
    else:
        assert done.stderr == ""


def test_a_foreground_job_leaves_no_record(run: Imgrun, state_dir: Path) -> None:
    assert run.sh("true").status == 0
    assert run.sh("exit 3").status == 3
    assert run.start("--", "nope").status == 127
    assert records(state_dir) == []


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (("nope",), 127, ("nope",)),
        (("/bin/nope",), 127, ("/bin/nope",)),
        (("/etc/motd",), 126, ("/etc/motd",)),
        (("/etc",), 126, ("/etc",)),
        (("/etc/motd/x",), 127, ("/etc/motd/x",)),
        (("",), 127, ()),
    ],
)
def test_a_command_that_cannot_be_executed(run: Imgrun, command: tuple[str, ...], status: int, words: tuple[str, ...]) -> None:
    refused(run.start("--", *command), status, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--user", "nobody-here"), ("nobody-here",)),
        (("--user", "70000"), ("70000",)),
        (("--workdir", "/nope"), ("/nope",)),
        (("--workdir", "/etc/motd"), ("/etc/motd",)),
        (("--bind", "/nope:/d"), ("/nope",)),
        (("--bind", "/etc/hostname:/etc"), ("/etc",)),
        (("--bind", "/etc:/etc/motd"), ("/etc/motd",)),
        (("--mount", "type=image,src=/nope.img,dst=/d"), ("/nope.img",)),
        (("--partition", "1"), ("not a disk",)),
        (("--spec", "/nope.toml"), ("/nope.toml",)),
        (("--result", "/nope/r.json"), ("/nope/r.json",)),
        (("--env-file", "/nope"), ("/nope",)),
        (("--rlimit", "nofile=99999999999"), ("nofile",)),
    ],
)
def test_refused_with_one_line_and_a_hint(
    run: Imgrun, state_dir: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(run.start(*flags, "--", "true"), 125, *words)
    assert not state_dir.exists() or records(state_dir) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such image"), (b"", "empty"), (b"#!/bin/sh\n" * 1000, "script"), (os.urandom(1 << 20), "not a usable image")],
)
def test_an_image_that_is_none(run: Imgrun, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.img"
    if content is not None:
        path.write_bytes(content)
    refused(run("start", path, "--", "true"), 125, str(path), words)
    assert run("start", path, "--", "true", env={"IMGRUN_DEBUG": "1"}).status == 125


# -- who and where -----------------------------------------------------------------------------------------------------


def test_environment_is_the_jobs_own(run: Imgrun) -> None:
    done = run.start("--env", "A=1 2", "-e", "MINE", "-e", "UNSET", "--", "env", env={"MINE": "m", "OTHER": "o"})
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    job_id = seen.pop("IMGRUN_JOB_ID")
    assert len(job_id) == 12
    assert seen == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "USER": "root",
        "LOGNAME": "root", "SHELL": "/bin/sh", "container": "imgrun", "A": "1 2", "MINE": "m",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("root", "0:0:0:/root"), ("user", "1000:1000:1000:/tmp"), ("1000", "1000:1000:1000:/tmp"), ("7:8", "7:8:8:/"),
        ("65535", "65535:65535:65535:/"), ("user:0", "1000:0:0:/tmp"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("userns", ["auto", "off"])
def test_user(run: Imgrun, user: str, ids: str, userns: str) -> None:
    done = run.sh("echo $(id -u):$(id -g):$(id -G):$HOME", "--user", user, "--userns", userns)
    assert done.stdout.strip() == ids, done


def test_an_id_beyond_the_range_needs_the_hosts_ids(run: Imgrun) -> None:
    assert run.sh("id -u", "--user", "70000", "--userns", "off").stdout == "70000\n"


def test_workdir(run: Imgrun) -> None:
    assert run.sh("pwd").stdout == "/\n"
    assert run.sh("pwd", "--workdir", "/usr/bin").stdout == "/usr/bin\n"


def test_names(run: Imgrun) -> None:
    done = run.sh("hostname; cat /etc/hostname; grep -c 127.0.1.1.$(hostname) /etc/hosts", "--name", "n", "--hostname", "h")
    assert done.stdout == "h\nh\n1\n"
    assert run.sh("hostname", "--name", "n.1").stdout == "n.1\n"
    assert run.sh("echo $(hostname) job-$IMGRUN_JOB_ID").stdout.split()[0].startswith("job-")
    assert socket.gethostname() not in ("h", "n.1")


def test_the_job_is_alone_in_its_namespaces(run: Imgrun) -> None:
    done = run.sh("for n in mnt pid uts ipc user cgroup net; do readlink /proc/self/ns/$n; done; cat /proc/1/comm; echo $$")
    *namespaces, init, pid = done.stdout.splitlines()
    ours = [os.readlink(f"/proc/self/ns/{n}") for n in ("mnt", "pid", "uts", "ipc", "user", "cgroup", "net")]
    assert [a == b for a, b in zip(namespaces, ours, strict=True)] == [False] * 6 + [True]
    assert (init, pid) == ("imgrun-init", "3")


def test_init_none_makes_the_command_pid_1(run: Imgrun) -> None:
    assert run.sh("echo $$; exit 4", "--init", "none") == (4, "1\n", "")
    assert run.start("--init", "none", "--", "nope").status == 127
    # PID 1 has no default handlers for signals from inside (pid_namespaces(7)).
    assert run.sh("kill -TERM $$; exit 5", "--init", "none").status == 5


def test_network_none_has_only_loopback(run: Imgrun) -> None:
    done = run.sh("ls /sys/class/net; ip addr show lo; cat /etc/resolv.conf", "--network", "none")
    assert done.stdout.split()[0] == "lo"
    assert "inet 127.0.0.1/8" in done.stdout
    assert "UP" in done.stdout
    assert [line for line in done.stdout.splitlines() if not line.startswith((" ", "#", "lo", "1:"))] == []


def test_network_host_is_the_hosts(run: Imgrun) -> None:
    assert run.sh("readlink /proc/self/ns/net").stdout.strip() == os.readlink("/proc/self/ns/net")
    assert run.sh("cat /etc/resolv.conf").stdout == Path("/etc/resolv.conf").read_text()


def test_rlimits(run: Imgrun) -> None:
    done = run.sh("ulimit -Sn; ulimit -Hn; ulimit -c", "--rlimit", "nofile=100:200", "--rlimit", "core=0")
    assert done.stdout.split() == ["100", "200", "0"]


def test_umask_and_oom_score(run: Imgrun) -> None:
    assert run.sh("umask; cat /proc/self/oom_score_adj").stdout.split() == ["0022", "500"]


# -- streams -----------------------------------------------------------------------------------------------------------


def test_stdin(run: Imgrun) -> None:
    assert run.sh("cat", stdin="a\nb").stdout == "a\nb"
    assert run.sh("cat; echo end").stdout == "end\n"


def test_no_input_is_needed_by_the_job(run: Imgrun) -> None:
    """The job ends although its input does not."""
    process = run.foreground("echo ready; exit 3")
    assert process.wait(30) == 3


def test_detached_has_no_input(run: Imgrun) -> None:
    job = run.background("cat; echo end")
    run("wait", job)
    assert run("logs", job).stdout == "end\n"


# -- records -----------------------------------------------------------------------------------------------------------


def test_result_file(run: Imgrun, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    done = run.sh("exit 3", "--name", "n", "--result", path)
    assert (done.status, done.stderr) == (3, "")
    record = json.loads(path.read_text())
    assert {key: record[key] for key in ("name", "reason", "exit_code", "signal", "exit_status", "hostname")} == {
        "name": "n", "reason": "exited", "exit_code": 3, "signal": None, "exit_status": 3, "hostname": "n",
    }  # fmt: skip
    assert record["command"] == ["sh", "-c", "exit 3"]
    assert record["image"] == run.image
    assert record["started_at"] <= record["finished_at"]
    assert record["usage"]["wall_seconds"] > 0
    assert os.listdir(tmp_path) != []
    assert [p.name for p in tmp_path.glob("r.json*")] == ["r.json"]


def test_a_result_is_written_when_the_start_fails(run: Imgrun, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = run.start("--result", path, "--", "nope")
    refused(done, 127, "nope")
    record = json.loads(path.read_text())
    assert (record["reason"], record["exit_code"], record["exit_status"]) == ("failed-to-start", None, 127)
    assert record["message"] in done.stderr


def test_json(run: Imgrun) -> None:
    done = run.sh("kill -9 $$", "--json")
    record = json.loads(done.stdout)
    assert done.status == 137
    assert (record["reason"], record["exit_code"], record["signal"], record["exit_status"]) == ("signaled", None, 9, 137)


def test_timings(run: Imgrun) -> None:
    done = run.sh("true", "--timings")
    lines = done.stderr.splitlines()
    assert len(lines) > 4
    assert all(float(line.split(" ms ")[0]) >= 0 for line in lines)


def test_time_limit(run: Imgrun) -> None:
    done = run.sh("trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done", "--time-limit", "300ms")
    assert done.stdout == "bye\n"
    refused(done, 124, "time limit")
    done = run.sh("trap '' TERM; while :; do sleep 0.05; done", "--time-limit", "100ms", "--stop-timeout", "200ms")
    refused(done, 124, "time limit")


def test_memory_limit(run: Imgrun) -> None:
    done = run.sh("x=12345678; while :; do x=$x$x; done", "--memory", "16M", "--swap", "0")
    refused(done, 137, "memory limit of 16 MiB")


def test_spec_file(run: Imgrun, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/f").write_text("from the host\n")
    path = tmp_path / "job.toml"
    path.write_text(
        f"""
        image = "{run.image}"
        command = ["sh", "-c", "hostname; echo $N; cat /data/f; touch /data/x || exit 9"]
        hostname = "worker-7"
        env = {{N = 2}}
        [[mounts]]
        src = "data"
        dst = "/data"
        ro = true
        """
    )
    done = run("start", "--spec", path, "--env", "N=3")
    assert (done.status, done.stdout) == (9, "worker-7\n3\nfrom the host\n")
    assert run("start", "--spec", path, "--", "echo", "instead").stdout == "instead\n"


def test_dry_run_tells_the_plan_and_changes_nothing(run: Imgrun, state_dir: Path, tmp_path: Path) -> None:
    before = os.stat(run.image)
    flags = ("--bind", f"{tmp_path}:/data:ro", "--tmpfs", "/fast:1M", "--memory", "64M", "--network", "none", "--name", "n")
    done = run.start("--dry-run", *flags, "--", "touch", "/x")
    assert (done.status, done.stderr) == (0, "")
    for words in (run.image, f"{tmp_path} at /data read-only", "tmpfs at /fast", "memory=67108864", "network", "pivot_root",
                  "hostname n", "touch /x"):  # fmt: skip
        assert words in done.stdout
    assert not state_dir.exists()
    after = os.stat(run.image)
    assert (before.st_mtime_ns, before.st_atime_ns) == (after.st_mtime_ns, after.st_atime_ns)
    plan = json.loads(run.start("--dry-run", "--json", *flags, "--", "touch", "/x").stdout)
    assert plan["plan"] == done.stdout.splitlines()
    assert plan["spec"]["memory"] == 64 << 20
    refused(run("start", "--dry-run", "/nope.img", "x"), 125, "/nope.img")


# -- signals to the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_signals_to_the_command_reach_the_job(run: Imgrun, signum: signal.Signals) -> None:
    process = run.foreground(f"trap 'echo got; exit 5' {signum.name[3:]}; echo ready; while :; do sleep 0.05; done")
    expect(process, "ready")
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (5, b"got\n", b"")


def test_a_signal_that_the_job_does_not_catch_ends_it(run: Imgrun) -> None:
    process = run.foreground("echo ready; exec sleep 60")
    expect(process, "ready")
    process.terminate()
    assert process.wait(30) == 143


def test_a_signal_that_the_caller_ignores_is_ignored(run: Imgrun) -> None:
    """As nohup needs it."""
    process = run.foreground("echo ready; sleep 1; echo end", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    expect(process, "ready")
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, b"end\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_ends_it_cleanly(run: Imgrun, state_dir: Path, signum: signal.Signals) -> None:
    for i in range(12):
        process = run.foreground("exec sleep 60", stdin=subprocess.DEVNULL)
        eventually(lambda: list(state_dir.glob("jobs/*/state.json")))
        time.sleep(i * 0.003)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=30)
        assert (process.returncode, stderr) == (128 + signum, b"")
        assert records(state_dir) == []
