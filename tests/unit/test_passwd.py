"""Users of the image: /etc/passwd and /etc/group as they are and as a hostile image may have them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgrun.errors import SpecError
from imgrun.passwd import LIMIT, User, lookup, read_file, resolve

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
# a comment
broken:x:1
user:x:1000:100:A User:/home/user:/bin/zsh
bare:x:1001:1001:::
huge:x:4294967295:0::/:/bin/sh
negative:x:-1:0::/:/bin/sh
words:x:a:b::/:/bin/sh
1234:x:77:77::/:/bin/sh
root:x:5:5:a second root:/:/bin/sh
"""
GROUP = """\
root:x:0:
users:x:100:user
wheel:x:10:root,user
video:x:44:user,other
broken:x
huge:x:4294967295:user
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text(PASSWD)
    (tmp_path / "root/etc/group").write_text(GROUP)
    return tmp_path / "root"


@pytest.fixture
def root(tree: Path) -> Iterator[int]:
    fd = os.open(tree, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("wanted", "user"),
    [
        ("root", User(0, 0, (10,), "root", "/root", "/bin/bash")),
        ("0", User(0, 0, (10,), "root", "/root", "/bin/bash")),
        ("user", User(1000, 100, (10, 44), "user", "/home/user", "/bin/zsh")),
        ("1000", User(1000, 100, (10, 44), "user", "/home/user", "/bin/zsh")),
        ("bare", User(1001, 1001, (), "bare", "/", "/bin/sh")),
        ("4321", User(4321, 4321, (), "4321", "/", "/bin/sh")),
        ("1234", User(77, 77, (), "1234", "/", "/bin/sh")),
        ("user:video", User(1000, 44, (), "user", "/home/user", "/bin/zsh")),
        ("user:7", User(1000, 7, (), "user", "/home/user", "/bin/zsh")),
        ("4321:4", User(4321, 4, (), "4321", "/", "/bin/sh")),
    ],
)
def test_lookup(root: int, wanted: str, user: User) -> None:
    assert lookup(root, wanted) == user


@pytest.mark.parametrize(
    "wanted",
    ["nobody", "", ":", ":0", "user:none", "broken", "huge", "negative", "words", "-1", "4294967295", "1:4294967295", "٣"],
)
def test_refused(root: int, wanted: str) -> None:
    with pytest.raises(SpecError) as caught:
        lookup(root, wanted)
    assert caught.value.hint


def test_an_image_without_the_files(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert lookup(fd, "root") == User(0, 0, (), "root", "/root", "/bin/sh")
        assert lookup(fd, "7:8").gid == 8
        with pytest.raises(SpecError, match="user"):
            lookup(fd, "user")
    finally:
        os.close(fd)


def test_links_are_followed_inside_the_image_only(tree: Path, root: int) -> None:
    (tree / "etc/passwd").rename(tree / "real")
    (tree / "etc/passwd").symlink_to("/real")
    assert lookup(root, "user").uid == 1000
    outside = tree.parent / "outside"
    outside.write_text("evil:x:1:1::/:/bin/sh\n")
    for target in ("../../outside", str(outside), "/proc/self/root" + str(outside)):
        (tree / "etc/passwd").unlink()
        (tree / "etc/passwd").symlink_to(target)
        with pytest.raises(SpecError):
            lookup(root, "evil")


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "absent"])
def test_what_is_no_file_is_none(tree: Path, root: int, kind: str) -> None:
    path = tree / "etc/passwd"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("passwd")
    assert read_file(root, "etc/passwd") is None
    assert lookup(root, "root").uid == 0


def test_reading_is_bounded(tree: Path, root: int) -> None:
    with (tree / "etc/passwd").open("ab") as f:
        f.truncate(1 << 40)
    text = read_file(root, "etc/passwd")
    assert text is not None
    assert len(text) == LIMIT
    assert lookup(root, "user").uid == 1000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.binary(max_size=200), st.text(max_size=10))
def test_any_content(tree: Path, root: int, passwd: bytes, group: bytes, wanted: str) -> None:
    (tree / "etc/passwd").write_bytes(passwd)
    (tree / "etc/group").write_bytes(group)
    try:
        user = lookup(root, wanted)
    except SpecError:
        return
    assert 0 <= user.uid < 2**32 - 1
    assert 0 <= user.gid < 2**32 - 1


def test_resolve(tree: Path, root: int) -> None:
    (tree / "sbin").mkdir()
    (tree / "sbin/init").symlink_to("/lib/systemd/systemd")
    assert resolve(root, "/sbin/init") is None
    (tree / "lib/systemd").mkdir(parents=True)
    (tree / "lib/systemd/systemd").touch()
    found = resolve(root, "/sbin/init")
    assert found is not None
    assert found.endswith("/lib/systemd/systemd")
