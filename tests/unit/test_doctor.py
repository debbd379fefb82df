"""``imgrun doctor`` where no privilege is needed: its words, its verdict, and the machinery that tries things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from imgrun import doctor, probes
from imgrun.doctor import Check
from imgrun.errors import HostError
from imgrun.probes import Tried, attempt, in_child

OK = Check("short", "ok", "all is well", needed=True)
LIMITED = Check("a longer name", "limited", "half", "this does not work", "do that")
MISSING = Check("gone", "missing", "nothing", "nothing works", "install it", needed=True)


# -- words and verdict -------------------------------------------------------------------------------------------------


def test_the_report_is_aligned_and_advises_only_where_it_must() -> None:
    lines: list[str] = []
    doctor.report([OK, LIMITED, MISSING], lines.append)
    assert lines == [
        "ok       short          all is well",
        "limited  a longer name  half",
        "                        this does not work; do that",
        "missing  gone           nothing",
        "                        nothing works; install it",
    ]


@pytest.mark.parametrize(
    ("checks", "works"),
    [
        ([OK], True),
        ([OK, LIMITED], True),
        ([OK, LIMITED, MISSING], False),
        ([OK, MISSING._replace(needed=False)], True),
        ([OK._replace(state="limited")], True),
    ],
)
def test_only_what_is_needed_decides(checks: list[Check], works: bool) -> None:
    assert doctor.works(checks) is works


def test_all_of_it_as_whoever_runs_the_tests(tmp_path: Path) -> None:
    environment = {**os.environ, "IMGRUN_STATE_DIR": str(tmp_path / "state")}
    command = [sys.executable, "-m", "imgrun.cli", "doctor"]
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=environment)
    record = json.loads(told.stdout)
    assert told.stderr == ""
    assert told.returncode == (0 if record["works"] else 1)
    checks = [Check(**check) for check in record["checks"]]
    assert record["works"] == doctor.works(checks)
    assert {check.state for check in checks} <= {"ok", "limited", "missing"}
    for check in checks:
        assert check.name, check
        assert check.detail, check
        assert (check.state == "ok") == (not check.advice) == (not check.cost), check
        assert "\n" not in check.detail + check.cost + check.advice, check
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (told.returncode, "")
    assert len(done.stdout.splitlines()) == sum(1 if check.state == "ok" else 2 for check in checks)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["jobs", "live", "names"]
    assert list((tmp_path / "state").glob("*/*")) == []


# -- single needs ------------------------------------------------------------------------------------------------------


def settings(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    monkeypatch.setattr(doctor, "_setting", lambda name: values.get(name.replace("/", "_").replace(".", "_"), 99999))


@pytest.mark.parametrize(
    ("values", "state", "words"),
    [
        ({}, "ok", "at least 99999"),
        ({"user_max_net_namespaces": 3}, "limited", "network 3"),
        ({"user_max_user_namespaces": 0, "user_max_mnt_namespaces": 1}, "limited", "user 0, mount 1"),
    ],
)
def test_limits_of_namespaces(monkeypatch: pytest.MonkeyPatch, values: dict[str, int], state: str, words: str) -> None:
    settings(monkeypatch, **values)
    (check,) = doctor._namespace_limits(root=False)
    assert (check.state, words in check.detail) == (state, True), check
    assert all(key.replace("user_", "user.", 1) in check.advice for key in values)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"kernel_unprivileged_userns_clone": 0}, "kernel.unprivileged_userns_clone=1"),
        ({"kernel_apparmor_restrict_unprivileged_userns": 1}, "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({}, "user.max_user_namespaces"),
    ],
)
def test_what_forbids_user_namespaces(monkeypatch: pytest.MonkeyPatch, values: dict[str, int], advice: str) -> None:
    settings(monkeypatch, **values)
    assert advice in doctor._user_advice()
    told = [check for check in doctor._namespace_limits(root=True) if check.name == "ordinary users"]
    assert [check.state for check in told] == (["limited"] if values else [])


@pytest.mark.parametrize("path", ["/proc", "/dev", "/"])
def test_the_file_system_of_a_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    if path not in kinds:
        pytest.skip(f"{path} is no mount point here")
    assert probes.file_system_of(path) == kinds[path]
    monkeypatch.setitem(sys.modules, "libmount", None)  # as where it is not installed
    assert probes.file_system_of(path) == kinds[path]


def test_an_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._kernel().state == "ok"
    host = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*host[:4], "riscv64")))
    assert (doctor._kernel().state, doctor._kernel().needed) == ("missing", True)


def test_a_first_process_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._shim().state == "ok"
    for content, mode in (("#!/bin/sh\nexit 0\n", 0o755), ("not a program", 0o755), ("", 0o644)):
        fake = tmp_path / "shim"
        fake.write_text(content)
        fake.chmod(mode)
        monkeypatch.setattr(doctor.init_shim, "program", lambda fake=fake: str(fake))
        check = doctor._shim()
        assert (check.state, check.needed) == ("missing", True), check
        assert check.detail


# -- how things are tried ----------------------------------------------------------------------------------------------


def test_what_a_probe_says() -> None:
    def refused() -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    def explained() -> NoReturn:
        raise HostError("it is not there", "get it")

    for run in (attempt, in_child):
        assert run(lambda: "made") == Tried(True, "made")
        assert run(refused) == Tried(False, "Operation not permitted")
        assert run(explained) == Tried(False, "it is not there", "get it")


def test_a_child_changes_nothing_of_ours_and_may_fail_in_any_way() -> None:
    here = os.getcwd()
    assert in_child(lambda: os.chdir("/") or "gone").ok
    assert os.getcwd() == here
    killed = in_child(lambda: os.kill(os.getpid(), signal.SIGKILL) or "")
    assert (killed.ok, "signal 9" in killed.words) == (False, True)
    assert not in_child(lambda: os._exit(0) or "").ok
    assert not in_child(lambda: 1 // 0 or "").ok


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBE_SECONDS", 1)
    assert not in_child(lambda: time.sleep(1000) or "").ok
