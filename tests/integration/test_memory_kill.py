"""Jobs that run out of memory, in every way: all of the job ends, and it is told why; or it is held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, Done, Imgrun, eventually, refused
from counted import Measured, measured, needs_criu, programs

from imgrun.isolation.cgroups import dirs, fs

__all__ = ["measured", "programs"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20
LIMIT = ("--memory", "64M", "--swap", "0")
FOREVER = "while :; do sleep 0.05; done"


def killed(measured: Measured, done: Done, *words: str) -> None:
    """See that the job ended for memory, and that this was told in one place and the same words everywhere."""
    # Before it, a shell may have told that its child was killed.
    told = done._replace(stderr=done.stderr[done.stderr.find("imgrun: ") :])
    refused(told, 137, *words)
    record = measured.record
    assert record["reason"] == "memory-limit"
    assert record["exit_status"] == 137
    message, hint = (line.removeprefix("imgrun: ").strip() for line in told.stderr.splitlines())
    assert (record["message"], record["hint"]) == (message, hint)
    assert record["hold_reason"] == f"{message}; {hint}"


# -- ways to run out of memory ------------------------------------------------------------------------------------------


def test_one_large_process(measured: Measured) -> None:
    done = measured.sh("/x/counted hold 200; echo limping", *LIMIT)
    killed(measured, done, "memory limit of 64 MiB", "its peak was 64 MiB")
    assert "--memory 96M" in done.stderr
    assert measured.usage["memory_peak"] <= 64 * MIB


def test_the_largest_processes_are_named(measured: Measured) -> None:
    """On a busy machine they may be gone before they can be looked at, but not always."""

    def named() -> str:
        done = measured.sh(f"for i in $(seq 20); do /x/counted hold 8 /never & done; wait; {FOREVER}", *LIMIT)
        killed(measured, done, "memory limit of 64 MiB")
        return done.stderr.partition("largest processes then: ")[2]

    eventually(lambda: named().count("counted (pid ") == 3, "the largest three are named")


def test_all_of_the_job_ends(measured: Measured) -> None:
    """The process that is killed is neither the command nor a child of it that it waits for; nobody limps on."""
    done = measured.sh(f"(/x/counted hold 200 &); {FOREVER}", *LIMIT)
    killed(measured, done, "memory limit of 64 MiB")


def test_a_command_that_goes_on_without_its_child_does_not_hide_it(measured: Measured) -> None:
    done = measured.sh("/x/counted hold 200; exit 0", *LIMIT)
    killed(measured, done, "memory limit of 64 MiB")


def test_a_memory_file_system(measured: Measured) -> None:
    done = measured.sh("cat /dev/zero > /m/file", "--tmpfs", "/m:1G", *LIMIT)
    killed(measured, done, "memory limit of 64 MiB", "in memory file systems")


def test_page_cache_is_taken_back(measured: Measured) -> None:
    """Reading and writing four times as much as the limit is no reason to be killed."""
    done = measured.sh("dd if=/dev/zero of=/tmp/f bs=1M count=256 2>&- && cat /tmp/f | wc -c", *LIMIT)
    assert (done.status, done.stdout.split()) == (0, [str(256 * MIB)]), done
    assert (measured.record["reason"], measured.record["hold_reason"]) == ("exited", None)


def test_the_first_allocation(measured: Measured) -> None:
    """With less than it takes to become a process, whether that gets as far as to be the command or not."""
    done = measured.sh("/x/counted hold 8", "--memory", "1M", "--swap", "0")
    killed(measured, done, "memory limit of 1 MiB")
    assert "--memory 2M" in done.stderr


def test_a_fork_storm(measured: Measured) -> None:
    storm = "while :; do /x/counted hold 2 /never & done"
    done = measured.sh(f"for i in 1 2 3 4; do ({storm}) 2>&- & done; {FOREVER}", *LIMIT, "--pids", "2000")
    killed(measured, done, "memory limit of 64 MiB")


def test_what_exec_runs_counts(measured: Measured) -> None:
    job = measured.background(FOREVER, *LIMIT)
    measured.run("exec", job, "/x/counted", "hold", "200")
    assert measured.run("wait", job).status == 137
    assert measured.inspect(job)["result"]["reason"] == "memory-limit"


@needs_criu
def test_during_a_checkpoint(measured: Measured, tmp_path: Path) -> None:
    """The checkpoint is complete or absent, and the job ends for what it ended for."""
    go = tmp_path / "go"
    go.mkdir()
    script = "/x/counted hold 32 /go/on; /x/counted hold 200"
    job = measured.background(script, *LIMIT, "--bind", f"{go}:/go:ro")
    measured.prints(job, "holds")
    saving = measured.run.popen("checkpoint", "--leave-running", "--to", tmp_path / "c", job)
    (go / "on").touch()
    assert measured.run("wait", job).status == 137
    _, words = saving.communicate(timeout=60)
    assert measured.inspect(job)["result"]["reason"] == "memory-limit"
    assert (saving.returncode == 0) == (tmp_path / "c/manifest.json").exists(), words
    assert [path.name for path in tmp_path.glob("c.*new*")] == []


# -- limits above the job -----------------------------------------------------------------------------------------------


class Slot:
    """A cgroup as a batch system makes it for a job: imgrun runs in it."""

    def __init__(self, path: Path, limit: str, entry: str) -> None:
        self.path = path
        dirs.make(str(path))
        self._held = dirs.hold(str(path))
        (path / limit).write_text(str(96 * MIB))
        self.entry = path / entry

    def words(self) -> tuple[str, ...]:
        """What goes before a command to run it there."""
        return ("sh", "-c", f'echo 0 > {self.entry} && exec "$@"', "slot")

    def remove(self) -> None:
        eventually(lambda: dirs.try_remove(str(self.path)), "the slot is empty")
        os.close(self._held)


@pytest.fixture
def slot() -> Iterator[Slot]:
    trees = {name: tree for tree in fs.discover() for name in tree.controllers or ("unified",)}
    # By this name gc finds it when nobody holds it any more, which is when these tests were killed.
    path = Path(trees["memory" if "memory" in trees else "unified"].own) / f"{fs.PREFIX}{os.urandom(6).hex()}"
    old = "memory" in trees
    made = Slot(path, "memory.limit_in_bytes", "tasks") if old else Slot(path, "memory.max", "cgroup.procs")
    yield made
    made.remove()


@pytest.mark.parametrize("own", [(), ("--memory", "1G")], ids=["unlimited", "more"])
def test_the_limit_of_a_slot(measured: Measured, slot: Slot, tmp_path: Path, own: tuple[str, ...]) -> None:
    record = tmp_path / "r.json"
    words = [*COMMAND, "start", *own, *measured.flags, "--result", str(record), measured.run.image]
    script = f"(/x/counted hold 200 &); {FOREVER}"
    words = [*slot.words(), *words, "--", "sh", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    measured.record = json.loads(record.read_text())
    ended = Done(done.returncode, done.stdout, done.stderr)
    killed(measured, ended, "memory limit of 96 MiB of the cgroup above it", str(slot.path))
    assert "batch system" in done.stderr
    assert "150M" in done.stderr


# -- told apart ---------------------------------------------------------------------------------------------------------


def test_a_kill_from_outside(measured: Measured) -> None:
    """Of the job's init, which nobody inside can kill."""
    job = measured.background(FOREVER)
    os.kill(measured.inspect(job)["init"], signal.SIGKILL)
    assert measured.run("wait", job).status == 137
    result = measured.inspect(job)["result"]
    assert (result["reason"], result["signal"], result["hold_reason"]) == ("signaled", signal.SIGKILL, None)
    assert "killed from outside" in result["message"]


@pytest.mark.parametrize("ask", [("signal", "{}", "KILL"), ("stop", "-s", "KILL", "{}")], ids=["signal", "stop"])
def test_a_kill_that_was_asked_for(measured: Measured, ask: tuple[str, ...]) -> None:
    job = measured.background(FOREVER)
    assert measured.run(*(word.format(job) for word in ask)).status == 0
    assert measured.run("wait", job).status == 137
    assert measured.inspect(job)["result"]["message"] is None


def test_the_limit_of_processes(measured: Measured) -> None:
    measured.sh("for i in $(seq 30); do sleep 60 & done; true", "--pids", "12")
    (warning,) = measured.record["warnings"]
    assert warning.startswith("the limit of 12 processes kept the job from starting a process "), warning
    assert measured.usage["pids_refused"] >= 1


def test_a_full_scratch(measured: Measured) -> None:
    done = measured.sh("cat /dev/zero > /f", "--scratch-size", "8M")
    assert done.status == 1
    (warning,) = measured.record["warnings"]
    assert warning.startswith("the job's scratch of 8 MiB was full at its end"), warning
    done = measured.sh("echo small > /f", "--scratch-size", "8M")
    assert measured.record["warnings"] == []


def test_the_job_is_killed_rather_than_its_supervisor(run: Imgrun) -> None:
    for own, wanted in ((0, 500), (450, 550), (950, 1000), (1000, 1000)):
        script = f'echo {own} > /proc/self/oom_score_adj && exec "$@"'
        words = ("sh", "-c", script, "x", *COMMAND, "start", run.image, "--", "cat", "/proc/self/oom_score_adj")
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout.strip(), done.stderr) == (str(wanted), "")


# -- held ---------------------------------------------------------------------------------------------------------------

HOLD = (*LIMIT, "--oom", "hold")


def hold(measured: Measured, script: str, *flags: str | Path) -> str:
    """Start a job that will be held, and wait until it is."""
    job = measured.background(script, *HOLD, *flags)
    measured.becomes(job, "held")
    return job


def test_a_held_job_goes_on_with_more_memory(measured: Measured) -> None:
    job = hold(measured, "/x/counted hold 100; exit 7")
    record = measured.inspect(job)
    assert "memory limit of 64 MiB and is held" in record["hold_reason"]
    assert "counted" in record["hold_reason"]
    assert "held" in measured.run("ps").stdout
    assert measured.run("logs", job).stdout == ""
    assert measured.run("update", "--memory", "80M", job).stdout == f"{job}\n"
    measured.becomes(job, "held")  # again: that was not enough
    assert measured.run("update", "--memory", "200M", job).status == 0
    assert measured.run("wait", job).status == 7
    assert measured.run("logs", job).stdout == "holds\n"
    record = measured.inspect(job)
    assert (record["hold_reason"], record["spec"]["memory"]) == (None, 200 * MIB)
    assert (record["result"]["reason"], record["result"]["hold_reason"]) == ("exited", None)


def test_all_of_a_held_job_stands_still(measured: Measured, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    script = "(i=0; while :; do i=$((i + 1)); echo $i > /out/n; sleep 0.01; done) & /x/counted hold 200"
    job = hold(measured, script, "--bind", f"{out}:/out")
    unified = next(Path(path) for path in measured.inspect(job)["cgroups"])
    if not (unified / "cgroup.freeze").exists():
        pytest.skip("this host has no cgroup v2, whose freezer this test reads")
    assert (unified / "cgroup.freeze").read_text() == "1\n"
    measured.run("rm", "--force", job)


def test_a_held_job_can_be_stopped(measured: Measured) -> None:
    """It gets the room that it needs for that."""
    job = hold(measured, f"trap 'echo bye; exit 3' TERM; /x/counted hold 100 /never & {FOREVER}")
    assert measured.run("stop", job).status == 0
    result = measured.inspect(job)["result"]
    assert (result["reason"], result["exit_code"]) == ("stopped", 3)
    assert measured.run("logs", job).stdout.endswith("bye\n")


def test_a_held_job_can_be_killed(measured: Measured) -> None:
    job = hold(measured, "/x/counted hold 100")
    assert measured.run("signal", job, "KILL").status == 0
    assert measured.run("wait", job).status == 137
    assert measured.run("rm", job).status == 0


def test_who_has_no_memory_to_start_is_killed(measured: Measured) -> None:
    """Held, nobody could tell why it does not start."""
    measured.sh("/x/counted hold 8", "--memory", "1M", "--swap", "0", "--oom", "hold", "--time-limit", "3s")
    assert measured.record["reason"] in ("memory-limit", "time-limit"), "the latter where it could start"


@needs_criu
def test_a_held_job_can_be_checkpointed_and_goes_on_elsewhere_with_more(measured: Measured, tmp_path: Path) -> None:
    # What it gets to be saved in does not let it come to its end.
    job = hold(measured, "/x/counted hold 400 /x/counted 5; exit 7")
    assert measured.run("checkpoint", "--leave-running", "--to", tmp_path / "c", job) == (0, "", "")
    assert measured.state(job) == "held", "it stays so"
    assert measured.run("checkpoint", "--to", tmp_path / "c", job) == (0, "", "")
    assert measured.inspect(job)["result"]["reason"] == "checkpointed"
    done = measured.run("restore", "--memory", "1G", tmp_path / "c")
    assert (done.status, done.stderr) == (7, ""), done


def test_holding_needs_a_limit(measured: Measured) -> None:
    refused(measured.run.sh("true", "--oom", "hold"), 125, "--oom hold", "memory limit")


def test_limits_of_a_running_job_change(measured: Measured) -> None:
    job = measured.background(FOREVER, "--pids", "50", *LIMIT)
    refused(measured.run("update", job), 125, "no limit given")
    refused(measured.run("update", "--memory", "x", job), 125, "memory")
    assert measured.run("update", "--pids", "3", "--memory", "32M", job).status == 0
    spec = measured.inspect(job)["spec"]
    assert (spec["pids"], spec["memory"]) == (3, 32 * MIB)
    eventually(lambda: "can't fork" in measured.run("logs", job).stderr, "the new limit holds")
    measured.run("stop", "-t", "0", job)
    refused(measured.run("update", "--pids", "5", job), 125, "not running")
