"""Images built for real: that they hold what the recipe says, whole, and that what goes wrong leaves nothing."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import COMMAND, Done, Imgrun, eventually, refused

from images import run as run_tool
from images import tool
from imgrun.building.build import Built, build
from imgrun.building.recipe import Recipe, parse
from imgrun.errors import HostError, ImageBusy, NoSpace, SpecError
from imgrun.image import inspect, open_image, probe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="building images with all owners needs root")

FORMATS = ("ext4", "ext3", "ext2", "xfs", "btrfs", "squashfs", "erofs")
RECIPES = Path(__file__).parents[2] / "images"
TOUCHED = {".", "dev", "etc", "etc/machine-id", "etc/hostname", "etc/resolv.conf", "lost+found"}
"""What a build changes in any content; for directories, their times."""
UUID = "6f1c2f0e-1111-4222-8333-444455556666"
NOBODY = 65534


@pytest.fixture(scope="session")
def package_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that install packages: they are fetched once."""
    path = tmp_path_factory.mktemp("cache")
    path.chmod(0o700)
    return path


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, package_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files of builds go to a place of the test's own, which must be empty afterwards."""
    place = tmp_path / "tmp"
    place.mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("IMGRUN_CACHE", str(package_cache))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    yield place
    if place.exists():
        assert os.listdir(place) == []


@pytest.fixture
def imgrun() -> Iterator[Imgrun]:
    command = Imgrun(None)
    yield command
    command.close()


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A root directory with one of everything that a file system can hold."""
    root = tmp_path / "content"
    for name in ("usr/bin", "etc", "dev", "tmp", "home/user", "empty"):
        (root / name).mkdir(parents=True)
    (root / "usr/lib").mkdir()
    (root / "usr/lib/os-release").write_text('ID=tiny\nPRETTY_NAME="Tiny 1"\n')
    (root / "tmp").chmod(0o1777)
    shutil.copy(tool("busybox"), root / "usr/bin/busybox")
    os.link(root / "usr/bin/busybox", root / "usr/bin/sh")
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/suid").write_text("#!/bin/sh\n")
    (root / "usr/bin/suid").chmod(0o4755)
    (root / "home/user/of user").write_bytes(os.urandom(300_000))
    os.chown(root / "home/user", 1000, 1000)
    os.chown(root / "home/user/of user", 1000, 1001)
    (root / "home/user/naïve\nname").write_text("x")
    (root / "home/user/.hidden").touch(mode=0o600)
    (root / "home/user/long").symlink_to("a/" * 100 + "b")
    os.mkfifo(root / "home/fifo", 0o620)
    with (root / "home/sparse").open("wb") as file:
        file.truncate(8 << 20)
        file.write(b"end")
    os.setxattr(root / "home/sparse", "user.note", b"kept")
    # cap_net_raw=ep, as ping has it; see capability.h for the form.
    os.setxattr(root / "usr/bin/busybox", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "home/block", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/hostname").write_text("builder\n")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, (1_500_000_000, 1_500_000_000), follow_symlinks=False)
    return root


def recipe(source: str, more: str = "", *, name: str = "mine") -> Recipe:
    return parse(f"source = {{{source}}}\n{more}", f"/recipes/{name}.toml")


def of_directory(path: Path, more: str = "") -> Recipe:
    return recipe(f'type = "directory", path = "{path}"', more)


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be told of the files below ``root``, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        for path in [directory, *(os.path.join(directory, name) for name in names + files)]:
            s = os.lstat(path)
            plain, folder = stat.S_ISREG(s.st_mode), stat.S_ISDIR(s.st_mode)
            extra = {name: os.getxattr(path, name, follow_symlinks=False) for name in xattrs(path)}
            found[os.path.relpath(path, root)] = (
                oct(s.st_mode), s.st_uid, s.st_gid, int(s.st_mtime), 0 if folder else s.st_nlink,
                0 if folder else s.st_size, os.readlink(path) if stat.S_ISLNK(s.st_mode) else "", sorted(extra.items()),
                Path(path).read_bytes() if plain else b"",
            )  # fmt: skip
    return found


def xattrs(path: str) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """The root of an image, read-only."""
    with open_image(str(image), "read-only") as held:
        fd = held.mount()
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{fd}")
        finally:
            os.close(fd)


def only(directory: Path, *names: str) -> None:
    """See that there is nothing else in a directory."""
    assert sorted(os.listdir(directory)) == sorted(names)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where images are built."""
    path = tmp_path / "out"
    path.mkdir()
    return path


# -- what is in an image -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["none", "gpt", "mbr"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_the_content_unchanged(format: str, table: str, content: Path, place: Path) -> None:
    image = place / "an image"
    built = build(of_directory(content, f'image = {{format = "{format}", table = "{table}"}}'), str(image))
    only(place, "an image")
    assert (built.path, built.format, built.table, built.cached) == (str(image), format, table, None)
    assert built.size == image.stat().st_size
    assert built.allocated == image.stat().st_blocks * 512
    before = listing(content)
    with mounted(image) as root:
        after = listing(root)
        assert os.listdir(root / "dev") == []
        for name in ("machine-id", "hostname", "resolv.conf"):
            assert (root / "etc" / name).read_bytes() == b""
        assert stat.S_IMODE((root / "var/tmp").stat().st_mode) == 0o1777
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
    for gone in ("dev/null", "home/block"):
        del before[gone]
    made = {"etc/hosts", "etc/resolv.conf", "proc", "root", "run", "sys", "var", "var/tmp"}
    assert set(after) - set(before) - {"lost+found"} == made
    assert set(before) <= set(after)
    before.pop("home")  # it lost an entry, and so got another time
    for path in set(before) - TOUCHED:
        assert after[path] == before[path], path
    record = inspect(str(image))
    assert record["runnable"] is True, record
    assert record["os"]["name"] == "Tiny 1"
    assert record["table"] == {"none": None, "gpt": "gpt", "mbr": "dos"}[table]


@pytest.mark.parametrize("format", FORMATS)
def test_every_file_system_is_sound(format: str, content: Path, place: Path) -> None:
    image = place / "i"
    build(of_directory(content, f'image = {{format = "{format}"}}'), str(image))
    checks = {"xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "-q"], "squashfs": ["unsquashfs", "-s"]}
    checks["erofs"] = ["fsck.erofs"]
    run_tool(*checks.get(format, ["e2fsck", "-f", "-n"]), image)
    with open_image(str(image), "writable" if format not in ("squashfs", "erofs") else "overlay") as held:
        os.close(held.mount())


def test_a_disk_says_for_which_processor_its_root_is(content: Path, place: Path) -> None:
    image = place / "i"
    build(of_directory(content, f'image = {{table = "gpt", label = "mine", uuid = "{UUID}"}}'), str(image))
    run_tool("sgdisk", "--verify", image)
    info = probe(str(image))
    assert (info.table, info.partition, info.label, info.uuid) == ("gpt", 1, "mine", UUID)
    here = os.uname().machine
    assert inspect(str(image))["partitions"][0]["root_for"] == here
    # Programs for another processor make it that one's root. 22 is s390, 183 aarch64 (elf(5)).
    other, order, machine = ("s390x", 2, b"\0\x16") if here != "s390x" else ("aarch64", 1, b"\xb7\0")
    program = content / "usr/bin/busybox"
    header = bytearray(program.read_bytes()[:64])
    header[4:6] = bytes([2, order])
    header[18:20] = machine
    program.write_bytes(bytes(header))
    build(of_directory(content, 'image = {table = "gpt"}'), str(place / "other"))
    record = inspect(str(place / "other"))
    assert record["partitions"][0]["root_for"] == other
    assert record["runnable"] is False


def test_size_label_and_uuid_are_as_asked(content: Path, place: Path) -> None:
    for format in ("ext4", "xfs", "btrfs"):
        image = place / format
        options = f'format = "{format}", size = "400M", label = "mine", uuid = "{UUID}"'
        built = build(of_directory(content, f"image = {{{options}}}"), str(image))
        assert built.size == 400 << 20
        assert built.allocated < 200 << 20
        info = probe(str(image))
        assert (info.fstype, info.label, info.uuid) == (format, "mine", UUID)
    built = build(of_directory(content, 'image = {size = "64M", sparse = false}'), str(place / "full"))
    assert built.allocated >= 64 << 20


def test_an_automatic_size_suits_many_small_files(content: Path, place: Path) -> None:
    many = content / "many"
    many.mkdir()
    for number in range(12_000):
        (many / f"{number}").touch()
    build(of_directory(content), str(place / "i"))
    with mounted(place / "i") as root:
        assert len(os.listdir(root / "many")) == 12_000


@pytest.mark.parametrize("format", ["squashfs", "erofs"])
def test_the_same_content_gives_the_same_bytes(
    format: str, content: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    mine = of_directory(content, f'image = {{format = "{format}", table = "gpt", uuid = "{UUID}"}}')
    build(mine, str(place / "a"))
    time.sleep(1.1)
    build(mine, str(place / "b"))
    assert (place / "a").read_bytes() == (place / "b").read_bytes()
    with mounted(place / "a") as root:
        assert max(int(s.st_mtime) for s in [root.stat(), *(path.lstat() for path in root.rglob("*"))]) == 1_600_000_000


def test_files_are_added_and_removed(content: Path, place: Path) -> None:
    (content / "usr/share/doc/a/b").mkdir(parents=True)
    (content / "usr/share/doc/.hidden").touch()
    mine = of_directory(
        content,
        """
        [files]
        "/etc/hostname" = "fixed"
        "/etc/rc.d/start" = { content = "#!/bin/sh\\n", mode = "4750" }
        "/home/user" = "a file where a directory was"
        "/etc/localtime" = { link = "/usr/share/zoneinfo/UTC" }
        [setup]
        remove = ["/usr/share/doc/*", "/home/spar*", "/bin", "/none/such"]
        """,
    )
    build(mine, str(place / "i"))
    with mounted(place / "i") as root:
        assert (root / "etc/hostname").read_text() == "fixed"
        assert stat.S_IMODE((root / "etc/rc.d/start").stat().st_mode) == 0o4750
        assert (root / "home/user").read_text().startswith("a file")
        assert os.readlink(root / "etc/localtime") == "/usr/share/zoneinfo/UTC"
        assert os.listdir(root / "usr/share/doc") == []
        assert not (root / "home/sparse").exists()
        assert not os.path.lexists(root / "bin")
        assert (root / "usr/bin/busybox").exists()


@pytest.mark.parametrize("compress", ["none", "gz", "xz", "zstd"])
def test_a_tar_becomes_an_image(compress: str, content: Path, place: Path) -> None:
    tar = place.parent / "root:1.tar"  # a name that tar would take for another host's
    run_tool("tar", "--create", "--xattrs", "--xattrs-include=*", "--force-local", f"--directory={content}",
             f"--file={tar}", ".")  # fmt: skip
    if compress != "none":
        data = tar.read_bytes()
        packers: dict[str, Callable[[], bytes]] = {
            "gz": lambda: gzip.compress(data),
            "xz": lambda: __import__("lzma").compress(data),
            "zstd": lambda: subprocess.run([tool("zstd"), "-c"], input=data, capture_output=True, check=True).stdout,
        }
        tar.write_bytes(packers[compress]())
    build(recipe(f'type = "tar", path = "{tar}"'), str(place / "i"))
    before = listing(content)
    with mounted(place / "i") as root:
        after = listing(root)
    for path in set(before) - TOUCHED - {"dev/null", "home", "home/block"}:
        assert after[path] == before[path], path
    assert not {"dev/null", "home/block"} & set(after)


# -- hostile content ---------------------------------------------------------------------------------------------------


def test_links_in_the_content_lead_nowhere_else(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("of the host")
    root = tmp_path / "hostile"
    for name in ("usr", "real"):
        (root / name).mkdir(parents=True)
    (root / "etc").symlink_to(outside)
    (root / "var").symlink_to("../../../../../../.." + str(outside))
    (root / "home").symlink_to("real")
    (root / "fifo").symlink_to("usr/pipe")
    os.mkfifo(root / "usr/pipe")
    more = '[files]\n"/home/x" = "inside"\n"/fifo" = "a file"\n[setup]\nremove = ["/etc/*", "/home/*"]'
    with pytest.raises(SpecError, match="/etc is not a directory"):
        build(of_directory(root, more), str(place / "i"))
    (root / "etc").unlink()
    (root / "var").unlink()
    (root / "etc").symlink_to("/real")
    build(of_directory(root, more), str(place / "i"))
    assert (outside / "passwd").read_text() == "of the host"
    only(outside, "passwd")
    with mounted(place / "i") as inside:
        assert (inside / "real/x").read_text() == "inside"
        assert (inside / "real/machine-id").exists()
        assert (inside / "fifo").read_text() == "a file"
        assert stat.S_ISFIFO((inside / "usr/pipe").lstat().st_mode)


def test_a_tar_cannot_write_outside(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"evil") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode, info.devmajor, info.devminor = kind, link, 0o6755, 1, 3
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))

        add("usr", tarfile.DIRTYPE)
        add("out", tarfile.SYMTYPE, str(outside))
        add("out/through-link")
        add(f"{outside}/absolute")
        add("../../../../../../../.." + str(outside) + "/relative")
        add("usr/null", tarfile.CHRTYPE)
    try:
        build(recipe(f'type = "tar", path = "{tmp_path}/evil.tar"'), str(place / "i"))
    except SpecError:
        only(place)
    else:
        with mounted(place / "i") as inside:
            assert not (inside / "usr/null").exists()
    only(outside)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_sources_are_refused_in_a_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar")
    (tmp_path / "no-root").mkdir()
    (tmp_path / "no-root/file").touch()
    with tarfile.open(tmp_path / "short.tar", "w") as tar:
        info = tarfile.TarInfo("usr/file")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(bytes(100_000)))
    os.truncate(tmp_path / "short.tar", 50_000)
    cases = [
        ("directory", "none", SpecError, "none is not a directory"),
        ("directory", "no-root", SpecError, "the content holds no root file system"),
        ("directory", "", SpecError, "holds the place of temporary files"),
        ("tar", "none", SpecError, "none is not a file"),
        ("tar", "text", SpecError, "text cannot be unpacked: tar: This does not look like a tar archive"),
        ("tar", "short.tar", SpecError, "short.tar cannot be unpacked: tar: Unexpected EOF"),
        ("busybox", "text", HostError, "text cannot be used: chroot: failed to run command"),
        ("busybox", "/bin/sh", HostError, "/bin/sh cannot be used"),
    ]
    for kind, path, error, words in cases:
        with pytest.raises(error) as caught:
            build(recipe(f'type = "{kind}", path = "{tmp_path}/{path}"'.replace(f"{tmp_path}//", "/")), str(place / "i"))
        assert words in caught.value.message
        assert "\n" not in caught.value.message
        only(place)


@pytest.mark.parametrize("format", ["ext4", "xfs", "btrfs"])
def test_a_size_too_small_is_said(format: str, content: Path, place: Path) -> None:
    (content / "big").write_bytes(os.urandom(20 << 20))
    for size in ("8M", "29M"):
        with pytest.raises(SpecError, match=f"image.size: {size[:-1]} MiB is too small for the content"):
            build(of_directory(content, f'image = {{format = "{format}", size = "{size}"}}'), str(place / "i"))
        only(place)


def test_an_existing_file_is_only_replaced_when_told_to(content: Path, place: Path) -> None:
    mine = of_directory(content, 'image = {format = "erofs"}')
    image = place / "i"
    image.write_text("precious")
    with pytest.raises(SpecError, match=f"{image} exists$"):
        build(mine, str(image))
    assert image.read_text() == "precious"
    (place / "link").symlink_to("i")
    build(mine, str(place / "link"), force=True)
    assert probe(str(image)).fstype == "erofs"
    assert (place / "link").is_symlink()
    os.mkfifo(place / "fifo")
    for path in (place, place / "fifo", Path("/dev/null")):
        with pytest.raises(SpecError, match="exists and is not a file"):
            build(mine, str(path), force=True)
    with pytest.raises(SpecError, match="there is no directory"):
        build(mine, str(place / "none/i"))
    only(place, "i", "link", "fifo")


def test_an_image_in_use_is_not_replaced(content: Path, place: Path) -> None:
    mine = of_directory(content)
    image = place / "i"
    build(mine, str(image))
    before = image.stat().st_ino
    with open_image(str(image), "read-only"), pytest.raises(ImageBusy, match=f"{image} is in use"):
        build(mine, str(image), force=True)
    with image.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(ImageBusy, match=f"{image} is in use"):
            build(mine, str(image), force=True)
    assert image.stat().st_ino == before
    build(mine, str(image), force=True)
    assert image.stat().st_ino != before
    only(place, "i")


def test_one_that_appears_meanwhile_is_kept(content: Path, place: Path) -> None:
    image = place / "i"

    def appear(words: str) -> None:
        if words.startswith("making"):
            image.write_text("of somebody else")

    with pytest.raises(SpecError, match="has appeared meanwhile"):
        build(of_directory(content), str(image), progress=appear)
    assert image.read_text() == "of somebody else"
    only(place, "i")


@pytest.mark.parametrize("program", ["mke2fs", "mmdebstrap", "dnf"])
def test_a_missing_program_is_named_with_its_package(
    program: str, content: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgrun.building.tools._SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(place / "empty"))
    (place / "empty").mkdir()
    for name in ("rm", "mke2fs", "mmdebstrap", "dnf"):
        if name != program and (path := shutil.which(name, path="/usr/bin:/usr/sbin")):
            (place / "empty" / name).symlink_to(path)
    mine = {
        "mke2fs": of_directory(content),
        "mmdebstrap": recipe('type = "debian", release = "trixie"'),
        "dnf": parse('packages = ["bash"]\nsource = {type = "fedora", release = "42"}', "/recipes/mine.toml"),
    }
    with pytest.raises(HostError, match=f"the program {program} is not installed") as caught:
        build(mine[program], str(place / "i"))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("install the package ")
    only(place, "empty")


# -- full disks, interruptions -----------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    run_tool("mount", "-t", "tmpfs", "-o", f"size={size}", "small", path)
    try:
        yield
        assert [name for name in os.listdir(path) if name != "lost+found"] == []
    finally:
        run_tool("umount", path)


@pytest.mark.parametrize(
    ("format", "table", "size"),
    [
        ("ext4", "none", "12m"),
        ("ext4", "gpt", "12m"),
        ("ext4", "gpt", "40m"),  # has room for the file system, not for the disk around it
        ("xfs", "none", "12m"),
        ("xfs", "none", "30m"),
        ("btrfs", "none", "12m"),
        ("squashfs", "none", "12m"),
        ("squashfs", "gpt", "40m"),
        ("erofs", "none", "12m"),
    ],
)
def test_a_full_disk_is_said_and_left_as_it_was(format: str, table: str, size: str, content: Path, tmp_path: Path) -> None:
    (content / "big").write_bytes(os.urandom(24 << 20))
    mine = of_directory(content, f'image = {{format = "{format}", table = "{table}"}}')
    small = tmp_path / "small"
    with small_disk(small, size), pytest.raises(NoSpace, match=f"no space left on the file system of {small}"):
        build(mine, str(small / "i"))


def test_no_room_for_temporary_files_is_said(content: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = place.parent / "small"
    (content / "big").write_bytes(os.urandom(24 << 20))
    tar = place.parent / "root.tar"
    run_tool("tar", "--create", f"--directory={content}", f"--file={tar}", ".")
    monkeypatch.setenv("TMPDIR", str(small))
    for mine in (of_directory(content), recipe(f'type = "tar", path = "{tar}"')):
        with small_disk(small, "12m"), pytest.raises(NoSpace, match=f"no space left on the file system of {small}"):
            build(mine, str(place / "i"))
        only(place)


def test_an_unsparse_image_that_does_not_fit_is_refused(content: Path, tmp_path: Path) -> None:
    mine = of_directory(content, 'image = {size = "64M", sparse = false}')
    with small_disk(tmp_path / "small", "40m"), pytest.raises(NoSpace):
        build(mine, str(tmp_path / "small/i"))


@pytest.fixture
def slow(content: Path, tmp_path: Path) -> Path:
    """A recipe whose steps take long enough to be interrupted."""
    (content / "many").mkdir()
    for number in range(30):
        (content / "many" / str(number)).write_bytes(os.urandom(8 << 20))
    path = tmp_path / "slow.toml"
    path.write_text(f'[source]\ntype = "directory"\npath = "{content}"\n[image]\nformat = "squashfs"\n')
    return path


@pytest.mark.parametrize("step", ["copying", "making"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_leaves_nothing(
    step: str, signum: signal.Signals, slow: Path, place: Path, imgrun: Imgrun
) -> None:
    process = imgrun.popen("image", "build", slow, place / "i")
    assert process.stderr is not None
    while not process.stderr.readline().decode().startswith(f"slow: {step}"):
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signum)
    stderr = process.stderr.read().decode()
    assert process.wait() == 128 + signum
    refused(Done(128 + signum, "", stderr[stderr.index("imgrun: ") :]), 128 + signum, "interrupted", hint=False)
    only(place)


DISTURBED = """
import os, signal, subprocess, sys
import imgrun.cli
begin, stop = subprocess.Popen.__init__, []
def disturbed(self, words, *args, **options):
    begin(self, words, *args, **options)
    if words[0] == sys.argv[1] and not stop:
        stop.append(1)
        os.kill(os.getpid(), signal.SIGINT)
subprocess.Popen.__init__ = disturbed
imgrun.cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("program", ["cp", "rm"])
def test_a_build_interrupted_while_it_starts_a_program_leaves_nothing(
    program: str, slow: Path, place: Path, own_places: Path
) -> None:
    """Neither does the program run on, nor is what removes all of it interrupted."""
    words = [sys.executable, "-c", DISTURBED, program, "image", "build", str(slow), str(place / "i")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done
    assert "Traceback" not in done.stderr
    assert not running(own_places)
    assert os.listdir(own_places) == []
    if program == "rm":
        assert "interrupted when" in done.stderr, "it is complete by then"
        only(place, "i")
    else:
        assert "i was not written" in done.stderr
        only(place)


def test_what_a_killed_build_leaves_the_next_one_removes(slow: Path, place: Path, own_places: Path, imgrun: Imgrun) -> None:
    process = imgrun.popen("image", "build", slow, place / "i")
    assert process.stderr is not None
    while not process.stderr.readline().decode().startswith("slow: making"):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert len(os.listdir(place)) == len(os.listdir(own_places)) == 1
    # Its programs may go on for a moment: they are not confined, since they run nothing of others.
    eventually(lambda: not running(own_places), "the programs of the killed build end")
    done = imgrun("image", "build", slow, place / "i", timeout=120)
    assert done.status == 0, done
    only(place, "i")


def running(place: Path) -> list[str]:
    """The processes with ``place`` in their command."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(place) in words:
            found.append(words)
    return found


def test_builds_of_one_name_at_once_do_not_mix(content: Path, place: Path, imgrun: Imgrun) -> None:
    mine = place.parent / "mine.toml"
    mine.write_text(f'[source]\ntype = "directory"\npath = "{content}"\n[image]\nformat = "erofs"\n')
    processes = [imgrun.popen("image", "build", mine, place / "i") for _ in range(6)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in processes]
    assert sorted(status for _, status in ends) == [0, 125, 125, 125, 125, 125]
    assert all(status == 0 or "appeared meanwhile" in words or "exists" in words for words, status in ends)
    only(place, "i")
    assert inspect(str(place / "i"))["runnable"] is True


# -- distributions -----------------------------------------------------------------------------------------------------


def online(make: Callable[[], Built]) -> Built:
    """Build, or skip where the mirror cannot be reached."""
    try:
        return make()
    except HostError as error:
        if "cannot be reached" in error.message:
            pytest.skip(error.message)
        raise


SMALL = 'type = "debian", release = "trixie", variant = "essential"'


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_debian_of_another_release_runs_and_comes_from_the_cache_again(
    place: Path, package_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = online(lambda: build(recipe(SMALL), str(place / "a"), progress=said.append))
    assert "downloading packages" in said
    assert first.cached is False
    assert [name for name in os.listdir(package_cache) if not name.endswith(".tar")] == []
    monkeypatch.setenv("IMGRUN_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")  # nobody answers, and nobody is asked
    again = build(recipe(SMALL, 'image = {format = "squashfs"}', name="other"), str(place / "b"))
    assert again.cached is True
    for image in ("a", "b"):
        with mounted(place / image) as root:
            assert "VERSION_CODENAME=trixie" in (root / "etc/os-release").read_text()
            for name in ("machine-id", "hostname", "resolv.conf"):
                path = root / "etc" / name
                assert (path.read_bytes(), oct(path.stat().st_mode)) == (b"", "0o100644")
            assert os.listdir(root / "dev") == []
            assert [n for n in os.listdir(root / "var/lib/apt/lists") if n not in ("lock", "partial", "auxfiles")] == []
            version = subprocess.run(["chroot", root, "/bin/bash", "-c", "echo $BASH_VERSION; stat -c %U:%G /var/mail"],
                                     capture_output=True, text=True, check=True)  # fmt: skip
            assert version.stdout.startswith("5.2")
            assert version.stdout.endswith("root:mail\n")
    with pytest.raises(HostError, match=r"the mirror for trixie cannot be reached: .*Connection refused"):
        build(recipe(SMALL), str(place / "c"), use_cache=False)
    only(place, "a", "b")


@pytest.mark.timeout(300)
def test_what_apt_refuses_is_one_line(place: Path, package_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir(package_cache)
    for release, words in (("nosuch", r"source\.release: \S+ has no release 'nosuch'"),):
        with pytest.raises((SpecError, HostError)) as caught:
            build(recipe(f'type = "debian", release = "{release}"'), str(place / "i"))
        if "cannot be reached" in caught.value.message:
            pytest.skip(caught.value.message)
        caught.match(words)
    wrong = place.parent / "wrong.gpg"
    wrong.touch()
    monkeypatch.setenv("IMGRUN_DEBIAN_KEYRING", str(wrong))
    with pytest.raises(HostError, match="signed with a key this host does not know"):
        build(recipe('type = "debian", release = "trixie"', name="unsigned"), str(place / "i"), use_cache=False)
    monkeypatch.setenv("IMGRUN_DEBIAN_MIRROR", "http://mirror.invalid/debian")
    with pytest.raises(HostError, match=r"cannot be reached: .*resolv.* 'mirror\.invalid'"):
        build(recipe('type = "debian", release = "sid"'), str(place / "i"))
    only(place)
    assert os.listdir(package_cache) == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_installation_leaves_no_process(
    place: Path, own_places: Path, package_cache: Path, imgrun: Imgrun
) -> None:
    mine = place.parent / "deb.toml"
    mine.write_text(f"source = {{{SMALL}}}")
    process = imgrun.popen("image", "build", "--no-cache", mine, place / "i")
    assert process.stderr is not None
    lines = []
    while not (lines or [""])[-1].startswith("deb: extracting"):
        lines.append(process.stderr.readline().decode())
        if process.poll() is not None:
            pytest.skip(f"the packages cannot be had: {''.join(lines)}")
    process.kill()
    process.wait()
    # Nobody was left to tell them: they die with their parent.
    eventually(lambda: not running(own_places), "mmdebstrap and all it started end", 10)
    shutil.rmtree(own_places)
    shutil.rmtree(next(place.iterdir()))
    for path in package_cache.glob("*.part"):
        path.unlink()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A directory of .repo files for a repository with one package, the whole of a distribution."""
    for name in ("dnf", "rpmbuild", "createrepo_c"):
        tool(name)
    (tmp_path / "tiny.spec").write_text(
        """
Name: tiny
Version: 1
Release: 1
Summary: A distribution
License: MIT
AutoReqProv: no
Provides: /bin/sh
%description
%install
mkdir -p %{buildroot}/usr/bin %{buildroot}/etc
cp """
        + tool("busybox")
        + """ %{buildroot}/usr/bin/busybox
ln -s busybox %{buildroot}/usr/bin/sh
ln -s usr/bin %{buildroot}/bin
echo 'PRETTY_NAME="Tiny 9"' > %{buildroot}/etc/os-release
%files
/usr/bin/*
/bin
/etc/os-release
%post -p /bin/sh
echo written > /dev/null && /bin/busybox readlink /proc/self > /etc/installed
while :; do /bin/busybox sleep 100; done > /dev/null 2>&1 &
"""
    )
    run_tool("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {tmp_path}/top", tmp_path / "tiny.spec")
    run_tool("createrepo_c", "-q", tmp_path / "top/RPMS")
    repos = tmp_path / "repos.d"
    repos.mkdir()
    (repos / "tiny.repo").write_text(f"[tiny]\nname=tiny\nbaseurl=file://{tmp_path}/top/RPMS\ngpgcheck=0\n")
    return repos


def test_dnf_installs_from_a_repository(repository: Path, place: Path, own_places: Path) -> None:
    def mine(packages: str, repos: str) -> Recipe:
        return parse(f'packages = [{packages}]\nsource = {{type = "fedora", release = "9"{repos}}}', "/recipes/mine.toml")

    with_repository = f', repos = "{repository}"'
    built = build(mine('"tiny"', with_repository), str(place / "i"))
    assert built.cached is False
    assert not running(own_places)  # the process that its script had left
    assert build(mine('"tiny"', with_repository), str(place / "j")).cached is True
    with mounted(place / "j") as root:
        assert (root / "etc/installed").read_text().strip().isdigit()
        assert os.listdir(root / "dev") == []
    assert inspect(str(place / "i"))["os"]["name"] == "Tiny 9"
    with pytest.raises(SpecError, match="packages: 9 has no package 'none'"):
        build(mine('"tiny", "none"', with_repository), str(place / "k"))
    (repository / "tiny.repo").write_text("[away]\nname=away\nbaseurl=http://127.0.0.1:9/\ngpgcheck=0\n")
    with pytest.raises(HostError, match=r"dnf's repositories cannot be reached: .*127"):
        build(mine('"tiny"', with_repository), str(place / "k"))
    with pytest.raises(SpecError, match=r"source.repos: \S+ is not a directory"):
        build(mine('"tiny"', ', repos = "/none"'), str(place / "k"))
    only(place, "i", "j")


def test_busybox_boots_and_powers_off(place: Path, imgrun: Imgrun, tmp_path: Path) -> None:
    done = imgrun("image", "build", "--json", RECIPES / "busybox.toml", place / "i")
    assert done.status == 0, done
    assert json.loads(done.stdout)["format"] == "ext4"
    with mounted(place / "i") as root:
        ours = tmp_path / "root"
        shutil.copytree(root, ours, symlinks=True)
    (ours / "etc/init.d/job").write_text("echo the job ran as $$\n")
    boot = ["unshare", "--pid", "--fork", "--uts", "--kill-child", "chroot", str(ours), "/sbin/init"]
    end = subprocess.run(boot, capture_output=True, text=True, timeout=60, check=False)
    assert "busybox: init is process 1" in end.stdout
    assert "the job ran as" in end.stdout
    assert end.stdout.rstrip().splitlines()[-1] != ""
    # What a PID namespace makes of RB_POWER_OFF, see reboot(2).
    assert end.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


# -- without root ------------------------------------------------------------------------------------------------------


def as_nobody(script: str, place: Path, subordinate: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as an ordinary user, for whom /etc/subuid has the line ``subordinate``."""
    ids = place.parent / "subid"
    ids.write_text(subordinate)
    outer = 'mount --bind "$0" /etc/subuid && mount --bind "$0" /etc/subgid && exec setpriv --reuid 65534 '
    outer += '--regid 65534 --clear-groups sh -c "$1"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", outer, ids, script], capture_output=True, text=True, check=False, timeout=300
    )  # fmt: skip


@contextmanager
def open_to_all(path: Path) -> Iterator[None]:
    """Let an ordinary user reach a directory of pytest's."""
    closed = [(p, p.stat().st_mode) for p in path.parents if not p.stat().st_mode & 0o001]
    for parent, mode in closed:
        parent.chmod(mode | 0o011)
    try:
        yield
    finally:
        for parent, mode in closed:
            parent.chmod(mode)


@pytest.mark.parametrize("format", ["ext4", "btrfs", "squashfs", "erofs"])
def test_an_ordinary_user_builds_with_subordinate_ids(format: str, content: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    tar = mine / "root.tar"
    run_tool("tar", "--create", "--xattrs", "--xattrs-include=*", f"--directory={content}", f"--file={tar}", ".")
    (mine / "r.toml").write_text(f'source = {{type = "tar", path = "root.tar"}}\nimage = {{format = "{format}"}}')
    os.chown(mine, NOBODY, NOBODY)
    script = f"cd {mine} && mkdir tmp && TMPDIR={mine}/tmp exec {' '.join(COMMAND)} image build r.toml i"
    with open_to_all(mine):
        done = as_nobody(script, mine, "nobody:300000:65536\n")
    assert done.returncode == 0, done.stderr
    assert (mine / "i").stat().st_uid == NOBODY
    only(mine, "i", "r.toml", "root.tar", "tmp")
    assert os.listdir(mine / "tmp") == []
    before = listing(content)
    with mounted(mine / "i") as root:
        after = listing(root)
    for path in set(before) - TOUCHED - {"dev/null", "home", "home/block"}:
        assert after[path] == before[path], path


def test_without_subordinate_ids_an_ordinary_user_is_told(content: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    (mine / "r.toml").write_text(f'source = {{type = "directory", path = "{content}"}}')
    command = f"cd {mine} && exec {' '.join(COMMAND)} image build"
    with open_to_all(mine):
        none = as_nobody(f"{command} r.toml i", mine, "")
        xfs = as_nobody(f"{command} --format xfs r.toml i", mine, "nobody:300000:65536\n")
    refused(Done(none.returncode, none.stdout, none.stderr), 125, "needs subordinate ids")
    refused(Done(xfs.returncode, xfs.stdout, xfs.stderr), 125, "an xfs image can only be made as root")
    only(mine, "r.toml")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_builds_and_inspects(content: Path, place: Path, imgrun: Imgrun, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f'[source]\ntype = "directory"\npath = "{content}"\n[image]\nsize = "64M"\nlabel = "x"\n')
    image = place / "i"
    done = imgrun("image", "build", mine, image)
    assert (done.status, done.stdout.split(",")[0]) == (0, f"{image}: ext4"), done
    assert done.stderr.splitlines()[-1].startswith("mine: making the ext4 file system")
    refused(imgrun("image", "build", mine, image), 125, f"{image} exists")
    done = imgrun("image", "build", "--force", "--json", "--format", "squashfs", "--table", "gpt", mine, image)
    record = json.loads(done.stdout)
    assert (record["format"], record["table"], record["cached"]) == ("squashfs", "gpt", None)
    shown = imgrun("image", "inspect", image).stdout
    assert "squashfs in a gpt disk" in shown
    assert "Tiny 1" in shown
    assert "runs here     yes" in shown
    assert json.loads(imgrun("image", "inspect", "--json", image).stdout)["format"] == "squashfs"
    debug = imgrun("--debug", "image", "build", "-f", mine, image)
    assert "\n+ " in debug.stderr
    assert "mke2fs" in debug.stderr
    mine.write_text('[source]\ntype = "tarr"\n')
    refused(imgrun("image", "build", "-f", mine, image), 125, f"{mine}: source.type: 'tarr' is not one of")
    refused(imgrun("image", "inspect", place / "none"), 125, "none")
    for size in ("1X", "5"):
        refused(imgrun("image", "build", "-f", "--size", size, RECIPES / "busybox.toml", image), 125, "size")
