"""``imgrun image``: looking at images, and building them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from imgrun.building.recipe import FORMATS, TABLES
from imgrun.cli import printable
from imgrun.errors import ImgrunError


@click.group("image")
def image() -> None:
    """Look at images, and build them."""


@image.command("build", short_help="Build an image from a recipe.")
@click.argument("recipe")
@click.argument("out")
@click.option("-f", "--force", is_flag=True, help="Replace OUT if it exists and no job uses it.")
@click.option("--no-cache", is_flag=True, help="Fetch packages anew, although they are in the cache.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Instead of the recipe's.")
@click.option("--size", metavar="SIZE", help="Of the file system, instead of the recipe's; 'auto' fits the content.")
@click.option("--table", type=click.Choice(TABLES), help="The partition table, instead of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print a record of the image as JSON.")
def build(
    recipe: str,
    out: str,
    force: bool,
    no_cache: bool,
    format_: str | None,
    size: str | None,
    table: str | None,
    as_json: bool,
) -> None:
    """Build the image file OUT from the file RECIPE (TOML).

    OUT appears when it is complete. Packages are kept in $IMGRUN_CACHE, by default ~/.cache/imgrun.
    """
    from imgrun.building import build as builder
    from imgrun.building.recipe import load

    wanted = load(recipe).with_image(format=format_ or "", size=size or "", table=table or "")
    with _interruptible(out):
        built = builder.build(
            wanted,
            out,
            force=force,
            use_cache=not no_cache,
            progress=lambda words: _say(f"{wanted.name}: {words}"),
            debug=_say if os.environ.get("IMGRUN_DEBUG") else None,
        )
    if as_json:
        print(json.dumps(built._asdict(), indent=1))
        return
    form = built.format if built.table == "none" else f"{built.format} in {built.table}"
    sizes = f"{_human(built.size)}, {_human(built.allocated)} on disk"
    print(f"{built.path}: {form}, {sizes}, built in {built.seconds:.1f} s")


@image.command("inspect", short_help="Show what an image is, and whether it can run here.")
@click.argument("path", metavar="IMAGE")
@click.option("--partition", metavar="N|LABEL|UUID", help="The partition that is the root.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(path: str, partition: str | None, as_json: bool) -> None:
    """Show format, partitions, operating system, architecture and size, and whether IMAGE can run on this host."""
    from imgrun.config import image_path
    from imgrun.image import inspect as look

    record = look(image_path(path), partition)
    if as_json:
        print(json.dumps(record, indent=1))
        return
    for name, value in _rows(record):
        print(f"{name:<14}{printable(value)}")


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known, by name."""
    yield "image", record["path"]
    yield "format", f"{record['format'] or 'not known'}{_table(record)}"
    if record["size"] is not None:
        yield "size", f"{_human(record['size'])}, {_human(record['allocated'])} on disk"
    for name in ("label", "uuid"):
        if record[name]:
            yield name, record[name]
    if record["clean"] is False:
        yield "clean", "no"
    for partition in record["partitions"] or ():
        mark = "*" if partition["number"] == record["partition"] else ""
        kind = f", root for {partition['root_for']}" if partition["root_for"] else ""
        what = partition["format"] or "nothing recognised"
        label = f" {partition['label']!r}" if partition["label"] else ""
        yield f"partition {partition['number']}{mark}", f"{_human(partition['size'])}{label}, {what}{kind}"
    if record["os"]:
        yield "system", record["os"]["name"] or "not known"
    if record["architectures"]:
        yield "architecture", ", ".join(record["architectures"])
    answers = {True: "yes", False: f"no: {record['reason']}", None: f"not known: {record['reason']}"}
    yield "runs here", answers[record["runnable"]]
    if record["hint"]:
        yield "", record["hint"]


def _table(record: dict[str, Any]) -> str:
    return f" in a {record['table']} disk" if record["table"] else ""


@contextlib.contextmanager
def _interruptible(out: str) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the build as orderly as SIGINT does, and say so in one line."""
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
    there = _identity(out)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    except (KeyboardInterrupt, Exception) as e:
        # Whatever fails after it, as what puts things in order may, it is why the build ended.
        if not received:
            raise
        kept = _identity(out) == there
        what = f"the build was interrupted; {out} was not written" if kept else f"interrupted when {out} was complete"
        error = ImgrunError(f"{what}, and {e.message}" if isinstance(e, ImgrunError) else what, getattr(e, "hint", None))
        error.exit_code = 128 + received[0]
        raise error from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _say(words: str) -> None:
    # Nobody listening is no reason to stop.
    with contextlib.suppress(BrokenPipeError):
        print(words, file=sys.stderr, flush=True)


def _human(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
