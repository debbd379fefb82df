"""What HTCondor says and calls, taken apart; what imgrun advertises and submits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imgrun.errors import SpecError
from imgrun.schedulers import job_ad, singularity
from imgrun.schedulers.htcondor import Site
from imgrun.schedulers.htcondor_submit import submit_file
from imgrun.spec import JobSpec

AD = r"""
ClusterId = 12
Memory = 1000
DiskUsage_RAW = 1.5
HasImgrun = true
Out = "_condor_stdout"
Words = "a \"b\" \\ c"
Requirements = (TARGET.Arch == "X86_64") && (TARGET.OpSys == "LINUX")
Sum = "a" + "b"
Nothing = undefined
no line of an ad
"""


def test_an_ad_says_what_it_says_literally() -> None:
    ad = job_ad.parse(AD)
    assert (ad.integer("clusterid"), ad.integer("MEMORY"), ad.integer("DiskUsage_RAW")) == (12, 1000, 1)
    assert (ad.text("Out"), ad.text("Words")) == ("_condor_stdout", 'a "b" \\ c')
    for name in ("Requirements", "Sum", "Nothing", "Absent", "ClusterId"):
        assert ad.text(name) is None
    for name in ("HasImgrun", "Out", "Nothing"):
        assert ad.integer(name) is None


def test_no_ad_is_an_empty_one(tmp_path: Path) -> None:
    assert job_ad.read(None).integer("Memory") is None
    assert job_ad.read(str(tmp_path / "none")).integer("Memory") is None


@pytest.mark.parametrize(
    ("written", "names"),
    [("", []), ("A=1 B=2", ["A", "B"]), ("A='x y' B='it''s C=3'", ["A", "B"]), ("A='B=1'", ["A"])],
)
def test_names_of_an_environment(written: str, names: list[str]) -> None:
    assert job_ad.environment_names(written) == names


def test_the_call_for_a_job() -> None:
    words = "-s exec -S /tmp -S /var/tmp -S /data -W /e/dir_1 --pwd /e/dir_1 -B /e/dir_1 -B /opt:/opt:ro --home /e/dir_1 -C"
    call = singularity.parse([*words.split(), "my.img", "/e/dir_1/run.sh", "-B", "x"])
    spec = singularity.spec_of(call, {"SINGULARITYENV_FOO": "a b", "APPTAINERENV_BAR": "c", "SECRET": "d"})
    assert spec.command == ("/e/dir_1/run.sh", "-B", "x")
    assert spec.workdir == "/e/dir_1"
    assert spec.env == {"FOO": "a b", "BAR": "c", "HOME": "/e/dir_1"}
    assert [(m.type, m.src, m.dst, m.ro) for m in spec.mounts] == [
        ("bind", "/e/dir_1", "/e/dir_1", False), ("bind", "/opt", "/opt", True), ("tmpfs", "", "/data", False),
    ]  # fmt: skip


@pytest.mark.parametrize("words", ["", "exec", "exec --overlay x my.img true", "-B", "exec my.img"])
def test_calls_that_make_no_sense_are_refused(words: str) -> None:
    with pytest.raises(SpecError):
        singularity.spec_of(singularity.parse(words.split()), {})


def test_the_version_tells_itself_from_singularity(capsys: pytest.CaptureFixture[str]) -> None:
    assert singularity.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("imgrun-singularity version ")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"memory": "600M"}, ""),
        ({"memory": "601M"}, "601 MiB may not be saved within the 10 s that an eviction leaves"),
        ({"memory": "601M", "checkpoint_every": "1h", "checkpoint_dir": "/c"}, ""),
        ({"memory": "601M", "seccomp": "default"}, "it cannot be frozen with --seccomp"),
    ],
)
def test_what_an_eviction_will_lose_is_told_at_the_start(
    asked: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".job.ad").write_text(
        'SuccessCheckpointExitCode = 85\nTransferCheckpoint = "ckpt"\nWhenToTransferOutput = "ON_EXIT_OR_EVICT"\n'
        "JobMaxVacateTime = 10\n"
    )
    monkeypatch.setenv("_CONDOR_JOB_AD", f"{tmp_path}/.job.ad")
    monkeypatch.delenv("_CONDOR_MACHINE_AD", raising=False)
    monkeypatch.setattr("imgrun.checkpoints.identity.criu_version", lambda: "4.1")
    warnings: list[str] = []
    spec = Site(str(tmp_path), warnings.append).spec(JobSpec(image="/x.img", command=("x",), **asked))
    assert [told in warning for warning in warnings] == ([True] if told else [])
    assert (spec.checkpoint_signal is None) == ("seccomp" in asked)


def test_a_submit_file_transfers_what_lies_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/disk.img").write_bytes(bytes(1 << 20))
    spec = JobSpec(image=f"{tmp_path}/images/disk.img", command=("./run me",), memory="1G", cpus=1.5)
    text = submit_file(spec, f"{tmp_path}/job.toml")
    for line in (
        "transfer_input_files = job.toml, images/disk.img", "request_memory = 1024", "request_cpus = 2",
        f"initialdir = {tmp_path}", "checkpoint_exit_code = 85", "transfer_checkpoint_files = ckpt", "queue",
        "output = run_me.$(Cluster).out", "job_max_vacate_time = 48",
    ):  # fmt: skip
        assert f"\n{line}\n" in text, line
    requirements = next(line for line in text.splitlines() if line.startswith("#requirements = "))
    classad2 = pytest.importorskip("classad2", reason="the Python package htcondor is not installed")
    assert classad2.ExprTree(requirements.partition(" = ")[2])
    elsewhere = submit_file(JobSpec(image="/elsewhere/disk.img", command=("x",)), f"{tmp_path}/job.toml")
    assert "\ntransfer_input_files = job.toml\n" in elsewhere


def test_a_path_that_cannot_be_written_into_a_submit_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        submit_file(JobSpec(image="/x.img", command=("x",)), f"{tmp_path}/my, job.toml")
