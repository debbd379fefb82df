"""The compiled parts of imgrun; everything else about the package is in pyproject.toml."""

import os
import shlex
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("imgrun/native")

# PID 1 of every job: a static program of a few kilobytes without a C library, so that it starts in any
# image and is nearly free in memory. The job's own files and flags have no say in it.
INIT_FLAGS = """
    -std=gnu11 -Os -Wall -Wextra -Werror
    -static -nostdlib -nostartfiles -ffreestanding -fno-pie -no-pie
    -fno-stack-protector -fno-asynchronous-unwind-tables -fomit-frame-pointer
    -ffunction-sections -fdata-sections -Wl,--gc-sections
    -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-z,noexecstack -Wl,--strip-all
""".split()


class BuildNative(build_ext):
    """The extension modules, and the init program beside them."""

    def run(self) -> None:
        super().run()
        in_place = self.inplace or self.editable_mode
        program = Path("" if in_place else self.build_lib) / NATIVE / "imgrun-init"
        program.parent.mkdir(parents=True, exist_ok=True)
        # To another name first: a job that runs the old one must not make this fail, nor see it change.
        new = program.with_suffix(".new")
        self.spawn([*shlex.split(os.environ.get("CC", "cc")), *INIT_FLAGS, "-o", str(new), str(NATIVE / "init.c")])
        new.chmod(0o755)
        new.replace(program)


setup(
    cffi_modules=[f"{path}:ffibuilder" for path in sorted(NATIVE.glob("build_*.py"))],
    cmdclass={"build_ext": BuildNative},
    # cffi's modules keep to the stable ABI: one wheel for all later Pythons.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
