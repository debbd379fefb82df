"""/etc/imgrun/config.toml: names that an administrator gives to images and mounts.

    [images]
    "ubuntu-22.04" = "/srv/images/ubuntu-22.04.sqfs"

    [mounts.hadoop]
    src = "/opt/hadoop"
    dst = "/opt/hadoop"
    ro = true

A name stands for what is written there and gives no right: the caller opens the image and the source himself.
"""

from __future__ import annotations

import os
from typing import Any

from imgrun.errors import SpecError

PATH = "/etc/imgrun/config.toml"


def _table(name: str) -> dict[str, Any]:
    path = os.environ.get("IMGRUN_CONFIG", PATH)
    try:
        with open(path, "rb") as f:
            import tomllib

            data = tomllib.load(f)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise SpecError(f"cannot read {path}: {e}", "ask your administrator to mend it") from e
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise SpecError(f"{path}: {name} must be a table", f"write [{name}] and the names below")
    return table


def has_image(name: str) -> bool:
    """Whether an administrator gave this name to an image."""
    return "/" not in name and name in _table("images")


def image_path(image: str) -> str:
    """The absolute path of an image given by path or, where no such file is, by name."""
    path = os.path.abspath(os.path.expanduser(image))
    if "/" in image or os.path.lexists(path):
        return path
    named = _table("images").get(image)
    if named is None:
        return path
    if not isinstance(named, str) or not named.startswith("/"):
        raise SpecError(f"the configured image {image!r} is not an absolute path: {named!r}", "ask your administrator")
    return named


def mount_record(name: str) -> dict[str, Any]:
    """The keys of a named mount. Raises SpecError when there is none of this name."""
    mounts = _table("mounts")
    record = mounts.get(name)
    if not isinstance(record, dict):
        known = f"the names are {', '.join(sorted(mounts))}" if mounts else f"no mount has a name in {PATH}"
        raise SpecError(f"no mount is named {name!r}", known)
    return record
