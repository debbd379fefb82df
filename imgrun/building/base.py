"""What an image holds before the recipe's own touches: packages of a distribution, a directory, a tar, or busybox.

The slow ones (packages) make a tar, which ``imgrun.building.cache`` keeps; the others fill a directory.
"""

from __future__ import annotations

import os
import re

from imgrun.building import mirror
from imgrun.building.recipe import Recipe
from imgrun.building.tools import ToolFailed, Tools, no_space
from imgrun.errors import HostError, ImgrunError, PrivilegeError, SpecError

_MMDEBSTRAP_STEPS = {
    "I: running apt-get update": "reading the package lists",
    "I: downloading packages": "downloading packages",
    "I: extracting archives": "extracting the essential packages",
    "I: installing essential": "installing the essential packages",
    "I: installing remaining": "installing the other packages",
    "I: creating tarball": "packing",
}
_UNREACHABLE = re.compile(
    r"Could not (?:resolve|connect)|Temporary failure|Unable to connect|Connection (?:failed|refused|timed out)"
    r"|Network is unreachable|Failed to fetch|Could not wait for server"
)
_DEVICE_REFUSED = re.compile(
    r": Cannot mknod: Operation not permitted$|: cannot create special file .*: Operation not permitted$"
    r"|: Exiting with failure status due to previous errors$"
)
# Devices for the scripts of packages; the rest of the host's /dev is not theirs. "$0" is the root.
_WITH_DEVICES = """
mkdir -p "$0/proc" "$0/dev" && mount -t proc proc "$0/proc" && mount -t tmpfs -o mode=755 dev "$0/dev" || exit
for name in null zero full random urandom; do
    : >"$0/dev/$name" && mount --bind "/dev/$name" "$0/dev/$name" || exit
done
exec "$@"
"""


def make_tar(recipe: Recipe, tools: Tools, tar: str, scratch: str) -> None:
    """Install the recipe's packages and pack them into the file ``tar``; ``scratch`` is an empty directory."""
    if recipe.source.type == "fedora":
        _dnf(recipe, tools, tar, scratch)
    else:
        _mmdebstrap(recipe, tools, tar)


def fill(recipe: Recipe, tools: Tools, tree: str) -> None:
    """Copy what the source names into the empty directory ``tree``."""
    fillers = {"directory": _directory, "tar": _tar, "busybox": _busybox}
    fillers[recipe.source.type](recipe, tools, tree)


def unpack(tools: Tools, tar: str, tree: str) -> None:
    """Unpack a tar, compressed or not, into ``tree``, without its device nodes. Raises ToolFailed."""
    command = [
        "tar", "--extract", "--numeric-owner", "--same-owner", "--same-permissions", "--delay-directory-restore",
        "--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability", "--anchored",
        "--exclude=./dev/*", "--exclude=dev/*", "--force-local", f"--directory={tree}", f"--file={tar}",
    ]  # fmt: skip
    _run_without_devices(tools, command)


def _run_without_devices(tools: Tools, command: list[str]) -> None:
    """Run tar or cp; that an ordinary user cannot make device nodes is no failure, since none are wanted."""
    try:
        tools.run(command, as_owner=True)
    except ToolFailed as error:
        if tools.root or not error.complete or not all(_DEVICE_REFUSED.search(line) for line in error.lines):
            raise


def _mmdebstrap(recipe: Recipe, tools: Tools, tar: str) -> None:
    source = recipe.source
    tools.find("mmdebstrap")
    lines = mirror.source_lines(tools, source.type, source.release, source.components)
    for line in lines:
        tools.progress(f"from {mirror.without_secrets(line.split('] ')[1])}")
    command = [
        *tools.confined(), "mmdebstrap", f"--mode={'root' if tools.root else 'unshare'}", "--format=tar",
        f"--variant={source.variant}", f"--components={','.join(source.components)}",
        *([f"--include={','.join(recipe.packages)}"] if recipe.packages else []), source.release, tar, *lines,
    ]  # fmt: skip
    steps = _MMDEBSTRAP_STEPS.items()
    try:
        tools.run(
            command,
            env={**mirror.proxy_environment(tools), "DEBIAN_FRONTEND": "noninteractive"},
            interesting=lambda line: next((words for start, words in steps if line.startswith(start)), None),
        )
    except ToolFailed as error:
        raise no_space(error, tools.temporary, os.path.dirname(tar)) or _apt_error(recipe, error) from None


def _apt_error(recipe: Recipe, error: ToolFailed) -> ImgrunError:
    """What apt's words mean for the recipe."""
    text = mirror.without_secrets("\n".join(error.lines))
    release = recipe.source.release
    variable = f"IMGRUN_{recipe.source.type.upper()}_MIRROR"
    if found := re.search(r"Unable to locate package (\S+)|Package '?(\S+?)'? has no installation candidate", text):
        return SpecError(f"{recipe.origin}: packages: {release} has no package {found[1] or found[2]!r}")
    if found := re.search(r"The repository '(\S+) (\S+) Release' does not have a Release file", text):
        return SpecError(
            f"{recipe.origin}: source.release: {found[1]} has no release {found[2]!r}",
            f"check the name, or set {variable} to a mirror that has it",
        )
    if "NO_PUBKEY" in text or "is not signed" in text:
        return HostError(
            f"the packages of {release} are signed with a key this host does not know",
            f"update its keyring package, or set IMGRUN_{recipe.source.type.upper()}_KEYRING",
        )
    if found := _UNREACHABLE.search(text):
        line = next(line for line in text.splitlines() if found[0] in line).strip().removeprefix("E: ")
        return HostError(f"the mirror for {release} cannot be reached: {line[:200]}", f"check the network, or set {variable}")
    return HostError(f"mmdebstrap could not make {release}: {error.summary()}", "--debug shows all it said")


def _dnf(recipe: Recipe, tools: Tools, tar: str, scratch: str) -> None:
    if not tools.root:
        raise PrivilegeError("dnf installs into a directory only as root", "run the build as root")
    tools.find("dnf")
    source = recipe.source
    if source.repos and not os.path.isdir(source.repos):
        raise SpecError(f"{recipe.origin}: source.repos: {source.repos} is not a directory")
    version = tools.run(["dnf", "--version"])
    tree = os.path.join(scratch, "dnf")
    os.mkdir(tree, 0o755)
    command = [
        *tools.confined(), "sh", "-c", _WITH_DEVICES, tree,
        "dnf", "--assumeyes", f"--installroot={tree}", f"--releasever={source.release}",
        "--setopt=install_weak_deps=False", "--setopt=tsflags=nodocs", "--setopt=keepcache=False",
        "--setopt=skip_if_unavailable=False",
        *(["--use-host-config"] if version.startswith("dnf5") else []),
        *([f"--setopt=reposdir={source.repos}"] if source.repos else []),
        "install", *recipe.packages,
    ]  # fmt: skip
    tools.progress(f"installing {len(recipe.packages)} packages and what they need")
    try:
        tools.run(command)
        for path in ("var/cache/dnf", "var/cache/libdnf5", "var/lib/dnf", "var/log"):
            tools.remove_tree(os.path.join(tree, path))
        tools.progress("packing")
        pack = [
            "tar", "--create", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*", "--sort=name",
            "--one-file-system", "--force-local", f"--directory={tree}", f"--file={tar}", ".",
        ]  # fmt: skip
        tools.run(pack)
        tools.remove_tree(tree)
    except ToolFailed as error:
        raise no_space(error, scratch, os.path.dirname(tar)) or _dnf_error(recipe, error) from None


def _dnf_error(recipe: Recipe, error: ToolFailed) -> ImgrunError:
    text = "\n".join(error.lines)
    if re.search(r"Failed to download metadata|Cannot download|Curl error", text):
        return HostError(f"dnf's repositories cannot be reached: {error.summary()}", "check the network")
    if found := re.search(r"(?:No match for argument|Unable to find a match): *(\S+)", text):
        return SpecError(
            f"{recipe.origin}: packages: {recipe.source.release} has no package {found[1]!r}",
            "check its name, and the repositories that dnf has here",
        )
    if "no enabled repositories" in text or "Unable to detect release version" in text:
        return HostError(
            "dnf has no repositories on this host", "name a directory of .repo files as source.repos in the recipe"
        )
    return HostError(f"dnf could not make release {recipe.source.release}: {error.summary()}", "--debug shows all it said")


def _directory(recipe: Recipe, tools: Tools, tree: str) -> None:
    path = recipe.source.path
    if not os.path.isdir(path):
        raise SpecError(f"{recipe.origin}: source.path: {path} is not a directory")
    if os.path.realpath(tree).startswith(os.path.join(os.path.realpath(path), "")):
        raise SpecError(
            f"{recipe.origin}: source.path: {path} holds the place of temporary files",
            "set TMPDIR to a directory elsewhere",
        )
    tools.progress(f"copying {path}")
    try:
        command = ["cp", "--archive", "--one-file-system", "--reflink=auto", "--", os.path.join(path, "."), tree]
        _run_without_devices(tools, command)
    except ToolFailed as error:
        raise no_space(error, tree) or SpecError(
            f"{recipe.origin}: source.path: {path} cannot be copied: {error.summary()}"
        ) from None


def _tar(recipe: Recipe, tools: Tools, tree: str) -> None:
    path = recipe.source.path
    if not os.path.isfile(path):
        raise SpecError(f"{recipe.origin}: source.path: {path} is not a file")
    tools.progress(f"unpacking {path}")
    try:
        unpack(tools, path, tree)
    except ToolFailed as error:
        raise no_space(error, tree) or SpecError(
            f"{recipe.origin}: source.path: {path} cannot be unpacked: {error.summary()}"
        ) from None


def _busybox(recipe: Recipe, tools: Tools, tree: str) -> None:
    path = recipe.source.path or tools.find("busybox")
    tools.progress(f"from {path}")
    target = os.path.join(tree, "bin", "busybox")
    os.mkdir(os.path.dirname(target), 0o755)
    try:
        tools.run(["cp", "--", path, target])
        os.chmod(target, 0o755)
        tools.run(["chroot", tree, "/bin/busybox", "true"], as_owner=True)
        applets = tools.run([path, "--list-full"]).split()
    except ToolFailed as error:
        raise no_space(error, tree) or HostError(
            f"{path} cannot be used: {error.summary()}", "it must be a static busybox: install busybox-static"
        ) from None
    for applet in applets:
        link = os.path.normpath(os.path.join(tree, applet.lstrip("/")))
        os.makedirs(os.path.dirname(link), 0o755, exist_ok=True)
        if link.startswith(os.path.join(tree, "")) and not os.path.lexists(link):
            os.symlink("/bin/busybox", link)
