"""``--init image``: a Debian image's systemd boots to multi-user in a host that has cgroup v2 only, and powers off."""

from __future__ import annotations

from guest.conftest import IMAGES, Imgrun, eventually


def test_systemd_boots_and_powers_off(root: Imgrun) -> None:
    root.good("start", "-d", "--name", "s", "--init", "image", "--memory", "512M", IMAGES / "systemd.img")
    bus = ("exec", "s", "test", "-S", "/run/dbus/system_bus_socket")
    eventually(lambda: root(*bus).status == 0, lambda: f"the bus: {root(*bus)} {root('logs', 's')}")
    state = root("exec", "s", "systemctl", "is-system-running", "--wait")
    failed = root("exec", "s", "systemctl", "--failed", "--no-legend", "--plain").stdout
    assert (state.stdout, failed) == ("running\n", ""), (state, root("logs", "s"))
    assert root.good("exec", "s", "systemctl", "is-active", "multi-user.target") == "active\n"
    # systemd divides the job's cgroup among its units; who enters later is where it itself is.
    script = "cat /proc/self/cgroup /sys/fs/cgroup/memory.max; cat /sys/fs/cgroup/system.slice/dbus.service/cgroup.procs"
    lines = root.good("exec", "s", "sh", "-c", script).splitlines()
    assert lines[:2] == ["0::/init.scope", str(512 << 20)]
    assert lines[2:], "the bus has no cgroup of its own"
    root.good("exec", "s", "systemctl", "poweroff", "--no-block")
    root.good("wait", "s")
    record = root.record("s")
    assert (record["reason"], record["exit_code"]) == ("exited", 0), record
    assert "powered off" in record["message"]
