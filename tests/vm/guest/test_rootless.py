"""An ordinary user in a login session: start, look, enter, end."""

from __future__ import annotations

import json
from pathlib import Path

from guest.conftest import IMAGES, Imgrun


def test_life_of_a_job(user: Imgrun) -> None:
    """Start in the background, enter, stop. It is in a scope of the user's manager; a command beside it too."""
    job = user.good("start", "-d", "--name", "one", "--memory", "64M", IMAGES / "small.squashfs", "--", "sleep", "1000").strip()
    assert "one" in user.good("ps")
    inside = user.good("exec", "one", "sh", "-c", "id -u; cat /sys/fs/cgroup/memory.max; cat /proc/self/cgroup")
    assert inside.splitlines() == ["0", str(64 << 20), "0::/"]
    paths = json.loads(user.good("inspect", "one"))["cgroups"] if "cgroups" in json.loads(user.good("inspect", "one")) else []
    assert all("/user@1000.service/" in path for path in paths)
    user.good("stop", job)
    assert user.record(job)["reason"] == "stopped"


def test_exec_from_another_session(user: Imgrun, make) -> None:  # type: ignore[no-untyped-def]
    """The kernel refuses a user to move processes between scopes of two parents he does not own both of: exec goes on without."""
    user.good("start", "-d", "--name", "two", IMAGES / "small.squashfs", "--", "sleep", "1000")
    plain = make("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", user=True)
    done = plain("exec", "two", "sh", "-c", "echo inside; exit 5")
    assert (done.status, done.stdout) == (5, "inside\n"), done


def test_an_image_of_every_kind(user: Imgrun) -> None:
    for kind in ("squashfs", "ext4"):
        lines = user.good("start", IMAGES / f"small.{kind}", "--", "sh", "-c", "echo x >/f; cat /f; stat -c %u /bin/sh")
        assert lines.split() == ["x", "0"], kind


def test_ids_of_a_range(user: Imgrun, room: Path) -> None:
    """With subordinate ids, the image's users are different users."""
    script = "id -u; cat /proc/self/uid_map | wc -l"
    out = user.good("start", "--user", "1000", IMAGES / "small.squashfs", "--", "sh", "-c", script)
    assert out.split() == ["1000", "2"]
