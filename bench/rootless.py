"""What an ordinary user gets: starting, and reading the image, against apptainer without set-uid and bubblewrap."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from bench.desk import Desk, desks
from bench.harness import Case, Outcome, Unavailable, interleave, last_line
from bench.place import HERE, REPOSITORY, Place, once
from bench.report import Section, matrix, ranking
from bench.rooms import Room, forget_cached, in_directory

TITLE = "Without root"
PACKAGES = "apptainer,fuse-overlayfs,fuse2fs,fuse3,squashfuse,uidmap"
BIG_MIB = 256
ROUNDS = {False: 20, True: 4}
READING_ROUNDS = {False: 5, True: 1}
HOST = "host file system"
FORMS = ("squashfs", "ext3", "directory")
"""What both imgrun and apptainer take."""
NUMPY = "exec /usr/bin/python3 -c 'import numpy'"
COLUMNS = (
    ("big cold", f"read {BIG_MIB} MiB, cold"), ("big", "again"), ("usr cold", "read /usr, cold"), ("usr", "again"),
    ("walk", "stat /usr"), ("numpy cold", "import numpy, cold"), ("numpy", "again"),
)  # fmt: skip


def measure(place: Place) -> Section:
    section = Section(TITLE)
    # The user cannot write down what Python compiles, and whoever installed it has.
    subprocess.run([sys.executable, "-m", "compileall", "-q", f"{REPOSITORY}/imgrun"], check=False)
    forms = _forms(place)
    sid = once(f"{place.cache}/apptainer-sid.tree", _install_apptainer)
    with desks(place, sid) as (here, there):
        ways = _ways(here, there, {name: f"{here.images}/{os.path.basename(path)}" for name, path in forms.items()})
        _start(section, place, ways)
        _reading(section, place, ways, forms["directory"])
    return section


def _forms(place: Place) -> dict[str, str]:
    """The same root, with a big file in it, in every form."""
    image = place.built("rootless.toml", f"{HERE}/rootless.toml")
    if image is None:
        raise Unavailable("its image could not be built")
    base = image.removesuffix(".img")

    def tree(target: str) -> None:
        place.unpack(image, target)
        # Of the root's own files, so that it can be compressed as they can.
        subprocess.run(["tar", "-cf", f"{target}/big", "-C", target, "usr"], check=True)
        with open(f"{target}/big", "r+b") as f:
            f.truncate(BIG_MIB << 20)

    directory = once(f"{base}-big.tree", tree)
    return {
        "squashfs": once(f"{base}-big.squashfs", lambda path: place.squash(directory, path)),
        "ext3": once(f"{base}-big.ext3", lambda path: _ext3(directory, path)),
        "directory": directory,
    }


def _ext3(tree: str, target: str) -> None:
    subprocess.run(["mke2fs", "-q", "-t", "ext3", "-d", tree, target, "2G"], check=True)


def _install_apptainer(target: str) -> None:
    """Debian's newest, in a root of its own. The mirror may be a snapshot from some time ago."""
    from imgrun.building.mirror import proxy_environment, source_lines
    from imgrun.building.tools import Tools
    from imgrun.errors import ImgrunError

    try:
        lines = source_lines(Tools(), "debian", "sid", ["main"])
        environment = {**os.environ, **proxy_environment(Tools())}
    except ImgrunError as e:
        raise Unavailable(str(e)) from e
    command = [
        "mmdebstrap", "--variant=minbase", "--aptopt=Acquire::Check-Valid-Until \"false\"", f"--include={PACKAGES}",
        "sid", target, *lines,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"apptainer could not be installed: {done.stderr.strip().splitlines()[-1]}")


# -- ways to run something in the root ------------------------------------------------------------------------------------

Way = tuple[Desk, Callable[..., list[str]]]
"""Where, and the words for a command."""


def _ways(here: Desk, there: Desk, forms: Mapping[str, str]) -> dict[str, Way]:
    work = f"{here.shared}/work"
    found: dict[str, Way] = {}
    for form in FORMS:
        image = forms[form]

        def imgrun(*command: str, image: str = image) -> list[str]:
            return [*here.place.imgrun, "start", "--interactive", "--bind", f"{work}:{work}:ro", image, "--", *command]

        found[f"imgrun start, {form}"] = here, imgrun
    for form in FORMS:
        image = forms[form]

        def apptainer(*command: str, image: str = image) -> list[str]:
            return ["apptainer", "--silent", "exec", "--bind", f"{work}:{work}", image, *command]

        found[f"apptainer exec, {form}"] = there, apptainer

    def bwrap(*command: str) -> list[str]:
        mounts = ["--ro-bind", forms["directory"], "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        mounts += ["--ro-bind", work, work]
        return ["bwrap", "--unshare-all", "--share-net", "--die-with-parent", *mounts, *command]

    found["bwrap, directory"] = here, bwrap
    return found


# -- starting -------------------------------------------------------------------------------------------------------------


def _start(section: Section, place: Place, ways: Mapping[str, Way]) -> None:
    with ExitStack() as stack:
        shells: dict[Desk, Room] = {}
        cases: dict[str, Case] = {}
        for name, (desk, words) in ways.items():
            if desk not in shells:
                shells[desk] = stack.enter_context(desk.room())
            cases[name] = _started(shells[desk], desk, words("/bin/true"))
        outcome = interleave(cases, rounds=ROUNDS[place.quick], seconds=60)
    section.data["start"] = outcome
    section.say(
        """`/bin/true` in a root that an ordinary user may read, by what that user may do: user namespaces and FUSE.
        apptainer is that of Debian sid, without set-uid, in a root of its own. bubblewrap is given a directory, and keeps
        no record of anything."""
    )
    section.add(ranking(outcome, "wall", f"apptainer exec, {FORMS[0]}", "command"))
    for form in FORMS:
        ours, theirs = f"imgrun start, {form}", f"apptainer exec, {form}"
        section.aim(f"`imgrun start` vs `apptainer exec`, {form}", outcome.ratio(ours, theirs, "wall"), 1)
    section.refusals(outcome)


def _started(shell: Room, desk: Desk, words: list[str]) -> Case:
    log = f"{desk.shared}/home/log"
    # A shell that becomes the command: the same for all.
    line = f"exec {' '.join(words)} < /dev/null > /dev/null 2> {log}"

    def case() -> Mapping[str, float]:
        try:
            return {"wall": shell.ask("run", line)}
        except Unavailable as e:
            with open(log, encoding="utf-8", errors="replace") as f:
                raise Unavailable(f"it refuses: {last_line(f.read())}") from e

    return case


# -- reading --------------------------------------------------------------------------------------------------------------


def _reading(section: Section, place: Place, ways: Mapping[str, Way], tree: str) -> None:
    cases: dict[str, Case] = {}
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        cases[HOST] = _read(stack.enter_context(in_directory(place, tree, enter=True)))
        for name, (desk, words) in ways.items():
            try:
                cases[name] = _read(stack.enter_context(desk.room(*words())))
            except Unavailable as e:
                refused[name] = str(e)
        outcome = interleave(cases, rounds=READING_ROUNDS[place.quick], warmups=0 if place.quick else 1, seconds=150)
    outcome.refused.update(refused)
    section.data["reading"] = outcome
    section.say(
        f"""Reading the image from inside, by one small program: a file of {BIG_MIB} MiB from start to end, all files of
        /usr, their names and attributes, and a Python that imports numpy. `cold`: the kernel's caches were emptied before.
        In brackets the ratio to the host's file system, by chroot. {outcome.runs()} runs; the largest over the smallest of
        one cell was at most {outcome.worst_spread():.1f}."""
    )
    section.add(matrix(outcome, HOST, COLUMNS[:4], "root"))
    section.add(matrix(outcome, HOST, COLUMNS[4:], "root"))
    _compare(section, outcome)
    section.refusals(outcome)


def _read(room: Room) -> Case:
    def case() -> Mapping[str, float]:
        measured = {}
        for name, words in (("big", ("read", "/big")), ("usr", ("read-all", "/usr")), ("numpy", ("run", NUMPY))):
            forget_cached(3)
            measured[f"{name} cold"] = room.ask(*words)
            measured[name] = room.ask(*words)
            if name == "usr":
                measured["walk"] = room.ask("walk", "/usr")
        return measured

    return case


def _compare(section: Section, outcome: Outcome) -> None:
    for form in FORMS:
        ours, theirs = f"imgrun start, {form}", f"apptainer exec, {form}"
        said = ""
        for name, title in COLUMNS:
            said = f"{said.removesuffix(', cold')}, again" if title == "again" else title
            ratio = outcome.ratio(ours, theirs, name)
            if ratio is not None and ratio > 1.1:
                section.find(f"From {form}, `{said}` takes imgrun {ratio:.2f}x of apptainer's time.")
    ratios = [r for f in FORMS for n, _ in COLUMNS if (r := outcome.ratio(f"imgrun start, {f}", f"apptainer exec, {f}", n))]
    worst = max(ratios, default=None)
    section.aim("reading by imgrun vs by apptainer, the worst of all cells", worst, 1.1)
