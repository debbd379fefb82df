"""Jobs of Slurm's: what is read from the environment and from scontrol, and the batch script that is written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imgrun.cli.submit import submit
from imgrun.errors import RestoreError, SpecError
from imgrun.schedulers import slurm_control, slurm_submit
from imgrun.schedulers.slurm import Site
from imgrun.schedulers.submission import with_options
from imgrun.spec import JobSpec

JOB = (
    "JobId=7 ArrayJobId=6 JobName=a b UserId=u(1) JobState=RUNNING Reason=None Socks/Node=* ReqB:S:C:T=0:0:*:* "
    "Comment=imgrun: x 1 Power="
)


def site(**environ: str) -> Site:
    return Site({"SLURM_JOB_ID": "12", **{f"SLURM_{key}": value for key, value in environ.items()}}, lambda _: None)


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**{"image": "/i.img", "command": ("true",), **changes})


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({}, "12"),
        ({"ARRAY_JOB_ID": "11", "ARRAY_TASK_ID": "3"}, "11_3"),
        ({"STEP_ID": "0", "STEP_NUM_TASKS": "1", "PROCID": "0"}, "12.0"),
        ({"STEP_ID": "2", "STEP_NUM_TASKS": "4", "PROCID": "3"}, "12.2.3"),
        ({"ARRAY_JOB_ID": "11", "ARRAY_TASK_ID": "0", "STEP_ID": "1", "STEP_NUM_TASKS": "2", "PROCID": "1"}, "11_0.1.1"),
        ({"STEP_ID": "4294967291", "PROCID": "0"}, "12.4294967291"),
    ],
)
def test_each_task_has_its_own_checkpoint(environ: dict[str, str], key: str) -> None:
    assert site(**environ).key == key


def test_the_last_task_of_an_array_is_not_the_array() -> None:
    """Its SLURM_JOB_ID is that of the whole array, which a command would act on."""
    assert site(JOB_ID="12", ARRAY_JOB_ID="12", ARRAY_TASK_ID="9").job == "12_9"


def test_checkpoints_are_below_the_submit_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "submitted"
    other.mkdir()
    assert site(SUBMIT_DIR=str(other)).checkpoint == f"{other}/imgrun-checkpoints/12"
    assert site(SUBMIT_DIR="/not/here").checkpoint == f"{os.getcwd()}/imgrun-checkpoints/12"


def test_where_it_cannot_be_frozen_its_checkpoint_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node without CRIU: it would begin anew, and do all again that it has done."""
    monkeypatch.setenv("IMGRUN_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("imgrun.checkpoints.refusals.criu_version", lambda: None)
    here = site(SUBMIT_DIR=str(tmp_path))
    started: list[JobSpec] = []

    def foreground(spec: JobSpec, *_: object, **__: object) -> int:
        started.append(spec)
        return 0

    def run() -> int:
        asked = spec(checkpoint_dir=here.checkpoint, checkpoint_signal=signal.SIGUSR2)
        return here.run(asked, foreground, {"remove": None})

    assert run() == 0
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "it is for the job now"
    assert [one.checkpoint_signal for one in started] == [None], "without a checkpoint it begins"
    os.makedirs(here.checkpoint)
    Path(here.checkpoint, "manifest.json").write_text("{}")
    with pytest.raises(RestoreError, match=here.checkpoint):
        run()
    assert len(started) == 1


@pytest.mark.parametrize("number", [None, "", "x", "1 2"])
def test_outside_of_slurm(number: str | None) -> None:
    with pytest.raises(SpecError, match="SLURM_JOB_ID"):
        Site({} if number is None else {"SLURM_JOB_ID": number}, lambda _: None)


def test_a_record_of_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_control, "scontrol", lambda *_: JOB + "\n")
    record = slurm_control.show("job", "7")
    assert record["JobName"] == "a b"
    assert record["Comment"] == "imgrun: x 1"
    assert (record["JobId"], record["JobState"], record["Power"]) == ("7", "RUNNING", "")
    monkeypatch.setattr(slurm_control, "scontrol", lambda *_, **__: None)
    assert slurm_control.show("job", "7") == {}
    assert slurm_control.config() == {}


def test_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Configuration data as of now\nKillWait      = 30 sec\nRequeueExit   = 85,90-92\nEmpty = (null)\n"
    monkeypatch.setattr(slurm_control, "scontrol", lambda *_, **__: text)
    config = slurm_control.config()
    assert slurm_control.seconds(config["KillWait"]) == 30
    assert slurm_control.seconds(config["Empty"]) is None
    assert slurm_control.numbers(config["RequeueExit"]) == {85, 90, 91, 92}
    assert slurm_control.numbers(config["Empty"]) == set()


def test_the_batch_script() -> None:
    text = slurm_submit.submit_file(
        spec(command=("/opt/my prog", "x"), memory="1500K", cpus=2.5, time_limit="90m"), "/home/me/job 1.toml"
    )
    assert text.startswith("#!/bin/sh\n")
    lines = text.splitlines()
    for line in ("--job-name=my_prog", "--mem=2M", "--cpus-per-task=3", "--time=95", "--ntasks=1", "--signal=B:USR1@60"):
        assert f"#SBATCH {line}" in lines
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith(" start --slurm --limits best-effort --spec '/home/me/job 1.toml'")
    assert all(line.startswith("#") for line in lines[:-1]), "sbatch reads its options up to the first command"


def test_options_for_the_scheduler() -> None:
    text = with_options(slurm_submit.submit_file(spec(), "/job.toml"), ["#SBATCH --partition=long"], "exec ")
    assert text.splitlines()[-2] == "#SBATCH --partition=long"
    assert text.splitlines()[-1].startswith("exec ")


def test_a_path_that_cannot_be_written() -> None:
    with pytest.raises(SpecError, match="cannot be written into a script"):
        slurm_submit.submit_file(spec(), "/a\nrm -rf b")


def test_several_signals() -> None:
    both = (int(signal.SIGTERM), int(signal.SIGUSR1))
    made = spec(checkpoint_dir="/c", checkpoint_signal=list(both))
    assert made.checkpoint_signal == both
    assert JobSpec.from_dict(made.to_dict()) == made
    assert spec(checkpoint_signal=10).checkpoint_signal == (10,)


@pytest.mark.parametrize("scheduler", ["slurm", "htcondor"])
def test_what_would_be_submitted(tmp_path: Path, scheduler: str) -> None:
    """A spec with periodic checkpoints needs no place for them: the scheduler's is taken."""
    file = tmp_path / "job.toml"
    file.write_text('image = "my.img"\ncommand = ["true"]\ncheckpoint_every = "10m"\n')
    words = ["--to", scheduler, "--spec", str(file), "--option", "a = b", "--dry-run"]
    done = CliRunner().invoke(submit, words)
    assert done.exit_code == 0, done
    assert str(file) in done.output
    assert ("#SBATCH a = b" if scheduler == "slurm" else "a = b") in done.output.splitlines()


def test_an_option_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('image = "my.img"\ncommand = ["true"]\n')
    done = CliRunner().invoke(submit, ["--to", "slurm", "--spec", str(file), "--option", "a\nrm -rf b", "--dry-run"])
    assert isinstance(done.exception, SpecError)
