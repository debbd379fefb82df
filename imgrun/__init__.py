"""imgrun: run a batch job inside a disk image as if it were a virtual machine, without the virtual machine.

    from imgrun import Job, JobSpec

    job = Job.start(JobSpec(image="ubuntu.img", command=("./analyse", "data.csv"), memory="2G"))
    result = job.wait()
    print(result.exit_code, result.reason, result.usage.user_seconds)

Names are imported when they are first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what type checkers take for true; importing typing for it would take longer than all of this

if TYPE_CHECKING:
    from typing import Any

    from imgrun.errors import ImgrunError
    from imgrun.job import Job
    from imgrun.result import Result, Usage
    from imgrun.spec import JobSpec, Mount

__all__ = ["ImgrunError", "Job", "JobSpec", "Mount", "Result", "Usage", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "ImgrunError": "imgrun.errors",
    "Job": "imgrun.job",
    "JobSpec": "imgrun.spec",
    "Mount": "imgrun.spec",
    "Result": "imgrun.result",
    "Usage": "imgrun.result",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'imgrun' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
