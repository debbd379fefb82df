"""Resource limits, the OOM score: real limits of real processes, none of which needs a privilege."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.errors import ImgrunError, LimitError, SpecError
from imgrun.isolation import limits
from imgrun.isolation.limits import RLIMITS, Rlimit, parse_rlimit

GIVEN_NUMBERS = st.one_of(st.none(), st.integers(0, 2**63 - 1))


def in_child(work: Callable[[], object]) -> str:
    """What ``work`` returns, or the error it raises, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(work()).encode())
        except (ImgrunError, OSError, ValueError) as e:
            os.write(writing, f"{type(e).__name__}: {e}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, "rb") as pipe:
        return pipe.read().decode()


def test_numbers_are_the_kernels() -> None:
    names = {name[7:].lower() for name in dir(resource) if name.startswith("RLIMIT_")} - {"ofile"}
    assert names <= set(RLIMITS)
    for name in names:
        assert RLIMITS[name] == getattr(resource, f"RLIMIT_{name.upper()}")
    assert sorted(RLIMITS.values()) == list(range(16))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nofile=1024", Rlimit("nofile", 1024, 1024)),
        ("nofile=1024:4096", Rlimit("nofile", 1024, 4096)),
        ("NOFILE=5:unlimited", Rlimit("nofile", 5, None)),
        ("RLIMIT_NPROC=7", Rlimit("nproc", 7, 7)),
        ("core=unlimited", Rlimit("core", None, None)),
        ("core=-1", Rlimit("core", None, None)),
        ("core=0:infinity", Rlimit("core", 0, None)),
        ("stack=64M", Rlimit("stack", 64 << 20, 64 << 20)),
        ("as=1.5G:2G", Rlimit("as", 3 << 29, 2 << 30)),
        ("cpu=90", Rlimit("cpu", 90, 90)),
        ("cpu=1h30m", Rlimit("cpu", 5400, 5400)),
        ("cpu=10ms", Rlimit("cpu", 1, 1)),
        ("nice=20", Rlimit("nice", 20, 20)),
    ],
)
def test_parsing(text: str, expected: Rlimit) -> None:
    assert parse_rlimit(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "nofile", "nofile=", "nofile=:5", "nofile=5:", "nofile=x", "nofile=1.5", "nofile=1K", "nofile=-2", "nofile=5:4",
     "nofile=unlimited:5", "files=5", "=5", "nofile=1:2:3", "as=1X", "cpu=1y", f"nofile={2**63}", "nofile=٣", "cpu=²"],
)  # fmt: skip
def test_refusals(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_rlimit(text)
    assert caught.value.message.startswith("--rlimit")
    assert caught.value.hint


@given(st.sampled_from(sorted(RLIMITS)), GIVEN_NUMBERS, GIVEN_NUMBERS)
def test_text_round_trip(name: str, soft: int | None, hard: int | None) -> None:
    if hard is not None and (soft is None or soft > hard):
        soft, hard = hard, soft
    limit = Rlimit(name, soft, hard)
    assert parse_rlimit(str(limit)) == limit


def test_lower_limits_are_always_there() -> None:
    def work() -> object:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits.check([Rlimit("nofile", 10, 20), Rlimit("core", 0, 0)])
        return before == resource.getrlimit(resource.RLIMIT_NOFILE)

    assert in_child(work) == "True", "nothing is lowered by the check"


def test_a_hard_limit_that_cannot_be_raised() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (50, 60))
        if os.geteuid() == 0:
            os.setuid(65534)
        limits.check([Rlimit("nproc", 55, 60)])
        limits.check([Rlimit("nproc", 55, 61)])

    assert in_child(work) == (
        "LimitError: --rlimit nproc=61: the hard limit here is 60, and raising it needs CAP_SYS_RESOURCE"
    )


def test_unlimited_is_more_than_any_hard_limit() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (5, 6))
        if os.geteuid() == 0:
            os.setuid(65534)
        limits.check([Rlimit("nproc", 5, None)])

    assert "--rlimit nproc=unlimited: the hard limit here is 6" in in_child(work)


def test_more_files_than_the_kernel_allows() -> None:
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    for hard in (most + 1, None):
        assert f"this kernel allows at most {most} open files" in in_child(
            lambda h=hard: limits.check([Rlimit("nofile", 5, h)])
        )


def test_apply() -> None:
    def work() -> object:
        limits.apply([Rlimit("nofile", 30, 40), Rlimit("core", 0, 0)])
        return resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE)

    assert in_child(work) == "((30, 40), (0, 0))"


def test_apply_to_another_process() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    limits.apply([Rlimit("nofile", 30, 40)], pid)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (30, 40)
    os.close(writing)
    os.close(reading)
    os.waitpid(pid, 0)


def test_apply_tells_what_it_could_not() -> None:
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    with pytest.raises(LimitError, match="at most"):
        limits.apply([Rlimit("nofile", 5, most + 1)])


def test_oom_score_is_raised_and_never_lowered() -> None:
    path = Path("/proc/self/oom_score_adj")

    def work() -> object:
        limits.raise_oom_score(700)
        first = path.read_text()
        limits.raise_oom_score(300)
        return first + path.read_text()

    assert in_child(work) == "700\n700\n"
