"""The Python API: Job.start and all that follows, from programs with threads, without the command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Imgrun, eventually

import imgrun
from imgrun import ImgrunError, Job, JobSpec, Mount, Result, errors, launcher
from imgrun.channel import connect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FOREVER = ("sh", "-c", "while :; do sleep 0.05; done")


@pytest.fixture(autouse=True)
def own_launcher(nothing_left: None) -> Iterator[None]:
    """Each test starts without a launcher process, and ends its own."""
    end_launcher()
    yield
    end_launcher()


def end_launcher() -> None:
    launcher.close_server()


def spec(image: Path, *command: str, **fields: object) -> JobSpec:
    return JobSpec(image=str(image), command=command, **fields)  # type: ignore[arg-type]


def test_the_example_of_the_design(image: Path) -> None:
    job = Job.start(spec(image, "sh", "-c", "echo out; echo err >&2; exit 3", memory="64M", name="n"))
    result = job.wait()
    assert isinstance(result, Result)
    assert (result.exit_code, result.reason, result.exit_status) == (3, "exited", 3)
    assert result.usage.user_seconds is not None
    assert result.usage.wall_seconds is not None
    assert (job.output(), job.output("stderr")) == (b"out\n", b"err\n")
    assert job.state == "finished"
    assert not job.running
    assert job.result == result
    assert Job.find("n").id == Job.find(job.id).id == job.id
    assert [other.id for other in Job.all()] == [job.id]
    assert job.spec.memory == 64 << 20
    assert job.id in repr(job)
    job.remove()
    assert Job.all() == []


def test_start_returns_when_the_command_runs(image: Path) -> None:
    job = Job.start(spec(image, *FOREVER))
    assert job.state == "running"
    assert job.result is None
    assert Path(f"/proc/{job.init_pid()}/comm").read_text() == "imgrun-init\n"
    with pytest.raises(TimeoutError):
        job.wait(0.2)
    job.kill()
    result = job.wait(20)
    assert (result.reason, result.signal, result.exit_status) == ("signaled", 9, 137)
    with pytest.raises(errors.JobStateError):
        job.signal(15)
    with pytest.raises(errors.JobStateError):
        job.init_pid()


def test_signal_stop_and_remove(image: Path) -> None:
    job = Job.start(spec(image, "sh", "-c", "trap 'exit 9' USR1; while :; do sleep 0.05; done", name="n"))
    time.sleep(0.2)
    job.signal(signal.SIGUSR1)
    assert job.wait().exit_code == 9
    job.remove()
    job = Job.start(spec(image, *FOREVER, name="n"))
    with pytest.raises(errors.JobStateError, match="running"):
        job.remove()
    assert job.stop(timeout=0.2).reason == "stopped"
    job = Job.start(spec(image, *FOREVER))
    job.remove(force=True)
    with pytest.raises(errors.JobStateError):
        job.wait()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"command": ("nope",)}, errors.CommandNotFound),
        ({"command": ("/etc/motd",)}, errors.CommandNotExecutable),
        ({"image": "/nope.img"}, errors.ImageMissing),
        ({"image": "/dev/null"}, errors.ImageMissing),
        ({"partition": "3"}, errors.PartitionError),
        ({"user": "nobody-here"}, errors.SpecError),
        ({"workdir": "/nope"}, errors.StartError),
        ({"mounts": (Mount("bind", "/d", "/nope"),)}, errors.SpecError),
        ({"rlimits": ("nofile=99999999999",)}, errors.LimitError),
    ],
)
def test_errors_are_raised_as_what_they_are(image: Path, fields: dict[str, object], kind: type[ImgrunError]) -> None:
    known: dict[str, object] = {"image": str(image), "command": ("true",), **fields}
    with pytest.raises(kind) as caught:
        Job.start(JobSpec(**known))  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.message
    assert caught.value.hint
    assert Job.all() == [], "a failed start leaves no record"


def test_a_name_in_use(image: Path) -> None:
    job = Job.start(spec(image, *FOREVER, name="n"))
    with pytest.raises(errors.NameInUse, match=job.id):
        Job.start(spec(image, "true", name="n"))


def test_streams_of_the_program(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    read, write = os.pipe()
    os.write(write, b"some input\n")
    os.close(write)
    with out.open("wb") as sink:
        job = Job.start(spec(image, "cat"), stdin=read, stdout=sink.fileno())
    os.close(read)
    assert job.wait().exit_code == 0
    assert out.read_bytes() == b"some input\n"
    assert job.output() == b""
    assert job.output("stderr") == b""


def test_requests_that_make_no_sense_do_not_hurt_the_job(image: Path) -> None:
    job = Job.start(spec(image, *FOREVER))
    for number in (0, -1, 65, 99):
        with pytest.raises(ImgrunError):
            job.signal(number)
    for request in ({}, {"request": "nope"}, {"request": "signal"}, {"request": "signal", "signal": 99},
                    {"request": "stop", "timeout": "x"}, {"request": "signal", "signal": {}}):  # fmt: skip
        channel = connect(f"{job.directory}/control")
        channel.set_timeout(10)
        channel.send(request)
        answer = channel.receive()
        assert answer is not None
        assert "error" in answer[0]
        channel.close()
    channel = connect(f"{job.directory}/control")
    channel._sock.send(b"\xff not json")
    assert channel.receive() is None
    channel.close()
    connect(f"{job.directory}/control").close()
    assert job.state == "running"


# -- threads -----------------------------------------------------------------------------------------------------------


def test_twenty_threads_at_once(image: Path) -> None:
    barrier = threading.Barrier(20)
    ends: dict[int, tuple[int | None, bytes]] = {}

    def one(i: int) -> None:
        barrier.wait()
        job = Job.start(spec(image, "sh", "-c", f"echo {i}; exit {i}"))
        ends[i] = (job.wait().exit_code, job.output())

    threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == {i: (i, f"{i}\n".encode()) for i in range(20)}


def test_one_job_and_many_threads(image: Path) -> None:
    job = Job.start(spec(image, "sh", "-c", "sleep 0.5; exit 4"))
    results: list[int | None] = []
    threads = [threading.Thread(target=lambda: results.append(job.wait().exit_code)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4] * 10


def test_no_descriptors_are_left_open(image: Path) -> None:
    Job.start(spec(image, "true")).wait()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(10):
        job = Job.start(spec(image, "sh", "-c", "exit 2"))
        job.wait()
        job.remove()
        with pytest.raises(errors.CommandNotFound):
            Job.start(spec(image, "nope"))
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- the launcher process ----------------------------------------------------------------------------------------------


def launchers() -> list[int]:
    """The launcher processes of this test. Supervisors are forked from them, and alive() knows those."""
    found = []
    supervisors = {job.inspect()["supervisor"] for job in Job.all()}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        ours = f"IMGRUN_STATE_DIR={os.environ['IMGRUN_STATE_DIR']}\0".encode() in environment
        if b"imgrun.launcher" in words and ours and pid not in supervisors:
            found.append(pid)
    return found


def test_one_launcher_serves_all(image: Path) -> None:
    for _ in range(3):
        Job.start(spec(image, "true")).wait()
    assert len(launchers()) == 1
    end_launcher()
    eventually(lambda: launchers() == [], "the launcher ends when nobody needs it")


def test_the_launcher_is_killed(image: Path) -> None:
    first = Job.start(spec(image, "sh", "-c", "sleep 1; exit 5"))
    (server,) = launchers()
    os.kill(server, signal.SIGKILL)
    eventually(lambda: launchers() == [])
    second = Job.start(spec(image, "sh", "-c", "exit 6"))
    assert second.wait().exit_code == 6
    assert first.wait().exit_code == 5, "its jobs go on"


def test_the_launcher_is_killed_again_and_again(image: Path) -> None:
    stop = threading.Event()

    def shoot() -> None:
        while not stop.is_set():
            for server in launchers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
            time.sleep(0.15)

    thread = threading.Thread(target=shoot)
    thread.start()
    ended = 0
    try:
        for _ in range(10):
            try:
                ended += Job.start(spec(image, "true")).wait().exit_status == 0
            except (errors.StartError, errors.HostError):
                pass  # it was killed in the middle: said, not hung
    finally:
        stop.set()
        thread.join()
    assert Job.start(spec(image, "true")).wait().exit_code == 0


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code],
        text=True,
        timeout=60,
        check=False,
        **options,  # type: ignore[call-overload]
    )


PROGRAM = """
import os, sys
from imgrun import Job, JobSpec
def start(*command):
    return Job.start(JobSpec(image=os.environ["IMAGE"], command=command))
"""


def test_a_program_ends_and_its_job_does_not(image: Path, run: Imgrun) -> None:
    """The job holds none of the program's streams, and the program has nothing to wait for."""
    done = python(PROGRAM + "print(start('sleep', '30').id)", capture_output=True, env={**os.environ, "IMAGE": str(image)})
    assert (done.returncode, done.stderr) == (0, "")
    assert run("ps", "-q").stdout == done.stdout


def test_a_program_that_forks(image: Path) -> None:
    code = (
        PROGRAM
        + """
first = start("sh", "-c", "exit 1")
pid = os.fork()
if pid == 0:
    os._exit(start("sh", "-c", "exit 2").wait().exit_code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
print(first.wait().exit_code, start("sh", "-c", "exit 3").wait().exit_code)
"""
    )
    done = python(code, capture_output=True, env={**os.environ, "IMAGE": str(image)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 3\n", "")


def test_a_program_that_waits_for_its_children_sees_none_of_ours(image: Path) -> None:
    code = (
        PROGRAM
        + """
job = start("sleep", "30")
try:
    os.wait()
except ChildProcessError:
    print("none")
"""
    )
    done = python(code, capture_output=True, env={**os.environ, "IMAGE": str(image)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "none\n"


def test_a_program_in_a_strange_place(image: Path, tmp_path: Path) -> None:
    """Its directory may hold modules with our names, or be gone; descriptors 0 to 2 may be closed."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    (tmp_path / "imgrun").mkdir()
    code = (
        PROGRAM
        + """
if os.getcwd().endswith("gone"):
    os.rmdir(os.getcwd())
for fd in (0, 1, 2):
    os.close(fd)
os._exit(start("sh", "-c", "exit 7").wait().exit_code)
"""
    )
    for cwd in (tmp_path, tmp_path / "gone"):
        cwd.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, cwd=cwd, env={**os.environ, "IMAGE": str(image)}, timeout=60, check=False)
        assert done.returncode == 7


def test_importing_is_lazy() -> None:
    code = "import sys, imgrun; print(sorted(m for m in sys.modules if m.startswith('imgrun')))"
    assert python(code, capture_output=True).stdout == "['imgrun']\n"
    with pytest.raises(AttributeError):
        imgrun.nope  # noqa: B018
    for name in imgrun.__all__:
        assert getattr(imgrun, name) is not None


def test_inspect_is_json(image: Path) -> None:
    job = Job.start(spec(image, "true", name="n"))
    job.wait()
    record = json.loads(json.dumps(job.inspect()))
    assert record["id"] == job.id
    assert record["spec"]["command"] == ["true"]
    assert record["result"]["reason"] == "exited"
