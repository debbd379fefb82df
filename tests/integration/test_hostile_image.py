"""Images made to harm: whatever they hold, the host is untouched, and the job runs right or is refused in one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from command import Imgrun, refused
from hostile import MARK, Hostile, as_user, attack, hostile, userns

from images import run as run_tool

__all__ = ["attack", "hostile", "userns"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="device nodes, set-uid files and other owners take root to make")

OWN = ("tmp", "var/tmp", "etc")
KERNEL = ("proc", "sys", "dev")
UP = "../" * 40


def link_out(hostile: Hostile, name: str, how: str) -> None:
    """Make ``name`` of the image a link to the same name of the host; it leads there for whoever follows it outside."""
    target = f"{hostile.host.path}/{name}"
    link = hostile.replace(name)
    link.symlink_to(target if how == "absolute" else UP + target.lstrip("/"))
    assert link.resolve().samefile(target)


# -- directories that imgrun mounts on or writes into ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["absolute", "relative"])
@pytest.mark.parametrize("name", OWN)
def test_a_link_that_leads_out_is_a_directory_of_the_jobs_own(
    hostile: Hostile, userns: tuple[str, str], name: str, how: str
) -> None:
    link_out(hostile, name, how)
    done = hostile.sh(f"touch /{name}/mine && cat /etc/hostname && ls /{name}", *userns, "--hostname", "own-name")
    assert done.status == 0, done
    assert "own-name" in done.stdout
    assert "mine" in done.stdout
    assert MARK not in done.stdout


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_parent_that_leads_out(hostile: Hostile, userns: tuple[str, str], how: str) -> None:
    link_out(hostile, "var", how)
    done = hostile.sh("touch /var/tmp/mine && ls -d /var/tmp/mine", *userns)
    assert done.status == 0, done
    assert done.stdout == "/var/tmp/mine\n"


@pytest.mark.parametrize("name", KERNEL)
@pytest.mark.parametrize("target", ["absolute", "relative", "inside"])
def test_a_link_in_place_of_a_kernel_tree_is_refused(
    hostile: Hostile, userns: tuple[str, str], name: str, target: str
) -> None:
    if target == "inside":
        hostile.replace(name).symlink_to("tmp")
    else:
        link_out(hostile, name, target)
    refused(hostile.sh("true", *userns), 125, f"/{name} in the image is a symbolic link")


def test_proc_by_way_of_dev_does_not_stay_open(hostile: Hostile) -> None:
    """Once /dev is covered, such a link leads elsewhere, and what is hidden in /proc would not have been found."""
    hostile.replace("proc").symlink_to("dev/link")
    (hostile.tree / "dev/link").symlink_to("../hidden")
    (hostile.tree / "hidden").mkdir()
    done = hostile.sh("attack append /hidden/sys/kernel/core_pattern; attack read /hidden/kcore", "--userns", "off")
    refused(done, 125, "/proc")


@pytest.mark.parametrize("name", OWN)
def test_with_writable_a_link_that_leads_out_is_never_followed(hostile: Hostile, userns: tuple[str, str], name: str) -> None:
    link_out(hostile, name, "absolute")
    done = hostile.sh("cat /etc/hostname", *userns, "--writable")
    if name == "etc":
        assert done.status == 1, done  # there is no such file in the image, and none is made
        assert done.stdout == ""
    else:
        refused(done, 125, f"/{name}", "leads nowhere")


@pytest.mark.parametrize("flags", [(), ("--writable",)])
@pytest.mark.parametrize("name", OWN)
def test_links_in_a_circle(hostile: Hostile, userns: tuple[str, str], name: str, flags: tuple[str, ...]) -> None:
    link = hostile.replace(name)
    link.symlink_to(f"{link.name}-back")
    link.with_name(f"{link.name}-back").symlink_to(link.name)
    done = hostile.sh("true", *userns, *flags)
    if name == "etc" and flags:
        assert done.status == 0, done  # there is nothing to be covered
    else:
        refused(done, 125, f"/{name}", "circle")


def make_special(path: Path, kind: str) -> None:
    """Something that is no directory, and not an ordinary file either but for the kind "file"."""
    if kind == "file":
        path.write_text("")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "character":
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # reading /dev/zero does not end
    elif kind == "block":
        os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 0))


@pytest.mark.parametrize("kind", ["file", "fifo", "character"])
@pytest.mark.parametrize("name", [*OWN, *KERNEL])
def test_no_directory_at_all_is_refused(hostile: Hostile, userns: tuple[str, str], name: str, kind: str) -> None:
    make_special(hostile.replace(name), kind)
    refused(hostile.sh("true", *userns, timeout=20), 125, f"/{name}", "directory")


def test_the_parent_is_a_file(hostile: Hostile, userns: tuple[str, str]) -> None:
    hostile.replace("var").write_text("")
    refused(hostile.sh("true", *userns), 125, "/var")


# -- targets of --bind and --tmpfs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["absolute", "relative"])
@pytest.mark.parametrize("below", ["", "/new", "/new/deeper"])
def test_mount_targets_do_not_lead_out(hostile: Hostile, userns: tuple[str, str], how: str, below: str) -> None:
    (hostile.tree / "data").mkdir()
    link_out(hostile, "data", how)
    source = hostile.directory / "source"
    source.mkdir()
    (source / "content").write_text("bound\n")
    done = hostile.sh(
        f"cat /data{below}/content /data{below}-file; touch /volume{below}/x && ls /volume{below}", *userns,
        "--bind", f"{source}:/data{below}", "--bind", f"{source}/content:/data{below}-file", "--tmpfs", f"/volume{below}",
    )  # fmt: skip
    assert (done.status, done.stdout) == (0, "bound\nbound\nx\n"), done


def test_a_file_target_that_leads_out(hostile: Hostile, userns: tuple[str, str]) -> None:
    (hostile.tree / "target").symlink_to(hostile.host.path / "etc/hosts")
    (hostile.tree / "new").symlink_to(hostile.host.path / "data/new")
    source = hostile.directory / "source"
    source.write_text("bound\n")
    done = hostile.sh("cat /target /new", *userns, "--bind", f"{source}:/target", "--bind", f"{source}:/new")
    assert (done.status, done.stdout) == (0, "bound\nbound\n"), done


def test_mount_targets_through_magic_links_are_refused(hostile: Hostile, userns: tuple[str, str]) -> None:
    """/proc/self of whoever mounts is not the job's."""
    (hostile.tree / "data").symlink_to("/proc/self/cwd")
    refused(hostile.sh("true", *userns, "--tmpfs", "/data/x"), 125, "/data")


# -- files that imgrun reads or replaces -------------------------------------------------------------------------------

KINDS = ("fifo", "character", "block", "huge", "link", "proc", "directory")


def make_file(hostile: Hostile, name: str, kind: str) -> None:
    path = hostile.replace(name)
    if kind == "huge":
        with path.open("wb") as f:
            f.truncate(1 << 40)
    elif kind == "link":
        path.symlink_to(f"{hostile.host.path}/etc/hosts")
    elif kind == "proc":
        path.symlink_to("/proc/kmsg")  # a regular file, whose reader waits
    elif kind == "directory":
        path.mkdir()
    else:
        make_special(path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_files_of_etc(hostile: Hostile, userns: tuple[str, str], kind: str) -> None:
    for name in ("resolv.conf", "hosts", "hostname"):
        make_file(hostile, f"etc/{name}", kind)
    script = "cd /etc; for name in resolv.conf hosts hostname; do test -d $name || cat $name; done"
    done = hostile.sh(script, *userns, "--network", "none", "--hostname", "own", timeout=20)
    assert done.status == 0, done
    assert MARK not in done.stdout
    if kind != "directory":
        assert all(words in done.stdout for words in ("# no network", "127.0.1.1 own", "\nown\n")), done


@pytest.mark.parametrize("kind", KINDS)
def test_with_writable_odd_files_of_etc_are_left_alone(hostile: Hostile, userns: tuple[str, str], kind: str) -> None:
    for name in ("resolv.conf", "hosts", "hostname"):
        make_file(hostile, f"etc/{name}", kind)
    assert hostile.sh("true", *userns, "--writable", timeout=20).status == 0


@pytest.mark.parametrize("kind", KINDS)
def test_odd_user_tables(hostile: Hostile, userns: tuple[str, str], kind: str) -> None:
    make_file(hostile, "etc/passwd", kind)
    make_file(hostile, "etc/group", kind)
    assert hostile.sh("stat -L -c %u:%g /proc/self", *userns, "--user", "1000:1000", timeout=20).stdout == "1000:1000\n"
    refused(hostile.sh("true", *userns, "--user", "user", timeout=20), 125, "user")


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_that_tell_what_the_image_is(hostile: Hostile, run: Imgrun, kind: str) -> None:
    for name in ("etc/os-release", "usr/lib/os-release", "bin/sh"):
        make_file(hostile, name, kind)
    assert hostile.start("--", "/bin/busybox", "true", timeout=20).status == 0
    done = run("image", "inspect", hostile.image, timeout=20)
    assert done.status == 0, done
    assert MARK not in done.stdout


@pytest.mark.parametrize("kind", ["fifo", "character", "block", "link", "directory"])
def test_a_command_that_is_no_program(hostile: Hostile, userns: tuple[str, str], kind: str) -> None:
    make_file(hostile, "bin/program", kind)
    done = hostile.start(*userns, "--", "/bin/program", timeout=20)
    refused(done, 127 if kind == "link" else 126, "/bin/program")


@pytest.mark.parametrize(
    "row",
    [
        f"user:x:{'9' * 5000}:0::/:/bin/sh",
        "user:x:99999999999:0::/:/bin/sh",
        "user:x:-5:0::/:/bin/sh",
        "user:x:1000:1000::/\0evil:/bin/sh",
    ],
)
def test_users_that_cannot_be(hostile: Hostile, row: str) -> None:
    (hostile.tree / "etc/passwd").write_text(f"{row}\n")
    refused(hostile.sh("true", "--user", "user"), 125, "user")


def test_odd_users_that_can_be(hostile: Hostile, userns: tuple[str, str]) -> None:
    """A home of 100 kB, groups that the job's range does not hold, and more groups than a process may have."""
    home = "/" + "x" * 100_000
    (hostile.tree / "etc/passwd").write_text(f"user:x:1000:1000::{home}:/bin/sh\n")
    groups = [f"g{n}:x:{n}:user" for n in (5000, 100_000, 4_294_967_294, *range(2000, 2300))]
    (hostile.tree / "etc/group").write_text("\n".join(groups) + "\n")
    done = hostile.sh("echo ${#HOME}; id -G", *userns, "--user", "user")
    length, gids = done.stdout.splitlines()
    assert int(length) == len(home)
    assert {"1000", "5000"} <= set(gids.split())
    assert ("100000" in gids.split()) == (userns[1] == "off")


# -- privileges in the image -------------------------------------------------------------------------------------------


def test_setuid_programs_and_file_capabilities_give_nothing(hostile: Hostile, userns: tuple[str, str]) -> None:
    for name, mode in (("suid", 0o4755), ("sgid", 0o2755)):
        program = hostile.tree / "bin" / name
        program.write_bytes(hostile.attack.read_bytes())
        program.chmod(mode)
    capable = hostile.tree / "bin/capable"
    capable.write_bytes(hostile.attack.read_bytes())
    capable.chmod(0o755)
    run_tool("setcap", "cap_dac_override=ep", capable)
    (hostile.tree / "bin/grep").unlink()
    (hostile.tree / "bin/grep").symlink_to("busybox")

    # The same files, outside.
    assert as_user(1000, hostile.tree / "bin/suid", "euid").startswith("0 1000\n")
    assert as_user(1000, hostile.tree / "bin/sgid", "euid").startswith("1000 0\n")
    roots = hostile.directory / "of-root"
    roots.mkdir(mode=0o700)
    assert as_user(1000, hostile.attack, "create", str(roots / "x")) == "EACCES\n"
    assert as_user(1000, capable, "create", str(roots / "x")) == "ok\n"

    for init in ("shim", "none"):
        for name in ("suid", "sgid", "capable"):
            done = hostile.start(*userns, "--user", "user", "--init", init, "--", f"/bin/{name}", "euid")
            assert done.stdout == "1000 1000\nCapEff:\t0000000000000000\n", (name, done)
    done = hostile.start(*userns, "--", "/bin/suid", "euid")
    assert done.stdout.startswith("0 0\n")


def test_a_setuid_shell_as_the_command(hostile: Hostile, userns: tuple[str, str]) -> None:
    (hostile.tree / "bin/busybox").chmod(0o4755)
    done = hostile.start(*userns, "--user", "user", "--", "sh", "-c", "id -u; echo x > /etc/new || echo denied")
    assert done.stdout == "1000\ndenied\n", done


@pytest.mark.parametrize("flags", [(), ("--writable",)])
def test_device_nodes_of_the_image_do_not_work(hostile: Hostile, userns: tuple[str, str], flags: tuple[str, ...]) -> None:
    for place in ("node", "dev/node", "tmp/node"):
        make_special(hostile.tree / f"{place}-character", "character")
        make_special(hostile.tree / f"{place}-block", "block")
    assert hostile.outside("read", hostile.tree / "node-character") == "ok"
    attempts = ["read /node-character", "read /node-block", "append /node-block"]
    outcomes = hostile.tries(*attempts, flags=(*userns, *flags))
    assert outcomes == dict.fromkeys(attempts, "open: EACCES")
    # What lay in directories that the job has its own of is not seen.
    done = hostile.sh("ls /dev /tmp", *userns, *flags)
    assert "node" not in done.stdout


# -- names -------------------------------------------------------------------------------------------------------------


def test_odd_names_in_the_image(hostile: Hostile, userns: tuple[str, str], run: Imgrun) -> None:
    names = [bytes([n]) for n in range(1, 256) if n not in b"/."] + [b"a\nb", b"-rf", b"\xff" * 255, b"\x1b]0;title\x07"]
    (hostile.tree / "odd").mkdir()
    for name in names:
        Path(os.fsdecode(os.fsencode(hostile.tree / "odd") + b"/" + name)).touch()
    done = hostile.sh("find /odd -type f -print0 | tr -cd '\\000' | wc -c; cp -r /odd /tmp; rm -r /odd; ls -d /odd", *userns)
    assert done.stdout.split() == [str(len(names))], done
    odd = "/bin/busybox\nodd"
    done = hostile.start(*userns, "--bind", f"{hostile.tree}/bin/busybox:{odd}", "--", odd, "echo", "x")
    assert (done.status, done.stdout, done.stderr) == (0, "x\n", "")
    assert run("image", "inspect", hostile.image).status == 0


def test_odd_words_in_messages_stay_in_their_line(hostile: Hostile) -> None:
    refused(hostile.start("--", "/bin/no\nsuch\x1b[31m"), 127)
    done = hostile.start("--", "/bin/no\nsuch\x1b[31m")
    assert "\x1b" not in done.stderr


def test_what_an_image_says_of_itself_is_printed_without_control_characters(hostile: Hostile, run: Imgrun) -> None:
    (hostile.tree / "usr/lib/os-release").write_text('PRETTY_NAME="Evil\x1b]0;owned\x07\x1b[31m"\nID="a\x1bb"\n')
    done = run("image", "inspect", hostile.image)
    assert done.status == 0, done
    assert "Evil" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
