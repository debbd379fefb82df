"""Digests of files: by pieces, with many processors, and while a file is still being written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from command import eventually

from imgrun.apart import apart
from imgrun.checkpoints.ahead import Ahead
from imgrun.checkpoints.digests import LARGEST, PIECE, digests, lines
from imgrun.checkpoints.manifest import COMPARING

MEMORY = "processes/pages-1.img"
EARLIER = "processes/pre-1/pages-1.img"


@pytest.fixture
def top(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "processes").mkdir()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def whole(data: bytes) -> str:
    pieces = [xxhash.xxh3_128_digest(data[start : start + PIECE]) for start in range(0, max(len(data), 1), PIECE)]
    return xxhash.xxh3_128_hexdigest(b"".join(pieces))


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_a_digest_is_that_of_the_digests_of_pieces(tmp_path: Path, top: int, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    found = digests(top, ["file"])["file"]
    assert found[:2] == (size, whole(data))
    assert found.pieces[-1] == xxhash.xxh3_128_hexdigest(data[(len(found.pieces) - 1) * PIECE :])


def test_a_hole_is_like_zeros(tmp_path: Path, top: int) -> None:
    with open(tmp_path / "file", "wb") as f:
        f.truncate(2 * PIECE + 10)
    assert digests(top, ["file"])["file"].xxh128 == whole(bytes(2 * PIECE + 10))


def test_holes_take_no_time_and_no_memory(tmp_path: Path, top: int) -> None:
    """A job can make files of any size that take nothing on the disk: they are read apart, with little memory."""
    for number, size in enumerate((LARGEST, LARGEST, LARGEST, LARGEST + 1)):
        with open(tmp_path / f"processes/{number}", "wb") as f:
            f.write(b"begin")
            f.seek(size // 2)
            f.write(b"middle")
            f.truncate(size)
    found = apart(lambda: [json.loads(line) for line in lines(top, ["processes"])], memory=COMPARING)
    assert [line[4] for line in found] == [0, LARGEST, LARGEST, LARGEST, LARGEST + 1]
    assert found[0][5] is None
    assert found[1][5] == found[2][5] == found[3][5] is not None
    assert found[4][5] is None
    with open(tmp_path / "processes/2", "r+b") as f:
        f.seek(LARGEST - PIECE - 1)
        f.write(b"x")
    assert json.loads(next(lines(top, ["processes/2"])))[5] != found[1][5]


@pytest.mark.parametrize("data", [(), (0,), (1,), (2,), (3,), (0, 2), (1, 2)])
@pytest.mark.parametrize("size", [3 * PIECE, 3 * PIECE + 5])
def test_holes_anywhere_are_like_zeros(tmp_path: Path, top: int, data: tuple[int, ...], size: int) -> None:
    with open(tmp_path / "file", "wb") as f:
        f.truncate(size)
        for piece in data:
            if piece * PIECE < size:
                f.seek(piece * PIECE)
                f.write(b"x")
    assert digests(top, ["file"])["file"][:2] == (size, whole((tmp_path / "file").read_bytes()))


def test_memory_is_hashed_while_it_is_written(tmp_path: Path, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    data = os.urandom(3 * PIECE + 100)
    ahead = Ahead(top, "processes", write=True)
    ahead.start()
    with open(tmp_path / MEMORY, "wb", buffering=0) as f:
        f.write(data[: PIECE + 7])
        eventually(lambda: ahead.known() == {(MEMORY, 0)}, "the first piece is hashed")
        f.write(data[PIECE + 7 :])
        eventually(lambda: len(ahead.known()) == 3, "all whole pieces are hashed")
    (tmp_path / "processes/core-3.img").write_bytes(data)
    (tmp_path / "processes/pre-1").mkdir()
    (tmp_path / EARLIER).write_bytes(data[:PIECE])
    eventually(lambda: len(ahead.known()) == 4, "an earlier round is seen")
    parts = ahead.stop()
    assert set(parts) == {(MEMORY, 0), (MEMORY, PIECE), (MEMORY, 2 * PIECE), (EARLIER, 0)}
    # What is known is not read again.
    with open(tmp_path / MEMORY, "r+b") as f:
        f.write(b"changed")
    assert digests(top, [MEMORY], parts)[MEMORY][:2] == (len(data), whole(data))
    assert digests(top, [MEMORY])[MEMORY].xxh128 != whole(data)


def test_on_one_processor_all_is_left_for_later(tmp_path: Path, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    (tmp_path / MEMORY).write_bytes(bytes(PIECE))
    ahead = Ahead(top, "processes", write=False)
    ahead.start()
    assert ahead.stop() == {}
