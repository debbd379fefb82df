"""The submit file for a spec, which condor_submit(1) takes."""

from __future__ import annotations

import os
import shlex

from imgrun.errors import SpecError
from imgrun.schedulers import submission
from imgrun.schedulers.htcondor import CHECKPOINT
from imgrun.schedulers.preemption import CARRIED, seconds
from imgrun.spec import JobSpec

SLACK = 30
"""Seconds to freeze a job beside the time that its memory takes."""
ROOM = 1 << 30
"""Bytes of disk beside the image and two checkpoints: what the job writes."""
UNSAFE = frozenset(",\"'$ \t")
"""What would need more quoting than a list of HTCondor's has."""

SUBMIT_FILE = """\
# Written by 'imgrun submit --to htcondor --spec {spec}'.
# It can be changed, and submitted by condor_submit.

# imgrun is installed on the execute machines. Where its site advertises it (imgrun doctor --classad), these lines send the
# job to such machines only, and a checkpoint only to processors on which it can be continued:
#requirements = TARGET.HasImgrunCheckpoints && (isUndefined(MY.ChirpImgrunCpuFeatures) \
|| stringListSubsetMatch(MY.ChirpImgrunCpuFeatures, TARGET.ImgrunCpuFeatures))
executable = {executable}
transfer_executable = false
arguments = "{arguments}"

# The spec, and what it names beside itself, go to the job's sandbox, which the job sees as /srv.
initialdir = {directory}
transfer_input_files = {inputs}
preserve_relative_paths = true
should_transfer_files = yes

# What the slot has to have. imgrun keeps the job to what the slot has, where it may.
{resources}

# Evicted or held, the job is frozen to the file {checkpoint}, which HTCondor keeps; it is continued wherever it starts next.
# imgrun ends with {code} when a checkpoint is complete.
checkpoint_exit_code = {code}
transfer_checkpoint_files = {checkpoint}
when_to_transfer_output = ON_EXIT_OR_EVICT
# The time to freeze it in, in seconds; the machine may allow less.
job_max_vacate_time = {grace}

# What imgrun says of a memory kill, or of a job that it cannot start, is the reason of a hold, which condor_q -hold shows.
on_exit_hold = isString(ChirpImgrunHoldReason) || ExitCode =?= 125
on_exit_hold_reason = ifThenElse(isString(ChirpImgrunHoldReason), ChirpImgrunHoldReason, "imgrun failed: see the error file")
on_exit_hold_subcode = ExitCode

output = {name}.$(Cluster).out
error = {name}.$(Cluster).err
log = {name}.$(Cluster).log
queue
"""


def submit_file(spec: JobSpec, spec_path: str) -> str:
    """A commented submit file that runs the spec in this file. Raises SpecError for paths that it cannot name."""
    directory, spec_name = os.path.split(spec_path)
    if not spec_path.isprintable() or not UNSAFE.isdisjoint(spec_path):
        raise SpecError(f"the path {spec_path!r} cannot be written into a submit file", "give file and directory other names")
    name = spec.name or (os.path.basename(spec.command[0]) if spec.command else "imgrun")
    words = [*shlex.split(submission.command()), "start", "--htcondor", "--spec", spec_name]
    return SUBMIT_FILE.format(
        spec=spec_path, executable=words[0], arguments=" ".join(map(_argument, words[1:])), directory=directory,
        inputs=", ".join([spec_name, *_beside(spec, directory)]), resources="\n".join(_resources(spec, directory)),
        checkpoint=CHECKPOINT, code=spec.checkpoint_exit_code, grace=SLACK + seconds(spec.memory or 0, CARRIED),
        name="".join(c if c.isalnum() or c in "_.-" else "_" for c in name),
    )  # fmt: skip


def _argument(word: str) -> str:
    """A word in the new syntax of arguments."""
    word = word.replace('"', '""')
    return "'" + word.replace("'", "''") + "'" if not UNSAFE.isdisjoint(word) else word


def _beside(spec: JobSpec, directory: str) -> list[str]:
    """What the spec names below its own directory, by relative paths; what lies elsewhere is expected on the machine."""
    found = []
    for path in (spec.image, *(mount.src for mount in spec.mounts if mount.src)):
        relative = os.path.relpath(path, directory)
        if relative.split("/")[0] == ".." or not os.path.exists(path):
            continue
        if not relative.isprintable() or not UNSAFE.isdisjoint(relative):
            raise SpecError(f"HTCondor cannot be told to transfer {relative!r}", "give it another name")
        found.append(relative)
    return list(dict.fromkeys(found))


def _resources(spec: JobSpec, directory: str) -> list[str]:
    lines = []
    if spec.cpus is not None:
        lines.append(f"request_cpus = {-int(-spec.cpus // 1)}")
    if spec.memory is not None:
        lines.append(f"request_memory = {-(-spec.memory >> 20)}")
    inside = not os.path.relpath(spec.image, directory).startswith("..")
    image = os.path.getsize(spec.image) if inside and os.path.isfile(spec.image) else 0
    lines.append(f"request_disk = {(image + 2 * (spec.memory or ROOM) + (spec.scratch_size or ROOM)) >> 10}")
    return lines


def submit(text: str) -> str:
    """Submit the file; what condor_submit answers. Raises ImgrunError."""
    return submission.submit(["condor_submit"], text, "condor_submit").splitlines()[-1]
