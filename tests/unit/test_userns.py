"""Ranges of ids: each job has its own, and one that is continued finds its old one."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from imgrun.errors import HostError
from imgrun.isolation.userns import HeldMap, drop_unheld, hold_range


def start_of(held: HeldMap) -> int:
    return held.ids.uids[0].outside


def test_no_two_have_the_same(tmp_path: Path) -> None:
    directory = str(tmp_path / "ids")
    held = [hold_range(directory) for _ in range(50)]
    assert len({start_of(one) for one in held}) == 50
    for one in held:
        one.close()
    assert os.listdir(directory) == []


def test_a_place_that_cannot_hold_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="file/ids: Not a directory") as caught:
        hold_range(str(tmp_path / "file/ids"))
    assert caught.value.hint


def test_the_wanted_one_unless_another_has_it(tmp_path: Path) -> None:
    first = hold_range(str(tmp_path))
    wanted = start_of(first)
    second = hold_range(str(tmp_path), wanted=wanted)
    assert start_of(second) != wanted
    first.close()
    third = hold_range(str(tmp_path), wanted=wanted)
    assert start_of(third) == wanted
    second.close()
    third.close()


def test_the_wanted_one_of_a_holder_that_ends_at_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a job is frozen and continued at once."""
    first, lock = hold_range(str(tmp_path)), fcntl.flock
    wanted = start_of(first)

    def after_its_end(fd: int, how: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == f"{tmp_path}/{wanted}":
            first.close()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", after_its_end)
    second = hold_range(str(tmp_path), wanted=wanted)
    assert start_of(second) == wanted
    assert os.listdir(tmp_path) == [str(wanted)]
    second.close()


def test_new_jobs_leave_what_a_frozen_one_had(tmp_path: Path) -> None:
    frozen = hold_range(str(tmp_path))
    wanted = start_of(frozen)
    frozen.close()
    others = [hold_range(str(tmp_path)) for _ in range(3)]
    again = hold_range(str(tmp_path), wanted=wanted)
    assert start_of(again) == wanted
    for one in (*others, again):
        one.close()


def test_what_a_killed_holder_leaves_is_dropped(tmp_path: Path) -> None:
    held, lost = hold_range(str(tmp_path)), hold_range(str(tmp_path))
    os.close(lost._fd)  # as the kernel does
    drop_unheld(str(tmp_path))
    assert os.listdir(tmp_path) == [str(start_of(held))]
    held.close()
    drop_unheld(str(tmp_path / "nowhere"))


def test_the_wanted_one_while_it_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a job is restored whose supervisor was killed, and gc runs: they do not meet at the file."""
    lost, unlink = hold_range(str(tmp_path)), os.unlink
    wanted = start_of(lost)
    os.close(lost._fd)
    with ThreadPoolExecutor(1) as other:
        taken: list[Future[HeldMap]] = []

        def while_it_is_taken(path: str) -> None:
            taken.append(other.submit(hold_range, str(tmp_path), wanted=wanted))
            wait(taken, 0.2)
            unlink(path)

        monkeypatch.setattr(os, "unlink", while_it_is_taken)
        drop_unheld(str(tmp_path))
        monkeypatch.undo()
        held = taken[0].result()
    assert start_of(held) == wanted
    assert os.listdir(tmp_path) == [str(wanted)]
    held.close()
