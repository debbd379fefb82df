"""Images of an ordinary user's jobs: every kind by its FUSE server, with the rules that hold for root, too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command import expect, refused
from ordinary import AsUser, World

from images import ROOT_ARM64, ROOT_X86_64, Images, Part, build_tree, make_filesystem, sha256
from images import run as tool_run

SERVED = ("squashfs", "ext2", "ext3", "ext4")
SCRIPT = "cat /etc/motd; echo mine > /etc/motd; rm /etc/group; mkdir /new; cat /etc/motd; stat -c %u:%g /new /etc/passwd"


@pytest.fixture
def own(run: AsUser, images: Images) -> Callable[[Path, str], Path]:
    """A copy of an image that belongs to the user."""

    def copy(source: Path, name: str) -> Path:
        path = images.copy(source, run.directory / name)
        os.chown(path, run.user.uid, run.user.gid)
        return path

    return copy


def no_warning_but(stderr: str, *words: str) -> bool:
    return all(any(word in line for word in words) for line in stderr.splitlines())


@pytest.mark.parametrize("kind", SERVED)
def test_overlay_takes_writes_and_forgets_them(run_any: AsUser, images: Images, kind: str) -> None:
    image = images.filesystem(kind)
    before = sha256(image)
    done = run_any("start", image, "--", "sh", "-c", SCRIPT)
    assert done[:2] == (0, "of the image\nmine\n0:0\n0:0\n"), done
    assert no_warning_but(done.stderr, "no subordinate ids"), done
    done = run_any("start", image, "--", "sh", "-c", "cat /etc/motd; ls -d /new")
    assert done.stdout == "of the image\n"
    assert sha256(image) == before


@pytest.mark.parametrize("kind", ["squashfs", "ext4"])
def test_read_only(run: AsUser, images: Images, kind: str) -> None:
    image = images.filesystem(kind)
    before = sha256(image)
    script = "touch /x; touch /etc/x; mkdir /tmp/d && touch /tmp/d/x /var/tmp/x /dev/shm/x && echo scratch"
    done = run("start", "--read-only", image, "--", "sh", "-c", script)
    assert done.stdout == "scratch\n"
    assert done.stderr.count("Read-only file system") == 2, done
    assert sha256(image) == before


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_writable(run: AsUser, images: Images, own: Callable[[Path, str], Path], kind: str) -> None:
    image = own(images.filesystem(kind), "w.img")
    script = "echo mine > /etc/motd && mkdir /new && dd if=/dev/urandom of=/new/big bs=1M count=4 && sha256sum /new/big"
    done = run("start", "--writable", image, "--", "sh", "-c", script)
    assert done.status == 0, done
    digest = done.stdout
    done = run("start", image, "--", "sh", "-c", "cat /etc/motd; sha256sum /new/big")
    assert done == (0, f"mine\n{digest}", "")
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


def test_inode_numbers_are_those_of_the_image(run: AsUser, images: Images) -> None:
    """Links are known by them, and open files of a frozen job."""
    image = images.filesystem("ext4")
    inode = tool_run("debugfs", "-R", "stat /bin/busybox", image).split("Inode: ")[1].split()[0]
    done = run("start", image, "--", "stat", "-c", "%i", "/bin/busybox")
    # Above them the overlay has bits of its own (xino).
    assert int(done.stdout) % 2**32 == int(inode), done


def test_writable_is_refused_where_it_makes_no_sense(run: AsUser, images: Images) -> None:
    refused(run.sh("true", "--writable"), 125, "cannot be written")
    refused(run("start", "--writable", images.filesystem("ext4"), "--", "true"), 125, "cannot be written")


def test_a_partition_by_its_offset(run: AsUser, images: Images, own: Callable[[Path, str], Path]) -> None:
    root = ROOT_ARM64 if os.uname().machine == "aarch64" else ROOT_X86_64
    for kind in ("squashfs", "ext4"):
        parts = (Part(content=images.data(), label="data"), Part(type=root, content=images.filesystem(kind), label="root"))
        disk = images.disk(*parts)
        before = sha256(disk)
        assert run("start", disk, "--", "cat", "/etc/motd") == (0, "of the image\n", "")
        assert run("start", "--partition", "root", disk, "--", "sh", "-c", SCRIPT).status == 0
        assert sha256(disk) == before
    writable = own(disk, "disk.img")
    assert run("start", "--writable", writable, "--", "sh", "-c", "echo mine > /etc/motd").status == 0
    assert run("start", writable, "--", "cat", "/etc/motd").stdout == "mine\n"


def test_which_of_two_partitions_is_the_root_is_found_by_looking(run: AsUser, images: Images) -> None:
    disk = images.disk(Part(content=images.data()), Part(content=images.filesystem("ext4")))
    before = sha256(disk)
    assert run("start", disk, "--", "cat", "/etc/motd") == (0, "of the image\n", "")
    assert sha256(disk) == before


def test_a_directory(run_any: AsUser, images: Images) -> None:
    tree = images.tree()
    done = run_any("start", tree, "--", "sh", "-c", "touch /x; ls /x; cat /etc/motd")
    assert done[:2] == (0, "/x\nof the image\n"), done
    assert not (tree / "x").exists()
    assert run_any.processes() == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_only_root_can_mount(run: AsUser, images: Images, kind: str) -> None:
    refused(run("start", images.filesystem(kind), "--", "true"), 125, kind, "root")


def test_erofs(run: AsUser, images: Images) -> None:
    image = images.filesystem("erofs")
    done = run("start", image, "--", "cat", "/etc/motd")
    if shutil.which("erofsfuse"):
        assert done == (0, "of the image\n", "")
    else:
        refused(done, 125, "erofs", "erofsfuse", "not installed")


@pytest.mark.parametrize("size", [0, 5000, 300_000])
@pytest.mark.parametrize("kind", SERVED)
def test_truncated(run: AsUser, images: Images, kind: str, size: int) -> None:
    image = images.copy(images.filesystem(kind), run.directory / "cut.img")
    os.truncate(image, size)
    image.chmod(0o644)
    refused(run("start", image, "--", "true"), 125, str(image))


def test_a_dirty_journal(run: AsUser, images: Images, own: Callable[[Path, str], Path]) -> None:
    image = own(images.filesystem("ext4"), "dirty.img")
    # As after a crash: the journal has something to replay.
    tool_run("debugfs", "-w", "-R", "feature needs_recovery", image)
    before = sha256(image)
    for flags in ((), ("--read-only",)):
        done = run("start", *flags, image, "--", "true")
        refused(done, 125, str(image), "not clean")
        assert "e2fsck" in done.stderr
    assert sha256(image) == before


def test_damage_below_the_superblock_is_told(run: AsUser, images: Images) -> None:
    image = images.copy(images.filesystem("squashfs"), run.directory / "bad.sqfs")
    with image.open("r+b") as f:
        f.seek(4096)
        f.write(os.urandom(image.stat().st_size - 8192))
    image.chmod(0o644)
    done = run("start", image, "--", "true")
    assert done.status in (125, 126, 127), done
    assert len(done.stderr.splitlines()) in (1, 2), done


def test_one_writer_or_many_readers(run: AsUser, images: Images, own: Callable[[Path, str], Path]) -> None:
    image = own(images.filesystem("ext4"), "x.img")
    readers = [run.popen("start", *flags, image, "--", "sh", "-c", "echo ready; cat") for flags in ((), ("--read-only",))]
    for reader in readers:
        expect(reader, "ready")
    refused(run("start", "--writable", image, "--", "true"), 125, str(image), "in use")
    for reader in readers:
        reader.communicate()
    writer = run.popen("start", "--writable", image, "--", "sh", "-c", "echo ready; cat")
    expect(writer, "ready")
    refused(run("start", image, "--", "true"), 125, str(image), "in use")
    refused(run("start", "--writable", image, "--", "true"), 125, str(image), "in use")
    writer.kill()
    writer.wait()
    # Its death frees the image, once its server has gone too.
    done = run("start", "--writable", image, "--", "true")
    assert done.status == 0 or "not clean" in done.stderr, done


def test_not_readable(run: AsUser, images: Images) -> None:
    image = images.copy(images.filesystem("squashfs"), run.directory / "x.sqfs")
    os.chown(image, 0, 0)
    image.chmod(0o600)
    refused(run("start", image, "--", "true"), 125, str(image), "may not be read")


def test_inspect_looks_inside_as_a_job_does(run: AsUser, images: Images) -> None:
    for image in (images.filesystem("squashfs"), images.filesystem("ext4"), images.tree()):
        record = json.loads(run("image", "inspect", "--json", image).stdout)
        assert (record["runnable"], record["reason"], record["os"]["id"]) == (True, None, "testos"), record
        assert record["architectures"], record
    record = json.loads(run("image", "inspect", "--json", images.filesystem("xfs")).stdout)
    assert (record["runnable"], record["format"]) == (False, "xfs")
    assert "only root" in record["reason"]


def test_other_images_as_mounts(run: AsUser, images: Images) -> None:
    for image, name in ((images.data(), "notes"), (images.filesystem("squashfs"), "bin"), (images.tree(), "bin")):
        done = run.sh("ls /data; touch /data/x", "--mount", f"type=image,src={image},dst=/data")
        assert name in done.stdout.split(), done
        assert "Read-only" in done.stderr
    done = run.sh("ls /a /b", *(w for d in "ab" for w in ("--mount", f"type=image,src={images.data()},dst=/{d}")))
    assert done.stdout.count("notes") == 2, done


# -- the overlay by a file server --------------------------------------------------------------------------------------


def test_fuse_overlayfs_in_the_kernels_place(run_any: AsUser, images: Images) -> None:
    tree = build_tree(run_any.directory / "tree")
    subprocess.run(["chown", "-R", f"{run_any.user.uid}:{run_any.user.gid}", tree], check=True)
    for image in (images.filesystem("squashfs"), images.filesystem("ext4"), tree):
        done = run_any("start", image, "--", "sh", "-c", SCRIPT, env={"IMGRUN_OVERLAY": "fuse"})
        assert done[:2] == (0, "of the image\nmine\n0:0\n0:0\n"), done
        assert sum("fuse-overlayfs" in line for line in done.stderr.splitlines()) == 1, done
        assert run_any("start", image, "--", "cat", "/etc/motd").stdout == "of the image\n"


def test_the_hosts_own_root(run: AsUser) -> None:
    """What its mounts hide may not be uncovered, so they come along."""
    run.image = Path("/")
    script = "stat -f -c %T / /dev; touch /x /tmp/x && cat /etc/hostname; touch /etc/passwd; ls /proc | grep -c '^[0-9]'"
    done = run("start", "--hostname", "inside", "/", "--", "sh", "-c", script)
    kinds, ran = done.stdout.split()[:2], done.stdout.split()[2:]
    assert kinds == ["fuseblk", "tmpfs"]
    assert ran[0] == "inside"
    assert int(ran[1]) < 10
    assert "mounts below it" in done.stderr
    assert not Path("/x").exists()
    done = run("start", "--read-only", "/", "--", "sh", "-c", "touch /x; touch /tmp/x && echo scratch")
    assert done.stdout == "scratch\n"
    assert "Read-only" in done.stderr


def test_no_proc_of_the_host_comes_along(run: AsUser, new_world: Callable[[str], World]) -> None:
    """The file server could read in it what the caller may: the caller's environment."""
    tree = build_tree(run.directory / "tree")
    for name in ("mnt/a b", "srv"):
        (tree / name).mkdir(parents=True)
    run.world = new_world(
        f"mount -t tmpfs -o mode=755 x /mnt; cp -a {tree} /mnt/tree; mount -t proc proc '/mnt/tree/mnt/a b';"
        "mount -t tmpfs -o mode=777 x /mnt/tree/srv"
    )
    done = run("start", "/mnt/tree", "--", "sh", "-c", "ls '/mnt/a b' /srv; touch /srv/x && echo on", env={"SECRET": "x"})
    assert done.stdout.split() == ["/mnt/a", "b:", "/srv:", "on"], done


def test_fuse_overlayfs_missing(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("mount --bind /dev/null /usr/bin/fuse-overlayfs")
    refused(run.sh("true", env={"IMGRUN_OVERLAY": "fuse"}), 125, "fuse-overlayfs", "not installed")


# -- the scratch -------------------------------------------------------------------------------------------------------


def test_a_scratch_size_cannot_be_kept(run: AsUser) -> None:
    refused(run.sh("true", "--scratch-size", "16M"), 125, "--scratch-size")
    done = run.sh("echo ran > /tmp/x; cat /tmp/x", "--scratch-size", "16M", "--limits", "best-effort")
    assert done[:2] == (0, "ran\n")
    assert done.stderr.count("\n") == 1
    assert "--scratch-size" in done.stderr


def test_an_idmapped_bind_needs_root(run: AsUser) -> None:
    refused(run.sh("true", "--bind", f"{run.directory}:/d:idmap"), 125, "idmap")


# -- names of the administrator's --------------------------------------------------------------------------------------


@pytest.fixture
def config(run: AsUser, image: Path) -> dict[str, str]:
    data = run.directory / "data"
    data.mkdir()
    (data / "f").write_text("of the host\n")
    secret = run.directory / "secret"
    secret.mkdir(mode=0o700)
    hidden = run.directory / "hidden.sqfs"
    shutil.copy(image, hidden)
    hidden.chmod(0o600)
    path = run.directory / "config.toml"
    path.write_text(
        f"""
        [images]
        "tiny-1.0" = "{image}"
        hidden = "{hidden}"
        relative = "x.img"
        [mounts]
        data = {{src = "{data}", dst = "/data", ro = true}}
        secret = {{src = "{secret}/x", dst = "/secret"}}
        """
    )
    return {"IMGRUN_CONFIG": str(path)}


def test_a_named_image(run: AsUser, config: dict[str, str], image: Path) -> None:
    path = run.directory / "r.json"
    done = run("start", "--result", path, "tiny-1.0", "--", "cat", "/etc/motd", env=config)
    assert done == (0, "of the image\n", "")
    assert json.loads(path.read_text())["image"] == str(image)
    refused(run("start", "unknown", "--", "true", env=config), 125, "unknown")
    refused(run("start", "relative", "--", "true", env=config), 125, "'relative'")


def test_a_named_mount(run: AsUser, config: dict[str, str]) -> None:
    done = run.sh("cat /data/f; touch /data/x", "--mount", "name=data", env=config)
    assert done.stdout == "of the host\n"
    assert "Read-only" in done.stderr
    assert run.sh("cat /d/f", "--mount", "name=data,dst=/d", env=config).stdout == "of the host\n"
    refused(run.sh("true", "--mount", "name=nope", env=config), 125, "'nope'")


def test_a_name_gives_no_right(run: AsUser, config: dict[str, str]) -> None:
    refused(run("start", "hidden", "--", "true", env=config), 125, "may not be read")
    refused(run.sh("true", "--mount", "name=secret", env=config), 125, "/secret/x")


def test_a_broken_configuration(run: AsUser, config: dict[str, str]) -> None:
    Path(config["IMGRUN_CONFIG"]).write_text("[images\n")
    refused(run("start", "tiny-1.0", "--", "true", env=config), 125, config["IMGRUN_CONFIG"])
    # It is not read by those who give a path.
    assert run.sh("true", env=config).status == 0


# -- hostile images ----------------------------------------------------------------------------------------------------


def test_links_do_not_lead_out(run: AsUser, base: Path) -> None:
    outside = run.directory / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    data = run.directory / "data"
    data.mkdir()
    (data / "f").write_text("of the host\n")
    for name, target in (("link", str(outside)), ("up", "../" * 20 + str(outside).lstrip("/"))):
        tree = build_tree(run.directory / f"tree-{name}")
        (tree / "escape").symlink_to(target)
        image = make_filesystem("squashfs", run.directory / f"{name}.sqfs", tree)
        for source in (tree, image):
            done = run("start", "--bind", f"{data}:/escape/x", source, "--", "cat", "/escape/x/f")
            assert done.stdout == "of the host\n", done
        assert os.listdir(outside) == []


@pytest.mark.parametrize("name", ["etc/hosts", "etc/resolv.conf", "etc/hostname", "etc/passwd", "etc/group"])
def test_links_in_etc_are_not_followed_out(run: AsUser, name: str) -> None:
    victim = run.directory / "victim"
    victim.write_text("untouched\n")
    os.chown(victim, run.user.uid, run.user.gid)
    tree = build_tree(run.directory / "tree")
    (tree / name).unlink(missing_ok=True)
    (tree / name).symlink_to(victim)
    image = make_filesystem("squashfs", run.directory / "x.sqfs", tree)
    done = run("start", image, "--", "sh", "-c", f"cat {victim}; cat /{name}")
    assert "untouched" not in done.stdout
    assert victim.read_text() == "untouched\n"


@pytest.mark.parametrize("name", ["etc/passwd", "etc/hosts", "usr/lib/os-release"])
def test_a_pipe_where_a_file_is_read_does_not_hang(run: AsUser, name: str) -> None:
    tree = build_tree(run.directory / "tree")
    (tree / name).unlink(missing_ok=True)
    os.mkfifo(tree / name)
    image = make_filesystem("squashfs", run.directory / "x.sqfs", tree)
    run("start", "--user", "user", image, "--", "true", timeout=20)
    assert run("start", image, "--", "echo", "ran", timeout=20).stdout in ("ran\n", "")


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
def test_a_link_for_a_tree_of_the_kernels_is_refused(run: AsUser, name: str) -> None:
    tree = build_tree(run.directory / "tree")
    (tree / name).rmdir()
    (tree / name).symlink_to("/tmp")
    image = make_filesystem("squashfs", run.directory / "x.sqfs", tree)
    refused(run("start", image, "--", "true"), 125, f"/{name}")


def test_device_nodes_of_an_image_do_not_work(run: AsUser) -> None:
    import stat

    tree = build_tree(run.directory / "tree")
    os.mknod(tree / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(tree / "tty", stat.S_IFCHR | 0o666, os.makedev(5, 0))
    for source in (make_filesystem("squashfs", run.directory / "x.sqfs", tree), tree):
        done = run("start", source, "--", "sh", "-c", "head -c 3 /zero | wc -c")
        assert done.stdout.strip() in ("0", ""), done
        assert "denied" in done.stderr, done


def test_set_uid_of_an_image_gains_nothing(run: AsUser) -> None:
    tree = build_tree(run.directory / "tree")
    (tree / "suid").mkdir()
    shutil.copy(tree / "bin/busybox", tree / "suid/busybox")
    (tree / "suid/busybox").chmod(0o4755)
    image = make_filesystem("squashfs", run.directory / "x.sqfs", tree)
    done = run("start", "--user", "user", image, "--", "/suid/busybox", "sh", "-c",
               "/suid/busybox id -u; cat /proc/self/status")  # fmt: skip
    assert done.stdout.splitlines()[0] == "1000", done
    assert "NoNewPrivs:\t1" in done.stdout
