"""Images mounted for real: what a job sees, that the image stays as it was, and that nothing is left."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from command import eventually
from forked import in_child
from leaks import loops_of

from images import (
    ESP,
    KINDS,
    LINUX_DATA,
    MIB,
    ROOT_X86_64,
    SWAP,
    WRITABLE_KINDS,
    Images,
    Part,
    build_tree,
    elf_header,
    make_disk,
    make_filesystem,
    run,
    sha256,
)
from imgrun import image
from imgrun import syscalls as sc
from imgrun.errors import (
    HostError,
    ImageArchError,
    ImageBusy,
    ImageDamaged,
    ImageError,
    ImageFormatError,
    ImageMissing,
    ImgrunError,
    NoSpace,
    PartitionError,
    PrivilegeError,
)
from imgrun.storage import loop

if os.geteuid() != 0:
    pytest.skip("mounting needs root", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("clean_afterwards")


class Root:
    """A mounted root, read and written through its descriptor."""

    def __init__(self, held: image.Image) -> None:
        self.fd = held.mount()

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY, dir_fd=self.fd)
        with open(fd) as f:
            return f.read()

    def write(self, path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, dir_fd=self.fd)
        with open(fd, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(fd)

    def options(self) -> set[str]:
        with open(f"/proc/self/fdinfo/{self.fd}") as f:
            assert "mnt_id" in f.read()
        return mount_flags(self.fd)


def mount_flags(fd: int) -> set[str]:
    flags = os.fstatvfs(fd).f_flag
    names = {os.ST_RDONLY: "ro", os.ST_NODEV: "nodev", os.ST_NOSUID: "nosuid"}
    return {name for bit, name in names.items() if flags & bit}


# -- all formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["overlay", "read-only"])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_never_changes_the_image(images: Images, kind: str, access: image.Access) -> None:
    path = images.filesystem(kind)
    before, changed = sha256(path), path.stat().st_mtime_ns
    with image.open_image(str(path), access) as held:
        assert held.warnings == []
        with Root(held) as root:
            assert root.read("etc/motd") == "of the image\n"
            assert root.options() == {"ro", "nodev"}
            with pytest.raises(OSError, match="Read-only"):
                root.write("etc/new", "x")
            found = image.identify(root.fd)
            assert (found.id, found.architectures) == ("testos", (os.uname().machine,))
    assert sha256(path) == before
    assert path.stat().st_mtime_ns == changed


@pytest.mark.parametrize("kind", WRITABLE_KINDS)
def test_writing_goes_into_the_image(images: Images, kind: str, tmp_path: Path) -> None:
    path = images.copy(images.filesystem(kind), tmp_path / "image")
    with image.open_image(str(path), "writable") as held, Root(held) as root:
        assert root.options() == {"nodev"}
        root.write("etc/new", "kept\n")
    assert not loops_of(tmp_path), "a closed image is written out and free"
    assert image.probe(str(path)).unclean == ""
    with image.open_image(str(path), "read-only") as held, Root(held) as root:
        assert root.read("etc/new") == "kept\n"


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_what_cannot_be_written_is_refused_for_writing(images: Images, kind: str) -> None:
    with pytest.raises(ImageFormatError, match=f"is {kind}, which cannot be written to"):
        image.open_image(str(images.filesystem(kind)), "writable")


def test_an_image_on_tmpfs(images: Images) -> None:
    path = images.copy(images.filesystem("ext4"), Path(f"/dev/shm/imgrun-test-{os.getpid()}"))
    try:
        with image.open_image(str(path), "overlay") as held, Root(held) as root:
            assert root.read("etc/motd") == "of the image\n"
    finally:
        path.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_mounts_can_be_mapped_to_other_ids(images: Images, kind: str) -> None:
    """The point of a mount that was never attached: image uid 0 is another uid outside."""
    with image.open_image(str(images.filesystem(kind)), "overlay") as held, Root(held) as root:
        sleeper = subprocess.Popen(["unshare", "--user", "sleep", "60"])
        try:
            maps = Path(f"/proc/{sleeper.pid}/uid_map")
            namespace = f"/proc/{sleeper.pid}/ns/user"
            eventually(lambda: os.readlink(namespace) != os.readlink("/proc/self/ns/user"))
            maps.write_text("0 300000 65536")
            Path(f"/proc/{sleeper.pid}/gid_map").write_text("0 300000 65536")
            userns = os.open(namespace, os.O_RDONLY)
            sc.mount_setattr(root.fd, set=sc.MOUNT_ATTR_IDMAP, userns_fd=userns)
            os.close(userns)
            assert os.stat("etc/motd", dir_fd=root.fd).st_uid == 300000
        finally:
            sleeper.kill()
            sleeper.wait()


def test_devices_of_the_image_do_not_work(tmp_path: Path, images: Images) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for path in (make_filesystem("ext4", tmp_path / "image", tree), tree):
        with image.open_image(str(path), "overlay") as held, Root(held) as root, pytest.raises(PermissionError):
            os.open("null", os.O_RDONLY, dir_fd=root.fd)


# -- partitions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_the_root_partition_of_a_gpt_disk(images: Images, kind: str, sector_size: int, tmp_path: Path) -> None:
    parts = [Part(ESP, size=MIB), Part(ROOT_X86_64, images.filesystem(kind))]
    path = make_disk(tmp_path / "disk", parts, sector_size=sector_size)
    before = sha256(path)
    with image.open_image(str(path), "overlay") as held, Root(held) as root:
        assert held.info.partition == 2
        assert root.read("etc/motd") == "of the image\n"
    assert sha256(path) == before


@pytest.mark.parametrize("table", ["gpt", "dos"])
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_contents_decide_where_types_do_not(images: Images, table: str, sector_size: int) -> None:
    parts = (Part(SWAP, size=MIB), Part(LINUX_DATA, images.data()), Part(LINUX_DATA, images.filesystem("ext4")))
    path = images.disk(*parts, table=table, sector_size=sector_size)
    assert image.probe(str(path)).needs_mount_probe
    before = sha256(path)
    with image.open_image(str(path), "read-only") as held, Root(held) as root:
        assert held.info.partition == 3
        assert not held.info.needs_mount_probe
        assert root.read("etc/motd") == "of the image\n"
    assert sha256(path) == before


def test_contents_that_do_not_decide_are_refused_and_listed(images: Images) -> None:
    two = images.disk(Part(LINUX_DATA, images.filesystem("ext4")), Part(LINUX_DATA, images.filesystem("squashfs")))
    with pytest.raises(PartitionError, match="2 partitions that hold an operating system, 1 and 2") as caught:
        image.open_image(str(two), "overlay")
    assert "1 32 MiB ext4; 2 1 MiB squashfs" in (caught.value.hint or "")
    none = images.disk(Part(LINUX_DATA, images.data()), Part(LINUX_DATA, images.data()))
    with pytest.raises(PartitionError, match="no partition that holds a root file system") as caught:
        image.open_image(str(none), "overlay")
    assert "1 'notes' 4 MiB ext4; 2 'notes' 4 MiB ext4" in (caught.value.hint or "")


def test_the_user_decides_first(images: Images) -> None:
    path = images.disk(Part(ROOT_X86_64, images.filesystem("ext4")), Part(LINUX_DATA, images.data()))
    with image.open_image(str(path), "overlay", "notes") as held, Root(held) as root:
        assert root.read("notes") == "nothing to run here\n"


def test_writing_into_a_partition_leaves_the_rest(images: Images, tmp_path: Path) -> None:
    data = images.data()
    parts = [Part(LINUX_DATA, data), Part(ROOT_X86_64, images.filesystem("ext4")), Part(LINUX_DATA, data)]
    path = make_disk(tmp_path / "disk", parts)
    with image.open_image(str(path), "writable") as held:
        offset, size = held.info.offset, held.info.size
        with Root(held) as root:
            root.write("etc/new", "x" * 100_000)
    with path.open("rb") as f:
        before = f.read(offset)
        f.seek(offset + size)
        after = f.read()
    fresh = make_disk(tmp_path / "fresh", parts)
    with fresh.open("rb") as f:
        original = f.read(offset)
        f.seek(offset + size)
        assert f.read(len(after) - MIB) == after[:-MIB]
    # The table holds random ids; what follows it does not.
    assert before[MIB:] == original[MIB:]


def test_a_root_in_a_subvolume(images: Images, tmp_path: Path) -> None:
    """As Fedora installs it: the top level of a btrfs holds ``root`` and ``home``."""
    path = make_filesystem("btrfs", tmp_path / "image", None)
    point = tmp_path / "point"
    point.mkdir()
    run("mount", "-o", "loop", path, point)
    try:
        run("btrfs", "subvolume", "create", point / "root")
        run("cp", "-a", f"{images.tree()}/.", point / "root")
    finally:
        run("umount", point)
    with image.open_image(str(path), "overlay") as held, Root(held) as root:
        assert root.read("etc/motd") == "of the image\n"


# -- unclean --------------------------------------------------------------------------------------------------------------


def crashed(source: Path, path: Path) -> Path:
    """The state of an image whose writer lost power: a copy taken while it is mounted and has written."""
    point = path.with_name("point")
    point.mkdir()
    work = path.with_name("work")
    with source.open("rb") as f, work.open("wb") as g:
        g.write(f.read())
    run("mount", "-o", "loop", work, point)
    try:
        for i in range(20):
            (point / f"new{i}").write_text("in place")
        # The last changes are only in the journal (ext, xfs) or the log tree (btrfs, which puts the first in place).
        fd = os.open(point / "new0", os.O_RDWR)
        for _ in range(3):
            run("sync", "-f", point)
            os.pwrite(fd, b"x" * 5000, 0)
            os.fsync(fd)
        os.close(fd)
        path.write_bytes(work.read_bytes())
    finally:
        run("umount", point)
    point.rmdir()
    work.unlink()
    return path


@pytest.mark.parametrize("access", ["overlay", "read-only"])
@pytest.mark.parametrize("kind", ["ext3", "ext4", "xfs", "btrfs"])
def test_a_journal_is_never_replayed_for_reading(images: Images, kind: str, access: image.Access, tmp_path: Path) -> None:
    path = crashed(images.filesystem(kind), tmp_path / "image")
    before = sha256(path)
    with pytest.raises(ImageDamaged) as caught, image.open_image(str(path), access) as held:
        os.close(held.mount())
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert sha256(path) == before


@pytest.mark.parametrize("kind", ["ext3", "ext4", "xfs", "btrfs"])
def test_a_journal_is_replayed_for_writing_and_that_is_said(images: Images, kind: str, tmp_path: Path) -> None:
    path = crashed(images.filesystem(kind), tmp_path / "image")
    with image.open_image(str(path), "writable") as held, Root(held) as root:
        assert root.read("new0") == "x" * 5000
        # Only a mount shows an xfs journal's state.
        assert len(held.warnings) == (0 if kind == "xfs" else 1)
    with image.open_image(str(path), "overlay") as held, Root(held) as root:
        assert root.read("new0") == "x" * 5000


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("partition", [False, True])
def test_the_hint_repairs_it(images: Images, kind: str, partition: bool, tmp_path: Path) -> None:
    path = crashed(images.filesystem(kind), tmp_path / "image")
    if partition:
        path = make_disk(tmp_path / "disk", [Part(ESP, size=MIB), Part(ROOT_X86_64, path)])
    with pytest.raises(ImageDamaged) as caught, image.open_image(str(path), "overlay") as held:
        os.close(held.mount())
    command, _, last = (caught.value.hint or "").partition(": ")[2].partition("; if that fails, ")
    assert not last or shutil.which(last.split()[0], path=os.defpath + ":/usr/sbin:/sbin"), last
    point = tmp_path / "mnt"
    point.mkdir()
    done = subprocess.run(["sh", "-c", command.replace("/mnt", str(point))], capture_output=True, text=True, check=False)
    # e2fsck says with 1 that it has repaired.
    assert done.returncode in (0, 1 if kind == "ext4" else 0), f"{command}: {done.stdout}{done.stderr}"
    with image.open_image(str(path), "overlay") as held, Root(held) as root:
        assert root.read("new0") == "x" * 5000


@pytest.mark.parametrize("state", [0, 2])
@pytest.mark.parametrize("access", ["overlay", "writable"])
def test_an_ext_file_system_that_needs_checking_is_refused(
    images: Images, state: int, access: image.Access, tmp_path: Path
) -> None:
    path = images.copy(images.filesystem("ext2"), tmp_path / "image")
    run("debugfs", "-w", "-R", f"ssv state {state}", path)
    with pytest.raises(ImageDamaged, match="is not clean") as caught:
        image.open_image(str(path), access)
    command = (caught.value.hint or "").partition(": ")[2]
    assert subprocess.run([*shlex.split(command), "-y"], capture_output=True, check=False).returncode in (0, 1)
    image.open_image(str(path), access).close()


def test_contents_are_found_behind_an_unclean_journal_and_then_refused(images: Images, tmp_path: Path) -> None:
    broken = crashed(images.filesystem("ext4"), tmp_path / "image")
    path = make_disk(tmp_path / "disk", [Part(LINUX_DATA, images.data()), Part(LINUX_DATA, broken)], table="dos")
    with pytest.raises(ImageDamaged, match=r"partition 2 of .* is not clean"):
        image.open_image(str(path), "overlay")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "squashfs"])
def test_damage_that_only_the_kernel_sees_is_told(images: Images, kind: str, tmp_path: Path) -> None:
    path = images.copy(images.filesystem(kind), tmp_path / "image")
    size = path.stat().st_size
    with path.open("r+b") as f:
        # All but the superblock's own block is noise.
        for start, end in ((4096, 60 << 10), ((68 << 10), size)):
            f.seek(start)
            for _ in range(start, min(end, size), MIB):
                f.write(b"\xa5" * min(MIB, min(end, size) - f.tell()))
    before = sha256(path)
    try:
        info = image.probe(str(path))
        assert info.fstype == kind
    except ImageError:
        return
    with pytest.raises((ImageDamaged, ImageFormatError)) as caught, image.open_image(str(path), "overlay") as held:
        os.close(held.mount())
    assert kind in caught.value.message
    assert sha256(path) == before


# -- other refusals -------------------------------------------------------------------------------------------------------


def test_a_file_system_that_this_kernel_lacks_is_named(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgrun.storage import superblock

    monkeypatch.setitem(superblock.DRIVERS, "ext4", "ext4")
    path = str(images.filesystem("erofs"))
    monkeypatch.setitem(superblock.DRIVERS, "erofs", "erofs")
    with image.open_image(path, "overlay") as held:
        monkeypatch.setitem(superblock.DRIVERS, "erofs", "reiser5")
        with pytest.raises(ImageFormatError, match="is reiser5, which this kernel cannot mount") as caught:
            held.mount()
    assert "modprobe reiser5" in (caught.value.hint or "")


def test_wrong_architecture(tmp_path: Path) -> None:
    foreign = 183 if os.uname().machine != "aarch64" else 62
    tree = build_tree(tmp_path / "tree", program=elf_header(foreign))
    path = make_filesystem("ext4", tmp_path / "image", tree)
    with image.open_image(str(path), "overlay") as held, Root(held) as root, pytest.raises(ImageArchError):
        image.check_architecture(image.identify(root.fd))


def test_a_block_device_is_refused() -> None:
    with pytest.raises(ImageMissing, match="is a block device"):
        image.open_image("/dev/loop0", "overlay")


def test_a_read_only_place_cannot_be_written_to(images: Images, tmp_path: Path) -> None:
    def inside() -> None:
        subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", tmp_path], check=True)
        image.open_image(str(tmp_path / "image"), "overlay").close()
        with pytest.raises(PrivilegeError, match="cannot be written to: Read-only"):
            image.open_image(str(tmp_path / "image"), "writable")

    images.copy(images.filesystem("ext4"), tmp_path / "image")
    in_child(inside, flags=sc.CLONE_NEWNS)


def test_no_loop_devices_at_all(images: Images) -> None:
    path = str(images.filesystem("ext4"))

    def inside() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
        with pytest.raises(HostError, match="no loop devices"):
            image.open_image(path, "overlay")

    in_child(inside, flags=sc.CLONE_NEWNS)


def test_a_dev_that_has_no_loop_nodes(images: Images) -> None:
    """As in a container: loop-control is there, and the nodes of new devices are not."""
    path = str(images.filesystem("ext4"))

    def inside() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
        os.mknod("/dev/loop-control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
        with image.open_image(path, "overlay") as one, image.open_image(path, "overlay") as two:
            assert one.device is not None
            assert two.device is not None
            assert one.device.number == two.device.number
            with Root(two) as root:
                assert root.read("etc/motd") == "of the image\n"
        assert os.listdir("/dev") == ["loop-control"]
        subprocess.run(["mount", "-o", "remount,ro", "/dev"], check=True)
        with pytest.raises(NoSpace, match="no free loop device"):
            image.open_image(path, "overlay")

    in_child(inside, flags=sc.CLONE_NEWNS)


def test_without_privilege_it_is_said(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.filesystem("ext4"), Path(f"/tmp/imgrun-test-{os.getpid()}.img"))
    path.chmod(0o644)
    os.mknod(tmp_path / "fuse", stat.S_IFCHR | 0o600, os.makedev(10, 229))

    def inside() -> None:
        subprocess.run(["mount", "--bind", tmp_path / "fuse", "/dev/fuse"], check=True)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        sc.prctl(sc.PR_SET_DUMPABLE, 1)  # as a program of that user's own is
        for target in (path, Path("/etc")):
            with pytest.raises(PrivilegeError), image.open_image(str(target), "overlay") as held:
                held.mount()
        record = image.inspect(str(path))
        assert record["format"] == "ext4"
        assert record["clean"] is True
        assert record["runnable"] is None
        assert record["reason"].startswith("/dev/fuse cannot be opened")
        assert record["os"] is None

    try:
        in_child(inside, flags=sc.CLONE_NEWNS)
    finally:
        path.unlink()


# -- directories ----------------------------------------------------------------------------------------------------------


def test_a_directory_without_what_is_mounted_in_it(images: Images, tmp_path: Path) -> None:
    tree = build_tree(tmp_path / "tree")

    def inside() -> None:
        sc.set_propagation("/", sc.MS_REC | 1 << 20)
        with image.open_image(str(tree), "overlay") as held, Root(held) as root:
            subprocess.run(["mount", "-t", "tmpfs", "none", tree / "tmp"], check=True)
            (tree / "tmp/of-the-host").touch()
            assert os.listdir(os.open("tmp", os.O_RDONLY, dir_fd=root.fd)) == []
            with Root(held) as again:
                assert os.listdir(os.open("tmp", os.O_RDONLY, dir_fd=again.fd)) == []
            assert root.options() == {"ro", "nodev"}
            assert root.read("etc/motd") == "of the image\n"

    in_child(inside, flags=sc.CLONE_NEWNS)


def test_writing_into_a_directory(tmp_path: Path) -> None:
    tree = build_tree(tmp_path / "tree")
    with image.open_image(str(tree), "writable") as held:
        with Root(held) as root:
            root.write("etc/new", "kept\n")
        with pytest.raises(ImageBusy):
            image.open_image(str(tree), "overlay", wait=0)
    assert (tree / "etc/new").read_text() == "kept\n"
    image.open_image(str(tree), "overlay").close()


# -- inspect --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_of_a_usable_image(images: Images, kind: str) -> None:
    path = images.filesystem(kind)
    before = sha256(path)
    record = image.inspect(str(path))
    assert record["format"] == kind
    assert record["size"] == path.stat().st_size
    assert record["allocated"] == path.stat().st_blocks * 512
    assert record["clean"] is True
    assert record["os"] == {"name": "Test OS 1.0 (tiny)", "id": "testos", "version": "1.0"}
    assert record["architectures"] == [os.uname().machine]
    assert record["runnable"] is True
    assert record["reason"] is None
    assert sha256(path) == before


def test_inspect_of_a_disk(images: Images) -> None:
    path = images.disk(Part(ESP, size=MIB), Part(ROOT_X86_64, images.filesystem("xfs"), label="system"))
    record = image.inspect(str(path))
    assert (record["kind"], record["table"], record["partition"], record["format"]) == ("disk", "gpt", 2, "xfs")
    assert [(p["number"], p["format"], p["label"]) for p in record["partitions"]] == [(1, None, None), (2, "xfs", "system")]
    assert record["partitions"][1]["root_for"] == "x86_64"
    assert record["runnable"] is True


def test_inspect_of_a_directory(images: Images) -> None:
    record = image.inspect(str(images.tree()))
    assert (record["kind"], record["format"], record["runnable"]) == ("directory", "directory", True)
    assert record["size"] is None


def test_inspect_says_why_not(images: Images, tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    record = image.inspect(str(tmp_path / "disk.qcow2"))
    assert record["runnable"] is False
    assert "qcow2" in record["reason"]
    assert record["size"] == 1004
    none = images.disk(Part(LINUX_DATA, images.data()))
    record = image.inspect(str(none))
    assert record["runnable"] is False
    assert record["partitions"][0]["format"] == "ext4"
    broken = crashed(images.filesystem("xfs"), tmp_path / "image")
    record = image.inspect(str(broken))
    assert (record["runnable"], record["clean"], record["format"]) == (False, False, "xfs")
    with pytest.raises(ImageMissing):
        image.inspect(str(tmp_path / "nothing"))
    with image.open_image(str(images.copy(images.filesystem("ext4"), tmp_path / "used")), "writable"):
        record = image.inspect(str(tmp_path / "used"))
        assert record["runnable"] is False
        assert "in use" in record["reason"]
        assert record["format"] == "ext4"


# -- speed ----------------------------------------------------------------------------------------------------------------


def test_a_warm_start_runs_no_program_and_imports_no_tenacity(images: Images) -> None:
    path = images.filesystem("ext4")
    code = (
        "import sys, os\nfrom imgrun import image\n"
        "sys.addaudithook(lambda e, a: os._exit(9) if e in ('subprocess.Popen', 'os.posix_spawn', 'os.fork') else None)\n"
        f"with image.open_image({str(path)!r}, 'overlay') as held:\n"
        "    root = held.mount()\n    image.check_architecture(image.identify(root))\n    os.close(root)\n"
        "heavy = {'tenacity', 'subprocess', 're', 'shlex', 'shutil', 'tempfile', 'dataclasses', 'json', 'pathlib'}\n"
        "sys.exit(','.join(sorted(heavy & set(sys.modules) - before)) or 0)\n"
    )
    done = subprocess.run(
        [os.path.realpath("/proc/self/exe"), "-c", "import sys, typing\nbefore = set(sys.modules)\n" + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in __import__("sys").path if p)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_direct_io_is_used_for_writing_where_the_disk_can(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.filesystem("ext4"), tmp_path / "own.img")
    for access, used in (("writable", "1\n"), ("overlay", "0\n")):
        with image.open_image(str(path), access) as held:  # type: ignore[arg-type]
            assert held.device is not None
            assert Path(f"/sys/block/loop{held.device.number}/loop/dio").read_text() == used


def test_loop_errors_are_ours() -> None:
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        with pytest.raises(ImgrunError):
            loop.attach(fd, "status", read_only=True)
    finally:
        os.close(fd)


def test_a_directory_that_may_not_be_cloned_is_told(tmp_path: Path) -> None:
    def inside() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
        sc.set_propagation(str(tmp_path), 1 << 17)  # MS_UNBINDABLE
        with image.open_image(str(tmp_path), "overlay") as held, pytest.raises(HostError, match="cannot be mounted"):
            held.mount()

    in_child(inside, flags=sc.CLONE_NEWNS)
