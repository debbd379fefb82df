"""What a loopback device costs: writing into a sparse file's holes and over what is there, and direct I/O both ways."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from functools import partial

from bench.harness import Case, Unavailable, interleave
from bench.place import Place
from bench.report import Section, Table, matrix, milliseconds, size
from bench.rooms import Room, build_program, forget_cached, in_directory

TITLE = "The price of a loopback device"
HOST = "host file system"
MIB = {False: 512, True: 64}
SYNC_WRITES = {False: 400, True: 100}
ROUNDS = {False: 3, True: 1}
ROOM_FOR = 2
"""How many times the file's size the image is."""


def measure(place: Place) -> Section:
    section = Section(TITLE)
    build_program(place)
    mib, syncs = MIB[place.quick], SYNC_WRITES[place.quick]
    outcome = interleave(cases(place), rounds=ROUNDS[place.quick], warmups=0 if place.quick else 1, seconds=70)
    section.data["devices"] = outcome
    section.say(
        f"""An empty ext4 in a file, attached and mounted as imgrun does it: {mib} MiB written and made durable for the first
        time, the same file written over, read with cold caches, and {syncs} writes of 4 KiB at random places in it, each
        made durable. `holes`: the file is sparse; `reserved`: fallocate(2) gave it its blocks; `written`: it was filled
        with zeros before. In brackets the ratio to a file of the host's file system. {outcome.runs()} runs; the largest
        over the smallest of one cell was at most {outcome.worst_spread():.1f}."""
    )
    columns = (("first", "first write"), ("again", "written over"), ("read", "read, cold"), ("sync", "durable 4 KiB writes"))
    section.add(matrix(outcome, HOST, columns, "device"))
    for mode in ("direct", "buffered"):
        first = outcome.ratio(f"holes, {mode}", f"written, {mode}", "first")
        again = outcome.ratio(f"holes, {mode}", f"written, {mode}", "again")
        if first is not None and again is not None:
            section.find(
                f"""With {mode} I/O, the first write into holes takes {first:.2f}x of one into a file that was filled before;
                written over, {again:.2f}x."""
            )
    gain = outcome.ratio("holes, direct", "holes, buffered", "sync")
    if gain is not None:
        section.find(f"Durable small writes with direct I/O take {gain:.2f}x of the time without it.")
    grown = outcome.median("holes, direct", "allocated")
    if grown is not None:
        section.find(f"The sparse file took {size(grown)} of the disk for {mib} MiB of data and its file system.")
    section.refusals(outcome)
    _readers(place, section)
    return section


def cases(place: Place) -> dict[str, Case]:
    found: dict[str, Case] = {HOST: partial(_on_host, place)}
    for mode in ("direct", "buffered"):
        for name, prepare in PREPARATIONS.items():
            found[f"{name}, {mode}"] = partial(_on_device, place, name, prepare, mode == "direct")
    return found


def _holes(path: str, size: int) -> None:
    with open(path, "xb") as f:
        f.truncate(size)


def _reserved(path: str, size: int) -> None:
    with open(path, "xb") as f:
        os.posix_fallocate(f.fileno(), 0, size)


def _written(path: str, size: int) -> None:
    """Only once: so much writing right before a measurement would slow a disk whose bandwidth is rationed."""
    if os.path.exists(path):
        return
    zeros = bytes(1 << 20)
    with open(path, "xb") as f:
        for _ in range(size >> 20):
            f.write(zeros)


PREPARATIONS: dict[str, Callable[[str, int], None]] = {"holes": _holes, "reserved": _reserved, "written": _written}


def _on_host(place: Place) -> Mapping[str, float]:
    directory = f"{place.directory}/plain"
    os.mkdir(directory)
    try:
        with in_directory(place, directory, enter=False) as room:
            return _write(place, room)
    finally:
        subprocess.run(["rm", "-r", directory], check=True)


def _on_device(place: Place, name: str, prepare: Callable[[str, int], None], direct: bool) -> Mapping[str, float]:
    from imgrun import ImgrunError
    from imgrun.image import open_image

    path = f"{place.directory}/{name}.img"
    try:
        prepare(path, ROOM_FOR * MIB[place.quick] << 20)
        # nodiscard: what was reserved or written shall stay so.
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", path]
        subprocess.run(command, check=True)
        os.sync()
        with open_image(path, "writable", direct_io=direct) as image:
            root = image.mount()
            try:
                with in_directory(place, f"/proc/{os.getpid()}/fd/{root}", enter=False) as room:
                    measured = dict(_write(place, room))
            finally:
                os.close(root)
        return measured | {"allocated": float(os.stat(path).st_blocks * 512)}
    except ImgrunError as e:
        raise Unavailable(str(e)) from e
    finally:
        if prepare is not _written:
            os.unlink(path)
        # What the disk does about freed blocks is nobody's time.
        os.sync()


def _readers(place: Place, section: Section) -> None:
    """Direct I/O for images that are only read: whose cache is it?"""
    readers: dict[str, Case] = {mode: partial(_read_image, place, mode == "direct") for mode in ("direct", "buffered")}
    outcome = interleave(readers, rounds=ROUNDS[place.quick], warmups=0, seconds=25)
    section.data["readers"] = outcome
    section.say(
        f"""The root's ext4 image, attached read-only: all files of /usr read with cold caches, again, and by the next job,
        which attaches the image anew. `kept twice`: what the page cache holds of the image file, beside the files in it.
        {outcome.runs()} runs."""
    )
    table = Table("device", "cold", "again", "next job", "kept twice")
    for mode in outcome.values:
        cells = [milliseconds(outcome.median(mode, name)) for name in ("cold", "again", "next")]
        table.row(mode, *cells, size(outcome.median(mode, "kept")))
    section.add(table)
    price = outcome.ratio("direct", "buffered", "next")
    if price is not None:
        section.find(f"With direct I/O the next job of an image reads its files in {price:.2f}x of the time without it.")
    section.refusals(outcome)


def _read_image(place: Place, direct: bool) -> Mapping[str, float]:
    from imgrun import ImgrunError
    from imgrun.image import open_image

    measured: dict[str, float] = {}
    forget_cached(3)
    try:
        for names in (("cold", "again"), ("next",)):
            with open_image(place.image, "read-only", direct_io=direct) as image:
                root = image.mount()
                try:
                    with in_directory(place, f"/proc/{os.getpid()}/fd/{root}", enter=False) as room:
                        for name in names:
                            measured[name] = room.ask("read-all", "usr")
                    measured.setdefault("kept", float(_resident(place.image)))
                finally:
                    os.close(root)
    except ImgrunError as e:
        raise Unavailable(str(e)) from e
    return measured


def _resident(path: str) -> int:
    """The bytes of a file that are in the page cache."""
    command = ["fincore", "--noheadings", "--bytes", "--output", "RES", path]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except FileNotFoundError:
        raise Unavailable("fincore (util-linux) is not installed") from None


def _write(place: Place, room: Room) -> Mapping[str, float]:
    mib = MIB[place.quick]
    measured = {"first": room.ask("write", "big", mib), "again": room.ask("rewrite", "big", mib)}
    measured["sync"] = room.ask("sync-writes", "big", SYNC_WRITES[place.quick])
    forget_cached()
    measured["read"] = room.ask("read", "big")
    room.ask("remove", "big")
    return measured
