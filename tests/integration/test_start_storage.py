"""What a job can write, and what it sees of the host: the root, the scratch, binds, tmpfs, other images, /etc."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, Imgrun, expect, refused

from images import Images, sha256

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USERNS = pytest.mark.parametrize("userns", ["auto", "off"])


@pytest.fixture
def copy(images: Images, image: Path, tmp_path: Path) -> Path:
    """An image that the test may change."""
    return images.copy(image, tmp_path / "copy.img")


# -- the root ----------------------------------------------------------------------------------------------------------


@USERNS
def test_overlay_takes_writes_and_forgets_them(run: Imgrun, image: Path, userns: str) -> None:
    before = sha256(image)
    script = (
        "echo mine > /etc/motd; rm /etc/group; mkdir /new; chown 7:8 /new;"
        "cat /etc/motd; stat -c %u:%g /new /etc/passwd; df / | wc -l"
    )
    done = run.sh(script, "--userns", userns)
    assert done == (0, "mine\n7:8\n0:0\n2\n", "")
    assert run.sh("cat /etc/motd; ls -d /new", "--userns", userns).stdout == "of the image\n"
    assert sha256(image) == before


@USERNS
def test_read_only(run: Imgrun, image: Path, userns: str) -> None:
    before = sha256(image)
    done = run.sh("touch /x; touch /etc/x; mkdir /tmp/d && touch /tmp/d/x /var/tmp/x /dev/shm/x && echo scratch",
                  "--read-only", "--userns", userns)  # fmt: skip
    assert done.stdout == "scratch\n"
    assert done.stderr.count("Read-only file system") == 2
    assert sha256(image) == before


@USERNS
def test_writable_writes_into_the_image(run: Imgrun, copy: Path, userns: str) -> None:
    script = "echo mine > /etc/motd; mkdir /new; chown 7:8 /new; echo x > /tmp/x; hostname"
    done = run("start", "--writable", "--userns", userns, "--hostname", "h", copy, "--", "sh", "-c", script)
    assert done == (0, "h\n", "")
    done = run("start", copy, "--", "sh", "-c", "cat /etc/motd; stat -c %u:%g /new; ls /tmp")
    assert done == (0, "mine\n7:8\n", "")
    assert subprocess.run(["e2fsck", "-fn", copy], capture_output=True, check=False).returncode == 0


def test_writable_excludes_others(run: Imgrun, copy: Path) -> None:
    holder = run.popen("start", "--writable", copy, "--", "sh", "-c", "echo ready; cat")
    expect(holder, "ready")
    refused(run("start", copy, "--", "true"), 125, str(copy))
    refused(run("start", "--writable", copy, "--", "true"), 125, str(copy))
    holder.kill()
    holder.wait()
    assert run("start", copy, "--", "true").status == 0, "the death of its holder frees the image"


def test_readers_share_and_exclude_a_writer(run: Imgrun, copy: Path) -> None:
    readers = [run.popen("start", *flags, copy, "--", "sh", "-c", "echo ready; cat") for flags in ((), ("--read-only",))]
    for reader in readers:
        expect(reader, "ready")
    refused(run("start", "--writable", copy, "--", "true"), 125, str(copy))
    loops = [p for p in Path("/sys/block").glob("loop*/loop/backing_file") if p.read_text().strip() == str(copy)]
    assert len(loops) == 1, "readers share one device"


def test_a_directory_is_an_image(run: Imgrun, images: Images) -> None:
    tree = images.tree()
    done = run("start", tree, "--", "sh", "-c", "touch /x; ls /x; cat /etc/motd")
    assert done == (0, "/x\nof the image\n", "")
    assert not (tree / "x").exists()


# -- the scratch -------------------------------------------------------------------------------------------------------


@USERNS
def test_scratch_size_bounds_what_a_job_writes(run: Imgrun, userns: str) -> None:
    script = "dd if=/dev/zero of={}/big bs=1M count=64; echo $?; rm -f {}/big; echo small > {}/small && cat {}/small"
    for where in ("/root", "/tmp", "/var/tmp"):
        done = run.sh(script.replace("{}", where), "--scratch-size", "16M", "--userns", userns)
        assert done.stdout == "1\nsmall\n", done
        assert "No space left on device" in done.stderr


def test_scratch_that_the_disk_has_no_room_for(run: Imgrun) -> None:
    refused(run.sh("true", "--scratch-size", "900T"), 125, "scratch")


def test_tmp_is_the_jobs_own(run: Imgrun) -> None:
    done = run.sh("ls /tmp /var/tmp; stat -c %a /tmp /var/tmp; touch /tmp/x", "--user", "user")
    assert done == (0, "/tmp:\n\n/var/tmp:\n1777\n1777\n", "")


# -- mounts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir(mode=0o777)
    path.chmod(0o777)
    (path / "f").write_text("of the host\n")
    return path


def test_bind(run: Imgrun, data: Path) -> None:
    done = run.sh("cat /d/f; echo x > /d/new", "--bind", f"{data}:/d", "--userns", "off")
    assert done == (0, "of the host\n", "")
    assert (data / "new").read_text() == "x\n"


@USERNS
def test_bind_read_only_with_all_that_is_below(run: Imgrun, data: Path, userns: str) -> None:
    (data / "below").mkdir(mode=0o777)
    script = f"""
    mount -t tmpfs -o mode=777 x {data}/below && touch {data}/below/f &&
    {{ "$@"; }}
    """
    inside = "ls /d/below; touch /d/x; touch /d/below/x; touch /d/below/f"
    # A private mount namespace keeps the mount of the test off the host's table.
    command = ["unshare", "-m", "sh", "-c", script, "sh", *COMMAND, "start", "--userns", userns,
               "--bind", f"{data}:/d:ro", run.image, "--", "sh", "-c", inside]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "f\n", done
    assert done.stderr.count("Read-only file system") == 3, done


def test_bind_of_a_file(run: Imgrun, data: Path) -> None:
    done = run.sh("cat /etc/motd /new/dir/file", "-v", f"{data}/f:/etc/motd:ro", "-v", f"{data}/f:/new/dir/file")
    assert done == (0, "of the host\nof the host\n", "")


def test_bind_at_the_same_path(run: Imgrun, data: Path) -> None:
    assert run.sh(f"cat {data}/f", "--bind", str(data)).stdout == "of the host\n"


def test_bind_idmap_shows_the_owner_as_the_jobs_user(run: Imgrun, data: Path) -> None:
    for path in (data, data / "f"):
        os.chown(path, 4321, 8765)
    data.chmod(0o700)
    done = run.sh("stat -c %u:%g /d /d/f; echo x > /d/new", "--bind", f"{data}:/d:idmap", "--user", "user")
    assert done == (0, "1000:1000\n1000:1000\n", "")
    status = (data / "new").stat()
    assert (status.st_uid, status.st_gid) == (4321, 8765)
    refused_write = run.sh("echo x > /d/other", "--bind", f"{data}:/d", "--user", "user")
    assert refused_write.status != 0


def test_set_uid_programs_and_devices_of_a_bind_do_nothing(run: Imgrun, data: Path) -> None:
    os.mknod(data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (data / "id").write_bytes(Path("/usr/bin/busybox").read_bytes() if Path("/usr/bin/busybox").exists() else b"")
    (data / "id").chmod(0o4755)
    done = run.sh("echo x > /d/null || echo refused; /d/id -u", "--bind", f"{data}:/d", "--user", "user", "--userns", "off")
    assert done.stdout == "refused\n1000\n"


def test_tmpfs(run: Imgrun) -> None:
    script = "stat -f -c %T /fast; dd if=/dev/zero of=/fast/x bs=1M count=4; ls -s /fast/x"
    done = run.sh(script, "--tmpfs", "/fast:1M", "--user", "user")
    assert done.stdout.split() == ["tmpfs", "1024", "/fast/x"]
    assert "No space left on device" in done.stderr


def test_another_image(run: Imgrun, images: Images) -> None:
    for image, name in ((images.data(), "notes"), (images.filesystem("squashfs"), "bin")):
        done = run.sh("ls /data; touch /data/x", "--mount", f"type=image,src={image},dst=/data")
        assert name in done.stdout.split()
        assert "Read-only" in done.stderr


def test_mounts_inside_mounts(run: Imgrun, data: Path) -> None:
    """The order of the flags does not matter: what is inside is never hidden by what is around it."""
    flags = ("--bind", f"{data}:/a/b/c", "--tmpfs", "/a/b", "--tmpfs", "/a")
    assert run.sh("cat /a/b/c/f", *flags).stdout == "of the host\n"


def test_targets_never_leave_the_root(run: Imgrun, images: Images, data: Path, tmp_path: Path) -> None:
    from images import build_tree

    tree = build_tree(tmp_path / "hostile")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "up").symlink_to("../" * 20 + str(outside).lstrip("/"))
    for target in ("/link/x", "/up/x"):
        done = run("start", "--bind", f"{data}:{target}", tree, "--", "cat", f"{target}/f")
        assert done.stdout == "of the host\n", done
    assert os.listdir(outside) == []


# -- /etc and /dev -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--read-only",)])
def test_etc_files(run: Imgrun, flags: tuple[str, ...]) -> None:
    done = run.sh("cat /etc/hostname; grep -c localhost /etc/hosts; stat -c %a:%u /etc/resolv.conf", "--hostname", "h", *flags)
    assert done == (0, "h\n2\n644:0\n", "")


def test_etc_files_can_be_replaced_by_the_job(run: Imgrun) -> None:
    assert run.sh("echo x > /etc/h && mv /etc/h /etc/hosts && cat /etc/hosts && rm /etc/resolv.conf").stdout == "x\n"


def test_etc_files_of_a_writable_image_stay(run: Imgrun, images: Images, tmp_path: Path) -> None:
    from images import build_tree, make_filesystem

    tree = build_tree(tmp_path / "tree")
    (tree / "etc/hostname").write_text("own\n")
    image = make_filesystem("ext4", tmp_path / "x.img", tree)
    assert run("start", "--writable", "--hostname", "h", image, "--", "cat", "/etc/hostname").stdout == "h\n"
    done = subprocess.run(["debugfs", "-R", "cat /etc/hostname", image], capture_output=True, text=True, check=True)
    assert done.stdout == "own\n"


@USERNS
def test_dev(run: Imgrun, userns: str) -> None:
    done = run.sh(
        "ls /dev; echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; echo x > /dev/full;"
        "echo y > /dev/shm/x; echo z > /dev/stdout; cat < /dev/fd/0; stat -c %a /dev /dev/shm",
        "--userns", userns, stdin="in\n",
    )  # fmt: skip
    names = "fd full fuse imgrun mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero".split()
    if not os.path.exists("/dev/fuse"):
        names.remove("fuse")
    assert done.stdout.split() == [*names, "3", "3", "z", "in", "755", "1777"]
    assert "No space" in done.stderr


def test_a_job_sees_no_mount_of_the_host(run: Imgrun) -> None:
    done = run.sh("cat /proc/mounts")
    points = sorted(line.split()[1] for line in done.stdout.splitlines())
    allowed = ("/proc", "/sys", "/dev", "/tmp", "/var/tmp")
    assert points[0] == "/"
    assert [p for p in points[1:] if not p.startswith(allowed)] == []


def test_nothing_of_the_job_is_in_the_hosts_mount_table(run: Imgrun, data: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    process = run.foreground("echo ready; cat", "--bind", f"{data}:/d", "--tmpfs", "/t", "--scratch-size", "16M")
    expect(process, "ready")
    during = Path("/proc/self/mountinfo").read_text()
    new = set(during.splitlines()) - set(before.splitlines())
    assert [line for line in new if "imgrun" in line or str(data.parent) in line or "loop" in line] == []
