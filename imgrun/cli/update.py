"""``update``: other limits for a running job."""

from __future__ import annotations

from typing import Any

import click

from imgrun.cli import warn
from imgrun.errors import SpecError
from imgrun.job import Job


@click.command("update", short_help="Change the limits of a running job.")
@click.option("-m", "--memory", metavar="SIZE", help="Memory, page cache included.")
@click.option("--swap", metavar="SIZE", help="Swap beyond the memory; 0 for none.")
@click.option("--cpus", type=float, metavar="N", help="Processor time per time: 1.5 is one and a half processors.")
@click.option("--cpu-weight", type=int, metavar="N", help="Share when others compete: 1 to 10000, 100 is usual.")
@click.option("--cpuset", metavar="LIST", help="The processors to run on: 0-3,8.")
@click.option("--pids", type=int, metavar="N", help="Processes and threads.")
@click.option("--io-weight", type=int, metavar="N", help="Share of the disk: 1 to 10000.")
@click.option("--time-limit", metavar="DURATION", help="Wall time since the job's first start.")
@click.argument("job")
def update(job: str, **limits: Any) -> None:
    """Change limits of a running job. One that is held for memory (start --oom hold) goes on when it gets more."""
    changes = {name: value for name, value in limits.items() if value is not None}
    if not changes:
        raise SpecError("no limit given", "imgrun update --memory SIZE JOB")
    found = Job.find(job)
    for note in found.update(**changes):
        warn(note)
    print(found.id)
