"""Recipes: what ``imgrun image build`` makes an image from.

A recipe is a TOML file. Only ``source.type`` is required; unknown keys are refused.

    name = "debian-trixie"             default: the file's name without its suffix
    description = "..."
    packages = ["procps"]              for the types debian, ubuntu and fedora

    [source]
    type = "debian"                    debian, ubuntu, fedora, directory, tar or busybox
    release = "trixie"                 debian, ubuntu, fedora: a code name, or a releasever of dnf
    variant = "minbase"                debian, ubuntu: as mmdebstrap's --variant
    components = ["main"]              debian, ubuntu
    repos = "repos.d"                  fedora: a directory of .repo files instead of this host's
    path = "rootfs.tar.xz"             directory, tar, and the program for busybox; relative to the recipe

    [image]
    format = "ext4"                    ext4, ext3, ext2, xfs, btrfs, squashfs or erofs
    size = "auto"                      or "2G": of the file system; "auto" leaves room to grow
    table = "none"                     none, gpt or mbr: bare file system, or a disk with one partition
    label = "root"                     of the file system, and of the partition on gpt
    uuid = "..."                       instead of a random one
    sparse = true                      false: every block of the image file has its place on the disk

    [files]                            what to add: a text, or a table of content or link, and mode
    "/etc/motd" = "hello\\n"
    "/etc/rc.local" = { content = "#!/bin/sh\\n", mode = "0755" }
    "/etc/localtime" = { link = "/usr/share/zoneinfo/UTC" }

    [setup]
    remove = ["/usr/share/doc/*"]      shell patterns

With a uuid, and with SOURCE_DATE_EPOCH in the environment, the same content gives the same squashfs or erofs image to the
byte. The other formats record when they were made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from imgrun.errors import SpecError
from imgrun.units import parse_size

SOURCE_TYPES = ("debian", "ubuntu", "fedora", "directory", "tar", "busybox")
FORMATS = ("ext4", "ext3", "ext2", "xfs", "btrfs", "squashfs", "erofs")
TABLES = ("none", "gpt", "mbr")
VARIANTS = ("extract", "custom", "essential", "apt", "minbase", "required", "buildd", "important", "standard")

_PACKAGED = ("debian", "ubuntu", "fedora")
_APT = ("debian", "ubuntu")
_COMPRESSED = ("squashfs", "erofs")
_LABEL_BYTES = {"ext4": 16, "ext3": 16, "ext2": 16, "xfs": 12, "btrfs": 255}
_RECIPE_BYTES = 1 << 20
_SMALLEST = 1 << 20


class Source(NamedTuple):
    """Where the content comes from. Empty strings and tuples where the type has no such key."""

    type: str
    release: str = ""
    variant: str = ""
    components: tuple[str, ...] = ()
    repos: str = ""
    path: str = ""


class ImageOptions(NamedTuple):
    """The form of the image. ``size`` in bytes, of the file system; None means as the content needs."""

    format: str = "ext4"
    size: int | None = None
    table: str = "none"
    label: str = ""
    uuid: str = ""
    sparse: bool = True


class FileEntry(NamedTuple):
    """A file or symbolic link to put into the image, owned by root. Exactly one of content and link is set."""

    path: str
    content: str | None
    link: str | None
    mode: int


class Recipe(NamedTuple):
    """A checked recipe. ``origin`` is the file it was read from, for messages."""

    origin: str
    name: str
    description: str
    source: Source
    packages: tuple[str, ...]
    image: ImageOptions
    files: tuple[FileEntry, ...]
    remove: tuple[str, ...]

    def with_image(self, *, format: str = "", size: str = "", table: str = "") -> Recipe:
        """This recipe with other image options, as the recipe would say them; empty ones stay. Raises SpecError.

        A format without a size or label of its own drops the recipe's.
        """
        image = self.image
        if format in _COMPRESSED and format != image.format:
            image = image._replace(size=None, label="")
        image = image._replace(format=format or image.format, table=table or image.table)
        if size:
            image = image._replace(size=None if size == "auto" else parse_size(size, "size"))
        _check_image(_Table(self.origin, "image", {}), image)
        return self._replace(image=image)


def load(path: str) -> Recipe:
    """Read and check the recipe file ``path``. Raises SpecError, with one line for the first mistake found."""
    try:
        with open(path, "rb") as file:
            data = file.read(_RECIPE_BYTES + 1)
    except OSError as error:
        raise SpecError(
            f"{path}: the recipe cannot be read: {error.strerror}", "name a recipe file, as those in images/"
        ) from None
    if len(data) > _RECIPE_BYTES:
        raise SpecError(f"{path}: too large for a recipe", "name a recipe file, as those in images/")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a recipe: not UTF-8 text", "name a recipe file, as those in images/") from None
    return parse(text, path)


def parse(text: str, origin: str) -> Recipe:
    """Check the recipe ``text``; relative paths in it are beside ``origin``. Raises SpecError."""
    import tomllib

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{origin}: not valid TOML: {error}") from None
    top = _Table(origin, "", document)
    stem = os.path.basename(origin).removesuffix(".toml")
    name = top.string("name", stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise top.wrong("name", f"{name!r} is not a name of letters, digits, '.', '_' and '-'")
    source = _source(top.table("source"))
    recipe = Recipe(
        origin=origin,
        name=name,
        description=top.string("description", ""),
        source=source,
        packages=_packages(top, source),
        image=_image(top.table("image")),
        files=_files(top.table("files")),
        remove=_setup(top.table("setup")),
    )
    top.done()
    return recipe


class _Table:
    """One table of the document: typed access to its keys, and the words for what is wrong with them."""

    def __init__(self, origin: str, name: str, values: Mapping[str, object]) -> None:
        self.origin = origin
        self.name = name
        self.values = dict(values)

    def wrong(self, key: str, what: str, hint: str | None = None) -> SpecError:
        where = f"{self.name}.{key}" if self.name and key else self.name or key
        return SpecError(f"{self.origin}: {where}: {what}", hint)

    def _take(self, key: str, kind: type, words: str, default: object) -> Any:
        value = self.values.pop(key, default)
        if value is not default and type(value) is not kind:
            raise self.wrong(key, f"must be {words}")
        return value

    def string(self, key: str, default: str) -> str:
        text: str = self._take(key, str, "a string", default)
        if "\0" in text:
            raise self.wrong(key, "must not contain a NUL character")
        return text

    def required(self, key: str) -> str:
        text = self.string(key, "")
        if not text:
            raise self.wrong(key, "is missing")
        return text

    def boolean(self, key: str, default: bool) -> bool:
        return cast(bool, self._take(key, bool, "true or false", default))

    def strings(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        values = self._take(key, list, "a list of strings", default)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "must be a list of strings")
        return tuple(values)

    def table(self, key: str) -> _Table:
        return _Table(self.origin, key, self._take(key, dict, "a table", {}))

    def choice(self, key: str, choices: Sequence[str], default: str = "") -> str:
        value = self.string(key, default) if default else self.required(key)
        if value not in choices:
            raise self.wrong(key, f"{value!r} is not one of {', '.join(choices)}", _suggestion(value, choices))
        return value

    def done(self, known: Sequence[str] = ()) -> None:
        """Refuse what nobody has asked for."""
        for key in self.values:
            raise self.wrong(key, "unknown key", _suggestion(key, known))


def _suggestion(word: str, choices: Iterable[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(word, list(choices), 1)
    return f"did you mean {close[0]!r}?" if close else None


def _source(table: _Table) -> Source:
    kind = table.choice("type", SOURCE_TYPES)
    source = Source(kind)
    if kind in _PACKAGED:
        release = table.required("release")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", release):
            raise table.wrong("release", f"{release!r} is not the name of a release")
        source = source._replace(release=release)
    if kind in _APT:
        components = table.strings("components", ("main",))
        for component in components:
            if not re.fullmatch(r"[a-z0-9][a-z0-9/-]*", component):
                raise table.wrong("components", f"{component!r} is not the name of a component")
        if not components:
            raise table.wrong("components", "must not be empty")
        source = source._replace(variant=table.choice("variant", VARIANTS, "minbase"), components=components)
    if kind == "fedora":
        source = source._replace(repos=_beside(table.origin, table.string("repos", "")))
    if kind in ("directory", "tar"):
        source = source._replace(path=_beside(table.origin, table.required("path")))
    if kind == "busybox":
        source = source._replace(path=_beside(table.origin, table.string("path", "")))
    keys = {"type", *(name for name, value in source._asdict().items() if value)}
    for key in table.values:
        if key in Source._fields and key not in keys:
            raise table.wrong(key, f"means nothing for the type {kind}")
    table.done(Source._fields)
    return source


def _beside(origin: str, path: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(origin)), path) if path else ""


def _packages(top: _Table, source: Source) -> tuple[str, ...]:
    packages = top.strings("packages")
    if packages and source.type not in _PACKAGED:
        raise top.wrong("packages", f"cannot be installed from the source type {source.type}")
    if not packages and source.type == "fedora":
        raise top.wrong("packages", "must name at least one package", "for instance bash, coreutils, dnf")
    # apt and dnf give words that begin with other characters a meaning of their own: options, patterns, files.
    pattern = r"[a-z0-9][a-z0-9+.:~=/-]*" if source.type in _APT else r"@?[A-Za-z0-9][A-Za-z0-9+._:~ -]*"
    for package in packages:
        if not re.fullmatch(pattern, package):
            raise top.wrong("packages", f"{package!r} is not the name of a package")
    return packages


def _image(table: _Table) -> ImageOptions:
    size = table.string("size", "auto")
    size_bytes = None if size == "auto" else parse_size(size, f"{table.origin}: image.size")
    image = ImageOptions(
        format=table.choice("format", FORMATS, "ext4"),
        size=size_bytes,
        table=table.choice("table", TABLES, "none"),
        label=table.string("label", ""),
        uuid=table.string("uuid", "").lower(),
        sparse=table.boolean("sparse", True),
    )
    table.done(ImageOptions._fields)
    _check_image(table, image)
    return image


def _check_image(table: _Table, image: ImageOptions) -> None:
    """Refuse options that contradict each other."""
    if image.format not in FORMATS:
        raise table.wrong("format", f"{image.format!r} is not one of {', '.join(FORMATS)}")
    if image.table not in TABLES:
        raise table.wrong("table", f"{image.table!r} is not one of {', '.join(TABLES)}")
    if image.format in _COMPRESSED and image.size is not None:
        raise table.wrong("size", f"a {image.format} image is as large as its content", 'leave it out, or say "auto"')
    if image.size is not None and image.size < _SMALLEST:
        raise table.wrong("size", f"{image.size} bytes are too few", 'say "auto", or a size such as 2G')
    if image.label:
        limit = _LABEL_BYTES.get(image.format)
        if limit is None:
            raise table.wrong("label", f"a {image.format} image has none", "leave it out, or choose another format")
        if not image.label.isascii() or not image.label.isprintable() or any(c in "/\"'\\, " for c in image.label):
            raise table.wrong("label", "must be printable ASCII without blanks, commas, quotes and slashes")
        if len(image.label) > limit:
            raise table.wrong("label", f"longer than the {limit} bytes that {image.format} has room for")
    if image.uuid and not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", image.uuid):
        raise table.wrong("uuid", f"{image.uuid!r} is not a UUID")


def _files(table: _Table) -> tuple[FileEntry, ...]:
    entries = []
    for path, value in table.values.items():
        key = f'"{path}"'
        _check_path(table, key, path)
        if isinstance(value, str):
            entries.append(FileEntry(path, value, None, 0o644))
        elif isinstance(value, dict):
            entries.append(_file_entry(_Table(table.origin, f"files.{key}", value), path))
        else:
            raise table.wrong(key, "must be a text, or a table of content or link, and mode")
    return tuple(entries)


def _file_entry(table: _Table, path: str) -> FileEntry:
    content = table.string("content", "") if "content" in table.values else None
    link = table.required("link") if "link" in table.values else None
    if (content is None) == (link is None):
        raise table.wrong("", "must have either content or link")
    mode = table.string("mode", "0644")
    if not re.fullmatch(r"0?[0-7]{3,4}", mode):
        raise table.wrong("mode", f"{mode!r} is not an octal mode such as 0755")
    table.done(("content", "link", "mode"))
    return FileEntry(path, content, link, int(mode, 8))


def _setup(table: _Table) -> tuple[str, ...]:
    remove = table.strings("remove")
    for pattern in remove:
        _check_path(table, "remove", pattern)
    table.done(("remove",))
    return remove


def _check_path(table: _Table, key: str, path: str) -> None:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise table.wrong(key, f"{path!r} must be an absolute path to something below /")
    if any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise table.wrong(key, f"{path!r} must have no '.', '..' or empty part")
