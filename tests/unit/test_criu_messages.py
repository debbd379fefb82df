"""What is said to CRIU and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgrun.checkpoints import criu_messages as messages

rpc = pytest.importorskip("pycriu", reason="pycriu is not installed").rpc


def test_a_request_has_every_kind_of_option() -> None:
    options: dict[str, messages.Value] = {
        "images_dir_fd": -1, "pid": 2, "leave_running": True, "log_file": "a.log", "irmap_scan_paths": ("/tmp", "/run"),
        "inherit_fd": [messages.inherited("pipe:[3]", 7)], "network_lock": messages.NETWORK_LOCK_SKIP,
    }  # fmt: skip
    asked = rpc.criu_req.FromString(messages.request(messages.DUMP, options))
    assert (asked.type, asked.opts.pid, asked.opts.leave_running) == (rpc.DUMP, 2, True)
    assert (asked.opts.inherit_fd[0].key, asked.opts.inherit_fd[0].fd) == ("pipe:[3]", 7)
    assert (list(asked.opts.irmap_scan_paths), asked.opts.network_lock) == (["/tmp", "/run"], rpc.SKIP)


def test_numbers_are_those_of_criu() -> None:
    names = ("DUMP", "RESTORE", "PRE_DUMP", "NOTIFY", "FEATURE_CHECK")
    assert [getattr(messages, name) for name in names] == [getattr(rpc, name) for name in names]
    assert (messages.CGROUPS_IGNORE, messages.NETWORK_LOCK_SKIP) == (rpc.IGNORE, rpc.SKIP)


def test_a_response() -> None:
    said = rpc.criu_resp(type=rpc.NOTIFY, success=True, notify={"script": "post-dump"}, features={"lazy_pages": True})
    parsed = messages.Response.parse(said.SerializeToString())
    assert parsed == (messages.NOTIFY, True, "post-dump", frozenset({"lazy_pages"}), "")


def test_short_messages() -> None:
    answered = rpc.criu_req.FromString(messages.answer(False))
    assert (answered.type, answered.notify_success) == (rpc.NOTIFY, False)
    assert rpc.criu_req.FromString(messages.feature_check("mem_track")).features.mem_track


def test_statistics_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "stats").write_bytes(b"\0" * 40)
    assert messages.statistics(str(tmp_path / "stats")) == messages.statistics(str(tmp_path / "gone")) == {}
