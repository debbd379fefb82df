"""The guests, and their disks: a root file system, a kernel with its modules, and an initial RAM disk."""

from __future__ import annotations

import lzma
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from vm import debs
from vm.debs import Packages, cached, digest, run

PYTHON = (
    "python3", "python3-cffi-backend", "python3-click", "python3-tenacity", "python3-xxhash", "python3-protobuf",
    "python3-pytest",
)  # fmt: skip
SYSTEM = (
    *PYTHON, "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "udev", "kmod", "iproute2", "procps", "uidmap",
    "e2fsprogs", "squashfuse", "fuse3", "fuse2fs", "fuse-overlayfs", "passt", "busybox-static",
)  # fmt: skip
# CRIU for the libraries that ours needs too.
SMALL = (
    *PYTHON, "bash", "coreutils", "mount", "util-linux", "kmod", "procps", "tar", "libmount1", "libblkid1", "criu",
    "libseccomp2", "libc-bin", "grep", "sed", "findutils", "iproute2", "python3-minimal", "busybox-static",
)  # fmt: skip
ROOT_MIB = 1600


class Guest(NamedTuple):
    """One machine, and which of the files in ``guest/`` run in it."""

    name: str
    title: str
    userland: Packages
    kernel: Packages
    tests: tuple[str, ...]
    systemd: bool = True
    seconds: int = 700
    """After which it hangs."""
    takes: tuple[str, ...] = ()
    """Guests whose checkpoints it restores; they run before."""
    always: bool = True
    """False: it adds less, and runs with IMGRUN_VM_ALL=1 only, so that all others are done in 12 minutes."""

    @property
    def arm(self) -> bool:
        return self.kernel.architecture == "arm64"


def _cloud_kernel(release: str, architecture: str = "amd64") -> Packages:
    return Packages(release, architecture, "extract", (f"linux-image-cloud-{architecture}",))


TRIXIE = Packages("trixie", "amd64", "minbase", (*SYSTEM, "erofsfuse"))
BOOKWORM = Packages("bookworm", "amd64", "minbase", SYSTEM)
ARM = Packages("trixie", "arm64", "extract", SMALL)

GUESTS = {
    guest.name: guest
    for guest in (
        Guest(
            "trixie", "Debian 13, systemd, cgroup v2 only", TRIXIE, _cloud_kernel("trixie"),
            ("test_start.py", "test_limits.py", "test_rootless.py", "test_init.py"),
        ),
        Guest(
            "freezing", "Debian 13: freezing, and holding", TRIXIE, _cloud_kernel("trixie"),
            ("test_memory.py", "test_hold.py", "test_checkpoint.py"), seconds=900,
        ),
        Guest(
            "sid", "Debian 13 with the kernel of sid", TRIXIE, _cloud_kernel("sid"),
            ("test_start.py", "test_leaving.py", "test_from_older.py"),
            takes=("freezing",),
        ),
        Guest(
            "bookworm", "Debian 12, kernel and userland", BOOKWORM, _cloud_kernel("bookworm"),
            ("test_start.py", "test_limits.py", "test_rootless.py", "test_leaving.py", "test_from_newer.py"),
            takes=("freezing", "sid"),
        ),
        Guest(
            "sid-more", "Debian 13 with the kernel of sid: limits, and freezing", TRIXIE, _cloud_kernel("sid"),
            ("test_limits.py", "test_memory.py", "test_checkpoint.py"), always=False,
        ),
        Guest(
            "bookworm-more", "Debian 12: freezing, and an init of the image's own", BOOKWORM, _cloud_kernel("bookworm"),
            ("test_memory.py", "test_hold.py", "test_checkpoint.py", "test_init.py"), always=False,
        ),
        Guest(
            "aarch64", "aarch64 with counters for instructions and cycles", ARM, _cloud_kernel("trixie", "arm64"),
            ("test_counters.py", "test_architecture.py"), systemd=False,
        ),
    )
}  # fmt: skip

UNIT = """\
[Unit]
After=multi-user.target dbus.service systemd-logind.service
[Service]
Type=oneshot
Delegate=yes
StandardOutput=journal+console
StandardError=journal+console
ExecStart=/bin/sh -c 'mkdir -p /vm; mount -o noatime /dev/vdc /vm; exec /bin/sh /vm/main'
TimeoutStartSec=infinity
[Install]
WantedBy=default.target
"""
BARE_INIT = """\
#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm; mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
ldconfig
mkdir -p /vm; mount -o noatime /dev/vdc /vm
exec /bin/sh /vm/main
"""
MASKED = ("getty.target", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service",
          "fstrim.timer", "dpkg-db-backup.timer", "systemd-timesyncd.service",
          "systemd-udev-trigger.service", "modprobe@drm.service", "modprobe@configfs.service", "modprobe@efi_pstore.service",
          "systemd-journal-flush.service", "systemd-tmpfiles-clean.timer", "systemd-binfmt.service",
          "proc-sys-fs-binfmt_misc.automount", "systemd-random-seed.service")  # fmt: skip


def root_disk(guest: Guest) -> Path:
    """An ext4 image of the userland."""
    name = f"root-{guest.userland.release}-{guest.userland.architecture}"

    def make(part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="imgrun-vm-") as scratch:
            tree = debs.unpacked(guest.userland, Path(scratch) / "tree")
            _settle(tree, systemd=guest.systemd)
            run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, part, f"{ROOT_MIB}M")

    return cached(name, digest(guest.userland, UNIT, BARE_INIT, MASKED, ROOT_MIB, guest.systemd), make)


def _settle(tree: Path, *, systemd: bool) -> None:
    for name in ("usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "usr/lib/modules").mkdir(exist_ok=True)
    (tree / "etc/fstab").write_text("")
    (tree / "etc/hostname").write_text("guest\n")
    user = "u:x:1000:1000::/home/u:/bin/bash\n"
    users = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n"
    groups = "root:x:0:\nnogroup:x:65534:\n"
    for name, lines, first in (("passwd", user, users), ("group", "u:x:1000:\n", groups)):
        path = tree / "etc" / name
        path.write_text((path.read_text() if path.exists() else first) + lines)
    if (tree / "etc/shadow").exists():
        with (tree / "etc/shadow").open("a") as f:
            f.write("u:*:20000:0:99999:7:::\n")
    for name in ("subuid", "subgid"):
        (tree / "etc" / name).write_text("u:100000:65536\n")
    home = tree / "home/u"
    home.mkdir(parents=True, exist_ok=True)
    shutil.chown(home, 1000, 1000)
    if not systemd:
        (tree / "usr/sbin").mkdir(exist_ok=True)
        init = tree / "usr/sbin/init"
        init.write_text(BARE_INIT)
        init.chmod(0o755)
        if not (tree / "usr/bin/sh").exists():
            (tree / "usr/bin/sh").symlink_to("bash")
        return
    units = tree / "etc/systemd/system"
    (units / "guest.service").write_text(UNIT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/guest.service").symlink_to("../guest.service")
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    # Nothing has to be brought up to date at each boot (systemd-update-done.service(8)).
    for name in ("etc/.updated", "var/.updated"):
        (tree / name).touch()
    (tree / "etc/machine-id").write_text("5d5b8d8c59844fa5b1ffa3c3a9e93781\n")
    # The user's manager runs from the boot on, as in a login session.
    linger = tree / "var/lib/systemd/linger"
    linger.mkdir(parents=True, exist_ok=True)
    (linger / "u").touch()


INITRD = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for module in $($b cat /modules); do $b insmod /$module; done
i=0; while [ ! -b /dev/vdd ] && [ $i -lt 100 ]; do $b sleep 0.1; i=$((i+1)); done
$b mount -t ext4 -o noatime /dev/vda /root && $b mount -t squashfs -o ro /dev/vdb /root/usr/lib/modules || {
    echo "initrd: cannot mount the disks"; $b poweroff -f; }
$b mount --move /dev /root/dev; $b umount /proc; $b umount /sys
exec $b switch_root /root /sbin/init
"""
NEEDED = ("virtio_pci", "virtio_mmio", "virtio_blk", "ext4", "squashfs")


class Kernel(NamedTuple):
    """A directory with these files."""

    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def modules(self) -> Path:
        """A squashfs of /usr/lib/modules."""
        return self.directory / "modules.squashfs"


def kernel(guest: Guest) -> Kernel:
    """The guest's kernel, with an initial RAM disk that mounts the root and the modules."""
    packages = guest.kernel

    def make(part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="imgrun-vm-") as scratch:
            tree = debs.unpacked(packages, Path(scratch) / "tree")
            part.mkdir()
            made = Kernel(part)
            modules = next(path for path in (tree / "usr/lib/modules", tree / "lib/modules") if path.is_dir())
            # Debian's newer kernels are beside their modules.
            shutil.move(next(path for path in (*tree.glob("boot/vmlinuz-*"), *modules.glob("*/vmlinuz"))), made.image)
            base = Path(scratch) / "base"
            (base / "lib").mkdir(parents=True)
            modules.rename(base / "lib/modules")
            version = next((base / "lib/modules").iterdir()).name
            run("depmod", "-b", base, version)
            busybox = Path("/usr/bin/busybox")
            if guest.arm:
                debs.unpacked(Packages(packages.release, "arm64", "extract", ("busybox-static",)), Path(scratch) / "busybox")
                busybox = Path(scratch) / "busybox/usr/bin/busybox"
            _make_initrd(made.initrd, base, version, busybox, Path(scratch) / "initrd")
            plain = ("-noD", "-noF", "-noI", "-all-root")
            run("mksquashfs", base / "lib/modules", made.modules, "-quiet", "-no-progress", *plain)

    return Kernel(cached(f"kernel-{packages.release}-{packages.architecture}", digest(packages, INITRD, NEEDED), make))


def _make_initrd(target: Path, base: Path, version: str, busybox: Path, tree: Path) -> None:
    for name in ("bin", "proc", "sys", "dev", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "init").write_text(INITRD)
    (tree / "init").chmod(0o755)
    names: list[str] = []
    for module in NEEDED:
        for line in run("modprobe", "--dirname", base, "--set-version", version, "--show-depends", module).splitlines():
            word, path = line.split()[:2]
            if word == "insmod" and (name := Path(path).name.removesuffix(".xz")) not in names:
                data = Path(path).read_bytes()
                (tree / name).write_bytes(lzma.decompress(data) if path.endswith(".xz") else data)
                names.append(name)
    (tree / "modules").write_text("\n".join(names) + "\n")
    run("sh", "-c", f"find . | cpio -o -H newc --quiet >'{target}'", cwd=tree)
