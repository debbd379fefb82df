"""What is learned from a mounted root, which may be hostile: operating system and architecture."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images import Images, build_tree, elf_header
from imgrun.errors import ImageArchError
from imgrun.image import OsInfo, check_architecture, identify
from imgrun.storage import guest

HERE = os.uname().machine
FOREIGN = {"x86_64": 183, "aarch64": 62}.get(HERE, 22)
FOREIGN_NAME = {183: "aarch64", 62: "x86_64", 22: "s390x"}[FOREIGN]


def look(root: Path) -> OsInfo:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return identify(fd)
    finally:
        os.close(fd)


@pytest.fixture
def in_time() -> Iterator[None]:
    """Nothing a root holds may make us wait."""
    signal.alarm(10)
    yield
    signal.alarm(0)


def test_the_usual(images: Images) -> None:
    found = look(images.tree())
    assert (found.name, found.id, found.version) == ("Test OS 1.0 (tiny)", "testos", "1.0")
    assert found.architectures == (HERE,)
    check_architecture(found)


def test_this_host_is_what_it_says() -> None:
    found = look(Path("/"))
    assert HERE in found.architectures
    check_architecture(found)


def test_an_empty_root_is_unknown_and_not_refused(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert found == OsInfo("", "", "", ())
    check_architecture(found)


def test_another_architecture_is_refused_and_both_are_named(tmp_path: Path) -> None:
    found = look(build_tree(tmp_path / "root", program=elf_header(FOREIGN)))
    assert found.architectures == (FOREIGN_NAME,)
    with pytest.raises(ImageArchError) as caught:
        check_architecture(found)
    assert FOREIGN_NAME in caught.value.message
    assert HERE in caught.value.message


def test_one_program_for_this_host_is_enough(tmp_path: Path) -> None:
    root = build_tree(tmp_path / "root", program=elf_header(FOREIGN))
    (root / "usr/bin/python3").write_bytes(Path("/proc/self/exe").read_bytes()[:128])
    found = look(root)
    assert found.architectures == (FOREIGN_NAME, HERE)
    check_architecture(found)


@pytest.mark.skipif(HERE != "x86_64", reason="about what an x86-64 kernel also runs")
def test_32_bit_programs_run_on_x86_64(tmp_path: Path) -> None:
    found = look(build_tree(tmp_path / "root", program=elf_header(3, bits=32)))
    assert found.architectures == ("i686",)
    check_architecture(found)


@pytest.mark.parametrize(
    ("machine", "bits", "little", "name"),
    [(62, 64, True, "x86_64"), (183, 64, True, "aarch64"), (21, 64, True, "ppc64le"), (21, 64, False, "ppc64"),
     (22, 64, False, "s390x"), (243, 64, True, "riscv64"), (40, 32, True, "armv7l"), (8, 32, False, "mips"),
     (4711, 64, True, None)],
)  # fmt: skip
def test_machines(machine: int, bits: int, little: bool, name: str | None) -> None:
    assert guest.machine_of(elf_header(machine, bits=bits, little=little)) == name


@given(st.binary(max_size=200))
def test_any_header_gives_an_answer(data: bytes) -> None:
    assert guest.machine_of(data) is None or data.startswith(b"\x7fELF")


@pytest.mark.parametrize("where", ["etc/os-release", "usr/lib/os-release"])
def test_either_place_of_os_release(tmp_path: Path, where: str) -> None:
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).write_text("NAME=Plain\nVERSION_ID='7'\n")
    assert look(tmp_path)[:3] == ("Plain", "", "7")


def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "etc").symlink_to("../../../../../../etc")
    (tmp_path / "usr").symlink_to("/usr")
    (tmp_path / "bin").symlink_to("/proc/self/root/bin")
    assert look(tmp_path) == OsInfo("", "", "", ())


def test_absolute_links_are_the_images_own(tmp_path: Path) -> None:
    root = build_tree(tmp_path / "root")
    (root / "etc/os-release").unlink()
    (root / "etc/os-release").symlink_to("/usr/lib/os-release")
    assert look(root).id == "testos"


def test_pipes_loops_and_directories_in_the_way(tmp_path: Path, in_time: None) -> None:
    for name in ("etc", "usr/lib", "usr/bin", "bin"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "etc/os-release")
    os.mkfifo(tmp_path / "bin/sh")
    (tmp_path / "usr/bin/env").symlink_to("env")
    (tmp_path / "bin/bash").mkdir()
    (tmp_path / "usr/lib/os-release").write_text("ID=second\n")
    found = look(tmp_path)
    assert found.architectures == ()
    assert found.id == "second"


def test_huge_files_are_read_in_part(tmp_path: Path, in_time: None) -> None:
    (tmp_path / "etc").mkdir()
    with (tmp_path / "etc/os-release").open("wb") as f:
        f.write(b"ID=big\nNAME=" + b"x" * 100_000)
        f.truncate(1 << 40)
    found = look(tmp_path)
    assert found.id == "big"
    assert len(found.name) <= 256


def test_what_it_says_cannot_drive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_bytes(b'PRETTY_NAME="a\x1b]0;x\x07\xff"\n')
    assert look(tmp_path).name.isprintable()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=plain", "plain"),
        ('A="two words"', "two words"),
        ("A='single $x'", "single $x"),
        (r'A="esc \" \$ \\ \`"', 'esc " $ \\ `'),
        ("A=", ""),
        ('A="', '"'),
    ],
)
def test_quoting_in_os_release(line: str, value: str) -> None:
    assert guest.parse_os_release(line.encode()) == {"A": value}


@pytest.mark.parametrize("line", ["", "# A=1", "nonsense", "=x", "A B=c"])
def test_lines_that_assign_nothing(line: str) -> None:
    assert guest.parse_os_release(line.encode()) == {}


@given(st.binary(max_size=500))
def test_any_os_release_is_printable(data: bytes) -> None:
    assert all(v.isprintable() for v in guest.parse_os_release(data).values())


def test_an_emulator_that_works_in_any_root_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is that of a real entry (Documentation/admin-guide/binfmt-misc.rst)."""
    header = elf_header(FOREIGN)
    entry = "{state}\ninterpreter /usr/bin/qemu\nflags: {flags}\noffset 0\nmagic {magic}\nmask {mask}\n"
    magic, mask = header[:20].hex(), (b"\xff" * 4 + b"\x00" + b"\xff" * 2 + b"\x00" * 9 + b"\xfe\xff\xff\xff").hex()
    monkeypatch.setattr(guest, "BINFMT", str(tmp_path))
    found = OsInfo("", "", "", (FOREIGN_NAME,), header)
    for state, flags, works in (
        ("enabled", "OCF", True),
        ("disabled", "OCF", False),
        ("enabled", "OC", False),
    ):
        (tmp_path / "qemu").write_text(entry.format(state=state, flags=flags, magic=magic, mask=mask))
        (tmp_path / "status").write_text("enabled\n")
        if works:
            check_architecture(found)
        else:
            with pytest.raises(ImageArchError):
                check_architecture(found)
    (tmp_path / "qemu").write_text(entry.format(state="enabled", flags="F", magic="ff" * 20, mask=mask))
    with pytest.raises(ImageArchError):
        check_architecture(found)
