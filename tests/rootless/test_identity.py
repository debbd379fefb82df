"""The ids, the network and the device directory of an ordinary user's job; what is missing on a host is said in a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Done, refused
from ordinary import PATH, AsUser, World, has_route

from images import Images

# -- ids ---------------------------------------------------------------------------------------------------------------


def test_the_subordinate_range_is_the_jobs(run: AsUser) -> None:
    done = run.sh("id -u; cat /proc/self/uid_map; touch /f && chown 1000:1000 /f && stat -c %u:%g /f")
    assert done.stderr == ""
    own, *rows, owner = done.stdout.splitlines()
    assert (own, owner) == ("0", "1000:1000")
    first, count = run.user.ranges[0]
    assert [row.split() for row in rows] == [["0", str(run.user.uid), "1"], ["1", str(first), str(min(count, 65535))]]


@pytest.mark.parametrize(
    ("user", "ids"),
    [("user", "1000:1000:1000:/tmp"), ("1000", "1000:1000:1000:/tmp"), ("7:8", "7:8:8:/"), ("65535", "65535:65535:65535:/")],
)
def test_user(run: AsUser, user: str, ids: str) -> None:
    done = run.sh("echo $(id -u):$(id -g):$(id -G):$HOME; touch /tmp/x && stat -c %u /tmp/x", "--user", user)
    assert done == (0, f"{ids}\n{ids.split(':')[0]}\n", "")


def test_user_in_exec(run: AsUser) -> None:
    job = run.background("sleep 60")
    assert run("exec", "--user", "user", job, "id", "-u").stdout == "1000\n"
    assert run("exec", job, "id", "-u").stdout == "0\n"


def test_an_id_beyond_the_range(run: AsUser) -> None:
    refused(run.sh("true", "--user", "70000"), 125, "70000")


def test_a_single_id(run_single: AsUser) -> None:
    run = run_single
    done = run.sh("id -u; cat /proc/self/uid_map; touch /f; chown 1 /f || echo refused")
    assert done.stdout.split() == ["0", "0", str(run.user.uid), "1", "refused"]
    warning = done.stderr.splitlines()[-1]
    assert warning.startswith("imgrun: warning: no subordinate ids"), done
    assert "apt" in warning
    for user in ("user", "1", "root:user"):
        refused(without_warnings(run.sh("true", "--user", user)), 125, "--user")
    job = run("start", "-d", run.image, "--", "sleep", "60").stdout.strip()
    assert run("exec", job, "id", "-u") == (0, "0\n", "")
    refused(run("exec", "--user", "user", job, "id"), 125, "user")


def test_nothing_may_be_written_that_belongs_to_others(run_any: AsUser, tmp_path: Path) -> None:
    """Binds are with the caller's own rights: root inside is the caller outside."""
    run = run_any
    (run.directory / "mine").mkdir()
    os.chown(run.directory / "mine", run.user.uid, run.user.gid)
    binds = ("--bind", f"{run.directory}/mine:/m", "--bind", "/etc:/h")
    done = run.sh("touch /m/new && echo ok; cat /h/shadow; touch /h/x", *binds)
    assert done.stdout == "ok\n"
    assert done.stderr.count("denied") == 2, done
    assert (run.directory / "mine/new").stat().st_uid == run.user.uid


def test_userns_off_needs_root(run: AsUser) -> None:
    refused(run.sh("true", "--userns", "off"), 125, "--userns off")


# -- network -----------------------------------------------------------------------------------------------------------


def test_no_network(run_any: AsUser) -> None:
    done = run_any.sh("ls /sys/class/net; cat /proc/net/dev | wc -l; ip addr show lo", "--network", "none")
    assert done.stdout.split()[0] == "lo", done
    assert "inet 127.0.0.1/8" in done.stdout
    assert "UP" in done.stdout


def test_the_hosts_network(run: AsUser) -> None:
    assert run.sh("readlink /proc/self/ns/net").stdout.strip() == os.readlink("/proc/self/ns/net")


def test_a_private_network(run_any: AsUser) -> None:
    if not has_route():
        pytest.skip("this machine has no default route that a private network could lead out by")
    done = run_any.sh("readlink /proc/self/ns/net; ip route; cat /etc/resolv.conf", "--network", "private")
    assert done.status == 0, done
    assert done.stdout.splitlines()[0] != os.readlink("/proc/self/ns/net")
    assert "default via" in done.stdout
    assert "nameserver 169.254.1.1" in done.stdout
    assert run_any.processes() == []


def test_a_private_network_without_pasta(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("mount --bind /dev/null /usr/bin/pasta")
    refused(run.sh("true", "--network", "private"), 125, "pasta", "not installed")


# -- what a host may lack ----------------------------------------------------------------------------------------------

NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.mark.parametrize("who", ["--map-root-user", "--map-current-user"])
def test_user_namespaces_forbidden(run: AsUser, who: str) -> None:
    run.wrap = ("unshare", "--user", who, "--keep-caps", "sh", "-c", NO_NAMESPACES, "sh")
    clean(run, run.sh("true"), "user namespaces")


def test_mount_namespaces_forbidden(run: AsUser) -> None:
    run.wrap = ("unshare", "--user", "--map-root-user", "sh", "-c", NO_NAMESPACES.replace("user_name", "mnt_name"), "sh")
    clean(run, run.sh("true"), "namespaces")


def test_pid_namespaces_forbidden(run: AsUser) -> None:
    run.wrap = ("unshare", "--user", "--map-root-user", "sh", "-c", NO_NAMESPACES.replace("user_name", "pid_name"), "sh")
    clean(run, run.sh("true"), "namespaces")


def without_warnings(done: Done) -> Done:
    return done._replace(stderr="".join(line for line in done.stderr.splitlines(True) if "imgrun: warning" not in line))


def clean(run: AsUser, done: Done, *words: str) -> None:
    """Refused in one line, with no state left."""
    refused(without_warnings(done), 125, *words)
    assert list(run.state.glob("*/*")) == []
    assert run.processes() == []


WITHOUT_FUSE = """
    mount -t tmpfs -o mode=755 dev /dev
    mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; mknod -m 666 /dev/full c 1 7
    mknod -m 666 /dev/random c 1 8; mknod -m 666 /dev/urandom c 1 9; mknod -m 666 /dev/tty c 5 0
"""


def test_no_fuse_device(run: AsUser, new_world: Callable[[str], World], images: Images) -> None:
    run.world = new_world(WITHOUT_FUSE)
    clean(run, run.sh("true"), "/dev/fuse")
    # What needs no server goes on.
    assert run("start", images.tree(), "--", "cat", "/etc/motd") == (0, "of the image\n", "")


def test_a_fuse_device_that_is_not_for_all(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("umount /dev/fuse; [ $(stat -c %a /dev/fuse) = 600 ] || { mount -t tmpfs x /mnt; "
                          "mknod -m 600 /mnt/fuse c 10 229; mount --bind /mnt/fuse /dev/fuse; }")  # fmt: skip
    clean(run, run.sh("true"), "/dev/fuse", "denied")


def test_no_server(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("mount --bind /dev/null /usr/bin/squashfuse_ll")
    clean(run, run.sh("true"), "squashfuse_ll", "not installed")


def test_no_newuidmap(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("mount --bind /dev/null /usr/bin/newuidmap")
    done = run.sh("id -u")
    assert done[:2] == (0, "0\n")
    assert done.stderr.count("\n") == 1
    assert "newuidmap" in done.stderr


def test_a_newuidmap_without_its_privilege(run: AsUser, new_world: Callable[[str], World]) -> None:
    run.world = new_world("mount -t tmpfs x /mnt; cp /usr/bin/newuidmap /mnt/n; chmod 755 /mnt/n; "
                          "mount --bind /mnt/n /usr/bin/newuidmap")  # fmt: skip
    clean(run, run.sh("true"), "newuidmap", "permitted")


def test_no_home_and_no_path(run: AsUser) -> None:
    assert run.sh("echo ran", env={"HOME": "/nonexistent", "PATH": PATH}).stdout == "ran\n"


def test_a_state_directory_that_cannot_be_made(run: AsUser) -> None:
    refused(run.sh("true", env={"IMGRUN_STATE_DIR": "/etc/imgrun-state"}), 125, "/etc/imgrun-state")
