"""docs/security.md names the test that attacks each statement: there must be one of that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs/security.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+)::(\w+)`", TEXT)) - {("file", "test")})


@pytest.mark.parametrize(("place", "name"), NAMED)
def test_a_named_test_exists(place: str, name: str) -> None:
    directory, _, module = place.rpartition("/")
    file = TESTS / (directory or "integration") / f"test_{module}.py"
    assert re.search(rf"^(    )?def {name}\(", file.read_text(), re.MULTILINE), f"{file} has no {name}"


def test_the_names_were_found() -> None:
    assert len(NAMED) > 50
