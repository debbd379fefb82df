"""Digests of files: by pieces, with many processors, and while a file is still being written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from command import eventually

from imgrun.checkpoints.ahead import Ahead
from imgrun.checkpoints.digests import PIECE, digests

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
