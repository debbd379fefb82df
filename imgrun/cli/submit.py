"""``imgrun submit``: a spec file as a job of a batch scheduler."""

from __future__ import annotations

import os
from importlib import import_module
from typing import NoReturn

import click

from imgrun.cli import warn
from imgrun.errors import SpecError
from imgrun.spec import JobSpec


@click.command("submit", short_help="Submit a spec file to HTCondor or Slurm.")
@click.option("--to", "scheduler", type=click.Choice(("htcondor", "slurm")), required=True, help="The scheduler.")
@click.option("--spec", "spec_file", metavar="FILE", required=True, help="The job, as 'imgrun start --spec' reads it.")
@click.option(
    "-o", "--option", "options", multiple=True, metavar="LINE",
    help="A line for the scheduler itself, as --partition=long or requirements=HasImgrun. May be repeated.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and do nothing.")
def submit(scheduler: str, spec_file: str, options: tuple[str, ...], dry_run: bool) -> NoReturn:
    """Write the submit file or batch script for the job in FILE, and submit it.

    What is written makes imgrun freeze the job when it is preempted, and continue it when it is started again.
    """
    from imgrun.specfile import load

    given = load(spec_file)
    if "image" not in given:
        raise SpecError(f"{spec_file} names no image", 'write image = "..."')
    if "checkpoint_every" in given:
        given.setdefault("checkpoint_dir", os.path.abspath("checkpoint"))  # the scheduler's own place, known when it runs
    for line in options:
        if not line.isprintable():
            raise SpecError(f"the option {line!r} is more than a line", "give each line by a --option of its own")
    module = import_module(f"imgrun.schedulers.{scheduler}_submit")
    spec = JobSpec(**given)
    if spec.tty:
        raise SpecError("a job of a scheduler's has no terminal", f"take tty out of {spec_file}")
    if not os.path.exists(spec.image):
        warn(f"{spec.image} is not on this machine: it has to be where the job runs")
    text = module.submit_file(spec, os.path.abspath(spec_file))
    if options:
        from imgrun.schedulers.submission import with_options

        mark, last = ("#SBATCH ", "exec ") if scheduler == "slurm" else ("", "queue")
        text = with_options(text, [mark + line for line in options], last)
    print(text.rstrip("\n") if dry_run else module.submit(text))
    raise click.exceptions.Exit(0)
