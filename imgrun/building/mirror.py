"""Where this machine gets Debian and Ubuntu packages from, as apt itself is configured here. No mirror is built in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from imgrun.building.tools import ToolFailed, Tools
from imgrun.errors import HostError

# Suites by which a configured source is recognised as of one or the other distribution, besides this host's own.
_SUITES = {
    "debian": "buster bullseye bookworm trixie forky duke sid oldoldstable oldstable stable testing unstable".split(),
    "ubuntu": "bionic focal jammy noble oracular plucky questing resolute devel".split(),
}
_KEYRINGS = {
    "debian": ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    "ubuntu": ("/usr/share/keyrings/ubuntu-archive-keyring.gpg", "ubuntu-keyring or ubuntu-archive-keyring"),
}
SECRET = r"(?<=://)[^/@\s]+@"
"""The user and password in a URI."""
_POCKETS = ("", "-updates", "-security")
_UNVERSIONED = ("sid", "unstable", "experimental", "devel")


class AptSource(NamedTuple):
    """One suite of one repository that apt uses here."""

    uri: str
    suite: str


def source_lines(tools: Tools, distribution: str, release: str, components: Iterable[str]) -> list[str]:
    """The lines of a sources.list for ``release``: this machine's own, with another release.

    ``IMGRUN_DEBIAN_MIRROR`` (``IMGRUN_UBUNTU_MIRROR``), the URI of the directory with dists/, overrides; its keyring is
    that of the distribution, or ``IMGRUN_DEBIAN_KEYRING`` (``IMGRUN_UBUNTU_KEYRING``). Empty when this machine has no
    source of the distribution: then mmdebstrap's own choice is the best there is.
    Raises HostError when the keys to check the packages with are missing.
    """
    keyring = _keyring(distribution)
    override = os.environ.get(f"IMGRUN_{distribution.upper()}_MIRROR")
    if override:
        mirrors = {"": override}
    else:
        mirrors = choose(configured(tools), distribution)
    if release in _UNVERSIONED:
        mirrors = {pocket: uri for pocket, uri in mirrors.items() if not pocket}
    return [f"deb [signed-by={keyring}] {uri} {release}{pocket} {' '.join(components)}" for pocket, uri in mirrors.items()]


def configured(tools: Tools) -> list[AptSource]:
    """What apt uses here; nothing where there is no apt."""
    try:
        found = tools.run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
    except (ToolFailed, HostError):
        return []
    pairs = (line.split() for line in found.splitlines())
    return list(dict.fromkeys(AptSource(pair[0], pair[1]) for pair in pairs if len(pair) == 2))


def choose(sources: Iterable[AptSource], distribution: str, os_release: str = "/etc/os-release") -> dict[str, str]:
    """The mirror of each pocket ("", "-updates", "-security") among ``sources``; empty without one for ""."""
    suites = {*_SUITES[distribution], *_own_codename(distribution, os_release)}
    mirrors: dict[str, str] = {}
    for pocket in _POCKETS:
        for source in sources:
            known = source.suite.removesuffix(pocket) in suites and source.suite.endswith(pocket)
            if known and source.uri.startswith(("http://", "https://", "file:", "mirror")):
                mirrors.setdefault(pocket, source.uri)
    return mirrors if "" in mirrors else {}


def without_secrets(line: str) -> str:
    """``line`` without the user and password of a URI in it."""
    return re.sub(SECRET, "", line)


def proxy_environment(tools: Tools) -> dict[str, str]:
    """apt's proxy as environment variables, so that the image does not get it as its configuration."""
    try:
        dump = tools.run(["apt-config", "dump"])
    except (ToolFailed, HostError):
        return {}
    found = re.findall(r'^Acquire::(https?)::Proxy "([^"]+)";$', dump, re.MULTILINE | re.IGNORECASE)
    return {f"{scheme.lower()}_proxy": uri for scheme, uri in found if uri != "DIRECT"}


def _own_codename(distribution: str, os_release: str) -> list[str]:
    try:
        with open(os_release, encoding="utf-8") as file:
            words = dict(line.strip().split("=", 1) for line in file if "=" in line)
    except OSError:
        return []
    own = words.get("ID", "").strip('"') == distribution
    return [words["VERSION_CODENAME"].strip('"')] if own and words.get("VERSION_CODENAME") else []


def _keyring(distribution: str) -> str:
    path, package = _KEYRINGS[distribution]
    name = f"IMGRUN_{distribution.upper()}_KEYRING"
    path = os.environ.get(name) or path
    if not os.path.isfile(path) or " " in path or "]" in path:
        raise HostError(
            f"the keys of {distribution.title()}'s packages are not here: no {path}",
            f"install the package {package}, or set {name}",
        )
    return path
