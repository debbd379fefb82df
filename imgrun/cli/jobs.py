"""``ps``, ``inspect``, ``logs``, ``wait``, ``rm``, ``gc``: what is known of jobs, and their records."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import click

from imgrun.cli import printable
from imgrun.errors import ImgrunError, JobError, JobNotFound, SpecError
from imgrun.job import Job, collect
from imgrun.signals import signal_name
from imgrun.state import StateRoot
from imgrun.units import parse_duration


@click.command("ps", short_help="List jobs.")
@click.option("-a", "--all", "everything", is_flag=True, help="Finished jobs too.")
@click.option("-q", "--quiet", is_flag=True, help="Only the ids.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def ps(everything: bool, quiet: bool, as_json: bool) -> None:
    """List the jobs of this user on this host."""
    collect(StateRoot())
    # Without a spec it is not there yet, or no more.
    records = [record for job in Job.all() if (record := job.inspect())["spec"]]
    shown = [r for r in records if everything or r["state"] in ("starting", "running", "held")]
    if as_json:
        print(json.dumps(shown, indent=1))
    elif quiet:
        for record in shown:
            print(record["id"])
    else:
        rows: list[tuple[str, ...]] = [("ID", "NAME", "STATE", "SINCE", "IMAGE", "COMMAND")]
        rows += [_row(record) for record in shown]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip())


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    spec, result = record["spec"], record["result"]
    command = printable(" ".join(spec.get("command", ()))) or "(the image's init)"
    since = (result or {}).get("finished_at") or record["started_at"] or record.get("created_at") or ""
    return (
        record["id"], record["name"] or "-", _state(record["state"], result), since[:19].replace("T", " "),
        printable(os.path.basename(spec.get("image", ""))), command if len(command) < 60 else command[:57] + "...",
    )  # fmt: skip


def _state(state: str, result: dict[str, Any] | None) -> str:
    if not result:
        return state
    if result["reason"] == "exited":
        return f"exited {result['exit_code']}"
    if result["reason"] == "signaled":
        return signal_name(result["signal"])
    return str(result["reason"])


@click.command("inspect", short_help="Show everything that is recorded of a job.")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("--json", "as_json", is_flag=True, help="As JSON, which is what it prints anyway.")
def inspect(jobs: tuple[str, ...], as_json: bool) -> None:
    """Print the spec, state and result of jobs, as JSON: an object for one job, a list for several."""
    records = [Job.find(job).inspect() for job in jobs]
    print(json.dumps(records[0] if len(records) == 1 else records, indent=1))


@click.command("logs", short_help="Print the output of a background job.")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--stdout", "only", flag_value="stdout", help="Only its standard output.")
@click.option("--stderr", "only", flag_value="stderr", help="Only its standard error.")
def logs(job: str, follow: bool, only: str | None) -> None:
    """Print what a background job wrote: its output to our output, its errors to our errors."""
    found = Job.find(job)
    sinks = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    offsets = {name: 0 for name in sinks if only in (None, name)}
    while True:
        running = follow and found.running
        for name in offsets:
            offsets[name] += _print_from(f"{found.directory}/{name}", offsets[name], sinks[name])
        if not running:
            return
        time.sleep(0.1)


def _print_from(path: str, offset: int, sink: Any) -> int:
    printed = 0
    try:
        with open(path, "rb") as f:
            f.seek(offset)
            while piece := f.read(1 << 16):
                sink.write(piece)
                printed += len(piece)
    except FileNotFoundError:
        return 0
    sink.flush()
    return printed


@click.command("wait", short_help="Wait for jobs to end; print and return their exit status.")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("--timeout", metavar="DURATION", help="Give up after this long; exit status 124.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def wait(jobs: tuple[str, ...], timeout: str | None, as_json: bool) -> None:
    """Wait until the jobs have ended, and print the exit status of each. Ours is that of the last."""
    found = [Job.find(job) for job in jobs]
    deadline = None if timeout is None else time.monotonic() + parse_duration(timeout, "--timeout")
    status = 0
    results = []
    for job in found:
        try:
            result = job.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError as e:
            print(f"imgrun: {e}", file=sys.stderr)
            raise click.exceptions.Exit(124) from None
        status = result.exit_status
        results.append(result.to_dict())
        if not as_json:
            print(status, flush=True)
    if as_json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
    raise click.exceptions.Exit(status)


@click.command("rm", short_help="Remove the records of finished jobs.")
@click.argument("jobs", nargs=-1, metavar="JOB...")
@click.option("-f", "--force", is_flag=True, help="Kill running jobs first; jobs that do not exist are no error.")
@click.option("-a", "--all", "everything", is_flag=True, help="All finished jobs.")
def rm(jobs: tuple[str, ...], force: bool, everything: bool) -> None:
    """Remove what is kept of jobs: their record and their output."""
    if everything == bool(jobs):
        raise SpecError("name the jobs to remove, or give --all", "imgrun rm JOB...")
    chosen: list[Job] = []
    failed: ImgrunError | None = None
    for wanted in jobs:
        try:
            chosen.append(Job.find(wanted))
        except JobNotFound as e:
            if not force:
                failed = e
    if everything:
        chosen = [job for job in Job.all() if force or not job.running]
    for job in chosen:
        try:
            job.remove(force=force)
            print(job.id)
        except JobError as e:
            failed = e
    if failed is not None:
        raise failed


@click.command("gc", short_help="Remove what killed supervisors left behind.")
@click.option("--older-than", metavar="DURATION", help="Also remove records of jobs that finished this long ago.")
def gc(older_than: str | None) -> None:
    """Remove cgroup directories, scratch and state of jobs whose supervisor was killed. Running jobs are not touched.

    Cgroup directories are found without the state directory that the job had. Root's files for ranges of ids that no job
    holds go, too.
    """
    from imgrun.isolation.cgroups.orphans import remove_orphans
    from imgrun.isolation.userns import drop_unheld

    age = None if older_than is None else parse_duration(older_than, "--older-than")
    root = StateRoot()
    root.ids()  # says what is wrong with the state directory, if anything is
    # Without doubles: of a job whose processes were still ending, a cgroup may have stayed.
    collected = list(dict.fromkeys([*collect(root), *remove_orphans()]))
    drop_unheld()
    for job_id in collected:
        print(job_id)
    if age is None:
        return
    for job in Job.all():
        try:
            finished = os.stat(f"{job.directory}/result.json").st_mtime
        except OSError:
            continue
        if not job.running and time.time() - finished >= age:
            job.remove()
            if job.id not in collected:
                print(job.id)
