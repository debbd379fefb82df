"""``checkpoint`` and ``restore``."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from imgrun.cli import warn
from imgrun.job import Job


@click.command("checkpoint", short_help="Freeze a job to a directory.")
@click.option("--to", "target", required=True, metavar="DIR", help="Where to; an older checkpoint there is replaced.")
@click.option("--leave-running", is_flag=True, help="Let the job go on after it.")
@click.argument("job")
def checkpoint(target: str, leave_running: bool, job: str) -> None:
    """Freeze JOB, with its memory, processes and files of the same instant, to DIR."""
    Job.find(job).checkpoint(target, stop=not leave_running)


@click.command("restore", short_help="Continue a job from a checkpoint.")
@click.option("-d", "--detach", is_flag=True, help="Run in the background and print the job's id.")
@click.option("--rm/--no-rm", "remove", default=None, help="Forget the job at its end (default in the foreground).")
@click.option("--image", metavar="PATH", help="Where its image is now.")
@click.option("-v", "--bind", "binds", multiple=True, metavar="NEW:DST", help="Another source for its mount at DST.")
@click.option("-m", "--memory", metavar="SIZE", help="Another memory limit.")
@click.option("--allow", multiple=True, metavar="WHAT", help="Do it although 'imgrun check' refuses WHAT.")
@click.option("--result", metavar="FILE", help="Write the result there, as JSON.")
@click.option("--timings", is_flag=True, help="Print what the start spent its time on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.argument("directory", metavar="CHECKPOINT")
def restore(
    directory: str,
    detach: bool,
    remove: bool | None,
    image: str | None,
    binds: tuple[str, ...],
    memory: str | None,
    allow: tuple[str, ...],
    **flags: Any,
) -> NoReturn:
    """Continue the job that was frozen to CHECKPOINT where it stood. The checkpoint stays as it is.

    It is looked at first, as 'imgrun check' does, and refused when something is not as it has to be.
    """
    from imgrun import preflight
    from imgrun.cli.start import check_result_file, run_foreground
    from imgrun.manifest import load

    found = preflight.changed(load(directory), image=image, memory=memory, binds=binds, allow=allow)
    for warning in preflight.require(found, allow):
        warn(warning)
    keep = detach if remove is None else not remove
    if detach:
        from imgrun.launcher import start_detached

        print(start_detached(found.spec, keep=keep, checkpoint=found).id)
        raise click.exceptions.Exit(0)
    raise click.exceptions.Exit(
        run_foreground(found.spec, keep, check_result_file(flags["result"]), flags, checkpoint=found)
    )
