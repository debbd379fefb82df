"""The report: sections of short tables and sentences, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness import Outcome


class Table:
    """Rows of cells; the first column is left-aligned, the others right."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[str, ...]] = []

    def row(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def lines(self) -> list[str]:
        widths = [max(3, *(len(row[i]) for row in (self.columns, *self.rows))) for i in range(len(self.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return [_line(cells, widths) for cells in (self.columns, tuple(rule), *self.rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


class Section:
    """What a question found. ``findings`` are sentences; ``data`` is all that was measured, for --json."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str | Table] = []
        self.findings: list[str] = []
        self.data: dict[str, Outcome] = {}

    def say(self, text: str) -> None:
        """A paragraph; its line breaks and indentation do not matter."""
        self.parts.append(" ".join(text.split()))

    def add(self, table: Table) -> None:
        self.parts.append(table)

    def find(self, sentence: str) -> None:
        self.findings.append(" ".join(sentence.split()))

    def aim(self, text: str, value: float | None, limit: float, *, unit: str = "x") -> None:
        """A finding about something the project wants to reach: ``value`` at most ``limit``."""
        if value is None:
            self.find(f"{text}: not measured here (aim: at most {limit:g}{unit}).")
        elif value <= limit:
            self.find(f"{text}: {value:.2f}{unit}; the aim, at most {limit:g}{unit}, is met.")
        else:
            self.find(f"{text}: {value:.2f}{unit}; **the aim, at most {limit:g}{unit}, is missed**.")

    def refusals(self, outcome: Outcome) -> None:
        for case, reason in outcome.refused.items():
            self.find(f"Not measured here: {case} ({reason}).")

    def lines(self) -> list[str]:
        lines = [f"## {self.title}", ""]
        for part in self.parts:
            lines += [part, ""] if isinstance(part, str) else [*part.lines(), ""]
        lines += [f"- {sentence}" for sentence in self.findings]
        return [*lines, ""] if self.findings else lines


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:.1f} ms" if value < 99.95 else f"{value:.0f} ms"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def size(count: float | None) -> str:
    """Of so many bytes, in the unit that suits it."""
    if count is None:
        return "-"
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.0f} KiB"


def ranking(outcome: Outcome, name: str, reference: str, heading: str) -> Table:
    """One row per case: median, smallest and largest time, the ratio to the reference, the number of runs."""
    table = Table(heading, "median", "min", "max", f"vs {reference}", "runs")
    for case in outcome.values:
        found = outcome.summary(case, name)
        if found is not None:
            ratio = times(outcome.ratio(case, reference, name))
            cells = (milliseconds(found.median), milliseconds(found.low), milliseconds(found.high), ratio)
            table.row(case, *cells, str(found.runs))
    return table


def matrix(outcome: Outcome, reference: str, columns: Sequence[tuple[str, str]], heading: str) -> Table:
    """One row per case, one column per (name, title): the median time and, beside it, its ratio to the reference's."""
    table = Table(heading, *(title for _, title in columns))
    for case in outcome.values:
        cells = []
        for name, _ in columns:
            ratio = "" if case == reference else f" ({times(outcome.ratio(case, reference, name))})"
            median = outcome.median(case, name)
            cells.append("-" if median is None else milliseconds(median) + ratio)
        table.row(case, *cells)
    return table
