"""``imgrun doctor --classad``: what an execute machine offers to jobs of imgrun's, for HTCondor's STARTD_CRON.

    STARTD_CRON_JOBLIST = $(STARTD_CRON_JOBLIST) IMGRUN
    STARTD_CRON_IMGRUN_EXECUTABLE = /usr/bin/imgrun
    STARTD_CRON_IMGRUN_ARGS = doctor --classad
    STARTD_CRON_IMGRUN_PERIOD = 1h

A job's requirements then send it to machines with ``HasImgrun``, and a checkpoint to where it can be continued: processors
with the same ``ImgrunCpuFeatures``, and no older ``ImgrunCriuVersion``.
"""

from __future__ import annotations

from imgrun import __version__
from imgrun.accounting.classad import literal
from imgrun.checkpoints import identity
from imgrun.doctor import Check, examine, works

IMAGES = " images"
"""How the checks of image formats end."""


def attributes(checks: list[Check]) -> dict[str, object]:
    """The attributes of this host, for the user who asks."""
    state = {check.name: check.state for check in checks}
    formats = [check.name.removesuffix(IMAGES) for check in checks if check.name.endswith(IMAGES) and check.state == "ok"]
    host = identity.host()
    kernel = identity.version_tuple(host["kernel"])
    return {
        "HasImgrun": works(checks),
        "ImgrunVersion": __version__,
        "ImgrunFileSystems": ",".join(sorted(formats)),
        "HasImgrunCheckpoints": works(checks) and state.get("checkpoints") == "ok",
        "ImgrunCriuVersion": host["criu"],
        "ImgrunKernel": host["kernel"],
        "ImgrunKernelMajor": kernel[0] if kernel else None,
        "ImgrunKernelMinor": kernel[1] if len(kernel) > 1 else None,
        "ImgrunCpuVendor": host["cpu"]["vendor"],
        "ImgrunCpuFamily": host["cpu"]["family"],
        "ImgrunCpuModel": host["cpu"]["model"],
        "ImgrunCpuFeatures": ",".join(host["cpu"]["features"]),
        "HasImgrunCounters": state.get("hardware counters") == "ok",
    }


def classad() -> str:
    """The ad in its long form. The line ``-`` tells STARTD_CRON that it is complete."""
    lines = [f"{name} = {literal(value)}\n" for name, value in attributes(examine()).items()]
    return "".join([*lines, "-\n"])
