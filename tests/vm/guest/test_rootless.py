"""An ordinary user in a login session: start, look, enter, end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from guest.conftest import IMAGES, Imgrun, eventually, job_cgroups


def test_life_of_a_job(user: Imgrun) -> None:
    """Start in the background, enter from another session than the job's, look, stop."""
    words = ("-d", "--name", "one", "--memory", "64M", IMAGES / "small.squashfs", "--", "sleep", "1000")
    job = user.good("start", *words).strip()
    inside = user("exec", "one", "sh", "-c", "id -u; cat /sys/fs/cgroup/memory.max; cat /proc/self/cgroup; exit 5")
    assert (inside.status, inside.stdout.splitlines()) == (5, ["0", str(64 << 20), "0::/"]), inside
    user.good("stop", job)
    assert user.record(job)["reason"] == "stopped"


def test_exec_out_of_reach(user: Imgrun, make: Callable[..., Imgrun]) -> None:
    """Without systemd's help the kernel keeps a user's process out of the job's cgroup, and that is said."""
    user.good("start", "-d", "--name", "two", IMAGES / "small.squashfs", "--", "sleep", "1000")
    as_user = ("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups")
    nobus = make(*as_user, "env", "XDG_RUNTIME_DIR=/nowhere", user=True)
    done = nobus("exec", "two", "true")
    assert done.status == 125, done
    assert "lets no process of this session into its cgroup" in done.stderr


def test_an_image_of_every_kind(user: Imgrun) -> None:
    for kind in ("squashfs", "ext4", *(["erofs"] if shutil.which("erofsfuse") else [])):
        lines = user.good("start", IMAGES / f"small.{kind}", "--", "sh", "-c", "echo x >/f; cat /f; stat -c %u /bin/sh")
        assert lines.split() == ["x", "0"], kind


def test_ids_of_a_range(user: Imgrun, room: Path) -> None:
    """With subordinate ids, the image's users are different users."""
    script = "id -u; cat /proc/self/uid_map | wc -l"
    out = user.good("start", "--user", "1000", IMAGES / "small.squashfs", "--", "sh", "-c", script)
    assert out.split() == ["1000", "2"]


def lose(imgrun: Imgrun) -> tuple[str, list[Path]]:
    """A job whose supervisor is killed, and its state with it; its id, and the cgroups that it had."""
    job = imgrun.good("start", "-d", IMAGES / "small.squashfs", "--", "sleep", "1000").strip()
    record = json.loads(imgrun.good("inspect", job))
    paths = [Path(path) for path in record["cgroups"]]
    assert paths
    assert all(path.is_dir() for path in paths)
    os.kill(record["supervisor"], signal.SIGKILL)
    shutil.rmtree(imgrun.state)
    return job, paths


def test_the_cgroups_of_a_lost_job_in_a_session(user: Imgrun) -> None:
    """They are in a scope of its own, which systemd removes."""
    _, paths = lose(user)
    assert all(path.parent.suffix == ".scope" for path in paths)
    eventually(lambda: not list(job_cgroups()), lambda: f"{paths} and their scope go: {list(job_cgroups())}")


def test_the_cgroups_of_a_lost_job_in_a_service(root: Imgrun, make: Callable[..., Imgrun]) -> None:
    """Its neighbours, which were moved aside for it, come back to their place."""
    before = Path("/proc/self/cgroup").read_text()
    job, paths = lose(root)
    eventually(lambda: "populated 0" in (paths[0] / "cgroup.events").read_text(), lambda: f"the job of {paths} ends")
    assert all(path.is_dir() for path in paths)
    os.utime(paths[0], (time.time() - 120,) * 2)
    assert make(name="other").good("gc").split() == [job]
    assert list(job_cgroups()) == []
    assert Path("/proc/self/cgroup").read_text() == before
