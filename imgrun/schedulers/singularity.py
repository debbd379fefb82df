"""``imgrun-singularity``: the calls that HTCondor makes of Singularity, done by imgrun, so that any image can be a container.

    SINGULARITY = /usr/bin/imgrun-singularity        in the configuration of execute machines

A job of the container universe whose image is a disk image then runs in it, and is frozen and continued as with
``imgrun start --htcondor``. What HTCondor calls: ``--version``; ``exec`` with a directory that holds a test program; ``test``;
and ``exec`` or ``run`` for the job, as its user, with the job's variables as SINGULARITYENV_NAME.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any, NamedTuple, NoReturn

from imgrun.errors import SpecError
from imgrun.spec import JobSpec, Mount, parse_bind

ONE_WORD = frozenset(
    "-s --silent -q --quiet -d --debug -v --verbose --nocolor -C --containall -c --contain -e --cleanenv --no-home -p --pid "
    "-i --ipc -u --userns --uts --no-eval --no-init --compat --no-privs --keep-privs --nv --rocm --nvccli -f --fakeroot "
    "--writable-tmpfs --no-umask --disable-cache".split()
)
"""Options that change nothing here: a job has its own namespaces and nothing of the caller's, and may write in its root."""
TWO_WORDS = {
    "-B": "bind", "--bind": "bind", "-S": "scratch", "--scratch": "scratch", "--pwd": "pwd", "--cwd": "pwd",
    "-H": "home", "--home": "home", "--env": "env", "-W": "", "--workdir": "", "--no-mount": "",
}  # fmt: skip
"""Options with a word after them, and what it is; nothing for what needs no counterpart."""
OWN_TEMPORARY = ("/tmp", "/var/tmp")
PREFIXES = ("SINGULARITYENV_", "APPTAINERENV_")


class Call(NamedTuple):
    """One call of Singularity's, as far as it means something here."""

    verb: str
    image: str
    command: tuple[str, ...]
    given: dict[str, list[str]]

    def last(self, name: str) -> str | None:
        return self.given[name][-1] if name in self.given else None


def parse(words: list[str]) -> Call:
    """Take a call apart. Raises SpecError for what has no counterpart in imgrun."""
    given: dict[str, list[str]] = {}
    rest = list(words)
    verb = ""
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in TWO_WORDS:
            if not equals and not rest:
                raise SpecError(f"imgrun-singularity: {name} lacks its value", "see the manual of Singularity")
            given.setdefault(TWO_WORDS[name], []).append(value if equals else rest.pop(0))
        elif word in ONE_WORD:
            continue
        elif word.startswith("-"):
            raise SpecError(f"imgrun-singularity does not know the option {word}", "see SINGULARITY_EXTRA_ARGUMENTS")
        elif not verb:
            verb = word
        else:
            return Call(verb, word, tuple(rest), given)
    raise SpecError("imgrun-singularity: no image given", "it is for HTCondor to call: SINGULARITY = .../imgrun-singularity")


def spec_of(call: Call, environ: dict[str, str]) -> JobSpec:
    """The job that a call of ``exec`` or ``run`` asks for. Raises SpecError."""
    if not call.command:
        raise SpecError("the job has no command, and a disk image has none of its own", "give the job an executable")
    mounts: dict[str, Mount] = {}
    for text in (text for words in call.given.get("bind", ()) for text in words.split(",")):
        mount = parse_bind(text)
        mounts[mount.dst] = mount
    for place in call.given.get("scratch", ()):
        if place not in OWN_TEMPORARY:
            mounts.setdefault(place, Mount("tmpfs", place))
    env = {
        name.removeprefix(prefix): value
        for name, value in environ.items() for prefix in PREFIXES if name.startswith(prefix)
    }  # fmt: skip
    for words in call.given.get("env", ()):
        env |= dict(pair.partition("=")[::2] for pair in words.split(","))
    home = call.last("home")
    if home is not None:
        source, colon, target = home.partition(":")
        env["HOME"] = target or source
        if colon and target not in mounts:
            mounts[target] = Mount("bind", target, source)
    return JobSpec(
        image=call.image, command=call.command, mounts=tuple(mounts.values()), env=env, workdir=call.last("pwd")
    )  # fmt: skip


def run(words: list[str]) -> int:
    """Do what a call asks for; the exit status."""
    from imgrun import __version__

    if words in (["--version"], ["version"]):
        print(f"imgrun-singularity version {__version__}")
        return 0
    call = parse(words)
    if call.verb == "test":
        from imgrun.image import probe

        probe(call.image)
        return 0
    if call.verb not in ("exec", "run"):
        raise SpecError(f"imgrun-singularity does not know {call.verb!r}", "it knows exec, run, test and --version")
    from imgrun.cli import warn
    from imgrun.cli.start import run_foreground

    flags: dict[str, Any] = {"as_json": False, "classad": None, "timings": False}
    environ = dict(os.environ)
    for name in ("_CONDOR_JOB_AD", "_CONDOR_MACHINE_AD", "_CONDOR_SCRATCH_DIR", "_CONDOR_CHIRP_CONFIG"):
        # Once the job's variables have another name, these of HTCondor's own may have it as well.
        outside = next((environ[prefix + name] for prefix in PREFIXES if prefix + name in environ), None)
        if name not in environ and outside is not None and os.path.exists(outside):
            os.environ[name] = outside
    spec = spec_of(call, environ)
    if "_CONDOR_JOB_AD" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="imgrun-") as directory:
            # A trial of the startd's, as somebody who has no directory.
            os.environ.setdefault("IMGRUN_STATE_DIR", directory)
            return run_foreground(spec, False, None, flags)
    from imgrun.schedulers.htcondor import Site

    return Site.here(warn).run(spec, run_foreground, flags)


def main() -> NoReturn:
    """Run as the program ``imgrun-singularity``."""
    from imgrun.cli import guarded

    guarded(lambda: run(sys.argv[1:]))
