"""Attributes for the job's ad, told to HTCondor's starter by Chirp; nothing of it may keep the job from anything.

A site decides which attributes a job may set (CHIRP_DELAYED_UPDATE_PREFIX, by default ``Chirp*``). IMGRUN_CHIRP_PREFIX says
what they begin with here; empty, where a site allows the names of HTCondor's own.
"""

from __future__ import annotations

import os
import sys

from imgrun.accounting.classad import attributes, literal
from imgrun.result import Result

PREFIX = "Chirp"
TIMEOUT = 5
"""Seconds to wait for the starter, which is on this host."""
OF_HTCONDOR = ("ExitBySignal", "ExitCode", "ExitSignal")
"""What HTCondor itself knows of how the job ended."""


def available() -> bool:
    """Whether the starter offers Chirp to this job."""
    return os.path.exists(os.environ.get("_CONDOR_CHIRP_CONFIG", ".chirp.config"))


def installed() -> bool:
    from importlib.util import find_spec

    return find_spec("htchirp") is not None


def of_result(result: Result) -> dict[str, object]:
    """What the job's ad shall say of this life of the job."""
    ad = {name: value for name, value in attributes(result).items() if name not in OF_HTCONDOR}
    reason = ad.pop("HoldReason")
    if result.reason != "checkpointed":
        ad["ImgrunHoldReason"] = reason
    return ad


def update(ad: dict[str, object]) -> None:
    """Set the attributes with the starter's next update. Where the site forbids it, nothing happens."""
    if not available() or not installed():
        return
    from htchirp import HTChirp

    prefix = os.environ.get("IMGRUN_CHIRP_PREFIX", PREFIX)
    try:
        with HTChirp(timeout=TIMEOUT) as chirp:
            for name, value in ad.items():
                chirp.set_job_attr_delayed(f"{prefix}{name}", literal(value))
    except Exception as e:  # noqa: BLE001 - each refusal has a class of its own, and none of them matters to the job
        if os.environ.get("IMGRUN_DEBUG"):
            print(f"imgrun: chirp: {e!r}", file=sys.stderr)
