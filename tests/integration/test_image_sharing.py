"""One writer or many readers, in many processes at once, and what happens when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from command import eventually
from leaks import loops_of

from images import KINDS, ROOT_X86_64, WRITABLE_KINDS, Images, Part, build_tree, run, sha256
from imgrun import image
from imgrun.errors import ImageBusy
from imgrun.storage import lock

if os.geteuid() != 0:
    pytest.skip("mounting needs root", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("clean_afterwards")

fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(images: Images, tmp_path: Path) -> Path:
    return images.copy(images.filesystem("ext4"), tmp_path / "image")


class Holder:
    """Another process that holds an image, mounted, until it is told to let go, or killed."""

    def __init__(self, path: Path, access: image.Access, *, gate: float = 0, **options: Any) -> None:
        self._here, there = fork.Pipe()
        self.process: BaseProcess = fork.Process(target=self._hold, args=(there, str(path), access, gate, options))
        self.process.start()
        self.pid = self.process.pid or 0
        there.close()
        self.answer: Any = None

    @staticmethod
    def _hold(pipe: Connection, path: str, access: image.Access, gate: float, options: dict[str, Any]) -> None:
        time.sleep(max(gate - time.monotonic(), 0))
        try:
            with image.open_image(path, access, **options) as held:
                root = held.mount()
                fd = os.open("etc/motd", os.O_RDONLY, dir_fd=root)
                text = os.read(fd, 100)
                os.close(fd)
                pipe.send((held.device.number if held.device else None, text))
                pipe.recv()
                os.close(root)
            pipe.send("closed")
        except ImageBusy as e:
            pipe.send(e.message)

    def ready(self) -> Any:
        assert self._here.poll(30)
        self.answer = self._here.recv()
        return self.answer

    def release(self) -> None:
        self._here.send("close")
        assert self._here.recv() == "closed"
        self.join()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.join()

    def join(self) -> None:
        self.process.join()
        self.process.close()
        self._here.close()


# -- sharing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_many_readers_share_one_loop_device(images: Images, kind: str) -> None:
    path = images.filesystem(kind)
    before = sha256(path)
    gate = time.monotonic() + 0.5
    holders = [Holder(path, "overlay" if i % 2 else "read-only", gate=gate) for i in range(16)]
    answers = [holder.ready() for holder in holders]
    assert len({number for number, _ in answers}) == 1, answers
    assert {text for _, text in answers} == {b"of the image\n"}
    assert len(loops_of(path)) == 1
    for holder in holders:
        holder.release()
    eventually(lambda: not loops_of(path))
    assert sha256(path) == before


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "squashfs"])
def test_coming_and_going_all_the_time(images: Images, kind: str) -> None:
    """The first and the last user of a device meet: it is freed under the nose of the next."""
    path = str(images.filesystem(kind))

    def come_and_go(failures: Any) -> None:
        try:
            for _ in range(40):
                with image.open_image(path, "overlay") as held:
                    root = held.mount()
                    os.close(os.open("etc/motd", os.O_RDONLY, dir_fd=root))
                    os.close(root)
        except BaseException as e:  # noqa: BLE001 - told to the parent
            failures.put(repr(e))

    failures = fork.SimpleQueue()
    workers = [fork.Process(target=come_and_go, args=(failures,)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    told = [] if failures.empty() else [failures.get()]
    failures.close()
    assert told == []
    assert [worker.exitcode for worker in workers] == [0] * 6
    for worker in workers:
        worker.close()


def test_partitions_of_one_disk_have_devices_of_their_own(images: Images) -> None:
    root = images.filesystem("ext4")
    path = str(images.disk(Part(ROOT_X86_64, root), Part(ROOT_X86_64, root)))
    with (
        image.open_image(path, "overlay", "1") as one,
        image.open_image(path, "overlay", "2") as two,
        image.open_image(path, "overlay", "2") as again,
    ):
        assert one.device is not None
        assert two.device is not None
        assert again.device is not None
        assert one.device.number != two.device.number
        assert two.device.number == again.device.number


@pytest.mark.parametrize("kind", WRITABLE_KINDS)
def test_copies_are_used_at_the_same_time(images: Images, kind: str, tmp_path: Path) -> None:
    """They have the same UUID, which xfs and btrfs object to."""
    one = images.copy(images.filesystem(kind), tmp_path / "one")
    two = images.copy(images.filesystem(kind), tmp_path / "two")
    accesses: list[tuple[image.Access, image.Access]] = [("overlay", "overlay"), ("writable", "overlay")]
    for first, second in accesses:
        with image.open_image(str(one), first) as a, image.open_image(str(two), second) as b:
            roots = [a.mount(), b.mount()]
            if first == "writable":
                os.mkdir("only-in-one", dir_fd=roots[0])
                assert "only-in-one" not in os.listdir(reopened(roots[1]))
            for fd in roots:
                os.close(fd)


def reopened(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def test_a_read_only_device_of_another_tool_is_shared(path: Path) -> None:
    device = run("losetup", "--find", "--show", "--read-only", path).strip()
    try:
        with image.open_image(str(path), "overlay") as held:
            assert held.device is not None
            assert f"/dev/loop{held.device.number}" == device
            os.close(held.mount())
    finally:
        run("losetup", "-d", device)


# -- excluding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["overlay", "read-only", "writable"])
def test_a_writer_excludes_all_others(path: Path, second: image.Access) -> None:
    holder = Holder(path, "writable")
    holder.ready()
    with pytest.raises(ImageBusy, match=f"in use by process {holder.pid}") as caught:
        image.open_image(str(path), second, wait=0)
    assert caught.value.hint
    holder.release()
    image.open_image(str(path), second).close()


def test_readers_exclude_a_writer(path: Path) -> None:
    holders = [Holder(path, "overlay"), Holder(path, "read-only")]
    for holder in holders:
        holder.ready()
    pids = sorted(holder.pid for holder in holders)
    with pytest.raises(ImageBusy, match=f"in use by process {pids[0]}, {pids[1]}, and writing"):
        image.open_image(str(path), "writable", wait=0)
    holders[0].release()
    with pytest.raises(ImageBusy):
        image.open_image(str(path), "writable", wait=0)
    holders[1].release()
    image.open_image(str(path), "writable").close()


def test_one_of_many_writers_wins(path: Path) -> None:
    gate = time.monotonic() + 0.5
    holders = [Holder(path, "writable", gate=gate, wait=0) for _ in range(8)]
    answers = [holder.ready() for holder in holders]
    winners = [holder for holder, answer in zip(holders, answers, strict=True) if not isinstance(answer, str)]
    assert len(winners) == 1, answers
    winners[0].release()
    for holder in holders:
        if holder is not winners[0]:
            holder.join()


def test_the_lock_is_the_files_and_not_the_names(path: Path, tmp_path: Path) -> None:
    holder = Holder(path, "writable")
    holder.ready()
    os.link(path, tmp_path / "other name")
    path.rename(tmp_path / "renamed")
    for name in ("other name", "renamed"):
        with pytest.raises(ImageBusy):
            image.open_image(str(tmp_path / name), "overlay", wait=0)
    holder.release()


def test_a_directory_is_locked_alike(tmp_path: Path) -> None:
    tree = build_tree(tmp_path / "tree")
    holder = Holder(tree, "overlay")
    holder.ready()
    image.open_image(str(tree), "overlay", wait=0).close()
    with pytest.raises(ImageBusy, match=f"process {holder.pid}"):
        image.open_image(str(tree), "writable", wait=0)
    holder.release()
    image.open_image(str(tree), "writable", wait=0).close()


@pytest.mark.parametrize("access", ["overlay", "read-only", "writable"])
def test_a_writer_outside_imgrun_is_seen(path: Path, tmp_path: Path, access: image.Access) -> None:
    point = tmp_path / "point"
    point.mkdir()
    run("mount", "-o", "loop", path, point)
    try:
        (device,) = loops_of(path)
        with pytest.raises(ImageBusy, match=f"attached for writing to /dev/{device}"):
            image.open_image(str(path), access, wait=0)
    finally:
        run("umount", point)
    image.open_image(str(path), access).close()


def test_a_reader_outside_imgrun_excludes_a_writer(path: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    run("mount", "-o", "loop,ro", path, point)
    try:
        image.open_image(str(path), "overlay").close()
        with pytest.raises(ImageBusy, match="attached read-only to /dev/loop"):
            image.open_image(str(path), "writable", wait=0)
    finally:
        run("umount", point)


def test_waiting_ends(path: Path) -> None:
    holder = Holder(path, "writable")
    holder.ready()
    start = time.monotonic()
    with pytest.raises(ImageBusy):
        image.open_image(str(path), "overlay", wait=0.3)
    assert time.monotonic() - start >= 0.3
    holder.release()


# -- killed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITABLE_KINDS)
def test_a_killed_writer_lets_go_and_leaves_a_clean_image(images: Images, kind: str, tmp_path: Path) -> None:
    path = images.copy(images.filesystem(kind), tmp_path / "image")
    holder = Holder(path, "writable")
    holder.ready()
    holder.kill()
    with image.open_image(str(path), "overlay", wait=60) as held:
        assert held.warnings == []
        os.close(held.mount())


def test_what_a_killed_writer_leaves_for_a_moment_is_waited_for(path: Path) -> None:
    """Its mount lives on in another process, as in a job's mount namespace that the kernel is still taking down."""
    reader, writer = os.pipe()
    until, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        held = image.open_image(str(path), "writable")
        root = held.mount()
        if os.fork() == 0:
            os.close(held.lock_fd)
            assert held.device is not None
            os.close(held.device.fd)
            os.write(writer, b"x")
            os.read(until, 1)
            os.close(root)
            os._exit(0)
        time.sleep(60)
        os._exit(1)
    for fd in (writer, until):
        os.close(fd)
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    gone = threading.Timer(0.3, os.close, (go,))
    try:
        with pytest.raises(ImageBusy, match="is in use, still attached to /dev/loop"):
            image.open_image(str(path), "writable", wait=0)
        start = time.monotonic()
    finally:
        gone.start()
    image.open_image(str(path), "writable", wait=60).close()
    assert time.monotonic() - start >= 0.3
    gone.join()


def test_a_lock_is_not_shared_with_what_the_holder_starts(path: Path) -> None:
    with image.open_image(str(path), "writable") as held:
        child = subprocess.Popen(["sleep", "30"])
        os.close(held.mount())
    try:
        image.open_image(str(path), "overlay", wait=0).close()
    finally:
        child.kill()
        child.wait()


def test_holders_are_found(path: Path) -> None:
    holder = Holder(path, "overlay")
    holder.ready()
    fd = os.open(path, os.O_RDONLY)
    assert lock.holders(fd) == [holder.pid]
    holder.release()
    assert lock.holders(fd) == []
    os.close(fd)
