"""imgrun in a job of imgrun's: two levels deep, with and without root outside; who is inside reaches only what is its own.

The image of the outer jobs is a tree with the host's programs and this checkout bound into it, read-only.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, Done, Imgrun, eventually
from ordinary import PATH, AsUser, World

CHECKOUT = Path(__file__).resolve().parents[2]
INNER = shlex.join(COMMAND)


@pytest.fixture(scope="session")
def host_tree(base: Path) -> Path:
    """A root with the host's programs to be bound in."""
    tree = base / "host-tree"
    for name in ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var/tmp"):
        (tree / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (tree / name).chmod(0o1777)
    for name in ("bin", "lib", "lib64", "sbin"):
        if os.path.islink(f"/{name}"):
            (tree / name).symlink_to(f"usr/{name}")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    return tree


class Outer:
    """Starts outer jobs, and imgrun in them."""

    def __init__(self, run: Imgrun, tree: Path, image: Path) -> None:
        self.run = run
        python = Path(sys.executable).resolve()
        shown = ["/usr", str(CHECKOUT), *([] if python.is_relative_to("/usr") else [str(python.parents[1])])]
        # The same at every level: an inner job gives on what it was given.
        self.binds = [word for path in shown for word in ("--bind", f"{path}:{path}:ro")]
        self.flags = [*self.binds, "--bind", f"{image}:/image.sqfs:ro", "--bind", f"{tree}:/tree:ro", "--env", f"PATH={PATH}"]
        self.tree = str(tree)

    def sh(self, script: str, *flags: str, **options: object) -> Done:
        """A script in an outer job; ``imgrun`` in it is the command."""
        prelude = f'imgrun() {{ {INNER} "$@"; }}\n'
        return self.run("start", *self.flags, *flags, self.tree, "--", "sh", "-c", prelude + script, **options)  # type: ignore[arg-type]

    def second(self) -> str:
        """The words with which an inner job is started that can itself start jobs."""
        given = ["--bind", "/image.sqfs:/image.sqfs:ro", "--env", f"PATH={PATH}"]
        return shlex.join(["start", "--hostname", "b", *self.binds, *given, "/tree", "--"])


@pytest.fixture
def as_root(base: Path, world: World, image: Path, nothing_left: None, tmp_path: Path) -> Iterator[Imgrun]:
    class AsRoot(Imgrun):
        def popen(self, *words: str | Path, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
            # Where its jobs find the nodes that a usual host has.
            before = ["nsenter", f"--mount=/proc/{world.pid}/ns/mnt", "--"]
            streams = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **options}
            environment = {**os.environ, "IMGRUN_STATE_DIR": str(base / "state-of-root"), **(env or {})}
            process = subprocess.Popen([*before, *COMMAND, *map(str, words)], env=environment, **streams)  # type: ignore[call-overload]
            self._processes.append(process)
            return process  # type: ignore[no-any-return]

    run = AsRoot(image)
    yield run
    run.close()
    run("gc")


@pytest.fixture(params=["root", "ranged", "single"])
def outer(request: pytest.FixtureRequest, host_tree: Path, image: Path) -> Outer:
    names = {"root": "as_root", "ranged": "run", "single": "run_single"}
    return Outer(request.getfixturevalue(names[request.param]), host_tree, image)


def lines(done: Done) -> list[str]:
    assert done.status == 0, done
    return done.stdout.splitlines()


def test_one_level(outer: Outer) -> None:
    inner = "hostname; id -u; echo $$; cat /etc/motd; exit 7"
    script = f"imgrun start --hostname inner /image.sqfs -- sh -c '{inner}'; echo $?; hostname"
    done = outer.sh(script, "--hostname", "outer")
    assert lines(done) == ["inner", "0", "3", "of the image", "7", "outer"], done


def test_two_levels(outer: Outer) -> None:
    script = "hostname; cat /etc/motd; echo x > /etc/motd; exit 7"
    innermost = f"{INNER} start --hostname c /image.sqfs -- sh -c '{script}'; echo $?; hostname"
    done = outer.sh(f"imgrun {outer.second()} sh -c {shlex.quote(innermost)}; hostname", "--hostname", "a")
    assert lines(done) == ["c", "of the image", "7", "b", "a"], done


def test_the_whole_life_inside(outer: Outer) -> None:
    script = """
        set -e
        imgrun start -d --name j /image.sqfs -- sh -c 'echo ready; exec sleep 1000' >/dev/null
        imgrun exec j echo in
        imgrun stop -t 1s j >/dev/null
        imgrun wait j || echo $?
        imgrun logs j
        imgrun rm j >/dev/null
        imgrun gc
        imgrun ps -a -q
        ps -e -o comm= | grep -c -e squashfuse -e sleep || true
    """
    done = outer.sh(script)
    assert lines(done)[:1] == ["in"], done
    assert lines(done)[-2:] == ["ready", "0"], done


def test_an_inner_job_ends_with_its_outer_one(outer: Outer) -> None:
    process = outer.run.popen(
        "start", *outer.flags, outer.tree, "--", "sh", "-c", f"{INNER} start /image.sqfs -- sh -c 'echo ready; sleep 1234'"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    eventually(lambda: not sleepers("1234"), "the inner job's processes are gone")


def sleepers(seconds: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(pid)
        except OSError:
            continue
    return found


def test_the_inner_reaches_neither_sibling_nor_parent_nor_host(outer: Outer) -> None:
    """By pid, by path, by signal, by trace, by name."""
    script = r"""
        echo secret > /tmp/outer-secret
        sleep 1111 & mine=$!
        imgrun start -d --name sibling /image.sqfs -- sh -c 'echo secret > /tmp/s; exec sleep 1112' >/dev/null
        imgrun start --hostname inner /image.sqfs -- sh -c '
            echo "sleepers: $(cat /proc/[0-9]*/cmdline | tr "\0" " " | grep -c "sleep 111[12]")"
            echo "pids: $(cd /proc; ls -d [0-9]* | wc -l)"
            echo "secrets: $(cat /tmp/outer-secret /tmp/s /proc/*/root/tmp/outer-secret 2>/dev/null | wc -l)"
            kill -9 -1 2>/dev/null
            hostname taken 2>/dev/null
            mount -t tmpfs x /sys 2>/dev/null
            echo "killed: no"
        '
        kill -0 $mine && echo alive
        imgrun exec sibling true && echo sibling alive
        hostname
        kill $mine
        imgrun rm -f sibling >/dev/null
    """
    done = outer.sh(script, "--hostname", "outer")
    found = lines(done)
    assert found[0] == "sleepers: 0" or found[0] == "sleepers: 1", done  # its own script holds the words
    assert "secrets: 0" in found, done
    assert found[-3:] == ["alive", "sibling alive", "outer"], done


def test_the_outer_sees_nothing_of_the_host(outer: Outer, base: Path) -> None:
    """What allows nesting in /proc, /sys and /dev/fuse gives nothing of the host's away."""
    script = f"""
        ls {base} 2>/dev/null
        echo x 2>/dev/null > /proc/sys/kernel/core_pattern && echo core_pattern
        echo x 2>/dev/null > /proc/sysrq-trigger && echo sysrq
        echo 1 2>/dev/null > /proc/sys/vm/drop_caches && echo caches
        cat /proc/kcore >/dev/null 2>&1 && echo kcore
        mkdir /sys/fs/cgroup/x 2>/dev/null && echo cgroup
        for f in /sys/kernel/mm/transparent_hugepage/enabled /sys/power/state /sys/block/*/queue/nr_requests; do
            [ ! -e $f ] || ! (cat $f | tr -d '[]' | head -c 5 > $f) 2>/dev/null || echo "written: $f"
        done
        [ "$(cat /proc/1/comm)" = imgrun-init ] || echo not alone
        ls -l /proc/*/root 2>/dev/null | grep -v ' -> /$' | grep -- '->'
        true
    """
    assert lines(outer.sh(script)) == []


def test_fuse_in_a_job_serves_only_the_job(outer: Outer) -> None:
    """A server that a job starts cannot be mounted for anybody else, and its mount is not seen outside."""
    script = "mkdir /tmp/m; unshare -Urm sh -c 'squashfuse_ll /image.sqfs /tmp/m && cat /tmp/m/etc/motd'; ls /tmp/m | wc -l"
    done = outer.sh(script)
    assert lines(done) == ["of the image", "0"], done
    assert "squashfuse" not in Path("/proc/self/mountinfo").read_text()


def test_limits_inside(outer: Outer) -> None:
    """A limit is kept or refused, and one that is refused can be wished for."""
    done = outer.sh("imgrun start --memory 32M /image.sqfs -- true; echo $?")
    status = lines(done)[-1]
    assert status in ("0", "125"), done
    if status == "125":
        assert "--memory" in done.stderr
    done = outer.sh("imgrun start --memory 32M --limits best-effort /image.sqfs -- echo ran")
    assert lines(done) == ["ran"], done


def test_rlimits_inside_stay_below_the_outer(outer: Outer) -> None:
    script = """
        imgrun start --rlimit nofile=50:50 /image.sqfs -- sh -c 'ulimit -Hn'
        ulimit -Hn
        imgrun start --rlimit nofile=9999:9999 /image.sqfs -- sh -c 'ulimit -Hn'
    """
    done = outer.sh(script, "--rlimit", "nofile=500:500")
    found = done.stdout.split()
    assert found[:2] == ["50", "500"], done
    assert "9999" not in found


def test_ids_are_handed_on(run: AsUser, host_tree: Path, image: Path) -> None:
    outer = Outer(run, host_tree, image)
    script = """
        imgrun start --user user /image.sqfs -- id -u
        imgrun start /image.sqfs -- sh -c 'touch /f; chown 7 /f; stat -c %u /f'
    """
    done = outer.sh(script)
    assert lines(done) == ["1000", "7"], done


def test_an_ordinary_user_of_the_outer_job(run: AsUser, host_tree: Path, image: Path) -> None:
    """Who is not root in the outer job either: there is no newuidmap that could help, as nothing gains privilege."""
    outer = Outer(run, host_tree, image)
    done = outer.sh("imgrun start /image.sqfs -- sh -c 'id -u; cat /etc/motd'", "--user", "user", "--env", "HOME=/tmp")
    assert done.stdout.split("\n")[:2] == ["0", "of the image"], done
