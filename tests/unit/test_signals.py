"""Signals by name."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.errors import SpecError
from imgrun.signals import parse_signal, signal_name


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("sigterm", 15), ("SIGKILL", 9), ("15", 15), ("1", 1), ("64", 64), ("RTMIN", 34), ("SIGRTMIN+3", 37),
     ("rtmin+30", 64), ("RTMAX", 64), ("USR1", 10)],
)  # fmt: skip
def test_understood(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "0", "65", "-1", "NOPE", "SIG", "SIGSIGTERM", "SIG_IGN", "RTMIN+31", "RTMIN+", "RTMIN-1", "٣", "RTMIN+²", "1.5"],
)
def test_refused(text: str) -> None:
    with pytest.raises(SpecError, match="unknown signal"):
        parse_signal(text)


@given(st.sampled_from(list(signal.Signals)))
def test_names_are_read_back(signum: signal.Signals) -> None:
    assert parse_signal(signal_name(signum)) == signum
    assert parse_signal(signal_name(signum).removeprefix("SIG").lower()) == signum


@given(st.text(max_size=12))
def test_any_text(text: str) -> None:
    try:
        assert 1 <= parse_signal(text) <= 64
    except SpecError:
        pass


def test_a_number_without_a_name() -> None:
    assert signal_name(35) == "signal 35"
