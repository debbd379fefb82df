"""The price of the image: the same file work in each kind of root, and on the host's own file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from bench.harness import Case, Outcome, Unavailable, interleave
from bench.place import Place
from bench.report import Section, matrix
from bench.rooms import Room, build_program, forget_cached, in_directory, in_job

TITLE = "The price of the image"
HOST = "host file system"
MIB = {False: 512, True: 64}
FILES = {False: 5000, True: 1000}
SOURCES = {False: 16, True: 6}
ROUNDS = {False: 4, True: 1}
WORK = "/imgrun-bench"
BIG, SMALL = f"{WORK}/big", f"{WORK}/small"


def measure(place: Place) -> Section:
    section = Section(TITLE)
    outcome = _measure(place)
    section.data["rooms"] = outcome
    mib, files, sources = MIB[place.quick], FILES[place.quick], SOURCES[place.quick]
    section.say(
        f"""File work by one small program: {mib} MiB written and made durable, read again from the disk; {files} files of 4
        KiB made, looked at and removed; {sources} C files compiled by the root's gcc; all files of /usr read. `cold`: the
        kernel's caches were emptied before. In brackets the ratio to the host's file system, where the same program works
        in the same files by chroot. {outcome.runs()} runs after {_warmups(place)} warm-up; the largest over the smallest
        of one cell was at most {outcome.worst_spread():.1f}."""
    )
    first = (("write", f"write {mib} MiB"), ("read", "read it, cold"), ("create", "create files"), ("walk", "stat them"))
    second = (("remove", "remove them"), ("compile", "compile"), ("usr cold", "read /usr, cold"), ("usr", "read /usr, warm"))
    section.add(matrix(outcome, HOST, first, "root"))
    section.add(matrix(outcome, HOST, second, "root"))
    _findings(section, outcome)
    section.refusals(outcome)
    return section


def _warmups(place: Place) -> int:
    return 0 if place.quick else 1


def rooms(place: Place) -> dict[str, Callable[[], Room]]:
    """The kinds of root, each as what opens it."""
    found: dict[str, Callable[[], Room]] = {
        HOST: lambda: in_directory(place, place.tree, enter=True),
        "directory, overlay": lambda: in_job(place, place.tree),
        "ext4 image, overlay": lambda: in_job(place, place.image),
        "ext4 image, overlay, sized scratch": lambda: in_job(place, place.image, scratch_size=4 << 30),
        "ext4 image, writable": lambda: in_job(place, place.copy_image("writable.img"), root="writable"),
    }
    if place.squashfs:
        found["squashfs, overlay"] = lambda: in_job(place, place.squashfs)
    return found


def _measure(place: Place) -> Outcome:
    refused: dict[str, str] = {}
    cases: dict[str, Case] = {}
    try:
        build_program(place)
    except Unavailable as e:
        outcome = Outcome()
        outcome.refuse("all roots", str(e))
        return outcome
    with ExitStack() as stack:
        for name, opener in rooms(place).items():
            try:
                room = stack.enter_context(opener())
                _furnish(place, room)
            except Unavailable as e:
                refused[name] = str(e)
                continue
            # The tree outlives this.
            stack.callback(room.ask, "remove", WORK)
            cases[name] = _work(place, room)
        outcome = interleave(cases, rounds=ROUNDS[place.quick], warmups=_warmups(place), seconds=120)
    outcome.refused.update(refused)
    return outcome


def _furnish(place: Place, room: Room) -> None:
    """Put what is to be compiled into the root."""
    room.ask("run", f"rm -rf {WORK} && mkdir {WORK} {WORK}/c")
    if place.has("/usr/bin/gcc"):
        body = (
            'echo "int f${n}_$i(int a, int b) { int s = $i; for (int k = 0; k < a; k++)'
            ' { s += k * b % (s | 1); if (s & $i) s ^= b; } return s; }"'
        )
        includes = "printf '#include <stdio.h>\\n#include <stdlib.h>\\n#include <string.h>\\n#include <unistd.h>\\n'"
        one = f"{{ {includes}; i=0; while [ $i -lt 40 ]; do {body}; i=$((i + 1)); done; }} > $n.c"
        room.ask("run", f"cd {WORK}/c; n=0; while [ $n -lt {SOURCES[place.quick]} ]; do {one}; n=$((n + 1)); done")


def _work(place: Place, room: Room) -> Case:
    def case() -> Mapping[str, float]:
        measured = {"write": room.ask("write", BIG, MIB[place.quick])}
        forget_cached()
        measured["read"] = room.ask("read", BIG)
        measured["create"] = room.ask("create", SMALL, FILES[place.quick])
        measured["walk"] = room.ask("walk", SMALL)
        measured["remove"] = room.ask("remove", SMALL)
        if place.has("/usr/bin/gcc"):
            compile_all = "for source in *.c; do gcc -O1 -c $source || exit 1; done && gcc -r -o all.o [0-9]*.o"
            measured["compile"] = room.ask("run", f"cd {WORK}/c && {compile_all} && rm *.o")
        forget_cached(3)
        measured["usr cold"] = room.ask("read-all", "/usr")
        measured["usr"] = room.ask("read-all", "/usr")
        room.ask("remove", BIG)
        os.sync()
        return measured

    return case


def _findings(section: Section, outcome: Outcome) -> None:
    def price(case: str, name: str) -> str:
        ratio = outcome.ratio(case, HOST, name)
        return "?" if ratio is None else f"{ratio:.2f}x"

    image, squashfs = "ext4 image, overlay", "squashfs, overlay"
    names = {
        "an overlay on an ext4 image (the default)": image,
        "a sized scratch": "ext4 image, overlay, sized scratch",
        "`--writable`": "ext4 image, writable",
    }
    for words, case in names.items():
        if case in outcome.values:
            section.find(
                f"""Against the host's file system, {words} takes {price(case, "write")} to write, {price(case, "create")}
                to create small files, {price(case, "remove")} to remove them, {price(case, "compile")} to compile."""
            )
    if squashfs in outcome.values:
        section.find(
            f"""All of /usr is read from a squashfs in {price(squashfs, "usr cold")} of the host's time cold and
            {price(squashfs, "usr")} warm; from an ext4 image in {price(image, "usr cold")} and {price(image, "usr")}."""
        )
