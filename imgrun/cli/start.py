"""``imgrun start``: from flags and files to a spec, then a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from imgrun.cli import command_words, printable, report, warn
from imgrun.errors import ImgrunError, SpecError
from imgrun.spec import CHOICES, JobSpec, Mount, parse_bind, parse_io_max, parse_mount, parse_tmpfs

if TYPE_CHECKING:
    from imgrun.checkpoints.manifest import Checkpoint
    from imgrun.result import Result
    from imgrun.schedulers.htcondor import Site as HTCondorSite
    from imgrun.schedulers.slurm import Site as SlurmSite

F = TypeVar("F", bound=Callable[..., Any])


TITLES: dict[str, str] = {}
"""Options by the title they have in the help."""


def group(title: str, *options: Callable[[F], F]) -> Callable[[F], F]:
    """Add several options to a command, under a title of the help."""

    def decorate(function: F) -> F:
        for add in reversed(options):
            function = add(function)
            newest: click.Parameter = function.__click_params__[-1]  # type: ignore[attr-defined]
            TITLES[newest.name or ""] = title
        return function

    return decorate


class TitledCommand(click.Command):
    """A command whose help lists the options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(TITLES.get(parameter.name or "", "other"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title.capitalize()):
                formatter.write_dl(records)


option = click.option
choice = click.Choice


@click.command(
    cls=TitledCommand,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    short_help="Run a command inside an image.",
)
@group(
    "identity",
    option("--name", help="A name for the job; also its hostname unless that is given."),
    option("--hostname", help="The job's hostname."),
    option("-u", "--user", metavar="USER[:GROUP]", help="Who the command runs as, in the image (default: root)."),
    option("-w", "--workdir", metavar="DIR", help="Where it runs, in the image (default: /)."),
    option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; without a value, pass yours on."),
    option("--env-file", multiple=True, metavar="FILE", help="Read NAME=VALUE lines from a file."),
)
@group(
    "root",
    option("--writable", is_flag=True, help="Write into the image itself; no other job may use it meanwhile."),
    option("--read-only", is_flag=True, help="Refuse all writes to the root."),
    option("--partition", metavar="N|LABEL|UUID", help="The partition that holds the root."),
    option("--scratch-size", metavar="SIZE", help="Bound what the job writes; it gets ENOSPC beyond."),
)
@group(
    "storage",
    option("-v", "--bind", multiple=True, metavar="SRC:DST[:ro]", help="Show a host file or directory in the job."),
    option("--tmpfs", multiple=True, metavar="DST[:SIZE]", help="An empty memory file system."),
    option("--mount", multiple=True, metavar="type=...", help="The long form: type=bind|tmpfs|image,src=..,dst=..,ro,idmap."),
)
@group(
    "limits",
    option("-m", "--memory", metavar="SIZE", help="Memory, page cache included."),
    option("--swap", metavar="SIZE", help="Swap beyond the memory; 0 for none."),
    option("--cpus", type=float, metavar="N", help="Processor time per time: 1.5 is one and a half processors."),
    option("--cpu-weight", type=int, metavar="N", help="Share when others compete: 1 to 10000, 100 is usual."),
    option("--cpuset", metavar="LIST", help="The processors to run on: 0-3,8."),
    option("--pids", type=int, metavar="N", help="Processes and threads."),
    option("--io-weight", type=int, metavar="N", help="Share of the disk: 1 to 10000."),
    option("--io-max", multiple=True, metavar="DEV:KEY=N", help="Disk bound: /dev/sda:rbps=10M,wiops=100."),
    option("--time-limit", metavar="DURATION", help="Wall time, then the job is stopped; exit status 124."),
    option("--limits", "limits_mode", type=choice(CHOICES["limits_mode"]), help="Refuse limits that cannot be kept, or warn."),
    option("--oom", type=choice(CHOICES["oom"]), help="At the memory limit: kill the job, or hold it until it is raised."),
    option("--rlimit", multiple=True, metavar="NAME=SOFT[:HARD]", help="A resource limit of each process, as nofile=1024."),
)
@group(
    "isolation",
    option("--userns", type=choice(CHOICES["userns"]), help="A user namespace of its own (auto), or the host's ids."),
    option("--init", type=choice(CHOICES["init"]), help="Who is PID 1: our shim, the command, or the image's init."),
    option("--network", type=choice(CHOICES["network"]), help="The host's network, loopback only, or a private one by pasta."),
    option("--seccomp", type=choice(CHOICES["seccomp"]), help="A filter of system calls; such a job cannot be frozen."),
)
@group(
    "lifecycle",
    option("-d", "--detach", is_flag=True, help="Run in the background and print the job's id."),
    option("-i", "--interactive", is_flag=True, help="Pass standard input on (the default in the foreground)."),
    option("-t", "--tty", is_flag=True, help="Give the job a terminal."),
    option("--rm/--no-rm", "remove", default=None, help="Forget the job at its end (default in the foreground)."),
    option("--stop-signal", metavar="SIGNAL", help="What stop and the time limit send first (default: TERM)."),
    option("--stop-timeout", metavar="DURATION", help="How long after that they kill (default: 10s)."),
)
@group(
    "checkpoint",
    option("--checkpoint-dir", metavar="DIR", help="Continue from there when it holds a checkpoint; freeze to it."),
    option("--checkpoint-signal", metavar="SIGNAL,...", help="Freeze to the checkpoint directory when one of these comes."),
    option("--checkpoint-every", metavar="DURATION", help="Save it there that often, and let it run on."),
    option("--checkpoint-exit-code", type=int, metavar="N", help="What to exit with then (default: 85)."),
    option("--htcondor", is_flag=True, help="Be a job of HTCondor's: its checkpoints, its limits, its attributes."),
    option("--slurm", is_flag=True, help="Be a job of Slurm's: freeze when preempted, be queued again, keep its limits."),
    option("--grace", metavar="DURATION", help="With --slurm: the time from its first signal to the kill."),
)
@group(
    "records",
    option("--result", metavar="FILE", help="Write the result there, as JSON."),
    option("--classad", metavar="FILE", help="Write the result there, as a ClassAd."),
    option("--pmu", type=choice(CHOICES["pmu"]), help="Performance counters: what there is, none, or refuse without."),
    option("--sample", metavar="DURATION", help="Keep a time series of what the job uses, a point that often."),
    option("--timings", is_flag=True, help="Print what the start spent its time on."),
)
@group(
    "other",
    option("--spec", "spec_file", metavar="FILE", help="Read the spec from a TOML file; flags override it."),
    option("--dry-run", is_flag=True, help="Print what would be done, and do nothing."),
    option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON."),
)
@click.argument("image", required=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def start(**flags: Any) -> NoReturn:
    """Run COMMAND inside IMAGE: a raw disk image, a file system image, or a directory.

    The exit status is the command's own; 128+N when signal N killed it; 124 when the time limit ended it; 137 when
    memory did; 125, 126 and 127 for imgrun's own failures, a command that cannot be executed, and one that is not there.
    """
    flags["command"] = command_words(flags["command"])
    if flags["htcondor"] and flags["slurm"]:
        raise SpecError("--htcondor and --slurm contradict each other", "choose the one that runs this job")
    site = htcondor_site(flags) if flags["htcondor"] else slurm_site(flags)
    spec = spec_from_flags(flags)
    if flags["dry_run"]:
        from imgrun.dry_run import describe

        lines = describe(spec)
        if flags["as_json"]:
            import json

            print(json.dumps({"spec": spec.to_dict(), "plan": lines}, indent=1))
        else:
            print("\n".join(map(printable, lines)))
        raise click.exceptions.Exit(0)
    if site is not None:
        flags["classad"] = place_of_result(flags["classad"])
        raise click.exceptions.Exit(site.run(spec, run_foreground, flags, place_of_result(flags["result"])))
    found = None
    if spec.checkpoint_dir is not None:
        from imgrun.checkpoints.preflight import earlier_life
        from imgrun.checkpoints.refusals import unfreezable

        if (spec.checkpoint_signal or spec.checkpoint_every) and (why := unfreezable(spec)):
            raise SpecError(f"the job could not be saved: {why}", "leave out --checkpoint-signal and --checkpoint-every")
        found = earlier_life(spec, warn)
        if found is None:
            from imgrun.cli.freeze import make_checkpoint_directory

            make_checkpoint_directory(spec.checkpoint_dir)
    keep = flags["detach"] if flags["remove"] is None else not flags["remove"]
    result_file = place_of_result(flags["result"])
    flags["classad"] = place_of_result(flags["classad"])
    if flags["detach"]:
        refuse_foreground_options(flags)
        from imgrun.launcher import start_detached

        print(start_detached(spec, keep=keep, checkpoint=found).id)
        raise click.exceptions.Exit(0)
    raise click.exceptions.Exit(run_foreground(spec, keep, result_file, flags, checkpoint=found))


def refuse_foreground_options(flags: dict[str, Any]) -> None:
    """Raises SpecError for the first option that means nothing with ``--detach``."""
    for key in ("result", "classad", "timings", "as_json", "interactive"):
        if flags.get(key):
            raise SpecError(
                f"--{key.removeprefix('as_')} needs the foreground, and --detach leaves it",
                "drop one; 'imgrun inspect' shows the result of a background job",
            )


def htcondor_site(flags: dict[str, Any]) -> HTCondorSite:
    """Where we are in HTCondor; its checkpoint directory is made, and another is set for the job itself."""
    from imgrun.schedulers.htcondor import CHECKPOINT, Site

    if flags["detach"]:
        raise SpecError("a job of HTCondor's is in the foreground", "leave --detach out")
    site = Site.here(warn, flags["checkpoint_dir"] or CHECKPOINT)
    flags["checkpoint_dir"] = site.checkpoint
    return site


def slurm_site(flags: dict[str, Any]) -> SlurmSite | None:
    """The job of Slurm's that we are, when that is said; its checkpoint directory is taken where no other is given."""
    if not flags["slurm"]:
        if flags["grace"] is not None:
            raise SpecError("--grace is about a job of Slurm's", "add --slurm, or leave it out")
        return None
    from imgrun.schedulers.slurm import Site
    from imgrun.units import parse_duration

    if flags["detach"]:
        raise SpecError("a job of Slurm's is in the foreground", "leave --detach out")
    grace = None if flags["grace"] is None else parse_duration(flags["grace"], "grace")
    site = Site(os.environ, warn, grace)
    flags["default_checkpoint_dir"] = site.checkpoint
    return site


def run_foreground(
    spec: JobSpec,
    keep: bool,
    result_file: str | None,
    flags: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    *,
    on_started: Callable[[], None] | None = None,
    at_end: Callable[[Result], None] | None = None,
    stop_at_checkpoint: bool = False,
) -> int:
    """Be the job's supervisor, and print what is to be said at its end, once ``at_end`` has seen it."""
    from imgrun.job import collect, finish
    from imgrun.relay import own_description
    from imgrun.state import StateRoot
    from imgrun.streams import Stdio
    from imgrun.supervisor import Supervisor

    terminal = 0 if spec.tty and os.isatty(0) else -1
    root = StateRoot()
    collect(root)
    job = root.create(spec.to_dict(), keep=keep, continues=checkpoint is not None)
    stdio = Stdio(own_description(0, os.O_RDONLY), own_description(1, os.O_WRONLY), own_description(2, os.O_WRONLY), terminal)
    supervisor = Supervisor(
        job, spec, stdio, on_started=on_started, checkpoint=checkpoint, stop_at_checkpoint=stop_at_checkpoint
    )
    result = supervisor.run()
    finish(job, keep=keep)
    if at_end is not None:
        at_end(result)
    for warning in result.warnings:
        if warning not in supervisor.told:
            warn(warning)
    if result.message:
        report(ImgrunError(result.message, result.hint))
    if result_file or flags["as_json"] or flags.get("classad"):
        tell(result, result_file, flags)
    if flags["timings"]:
        for step, milliseconds in result.timings.items():
            print(f"{milliseconds:10.3f} ms  {step}", file=sys.stderr)
    return result.exit_status


def tell(result: Result, result_file: str | None, flags: dict[str, Any]) -> None:
    """Write the result where it was asked for."""
    import json

    from imgrun.cli.results import write_whole

    text = json.dumps(result.to_dict(), indent=1) + "\n"
    if result_file:
        write_whole(result_file, text)
    if flags["as_json"]:
        print(text, end="")
    if flags.get("classad"):
        from imgrun.accounting.classad import text as as_classad

        write_whole(flags["classad"], as_classad(result))


def place_of_result(path: str | None) -> str | None:
    """Where a result that was asked for is to be written. Raises SpecError when that cannot be."""
    if path is None:
        return None
    from imgrun.cli.results import check_place

    return check_place(path)


SAME = ("name", "hostname", "user", "workdir", "partition", "scratch_size", "memory", "swap", "cpus", "cpu_weight",
        "cpuset", "pids", "io_weight", "time_limit", "limits_mode", "userns", "init", "network", "seccomp",
        "stop_timeout", "checkpoint_every", "checkpoint_exit_code", "pmu", "oom", "sample")  # fmt: skip


def spec_from_flags(flags: dict[str, Any]) -> JobSpec:
    """The spec that the flags, over the spec file if there is one, ask for."""
    given: dict[str, Any] = {}
    if flags["spec_file"] is not None:
        from imgrun.specfile import load

        given = load(flags["spec_file"])
        # With a file that names the image, all words are the command.
        if flags["image"] is not None and "image" in given:
            flags["command"] = (flags["image"], *flags["command"])
            flags["image"] = None
    if flags["image"] is not None:
        given["image"] = flags["image"]
    if flags["command"]:
        given["command"] = tuple(flags["command"])
    given.update({key: flags[key] for key in SAME if flags[key] is not None})
    if flags["writable"] and flags["read_only"]:
        raise SpecError("--writable and --read-only contradict each other", "choose one")
    if flags["writable"] or flags["read_only"]:
        given["root"] = "writable" if flags["writable"] else "read-only"
    env = parse_environment(flags["env"], flags["env_file"])
    if env:
        given["env"] = {**given.get("env", {}), **env}
    mounts = _mounts(flags)
    if mounts:
        kept = [m for m in given.get("mounts", ()) if all(m.dst != other.dst for other in mounts)]
        given["mounts"] = (*kept, *mounts)
    if flags["io_max"]:
        given["io_max"] = tuple(parse_io_max(text) for text in flags["io_max"])
    if flags["rlimit"]:
        given["rlimits"] = (*given.get("rlimits", ()), *flags["rlimit"])
    if flags["tty"]:
        given["tty"] = True
    if flags["checkpoint_dir"] is not None:
        given["checkpoint_dir"] = os.path.abspath(flags["checkpoint_dir"])
    if flags.get("default_checkpoint_dir") is not None:
        given.setdefault("checkpoint_dir", flags["default_checkpoint_dir"])
    if flags["checkpoint_signal"] is not None:
        from imgrun.signals import parse_signal

        given["checkpoint_signal"] = tuple(map(parse_signal, flags["checkpoint_signal"].split(",")))
    if given.get("checkpoint_signal") and "checkpoint_dir" not in given:
        raise SpecError("--checkpoint-signal needs to know where to", "add --checkpoint-dir DIR")
    if flags["stop_signal"] is not None:
        from imgrun.signals import parse_signal

        given["stop_signal"] = parse_signal(flags["stop_signal"])
    if "image" not in given:
        raise SpecError("no image given", "imgrun start IMAGE [--] COMMAND...")
    return JobSpec(**given)


def _mounts(flags: dict[str, Any]) -> list[Mount]:
    return [
        *(parse_bind(text) for text in flags["bind"]),
        *(parse_tmpfs(text) for text in flags["tmpfs"]),
        *(parse_mount(text) for text in flags["mount"]),
    ]


def parse_environment(words: tuple[str, ...], files: tuple[str, ...]) -> dict[str, str]:
    """The variables of ``--env-file`` and ``--env``, the latter last. A name alone takes the caller's value."""
    env: dict[str, str] = {}
    for path in files:
        try:
            with open(path, encoding="utf-8") as f:
                lines = f.read().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else "it is not text in UTF-8"
            raise SpecError(f"cannot read the environment file {path}: {why}", "give a text file of NAME=VALUE lines") from e
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, equals, value = line.partition("=")
            if not equals or not name.strip():
                raise SpecError(f"{path}, line {number}: {line!r} is not NAME=VALUE", "mend or remove it")
            env[name.strip()] = value
    for text in words:
        name, equals, value = text.partition("=")
        if not name:
            raise SpecError(f"--env {text!r} has no name", "give NAME=VALUE, or NAME to pass yours on")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env
