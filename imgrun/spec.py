"""JobSpec: what the user asks for, as one frozen object. Flags, TOML and Python all end here.

Everything that can be refused without touching the machine is refused while a spec is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from imgrun.config import image_path, mount_record
from imgrun.errors import SpecError
from imgrun.isolation.cgroups.limits import IoMax, Limits
from imgrun.isolation.limits import Rlimit, parse_rlimit
from imgrun.units import format_cpu_list, parse_cpu_list, parse_duration, parse_size

RootMode = Literal["overlay", "writable", "read-only"]
Userns = Literal["auto", "off"]
Init = Literal["shim", "none", "image"]
Network = Literal["host", "none", "private"]
Seccomp = Literal["off", "default"]
Pmu = Literal["auto", "off", "require"]
LimitsMode = Literal["strict", "best-effort"]
Oom = Literal["kill", "hold"]

CHOICES: dict[str, tuple[str, ...]] = {
    "root": ("overlay", "writable", "read-only"),
    "limits_mode": ("strict", "best-effort"),
    "userns": ("auto", "off"),
    "init": ("shim", "none", "image"),
    "network": ("host", "none", "private"),
    "seccomp": ("off", "default"),
    "pmu": ("auto", "off", "require"),
    "oom": ("kill", "hold"),
}
LIMIT_KEYS = ("memory", "swap", "cpus", "cpu_weight", "cpuset", "pids", "io_weight", "io_max", "time_limit", "rlimits")
SHORTEST_SAMPLE = 0.1
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
RESERVED_TARGETS = ("/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/mqueue")


class Mount(NamedTuple):
    """One mount the user asks for. ``src`` is a host path (bind, image); ``size`` is bytes (tmpfs)."""

    type: Literal["bind", "tmpfs", "image"]
    dst: str
    src: str = ""
    ro: bool = False
    idmap: bool = False
    size: int | None = None
    partition: str | None = None

    def describe(self) -> str:
        if self.type == "tmpfs":
            return f"tmpfs at {self.dst}"
        kind = "image " if self.type == "image" else ""
        return f"{kind}{self.src} at {self.dst}{' read-only' if self.ro else ''}{' id-mapped' if self.idmap else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to run, in what, with what.

    Sizes are bytes or text such as ``"2G"`` (binary units); durations are seconds or text such as ``"1h30m"``. After
    construction every field has its plain form. Raises SpecError for anything malformed.
    """

    image: str
    command: tuple[str, ...] = ()
    # identity
    name: str | None = None
    hostname: str | None = None
    user: str | None = None
    workdir: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    # root
    root: RootMode = "overlay"
    partition: str | None = None
    scratch_size: int | None = None
    # storage
    mounts: tuple[Mount, ...] = ()
    # limits
    memory: int | None = None
    swap: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpuset: str | None = None
    pids: int | None = None
    io_weight: int | None = None
    io_max: tuple[IoMax, ...] = ()
    time_limit: float | None = None
    rlimits: tuple[Rlimit, ...] = ()
    oom: Oom = "kill"
    """At the memory limit: the job is killed as a whole, or stands still until somebody decides."""
    # isolation
    limits_mode: LimitsMode = "strict"
    """What to do with a limit that this host cannot enforce: refuse the job, or leave the limit out and say so."""
    userns: Userns = "auto"
    init: Init = "shim"
    network: Network = "host"
    seccomp: Seccomp = "off"
    # records
    pmu: Pmu = "auto"
    sample: float | None = None
    """Seconds between the points of a time series that is kept with the job."""
    # checkpoint
    checkpoint_dir: str | None = None
    """Where the job is frozen to on request; a checkpoint found there is continued by ``imgrun start``."""
    checkpoint_signal: tuple[int, ...] | None = None
    """The signals that ask for it; a single number is understood as well."""
    checkpoint_every: float | None = None
    """Seconds between checkpoints of the running job."""
    checkpoint_exit_code: int = 85
    # lifecycle
    tty: bool = False
    stop_signal: int = 15
    stop_timeout: float = 10.0

    def __post_init__(self) -> None:
        for key, value in _normalised(self).items():
            object.__setattr__(self, key, value)

    def limits(self) -> Limits:
        """The part of the spec that cgroups enforce."""
        return Limits(**{name: getattr(self, name) for name in Limits._fields})

    def with_changes(self, **changes: Any) -> JobSpec:
        """A copy with some fields changed, checked anew."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The plain form, for JSON. Fields at their default are left out."""
        record: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value in (None, (), {}) or value == f.default:
                continue
            if f.name == "mounts":
                value = [{k: v for k, v in m._asdict().items() if v not in (None, "", False)} for m in value]
            elif f.name in ("io_max", "rlimits"):
                value = [m._asdict() for m in value]
            elif f.name == "env":
                value = dict(value)
            record[f.name] = list(value) if isinstance(value, tuple) else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> JobSpec:
        """The inverse of :meth:`to_dict`."""
        known = dict(record)
        known["mounts"] = tuple(Mount(**m) for m in known.get("mounts", ()))
        known["io_max"] = tuple(IoMax(**m) for m in known.get("io_max", ()))
        known["rlimits"] = tuple(Rlimit(**m) for m in known.get("rlimits", ()))
        return cls(**known)


def _normalised(spec: JobSpec) -> dict[str, Any]:
    """Every field in its plain form; SpecError for the first that has none."""
    if not spec.image:
        raise SpecError("no image given", "imgrun start IMAGE [--] COMMAND...")
    for key, choices in CHOICES.items():
        if getattr(spec, key) not in choices:
            raise SpecError(f"{key} is {getattr(spec, key)!r}", f"choose one of: {', '.join(choices)}")
    given: Any = spec.command
    command = (given,) if isinstance(given, str) else tuple(given)
    if not command and spec.init != "image":
        raise SpecError("no command given", "imgrun start IMAGE [--] COMMAND...")
    if command and spec.init == "image":
        raise SpecError("--init image runs the image's own init, and a command was given", "leave one of them out")
    if spec.scratch_size is not None and spec.root == "writable":
        raise SpecError("--scratch-size bounds writes to the scratch, and --writable writes into the image", "drop one")
    check_text("the command", *command)
    for key in ("image", "user", "workdir", "partition", "checkpoint_dir"):
        check_text(key, str(getattr(spec, key)))
    for limit in spec.io_max:
        check_text("io_max", limit.device)
    changes: dict[str, Any] = {
        "image": image_path(spec.image),
        "command": command,
        "env": dict(checked_env(spec.env)),
        "mounts": _checked_mounts(spec.mounts),
        "partition": _partition(spec.partition, "partition"),
    }
    for key in ("memory", "swap", "scratch_size"):
        value = getattr(spec, key)
        changes[key] = None if value is None else _size(value, key.replace("_", "-"))
    if spec.memory is not None and changes["memory"] < 1 << 20:
        raise SpecError(f"memory is {changes['memory']} bytes", "give at least 1M; units are K, M, G, T")
    if spec.scratch_size is not None and changes["scratch_size"] < 4 << 20:
        raise SpecError(f"scratch-size is {changes['scratch_size']} bytes", "give at least 4M")
    for key in ("time_limit", "stop_timeout", "checkpoint_every", "sample"):
        value = getattr(spec, key)
        changes[key] = None if value is None else parse_duration(str(value), key.replace("_", "-"))
    if changes["sample"] is not None and changes["sample"] < SHORTEST_SAMPLE:
        raise SpecError(f"sample is {changes['sample']:g} s", f"give at least {SHORTEST_SAMPLE:g} s")
    if spec.oom == "hold" and spec.memory is None:
        raise SpecError("--oom hold holds the job at its memory limit, and it has none", "add --memory SIZE")
    if spec.checkpoint_every is not None and spec.checkpoint_dir is None:
        raise SpecError("--checkpoint-every needs to know where to", "add --checkpoint-dir DIR")
    signals: Any = spec.checkpoint_signal
    if signals is not None:
        changes["checkpoint_signal"] = (signals,) if isinstance(signals, int) else tuple(signals)
    changes["cpus"] = _number(spec.cpus, "cpus", 0.01, 100000.0, float)
    changes["cpu_weight"] = _number(spec.cpu_weight, "cpu-weight", 1, 10000, int)
    changes["io_weight"] = _number(spec.io_weight, "io-weight", 1, 10000, int)
    changes["checkpoint_exit_code"] = _number(spec.checkpoint_exit_code, "checkpoint-exit-code", 0, 255, int)
    changes["pids"] = _number(spec.pids, "pids", 1, 4 << 20, int)
    changes["cpuset"] = None if spec.cpuset is None else format_cpu_list(parse_cpu_list(str(spec.cpuset), "cpuset"))
    rlimits: Any = spec.rlimits
    changes["rlimits"] = tuple(parse_rlimit(r) if isinstance(r, str) else r for r in rlimits)
    if spec.name is not None:
        changes["name"] = _checked_name(spec.name, "name", 64)
    if spec.hostname is not None:
        changes["hostname"] = _checked_name(spec.hostname, "hostname", 63)
    if spec.workdir is not None:
        check_workdir(spec.workdir)
    return changes


def _size(value: Any, what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_size(str(value), what)


def _partition(value: Any, what: str) -> str | None:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise SpecError(f"{what} is {value!r}", "give its number, label or UUID")


def _number(value: Any, what: str, low: float, high: float, kind: type[int] | type[float]) -> Any:
    if value is None:
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise SpecError(f"{what} is {value!r}", f"give a number from {low:.10g} to {high:.10g}") from None
    if not low <= number <= high:
        raise SpecError(f"{what} is {value!r}", f"give a number from {low:.10g} to {high:.10g}")
    return number


def _checked_name(name: str, what: str, longest: int) -> str:
    if not name or len(name) > longest or name[0] in ".-" or not NAME_CHARACTERS.issuperset(name):
        raise SpecError(
            f"{what} {name!r} is not usable",
            f"use letters, digits, '_', '.', '-', not beginning with '.' or '-', at most {longest} characters",
        )
    return name


def check_text(what: str, *texts: str) -> None:
    """Raises SpecError for what the kernel cannot be given: it takes bytes that end with the first NUL."""
    for text in texts:
        if "\0" in text:
            raise SpecError(f"{what} holds a NUL byte", "remove it")
        try:
            os.fsencode(text)
        except UnicodeEncodeError as e:
            raise SpecError(f"{what} holds what is no character: {text[e.start]!a}", "remove it") from None


def check_workdir(workdir: str) -> None:
    """Raises SpecError for what is no place in an image."""
    check_text("workdir", workdir)
    if not workdir.startswith("/"):
        raise SpecError(f"workdir {workdir!r} is not absolute", "give the path inside the image, from /")


def checked_env(env: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Names and values as text. Raises SpecError for what no environment can hold."""
    for key, given in env.items():
        value = str(given)
        if not key or "=" in key:
            raise SpecError(f"environment variable {key!r} is not usable", "give NAME=VALUE")
        check_text(f"environment variable {key!a}", key, value)
        yield key, value


def _checked_mounts(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    checked: list[Mount] = []
    for mount in mounts:
        target = mount.dst
        check_text("a mount's target", target)
        if not target.startswith("/") or ".." in target.split("/"):
            raise SpecError(f"mount target {target!r} is not an absolute path", "give the path inside the image, from /")
        target = os.path.normpath(f"/{target.lstrip('/')}")
        if target in RESERVED_TARGETS or target.startswith(("/proc/", "/sys/", "/dev/imgrun", "/dev/pts/")):
            raise SpecError(f"mount target {target!r} is imgrun's own", "choose another target")
        if any(target == other.dst for other in checked):
            raise SpecError(f"two mounts have the target {target!r}", "remove one")
        source = mount.src
        check_text(f"the mount at {target!r}", source, str(mount.partition))
        if mount.type == "tmpfs":
            if mount.size == 0:
                raise SpecError(f"the tmpfs at {target!r} has no size", "leave the size out if there is no limit")
            if source:
                raise SpecError(f"the tmpfs at {target!r} has a source", "a tmpfs starts empty: drop src")
        elif not source:
            raise SpecError(f"the {mount.type} mount at {target!r} has no source", "give src=PATH")
        else:
            source = os.path.abspath(os.path.expanduser(source))
        checked.append(mount._replace(dst=target, src=source))
    return tuple(checked)


def parse_bind(text: str) -> Mount:
    """``SRC:DST[:OPTIONS]`` or ``SRC`` (then at the same path); options ``ro``, ``rw``, ``idmap``, comma-separated."""
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise SpecError(f"bind {text!r} is malformed", "give SRC:DST[:ro]; for a path with ':' use --mount")
    destination = parts[1] if len(parts) > 1 else os.path.abspath(parts[0])
    options = set(parts[2].split(",")) if len(parts) > 2 else set()
    if unknown := options - {"ro", "rw", "idmap"}:
        raise SpecError(f"bind {text!r} has an unknown option {min(unknown)!r}", "the options are ro, rw, idmap")
    if {"ro", "rw"} <= options:
        raise SpecError(f"bind {text!r} is both ro and rw", "choose one")
    return Mount("bind", destination, parts[0], ro="ro" in options, idmap="idmap" in options)


def parse_tmpfs(text: str) -> Mount:
    """``DST[:SIZE]``; ``size=SIZE`` is understood as well."""
    target, _, size = text.partition(":")
    size = size.removeprefix("size=")
    return Mount("tmpfs", target, size=parse_size(size, f"size of the tmpfs at {target}") if size else None)


def parse_mount(text: str) -> Mount:
    """``type=bind,src=..,dst=..,ro,idmap``, ``type=tmpfs,dst=..,size=..``, ``type=image,src=..,dst=..``."""
    record: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if key in record:
            raise SpecError(f"mount {text!r} has {key!r} twice", "give it once")
        record[key] = value if equals else True
    return mount_from_dict(record, f"mount {text!r}")


def parse_io_max(text: str) -> IoMax:
    """``DEVICE:rbps=10M,wbps=5M,riops=100,wiops=100``, any of the four."""
    device, colon, rates = text.rpartition(":")
    given: dict[str, int] = {}
    for part in rates.split(","):
        key, equals, value = part.partition("=")
        if not colon or not equals or key not in IoMax._fields[1:]:
            raise SpecError(f"io-max {text!r} is malformed", "give DEVICE:rbps=10M,wbps=5M,riops=100,wiops=100")
        given[key] = parse_size(value, f"io-max {key}")
    return IoMax(device, **given)


ALIASES = {"source": "src", "destination": "dst", "target": "dst", "readonly": "ro"}
ALLOWED = {
    "bind": {"type", "src", "dst", "ro", "idmap"},
    "tmpfs": {"type", "dst", "size"},
    "image": {"type", "src", "dst", "partition"},
}


def mount_from_dict(record: Mapping[str, Any], what: str) -> Mount:
    """One mount from a flag's or a file's keys. Raises SpecError naming ``what``."""
    keys = {ALIASES.get(k, k): v for k, v in record.items()}
    if "name" in keys:
        # What the caller says beside the name counts more.
        keys = {ALIASES.get(k, k): v for k, v in mount_record(str(keys.pop("name"))).items()} | keys
    kind = keys.get("type", "bind")
    if not isinstance(kind, str) or kind not in ALLOWED:
        raise SpecError(f"{what}: unknown type {kind!r}", "the types are bind, tmpfs, image")
    if unknown := set(keys) - ALLOWED[kind]:
        raise SpecError(f"{what}: unknown key {min(unknown)!r}", f"a {kind} mount has {', '.join(sorted(ALLOWED[kind]))}")
    if not isinstance(keys.get("dst"), str):
        raise SpecError(f"{what}: no target", "give dst=PATH")
    if not isinstance(keys.get("src", ""), str):
        raise SpecError(f"{what}: no source", "give src=PATH")
    for flag in ("ro", "idmap"):
        if flag in keys:
            keys[flag] = _flag(keys[flag], f"{what}: {flag}")
    if "size" in keys:
        keys["size"] = _size(keys["size"], f"{what}: size")
    if "partition" in keys:
        keys["partition"] = _partition(keys["partition"], f"{what}: partition")
    return Mount(**{**keys, "type": kind, "ro": keys.get("ro", False) or kind == "image"})


def _flag(value: Any, what: str) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "1", "yes"):
        return True
    if value in ("false", "0", "no"):
        return False
    raise SpecError(f"{what} is {value!r}", "give true or false")
