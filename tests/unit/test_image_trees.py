"""Removing and measuring trees that a job has filled, and trying again what lost a race."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imgrun.errors import HostError
from imgrun.storage.retry import attempt
from imgrun.storage.trees import disk_usage, remove_tree


def usage(path: Path, **limits: float) -> int | None:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        return disk_usage(fd, **limits)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def deep_tree(path: Path, depth: int) -> None:
    """Directories nested deeper than a path can name, with a file at the bottom."""
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_remove_what_a_job_may_leave(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    (tree / "a/b/file").write_text("x")
    (tree / "a/link").symlink_to(outside)
    (tree / "link").symlink_to(outside / "keep")
    (tree / "a/dangling").symlink_to("nowhere")
    os.mkfifo(tree / "a/b/c/pipe")
    (tree / "a/b/closed").mkdir()
    (tree / "a/b/closed/x").mkdir()
    (tree / "a/b/closed/x/y").write_text("x")
    (tree / "a/b/closed").chmod(0)
    remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "keep").read_text() == "x"


def test_remove_what_is_nested_deeper_than_any_path_or_stack(tmp_path: Path) -> None:
    deep_tree(tmp_path / "tree", 6000)
    remove_tree(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_remove_needs_few_descriptors(tmp_path: Path) -> None:
    deep_tree(tmp_path / "tree", 2000)
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "from imgrun.storage.trees import remove_tree\nremove_tree(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "tree")], check=True)
    assert not (tmp_path / "tree").exists()


def test_remove_of_nothing_and_of_a_link(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "none"))
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    remove_tree(str(tmp_path / "link"))
    assert (tmp_path / "target").is_dir()
    assert not (tmp_path / "link").is_symlink()


def test_what_cannot_be_removed_is_told() -> None:
    with pytest.raises(HostError, match="could not remove /proc/self"):
        remove_tree("/proc/self/task")


def test_usage_counts_blocks_and_each_file_once(tmp_path: Path) -> None:
    before = usage(tmp_path)
    assert before == 0
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    once = usage(tmp_path)
    assert once is not None
    assert 100_000 <= once <= 110_000
    os.link(tmp_path / "file", tmp_path / "again")
    (tmp_path / "link").symlink_to("/usr")
    assert usage(tmp_path) == once
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(1 << 40)
    assert usage(tmp_path) == once


def test_usage_is_unknown_beyond_its_bounds(tmp_path: Path) -> None:
    for i in range(600):
        (tmp_path / str(i)).touch()
    assert usage(tmp_path, entries=100) is None
    assert usage(tmp_path, seconds=-1) is None
    assert usage(tmp_path) is not None
    deep_tree(tmp_path / "deep", 300)
    assert usage(tmp_path) is None
    assert len(os.listdir("/proc/self/fd")) < 100
    remove_tree(str(tmp_path / "deep"))


def test_a_race_is_tried_again_until_it_is_won() -> None:
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise BlockingIOError
        return "won"

    assert attempt(flaky, lambda e: isinstance(e, BlockingIOError), 5) == "won"
    assert len(calls) == 4


def test_another_failure_is_not_tried_again() -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        raise PermissionError

    with pytest.raises(PermissionError):
        attempt(broken, lambda e: isinstance(e, BlockingIOError), 5)
    assert len(calls) == 1


def test_trying_again_ends_with_the_last_failure() -> None:
    def busy() -> None:
        raise BlockingIOError("still")

    start = time.monotonic()
    with pytest.raises(BlockingIOError, match="still"):
        attempt(busy, lambda e: isinstance(e, BlockingIOError), 0.2)
    assert time.monotonic() - start >= 0.2


def test_the_first_try_imports_nothing() -> None:
    code = (
        "import sys\nfrom imgrun.storage.retry import attempt\nattempt(int, lambda e: True, 5)\n"
        "sys.exit('tenacity' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
