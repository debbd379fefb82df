"""What a job is said to have used: counts of the kernel's software events, the time series, and the live table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command import eventually, refused
from counted import Measured, measured, needs_criu, programs

__all__ = ["measured", "programs"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20
SHIM = 200
"""More events than the shim and the start of a program ever make of one kind."""
JITTER = 16
"""Page faults by which two runs of a program may differ, since its memory is laid out at random."""
FOREVER = "while :; do sleep 0.05; done"


def counted(measured: Measured, *words: str) -> dict[str, Any]:
    """What is counted of a run of ``counted``, with what that says itself as ``said``."""
    done = measured.run.start(*measured.flags, "--result", measured.directory / "r.json", "--", "/x/counted", *words)
    assert done.status == 0, done
    measured.record = json.loads((measured.directory / "r.json").read_text())
    if measured.counts["page_faults"] is None:
        pytest.skip("nothing is counted on this host")
    return measured.counts | {"said": int(done.stdout or 0)}


# -- software events ----------------------------------------------------------------------------------------------------


def test_page_faults_are_exact(measured: Measured) -> None:
    few, many = (counted(measured, "touch", pages)["page_faults"] for pages in ("1000", "11000"))
    assert abs(many - few - 10000) <= JITTER
    assert 1000 < few < 1000 + SHIM
    assert measured.usage["counted"] == "cgroup"


@pytest.mark.parametrize("shape", [("1", "1"), ("1", "8"), ("8", "1"), ("4", "4")], ids="x".join)
def test_context_switches_of_threads_and_children_are_exact(measured: Measured, shape: tuple[str, str]) -> None:
    found = counted(measured, "sleep", *shape, "100")
    assert found["said"] >= int(shape[0]) * int(shape[1]) * 100, "each nap is a switch"
    assert found["said"] <= found["context_switches"] <= found["said"] + SHIM


def test_task_clock_is_the_processor_time(measured: Measured) -> None:
    measured.sh("i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done")
    spent = measured.usage["user_seconds"] + measured.usage["system_seconds"]
    assert measured.counts["task_clock"] / 1e9 == pytest.approx(spent, rel=0.25)


def test_what_exec_runs_is_counted(measured: Measured) -> None:
    job = measured.background("until test -e /tmp/go; do sleep 0.05; done")
    assert measured.run("exec", job, "/x/counted", "touch", "20000").status == 0
    assert measured.run("exec", job, "touch", "/tmp/go").status == 0
    assert measured.run("wait", job).status == 0
    counts = measured.inspect(job)["result"]["usage"]["counts"]
    assert counts["page_faults"] is None or counts["page_faults"] > 20000


def test_nothing_is_counted_when_nothing_is_to_be(measured: Measured) -> None:
    measured.sh("true", "--pmu", "off")
    assert (measured.usage["counts"], measured.usage["rates"], measured.usage["counted"]) == (None, None, None)


def test_requiring_counters_that_are_not_there(measured: Measured) -> None:
    measured.sh("true")
    if measured.counts["cycles"] is not None:
        pytest.skip("this host has them")
    refused(measured.run.sh("echo ran", "--pmu", "require"), 125, "--pmu require: this host does not count cycles")
    assert set(measured.usage["rates"].values()) == {None}


@needs_criu
def test_counts_go_on_over_a_checkpoint(measured: Measured, tmp_path: Path) -> None:
    """The second life is short, so what it has in the end is mostly of the first."""
    script = "/x/counted touch 30000; echo ready; until test -e /go/on; do sleep 0.05; done; /x/counted touch 10000"
    (tmp_path / "go").mkdir()
    job = measured.background(script, "--bind", f"{tmp_path}/go:/go:ro", "--sample", "0.1s")
    measured.prints(job, "ready")
    before = json.loads(measured.run("stats", "--no-stream", "--json", job).stdout)[0]["usage"]
    assert measured.run("checkpoint", "--to", tmp_path / "c", job) == (0, "", "")
    saved = json.loads((tmp_path / "c/manifest.json").read_text())["usage"]
    assert saved["user_seconds"] >= before["user_seconds"]
    (tmp_path / "go/on").touch()
    record = tmp_path / "r.json"
    done = measured.run("restore", "--result", record, tmp_path / "c")
    assert done.status == 0, done
    usage = json.loads(record.read_text())["usage"]
    assert usage["wall_seconds"] > saved["wall_seconds"]
    assert usage["user_seconds"] + usage["system_seconds"] > saved["user_seconds"] + saved["system_seconds"]
    points = usage["samples"]["points"]
    assert points[: len(saved["samples"]["points"])] == saved["samples"]["points"], "the series goes on"
    assert len(points) > len(saved["samples"]["points"])
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    if saved["counts"]["page_faults"] is None:
        pytest.skip("nothing is counted on this host")
    assert saved["counts"]["page_faults"] >= 30000
    assert usage["counts"]["page_faults"] >= saved["counts"]["page_faults"] + 10000
    assert usage["counted"] == "cgroup"


# -- records ------------------------------------------------------------------------------------------------------------


def test_memory_is_told_by_kind(measured: Measured) -> None:
    """What is left when the job has ended is its files; while it runs, its own memory."""
    job = measured.background("/x/counted hold 50 /never", "--tmpfs", "/m:100M", "--bind", "/dev/null:/go")
    measured.prints(job, "holds")
    (record,) = json.loads(measured.run("stats", "--no-stream", "--json", job).stdout)
    usage = record["usage"]
    if usage["memory_anon"] is None:
        pytest.skip("this host has no memory cgroup for it")
    assert 50 * MIB <= usage["memory_anon"] < 60 * MIB
    assert usage["memory_current"] >= usage["memory_anon"]
    assert usage["memory_peak"] >= usage["memory_current"] - 10 * MIB


def test_a_classad_that_htcondor_reads(measured: Measured, tmp_path: Path) -> None:
    classad2 = pytest.importorskip("classad2", reason="the Python package htcondor is not installed")
    path = tmp_path / "ad"
    measured.sh("exit 3", "--classad", path)
    ad = classad2.parseOne(path.read_text())
    assert (ad["ExitCode"], ad["ExitBySignal"], ad["ImgrunReason"]) == (3, False, "exited")
    assert ad["RemoteWallClockTime"] == measured.usage["wall_seconds"]
    undefined = classad2.Value.Undefined
    for name, count in (("RemoteInstructions", "instructions"), ("RemoteContextSwitches", "context_switches")):
        assert ad.eval(name) == (undefined if measured.counts[count] is None else measured.counts[count])
    ipc = measured.usage["rates"]["ipc"]
    assert ad.eval("RemoteIPC") == (undefined if ipc is None else pytest.approx(ipc))
    assert ad.eval("HoldReason") == undefined
    measured.sh("/x/counted hold 99", "--memory", "32M", "--swap", "0", "--classad", path)
    ad = classad2.parseOne(path.read_text())
    assert ad["HoldReason"] == measured.record["hold_reason"]
    assert (ad["ExitBySignal"], ad["ExitSignal"]) == (True, 9)


# -- the time series ----------------------------------------------------------------------------------------------------


def test_samples(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "go").mkdir()
    flags = ("--sample", "100ms", "--bind", f"{tmp_path}/go:/go:ro")
    job = measured.background("/x/counted hold 30 /go/on", *flags)

    def points() -> Any:
        (record,) = json.loads(measured.run("stats", "--no-stream", "--json", job).stdout)
        assert record["usage"]["samples"] is None, "a table of now has no past"
        return record["usage"]["wall_seconds"] > 1

    eventually(points)
    (tmp_path / "go/on").touch()
    assert measured.run("wait", job).status == 0
    samples = measured.inspect(job)["result"]["usage"]["samples"]
    rows = [dict(zip(samples["columns"], point, strict=True)) for point in samples["points"]]
    assert samples["interval"] == 0.1
    assert 2 <= len(rows) <= 200
    assert [row["wall_seconds"] for row in rows] == sorted(row["wall_seconds"] for row in rows)
    assert max(row["memory"] for row in rows) >= 30 * MIB
    assert max(row["pids"] for row in rows) == 3
    assert rows[-1]["cpu_seconds"] >= rows[0]["cpu_seconds"]


def test_samples_too_often_are_refused(measured: Measured) -> None:
    refused(measured.run.sh("true", "--sample", "1ms"), 125, "sample")


# -- the live table -----------------------------------------------------------------------------------------------------


def test_stats(measured: Measured) -> None:
    job = measured.background(FOREVER, "--name", "busy", "--memory", "64M")
    other = measured.background(FOREVER)
    header, *rows = measured.run("stats", "--no-stream").stdout.splitlines()
    assert header.split()[:2] == ["ID", "NAME"]
    assert sorted(row.split()[0] for row in rows) == sorted((job, other))
    header, row = measured.run("stats", "--no-stream", "busy").stdout.splitlines()
    assert row.split()[:2] == [job, "busy"]
    assert "64 MiB" in row
    (record,) = json.loads(measured.run("stats", "--no-stream", "--json", "busy").stdout)
    assert (record["id"], record["name"], record["state"], record["memory_limit"]) == (job, "busy", "running", 64 * MIB)
    assert record["usage"]["pids_current"] >= 3
    assert record["rates"]["cpus"] >= 0
    assert record["rates"]["ipc"] is None or record["rates"]["ipc"] > 0


def test_stats_go_on_until_the_job_ends(measured: Measured) -> None:
    """Rates are of the time between two tables, so they follow what the job does."""
    job = measured.background("until test -e /tmp/go; do :; done; until test -e /tmp/end; do sleep 0.1; done")
    table = measured.run.popen("stats", "--json", "--interval", "100ms", job)
    assert table.stdout is not None

    def next_rate() -> float:
        assert table.stdout is not None
        (record,) = json.loads(table.stdout.readline())
        return float(record["rates"]["cpus"])

    eventually(lambda: next_rate() > 0.05, "it is busy")
    assert measured.run("exec", job, "touch", "/tmp/go").status == 0
    eventually(lambda: next_rate() < 0.05, "it is idle")
    assert measured.run("exec", job, "touch", "/tmp/end").status == 0
    table.communicate(timeout=60)
    assert table.returncode == 0
    refused(measured.run("stats", job), 125, "not running")


def test_no_jobs_no_rows(measured: Measured) -> None:
    assert len(measured.run("stats", "--no-stream").stdout.splitlines()) == 1
    assert measured.run("stats", "--no-stream", "--json").stdout == "[]\n"
    refused(measured.run("stats", "nobody"), 125, "nobody")
