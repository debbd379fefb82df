"""A checkpoint as one file: written while the job stands still, read with suspicion."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Done, eventually, expect, kill, refused

from images import Images
from imgrun import Job, launcher
from imgrun.checkpoints import manifest

from .conftest import Rig
from .test_faults import children, kids
from .test_hosts import second  # noqa: F401 - a fixture

FILES = """
echo a > /root/file; ln -s /etc/passwd /root/link; mkfifo /root/fifo; rm /etc/motd; touch -d @86400 /root/file
ln /root/file /root/second; echo b > /tmp/file; chmod 4640 /tmp/file; echo d > /dev/shm/file
dd if=/dev/zero of=/root/sparse bs=1 count=1 seek=2147483647 2>/dev/null; echo end >> /root/sparse
rm -rf /etc/ssl; mkdir -p /etc/ssl /root/dir; echo new > /etc/ssl/new; touch -d @86400 /root/dir
echo ready; read go
echo $go $(cat /root/second /tmp/file /dev/shm/file /etc/ssl/new); tail -c 4 /root/sparse; stat -c %s /root/sparse
test -p /root/fifo && test ! -e /etc/motd && ls /etc/ssl && readlink /root/link
stat -c '%a %U' /tmp/file; stat -c '%Y %h' /root/file; stat -c %Y /root/dir
test $(du -k /root/sparse | cut -f1) -lt 100 && echo sparse
"""
AFTER = ["go a b d new", "end", "2147483652", "new", "/etc/passwd", "4640 root", "86400 2", "86400", "sparse"]
LITTLE = "echo ready; read go; echo $go"
GONE = "imgrun: whoever reads standard output went away before the archive was complete"


def frozen(rig: Rig, name: str, *words: str, script: str = LITTLE, flags: tuple[str, ...] = ()) -> Path:
    """Freeze a job with this script to an archive of this name, and see it end."""
    archive = rig.path(name)
    process = rig.run.foreground(script, "--name", "a", *flags)
    expect(process, "ready")
    assert rig.run("checkpoint", "--archive", archive, *words, "a") == Done(0, "", "")
    assert process.wait(60) == 85
    assert sorted(p.name for p in rig.directory.glob(f"{name}*")) == [name]
    return archive


def nothing_unpacked(rig: Rig) -> None:
    assert not list((rig.run.state / "unpacked").glob("*"))


@pytest.mark.parametrize("name", ["c.tar", "c.tar.zst"])
def test_everything_is_as_it_was(rig: Rig, name: str) -> None:
    archive = frozen(rig, name, script=FILES)
    with archive.open("rb") as f:
        assert (f.read(4) == b"\x28\xb5\x2f\xfd") == name.endswith("zst")
    assert archive.stat().st_size < 64 << 20, "holes were written"
    assert archive.stat().st_mode & 0o077 == 0
    before = archive.read_bytes()
    for _ in range(2):
        done = rig.restore(archive, stdin="go\n")
        assert (done.status, done.stderr) == (0, ""), done
        assert done.stdout.splitlines() == AFTER
        nothing_unpacked(rig)
    assert archive.read_bytes() == before


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_tar_can_read_it(rig: Rig) -> None:
    archive = frozen(rig, "c.tar", script=FILES)
    place = rig.make("unpacked")
    subprocess.run(["tar", "-C", place, "--xattrs", "--xattrs-include=*", "-xpf", archive], check=True)
    assert (place / "files/upper/root/sparse").stat().st_size == 2147483652
    assert rig.run("check", place).status == 0
    done = rig.restore(place, stdin="go\n")
    assert done.stdout.splitlines() == AFTER, done


@pytest.mark.parametrize(
    ("rig", "flags"), [("user", ("--tmpfs", "/mem")), ("root", ("--scratch-size", "32M")), ("root", ("--userns", "off"))],
    indirect=["rig"], ids=str,
)  # fmt: skip
def test_of_other_kinds_of_jobs(rig: Rig, flags: tuple[str, ...]) -> None:
    script = "echo a > /root/file; echo b > /tmp/file; echo ready; read go; cat /root/file /tmp/file; echo $go"
    archive = frozen(rig, "c", "--compress", script=script, flags=flags)
    assert rig.restore(archive, stdin="go\n").stdout == "a\nb\ngo\n"


def test_left_running_and_through_a_pipe(rig: Rig) -> None:
    job = rig.run.background("echo a > /file; echo ready; while [ ! -e /tmp/stop ]; do sleep 0.05; done; cat /file; echo end")
    rig.reaches(job, "ready")
    process = rig.run.popen("checkpoint", "--leave-running", "--compress", "--archive", "-", job)
    data, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    rig.path("c").write_bytes(data)
    rig.give(rig.path("c"))
    assert rig.run("exec", job, "touch", "/tmp/stop").status == 0
    assert rig.run("wait", job).status == 0
    again = rig.restore(rig.path("c"), "--detach").stdout.strip()
    nothing_unpacked(rig)
    assert rig.run("exec", again, "touch", "/tmp/stop").status == 0
    assert rig.run("wait", again).status == 0
    assert rig.output(again) == ["a", "end"]


def test_a_job_lives_on_when_its_archive_cannot_be_written(rig: Rig) -> None:
    job = rig.run.background(
        "dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null; echo ready; while :; do echo t; sleep 0.05; done"
    )
    rig.reaches(job, "ready")
    for words in ((), ("--compress",)):
        for taken in (0, 1000):  # whoever reads it goes away, at once or later
            read, write = os.pipe()
            process = rig.run.popen("checkpoint", *words, "--archive", "-", job, stdout=write)
            os.close(write)
            os.read(read, taken)
            os.close(read)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 125
            assert errors.decode().splitlines() == [GONE, "  see why it ended"]
    with Path("/dev/full").open("w") as f:
        refused(rig.run("checkpoint", "--archive", "-", job, stdout=f), 125, "no space for the checkpoint on standard output")
    with Path("/dev/null").open() as f:
        refused(rig.run("checkpoint", "--archive", "-", job, stdout=f), 125, "standard output is not open for writing")
    rig.make("file", "")
    refused(rig.run("checkpoint", "--archive", rig.path("file/c"), job), 125, "file is no directory")
    refused(rig.run("checkpoint", "--archive", rig.path("x" * 231), job), 125, "the name is too long")
    refused(rig.run("checkpoint", "--to", rig.path("x" * 231), job), 125, "the name is too long")
    refused(rig.run("checkpoint", "--archive", "", job), 125, "the path for the checkpoint is empty")
    if not rig.root:
        rig.path("roots").mkdir()
        for words in (("--archive", rig.path("roots/c")), ("--to", rig.path("roots/c"))):
            refused(rig.run("checkpoint", *words, job), 125, f"you may not write to {rig.path('roots')}")
    refused(rig.run("checkpoint", "--archive", "/proc/c.tar", job), 125, "could not be written to /proc/c.tar")
    refused(rig.run("checkpoint", "--archive", rig.make("dir"), job), 125, "cannot be replaced by an archive")
    before = len(rig.output(job))
    eventually(lambda: len(rig.output(job)) > before + 2, "it goes on")
    assert not list((rig.run.state / "jobs" / job).glob("*.new"))


def test_the_name_is_taken_over(rig: Rig) -> None:
    job = rig.run.background("sleep 1000", "--name", "mine")
    rig.freeze("mine")
    assert rig.run("inspect", job).status == 0
    again = rig.restore(rig.path("c"), "--detach").stdout.strip()
    assert json.loads(rig.run("inspect", "mine").stdout)["id"] == again
    refused(rig.run("start", "--name", "mine", rig.image, "true"), 125, "is in use by job")
    refused(rig.restore(rig.path("c"), "--detach", "--allow", "second-copy"), 125, "is in use by job")
    assert rig.run("rm", job).status == 0
    assert json.loads(rig.run("inspect", "mine").stdout)["state"] == "running"


def test_an_archive_of_which_one_runs_is_not_restored_again(rig: Rig) -> None:
    archive = frozen(rig, "c.tar")
    first = rig.run.popen("restore", archive)
    eventually(lambda: "running" in rig.run("ps").stdout, "the first one runs")
    refused(rig.restore(archive, stdin="go\n"), 125, "is running")
    nothing_unpacked(rig)
    assert first.communicate(b"go\n", timeout=60) == (b"go\n", b"")


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_by_the_library(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGRUN_STATE_DIR", str(rig.run.state))
    job = rig.run.background("echo ready; while [ ! -e /tmp/stop ]; do sleep 0.05; done; echo end")
    rig.reaches(job, "ready")
    done = Job.find(job).checkpoint(archive=str(rig.path("c.tar.zst")))
    assert done["statistics"]["pages_written"] > 0
    assert done["statistics"]["frozen_seconds"] > 0
    assert [step for step, _ in done["timings"]]
    again = Job.restore(str(rig.path("c.tar.zst")))
    nothing_unpacked(rig)
    assert rig.run("exec", again.id, "touch", "/tmp/stop").status == 0
    assert again.wait(60).exit_code == 0
    assert again.output() == b"end\n"
    launcher.close_server()


# -- hostile ones ------------------------------------------------------------------------------------------------------


def remade(archive: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Write the archive anew, with other members."""
    with tarfile.open(archive) as tar:
        members = [(m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar if m.name != "?"]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info, b"evil" if kind == tarfile.REGTYPE else b""


BAD: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "out of it": ([member("files/upper/../../../evil")], "which no checkpoint does"),
    "absolute": ([member("/evil")], "which no checkpoint does"),
    "beside it": ([member("evil")], "which no checkpoint does"),
    "not of the job's": ([member("files/evil/x")], "which no checkpoint does"),
    "through a link": (
        [member("files/upper/l", tarfile.SYMTYPE, linkname="/tmp"), member("files/upper/l/evil")], "cannot be unpacked",
    ),
    "over a file": ([member("files/upper/f"), member("files/upper/f")], "cannot be unpacked"),
    "over the manifest": ([member("manifest.json")], "which no checkpoint does"),
    "hard link out": ([member("files/upper/l", tarfile.LNKTYPE, linkname="/etc/passwd")], "outside of it"),
    "hard link to a link": (
        [
            member("files/upper/l", tarfile.SYMTYPE, linkname="/etc"),
            member("files/upper/h", tarfile.LNKTYPE, linkname="files/upper/l/passwd"),
        ],
        "cannot be unpacked",
    ),
    "device": ([member("files/upper/d", tarfile.CHRTYPE, devmajor=1, devminor=1)], "which no checkpoint does"),
    "disk": ([member("files/upper/d", tarfile.BLKTYPE, devmajor=8, devminor=0)], "of an unknown kind"),
    "link for images": ([member("processes/x.img", tarfile.SYMTYPE, linkname="/etc/passwd")], "which no checkpoint does"),
    "more members": ([member(f"files/upper/{n}", tarfile.DIRTYPE) for n in range(6000)], "more members"),
    "one more": ([member("files/upper/extra", mode=0o644)], "files/upper/extra does not belong there"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_hostile_one(rig: Rig, tmp_path: Path, what: str) -> None:
    archive = frozen(rig, "c.tar")
    members, words = BAD[what]
    remade(archive, lambda all_: all_.extend(members))
    refused(rig.restore(archive), 125, words)
    nothing_unpacked(rig)
    assert not Path("/evil").exists()
    assert not list(rig.directory.rglob("evil"))
    assert rig.run("ps").stdout.count("\n") == 1


def announce(members: list[tuple[tarfile.TarInfo, bytes]], **tree: int) -> None:
    """Have the manifest say that there is this much on disk."""
    record = json.loads(members[0][1])
    record["tree"] |= tree
    record["checksum"] = manifest.checksum(record)
    members[0] = (members[0][0], json.dumps(record).encode())


def test_bombs_and_damage(rig: Rig) -> None:
    archive = frozen(rig, "c.tar")
    good = archive.read_bytes()
    # More than is announced.
    big = member("files/upper/zeros")[0]
    remade(archive, lambda all_: all_.append((big, bytes(64 << 20))))
    subprocess.run(["zstd", "-q", "--rm", archive, "-o", f"{archive}.zst"], check=True)
    bomb = Path(f"{archive}.zst")
    rig.give(bomb)
    assert bomb.stat().st_size < 16 << 20
    refused(rig.restore(bomb), 125, "holds more bytes than its manifest says")
    # More announced than there is room for: refused before anything else is read.
    archive.write_bytes(good)
    rig.give(archive)
    remade(archive, lambda all_: announce(all_, bytes=1 << 60))
    refused(rig.restore(archive), 125, "MiB free")
    # A header that says it is huge.
    archive.write_bytes(good)
    with archive.open("r+b") as f:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 1 << 40
        f.write(info.tobuf(tarfile.USTAR_FORMAT) if info.size < 8 << 30 else info.tobuf(tarfile.GNU_FORMAT))
    refused(rig.restore(archive), 125)
    compressed = subprocess.run(["zstd", "-q", "-c"], input=good, capture_output=True, check=True).stdout
    for content in (good, compressed):
        for length in (1, 100, 5000, len(content) // 2):
            archive.write_bytes(content[:length])
            refused(rig.restore(archive), 125, "it ends early")
    archive.write_bytes(b"")
    refused(rig.restore(archive), 125, "it is empty")
    half = len(compressed) // 2
    archive.write_bytes(compressed[:half] + bytes(64) + compressed[half + 64 :])
    refused(rig.restore(archive), 125, "it cannot be decompressed")
    archive.write_bytes(good[: len(good) - 2000])
    refused(rig.restore(archive), 125)
    place = good.index(b"\0" * 4096) + 100  # some page of memory, or a header's end
    archive.write_bytes(good[:place] + b"x" + good[place + 1 :])
    refused(rig.restore(archive), 125)
    nothing_unpacked(rig)
    assert rig.run("ps").stdout.count("\n") == 1


def test_whose_it_is(rig: Rig) -> None:
    archive = frozen(rig, "c.tar")
    os.chown(archive, 12345, 12345)
    archive.chmod(0o644)
    refused(rig.restore(archive, stdin="go\n"), 125, "belongs to uid 12345")
    assert rig.restore(archive, "--allow", "owner", stdin="go\n").stdout == "go\n"
    refused(rig.restore(rig.path("missing.tar")), 125, "no checkpoint at")
    refused(rig.restore(Path("-")), 125, "no checkpoint is read from standard input")
    if not rig.root:
        archive.chmod(0o600)
        refused(rig.restore(archive), 125, "cannot be read: Permission denied")
    fifo = rig.path("fifo")
    os.mkfifo(fifo)
    refused(rig.restore(fifo), 125, "is no file")
    shutil.copy("/bin/true", fifo.with_name("binary"))
    rig.give(fifo.with_name("binary"))
    refused(rig.restore(fifo.with_name("binary")), 125, "is none of imgrun's")


# -- images that the job writes into -----------------------------------------------------------------------------------

GROW = "echo 1 > /new; exec 5> /tmp/gone; rm /tmp/gone; echo ready; read go; echo $go >> /new; cat /new"


def writing(rig: Rig, images: Images, kind: str = "ext4", script: str = GROW, size: int = 0) -> subprocess.Popen[bytes]:
    """A job with this script that writes into an image of its own, named w."""
    image = images.copy(images.filesystem(kind), rig.path("own.img"))
    if size:
        os.truncate(image, size)
        subprocess.run(["resize2fs", image], check=True, capture_output=True)
    rig.give(image)
    rig.run.image = str(image)
    process = rig.run.foreground(script, "--writable", "--name", "w")
    expect(process, "ready")
    return process


def check(image: Path) -> None:
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_with_its_image(rig: Rig, images: Images, kind: str) -> None:
    process = writing(rig, images, kind)
    archive = rig.path("c.tar.zst")
    assert rig.run("checkpoint", "--capture-image", "--archive", archive, "w") == Done(0, "", "")
    assert process.wait(60) == 85
    original = Path(rig.image)
    original.rename(rig.path("away.img"))
    refused(rig.restore(archive), 125, "is not there")
    for number in (1, 2):
        place = rig.path(f"put{number}.img")
        done = rig.restore(archive, "--image", place, stdin="2\n")
        assert (done.status, done.stdout) == (0, "1\n2\n"), done
        nothing_unpacked(rig)
    if kind == "ext4":
        check(place)
        check(rig.path("away.img"))


KEPT = "dd if=/dev/urandom of=/kept bs=1M count=3 2>/dev/null; sha256sum /kept > /sum;"


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_with_its_image_on_another_host(rig: Rig, second: Rig, images: Images) -> None:  # noqa: F811
    process = writing(rig, images, script=f"{KEPT} {GROW}; sha256sum -c /sum")
    archive = rig.path("c.tar")
    assert rig.run("checkpoint", "--capture-image", "--archive", archive, "w").status == 0
    assert process.wait(60) == 85
    shutil.copy(archive, second.path("arrived"))
    place = second.path("its.img")
    done = second.restore(second.path("arrived"), "--image", place, stdin="2\n")
    assert (done.status, done.stdout) == (0, "1\n2\n/kept: OK\n"), done


@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_holes_of_an_image_cost_nothing(rig: Rig, images: Images) -> None:
    process = writing(rig, images, size=2 << 30)
    archive = rig.path("c.tar")
    with archive.open("wb") as f:
        done = rig.run("checkpoint", "--capture-image", "--archive", "-", "w", stdout=f)
    assert done.status == 0, done
    rig.give(archive)
    assert process.wait(60) == 85
    assert archive.stat().st_size < 128 << 20
    place = rig.path("put.img")
    assert rig.restore(archive, "--image", place, stdin="2\n").stdout == "1\n2\n"
    assert place.stat().st_size == 2 << 30
    assert place.stat().st_blocks * 512 < 128 << 20
    check(place)


WRITES = (
    "dd if=/dev/urandom of=/big bs=1M count=40 2>/dev/null; echo ready; while :; do echo t >> /new; echo t; sleep 0.05; done"
)


def writes_on(process: subprocess.Popen[bytes]) -> None:
    """See that the job goes on writing: it has been let go on, and so has its file system."""
    assert process.stdout is not None
    for _ in range(process.stdout.read(100000).count(b"t") + 3):
        assert process.stdout.readline() == b"t\n"


# What is short of space: the copy of an image with a journal, or before it is added that of one without.
@pytest.mark.parametrize(("kind", "disk", "written"), [("ext4", "24M", 40), ("ext2", "16M", 12)])
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_a_full_disk_while_the_image_is_archived(rig: Rig, images: Images, kind: str, disk: str, written: int) -> None:
    place = rig.make("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}", "tmpfs", place], check=True)
    try:
        process = writing(rig, images, kind, script=WRITES.replace("count=40", f"count={written}"), size=256 << 20)
        refused(rig.run("checkpoint", "--capture-image", "--archive", place / "c.tar", "w"), 125, "no space")
        writes_on(process)
        assert list(place.iterdir()) == []
        assert rig.run("rm", "--force", "w").status == 0
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("whom", ["reader", "freezer", "supervisor", "guard"])
@pytest.mark.parametrize("rig", ["root"], indirect=True)
def test_nothing_stands_still_for_ever(rig: Rig, images: Images, whom: str) -> None:
    """Whoever is killed while the image is read: the job goes on, or its image is free again."""
    process = writing(rig, images, script=WRITES, size=256 << 20)
    supervisor = json.loads(rig.run("inspect", "w").stdout)["supervisor"]
    saving = rig.run.popen("checkpoint", "--capture-image", "--archive", "-", "w")
    assert saving.stdout is not None
    seen = b""
    while b"=image.img\n" not in seen:
        seen = seen[-100:] + saving.stdout.read(65536)
    if whom == "reader":
        saving.stdout.close()
    elif whom == "guard":
        freezer = children(supervisor, "freezing")[0]
        (guard,) = (pid for pid in kids(freezer) if os.path.samefile(f"/proc/{pid}/ns/mnt", f"/proc/{freezer}/ns/mnt"))
        assert kill(guard)
        saving.stdout.read()
    else:
        assert kill(supervisor if whom == "supervisor" else children(supervisor, "freezing")[0])
    assert saving.wait(60) == (0 if whom == "guard" else 125)
    if whom in ("reader", "freezer"):
        writes_on(process)
        assert rig.run("rm", "--force", "w").status == 0
    again = ("start", "--writable", rig.image, "--", "sh", "-c", "touch /more; echo written")
    eventually(lambda: rig.run(*again).stdout == "written\n", "the image can be used")
    check(Path(rig.image))


LATER = pytest.mark.parametrize(("rig", "kind"), [("root", "ext2"), ("user", "ext4")], indirect=["rig"])


@LATER
@pytest.mark.parametrize("name", ["c.tar", "c.tar.zst"])
def test_an_image_that_is_complete_only_later(rig: Rig, images: Images, kind: str, name: str) -> None:
    process = writing(rig, images, kind)
    done = rig.run("checkpoint", "--capture-image", "--archive", "-", "w", stdout=subprocess.DEVNULL)
    refused(done, 125, "complete only when the job has ended")
    archive = rig.path(name)
    assert rig.run("checkpoint", "--capture-image", "--archive", archive, "w") == Done(0, "", "")
    assert process.wait(60) == 85
    # In place, where it is as the job left it; or where it is put.
    assert rig.restore(archive, stdin="2\n") == Done(0, "1\n2\n", "")
    refused(rig.restore(archive, stdin="3\n"), 125, "it was written to since")
    for number in (1, 2):
        place = rig.path(f"put{number}.img")
        done = rig.restore(archive, "--image", place, stdin="2\n")
        assert (done.status, done.stdout) == (0, "1\n2\n"), done
        check(place)
        nothing_unpacked(rig)


@LATER
def test_an_image_of_which_not_all_was_added(rig: Rig, images: Images, kind: str) -> None:
    """What there was before the job ended is a checkpoint all the same, of which the image must be as the job left it."""
    process = writing(rig, images, kind)
    archive = rig.path("c.tar")
    assert rig.run("checkpoint", "--capture-image", "--archive", archive, "w").status == 0
    assert process.wait(60) == 85
    good = archive.read_bytes()
    begin = good.index(b"=image.img\n")
    assert b"image.json" in good
    for length in (begin, begin + 5000, begin + (len(good) - begin) // 2):
        archive.write_bytes(good[:length])
        refused(rig.restore(archive, "--image", rig.path("put.img")), 125, "is not there")
        assert rig.run("check", archive).status == 0
    changed = bytearray(good)
    changed[begin + (len(good) - begin) // 2] ^= 1
    archive.write_bytes(changed)
    refused(rig.restore(archive, "--image", rig.path("put.img")), 125, "image.img was changed")
    archive.write_bytes(good[:begin])
    assert rig.restore(archive, stdin="2\n").stdout == "1\n2\n"


def test_without_its_image(rig: Rig, images: Images) -> None:
    """It is continued with the image as the job left it, but not when somebody has written to that since."""
    process = writing(rig, images)
    archive = rig.path("c.tar")
    assert rig.run("checkpoint", "--archive", archive, "w") == Done(0, "", "")
    assert process.wait(60) == 85
    assert rig.run("start", rig.image, "--", "true").status == 0, "reading it does no harm"
    done = rig.restore(archive, stdin="2\n")
    assert (done.status, done.stdout) == (0, "1\n2\n"), done
    refused(rig.restore(archive, stdin="3\n"), 125, "is not the image that it was: it was written to since")
