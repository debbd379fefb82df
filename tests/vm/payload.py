"""What goes into a guest: imgrun as users install it, the tests, and images for its jobs; one ext4 disk."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from importlib import import_module
from pathlib import Path

from images import build_tree, elf_header, make_filesystem
from vm import debs
from vm.debs import cached, digest, run
from vm.guests import ARM, Guest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORK_MIB = 3000
CROSS = "aarch64-linux-gnu-"

MAIN = """\
# Run by the guest as its last service.
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /out/keep
modprobe -a loop fuse squashfs overlay unix_diag inet_diag tcp_diag udp_diag netlink_diag af_packet_diag tun
python=$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
mkdir -p /usr/local/lib/$python/dist-packages
echo /vm/site >/usr/local/lib/$python/dist-packages/vm.pth
mkdir -p /usr/local/bin
cp /vm/imgrun /usr/local/bin/imgrun
chmod 1777 /out/keep
@TOOLBOX@
cd /vm/tests
export PYTHONPATH=/vm/tests VM_GUEST=@NAME@
echo "vm: the tests begin at $(cut -d ' ' -f 1 /proc/uptime) s" >/dev/console
{
    # Interrupted, pytest still tells what it has so far.
    timeout --signal INT --kill-after 20 @SECONDS@ python3 -u -m pytest -c guest/pytest.ini --rootdir guest \\
        -v --tb=short --durations=12 --junitxml=/out/junit.xml @TESTS@ 2>&1
    echo $? >/out/status
} | tee /out/log >/dev/console
echo "vm: the tests end at $(cut -d ' ' -f 1 /proc/uptime) s" >/dev/console
tar -C /out --numeric-owner -cf /dev/vdd .
sync
@END@
"""


def wheel(target: Path) -> None:
    """Build imgrun's wheel and install it into ``target``, with those of CRIU."""
    with tempfile.TemporaryDirectory(prefix="imgrun-vm-") as scratch:
        sources = Path(scratch) / "sources"
        _copy_sources(sources)
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", scratch, sources)
        wheels = [next(Path(scratch).glob("imgrun-*.whl"))]
        assert "-cp311-abi3-" in wheels[0].name, f"{wheels[0].name} does not serve all Pythons from 3.11 on"
        others = [Path(path) for path in run(ROOT / "tools/build-wheels", sys.executable).split()]
        wheels += [path for path in others if "criu" in path.name]
        run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, *wheels)


def _copy_sources(target: Path) -> None:
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "imgrun-init")
    shutil.copytree(ROOT / "imgrun", target / "imgrun", ignore=built)


def cross_built(target: Path) -> None:
    """Compile imgrun for aarch64 into ``target``."""
    with tempfile.TemporaryDirectory(prefix="imgrun-vm-") as scratch:
        sources = Path(scratch) / "sources"
        _copy_sources(sources)
        # Debian's Python.h looks for its configuration by architecture; what the stable ABI uses of it is the same on both.
        version = f"python{sysconfig.get_python_version()}"
        config = Path(sysconfig.get_config_h_filename())
        native = Path("/usr/include") / f"{os.uname().machine}-linux-gnu" / version / config.name
        include = sources / "include/aarch64-linux-gnu" / version
        include.mkdir(parents=True)
        shutil.copy(native if native.exists() else config, include)
        run(
            sys.executable, "setup.py", "-q", "build", "--build-lib", target, cwd=sources,
            env={"CC": f"{CROSS}gcc", "LDSHARED": f"{CROSS}gcc -shared", "CPATH": str(sources / "include")},
        )  # fmt: skip


TOOLBOX = """\
# CRIU with this system's libraries, in the place of that which is made for the host's architecture.
toolbox=/vm/site/imgrun_criu/toolbox
mkdir -p $toolbox
cp /vm/criu $toolbox/
cp -L /lib/ld-linux-aarch64.so.1 $toolbox/ld.so
for library in $(ldd /vm/criu | sed -n 's/.* => \\(\\/[^ ]*\\) .*/\\1/p'); do cp -L $library $toolbox/; done
"""
CRIU_NEEDS = ("libc6-dev", "libprotobuf-c-dev", "libnl-3-dev", "libnet1-dev", "libcap-dev", "uuid-dev", "libxxhash-dev")


def cross_built_criu(target: Path) -> None:
    """imgrun's CRIU compiled for aarch64 as ``target/criu``, with its record for imgrun_criu."""
    tools = ROOT / "tools/criu"
    patches = sorted((tools / "patches").glob("*.patch"))
    source = Path(run(ROOT / "tools/fetch", "criu").strip())

    def make(part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="imgrun-vm-") as scratch:
            sources = Path(scratch) / "criu"
            sources.mkdir()
            run("tar", "-xf", source, "-C", sources, "--strip-components=1", "--no-same-owner")
            for patch in patches:
                run("patch", "--batch", "--forward", "--fuzz=0", "--strip=1", f"--input={patch}", cwd=sources)
            # As the compiler's own C library, so that it finds all it needs there.
            release = debs.Packages(_codename(), "arm64", "extract", CRIU_NEEDS)
            system = debs.unpacked(release, Path(scratch) / "system")
            libraries = f"{system}/usr/lib/aarch64-linux-gnu"
            pkg_config = {"PKG_CONFIG_LIBDIR": f"{libraries}/pkgconfig", "PKG_CONFIG_SYSROOT_DIR": str(system)}
            run(
                "make", f"-j{os.cpu_count()}", "ARCH=aarch64", f"CROSS_COMPILE={CROSS}", f"CC={CROSS}gcc --sysroot={system}",
                f"PKG_CONFIG={tools / 'pkg-config'}", "PLUGINDIR=/proc/none", "FEATURE_TEST_LIBBSD_DEV=#error",
                "GOOGLE_INCLUDE=/usr/include/google/protobuf", "criu", cwd=sources,
                env=pkg_config,
            )  # fmt: skip
            run(f"{CROSS}strip", "-o", part, sources / "criu/criu")

    texts = [patch.read_text() for patch in patches]
    shutil.copy(cached("criu-arm64", digest(source.name, texts, CRIU_NEEDS), make), target / "criu")
    record = {"version": source.name.split("_")[1].removesuffix(".orig.tar.xz"), "patches": [patch.stem for patch in patches]}
    (target / "site/imgrun_criu/build.json").write_text(json.dumps(record))


def _codename() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def programs(guest: Guest, target: Path) -> None:
    """The static programs that jobs run."""
    target.mkdir(parents=True, exist_ok=True)
    compiler = f"{CROSS}gcc" if guest.arm else "gcc"
    for source in (HERE / "guest").glob("*.c"):
        run(compiler, "-O1", "-static", "-pthread", "-Wall", "-o", target / source.stem, source)


def tree_of_image(guest: Guest, scratch: Path) -> Path:
    """A small root with busybox and our programs."""
    if guest.arm:
        source = debs.unpacked(debs.Packages(ARM.release, "arm64", "extract", ("busybox-static",)), scratch / "busybox")
        tree = build_tree(scratch / "image", program=(source / "usr/bin/busybox").read_bytes())
    else:
        tree = build_tree(scratch / "image")
    programs(guest, tree / "bin")
    return tree


def small_image(guest: Guest, kind: str) -> Path:
    texts = [path.read_text() for path in sorted((HERE / "guest").glob("*.c"))]

    def make(part: Path) -> None:
        scratch = part.with_name(part.name + "-tree")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        make_filesystem(kind, part, tree_of_image(guest, scratch))
        shutil.rmtree(scratch)

    name = f"image-{guest.userland.architecture}-{kind}"
    return cached(name, digest(texts, (ROOT / "tests/images.py").read_text()), make)


def systemd_image() -> Path:
    """The image of the recipe that imgrun ships for ``--init image``."""
    recipe = ROOT / "images/debian-systemd.toml"

    def make(part: Path) -> None:
        run(sys.executable, "-m", "imgrun.cli", "image", "build", recipe, part, cwd=ROOT)

    return cached("image-systemd", digest(recipe.read_text()), make)


def work_disk(guest: Guest, directory: Path, given: dict[str, Path]) -> Path:
    """The disk for one run. ``given``: directories of other guests' checkpoints, by guest."""
    scratch = directory / "work"
    tree = scratch / "tree"
    (tree / "images").mkdir(parents=True)
    (cross_built if guest.arm else wheel)(tree / "site")
    (tree / "imgrun").write_text("#!/usr/bin/python3\nimport sys\nfrom imgrun.cli import main\nsys.exit(main())\n")
    (tree / "imgrun").chmod(0o755)
    shutil.copytree(HERE / "guest", tree / "tests/guest", ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("squashfs",) if guest.arm else ("squashfs", "ext4", "erofs"):
        shutil.copy(small_image(guest, kind), tree / f"images/small.{kind}")
    if guest.arm:
        shutil.copytree(ROOT / "tools/criu/imgrun_criu", tree / "site/imgrun_criu")
        # Python alone, and so of no architecture.
        pycriu = Path(str(import_module("pycriu").__file__)).parent
        shutil.copytree(pycriu, tree / "site/pycriu", ignore=shutil.ignore_patterns("__pycache__"))
        cross_built_criu(tree)
    other = 62 if guest.arm else 183
    foreign = build_tree(scratch / "foreign", program=elf_header(other))
    make_filesystem("squashfs", tree / "images/foreign.squashfs", foreign)
    if "test_init.py" in guest.tests:
        run("cp", "--sparse=always", systemd_image(), tree / "images/systemd.img")
    for name, path in given.items():
        (tree / "given").mkdir(exist_ok=True)
        run("cp", "-a", path, tree / "given" / name)  # with its owners
    end = "systemctl poweroff --force --force" if guest.systemd else "busybox poweroff -f"
    tests = " ".join(f"guest/{name}" for name in guest.tests)
    words = {
        "NAME": guest.name, "TESTS": tests, "END": end, "TOOLBOX": TOOLBOX if guest.arm else "",
        "SECONDS": str(guest.seconds - 90),
    }  # fmt: skip
    main = MAIN
    for word, meaning in words.items():
        main = main.replace(f"@{word}@", meaning)
    (tree / "main").write_text(main)
    disk = directory / "work.disk"
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, disk, f"{WORK_MIB}M")
    shutil.rmtree(scratch)
    return disk
