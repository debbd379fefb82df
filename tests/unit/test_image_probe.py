"""What imgrun says about a file without any privilege: formats, partitions, damage, and refusals."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shlex
import signal
import socket
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from images import (
    ESP,
    KINDS,
    LINUX_DATA,
    MIB,
    ROOT_ARM64,
    ROOT_X86_64,
    SWAP,
    Images,
    Part,
    make_disk,
    make_filesystem,
    run,
    tool,
)
from imgrun import image
from imgrun.errors import (
    ImageArchError,
    ImageDamaged,
    ImageError,
    ImageFormatError,
    ImageMissing,
    PartitionError,
)
from imgrun.storage import partitions, superblock

UUID = "0a1b2c3d-1111-2222-3333-444455556666"


def refusal(path: Path, kind: type[ImageError], partition: str | None = None) -> ImageError:
    with pytest.raises(kind) as caught:
        image.probe(str(path), partition)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert "\n" not in (caught.value.hint or "")
    return caught.value


# -- bare file systems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_file_system_is_recognised(images: Images, kind: str) -> None:
    path = images.filesystem(kind)
    info = image.probe(str(path))
    assert (info.kind, info.fstype, info.partition) == ("filesystem", kind, None)
    assert (info.offset, info.size) == (0, path.stat().st_size)
    assert info.unclean == ""
    assert not info.needs_mount_probe


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "erofs"])
def test_uuid_is_read(images: Images, kind: str) -> None:
    assert image.probe(str(images.filesystem(kind, uuid=UUID))).uuid == UUID


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_label_is_read(images: Images, kind: str) -> None:
    assert image.probe(str(images.filesystem(kind, label="my root"))).label == "my root"


def test_control_characters_of_a_label_are_not_passed_on(images: Images) -> None:
    assert image.probe(str(images.filesystem("ext4", label="a\x1b[31mb"))).label == "a?[31mb"


def test_name_of_the_file_means_nothing(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.filesystem("squashfs"), tmp_path / "disk.qcow2")
    assert image.probe(str(path)).fstype == "squashfs"


@pytest.mark.parametrize(
    ("kind", "options", "sector_size"),
    [
        ("ext4", {}, 4096),
        ("ext4", {"block_size": 1024}, 512),
        ("xfs", {}, 512),
        ("xfs", {"sector_size": 4096}, 4096),
        ("btrfs", {}, 4096),
        ("squashfs", {}, 4096),
        ("squashfs", {"options": ("-nopad",)}, 512),
        ("erofs", {}, 4096),
    ],
)
def test_blocks_of_4096_bytes_where_the_file_system_can(
    images: Images, kind: str, options: dict[str, object], sector_size: int, tmp_path: Path
) -> None:
    path = images.filesystem(kind, **options)
    if path.stat().st_size % 512:
        path = images.copy(path, tmp_path / "padded")
        os.truncate(path, -(-path.stat().st_size // 512) * 512)
    assert image.probe(str(path)).sector_size == sector_size


def test_directory_is_an_image(images: Images) -> None:
    info = image.probe(str(images.tree()))
    assert (info.kind, info.fstype) == ("directory", None)


# -- partitions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_root_is_chosen_by_the_type_for_this_architecture(images: Images, sector_size: int) -> None:
    root = images.filesystem("ext4")
    disk = images.disk(
        Part(ESP, size=MIB),
        Part(LINUX_DATA, images.data()),
        Part(ROOT_X86_64, root, label="system"),
        sector_size=sector_size,
    )
    info = image.probe(str(disk))
    assert (info.kind, info.table, info.partition, info.fstype) == ("disk", "gpt", 3, "ext4")
    assert (info.offset, info.size) == (8 * MIB, root.stat().st_size)
    assert [p.number for p in info.partitions] == [1, 2, 3]
    assert info.uuid == image.probe(str(root)).uuid


def test_types_for_other_architectures_are_passed_over(images: Images) -> None:
    disk = images.disk(Part(ROOT_ARM64, images.data()), Part(ROOT_X86_64, images.filesystem("ext4")))
    assert image.probe(str(disk)).partition == 2


def test_a_disk_for_another_architecture_is_refused(images: Images) -> None:
    disk = images.disk(Part(ROOT_ARM64, images.filesystem("ext4")))
    error = refusal(disk, ImageArchError)
    assert "aarch64" in error.message
    assert os.uname().machine in error.message
    assert image.probe(str(disk), "1").partition == 1


@pytest.mark.parametrize("mark", [{"attributes": "GUID:63"}, {"label": "_empty"}])
def test_root_partitions_that_are_not_to_be_found_are_not(images: Images, mark: dict[str, str]) -> None:
    disk = images.disk(Part(ROOT_X86_64, images.data(), **mark), Part(ROOT_X86_64, images.filesystem("ext4")))
    assert image.probe(str(disk)).partition == 2


def test_two_roots_are_refused_and_listed(images: Images) -> None:
    root = images.filesystem("ext4")
    error = refusal(images.disk(Part(ROOT_X86_64, root, label="a"), Part(ROOT_X86_64, root, label="b")), PartitionError)
    assert "1 and 2" in error.message
    assert "1 'a' 32 MiB ext4; 2 'b' 32 MiB ext4" in (error.hint or "")


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_mbr_leaves_it_to_the_contents(images: Images, sector_size: int) -> None:
    disk = images.disk(Part(SWAP, size=MIB), Part(LINUX_DATA, images.data()), table="dos", sector_size=sector_size)
    info = image.probe(str(disk))
    assert info.needs_mount_probe
    assert (info.table, info.partition) == ("dos", None)
    assert [(p.number, p.type, p.fstype) for p in info.partitions] == [(1, "0x82", ""), (2, "0x83", "ext4")]
    assert info.partitions[1].offset == 3 * MIB


def test_logical_partitions_have_their_numbers(images: Images) -> None:
    data = images.data()
    disk = images.disk(
        Part(SWAP, size=MIB),
        Part(SWAP, size=MIB),
        Part(SWAP, size=MIB),
        Part("extended"),
        Part(LINUX_DATA, data),
        Part(LINUX_DATA, images.filesystem("ext4")),
        table="dos",
    )
    info = image.probe(str(disk), "6")
    assert (info.partition, info.fstype, info.size) == (6, "ext4", 32 * MIB)
    assert [p.number for p in info.partitions] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("wanted", ["2", "Data here", "notes", UUID, UUID.upper(), "fs-uuid"])
def test_partition_is_named_in_many_ways(images: Images, wanted: str) -> None:
    disk = images.disk(
        Part(ROOT_X86_64, images.filesystem("ext4")), Part(LINUX_DATA, images.data(), label="Data here", uuid=UUID)
    )
    if wanted == "fs-uuid":
        wanted = image.probe(str(images.data())).uuid
    assert image.probe(str(disk), wanted).partition == 2


def test_a_number_wins_over_a_label(images: Images) -> None:
    disk = images.disk(Part(LINUX_DATA, images.data(), label="2"), Part(LINUX_DATA, images.filesystem("ext4")))
    assert image.probe(str(disk), "2").partition == 2


@pytest.mark.parametrize("wanted", ["3", "nonsense", "", "-1", "0"])
def test_a_partition_that_is_not_there(images: Images, wanted: str) -> None:
    disk = images.disk(Part(LINUX_DATA, images.data(), label="one"))
    error = refusal(disk, PartitionError, wanted)
    assert repr(wanted) in error.message
    assert "1 'one' 4 MiB ext4" in (error.hint or "")


def test_a_label_that_two_partitions_have(images: Images) -> None:
    disk = images.disk(Part(LINUX_DATA, images.data(), label="x"), Part(LINUX_DATA, images.data(), label="x"))
    assert "partitions 1, 2" in refusal(disk, PartitionError, "x").message


def test_a_partition_without_a_file_system_is_refused(images: Images, tmp_path: Path) -> None:
    swap = tmp_path / "swap"
    swap.write_bytes(bytes(MIB))
    run("mkswap", swap)
    disk = make_disk(tmp_path / "disk", [Part(ROOT_X86_64, swap)])
    error = refusal(disk, ImageFormatError)
    assert "partition 1" in error.message
    assert "swap space" in error.message


def test_an_encrypted_root_partition_is_refused(images: Images, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", [Part(ROOT_X86_64, luks(tmp_path / "luks"))])
    assert "encrypted" in refusal(disk, ImageFormatError).message


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_a_disk_without_partitions(tmp_path: Path, table: str) -> None:
    disk = make_disk(tmp_path / "disk", [], table=table)
    assert "without any partition" in refusal(disk, PartitionError).message


def test_a_disk_that_holds_nothing_known(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk", [Part(SWAP, size=MIB), Part(LINUX_DATA, size=MIB)])
    error = refusal(disk, PartitionError)
    assert "no partition that holds a root file system" in error.message
    assert "nothing recognised" in (error.hint or "")


@pytest.mark.parametrize("kind", ["ext4", "squashfs"])
def test_a_bare_file_system_has_no_partitions(images: Images, kind: str) -> None:
    assert kind in refusal(images.filesystem(kind), PartitionError, "1").message


def test_a_directory_has_no_partitions(images: Images) -> None:
    refusal(images.tree(), PartitionError, "1")


# -- damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_system_is_refused_with_both_sizes(images: Images, kind: str, tmp_path: Path) -> None:
    path = images.copy(images.filesystem(kind), tmp_path / "image")
    whole = path.stat().st_size
    os.truncate(path, whole // 2 // 4096 * 4096)
    error = refusal(path, ImageDamaged)
    assert "truncated" in error.message
    assert str(whole // 2 // 4096 * 4096) in error.message
    # What squashfs uses ends before its padding.
    needed = int(error.message.partition("has ")[2].partition(" ")[0])
    assert whole - 4096 < needed <= whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 100, 1024, 1100, 2048])
def test_what_is_cut_to_almost_nothing_is_refused(images: Images, kind: str, length: int, tmp_path: Path) -> None:
    path = images.copy(images.filesystem(kind), tmp_path / "image")
    os.truncate(path, length)
    with pytest.raises((ImageDamaged, ImageFormatError)):
        image.probe(str(path))


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_truncated_gpt_disk_is_refused_with_both_sizes(images: Images, sector_size: int, tmp_path: Path) -> None:
    whole = images.disk(Part(ROOT_X86_64, images.filesystem("ext4")), sector_size=sector_size)
    path = images.copy(whole, tmp_path / "disk")
    os.truncate(path, 20 * MIB)
    message = refusal(path, ImageDamaged).message
    assert str(20 * MIB) in message
    assert str(whole.stat().st_size) in message


def test_a_truncated_mbr_disk_is_refused_with_both_sizes(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.disk(Part(LINUX_DATA, images.filesystem("ext4")), table="dos"), tmp_path / "disk")
    os.truncate(path, 20 * MIB)
    message = refusal(path, ImageDamaged, "1").message
    assert str(20 * MIB) in message
    assert str(33 * MIB) in message
    refusal(path, ImageDamaged)


def test_a_disk_that_was_extended_is_fine(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.disk(Part(ROOT_X86_64, images.filesystem("ext4"))), tmp_path / "disk")
    os.truncate(path, 64 * MIB)
    assert image.probe(str(path)).partition == 1


def test_an_end_that_cannot_be_read_is_refused(images: Images, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    path = tmp_path / "image"
    while not path.exists() or path.stat().st_size % 512 == 0:
        (tree / "data").write_bytes(os.urandom(1000 + len(os.listdir(tmp_path))))
        make_filesystem("squashfs", path, tree, options=("-nopad",))
    error = refusal(path, ImageDamaged)
    assert "multiple of 512" in error.message
    command = (error.hint or "").partition(": ")[2]
    subprocess.run(shlex.split(command), check=True)
    assert image.probe(str(path)).fstype == "squashfs"


@pytest.mark.parametrize(
    ("commands", "replayable", "words"),
    [
        ("feature needs_recovery", True, "journal"),
        ("ssv state 2", False, "errors"),
        ("ssv state 0", False, "cleanly"),
    ],
)
def test_an_unclean_ext4_is_told(images: Images, tmp_path: Path, commands: str, replayable: bool, words: str) -> None:
    path = images.copy(images.filesystem("ext4"), tmp_path / "image")
    run("debugfs", "-w", "-R", commands, path)
    info = image.probe(str(path))
    assert words in info.unclean
    assert info.replayable is replayable


def test_a_btrfs_with_a_log_tree_is_told(images: Images, tmp_path: Path) -> None:
    path = images.copy(images.filesystem("btrfs"), tmp_path / "image")
    with path.open("r+b") as f:
        f.seek((64 << 10) + 96)
        f.write(b"\1")
    with path.open("rb") as f:
        found = superblock.read(f.fileno(), 0, "btrfs")
    assert found is not None
    assert "log tree" in found.unclean
    assert found.replayable


def test_an_xfs_with_its_journal_elsewhere_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(bytes(MIB))
    os.truncate(log, 100 * MIB)
    path = make_filesystem("xfs", tmp_path / "image", None, options=("-l", f"logdev={log},size=64m"))
    assert "journal is on another device" in refusal(path, ImageFormatError).message
    assert "journal" in refusal(log, ImageFormatError).message


def test_one_device_of_several_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as f:
            f.truncate(128 * MIB)
    run("mkfs.btrfs", "-q", tmp_path / "a", tmp_path / "b")
    assert "one of the 2 devices" in refusal(tmp_path / "a", ImageFormatError).message


# -- refusals -------------------------------------------------------------------------------------------------------------


def luks(path: Path) -> Path:
    path.write_bytes(bytes(MIB))
    os.truncate(path, 20 * MIB)
    run("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", path, stdin="secret")
    return path


def filled(path: Path, *pieces: tuple[int, bytes], size: int = 256 << 10) -> Path:
    with path.open("wb") as f:
        f.truncate(size)
        for offset, data in pieces:
            f.seek(offset)
            f.write(data)
    return path


def swap_space(path: Path) -> Path:
    run("mkswap", filled(path, size=MIB))
    return path


def tar(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "etc/os-release")
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(__file__)
    return path


def zstd(path: Path) -> Path:
    return filled(path, (0, b"\x28\xb5\x2f\xfd" + os.urandom(4096)))


def sif(path: Path) -> Path:
    return filled(path, (0, b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + b"01\0"))


def fat(path: Path) -> Path:
    boot = b"\xeb\x3c\x90mkfs.fat\x00\x02\x04\x01\x00\x02\x00\x02\x00\x20\xf8\x08\x00\x20\x00\x02" + bytes(9) + b"\x80\0\x29"
    return filled(path, (0, boot + b"1234NO NAME    FAT12   "), (510, b"\x55\xaa"), (512, b"\xf8\xff\xff"), size=4 * MIB)


def boot_sector(path: Path) -> Path:
    return filled(path, (0, b"\xeb\xfe"), (446, b"\x77" * 64), (510, b"\x55\xaa"))


def iso9660(path: Path) -> Path:
    return filled(path, (32768, b"\1CD001\1\0"), (34816, b"\xffCD001\1\0"), size=MIB)


def lvm(path: Path) -> Path:
    """A physical volume's label (LVM2's lib/format_text/layout.h), without its checksum being right."""
    return filled(path, (512, b"LABELONE" + (1).to_bytes(8, "little") + bytes(4) + b"\x20\0\0\0LVM2 001"))


UNKNOWN: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("qcow2", lambda p: filled(p, (0, b"QFI\xfb\0\0\0\3")), "qcow2", "qemu-img convert"),
    ("vmdk", lambda p: filled(p, (0, b"KDMV\1\0\0\0")), "VMDK", "qemu-img convert"),
    ("vmdk-text", lambda p: filled(p, (0, b"# Disk DescriptorFile\nversion=1\n"), size=512), "VMDK", "qemu-img"),
    ("vhd", lambda p: filled(p, (0, b"conectix")), "VHD", "qemu-img convert"),
    ("vhd-fixed", lambda p: filled(p, (0, b"\1"), ((256 << 10) - 512, b"conectix")), "VHD", "qemu-img convert"),
    ("vhdx", lambda p: filled(p, (0, b"vhdxfile")), "VHDX", "qemu-img convert"),
    ("vdi", lambda p: filled(p, (0, b"<<< Oracle VM VirtualBox"), (64, b"\x7f\x10\xda\xbe")), "VDI", "qemu-img"),
    ("iso", iso9660, "ISO 9660", "directory"),
    ("tar", tar, "tar archive", "imgrun image build"),
    ("gzip", lambda p: p.write_bytes(gzip.compress(os.urandom(5000))), "gzip", "gunzip -k"),
    ("xz", lambda p: p.write_bytes(lzma.compress(os.urandom(5000))), "xz", "unxz -k"),
    ("bzip2", lambda p: p.write_bytes(bz2.compress(os.urandom(5000))), "bzip2", "bunzip2 -k"),
    ("zstd", zstd, "zstd", "unzstd"),
    ("zip", zipped, "zip", "unzip"),
    ("elf", lambda p: p.write_bytes(Path(tool("true")).read_bytes()), "a program (ELF)", "command"),
    ("script", lambda p: p.write_text("#!/bin/sh\nexit 0\n"), "a script", "command"),
    ("sif", sif, "Apptainer", "--sandbox"),
    ("luks", luks, "encrypted", "cryptsetup open"),
    ("lvm", lvm, "LVM", "directory"),
    ("swap", swap_space, "swap space", "Linux root file system"),
    ("fat", fat, "FAT", "Linux root file system"),
    ("zeros", filled, "never formatted", "mke2fs"),
    ("text", lambda p: p.write_text("version of a pointer\n" * 50), "a text file", "downloaded"),
    ("boot", boot_sector, "boot sector", "Linux root file system"),
    ("noise", lambda p: p.write_bytes(b"\xff\xfe\x80" * 3000), "nothing that is known", "Linux root file system"),
]


@pytest.mark.parametrize(("make", "words", "advice"), [u[1:] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_what_it_looks_like(tmp_path: Path, make: Callable[[Path], object], words: str, advice: str) -> None:
    path = tmp_path / "my image.img"
    make(path)
    error = refusal(path, ImageFormatError)
    assert str(path) in error.message
    assert words in error.message
    assert advice in (error.hint or "")


def test_hints_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    path = filled(tmp_path / "it's $HOME.qcow2", (0, b"QFI\xfb"))
    command = (refusal(path, ImageFormatError).hint or "").partition(": ")[2]
    assert shlex.split(command) == ["qemu-img", "convert", "-O", "raw", str(path), "it's $HOME.img"]


def test_signatures_of_two_formats_are_refused_and_named(tmp_path: Path) -> None:
    path = make_filesystem("btrfs", tmp_path / "image", None)
    other = make_filesystem("ext4", tmp_path / "other", None, size=path.stat().st_size)
    with path.open("r+b") as f, other.open("rb") as g:
        f.seek(1024)
        g.seek(1024)
        f.write(g.read(1024))
    error = refusal(path, ImageFormatError)
    assert "several formats" in error.message
    assert "ext4" in error.message
    assert "btrfs" in error.message


@pytest.mark.parametrize("path", ["/nowhere/at/all", "", "/etc/passwd/image", "bad\0name"])
def test_missing(path: str) -> None:
    with pytest.raises(ImageMissing, match=r"no such image|cannot be opened"):
        image.probe(path)


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    assert "no such image" in refusal(tmp_path / "link", ImageMissing).message


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(10)
    try:
        assert "named pipe" in refusal(tmp_path / "pipe", ImageMissing).message
    finally:
        signal.alarm(0)


def test_a_socket_and_a_device_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
        assert "a socket" in refusal(tmp_path / "socket", ImageMissing).message
    assert "character device" in refusal(Path("/dev/null"), ImageMissing).message


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    assert "is empty" in refusal(tmp_path / "image", ImageFormatError).message


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_unreadable(images: Images, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"x")
    path.chmod(0)
    if os.geteuid() != 0:
        assert "may not be read" in refusal(path, ImageMissing).message
        return
    for directory in [tmp_path, *tmp_path.parents][:-2]:
        directory.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            image.probe(str(path))
        except ImageMissing as e:
            os._exit(0 if "may not be read" in e.message else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# -- hostile bytes --------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(superblock.DRIVERS)), st.binary(max_size=6000))
def test_any_superblock_can_be_read(kind: str, data: bytes) -> None:
    fd = os.memfd_create("superblock")
    try:
        start = {"btrfs": 64 << 10}.get(kind, 0)
        os.pwrite(fd, data, start)
        found = superblock.read(fd, 0, kind)
        assert found is None or found.size >= 0
    finally:
        os.close(fd)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_system_with_any_bytes_changed_gives_an_answer(images: Images, tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["ext4", "btrfs", "squashfs", "erofs"]))
    path = tmp_path / "image"
    source = images.filesystem(kind)
    if not path.exists() or path.stat().st_size != source.stat().st_size:
        images.copy(source, path)
    start = {"btrfs": 64 << 10, "squashfs": 0}.get(kind, 1024)
    with path.open("r+b") as f, source.open("rb") as original:
        original.seek(start)
        block = bytearray(original.read(512))
        for position in data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=6)):
            block[position] = data.draw(st.integers(0, 255))
        f.seek(start)
        f.write(block)
    try:
        info = image.probe(str(path))
    except ImageError:
        return
    assert info.fstype
    assert info.sector_size in (512, 4096)


@given(st.integers(0, 1 << 50))
def test_sizes_are_told_in_units(size: int) -> None:
    amount, unit = partitions.describe(partitions.Partition(1, 0, size, "")).split()[1:3]
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert float(amount) * factor == pytest.approx(size, rel=0.001)
