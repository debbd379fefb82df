"""python-libmount: util-linux's own Python binding of libmount, packed as a wheel.

Neither PyPI nor Debian has it. Runs in the unpacked util-linux release (tools/build-wheels puts it
there); compiles libmount/python against the system's libmount.
"""

import subprocess
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("libmount/python")


def pkg_config(option: str) -> list[str]:
    words = subprocess.run(["pkg-config", option, "mount"], check=True, stdout=subprocess.PIPE, text=True)
    return words.stdout.split()


setup(
    name="python-libmount",
    version=Path(".tarball-version").read_text().strip(),
    description="Python binding of libmount, from util-linux",
    license="LGPL-3.0-or-later",
    packages=["libmount"],
    package_dir={"libmount": str(SOURCES)},
    ext_modules=[
        Extension(
            "libmount.pylibmount",
            sorted(str(path) for path in SOURCES.glob("*.c")),
            # include/c.h is util-linux's own; libmount.h is the system's.
            extra_compile_args=["-Iinclude", *pkg_config("--cflags"), "-fno-strict-aliasing"],
            extra_link_args=pkg_config("--libs"),
        )
    ],
)
