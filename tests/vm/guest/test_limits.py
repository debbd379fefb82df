"""Every limit, by what the kernel says of it, wherever in systemd's tree imgrun is called; and kills for memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from guest.conftest import CGROUPS, IMAGES, SESSION, USER_ENVIRONMENT, Imgrun

Make = Callable[..., Imgrun]
ALL = ("--memory", "64M", "--swap", "8M", "--cpus", "0.5", "--cpu-weight", "50", "--cpuset", "0", "--pids", "40", "--io-max",
       "/dev/vda:rbps=1M")  # fmt: skip
FILES = "memory.max memory.swap.max cpu.max cpu.weight cpuset.cpus pids.max io.max memory.oom.group"
SHOW = f"cd /sys/fs/cgroup; cat {FILES}; nproc"


def sees_all_limits(imgrun: Imgrun) -> None:
    lines = imgrun.good("start", *ALL, IMAGES / "small.squashfs", "--", "sh", "-c", SHOW).splitlines()
    io = lines.pop(6)
    assert lines == [str(64 << 20), str(8 << 20), "50000 100000", "50", "0", "40", "1", "1"]
    assert "rbps=1048576" in io


def test_in_a_delegated_service(root: Imgrun) -> None:
    sees_all_limits(root)


def test_below_the_root_of_the_hierarchy(make: Make) -> None:
    """As imgrun is started by something that is in no unit at all."""
    sees_all_limits(make("sh", "-c", f'echo $$ >{CGROUPS}/cgroup.procs; exec "$0" "$@"'))


def test_in_a_scope_that_is_not_delegated(make: Make) -> None:
    sees_all_limits(make("systemd-run", "--quiet", "--scope"))


def test_in_a_delegated_scope(make: Make) -> None:
    sees_all_limits(make("systemd-run", "--quiet", "--scope", "-p", "Delegate=yes"))


def test_a_service_that_is_not_delegated_refuses(make: Make) -> None:
    way = ("systemd-run", "--quiet", "--pipe", "--wait", "--collect", "-E", "IMGRUN_STATE_DIR=/var/tmp/undelegated")
    done = make(*way)("start", "--memory", "64M", IMAGES / "small.squashfs", "--", "true")
    assert done.status == 125
    assert "not delegated" in done.stderr.splitlines()[0], done
    assert "Delegate=yes" in done.stderr


def test_limits_change_while_the_job_runs(root: Imgrun) -> None:
    job = root.good("start", "-d", "--memory", "64M", IMAGES / "small.squashfs", "--", "sleep", "1000").strip()
    if root("update", "--help").status:
        pytest.skip("this version has no verb to change limits")
    root.good("update", "--memory", "80M", job)
    assert root.good("exec", job, "cat", "/sys/fs/cgroup/memory.max") == f"{80 << 20}\n"


def killed_for_memory(imgrun: Imgrun, record: Path) -> None:
    """The job as a whole is killed, by memory.oom.group, and memory.events tells the reason."""
    script = "sleep 1000 & hold 200 /never"
    done = imgrun("start", "--memory", "48M", "--swap", "0", "--result", record, IMAGES / "small.squashfs", "--",
                  "sh", "-c", script)  # fmt: skip
    assert done.status == 137, done
    assert "memory limit of 48 MiB" in done.stderr, done
    result = json.loads(record.read_text())
    assert result["reason"] == "memory-limit", result
    assert 0 < result["usage"]["memory_peak"] <= 48 << 20


def test_a_memory_kill_is_told(root: Imgrun, room: Path) -> None:
    killed_for_memory(root, room / "result.json")


def test_a_memory_kill_of_a_users_job_is_told(user: Imgrun, room: Path) -> None:
    (room / "u").mkdir()
    (room / "u").chmod(0o777)
    killed_for_memory(user, room / "u/result.json")


def test_a_job_that_gets_its_first_memory_limit_while_it_runs(make: Make) -> None:
    """Its cgroup has no memory controller before, and is killed as a whole and told why all the same."""
    outer = CGROUPS / "outer"
    slot = outer / "slot"
    slot.mkdir(parents=True)
    imgrun = make("sh", "-c", f'echo $$ >{slot}/cgroup.procs; exec "$0" "$@"')
    script = "until test -e /tmp/go; do sleep 1; done; sleep 1000 & hold 200 /never"
    job = imgrun.good("start", "-d", "--tmpfs", "/tmp", IMAGES / "small.squashfs", "--", "sh", "-c", script).strip()
    (outer / "cgroup.subtree_control").write_text("+memory")
    imgrun.way = ()
    imgrun.good("update", "--memory", "64M", "--swap", "0", job)
    imgrun.good("exec", job, "touch", "/tmp/go")
    assert imgrun("wait", job).status == 137
    record = imgrun.record(job)
    assert record["reason"] == "memory-limit", record
    assert "the job ran into its memory limit of 64 MiB" in record["message"], record
    slot.rmdir()
    outer.rmdir()


def test_who_asks_for_more_than_the_host_has_is_told_so(root: Imgrun, room: Path) -> None:
    """Without a limit. The kernel chooses the job, and nothing else of the host's ends."""
    record = room / "result.json"
    script = "for i in 1 2 3; do hold 900 /never & done; sleep 1000"
    done = root("start", "--result", record, IMAGES / "small.squashfs", "--", "sh", "-c", script)
    assert done.status == 137, done
    assert "the host ran out of memory, and the kernel killed it" in done.stderr, done
    assert "hold" in done.stderr.partition("largest processes")[2], done
    assert json.loads(record.read_text())["reason"] == "host-memory"


def test_a_killed_child_alone_does_not_make_the_verdict(root: Imgrun, room: Path) -> None:
    """A job that ends by SIGKILL within its memory was not killed for memory."""
    record = room / "result.json"
    done = root("start", "--memory", "64M", "--result", record, IMAGES / "small.squashfs", "--", "sh", "-c", "kill -9 $$")
    assert done.status == 137
    assert json.loads(record.read_text())["reason"] == "signaled"


def test_pids_and_processor_time_are_kept(root: Imgrun, room: Path) -> None:
    record = room / "result.json"
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 30 & done; spin 200000000"
    done = root("start", "--pids", "6", "--cpus", "0.2", "--time-limit", "60s", "--result", record,
                IMAGES / "small.squashfs", "--", "sh", "-c", script)  # fmt: skip
    result = json.loads(record.read_text())
    assert done.status in (1, 2), done  # the shell ends where a fork is refused
    usage = result["usage"]
    assert usage["pids_peak"] is None or usage["pids_peak"] <= 6
    assert "fork" in done.stderr, done


def test_a_users_scope_has_what_is_delegated(make: Make) -> None:
    """systemd delegates cpu, memory and pids to users: these limits hold; io is refused with the way to have it."""
    user = make(*SESSION, user=True)
    show = "cd /sys/fs/cgroup; cat memory.max pids.max; cat cpu.max"
    controllers = (CGROUPS / "user.slice/user-1000.slice/user@1000.service/cgroup.controllers").read_text().split()
    words = ["--memory", "64M", "--pids", "40", *(["--cpus", "0.5"] if "cpu" in controllers else [])]
    lines = user.good("start", *words, IMAGES / "small.squashfs", "--", "sh", "-c", show).splitlines()
    assert lines[:2] == [str(64 << 20), "40"]
    if "cpu" in controllers:
        assert lines[2] == "50000 100000"
    if "io" not in controllers:
        done = user("start", "--io-max", "/dev/vda:rbps=1M", IMAGES / "small.squashfs", "--", "true")
        assert done.status == 125
        assert "systemctl edit user@.service" in done.stderr, done


def test_a_user_without_a_session_is_refused_limits(make: Make) -> None:
    way = ("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "env", "-u", "XDG_RUNTIME_DIR")
    user = make(*way, user=True)
    done = user("start", "--memory", "64M", IMAGES / "small.squashfs", "--", "true")
    assert done.status == 125, done
    assert "is not this user's to divide" in done.stderr, done
    assert user.good("start", IMAGES / "small.squashfs", "--", "echo", "ran") == "ran\n"
    assert USER_ENVIRONMENT["USER"] == "u"
