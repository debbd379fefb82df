"""A job frozen and continued is the job that it would have been."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from typing import IO

import pytest
from command import Done, eventually, expect, refused

from images import Images

from .conftest import Rig

COUNT = "i=0; while [ $i -lt {n} ]; do i=$((i+1)); echo $i; echo $i >> /log; sleep 0.02; done; wc -l < /log"
COUNT_ON = "i=0; until [ -e /data/go ]; do i=$((i+1)); echo $i; echo $i >> /log; {pause} done; wc -l < /log"
"""As COUNT, until it is told to end by a Gate."""
SLOW = os.environ.get("IMGRUN_SLOW", "") not in ("", "0")


def numbers(last: int) -> list[str]:
    return [str(n) for n in range(1, last + 1)]


def whole(seen: list[str]) -> bool:
    """Whether these are all the lines of a COUNT_ON, each once."""
    return seen == [*numbers(int(seen[-1])), seen[-1]]


class Gate:
    """A file for which a job waits, in this life or a later one, so that it is frozen before it goes on or ends."""

    WAIT = "until [ -e /data/go ]; do sleep 0.01; done"

    def __init__(self, rig: Rig) -> None:
        data = rig.make("data")
        self._file = data / "go"
        self.bind = ("--bind", f"{data}:/data:ro")
        """The words with which the job sees it."""

    def open(self) -> None:
        self._file.touch()

    def close(self) -> None:
        self._file.unlink()


FILES = """
echo a > /root/file; ln -s file /root/link; mkfifo /root/fifo; rm /etc/motd; touch -d @86400 /root/file
echo b > /tmp/file; chmod 640 /tmp/file; echo c > /var/tmp/file; echo d > /dev/shm/file
{more} cd /tmp; export MINE=1; (echo own $$ $PPID; sleep 1000) & exec 7< /root/file; echo ready
read go
read word <&7; echo $word $(readlink /root/link) $(cat /tmp/file /var/tmp/file /dev/shm/file)
test ! -e /etc/motd && test -p /root/fifo && stat -c '%a %U' /tmp/file && stat -c %Y /root/file
echo $$ $PWD $MINE $LEFT $(hostname) $(id -u) $HOME; kill -0 $! && echo alive
{more_after}
"""


ANYONES: tuple[tuple[str, ...], ...] = ((), ("--network", "none"))
ROOTS: tuple[tuple[str, ...], ...] = (("--scratch-size", "32M"), ("--userns", "off"))


@pytest.mark.parametrize(
    ("rig", "flags"),
    [*((who, flags) for who in ("root", "user") for flags in ANYONES), *(("root", flags) for flags in ROOTS)],
    indirect=["rig"], ids=str,
)  # fmt: skip
def test_everything_is_as_it_was(rig: Rig, flags: tuple[str, ...]) -> None:
    data = rig.make("data")
    data.chmod(0o777)
    script = FILES.format(
        more="echo e > /mem/file; echo f > /data/out;", more_after="cat /mem/file /data/out; echo g >> /data/out"
    )
    more = ("--tmpfs", "/mem:1M", "--bind", f"{data}:/data", "--name", "frozen", "--env", "LEFT=alone")
    process = rig.run.foreground(script, *flags, *more)
    expect(process, "ready")
    target = rig.freeze("frozen")
    assert process.wait(30) == 85
    assert [p.name for p in rig.path("").glob("c*")] == ["c"], "something is left beside the checkpoint"
    if rig.root and "--scratch-size" not in flags:
        assert (target / "files/upper/root/file").read_text() == "a\n"
    done = rig.restore(target, stdin="go\n")
    assert done.status == 0, done
    assert done.stdout.splitlines() == [
        "a file b c d", "640 root", "86400", "3 /tmp 1 alone frozen 0 /root", "alive", "e", "f"
    ], done  # fmt: skip
    assert (data / "out").read_text() == "f\ng\n"


def test_a_read_only_root(rig: Rig) -> None:
    process = rig.run.foreground("echo 1 > /tmp/x; echo ready; read go; cat /tmp/x; touch /x || echo refused", "--read-only")
    expect(process, "ready")
    (job,) = os.listdir(rig.run.state / "jobs")
    target = rig.freeze(job)
    process.wait(30)
    done = rig.restore(target, stdin="go\n")
    assert (done.status, done.stdout) == (0, "1\nrefused\n"), done


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_writable_image(rig: Rig, images: Images) -> None:
    rig.run.image = str(images.copy(images.filesystem("ext4"), rig.path("own.img")))
    script = "exec 5> /new; echo 1 >&5; echo ready; read go; echo 2 >&5; cat /new"
    process = rig.run.foreground(script, "--writable", "--name", "w")
    expect(process, "ready")
    refused(rig.run("checkpoint", "--leave-running", "--to", rig.path("c"), "w"), 125, "would change its image")
    target = rig.freeze("w")
    process.wait(30)
    done = rig.restore(target, stdin="go\n")
    assert (done.status, done.stdout) == (0, "1\n2\n"), done
    # Now the image has gone on, and the checkpoint has not.
    refused(rig.restore(target, stdin="go\n"), 125, "is not the image that it was")


@pytest.mark.timeout(600 if SLOW else 120)
def test_output_is_delivered_once_over_many_rounds(rig: Rig) -> None:
    gate = Gate(rig)
    process = rig.run.foreground(COUNT_ON.format(pause="sleep 0.02;"), "--name", "count", *gate.bind)
    expect(process, "5")
    seen = numbers(5)
    for number in range(100 if SLOW else 10):
        target = rig.freeze("count", f"c{number % 2}")
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 85, stderr
        seen += stdout.decode().split()
        process = rig.run.popen("restore", target)
        assert process.stdout is not None
        seen.append(process.stdout.readline().decode().strip())
    gate.open()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")
    assert whole(seen + stdout.decode().split())


def test_nothing_runs_between_the_freeze_and_the_end(rig: Rig) -> None:
    """A job that prints and writes without a pause says the same in both lives together as in one."""
    gate = Gate(rig)
    job = rig.run.background(COUNT_ON.format(pause=""), *gate.bind)
    seen: list[str] = []
    for _ in range(3):
        eventually(lambda job=job: len(rig.output(job)) > 100)
        target = rig.freeze(job)
        seen += rig.output(job)
        job = rig.restore(target, "--detach").stdout.strip()
    gate.open()
    assert rig.run("wait", job).status == 0
    assert whole(seen + rig.output(job))


def test_output_that_nobody_has_read_yet(rig: Rig) -> None:
    script = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); echo $i; done; echo end"
    process = rig.run.foreground(script, "--name", "full")
    expect(process, "1")
    assert process.stdout is not None
    time.sleep(0.5)  # by now both pipes are full
    frozen = rig.run.popen("checkpoint", "--to", rig.path("c"), "full")
    eventually((rig.path("c") / "manifest.json").exists)
    first = process.stdout.read().decode().split()
    assert process.wait(30) == 85
    assert frozen.wait(30) == 0
    assert len(first) < 30000, "it had ended before it was frozen"
    assert ["1", *first, *rig.restore(rig.path("c")).stdout.split()] == [*numbers(30000), "end"]


def test_input_goes_on_where_it_stood(rig: Rig) -> None:
    process = rig.run.foreground("read a; echo got $a; while read line; do echo $line; sleep 0.01; done", "--name", "in")
    assert process.stdin is not None
    process.stdin.write(b"first\n" + "".join(f"{n}\n" for n in numbers(300)).encode())
    process.stdin.flush()
    expect(process, "20")
    target = rig.freeze("in")
    before = process.communicate(timeout=30)[0].decode().split()
    after = rig.restore(target, stdin="301\n302\n").stdout.split()
    assert numbers(20) + before + after == numbers(302)


def test_an_input_file_is_continued_in(rig: Rig) -> None:
    source = rig.make("source", "".join(f"{n:06}\n" for n in range(1, 100001)))
    gate = Gate(rig)
    script = f"while read n; do echo $n; test $n != 000020 || {Gate.WAIT}; done"
    with source.open() as f:
        process = rig.run.foreground(script, "--name", "file", *gate.bind, stdin=f)
        expect(process, "000020")
        target = rig.freeze("file")
        before = process.communicate(timeout=30)[0].decode().split()
    gate.open()
    with source.open() as f:
        after = rig.run.popen("restore", target, stdin=f).communicate(timeout=60)[0].decode().split()
    assert len(before) < 99980
    assert before + after == [f"{n:06}" for n in range(21, 100001)]


def test_input_that_had_ended_stays_so(rig: Rig) -> None:
    gate = Gate(rig)
    script = f"cat; echo end; {Gate.WAIT}; cat; echo ended"
    process = rig.run.foreground(script, "--name", "eof", *gate.bind, stdin=subprocess.DEVNULL)
    expect(process, "end")
    target = rig.freeze("eof")
    process.wait(30)
    gate.open()
    assert rig.restore(target, stdin="more\n").stdout == "ended\n"


def unread(pipe: IO[bytes] | None) -> int:
    """Bytes in a pipe."""
    assert pipe is not None
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_saved_input_reaches_a_background_job(rig: Rig) -> None:
    gate = Gate(rig)
    script = f"echo go; {Gate.WAIT}; while read x; do echo got $x; done; echo end"
    process = rig.run.foreground(script, "--name", "bg", *gate.bind)
    assert process.stdin is not None
    expect(process, "go")
    process.stdin.write(b"1\n2\n")
    process.stdin.flush()
    eventually(lambda: unread(process.stdin) == 0, "it is passed on to the job")
    target = rig.freeze("bg")
    process.wait(30)
    gate.open()
    job = rig.restore(target, "--detach").stdout.strip()
    assert rig.run("wait", job).status == 0
    assert rig.output(job) == ["got 1", "got 2", "end"]


def test_left_running_and_continued_later_twice(rig: Rig) -> None:
    gate = Gate(rig)
    job = rig.run.background(COUNT_ON.format(pause="sleep 0.02;"), *gate.bind)
    rig.reaches(job, "10")
    target = rig.freeze(job, "c", "--leave-running")
    gate.open()
    assert rig.run("wait", job).status == 0
    assert whole(rig.output(job))
    saved = sorted((p.relative_to(target), p.lstat()) for p in target.rglob("*"))
    for _ in range(2):
        gate.close()
        process = rig.run.popen("restore", target)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first > 10
        gate.open()
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, b"")
        assert whole([*numbers(first), *stdout.decode().split()])
    untouched = [(path, s.st_ino, s.st_mtime_ns, s.st_size) for path, s in saved]
    now = [(p.relative_to(target), p.lstat()) for p in target.rglob("*")]
    assert sorted((path, s.st_ino, s.st_mtime_ns, s.st_size) for path, s in now) == untouched, "it was changed"


def test_as_a_scheduler_drives_it(rig: Rig) -> None:
    """The same command line until it is done; a signal means freeze."""
    place = rig.path("spool")
    gate = Gate(rig)
    words = ("--checkpoint-dir", place, "--checkpoint-signal", "USR1", "--time-limit", "60", *gate.bind)
    seen: list[str] = []
    for number in range(4):
        if number == 3:
            gate.open()
        process = rig.run.foreground(COUNT_ON.format(pause="sleep 0.02;"), *words)
        assert process.stdout is not None
        seen += [process.stdout.readline().decode().strip() for _ in range(1 if number == 3 else 10)]
        assert place.is_dir(), "a scheduler may want to collect it at any time"
        if number < 3:
            process.send_signal(signal.SIGUSR1)
        stdout, stderr = process.communicate(timeout=60)
        seen += stdout.decode().split()
        assert process.returncode == (85 if number < 3 else 0), stderr
    assert whole(seen)


def test_usage_and_the_time_limit_go_on(rig: Rig) -> None:
    burn = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    script = f"sleep 2; {burn}; echo burnt; sleep 1000"
    target, record = rig.path("c"), rig.path("result")
    words = ("--checkpoint-dir", target, "--json", "--result", record)
    process = rig.run.foreground(script, "--name", "burner", *words)
    expect(process, "burnt")
    rig.freeze("burner")
    assert process.wait(60) == 85
    before = json.loads((target / "manifest.json").read_text())["usage"]
    assert before["user_seconds"] > 0.1
    time.sleep(1)  # this does not count
    began = time.monotonic()
    limit = before["wall_seconds"] / 2
    assert rig.run.sh(script, *words, "--time-limit", f"{limit:.3f}").status == 124
    after = json.loads(record.read_text())["usage"]
    assert after["wall_seconds"] > before["wall_seconds"], "the limit began anew"
    assert after["wall_seconds"] < before["wall_seconds"] + time.monotonic() - began
    assert before["user_seconds"] <= after["user_seconds"] < before["user_seconds"] + 1


def test_stopped_processes_zombies_and_orphans(rig: Rig) -> None:
    script = """
        (sleep 1000 > /dev/null & echo orphan $! ) | cat
        is_sleep() { until grep -q '^sleep' /proc/$1/comm; do sleep 0.01; done; }
        sleep 1001 & stopped=$!; is_sleep $stopped; kill -STOP $stopped
        sh -c 'sleep 0 & exec sleep 1002' & is_sleep $!; sleep 0.3
        trap 'echo usr1' USR1; echo ready; read go
        grep -l 'State:.T' /proc/[0-9]*/status; grep -l 'State:.Z' /proc/[0-9]*/status | wc -l
        kill -CONT $stopped; kill -USR1 $$; cat /proc/[0-9]*/comm | grep -c '^sleep'
    """
    job = rig.run.foreground(script, "--name", "odd")
    expect(job, "ready")
    target = rig.freeze("odd", "c", "--leave-running")
    assert job.stdin is not None
    out = job.communicate(b"go\n", timeout=30)[0].decode()
    assert "State" not in out
    lines = out.split()
    assert lines[1:] == ["1", "usr1", "4"], out
    assert rig.restore(target, stdin="go\n").stdout == out


def test_many_processes(rig: Rig) -> None:
    count = 300
    script = f"""i=0; while [ $i -lt {count} ]; do i=$((i+1)); sleep 1000 & done
        echo ready; read go; cat /proc/[0-9]*/comm | grep -c '^sleep'"""
    process = rig.run.foreground(script, "--name", "many")
    expect(process, "ready")
    target = rig.freeze("many")
    process.wait(30)
    done = rig.restore(target, stdin="go\n")
    assert done.stdout == f"{count}\n", done


def test_the_next_pid_follows_on_the_last(rig: Rig) -> None:
    process = rig.run.foreground("echo ready; read go; sleep 0 & echo $!", "--name", "pid")
    expect(process, "ready")
    target = rig.freeze("pid")
    process.wait(30)
    assert int(rig.restore(target, stdin="go\n").stdout) < 50


def test_the_name_and_the_record_of_a_continued_job(rig: Rig) -> None:
    job = rig.run.background("sleep 1000", "--name", "named", "--rm")
    target = rig.freeze("named")
    eventually(lambda: "named" not in rig.run("ps", "--all").stdout)
    again = rig.restore(target, "--detach").stdout.strip()
    assert again != job
    record = json.loads(rig.run("inspect", again).stdout)
    assert (record["name"], record["hostname"], record["state"]) == ("named", "named", "running")
    assert rig.run("stop", "--timeout", "0", "named").status == 0
    assert rig.run("rm", "named") == Done(0, f"{again}\n", "")
    assert target.is_dir()
