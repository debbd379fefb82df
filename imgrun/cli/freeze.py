"""``checkpoint`` and ``restore``."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, NoReturn

import click

from imgrun.cli import MISSING, warn
from imgrun.cli.results import own_descriptor
from imgrun.errors import SpecError
from imgrun.job import Job


def parse_rounds(text: str | None) -> int | Literal["auto"]:
    """Of ``--pre-dump``. Raises SpecError."""
    if text is None:
        return 0
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 100:
        raise SpecError(f"--pre-dump {text!r} is no number of rounds", "give 1 to 100, or 'auto'")
    return int(text)


def print_timings(steps: list[list[Any]] | list[tuple[str, float]]) -> None:
    for step, milliseconds in steps:
        print(f"{milliseconds:10.3f} ms  {step}", file=sys.stderr)


def make_checkpoint_directory(path: str) -> None:
    """Make it: a scheduler may list it as output. Raises what would keep a checkpoint from being made there later."""
    from imgrun.checkpoints.refusals import refuse_unsuitable

    hint = "give a directory in one of yours: --checkpoint-dir DIR"
    refuse_unsuitable(path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as e:
        raise SpecError(f"the checkpoint directory {path} cannot be made: {e.strerror}", hint) from e
    if not os.access(os.path.dirname(path), os.W_OK):  # it is made beside its name
        raise SpecError(f"no checkpoint can be made in {os.path.dirname(path)}: no permission", hint)


@click.command("checkpoint", short_help="Freeze a job to a directory or an archive.")
@click.option("--to", "target", metavar="DIR", help="Where to; an older checkpoint there is replaced.")
@click.option("--archive", metavar="FILE", help="To one file instead; '-' is standard output.")
@click.option("--compress", is_flag=True, help="Compress it by zstd, as is done anyway when FILE ends in .zst.")
@click.option("--leave-running", is_flag=True, help="Let the job go on after it.")
@click.option("--pre-dump", metavar="auto|N", help="Save memory in rounds before, so that it stands still for less time.")
@click.option("--capture-image", is_flag=True, help="Save the --writable image too.")
@click.option("--timings", is_flag=True, help="Print what the checkpoint spent its time on.")
@click.argument("job")
def checkpoint(
    target: str | None,
    archive: str | None,
    compress: bool,
    leave_running: bool,
    pre_dump: str | None,
    capture_image: bool,
    timings: bool,
    job: str,
) -> None:
    """Freeze JOB, with its memory, processes and files of the same instant, to a directory or an archive.

    An archive (tar) is complete before the job ends: if it cannot be written, the job runs on.
    """
    if (target is None) == (archive is None):
        raise SpecError("a checkpoint goes to a directory or to an archive", "give --to DIR or --archive FILE")
    if "" in (target, archive):
        raise SpecError("the path for the checkpoint is empty", "give --to DIR or --archive FILE")
    if compress and archive is None:
        raise SpecError("--compress is for archives", "give --archive FILE, or leave it out")
    descriptor = None if archive is None else 1 if archive == "-" else own_descriptor(archive)
    if descriptor == 1 and (sys.stdout.isatty() or 1 in MISSING):
        where = "closed" if 1 in MISSING else "a terminal"
        raise SpecError(f"standard output is {where}, and no place for an archive", "give --archive FILE, or a pipe")
    done = Job.find(job).checkpoint(
        target, stop=not leave_running, archive=archive if descriptor is None else descriptor, compress=compress,
        capture_image=capture_image, pre_dump=parse_rounds(pre_dump),
    )  # fmt: skip
    for text in done["warnings"]:
        warn(text)
    if timings:
        print_timings(done["timings"])
        frozen = done["statistics"]["frozen_seconds"]
        if frozen is not None:
            print(f"{frozen * 1000:10.3f} ms  of these it stood still", file=sys.stderr)


@click.command("restore", short_help="Continue a job from a checkpoint.")
@click.option("-d", "--detach", is_flag=True, help="Run in the background and print the job's id.")
@click.option("--rm/--no-rm", "remove", default=None, help="Forget the job at its end (default in the foreground).")
@click.option("--image", metavar="PATH", help="Where its image is now, or a captured one is to be put.")
@click.option("-v", "--bind", "binds", multiple=True, metavar="NEW:DST", help="Another source for its mount at DST.")
@click.option("-m", "--memory", metavar="SIZE", help="Another memory limit.")
@click.option("--lazy", is_flag=True, help="Let it run at once, and read its memory as it is needed.")
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
    lazy: bool,
    allow: tuple[str, ...],
    **flags: Any,
) -> NoReturn:
    """Continue the job that was frozen to CHECKPOINT, a directory or an archive, where it stood. That stays as it is.

    It is looked at first, as 'imgrun check' does, and refused when something is not as it has to be.
    """
    from contextlib import ExitStack

    from imgrun.checkpoints import preflight
    from imgrun.checkpoints.unpacking import opened
    from imgrun.cli.start import place_of_result, refuse_foreground_options, run_foreground

    if directory in ("", "-"):
        what = "the path of the checkpoint is empty" if not directory else "no checkpoint is read from standard input"
        raise SpecError(what, "give its directory or its archive; save a stream to a file first")
    if detach:
        refuse_foreground_options(flags)
    result_file = place_of_result(flags["result"])
    keep = detach if remove is None else not remove
    with ExitStack() as stack:
        loaded = stack.enter_context(opened(directory, allow))
        found = preflight.changed(loaded, image=image, memory=memory, binds=binds, allow=allow, lazy=lazy)
        for warning in preflight.require(found, allow):
            warn(warning)
        if detach:
            from imgrun.launcher import start_detached

            print(start_detached(found.spec, keep=keep, checkpoint=found).id)
            raise click.exceptions.Exit(0)
        # What was unpacked is of no more use once the job runs.
        status = run_foreground(found.spec, keep, result_file, flags, checkpoint=found, on_started=stack.close)
    raise click.exceptions.Exit(status)
