"""The arithmetic of the benchmarks: what is reported must be what was measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest

from bench.density import parse_rollup
from bench.harness import Outcome, Summary, Unavailable, interleave, last_line, run, run_checked
from bench.report import Section, Table, matrix, milliseconds, ranking, size, times
from bench.start import parse_timings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], Summary(3.0, 3.0, 3.0, 1)),
        ([3.0, 1.0, 2.0], Summary(2.0, 1.0, 3.0, 3)),
        ([4.0, 1.0, 2.0, 3.0], Summary(2.5, 1.0, 4.0, 4)),
    ],
)
def test_summary(values: list[float], expected: Summary) -> None:
    assert Summary.of(values) == expected


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        Summary.of([])


def test_spread() -> None:
    assert Summary.of([2.0, 3.0, 6.0]).spread == 3.0
    assert Summary.of([0.0, 1.0]).spread == float("inf")


class Recorder:
    """Cases that note when they are called, and give the numbers they were told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def case(self, name: str, values: list[float]) -> Mapping[str, float]:
        self.calls.append(name)
        return {"wall": values.pop(0)}


def test_cases_take_turns_and_warm_ups_do_not_count() -> None:
    recorder = Recorder()
    a, b = [100.0, 1.0, 3.0], [200.0, 2.0, 6.0]
    cases = {"a": lambda: recorder.case("a", a), "b": lambda: recorder.case("b", b)}
    outcome = interleave(cases, rounds=2, warmups=1)
    assert recorder.calls == ["a", "b", "a", "b", "a", "b"]
    assert outcome.values == {"a": {"wall": [1.0, 3.0]}, "b": {"wall": [2.0, 6.0]}}
    assert outcome.median("b", "wall") == 4.0
    assert outcome.ratio("a", "b", "wall") == 0.5
    assert outcome.runs() == 2
    assert outcome.worst_spread() == 3.0


def test_time_ends_the_rounds_but_never_before_the_first() -> None:
    moments = iter([0.0, 5.0, 9.0, 11.0])
    recorder = Recorder()
    values = [1.0] * 9
    cases = {"a": lambda: recorder.case("a", values)}
    outcome = interleave(cases, rounds=9, warmups=0, seconds=10.0, clock=lambda: next(moments))
    # The clock is asked at the start and before the second, third and fourth round; that one is too late.
    assert outcome.runs() == 3
    assert interleave(cases, rounds=9, warmups=0, seconds=-1.0).runs() == 1


def test_a_case_that_cannot_be_done_is_told_and_left_out() -> None:
    calls = []

    def refuses() -> Mapping[str, float]:
        calls.append("refuses")
        raise Unavailable("not on this host")

    outcome = interleave({"a": lambda: {"wall": 1.0}, "b": refuses}, rounds=3)
    assert calls == ["refuses"]
    assert outcome.refused == {"b": "not on this host"}
    assert list(outcome.values) == ["a"]
    assert outcome.ratio("a", "b", "wall") is None
    section = Section("A question")
    section.refusals(outcome)
    assert section.findings == ["Not measured here: b (not on this host)."]


def test_what_fails_later_takes_its_earlier_runs_with_it() -> None:
    values = [1.0, 2.0]

    def case() -> Mapping[str, float]:
        if not values:
            raise Unavailable("it broke")
        return {"wall": values.pop()}

    outcome = interleave({"a": case}, rounds=5, warmups=0)
    assert outcome.values == {}
    assert outcome.refused == {"a": "it broke"}


def test_ratio_to_zero_is_unknown() -> None:
    outcome = Outcome()
    outcome.add("a", {"wall": 1.0})
    outcome.add("b", {"wall": 0.0})
    assert outcome.ratio("a", "b", "wall") is None
    assert outcome.ratio("b", "a", "wall") == 0.0
    assert outcome.median("a", "cpu") is None


def test_run_measures_a_process() -> None:
    ended = run([sys.executable, "-c", "import sys, time; time.sleep(0.2); print('words', file=sys.stderr); sys.exit(7)"])
    assert ended.code == 7
    assert 0.2 <= ended.wall < 30
    assert ended.cpu < ended.wall
    assert ended.stderr == "words\n"


def test_run_counts_processor_time_of_children() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    ended = run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"])
    assert ended.code == 0
    assert ended.cpu >= 0.3


def test_run_tells_a_signal() -> None:
    assert run(["/bin/sh", "-c", "kill -9 $$"]).code == 137


def test_run_checked_refuses_with_the_programs_own_words() -> None:
    with pytest.raises(Unavailable, match="exit status 3: no such thing"):
        run_checked(["/bin/sh", "-c", "echo first >&2; echo 'no such thing' >&2; echo >&2; exit 3"])
    with pytest.raises(Unavailable, match="is not installed"):
        run(["/no/such/program"])


def test_last_line() -> None:
    assert last_line("a\n  b  \n\n") == "b"
    assert last_line("") == "(it said nothing)"


def test_timings_are_read_back() -> None:
    text = "imgrun: warning: something\n     7.041 ms  image: probe, lock, loop device\n     0.442 ms  scratch\n"
    assert parse_timings(text) == pytest.approx({"image: probe, lock, loop device": 0.007041, "scratch": 0.000442})
    assert parse_timings("take 5 ms  of it\n") == {}


def test_rollup_is_read_in_bytes() -> None:
    text = "55d0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:   1024 kB\nPss:     3 kB\nPss_Dirty:   1 kB\nBroken\n"
    assert parse_rollup(text) == {"Rss": 1 << 20, "Pss": 3072, "Pss_Dirty": 1024}


def test_units() -> None:
    assert [milliseconds(s) for s in (0.00004, 0.0123, 0.09994, 0.09999, 1.5, None)] == [
        "0.0 ms", "12.3 ms", "99.9 ms", "100 ms", "1500 ms", "-",
    ]  # fmt: skip
    assert [size(n) for n in (2048, 1 << 20, 12.5 * (1 << 20), None)] == ["2 KiB", "1.0 MiB", "12.5 MiB", "-"]
    assert [times(r) for r in (0.5, None)] == ["0.50x", "-"]


def test_table_is_markdown() -> None:
    table = Table("what", "median")
    table.row("a longer name", "1.0 ms")
    assert table.lines() == [
        "| what          | median |",
        "| ------------- | -----: |",
        "| a longer name | 1.0 ms |",
    ]
    with pytest.raises(ValueError):
        table.row("only one")


def two_cases() -> Outcome:
    outcome = Outcome()
    for ours, theirs in ((0.1, 0.2), (0.3, 0.6)):
        outcome.add("ours", {"wall": ours, "write": ours})
        outcome.add("theirs", {"wall": theirs})
    return outcome


def test_ranking_and_matrix() -> None:
    rows = ranking(two_cases(), "wall", "theirs", "command").rows
    assert rows == [
        ("ours", "200 ms", "100 ms", "300 ms", "0.50x", "2"),
        ("theirs", "400 ms", "200 ms", "600 ms", "1.00x", "2"),
    ]
    table = matrix(two_cases(), "theirs", (("wall", "all of it"), ("write", "writing")), "root")
    assert table.columns == ("root", "all of it", "writing")
    assert table.rows == [("ours", "200 ms (0.50x)", "200 ms (-)"), ("theirs", "400 ms", "-")]


@pytest.mark.parametrize(
    ("value", "words"),
    [(2.5, "is met"), (3.0, "is met"), (3.01, "**the aim, at most 3x, is missed**"), (None, "not measured here")],
)
def test_aims_are_judged(value: float | None, words: str) -> None:
    section = Section("A question")
    section.aim("this", value, 3)
    assert words in section.findings[0]


def test_section_is_markdown() -> None:
    section = Section("A question")
    section.say("Some\n    words.")
    table = Table("a")
    table.row("b")
    section.add(table)
    section.find("Found.")
    assert section.lines() == ["## A question", "", "Some words.", "", "| a   |", "| --- |", "| b   |", "", "- Found.", ""]
