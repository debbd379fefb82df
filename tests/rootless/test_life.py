"""The whole life of a job of an ordinary user: the same command line, exit status and records as for root."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from command import Done, eventually, expect, refused
from ordinary import PATH, AsUser

ONE_ID = "no subordinate ids"


def quiet(done: Done) -> Done:
    """Without the warning that those without subordinate ids get."""
    lines = [line for line in done.stderr.splitlines(True) if ONE_ID not in line]
    return done._replace(stderr="".join(lines))


def test_output_and_exit_status(run_any: AsUser) -> None:
    assert quiet(run_any.sh("cat; echo out; echo err >&2; exit 7", stdin="in\n")) == (7, "in\nout\n", "err\n")
    assert run_any.sh("kill -KILL $$").status == 137
    assert run_any.start("--", "nope").status == 127
    assert run_any.start("--", "/etc/motd").status == 126
    assert os.listdir(run_any.state / "jobs") == []


def test_the_whole_life_of_a_background_job(run_any: AsUser) -> None:
    run = run_any
    job = quiet(run("start", "-d", "--name", "j", run.image, "--", "sh", "-c",
                    "trap 'echo usr; trap - USR1' USR1; echo ready; while :; do sleep 0.05; done"))  # fmt: skip
    assert (job.status, job.stderr) == (0, ""), job
    eventually(lambda: "ready" in run("logs", "j").stdout)
    assert "running" in run("ps").stdout
    assert run("ps", "-q").stdout == job.stdout
    assert json.loads(run("inspect", "j").stdout)["state"] == "running"

    done = run("exec", "-i", "j", "sh", "-c", "cat; id -u; hostname; echo err >&2; exit 3", stdin="in\n")
    assert done == (3, "in\n0\nj\n", "err\n")
    refused(run("exec", "j", "nope"), 127, "nope")
    # It is beside the job's own processes, in their PID namespace.
    assert run("exec", "j", "sh", "-c", "kill -0 3 && echo there").stdout == "there\n"

    assert run("signal", "j", "USR1").status == 0
    eventually(lambda: "usr" in run("logs", "j").stdout)
    assert run("signal", "j", "STOP").status == 0
    assert run("signal", "j", "CONT").status == 0
    assert run("stop", "j").status == 0
    assert run("wait", "j").status == 143
    record = json.loads(run("inspect", "j").stdout)
    assert (record["state"], record["result"]["reason"], record["result"]["signal"]) == ("finished", "stopped", signal.SIGTERM)
    assert "j" in run("ps", "--all").stdout
    assert run("rm", "j").status == 0
    assert run("gc").status == 0
    refused(run("inspect", "j"), 125, "'j'")
    assert list(run.state.glob("*/*")) == []


def test_signals_reach_a_foreground_job(run: AsUser) -> None:
    process = run.foreground("trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    expect(process, "ready")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == (b"got\n", b"")
    assert process.returncode == 5


def test_time_limit(run: AsUser) -> None:
    refused(run.sh("sleep 60", "--time-limit", "300ms"), 124, "time limit")


def test_terminal(run_any: AsUser) -> None:
    done = run_any.sh("test -t 0 && test -t 1 && tty; stat -c %u $(tty)", "--tty", stdin="")
    assert done.stdout.split() == ["/dev/pts/0", "0"], done


def test_inits(run: AsUser) -> None:
    assert run.sh("echo $$; exit 4", "--init", "none") == (4, "1\n", "")
    assert run.sh("cat /proc/1/comm").stdout == "imgrun-init\n"


@pytest.mark.parametrize("init", ["shim", "none"])
def test_killing_ends_all_that_a_job_started(run_any: AsUser, init: str) -> None:
    """Daemons that have forked twice, changed their session and ignore what can be ignored too."""
    run = run_any
    daemon = "(trap '' TERM HUP INT; setsid sh -c 'trap \"\" TERM HUP; (sleep 1000 &) ; sleep 1000' &) &"
    script = f"{daemon} {daemon} sleep 0.3; echo ready; exec sleep 1000"
    run("start", "-d", "--name", "j", "--init", init, run.image, "--", "sh", "-c", script)
    eventually(lambda: "ready" in run("logs", "j").stdout)
    assert len(run.processes("sleep")) >= 3
    assert run("signal", "j", "KILL").status == 0
    assert run("wait", "j").status == 137
    assert run.processes("sleep") == []


def test_the_end_of_the_command_ends_its_daemons(run: AsUser) -> None:
    assert run.sh("(setsid sleep 1000 > /dev/null 2>&1 &) & sleep 0.2; exit 6").status == 6
    assert run.processes() == []


def test_twenty_jobs_at_once_of_one_image(run: AsUser) -> None:
    jobs = [run.foreground(f"cat /etc/motd; echo {n} > /etc/motd; read x; cat /etc/motd") for n in range(20)]
    for job in jobs:
        expect(job, "of the image")
    assert len(run.processes("squashfuse_ll")) == 20
    for n, job in enumerate(jobs):
        assert job.communicate(b"go\n", timeout=60)[0] == f"{n}\n".encode()
        assert job.returncode == 0
    assert run.processes() == []


def test_two_users_know_nothing_of_each_other(run: AsUser, run_single: AsUser) -> None:
    job = run.background("sleep 60")
    assert run_single("ps", "--all", "-q").stdout == ""
    refused(run_single("exec", job, "true"), 125, job)
    # Not even with the way to the state told.
    done = run_single("ps", env={"IMGRUN_STATE_DIR": str(run.state)})
    assert done.status in (0, 125)
    assert job not in done.stdout


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_says_how_it_was_measured(run: AsUser, tmp_path: Path) -> None:
    path = run.directory / "r.json"
    script = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done; dd if=/dev/zero of=/big bs=1M count=8; sync"
    assert run.sh(script, "--result", path).status == 0
    usage = json.loads(path.read_text())["usage"]
    assert usage["wall_seconds"] > 0
    assert usage["user_seconds"] > 0.05
    assert usage["scratch_bytes"] >= 8 << 20
    if usage["source"] == "rusage":
        # Without a cgroup of its own nobody knows.
        assert usage["throttled_seconds"] is None
        assert usage["pids_peak"] is None
    else:
        assert usage["source"] == "cgroup"


def test_children_and_orphans_count(run: AsUser) -> None:
    """What they say themselves of their use is in the job's."""
    path = run.directory / "r.json"
    spin = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done"
    child = f"sh -c '{spin}; times >/child'"
    orphan = f"(sh -c '{spin}; times >/orphan; touch /done' &); while [ ! -e /done ]; do sleep 0.1; done; sleep 0.1"
    done = run.sh(f"{child}; {orphan}; head -qn 1 /child /orphan", "--result", path)
    spent = [float(line.split()[0].removeprefix("0m").removesuffix("s")) for line in done.stdout.splitlines()]
    assert len(spent) == 2, done
    assert min(spent) > 0
    assert json.loads(path.read_text())["usage"]["user_seconds"] >= sum(spent) * 0.9


# -- limits ------------------------------------------------------------------------------------------------------------

LIMITS = (("--memory", "64M"), ("--pids", "50"), ("--cpus", "0.5"), ("--cpuset", "0"))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit[0])
def test_a_limit_that_cannot_be_kept_is_refused(run: AsUser, limit: tuple[str, str]) -> None:
    done = run.sh("true", *limit)
    if done.status == 0:  # with a delegated cgroup it is kept
        assert done.stderr == ""
        return
    refused(done, 125, limit[0])


def test_best_effort_makes_warnings_of_them(run: AsUser) -> None:
    path = run.directory / "r.json"
    flags = [word for limit in LIMITS for word in limit]
    done = run.sh("echo ran", *flags, "--limits", "best-effort", "--result", path)
    assert (done.status, done.stdout) == (0, "ran\n")
    warnings = json.loads(path.read_text())["warnings"]
    assert [f"imgrun: warning: {w}" for w in warnings] == done.stderr.splitlines()
    refusals = {name: run.sh("true", name, value).status for name, value in LIMITS}
    for name, _ in LIMITS:
        assert (refusals[name] == 125) == sum(f"{name} " in warning for warning in warnings), warnings


def test_rlimits(run_any: AsUser) -> None:
    done = run_any.sh("ulimit -Sn; ulimit -Hn", "--rlimit", "nofile=100:200")
    assert done.stdout.split() == ["100", "200"]


def test_the_usual_places(run: AsUser) -> None:
    """With no more than HOME known: state in ~/.local/state, or where XDG_STATE_HOME says."""
    there = str(run.directory)
    for env, place in (({"HOME": there}, ".local/state/imgrun"), ({"XDG_STATE_HOME": there}, "imgrun")):
        run.environment = lambda env=env: {"PATH": PATH, "HOME": run.user.home, **env}  # type: ignore[method-assign,misc]
        job = run.background("sleep 60")
        assert os.listdir(run.directory / place / "jobs") == [job]
        assert (run.directory / place).stat().st_mode & 0o777 == 0o700
        assert run("rm", "--force", job).status == 0
        assert list((run.directory / place).glob("*/*")) == []


def test_dry_run_needs_and_changes_nothing(run: AsUser) -> None:
    done = run.start("--dry-run", "--", "true")
    assert done.status == 0, done
    assert run.image in done.stdout
    assert not run.state.exists()
