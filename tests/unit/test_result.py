"""The result record: its exit status, and that it survives being written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.result import Result, Usage


def result(**fields: Any) -> Result:
    known: dict[str, Any] = {
        "id": "0123", "name": None, "image": "/i", "command": ("true",), "reason": "exited", "exit_code": 0, "signal": None,
        "message": None, "hint": None, "started_at": None, "finished_at": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    return Result(**{**known, **fields})


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 0),
        ({"exit_code": 3}, 3),
        ({"exit_code": 255}, 255),
        ({"reason": "signaled", "exit_code": None, "signal": 15}, 143),
        ({"reason": "signaled", "exit_code": None, "signal": 9}, 137),
        ({"reason": "stopped", "exit_code": None, "signal": 15}, 143),
        ({"reason": "stopped", "exit_code": 0}, 0),
        ({"reason": "time-limit", "exit_code": None, "signal": 15}, 124),
        ({"reason": "time-limit", "exit_code": 0}, 124),
        ({"reason": "memory-limit", "exit_code": None, "signal": 9}, 137),
        ({"reason": "memory-limit", "exit_code": 1}, 137),
        ({"reason": "host-memory", "exit_code": None, "signal": 9}, 137),
        ({"reason": "lost", "exit_code": None}, 125),
        ({"reason": "failed-to-start", "exit_code": None}, 125),
        ({"reason": "failed-to-start", "exit_code": None, "failure_code": 127}, 127),
    ],
)
def test_exit_status(fields: dict[str, Any], status: int) -> None:
    assert result(**fields).exit_status == status


def test_what_was_not_measured_is_null() -> None:
    usage = result().to_dict()["usage"]
    assert usage
    assert set(usage.values()) == {None}


NUMBERS = st.none() | st.integers(0, 2**60) | st.floats(0, 1e9)
USAGES = st.builds(lambda fields: Usage(**fields), st.dictionaries(st.sampled_from(sorted(Usage.__slots__)), NUMBERS))


@given(USAGES, st.integers(0, 255), st.lists(st.text()), st.dictionaries(st.text(), st.floats(0, 1e6)))
def test_the_record_gives_the_result_back(usage: Usage, code: int, texts: list[str], timings: dict[str, float]) -> None:
    made = result(usage=usage, exit_code=code, warnings=tuple(texts), command=tuple(texts), timings=timings)
    record = json.loads(json.dumps(made.to_dict()))
    assert record["failure_code"] is None, "it has not failed to start"
    assert record["exit_status"] == code
    assert Result.from_dict(record) == made
