"""``stats``: what running jobs use, line after line."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import click

from imgrun.errors import JobStateError
from imgrun.job import Job
from imgrun.units import format_size, parse_duration

HEADER = ("ID", "NAME", "CPU %", "MEM", "LIMIT", "MEM %", "READ", "WRITTEN", "PIDS", "CPU TIME", "IPC")
NOTHING = "-"
CLEAR = "\x1b[H\x1b[J"
"""To the top left, and nothing below (ECMA-48)."""


@click.command("stats", short_help="Show what running jobs use, as it goes on.")
@click.option("--no-stream", is_flag=True, help="Once, and not again and again.")
@click.option("-i", "--interval", default="2s", metavar="DURATION", help="Time between two tables (default: 2s).")
@click.option("--json", "as_json", is_flag=True, help="A JSON list a line, with everything that is measured.")
@click.argument("jobs", nargs=-1, metavar="[JOB...]")
def stats(no_stream: bool, interval: str, as_json: bool, jobs: tuple[str, ...]) -> None:
    """Show what jobs (all that run, if none is named) use: levels of now; of what adds up, the rate since the last table.

    In the first table rates are averages since the job's start. It ends when no named job runs any more.
    """
    seconds = max(parse_duration(interval, "--interval"), 0.1)
    named = [Job.find(job) for job in jobs]
    for job in named:
        if not job.running:
            raise JobStateError(f"job {job.id} is not running", "'imgrun inspect' shows what it has used")
    before: dict[str, dict[str, Any]] = {}
    in_place = not as_json and not no_stream and os.isatty(1)
    due = time.monotonic()
    while True:
        records = [record for job in named or Job.all() if (record := measure(job, before.get(job.id))) is not None]
        if named and not records and before:
            return
        if as_json:
            print(json.dumps(records), flush=True)
        else:
            print(f"{CLEAR if in_place else ''}{table(records)}", flush=True)
        if no_stream:
            return
        before = {record["id"]: record for record in records}
        due = max(due + seconds, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else seconds)


def measure(job: Job, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a job uses now, with its rates; None when it does not run."""
    try:
        usage, spec = job.stats(), job.spec
    except JobStateError:
        return None
    record = {"id": job.id, "name": job.name, "state": job.state, "memory_limit": spec.memory, "usage": usage}
    earlier = before["usage"] if before is not None else {}
    elapsed = usage["wall_seconds"] - earlier.get("wall_seconds", 0.0)

    def rate(*names: str) -> float | None:
        total = 0.0
        for name in names:
            if usage[name] is None:
                return None
            total += usage[name] - (earlier.get(name) or 0)
        return total / elapsed if elapsed > 0 else None

    record["rates"] = {
        "cpus": rate("user_seconds", "system_seconds"),
        "read_bytes_per_second": rate("read_bytes"),
        "written_bytes_per_second": rate("written_bytes"),
        "ipc": ipc(usage.get("counts") or {}, earlier.get("counts") or {}),
    }
    return record


def ipc(counts: dict[str, int | None], earlier: dict[str, int | None]) -> float | None:
    """Instructions per cycle since the last line."""
    instructions, cycles = counts.get("instructions"), counts.get("cycles")
    if instructions is None or cycles is None:
        return None
    cycles -= earlier.get("cycles") or 0
    return (instructions - (earlier.get("instructions") or 0)) / cycles if cycles > 0 else None


def table(records: list[dict[str, Any]]) -> str:
    """The records for people."""
    rows = [HEADER, *(_row(record) for record in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*names, *figures]).rstrip())
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    usage, rates = record["usage"], record["rates"]
    memory, limit = usage["memory_current"], record["memory_limit"]
    cpu = None if usage["user_seconds"] is None else usage["user_seconds"] + usage["system_seconds"]
    return (
        record["id"],
        record["name"] or NOTHING,
        NOTHING if rates["cpus"] is None else f"{rates['cpus'] * 100:.1f}",
        _size(memory),
        _size(limit),
        NOTHING if memory is None or limit is None else f"{memory / limit * 100:.0f}",
        _size(rates["read_bytes_per_second"], "/s"),
        _size(rates["written_bytes_per_second"], "/s"),
        NOTHING if usage["pids_current"] is None else str(usage["pids_current"]),
        NOTHING if cpu is None else _time(cpu),
        NOTHING if rates["ipc"] is None else f"{rates['ipc']:.2f}",
    )


def _size(size: float | None, unit: str = "") -> str:
    return NOTHING if size is None else f"{format_size(max(int(size), 0))}{unit}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"
