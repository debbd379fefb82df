"""``--init image``: a Debian image's systemd boots to multi-user in a host that has cgroup v2 only, and powers off."""

from __future__ import annotations

from guest.conftest import IMAGES, Imgrun, eventually

BOOT = 150.0


def test_systemd_boots_and_powers_off(root: Imgrun) -> None:
    root.good("start", "-d", "--name", "s", "--init", "image", "--memory", "512M", IMAGES / "systemd.img")
    eventually(lambda: root("exec", "s", "test", "-S", "/run/dbus/system_bus_socket").status == 0, "the bus", timeout=BOOT)
    state = root("exec", "s", "systemctl", "is-system-running", "--wait", timeout=BOOT).stdout.strip()
    failed = root("exec", "s", "systemctl", "--failed", "--no-legend", "--plain").stdout
    assert (state, failed.strip()) == ("running", ""), root("logs", "s")
    assert root.good("exec", "s", "systemctl", "is-active", "multi-user.target") == "active\n"
    root.good("exec", "s", "systemctl", "poweroff", "--no-block")
    root.good("wait", "s")
    record = root.record("s")
    assert (record["reason"], record["exit_code"]) == ("exited", 0), record
    assert "powered off" in record["message"]
