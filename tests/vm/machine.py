"""Running a guest under QEMU's software emulation, and bringing its results out."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from vm.guests import Guest, kernel, root_disk

RESULT_MIB = 256
CONSOLE_TAIL = 60
OOPS = ("Kernel panic", "BUG:", "Oops:", "general protection fault", "rcu: INFO: rcu_", "Call Trace:")
APPEND = "panic=-1 root=/dev/vda rw quiet cgroup_no_v1=all systemd.show_status=0 net.ifnames=0 mitigations=off"

X86 = (
    "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max,-cx16", "-smp", "1", "-m", "2048",
)  # fmt: skip
"""Without -cx16, QEMU 7.2 corrupts the guest's kernel; with thread=multi it panicked under a CPU quota."""
# One instruction takes two nanoseconds of the guest's time, so that the emulated counters are exact.
ARM = (
    "qemu-system-aarch64", "-machine", "virt", "-accel", "tcg,thread=single", "-cpu", "cortex-a57", "-smp", "1", "-m", "1024",
    "-icount", "shift=1,sleep=off",
)  # fmt: skip


class Outcome(NamedTuple):
    """How a guest's run ended. ``problem`` is why there is no result, or what its kernel complained of; or empty."""

    guest: Guest
    directory: Path
    """What the guest sent out: junit.xml, log, status, facts.json, and ``keep/`` for other guests."""
    seconds: float
    problem: str
    console: str

    @property
    def tail(self) -> str:
        return "\n".join(self.console.splitlines()[-CONSOLE_TAIL:])


def boot(guest: Guest, work: Path, directory: Path) -> Outcome:
    """Boot the guest with the disk ``work``, wait for its end, and unpack what it sent out into ``directory``."""
    program = (ARM if guest.arm else X86)[0]
    assert shutil.which(program), f"{program} is not installed; tools/system-packages vm installs it"
    root, files = root_disk(guest), kernel(guest)
    result, console_file = directory / "result.disk", directory / "console.log"
    with result.open("wb") as f:
        f.truncate(RESULT_MIB << 20)
    disks = []
    for path, options in ((root, "snapshot=on,cache=unsafe"), (files.modules, "readonly=on"),
                          (work, "snapshot=on,cache=unsafe"), (result, "cache=unsafe")):  # fmt: skip
        disks += ["-drive", f"file={path},if=virtio,format=raw,{options}"]
    console = "ttyAMA0" if guest.arm else "ttyS0"
    command = [
        *(ARM if guest.arm else X86), "-nodefaults", "-no-reboot", "-nographic", "-serial", "stdio", "-monitor", "none",
        "-kernel", str(files.image), "-initrd", str(files.initrd), "-append", f"console={console} {APPEND}", *disks,
    ]  # fmt: skip
    began = time.monotonic()
    problem = ""
    with console_file.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            if process.wait(guest.seconds):
                problem = f"QEMU ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"it hung: no end in {guest.seconds} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.monotonic() - began
    text = console_file.read_text(errors="replace")
    # tar of an empty disk succeeds, and there is no junit.xml then.
    unpacked = subprocess.run(["tar", "--numeric-owner", "-xf", result, "-C", directory], capture_output=True, check=False)
    if not problem and (unpacked.returncode or not (directory / "junit.xml").exists()):
        problem = "it sent no result"
    result.unlink()
    if not problem and (lines := [line for line in text.splitlines() if any(mark in line for mark in OOPS)]):
        problem = f"its kernel complained: {lines[0]}"
    return Outcome(guest, directory, seconds, problem, text)
