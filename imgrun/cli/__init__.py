"""The command line: parsing and printing, nothing else. Each group of verbs is a module, imported when it is used."""

from __future__ import annotations

import gc
import os
import sys

# A short life makes little garbage. Collecting it costs time while modules are imported, and would touch, and so copy, the
# pages that the job's first process shares with us.
gc.disable()

try:
    from collections.abc import Callable
    from importlib import import_module
    from typing import Any, NoReturn

    import click

    from imgrun.errors import ImgrunError
except KeyboardInterrupt:
    raise SystemExit(130) from None  # before main() most of the time is spent here

INTERRUPTED = 130

COMMANDS = {
    "start": ("start", "Run a command inside an image."),
    "ps": ("jobs", "List jobs."),
    "inspect": ("jobs", "Show everything that is recorded of a job."),
    "logs": ("jobs", "Print the output of a background job."),
    "wait": ("jobs", "Wait for jobs to end; print and return their exit status."),
    "rm": ("jobs", "Remove the records of finished jobs."),
    "gc": ("jobs", "Remove what killed supervisors left behind."),
    "exec": ("control", "Run another command in a running job."),
    "signal": ("control", "Send a signal to a job."),
    "stop": ("control", "Ask jobs to end, then kill them."),
    "stats": ("stats", "Show what running jobs use, as it goes on."),
    "update": ("update", "Change the limits of a running job."),
    "submit": ("submit", "Submit a spec file to HTCondor or Slurm."),
    "checkpoint": ("freeze", "Freeze a job to a directory or an archive."),
    "restore": ("freeze", "Continue a job from a checkpoint."),
    "check": ("check", "Say whether a checkpoint can be continued, or a job frozen."),
    "image": ("image", "Look at images, and build them."),
    "doctor": ("doctor", "Say what imgrun needs of this host, and what is missing."),
}


class LazyGroup(click.Group):
    """Finds commands by the table above and imports only the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"imgrun.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command", None) or getattr(module, cmd_name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            from difflib import get_close_matches

            near = " or ".join(map(repr, get_close_matches(args[0], COMMANDS)))
            ctx.fail(f"there is no command {args[0]!r}{near and f'; did you mean {near}?'}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])


def show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from imgrun import __version__

        click.echo(f"imgrun {__version__}")
        ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Say more when something fails (also: IMGRUN_DEBUG=1).")
@click.option("--version", is_flag=True, callback=show_version, is_eager=True, expose_value=False, help="Print the version.")
def cli(debug: bool) -> None:
    """Run a batch job inside a disk image as if it were a virtual machine, without the virtual machine."""
    if debug:
        os.environ["IMGRUN_DEBUG"] = "1"


def command_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command as given after an image or a job, where ``--`` may stand before it."""
    return words[1:] if words[:1] == ("--",) else words


def report(error: ImgrunError) -> None:
    """The one way errors reach people: a line that says what is wrong, and one that says what to do."""
    say(f"imgrun: {printable(error.message)}")
    if error.hint:
        say(f"  {printable(error.hint)}")


def warn(text: str) -> None:
    """What people should know of a job that runs all the same."""
    say(f"imgrun: warning: {printable(text)}")


def say(text: str) -> None:
    """Print to standard error. That nobody can read it is no reason to stop."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def printable(text: str) -> str:
    """Text that may hold an image's words, on one line and without what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    guarded(lambda: cli.main(argv, prog_name="imgrun", standalone_mode=False), argv)


def guarded(work: Callable[[], Any], argv: list[str] | None = None) -> NoReturn:
    """Exit with the status that a program's ``work`` returns, or with that of its error, which is reported."""
    try:
        status = _run(work, argv)
    except KeyboardInterrupt:  # while something else was reported
        status = INTERRUPTED
    _leave(status)


def _run(work: Callable[[], Any], argv: list[str] | None) -> int:
    status: Any = 0
    try:
        _open_missing_stdio()
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        status = work()
        sys.stdout.flush()
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as e:  # click has it from 8.2 on
        say(e.format_message())
        status = 125
    except click.ClickException as e:
        # imgrun's own failures are 125, so that they are told from the command's exit codes.
        report(ImgrunError(" ".join(e.format_message().split()), f"see '{_where(e, argv)} --help'"))
        status = 125
    except click.exceptions.Exit as e:
        status = e.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except ImgrunError as e:
        _details()
        report(e)
        status = INTERRUPTED if e.exit_code == 125 and _is_from_interrupt(e) else e.exit_code
    except (BrokenPipeError, SystemExit):  # click makes the latter of the former
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        status = 141
    except Exception as e:  # noqa: BLE001 - a traceback is for those who ask for one
        _details()
        if _is_from_interrupt(e):
            return INTERRUPTED
        what = e if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        report(_surroundings(e) or ImgrunError(f"unexpected failure: {what}", "run again with --debug for the details"))
        status = 125
    return status if isinstance(status, int) else 0


def _is_from_interrupt(error: BaseException | None) -> bool:
    """Whether it came about because of an interrupt: when what was under way is undone, or Python puts it into another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _details() -> None:
    """Where the error that is being handled came from, for those who asked to be told."""
    if os.environ.get("IMGRUN_DEBUG"):
        import traceback

        traceback.print_exc()


def _where(error: click.ClickException, argv: list[str] | None) -> str:
    """The command that was used wrongly. Not every error of click's knows."""
    if isinstance(error, click.UsageError) and error.ctx:
        return error.ctx.command_path
    first = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")), "")
    return f"imgrun {first}" if first in COMMANDS else "imgrun"


def _surroundings(error: Exception) -> ImgrunError | None:
    """What is wrong with what we were given, if it is that."""
    import errno

    try:
        os.getcwd()
    except OSError as e:
        return ImgrunError(f"the working directory is not to be had: {e.strerror}", "cd to another one")
    # Where files are written, a full disk is an error of its own.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
        return ImgrunError(f"standard output cannot be written: {error.strerror}", "free some space, or send it elsewhere")
    return None


def _leave(status: int) -> NoReturn:
    """Exit without the interpreter's own clean-up, which would cost milliseconds and has nothing left to do."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)


MISSING: set[int] = set()
"""Which of the standard descriptors were closed when we began."""


def _open_missing_stdio() -> None:
    """See that descriptors 0 to 2 are open, so that nothing else of ours takes their place."""
    while True:
        fd = os.open("/dev/null", os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return
        MISSING.add(fd)
        os.set_inheritable(fd, True)
        if fd > 0:
            # Python has None for what was closed when it began.
            setattr(sys, ("stdout", "stderr")[fd - 1], open(fd, "w", closefd=False))  # noqa: SIM115
