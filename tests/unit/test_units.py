"""Sizes, durations and CPU lists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.errors import SpecError
from imgrun.units import MAX_CPU, format_cpu_list, parse_cpu_list, parse_duration, parse_size

UNITS = {"": 0, "B": 0, "K": 1, "kB": 1, "KiB": 1, "M": 2, "Gib": 3, "t": 4}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("512M", 512 << 20), ("2G", 2 << 30), ("1.5GiB", 3 << 29), ("1k", 1024), ("3b", 3),
        ("0.5K", 512), ("1.0", 1), ("7E", 7 << 60), ("0.1K", 102),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "M", "-1", "+1", "1 M", "1.M", ".5G", "1..5G", "1.5.0G", "12Q", "1iB", "1MM", "1e3", "0x10", "1.5", "8E",
     "9" * 30, "٣", "1m\n", "1" * 50, "unlimited", "²"],
)  # fmt: skip
def test_no_sizes(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_size(text, "--memory")
    assert caught.value.message.startswith("--memory: ")
    assert caught.value.hint
    assert "\n" not in caught.value.message


@given(st.integers(0, 2**20), st.sampled_from(sorted(UNITS)))
def test_size_is_number_times_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * 1024 ** UNITS[unit]


@given(st.integers(0, 2**63 - 1))
def test_plain_bytes_are_exact(number: int) -> None:
    assert parse_size(str(number)) == number


@given(st.integers(0, 999), st.integers(1, 6), st.integers(0, 999999))
def test_fractions_round_down_exactly(whole: int, digits: int, part: int) -> None:
    part %= 10**digits
    assert parse_size(f"{whole}.{part:0{digits}}G") == (whole * 10**digits + part) * 2**30 // 10**digits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("500ms", 0.5), ("1.5h", 5400), ("0", 0), ("0.25", 0.25),
        ("1w2d3h4m5s6ms", 604800 + 2 * 86400 + 3 * 3600 + 4 * 60 + 5.006), ("5min", 300), ("5SEC", 5), ("1H30M", 5400),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "text",
    ["", "h", "-1", "1 h", "1h 30m", "30m1h", "1m1m", "1m5min", "1h30", "30 ", "1y", "1hh", "1.h", "1h.5m", "nan", "inf",
     "1e3", "1:30", "1001d1001", "400000d", "9" * 41, "1µs", "٣", "90\n"],
)  # fmt: skip
def test_no_durations(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_duration(text, "--time-limit")
    assert caught.value.message.startswith("--time-limit: ")
    assert caught.value.hint


@given(st.integers(0, 10), st.integers(0, 99), st.integers(0, 99), st.integers(0, 999))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == expected
    assert parse_duration(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("8,0-1,1-2", [0, 1, 2, 8]), ("5-5", [5]), ("8191", [8191]), ("007", [7])],
)
def test_cpu_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "0,", "3-1", "-1", "1-", "a", "0-3:2", "0 1", "8192", "0-99999999999", "1--2", "9" * 40, "²", "0\n"]
)
def test_no_cpu_lists(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_cpu_list(text, "--cpuset")
    assert caught.value.message.startswith("--cpuset: ")
    assert caught.value.hint


@given(st.sets(st.integers(0, MAX_CPU)))
def test_cpu_lists_round_trip(cpus: set[int]) -> None:
    text = format_cpu_list(cpus)
    assert (parse_cpu_list(text) if cpus else []) == sorted(cpus)
    # No two ranges touch: the text is as short as it can be.
    edges = [[int(edge) for edge in item.split("-")] for item in text.split(",") if item]
    assert all(one[-1] + 1 < other[0] for one, other in itertools.pairwise(edges))


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_cpu_list):
        try:
            parse(text, "x")
        except SpecError as error:
            assert error.message.isprintable()  # noqa: PT017


@given(st.text(alphabet="0123456789.kmgtpeibdhws-, ", max_size=30))
def test_any_near_miss_is_read_or_refused(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_cpu_list):
        try:
            parse(text, "x")
        except SpecError as error:
            assert len(error.message) < 120  # noqa: PT017
