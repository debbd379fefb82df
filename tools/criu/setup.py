"""imgrun-criu: CRIU with all it needs to run, as a wheel. Called by tools/criu/build.

The package is data only, so one wheel serves every Python; but the data is one platform's.
"""

import json
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


build = json.loads(Path("imgrun_criu/build.json").read_text())

setup(
    name="imgrun-criu",
    # A local part for every set of patches: pip then sees another version.
    version=f"{build['version']}+imgrun.{build['patches_id']}",
    description="CRIU for imgrun: relocatable, with the patches that freezing without root needs",
    license="GPL-2.0-only",
    python_requires=">=3.11",
    packages=["imgrun_criu"],
    package_data={"imgrun_criu": ["py.typed", "build.json", "COPYING", "*.patch", "toolbox/*"]},
    cmdclass={"bdist_wheel": PlatformWheel},
)
