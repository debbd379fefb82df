"""The shim's argument vector, and the records that come back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun import init_shim, native
from imgrun.errors import CommandNotExecutable, CommandNotFound, HostError, SpecError, StartError
from imgrun.init_shim import Exited, Record, Signaled, Started, StatusReader, StepFailed
from imgrun.isolation.limits import Rlimit


def test_arguments() -> None:
    assert init_shim.arguments(
        ["cmd", "-x", ""], status_fd=5, uid=1, gid=2, groups=(3, 4), cwd="/w", tty=True,
        rlimits=[Rlimit("nofile", 10, 20), Rlimit("core", 0, None)],
    ) == [
        "imgrun-init", "init", "5", "1", "2", "3,4", "7:10:20,4:0:18446744073709551615", "1", "/w", "cmd", "-x", "",
    ]  # fmt: skip
    assert init_shim.arguments(["c"], status_fd=9, role="exec", groups=None) == [
        "imgrun-init", "exec", "9", "0", "0", "-", "", "0", "/", "c",
    ]  # fmt: skip


def test_no_command() -> None:
    with pytest.raises(SpecError):
        init_shim.arguments([], status_fd=5)


def test_program_is_there() -> None:
    path = init_shim.program()
    assert os.path.isabs(path)
    assert Path(path).read_bytes()[:4] == b"\x7fELF"


def test_program_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(HostError, match="missing"):
        init_shim.program()
    (tmp_path / "imgrun-init").mkdir()
    with pytest.raises(HostError, match="missing"):
        init_shim.program()
    (tmp_path / "imgrun-init").rmdir()
    (tmp_path / "imgrun-init").touch(mode=0o644)
    with pytest.raises(HostError, match="cannot be executed"):
        init_shim.program()


ENDS: list[tuple[bytes, list[Record]]] = [
    (b"started 2\nexit 7\n", [Started(2), Exited(7)]),
    (b"started 2\nsignal 64\n", [Started(2), Signaled(64)]),
    (b"started 123\n", [Started(123)]),
    (b"error exec 2\n", [StepFailed("exec", 2)]),
]


@pytest.mark.parametrize(("data", "records"), ENDS)
@given(cuts=st.lists(st.integers(0, 30)))
def test_records_however_they_are_cut(data: bytes, records: list[Record], cuts: list[int]) -> None:
    reader, found, last = StatusReader(), [], 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        if data[last:cut]:
            found += reader.feed(data[last:cut])
        last = cut
    assert found == records
    assert reader.feed(b"") == []


def test_end_of_stream() -> None:
    assert StatusReader("exec").feed(b"") == [Started(0)]
    assert StatusReader("init").feed(b"") == []
    reader = StatusReader("exec")
    assert reader.feed(b"error cwd 2\n") == [StepFailed("cwd", 2)]
    assert reader.feed(b"") == []
    reader = StatusReader("exec")
    assert reader.feed(b"error cw") == []
    assert reader.feed(b"") == []


@pytest.mark.parametrize(
    "data",
    [b"exit 0\n", b"signal 9\n", b"\n", b"started\n", b"started x\n", b"started 2\nstarted 2\n", b"started 2\nexit 256\n",
     b"started 2\nexit -1\n", b"started 2\nsignal 65\n", b"started 2\nsignal 0\n", b"started 2\nexit 0\nexit 0\n",
     b"error exec 2\nexit 0\n", b"error exec\n", b"started 2\nerror exec 2\n", b"\xff\xfe\n", b"x" * 100],
)  # fmt: skip
def test_what_the_shim_never_says(data: bytes) -> None:
    with pytest.raises(StartError) as caught:
        StatusReader().feed(data)
    assert len(caught.value.message) < 400


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        StatusReader().feed(data)
    except StartError:
        pass


@pytest.mark.parametrize(
    ("step", "number", "kind", "words"),
    [
        ("exec", errno.ENOENT, CommandNotFound, "not found"),
        ("exec", errno.ENOTDIR, CommandNotFound, "not found"),
        ("exec", errno.EACCES, CommandNotExecutable, "not executable"),
        ("exec", errno.ENOEXEC, CommandNotExecutable, "not a program"),
        ("exec", errno.E2BIG, CommandNotExecutable, "too long"),
        ("exec", errno.ETXTBSY, CommandNotExecutable, "Text file busy"),
        ("interpreter", errno.ENOENT, CommandNotExecutable, "interpreter"),
        ("shell", errno.ENOENT, CommandNotExecutable, "/bin/sh"),
        ("cwd", errno.ENOENT, StartError, "/w"),
        ("uid", errno.EINVAL, StartError, "me"),
        ("rlimit", errno.EPERM, StartError, "limit"),
        ("tty", errno.ENOTTY, StartError, "terminal"),
        ("fork", errno.EAGAIN, StartError, "processes"),
        ("session", errno.EPERM, StartError, "session"),
        ("exec", 9999, CommandNotExecutable, "9999"),
    ],
)
def test_failures_are_sentences(step: str, number: int, kind: type[Exception], words: str) -> None:
    error = init_shim.failure(StepFailed(step, number), ["tool", "x"], cwd="/w", user="me")
    assert type(error) is kind
    assert words in error.message
    assert "\n" not in error.message + (error.hint or "")


def test_a_path_that_is_not_there() -> None:
    error = init_shim.failure(StepFailed("exec", errno.ENOENT), ["/opt/tool"])
    assert type(error) is CommandNotFound
    assert "/opt/tool" in error.message
