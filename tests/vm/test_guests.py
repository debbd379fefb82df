"""The tests in ``guest/``, each as it ended in each guest that runs it."""

from __future__ import annotations

import ast
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vm.guests import GUESTS, Guest

if TYPE_CHECKING:
    from vm.conftest import Runs

CHOSEN = {name: guest for name, guest in GUESTS.items() if guest.always or os.environ.get("IMGRUN_VM_ALL")}
INSIDE = Path(__file__).parent / "guest"
TIMEOUT = 1500


def names(guest: Guest) -> list[str]:
    """The tests that are to run in the guest, as ``file::function``."""
    found = []
    for file in guest.tests:
        for node in ast.parse((INSIDE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(f"{file.removesuffix('.py')}::{node.name}")
    return found


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("name", CHOSEN)
def test_boots_and_ends(runs: Runs, name: str) -> None:
    outcome = runs(name)
    assert outcome.problem == "", f"{outcome.problem}\n{outcome.tail}"
    assert (outcome.directory / "junit.xml").exists(), f"no result came out\n{outcome.tail}"


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize(("guest", "name"), [(guest.name, name) for guest in CHOSEN.values() for name in names(guest)])
def test_inside(runs: Runs, guest: str, name: str) -> None:
    outcome = runs(guest)
    results = outcome.directory / "junit.xml"
    assert results.exists(), f"no result came out: {outcome.problem}\n{outcome.tail}"
    for case in ElementTree.parse(results).iter("testcase"):
        if f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}" == name:
            for verdict in case:
                text = f"{verdict.get('message')}\n{verdict.text or ''}"
                if verdict.tag == "skipped":
                    pytest.skip(f"in the guest: {text}")
                assert verdict.tag not in ("failure", "error"), text
            return
    raise AssertionError(f"it did not run\n{(outcome.directory / 'log').read_text()[-4000:]}")
