"""Small images for the tests, each made by the real tools, none of which needs a privilege.

``Images`` keeps what it makes for the session: ask for the same image twice and it is made once. Take ``copy`` of one that
the test is going to change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from command import COMMAND, eventually
from leaks import loops_of

KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "squashfs", "erofs")
WRITABLE_KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
TOP = Path(__file__).parents[1]
CACHE = Path(os.environ.get("IMGRUN_CACHE") or Path.home() / ".cache/imgrun-dev")
SIZES = {"ext2": 32 << 20, "ext3": 32 << 20, "ext4": 32 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}
APPLETS = ("sh", "cat", "chmod", "chown", "cp", "dd", "df", "echo", "env", "false", "find", "grep", "head", "hostname", "id",
           "ip", "kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mknod", "mount", "mv", "nproc", "ps", "pwd", "readlink",
           "rm", "sed", "seq", "sha256sum", "sleep", "sort", "stat", "stty", "sync", "tee", "test", "touch", "tr", "true",
           "tty", "umount", "uname", "wc", "yes")  # fmt: skip
ROOT_X86_64 = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
ROOT_ARM64 = "b921b045-1df0-41c3-af44-4c6f280d3fae"
ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
LINUX_DATA = "0fc63daf-8483-4772-8e79-3d69d8477de4"
SWAP = "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"
MIB = 1 << 20


def tool(name: str) -> str:
    """The path of a program that makes images; the test is skipped without it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, stdin: str | None = None) -> str:
    """Run a tool; its output when it succeeds, a failed test with its words when not."""
    done = subprocess.run(
        [tool(str(command[0])), *map(str, command[1:])], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build_tree(path: Path, *, os_release: bool = True, program: bytes | None = None) -> Path:
    """A root file system of a few files: busybox under its usual names, and what a job needs to find.

    ``program`` takes the place of busybox, for images that are not meant to run.
    """
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "var/tmp"):
        (path / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (path / name).chmod(0o1777)
    (path / "root").chmod(0o700)
    busybox = path / "bin/busybox"
    if program is not None:
        busybox.write_bytes(program)
    else:
        shutil.copy(tool("busybox"), busybox)
        assert not needs_interpreter(busybox.read_bytes()), "these tests need busybox-static"
    busybox.chmod(0o755)
    for name in APPLETS:
        (path / "bin" / name).symlink_to("busybox")
    (path / "usr/bin/env").symlink_to("../../bin/busybox")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (path / "etc/motd").write_text("of the image\n")
    if os_release:
        (path / "usr/lib/os-release").write_text(
            'NAME="Test OS"\nPRETTY_NAME="Test OS 1.0 (tiny)"\nID=testos\nVERSION_ID="1.0"\n'
        )
        (path / "etc/os-release").symlink_to("../usr/lib/os-release")
    return path


def needs_interpreter(program: bytes) -> bool:
    """Whether a 64-bit little-endian executable is dynamically linked: it has a PT_INTERP header (elf(5))."""
    start, size, count = struct.unpack_from("<Q", program, 32) + struct.unpack_from("<HH", program, 54)
    return any(struct.unpack_from("<I", program, start + i * size)[0] == 3 for i in range(count))


def elf_header(machine: int, *, bits: int = 64, little: bool = True) -> bytes:
    """The first bytes of an executable for another processor (elf(5))."""
    order = "little" if little else "big"
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1 if little else 2, 1]) + bytes(9)
    return ident + (2).to_bytes(2, order) + machine.to_bytes(2, order) + (1).to_bytes(4, order) + bytes(104)


def make_filesystem(
    kind: str,
    path: Path,
    tree: Path | None,
    *,
    size: int | None = None,
    block_size: int | None = None,
    sector_size: int | None = None,
    label: str = "",
    uuid: str = "",
    options: Sequence[str] = (),
) -> Path:
    """Make a bare file system of ``kind`` with the files of ``tree`` in it.

    Owners are root's, but those of the ext family and btrfs are the tree's own.
    """
    if kind in SIZES:
        with path.open("wb") as f:
            f.truncate(size or SIZES[kind])
    if kind in ("ext2", "ext3", "ext4"):
        command = ["mke2fs", "-q", "-F", "-t", kind, "-E", "root_owner=0:0", *(["-d", str(tree)] if tree else [])]
        command += ["-b", str(block_size or 4096), *(["-L", label] if label else []), *(["-U", uuid] if uuid else [])]
        run(*command, *options, path)
    elif kind == "xfs":
        command = ["mkfs.xfs", "-q", "-f", "-s", f"size={sector_size or 512}", "-b", f"size={block_size or 4096}"]
        command += [*(["-L", label] if label else []), *(["-m", f"uuid={uuid}"] if uuid else []), *options]
        with_files = []
        if tree:
            proto = path.with_name(f"{path.name}.proto")
            proto.write_text(_xfs_prototype(tree))
            with_files = ["-p", str(proto)]
        run(*command, *with_files, path)
    elif kind == "btrfs":
        command = ["mkfs.btrfs", "-q", *(["--rootdir", str(tree)] if tree else []), *(["-L", label] if label else [])]
        run(*command, *(["-U", uuid] if uuid else []), *options, path)
    elif kind == "squashfs":
        path.unlink(missing_ok=True)
        run("mksquashfs", tree or path.parent, path, "-quiet", "-no-progress", "-all-root", *options)
    elif kind == "erofs":
        path.unlink(missing_ok=True)
        # It names its progress on stdout, and the label only with -L from 1.6 on.
        command = ["mkfs.erofs", "--all-root", *(["-U", uuid] if uuid else []), *options]
        run(*command, path, tree or path.parent)
    else:
        raise ValueError(kind)
    return path


class Part(NamedTuple):
    """A partition of a disk to be made: ``content`` is copied into it; ``size`` defaults to the content's."""

    type: str = LINUX_DATA
    content: Path | None = None
    size: int | None = None
    label: str = ""
    uuid: str = ""
    attributes: str = ""

    def bytes(self) -> int:
        wanted = self.size or (self.content.stat().st_size if self.content else MIB)
        return -(-wanted // MIB) * MIB


def make_disk(path: Path, parts: Sequence[Part], *, table: str = "gpt", sector_size: int = 512) -> Path:
    """Make a partitioned disk. With more than four partitions in an MBR, give the fourth the type ``extended``."""
    # One MiB in front of each: for the table, for alignment, and for the boot records of logical partitions.
    offset = MIB
    lines = [f"label: {table}", "unit: sectors"]
    places = []
    for number, part in enumerate(parts, start=1):
        length = part.bytes()
        if part.type == "extended":
            length = sum(p.bytes() + MIB for p in parts[number:]) + MIB
        fields = [f"start={offset // sector_size}", f"size={length // sector_size}", f"type={_table_type(part.type, table)}"]
        fields += [f'name="{part.label}"'] if part.label else []
        fields += [f"uuid={part.uuid}"] if part.uuid else []
        fields += [f'attrs="{part.attributes}"'] if part.attributes else []
        lines.append(", ".join(fields))
        places.append(offset)
        offset += MIB if part.type == "extended" else length + MIB
    with path.open("wb") as f:
        f.truncate(offset + MIB)
    script = "\n".join(lines) + "\n"
    if sector_size == 512:
        run("sfdisk", "-q", path, stdin=script)
    else:
        # Only fdisk takes a sector size for a file.
        listing = path.with_name(f"{path.name}.sfdisk")
        listing.write_text(script)
        run("fdisk", "-b", str(sector_size), path, stdin=f"I\n{listing}\nw\n")
    for part, place in zip(parts, places, strict=True):
        if part.content is not None:
            copy_into(part.content, path, place)
    return path


def copy_into(source: Path, target: Path, offset: int) -> None:
    """Copy a file's data, not its holes, to ``offset`` of another."""
    with source.open("rb") as src, target.open("r+b") as dst:
        position = 0
        while True:
            try:
                position = os.lseek(src.fileno(), position, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(src.fileno(), position, os.SEEK_HOLE)
            while position < end:
                data = os.pread(src.fileno(), min(end - position, MIB), position)
                position += os.pwrite(dst.fileno(), data, offset + position)


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Images:
    """A session's images, by what they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[tuple[object, ...], Path] = {}

    def tree(self) -> Path:
        return self._once(("tree",), build_tree)

    def filesystem(self, kind: str, **options: object) -> Path:
        """A bare file system with the usual tree in it. Options as of make_filesystem. Not to be changed."""

        def make(path: Path) -> Path:
            return make_filesystem(kind, path, self.tree(), **options)  # type: ignore[arg-type]

        return self._once((kind, *sorted((k, str(v)) for k, v in options.items())), make)

    def data(self) -> Path:
        """A small ext4 file system that holds no operating system."""

        def make(path: Path) -> Path:
            (self.directory / "data").mkdir()
            (self.directory / "data/notes").write_text("nothing to run here\n")
            return make_filesystem("ext4", path, self.directory / "data", size=4 * MIB, label="notes")

        return self._once(("data",), make)

    def disk(self, *parts: Part, table: str = "gpt", sector_size: int = 512) -> Path:
        key = ("disk", parts, table, sector_size)
        return self._once(key, lambda path: make_disk(path, parts, table=table, sector_size=sector_size))

    def copy(self, source: Path, target: Path) -> Path:
        """A copy that the test may change; holes stay holes."""
        with target.open("wb") as f:
            f.truncate(source.stat().st_size)
        copy_into(source, target, 0)
        return target

    def _once(self, key: tuple[object, ...], make: Callable[[Path], Path]) -> Path:
        if key not in self._made:
            path = self.directory / f"{len(self._made)}-{key[0]}"
            self._made[key] = make(path)
        return self._made[key]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def clean_afterwards(images: Images, tmp_path: Path) -> Iterator[None]:
    """After a test that uses images in this process: the descriptors, mounts and loop devices of before."""
    descriptors = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == descriptors
    for directory in (tmp_path, images.directory):
        assert str(directory) not in Path("/proc/self/mounts").read_text()
        eventually(lambda d=directory: not loops_of(d), f"loop devices of {directory} are freed")  # type: ignore[misc]


def _table_type(kind: str, table: str) -> str:
    if table == "gpt":
        return kind
    return {"extended": "5", LINUX_DATA: "83", SWAP: "82", ESP: "ef"}.get(kind, kind)


def _xfs_prototype(tree: Path) -> str:
    """The tree in the language of mkfs.xfs -p."""
    lines = ["unused", "0 0"]

    def add(directory: Path, depth: int) -> None:
        for entry in sorted(directory.iterdir()):
            mode = entry.lstat().st_mode
            flags = f"{'u' if mode & 0o4000 else '-'}{'g' if mode & 0o2000 else '-'}{mode & 0o777:03o} 0 0"
            pad = "  " * depth
            if entry.is_symlink():
                lines.append(f"{pad}{entry.name} l{flags} {os.readlink(entry)}")
            elif entry.is_dir():
                lines.append(f"{pad}{entry.name} d{flags}")
                add(entry, depth + 1)
                lines.append(f"{pad}$")
            else:
                lines.append(f"{pad}{entry.name} -{flags} {entry}")

    lines.append("d--755 0 0")
    add(tree, 1)
    lines.append("$")
    return "\n".join(lines) + "\n"


def programs(directory: Path) -> Path:
    """The image of images/numpy.toml in a directory: made once for all sessions, and anew when the recipe changes."""
    recipe = TOP / "images/numpy.toml"
    path = CACHE / f"images/numpy-{hashlib.sha256(recipe.read_bytes()).hexdigest()[:12]}.squashfs"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another session may be making it
        if not path.exists():
            words = [*COMMAND, "image", "build", recipe, path, "--format", "squashfs", "--size", "auto"]
            subprocess.run(words, check=True, env={**os.environ, "IMGRUN_CACHE": str(CACHE)})
    target = directory / "numpy.squashfs"
    if not target.exists():
        subprocess.run(["cp", "--reflink=auto", path, target], check=True)
        target.chmod(0o644)
    return target
