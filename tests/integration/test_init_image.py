"""``--init image``: the image's own init is PID 1, boots, and its powering off is the job's end. And ``--init none``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import Imgrun, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 600


def build(recipe: str, out: Path) -> Path:
    """An image of one of the recipes that imgrun ships; what is slow to get is in the recipe cache."""
    words = [sys.executable, "-m", "imgrun.cli", "image", "build", str(ROOT / "images" / f"{recipe}.toml"), str(out)]
    subprocess.run(words, check=True, timeout=BUILD_SECONDS, cwd=ROOT)
    return out


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("busybox", tmp_path_factory.mktemp("init") / "busybox.img")


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("debian-systemd", tmp_path_factory.mktemp("init") / "systemd.img")


def test_busybox_boots_runs_its_script_and_powers_off(run: Imgrun, busybox: Path, tmp_path: Path) -> None:
    script = tmp_path / "job"
    script.write_text("echo the job ran as $(id -u) with init $(cat /proc/1/comm)\n")
    result = tmp_path / "result.json"
    done = run("start", "--init", "image", "--bind", f"{script}:/etc/init.d/job:ro", "--result", result, busybox)
    assert done.status == 0, done
    assert "the job ran as 0 with init init" in done.stdout
    record = json.loads(result.read_text())
    assert (record["reason"], record["exit_code"], record["signal"]) == ("exited", 0, None)
    assert "powered off" in record["message"]


def test_stop_powers_busybox_off(run: Imgrun, busybox: Path, tmp_path: Path) -> None:
    table = tmp_path / "inittab"
    table.write_text("::sysinit:/bin/echo up\n::respawn:/bin/sleep 1000\n")
    started = run("start", "-d", "--name", "b", "--init", "image", "--bind", f"{table}:/etc/inittab", busybox)
    assert started.status == 0, started
    eventually(lambda: "up" in run("logs", "b").stdout, "the boot")
    assert run("stop", "b").status == 0
    record = json.loads(run("inspect", "b").stdout)["result"]
    assert (record["reason"], record["exit_code"]) == ("stopped", 0), record
    assert run("rm", "b").status == 0


@pytest.mark.timeout(BUILD_SECONDS + 120)
def test_systemd_boots_and_powers_off(run: Imgrun, systemd: Path) -> None:
    assert run("start", "-d", "--name", "s", "--init", "image", systemd).status == 0
    state = eventually(
        lambda: (found := run("exec", "s", "systemctl", "is-system-running").stdout.strip())
        in ("running", "degraded") and found,
        "systemd to have booted", timeout=90,
    )  # fmt: skip
    failed = run("exec", "s", "systemctl", "--failed", "--no-legend", "--plain").stdout
    assert (state, failed.strip()) == ("running", "")
    assert run("exec", "s", "cat", "/proc/1/comm").stdout.strip() == "systemd"
    assert run("exec", "s", "hostname").stdout.strip() == "s"
    assert run("stop", "s").status == 0
    record = json.loads(run("inspect", "s").stdout)["result"]
    assert (record["reason"], record["exit_code"]) == ("stopped", 0), record
    assert run("rm", "s").status == 0


def test_an_image_without_an_init_is_refused(run: Imgrun, image: Path) -> None:
    done = run("start", "--init", "image", image)
    assert done.status == 127
    assert done.stderr.startswith("imgrun: the image has no init"), done


def test_a_command_as_pid_1(run: Imgrun, image: Path) -> None:
    done = run("start", "--init", "none", image, "--", "sh", "-c", "echo I am $$; exit 41")
    assert (done.status, done.stdout) == (41, "I am 1\n"), done
