"""The spec as a TOML file: the same keys as JobSpec, limits in a table of their own, mounts as a list of tables."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import fields
from typing import Any

from imgrun.config import has_image
from imgrun.errors import SpecError
from imgrun.isolation.cgroups.limits import IoMax
from imgrun.isolation.limits import parse_rlimit
from imgrun.spec import LIMIT_KEYS, JobSpec, mount_from_dict
from imgrun.units import parse_size

TEXT = ("image", "name", "hostname", "user", "workdir", "root", "userns", "init", "network", "seccomp", "cpuset", "oom",
        "checkpoint_dir")  # fmt: skip


def load(path: str) -> dict[str, Any]:
    """The fields of a spec file. Paths in it are relative to the file. Raises SpecError naming file and key."""
    try:
        with open(path, "rb") as f:
            data = tomllib.load(f)
    except OSError as e:
        raise SpecError(f"cannot read the spec file {path}: {e.strerror}", "check the path") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} is not valid TOML: {e}", "mend it at the place named") from e
    return from_table(data, path)


def from_table(data: dict[str, Any], path: str) -> dict[str, Any]:
    """Check the parsed table and flatten it into JobSpec's fields."""
    known = {f.name for f in fields(JobSpec)}
    top = known - {*LIMIT_KEYS, "oom"} | {"limits"}
    _refuse_unknown(data, top, path, "")
    given = {key: value for key, value in data.items() if key not in ("limits", "mounts", "env")}
    limits = _table(data, "limits", path)
    _refuse_unknown(limits, {*LIMIT_KEYS, "oom"}, path, "limits.")
    given.update(limits)
    for key in TEXT:
        if key in given and not isinstance(given[key], str):
            raise SpecError(f"{path}: {key} must be text", f'write {key} = "..."')
    command = given.get("command")
    if command is not None:
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise SpecError(f"{path}: command must be a list of words", 'write command = ["./analyse", "data.csv"]')
        given["command"] = tuple(command)
    for key in ("tty",):
        if key in given and not isinstance(given[key], bool):
            raise SpecError(f"{path}: {key} must be true or false", f"write {key} = true")
    for key in ("stop_signal", "checkpoint_signal"):
        if key in given:
            from imgrun.signals import parse_signal

            names = given[key]
            several = isinstance(names, list) and key == "checkpoint_signal"
            given[key] = tuple(parse_signal(str(name)) for name in names) if several else parse_signal(str(names))
    if "checkpoint_dir" in given:
        given["checkpoint_dir"] = _beside(path, given["checkpoint_dir"])
    if "image" in given:
        # A name of the configuration stays a name; paths are relative to the file.
        beside = _beside(path, given["image"])
        given["image"] = given["image"] if not os.path.lexists(beside) and has_image(given["image"]) else beside
    env = _table(data, "env", path)
    for key, value in env.items():
        if isinstance(value, (dict, list)):
            raise SpecError(f"{path}: env.{key} must be text", f'write {key} = "..."')
    if env:
        given["env"] = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in env.items()}
    if "mounts" in data:
        given["mounts"] = tuple(_mounts(data["mounts"], path))
    if "io_max" in given:
        given["io_max"] = tuple(_io_max(entry, path) for entry in _list_of_tables(given["io_max"], path, "limits.io_max"))
    if "rlimits" in given:
        table = _table(given, "rlimits", path)
        given["rlimits"] = tuple(parse_rlimit(f"{k}={v}", f"{path}: limits.rlimits") for k, v in table.items())
    return given


def _mounts(entries: Any, path: str) -> Any:
    for number, entry in enumerate(_list_of_tables(entries, path, "mounts"), 1):
        mount = mount_from_dict(entry, f"{path}: mount {number}")
        yield mount._replace(src=_beside(path, mount.src)) if mount.src else mount


def _io_max(entry: dict[str, Any], path: str) -> IoMax:
    _refuse_unknown(entry, set(IoMax._fields), path, "limits.io_max.")
    if not isinstance(entry.get("device"), str):
        raise SpecError(f"{path}: limits.io_max has no device", 'write device = "/dev/sda"')
    rates = {k: parse_size(str(v), f"{path}: limits.io_max.{k}") for k, v in entry.items() if k != "device"}
    return IoMax(entry["device"], **rates)


def _refuse_unknown(table: dict[str, Any], known: set[str], path: str, prefix: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(sorted(known))}"
            if not prefix and key in LIMIT_KEYS:
                hint = f"it belongs in the table [limits]: {key} = ..."
            raise SpecError(f"{path}: unknown key {prefix}{key}", hint)


def _table(data: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise SpecError(f"{path}: {key} must be a table", f"write [{key}] and its keys below")
    return table


def _list_of_tables(entries: Any, path: str, key: str) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SpecError(f"{path}: {key} must be a list of tables", f"write [[{key}]] and its keys below")
    return entries


def _beside(path: str, other: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(path)), os.path.expanduser(other))
