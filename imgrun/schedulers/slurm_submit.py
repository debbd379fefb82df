"""The batch script for a spec, which sbatch(1) takes."""

from __future__ import annotations

import os
import shlex

from imgrun.errors import SpecError
from imgrun.isolation.cgroups.limits import Limits
from imgrun.schedulers import submission
from imgrun.spec import JobSpec

NOTICE = 60
"""Seconds before its time limit that Slurm tells a job."""
ROUND = 300
"""Seconds of Slurm's time limit beyond the job's own."""

SCRIPT = """\
#!/bin/sh
# Written by 'imgrun submit --to slurm --spec {spec}'.
# It can be changed, and submitted by sbatch.
#SBATCH --job-name={name}
#
# What the job may use. imgrun keeps the same limits, where it may (--limits best-effort).
{resources}
#
# Preempted, or {notice} s before its time limit, the job is told by USR1, and imgrun freezes it to the directory
# imgrun-checkpoints here. It then exits with 85, and is queued again: if Slurm does not do so, imgrun asks for it.
#SBATCH --requeue
#SBATCH --signal=B:USR1@{notice}
#
# The next life continues it, and its output. By exec, the signals are imgrun's and not the shell's.
#SBATCH --open-mode=append
exec {imgrun} start --slurm{limits} --spec {spec_word}
"""


def submit_file(spec: JobSpec, spec_path: str) -> str:
    """A commented batch script that runs the spec in this file, as long as it takes."""
    if not spec_path.isprintable():
        raise SpecError(f"the path {spec_path!r} cannot be written into a script", "give the file another name")
    name = spec.name or (os.path.basename(spec.command[0]) if spec.command else "imgrun")
    resources = ["#SBATCH --ntasks=1"]
    if spec.cpus is not None:
        resources.append(f"#SBATCH --cpus-per-task={-int(-spec.cpus // 1)}")
    if spec.memory is not None:
        resources.append(f"#SBATCH --mem={-(-spec.memory >> 20)}M")
    if spec.time_limit is not None:
        minutes = -int(-(spec.time_limit + ROUND) // 60)
        resources.append(f"#SBATCH --time={minutes}")
    return SCRIPT.format(
        spec=spec_path, name="".join(c if c.isalnum() or c in "_.-" else "_" for c in name), resources="\n".join(resources),
        notice=NOTICE, imgrun=submission.command(), limits="" if spec.limits() == Limits() else " --limits best-effort",
        spec_word=shlex.quote(spec_path),
    )  # fmt: skip


def submit(text: str) -> str:
    """Submit the script; what sbatch answers. Raises ImgrunError."""
    return submission.submit(["sbatch"], text, "sbatch")
