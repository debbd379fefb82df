"""``imgrun check CHECKPOINT``: whether it can be continued here, requirement by requirement, before anything is touched."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from typing import Literal, NamedTuple

from imgrun.checkpoints import identity
from imgrun.checkpoints.manifest import IMAGE, OLDER, Checkpoint, changed_files, exists, foreign_owner, load, said, size_of
from imgrun.errors import ImgrunError, LimitError, RestoreError, SpecError
from imgrun.init_shim import PROTOCOL
from imgrun.spec import JobSpec, parse_bind
from imgrun.storage.scratch import FILE

AS_BEFORE = "start it as it was started, or with another --checkpoint-dir"
Level = Literal["ok", "warning", "refused"]
OVERRIDES = ("owner", "image-changed", "cpu", "kernel", "criu", "ids", "second-copy")
"""What ``--allow`` may name."""


class Finding(NamedTuple):
    """One requirement and what became of it. ``name`` is what ``--allow`` takes, where it can be overridden."""

    level: Level
    name: str
    text: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.level:8} {self.name:14} {self.text}"


def changed(
    checkpoint: Checkpoint,
    *,
    image: str | None = None,
    memory: str | None = None,
    binds: tuple[str, ...] = (),
    allow: tuple[str, ...] = (),
    lazy: bool = False,
) -> Checkpoint:
    """The checkpoint with what is to be different this time. ``binds`` are ``NEW:DST``, for mounts that it has.

    An ``image`` that is not there yet is where a captured one is to be put. Raises SpecError.
    """
    if unknown := set(allow) - set(OVERRIDES):
        raise SpecError(f"--allow {min(unknown)!r} is unknown", f"one of: {', '.join(OVERRIDES)}")
    spec = checkpoint.spec
    changes: dict[str, object] = {}
    target = None
    if image is not None:
        changes["image"] = os.path.abspath(image)
        if IMAGE in checkpoint.manifest.get("files", {}) and not os.path.lexists(image):
            target = os.path.abspath(image)
    if memory is not None:
        changes["memory"] = memory
    mounts = list(spec.mounts)
    for text in binds:
        bind = parse_bind(text)
        place = next((i for i, m in enumerate(mounts) if m.dst == os.path.normpath(bind.dst) and m.type != "tmpfs"), None)
        if place is None:
            known = ", ".join(m.dst for m in mounts if m.type != "tmpfs") or "none"
            raise SpecError(f"the job has no mount at {bind.dst} whose source could be another", f"it has: {known}")
        mounts[place] = mounts[place]._replace(src=os.path.abspath(bind.src))
    changes["mounts"] = tuple(mounts)
    return checkpoint._replace(
        spec=spec.with_changes(**changes), shared="second-copy" in allow, image_target=target, lazy=lazy
    )


def earlier_life(spec: JobSpec, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that a job with ``checkpoint_dir`` is to go on from; None when it has not run before.

    Raises RestoreError where it cannot.
    """
    from imgrun.job import collect
    from imgrun.state import StateRoot

    assert spec.checkpoint_dir is not None
    collect(StateRoot())  # one whose maker was killed may wait for its name
    if not exists(spec.checkpoint_dir):
        return None
    saved = load(spec.checkpoint_dir)
    if saved.spec.command != spec.command:
        command = textwrap.shorten(" ".join(saved.spec.command), 100, placeholder=" ...")
        raise RestoreError(f"{saved.path} holds a job with another command: {command}", AS_BEFORE)
    found = as_asked(saved, spec)
    for warning in require(found):
        warn(warning)
    return found


def as_asked(checkpoint: Checkpoint, spec: JobSpec) -> Checkpoint:
    """The checkpoint as ``start`` is asked to run it: with its own limits, but in the same surroundings.

    Raises RestoreError where these differ from those that the job was frozen in.
    """
    saved = checkpoint.spec
    pairs: list[tuple[str, object, object]] = [
        (key, getattr(saved, key), getattr(spec, key))
        for key in ("root", "userns", "init", "seccomp", "scratch_size", "network")
    ]
    pairs.append(("mounts", sorted((m.dst, m.type) for m in saved.mounts), sorted((m.dst, m.type) for m in spec.mounts)))
    for key, was, asked in pairs:
        if was != asked:
            raise RestoreError(f"{checkpoint.path} holds a job with {key} {was!r}, and {asked!r} is asked for", AS_BEFORE)
    return checkpoint._replace(spec=spec)


def require(checkpoint: Checkpoint, allow: tuple[str, ...] = ()) -> list[str]:
    """Raise RestoreError for the first requirement that is not met and not allowed to be; returns the warnings.

    Of the files with memory it sees the sizes; imgrun.checkpoints.continuing does not let the job run before it has seen all.
    """
    warnings = []
    for finding in findings(checkpoint, memory=False):
        if finding.level == "warning" or (finding.level == "refused" and finding.name in allow):
            warnings.append(finding.text)
        elif finding.level == "refused":
            override = f"; or --allow {finding.name}" if finding.name in OVERRIDES else ""
            raise RestoreError(cannot_continue(checkpoint, finding.text), f"{finding.hint}{override}")
    return warnings


def cannot_continue(checkpoint: Checkpoint, why: str) -> str:
    return f"{checkpoint.archive or checkpoint.path} cannot be continued here: {why}"


def findings(checkpoint: Checkpoint, *, memory: bool = True) -> list[Finding]:
    """Every requirement, the cheap ones first. Without ``memory``, of the files with memory only the sizes are looked at.

    Raises RestoreError for a manifest with something else than what imgrun writes.
    """
    try:
        return [
            *_owner(checkpoint),
            *_host(checkpoint),
            *_image(checkpoint),
            *_rights(checkpoint),
            *_mounts(checkpoint.spec),
            *_limits(checkpoint.spec),
            *_running(checkpoint),
            *_files(checkpoint, memory),
        ]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise RestoreError(f"the manifest of the checkpoint {checkpoint.path} makes no sense: {e!r}", OLDER) from e


def _owner(checkpoint: Checkpoint) -> list[Finding]:
    try:
        who = foreign_owner(checkpoint, os.geteuid())
    except OSError as e:
        return [Finding("refused", "files", said(e), OLDER)]
    if who is None:
        return [Finding("ok", "owner", "it is yours alone")]
    hint = "it holds programs that would run as you: look where it comes from, and make it yours"
    return [Finding("refused", "owner", f"{who}, who could have put anything into it", hint)]


def _host(checkpoint: Checkpoint) -> list[Finding]:
    was, here = checkpoint.manifest["host"], identity.host()
    found = []
    if was["machine"] != here["machine"]:
        text = f"it was made on {was['machine']}, and this is {here['machine']}"
        return [Finding("refused", "machine", text, "continue it on a host of its kind")]
    missing = sorted(set(was["cpu"]["features"]) - set(here["cpu"]["features"]))
    if missing:
        text = f"this processor lacks {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}, which the job's had"
        found.append(Finding("refused", "cpu", text, "continue it on a host with as good a processor"))
    elif was["cpu"]["vendor"] != here["cpu"]["vendor"]:
        text = f"the processor is of {here['cpu']['vendor']} and was of {was['cpu']['vendor']}"
        found.append(Finding("warning", "cpu", text))
    else:
        found.append(Finding("ok", "cpu", "this processor can do what the job's could"))
    version = identity.version_tuple
    if version(here["kernel"])[:2] < version(was["kernel"])[:2]:
        text = f"this kernel is {here['kernel']}, older than the job's {was['kernel']}"
        found.append(Finding("refused", "kernel", text, "continue it on a host with as new a kernel"))
    else:
        found.append(Finding("ok", "kernel", f"{here['kernel']}, and was {was['kernel']}"))
    if here["criu"] is None:
        found.append(Finding("refused", "criu-missing", "CRIU is not installed", identity.HOW_TO_GET_CRIU))
    elif version(here["criu"]) < version(was["criu"]):
        text = f"this CRIU is {here['criu']}, older than the {was['criu']} that made it"
        found.append(Finding("refused", "criu", text, identity.HOW_TO_GET_CRIU))
    else:
        found.append(Finding("ok", "criu", f"{here['criu']}, and was {was['criu']}"))
    found.append(_ids(checkpoint))
    if (protocol := checkpoint.manifest.get("shim", PROTOCOL)) != PROTOCOL:
        text = f"its first processes speak another language ({protocol}) than this imgrun ({PROTOCOL})"
        found.append(Finding("refused", "shim", text, "continue it with the imgrun that made it"))
    return found


def _ids(checkpoint: Checkpoint) -> Finding:
    from imgrun.isolation.rootless import is_host_root, number_of_ids

    manifest = checkpoint.manifest
    rootless = not is_host_root()
    if bool(manifest["rootless"]) != rootless:
        made = "an ordinary user" if manifest["rootless"] else "root"
        return Finding("refused", "ids", f"the owners of its files are as for {made}", f"continue it as {made}")
    outside = manifest["ids"]["uid"][0][1] if manifest["ids"]["uid"] else 0
    if rootless and outside not in (0, os.geteuid()):
        text = f"it was made by uid {outside}, and you are {os.geteuid()}"
        return Finding("refused", "ids", text, "continue it as that user")
    most = sum(row[2] for row in manifest["ids"]["uid"])
    if rootless and most > (here := number_of_ids()):
        text = f"its job had {most} ids, and you have {here}"
        return Finding("refused", "ids", text, "ask for as many subordinate ids in /etc/subuid and /etc/subgid")
    return Finding("ok", "ids", "its files have owners that you can give")


def _image(checkpoint: Checkpoint) -> list[Finding]:
    path = checkpoint.spec.image
    if checkpoint.image_target is not None:
        return [Finding("ok", "image", f"it is in the checkpoint, and is put at {path}")]
    writable = checkpoint.spec.root == "writable"
    try:
        difference = identity.same_image(checkpoint.manifest["image"], path)
    except FileNotFoundError:
        hint = "bring it back, or tell with --image PATH where it is now"
        return [Finding("refused", "image", f"the image {path} is not there", hint)]
    except OSError as e:
        return [Finding("refused", "image", f"the image {path} cannot be read: {e.strerror}", "see its permissions")]
    found = []
    if difference is None:
        found.append(Finding("ok", "image", f"{path} is as it was"))
    else:
        hint = "take the image as it was" + (": the job wrote into it, and goes on where it stood" if writable else "")
        if IMAGE in checkpoint.manifest.get("files", {}):
            hint = "put the image that was captured elsewhere, with --image NEWPATH"
        found.append(Finding("refused", "image-changed", f"{path} is not the image that it was: {difference}", hint))
    found += _image_in_use(path, writable)
    return found


def _image_in_use(path: str, writable: bool) -> list[Finding]:
    from imgrun.storage import lock

    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        lock.hold(fd, path, exclusive=writable, wait=0)
    except ImgrunError as e:
        return [Finding("refused", "image-in-use", e.message, e.hint)]
    except OSError:
        pass  # it cannot be told here; the start will
    finally:
        os.close(fd)
    return []


def _rights(checkpoint: Checkpoint) -> list[Finding]:
    """What it gets of the host, for whoever did not make it."""
    spec = checkpoint.spec
    root = "of the host" if spec.userns == "off" and not checkpoint.manifest["rootless"] else "of a user namespace"
    return [
        Finding("ok", "userns", f"--userns {spec.userns}: its root is one {root}"),
        Finding("ok", "network", f"--network {spec.network}"),
    ]


def _mounts(spec: JobSpec) -> list[Finding]:
    found = []
    for mount in spec.mounts:
        if mount.type == "tmpfs":
            continue
        if os.path.exists(mount.src):
            access = "read-only" if mount.ro or mount.type == "image" else "can be written to"
            found.append(Finding("ok", "mount", f"{mount.src}, for {mount.dst}, is there, and {access}"))
        else:
            hint = f"make it, or give another with --bind NEW:{mount.dst}"
            found.append(Finding("refused", "mount", f"{mount.src}, for {mount.dst}, is not there", hint))
    return found


def _limits(spec: JobSpec) -> list[Finding]:
    from imgrun.isolation.cgroups.cgroup import check_limits

    if spec.limits_mode == "best-effort":
        return []
    try:
        check_limits(spec.limits())
    except LimitError as e:
        return [Finding("refused", "limit", e.message, e.hint)]
    return [Finding("ok", "limit", "its limits can be kept")]


def _running(checkpoint: Checkpoint) -> list[Finding]:
    try:
        os.close(checkpoint.hold())
    except RestoreError as e:
        return [Finding("refused", "second-copy", e.message, "end that one first")]
    return []


def _files(checkpoint: Checkpoint, memory: bool) -> list[Finding]:
    wrong = changed_files(checkpoint, memory=memory)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return [Finding("refused", "files", f"{wrong[0]}{more}", OLDER)]
    manifest = checkpoint.manifest
    total = size_of(manifest["files"])
    found = [Finding("ok", "files", f"{len(manifest['files'])} files, {total >> 20} MiB, are as written")]
    if (tree := manifest.get("tree")) is None and manifest["layers"] == [FILE]:
        text = f"what the job wrote to disk has no hashes: {FILE} is complete only once it is unmounted"
        found.append(Finding("ok", "files", text))
    elif tree is None:
        found.append(Finding("warning", "files", "what the job wrote to disk has no hashes: it is taken as it is"))
    else:
        text = f"what the job wrote to disk, {tree['entries']} entries, {tree['bytes'] >> 20} MiB, is as written"
        found.append(Finding("ok", "files", text))
    return found
