"""``exec``, ``signal``, ``stop``: acting on running jobs."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from imgrun.cli import command_words
from imgrun.errors import ImgrunError
from imgrun.job import Job
from imgrun.signals import parse_signal
from imgrun.units import parse_duration


@click.command("exec", context_settings={"allow_interspersed_args": False}, short_help="Run another command in a running job.")
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who it runs as (default: the job's user).")
@click.option("-w", "--workdir", metavar="DIR", help="Where it runs (default: as the job).")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; without a value, pass yours on.")
@click.argument("job")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    interactive: bool, tty: bool, user: str | None, workdir: str | None, env: tuple[str, ...], job: str,
    command: tuple[str, ...],
) -> NoReturn:  # fmt: skip
    """Run COMMAND beside the job's own processes, with its namespaces, limits and restrictions."""
    from imgrun.cli.start import parse_environment
    from imgrun.session import execute

    variables = parse_environment(env, ())
    status = execute(
        Job.find(job), command_words(command), user=user, workdir=workdir, env=variables, tty=tty, stdin=interactive
    )
    raise click.exceptions.Exit(status)


@click.command("signal", short_help="Send a signal to a job.")
@click.argument("job")
@click.argument("name", metavar="SIGNAL")
def signal_command(job: str, name: str) -> None:
    """Send SIGNAL (a name as TERM, or a number) to the job's command. KILL ends the whole job."""
    Job.find(job).signal(parse_signal(name))


@click.command("stop", short_help="Ask jobs to end, then kill them.")
@click.option("-t", "--timeout", metavar="DURATION", help="How long to wait before killing (default: the job's own).")
@click.option("-s", "--signal", "signal_name", metavar="SIGNAL", help="What to send first (default: the job's own).")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def stop(timeout: str | None, signal_name: str | None, jobs: tuple[str, ...]) -> None:
    """Send each job its stop signal, and kill it if it has not ended after the time-out. Prints the ids."""
    seconds = None if timeout is None else parse_duration(timeout, "--timeout")
    signum = None if signal_name is None else parse_signal(signal_name)
    failed: ImgrunError | None = None
    found = []
    for wanted in jobs:
        try:
            job = Job.find(wanted)
            job.request_stop(seconds, signum)
            found.append(job)
        except ImgrunError as e:
            failed = e
    for job in found:
        job.await_end()
        print(job.id)
    sys.stdout.flush()
    if failed is not None:
        raise failed
