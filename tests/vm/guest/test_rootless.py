"""An ordinary user in a login session: start, look, enter, end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from guest.conftest import IMAGES, Imgrun


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
