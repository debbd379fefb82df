"""``python -m bench``: measure, print, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from importlib import import_module

from bench import machine
from bench.harness import Outcome, Unavailable
from bench.place import REPOSITORY, CannotMeasure, Place
from bench.report import Section, Table

QUESTIONS = ("start", "density", "storage", "sparse", "rootless", "accounting", "checkpoint", "schedulers")
OUTPUT = f"{REPOSITORY}/docs/benchmarks.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev bench", description="Measure imgrun against its peers.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"only these: {', '.join(QUESTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs, in a few minutes; only printed")
    parser.add_argument("--output", metavar="FILE", help="write the report there (default of a full run: docs/benchmarks.md)")
    parser.add_argument("--json", metavar="FILE", help="write every single measurement there")
    given = parser.parse_args()
    if unknown := set(given.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    chosen = [name for name in QUESTIONS if not given.questions or name in given.questions]
    # As Ctrl-C: what was started is ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        text, data = measure(chosen, quick=given.quick)
    except CannotMeasure as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    output = given.output or (None if given.quick or given.questions else OUTPUT)
    if output:
        with open(output, "w", encoding="utf-8") as f:
            f.write(text)
        print(f"bench: wrote {output}", file=sys.stderr)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as f:
            json.dump(data, f, indent=1)
    return 0


def measure(questions: list[str], *, quick: bool) -> tuple[str, object]:
    """Run the questions; the report, which is printed as it grows, and all measurements for JSON."""
    began = time.monotonic()
    sections: list[Section] = []
    text: list[str] = []

    def write(lines: list[str]) -> None:
        text.extend(lines)
        print("\n".join(lines), flush=True)

    with Place(quick=quick) as place:
        write(_head(place))
        for name in questions:
            print(f"bench: {name} ({time.monotonic() - began:.0f} s so far)", file=sys.stderr)
            try:
                section: Section = import_module(f"bench.{name}").measure(place)
            except Unavailable as e:
                section = Section(name)
                section.find(f"Not measured here: {e}.")
            sections.append(section)
            write(section.lines())
    seconds = time.monotonic() - began
    write([f"Measured in {seconds:.0f} s; the load average was {machine.load():.1f} at the end.", ""])
    data = {section.title: {name: _record(outcome) for name, outcome in section.data.items()} for section in sections}
    return "\n".join(text), data


def _head(place: Place) -> list[str]:
    table = Table("machine", "")
    for name, value in machine.facts(place.directory):
        table.row(name, value)
    kind = "a quick run, so rough" if place.quick else "a full run"
    words = f"""Written by `./dev bench` ({kind}), all in one go on one machine: the runs of what is compared are interleaved,
        after a warm-up; figures are medians. The load average was {machine.load():.1f} at the start: other work on the
        machine makes all figures larger, and ratios less exact."""
    return ["# Benchmarks", "", " ".join(words.split()), "", *table.lines(), ""]


def _record(outcome: Outcome) -> dict[str, object]:
    return {"values": outcome.values, "refused": outcome.refused}


if __name__ == "__main__":
    sys.exit(main())
