"""The command line where things go wrong: what is said, with which status, and that nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, Imgrun, eventually, expect, refused
from conftest import records

from imgrun.job import Job

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, loop devices, cgroups")


@pytest.fixture
def job(run: Imgrun) -> str:
    """A job that runs until it is removed."""
    return run.background("while :; do sleep 1000; done", "--name", "job")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "small", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


# -- standard streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(run: Imgrun, closed: str) -> None:
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, "start", run.image, "sh", "-c", "cat; echo out; echo err >&2"]
    done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == 0, done
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"out\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"err\n")


def test_no_archive_goes_to_closed_output(run: Imgrun, job: str) -> None:
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "checkpoint", "--archive", "-", job]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    assert done.returncode == 125
    assert b"standard output is closed" in done.stderr
    assert Job.find(job).running


def test_output_of_exec_that_cannot_be_written(run: Imgrun, job: str) -> None:
    with open("/dev/full", "w") as full:
        done = run("exec", job, "echo", "hi", stdout=full)
        assert done.status == 0
        assert done.stderr == (
            "imgrun: warning: the command's output could not be written, and the rest is lost: No space left on device\n"
        )
        done = run("exec", job, "sh", "-c", "echo hi >&2", stderr=full)
        assert (done.status, done.stdout) == (0, "")


def test_a_result_that_cannot_be_written(run: Imgrun, state_dir: Path) -> None:
    done = run.sh("exit 3", "--result", "/dev/full")
    refused(done, 125, "/dev/full", "No space left on device")
    assert records(state_dir) == []


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/2"])
def test_a_result_to_a_stream_that_is_a_file(run: Imgrun, tmp_path: Path, name: str) -> None:
    """It comes after what the job wrote, and the name, which may be a link in /dev, stays what it is."""
    before = os.readlink("/dev/stdout"), os.readlink("/dev/stderr")
    with (tmp_path / "out").open("wb") as out:
        assert run.sh("echo hi; echo hi >&2", "--result", name, stdout=out, stderr=out).status == 0
    assert (os.readlink("/dev/stdout"), os.readlink("/dev/stderr")) == before
    first, second, rest = (tmp_path / "out").read_text().split("\n", 2)
    assert (first, second) == ("hi", "hi")
    assert json.loads(rest)["exit_code"] == 0
    assert set(os.listdir(tmp_path)) <= {"out", "state"}


def test_a_result_to_a_descriptor(run: Imgrun, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        os.set_inheritable(out.fileno(), True)
        assert run.sh("true", "--result", f"/dev/fd/{out.fileno()}", close_fds=False).status == 0
    assert json.loads((tmp_path / "out").read_text())["exit_code"] == 0
    refused(run.sh("true", "--result", "/dev/fd/999"), 125, "/dev/fd/999 is not open")


def test_a_result_in_place_of_a_link(run: Imgrun, tmp_path: Path) -> None:
    """In a directory where everybody may make one, what it leads to is not to be written."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    assert run.sh("true", "--result", tmp_path / "link").status == 0
    assert (tmp_path / "file").read_text() == "mine"
    assert json.loads((tmp_path / "link").read_text())["exit_code"] == 0


def test_an_archive_to_a_stream_that_is_a_file(run: Imgrun, job: str, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        assert run("checkpoint", "--leave-running", "--archive", "/dev/stdout", job, stdout=out).status == 0
    assert os.readlink("/dev/stdout") == "/proc/self/fd/1"
    assert run("check", tmp_path / "out").status == 0


# -- commands ----------------------------------------------------------------------------------------------------------


def test_options_after_the_image_are_no_options(run: Imgrun, job: str) -> None:
    for done in (run("start", run.image, "--memory", "1G", "true"), run("exec", job, "--user", "0", "true")):
        refused(done, 127, "'--")
        assert "stand before" in done.stderr


def test_variables_of_exec(run: Imgrun, job: str) -> None:
    refused(run("exec", "-e", "=1", job, "env"), 125, "=1")
    refused(run("exec", "-e", "", job, "env"), 125, "no name")
    refused(run("exec", "-w", "tmp", job, "pwd"), 125, "tmp")
    assert "A=1" in run("exec", "-e", "A=1", job, "env").stdout.splitlines()


def test_an_environment_that_is_too_long(run: Imgrun, state_dir: Path, tmp_path: Path) -> None:
    """A single string of more than 128 KiB (execve(2)): no argument of ours could bring it here, a file can."""
    path = tmp_path / "env"
    path.write_text(f"A={'x' * 200_000}\n")
    refused(run.start("--env-file", path, "--", "true"), 126, "too long")
    assert records(state_dir) == []


def test_many_arguments(run: Imgrun) -> None:
    many = ["x" * 1000] * 1000
    assert run.start("--", "echo", *many).stdout == " ".join(many) + "\n"


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_who_watches_a_job_that_is_removed(run: Imgrun, state_dir: Path) -> None:
    """Each ends, and with no more than a line of what happened."""
    job = run.background("echo ready; sleep 1000")
    watching = [run.popen(*words) for words in (("logs", "-f", job), ("stats", "-i", "100ms", job), ("wait", job))]
    watching.append(run.popen("exec", job, "sh", "-c", "echo ready; sleep 1000"))
    for process in (watching[0], watching[3]):
        expect(process, "ready")
    assert watching[1].stdout is not None
    assert watching[1].stdout.readline().startswith(b"ID")
    assert run("rm", "--force", job).status == 0
    for process, statuses in zip(watching, ((0,), (0,), (137, 125), (137,)), strict=True):
        _, errors = process.communicate(timeout=60)
        assert process.returncode in statuses, errors
        assert b"unexpected" not in errors
    assert records(state_dir) == []


def test_gc_says_each_id_once(run: Imgrun, state_dir: Path) -> None:
    wanted = run.background("sleep 1000")
    supervisor = Job.find(wanted).inspect()["supervisor"]
    os.kill(supervisor, 9)
    eventually(lambda: not Job.find(wanted).running)
    assert run("gc", "--older-than", "0s").stdout.split() == [wanted]
    assert records(state_dir) == []


def test_gc_tells_what_is_wrong_with_the_state_directory(run: Imgrun) -> None:
    refused(run("gc", env={"IMGRUN_STATE_DIR": "/etc/passwd"}), 125, "/etc/passwd")


def test_read_only_places(run: Imgrun, tmp_path: Path) -> None:
    for place, words in (("/run", b"/run/imgrun/ids"), ("/var", b"/var/lib/imgrun")):
        script = f'mount -t tmpfs -o ro none {place}; exec "$@"'
        environment = {key: value for key, value in os.environ.items() if key != "IMGRUN_STATE_DIR"}
        if place == "/run":
            environment["IMGRUN_STATE_DIR"] = str(tmp_path / "state")
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *COMMAND, "start", run.image, "true"],
            capture_output=True, check=False, timeout=60, env=environment,
        )  # fmt: skip
        assert done.returncode == 125, done
        assert len(done.stderr.splitlines()) == 2
        assert words in done.stderr
        assert b"Read-only file system" in done.stderr


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_directory_is_looked_at_first(run: Imgrun, state_dir: Path, tmp_path: Path) -> None:
    """What would make the checkpoint fail hours later is told at the start."""
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thing").touch()
    for name in ("file", "other", "file/x"):
        refused(run.start("--checkpoint-dir", tmp_path / name, "--", "true"), 125, str(tmp_path / name))
    assert records(state_dir) == []
    assert run.start("--checkpoint-dir", tmp_path / "new/place", "--", "true").status == 0
    assert (tmp_path / "new/place").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("when", [("--checkpoint-signal", "USR1"), ("--checkpoint-every", "1m")])
def test_a_job_that_could_not_be_saved_is_not_started(
    run: Imgrun, state_dir: Path, tmp_path: Path, when: tuple[str, str]
) -> None:
    for flags, word in (
        (("--tty",), "terminal"),
        (("--seccomp", "default"), "--seccomp"),
        (("--init", "none"), "--init none"),
    ):
        refused(run.start(*when, "--checkpoint-dir", tmp_path / "c", *flags, "--", "true"), 125, word)
    assert records(state_dir) == []
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_on_a_full_disk_leaves_the_job_running(run: Imgrun, job: str, small_disk: Path) -> None:
    for option in ("--to", "--archive"):
        refused(run("checkpoint", option, small_disk / "x", job), 125, "no space", str(small_disk))
        assert set(os.listdir(small_disk)) <= {"x.criu.log"}
        assert Job.find(job).running


def test_a_result_on_a_full_disk(run: Imgrun, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "fill").write_bytes(bytes(1 << 20))
    refused(run.start("--result", small_disk / "r", "--", "true"), 125, f"{small_disk}/r: No space left")
    assert os.listdir(small_disk) == ["fill"]


def test_what_can_be_known_before_it_is_submitted(run: Imgrun, tmp_path: Path) -> None:
    spec = tmp_path / "job.toml"
    spec.write_text('image = "gone.img"\ncommand = ["true"]\n')
    done = run("submit", "--to", "slurm", "--spec", spec, "--dry-run")
    assert done.status == 0
    assert done.stderr == f"imgrun: warning: {tmp_path}/gone.img is not on this machine: it has to be where the job runs\n"
    spec.write_text(f'image = "{run.image}"\ncommand = ["true"]\ntty = true\n')
    refused(run("submit", "--to", "htcondor", "--spec", spec, "--dry-run"), 125, "terminal")
