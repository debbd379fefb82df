"""The job's scratch: a plain directory, and one with a size."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import in_child

from images import Images
from imgrun import image
from imgrun import syscalls as sc
from imgrun.errors import HostError, NoSpace, SpecError
from imgrun.storage import scratch as module
from imgrun.storage.scratch import Scratch

if os.geteuid() != 0:
    pytest.skip("mounting needs root", allow_module_level=True)

MIB = 1 << 20
SIZES = [None, 64 * MIB]


pytestmark = pytest.mark.usefixtures("clean_afterwards")


@pytest.fixture(autouse=True)
def no_children() -> Iterator[None]:
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture(params=SIZES, ids=["plain", "sized"])
def scratch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scratch]:
    made = Scratch.create(str(tmp_path / "scratch"), request.param)
    yield made
    made.remove()
    assert not (tmp_path / "scratch").exists()


def fill(root: int, name: str, size: int) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=root)
    try:
        left = size
        while left:
            left -= os.write(fd, b"x" * min(left, 64 << 10))
        os.fsync(fd)
    finally:
        os.close(fd)


def test_what_is_in_it(scratch: Scratch, tmp_path: Path) -> None:
    root = scratch.mount()
    modes = {name: os.stat(name, dir_fd=root) for name in ("upper", "work", "tmp", "var-tmp")}
    assert {name: oct(s.st_mode & 0o7777) for name, s in modes.items()} == {
        "upper": "0o755", "work": "0o755", "tmp": "0o1777", "var-tmp": "0o1777",
    }  # fmt: skip
    assert all(s.st_uid == s.st_gid == 0 for s in modes.values())
    assert (tmp_path / "scratch").stat().st_mode & 0o7777 == 0o700
    os.mknod("tmp/null", 0o020666, os.makedev(1, 3), dir_fd=root)
    with pytest.raises(PermissionError):
        os.open("tmp/null", os.O_RDONLY, dir_fd=root)
    os.close(root)


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        made = Scratch.create(str(tmp_path / "scratch"))
    finally:
        os.umask(old)
    assert (tmp_path / "scratch/tmp").stat().st_mode & 0o7777 == 0o1777
    made.remove()


def test_mounted_twice_it_is_the_same(scratch: Scratch) -> None:
    one, two = scratch.mount(), scratch.mount()
    fill(one, "upper/file", 10)
    assert os.stat("upper/file", dir_fd=two).st_size == 10
    os.close(one)
    os.close(two)


def test_used_counts_what_the_job_wrote(scratch: Scratch) -> None:
    root = scratch.mount()
    assert scratch.used() == 0
    fill(root, "upper/file", 5 * MIB)
    used = scratch.used()
    assert used is not None
    assert 5 * MIB <= used < 6 * MIB
    os.unlink("upper/file", dir_fd=root)
    os.close(root)
    assert scratch.used() == 0


def test_an_overlay_works_on_it(scratch: Scratch, images: Images) -> None:
    """Lower, upper and work from detached mounts; checked in a mount namespace of its own."""
    with image.open_image(str(images.filesystem("erofs")), "overlay") as held:
        lower, upper = held.mount(), scratch.mount()

        def inside() -> None:
            for name in ("/tmp", "/mnt"):
                subprocess.run(["mount", "-t", "tmpfs", "none", name], check=True)
            for name in ("lower", "scratch"):
                os.mkdir(f"/mnt/{name}")
            sc.move_mount(lower, "/mnt/lower")
            sc.move_mount(upper, "/mnt/scratch")
            options = "lowerdir=/mnt/lower,upperdir=/mnt/scratch/upper,workdir=/mnt/scratch/work,userxattr,xino=on"
            subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", "/tmp"], check=True)
            Path("/tmp/etc/motd").write_text("changed")
            Path("/tmp/usr/lib/os-release").unlink()

        in_child(inside, flags=sc.CLONE_NEWNS)
        os.close(lower)
    assert os.stat("upper/etc/motd", dir_fd=upper).st_size == len("changed")
    os.close(upper)


@pytest.mark.parametrize("size", [MIB, 3 * MIB + 1234, 16 * MIB, 100 * MIB, 20 << 30])
def test_any_size_works_and_holds(tmp_path: Path, size: int) -> None:
    made = Scratch.create(str(tmp_path / "scratch"), size)
    root = made.mount()
    file = (tmp_path / "scratch/scratch.img").stat()
    assert size - 4096 < file.st_size <= size
    assert file.st_blocks * 512 < 2 * MIB
    if size <= 100 * MIB:
        with pytest.raises(OSError) as caught:
            fill(root, "tmp/file", size)
        assert caught.value.errno == errno.ENOSPC
        assert os.stat("tmp/file", dir_fd=root).st_size > size * 0.6
        os.unlink("tmp/file", dir_fd=root)
        fill(root, "tmp/again", size // 2)
        assert (tmp_path / "scratch/scratch.img").stat().st_blocks * 512 <= size
    os.close(root)
    made.remove()


def test_what_it_holds_is_sound(tmp_path: Path) -> None:
    made = Scratch.create(str(tmp_path / "scratch"), 64 * MIB)
    root = made.mount()
    for i in range(300):
        fill(root, f"upper/{i}", 1000)
    os.setxattr(f"/proc/self/fd/{root}/upper/1", "user.test", b"x" * 100)
    os.close(root)
    made.close()
    file = tmp_path / "scratch/scratch.img"
    checked = subprocess.run(["e2fsck", "-fn", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    features = subprocess.run(["dumpe2fs", "-h", file], capture_output=True, text=True, check=True).stdout
    assert "has_journal" not in features
    file.unlink()


@pytest.mark.parametrize("size", [0, 4096, MIB - 1])
def test_too_small_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(SpecError, match="too small"):
        Scratch.create(str(tmp_path / "scratch"), size)
    assert not (tmp_path / "scratch").exists()


def test_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="does not fit") as caught:
        Scratch.create(str(tmp_path / "scratch"), 1 << 50)
    assert "--scratch-size" in (caught.value.hint or "")
    assert not (tmp_path / "scratch").exists()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be made: No such file"):
        Scratch.create(str(tmp_path / "missing/scratch"))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(HostError, match="cannot be made: File exists"):
        Scratch.create(str(tmp_path / "scratch"))


def test_closed_while_its_file_system_is_being_made(tmp_path: Path) -> None:
    for _ in range(5):
        made = Scratch.create(str(tmp_path / "scratch"), 10 << 30)
        made.remove()
        assert not (tmp_path / "scratch").exists()


def test_mke2fs_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MKE2FS", ("/nowhere/mke2fs",))
    with pytest.raises(HostError, match="mke2fs is missing") as caught:
        Scratch.create(str(tmp_path / "scratch"), 8 * MIB)
    assert "e2fsprogs" in (caught.value.hint or "")
    monkeypatch.setattr(module, "MKE2FS", ("/usr/sbin/mke2fs",))
    monkeypatch.setattr(module, "FORMAT", ("-q", "-O", "no_such_feature"))
    made = Scratch.create(str(tmp_path / "scratch"), 8 * MIB)
    with pytest.raises(HostError, match=r"mke2fs failed: .*no_such_feature"):
        made.mount()
    made.remove()


def small_host(tmp_path: Path, function: Callable[[Path], None]) -> None:
    """Run in a child that has a host disk of 24 MiB."""

    def inside() -> None:
        signal.alarm(60)  # instead of a hang
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", tmp_path], check=True)
        function(tmp_path)

    in_child(inside, flags=sc.CLONE_NEWNS)


def test_a_full_host_is_told_at_once(tmp_path: Path) -> None:
    def inside(disk: Path) -> None:
        with pytest.raises(NoSpace, match="does not fit"):
            Scratch.create(str(disk / "scratch"), 32 * MIB)
        with (disk / "filler").open("wb", buffering=0) as f:
            f.write(b"x" * (32 * MIB))
            with pytest.raises(OSError, match="No space"):
                f.write(b"x" * MIB)
        with pytest.raises(NoSpace):
            Scratch.create(str(disk / "scratch"), 16 * MIB)

    small_host(tmp_path, inside)


def test_a_host_that_fills_up_gives_an_error_and_no_hang(tmp_path: Path) -> None:
    """Others may take the space that was free: the job's writes then fail, and everything can still be undone."""

    def inside(disk: Path) -> None:
        made = Scratch.create(str(disk / "scratch"), 20 * MIB)
        root = made.mount()
        (disk / "filler").write_bytes(b"x" * (16 * MIB))
        with pytest.raises(OSError) as caught:
            fill(root, "tmp/file", 18 * MIB)
        assert caught.value.errno in (errno.EIO, errno.ENOSPC, errno.EROFS)
        os.close(root)
        made.remove()
        assert os.listdir(disk) == ["filler"]

    small_host(tmp_path, inside)


def test_a_killed_owner_leaves_only_its_directory(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        made = Scratch.create(str(tmp_path / "scratch"), 64 * MIB)
        fill(made.mount(), "tmp/file", MIB)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert (tmp_path / "scratch/scratch.img").exists()
