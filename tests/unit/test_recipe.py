"""Recipes, and what else of an image build can be told without building: mirrors, sizes, names in the cache."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgrun.building import cache, mirror, mkfs
from imgrun.building.base import _apt_error
from imgrun.building.mirror import AptSource
from imgrun.building.recipe import FileEntry, ImageOptions, Recipe, Source, load, parse
from imgrun.building.tools import ToolFailed, Tools
from imgrun.errors import HostError, ImgrunError, SpecError

IMAGES = Path(__file__).parents[2] / "images"
SHORTEST = '[source]\ntype = "debian"\nrelease = "trixie"\n'


def recipe(text: str) -> Recipe:
    return parse(textwrap.dedent(text), "/recipes/mine.toml")


def test_the_shortest_recipe_has_defaults() -> None:
    made = recipe(SHORTEST)
    assert made.name == "mine"
    assert made.source == Source("debian", "trixie", "minbase", ("main",))
    assert made.image == ImageOptions("ext4", None, "none", "", "", True)
    assert (made.packages, made.files, made.remove) == ((), (), ())


def test_every_key_arrives() -> None:
    made = recipe("""
        name = "all"
        description = "d"
        packages = ["g++", "python3:any"]
        [source]
        type = "ubuntu"
        release = "jammy"
        variant = "apt"
        components = ["main", "universe"]
        [image]
        format = "xfs"
        size = "2G"
        table = "gpt"
        label = "root"
        uuid = "6F1C2F0E-1111-4222-8333-444455556666"
        sparse = false
        [files]
        "/etc/motd" = "hello"
        "/etc/rc" = { content = "", mode = "0755" }
        "/etc/localtime" = { link = "/usr/share/zoneinfo/UTC" }
        [setup]
        remove = ["/usr/share/doc/*"]
    """)
    assert made.source == Source("ubuntu", "jammy", "apt", ("main", "universe"))
    assert made.packages == ("g++", "python3:any")
    assert made.image == ImageOptions("xfs", 2 << 30, "gpt", "root", "6f1c2f0e-1111-4222-8333-444455556666", False)
    assert made.files == (
        FileEntry("/etc/motd", "hello", None, 0o644),
        FileEntry("/etc/rc", "", None, 0o755),
        FileEntry("/etc/localtime", None, "/usr/share/zoneinfo/UTC", 0o644),
    )
    assert made.remove == ("/usr/share/doc/*",)


def test_paths_are_beside_the_recipe() -> None:
    assert recipe('source = {type = "tar", path = "a/b.tar.xz"}').source.path == "/recipes/a/b.tar.xz"
    assert recipe('source = {type = "directory", path = "/srv/root"}').source.path == "/srv/root"
    assert recipe('source = {type = "busybox"}').source.path == ""
    fedora = recipe('packages = ["bash"]\nsource = {type = "fedora", release = "42", repos = "repos.d"}')
    assert fedora.source.repos == "/recipes/repos.d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "source.type: is missing"),
        ("source = 1", "source: must be a table"),
        ('[source]\ntype = "debain"', "source.type: 'debain' is not one of debian, ubuntu"),
        ("[source]\ntype = 1", "source.type: must be a string"),
        ('[source]\ntype = "debian"', "source.release: is missing"),
        ('[source]\ntype = "debian"\nrelease = "--help"', "source.release: '--help' is not the name of a release"),
        ('[source]\ntype = "debian"\nrelease = "a b"', "source.release: 'a b'"),
        (SHORTEST + 'variant = "tiny"', "source.variant: 'tiny' is not one of"),
        (SHORTEST + "components = []", "source.components: must not be empty"),
        (SHORTEST + 'components = ["main]"]', "source.components: 'main]'"),
        (SHORTEST + 'path = "x"', "source.path: means nothing for the type debian"),
        (SHORTEST + "colour = 1", "source.colour: unknown key"),
        ('[source]\ntype = "tar"', "source.path: is missing"),
        ('packages = ["a"]\n[source]\ntype = "tar"\npath = "x"', "packages: cannot be installed from"),
        ('[source]\ntype = "fedora"\nrelease = "42"', "packages: must name at least one package"),
        ("packages = 1\n" + SHORTEST, "packages: must be a list of strings"),
        ("packages = [1]\n" + SHORTEST, "packages: must be a list of strings"),
        ('packages = ["-oDebug=1"]\n' + SHORTEST, "packages: '-oDebug=1' is not the name of a package"),
        ('packages = ["?installed"]\n' + SHORTEST, "packages: '?installed'"),
        ('packages = ["a,b"]\n' + SHORTEST, "packages: 'a,b'"),
        ('packages = ["./x.rpm"]\n[source]\ntype = "fedora"\nrelease = "42"', "packages: './x.rpm'"),
        ("imgae = {}\n" + SHORTEST, "imgae: unknown key"),
        ('name = "../x"\n' + SHORTEST, "name: '../x' is not a name"),
        ('name = "a\\u0000"\n' + SHORTEST, "name: must not contain a NUL"),
        (SHORTEST + '[image]\nformat = "zfs"', "image.format: 'zfs' is not one of"),
        (SHORTEST + '[image]\ntable = "bsd"', "image.table: 'bsd' is not one of"),
        (SHORTEST + '[image]\nsize = "big"', "image.size: 'big' is not a size"),
        (SHORTEST + '[image]\nsize = "12"', "image.size: 12 bytes are too few"),
        (SHORTEST + "[image]\nsize = 5", "image.size: must be a string"),
        (SHORTEST + '[image]\nformat = "erofs"\nsize = "1G"', "image.size: a erofs image is as large as its content"),
        (SHORTEST + '[image]\nformat = "squashfs"\nlabel = "x"', "image.label: a squashfs image has none"),
        (SHORTEST + '[image]\nformat = "xfs"\nlabel = "1234567890123"', "image.label: longer than the 12 bytes"),
        (SHORTEST + '[image]\nlabel = "a\\"b"', "image.label: must be printable ASCII"),
        (SHORTEST + '[image]\nuuid = "1"', "image.uuid: '1' is not a UUID"),
        (SHORTEST + '[image]\nsparse = "yes"', "image.sparse: must be true or false"),
        (SHORTEST + '[files]\n"etc/x" = ""', "files.\"etc/x\": 'etc/x' must be an absolute path"),
        (SHORTEST + '[files]\n"/etc/../x" = ""', "must have no '.', '..' or empty part"),
        (SHORTEST + '[files]\n"/" = ""', "must be an absolute path to something below /"),
        (SHORTEST + '[files]\n"/x" = 1', 'files."/x": must be a text, or a table'),
        (SHORTEST + '[files]\n"/x" = {}', 'files."/x": must have either content or link'),
        (SHORTEST + '[files]\n"/x" = {content = "", link = "y"}', 'files."/x": must have either content or link'),
        (SHORTEST + '[files]\n"/x" = {content = "", mode = "rwx"}', "mode: 'rwx' is not an octal mode"),
        (SHORTEST + '[files]\n"/x" = {content = "", owner = 1}', 'files."/x".owner: unknown key'),
        (SHORTEST + '[setup]\nremove = "x"', "setup.remove: must be a list of strings"),
        (SHORTEST + '[setup]\nremove = ["/"]', "setup.remove: '/' must be an absolute path"),
        (SHORTEST + '[setup]\nremove = ["/a//b"]', "must have no '.', '..' or empty part"),
        ("[source", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        recipe(text)
    assert caught.value.message.startswith("/recipes/mine.toml: ")
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_misspelt_word_gets_a_suggestion() -> None:
    with pytest.raises(SpecError) as caught:
        recipe('[source]\ntype = "debain"')
    assert caught.value.hint == "did you mean 'debian'?"


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.sampled_from(["", "auto", "1G", "debian", "tar", "/x", "../x", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Source._fields, *ImageOptions._fields, "content", "link", "/x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*Recipe._fields, "setup", "other"]), TOML_VALUES))
def test_nothing_but_a_spec_error_comes_of_any_document(document: dict[str, object]) -> None:
    def toml(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{quoted(k)} = {toml(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(toml, value)) + "]"
        return quoted(value) if isinstance(value, str) else str(value).lower()

    def quoted(text: str) -> str:
        return '"' + text.replace("\0", "\\u0000") + '"'

    try:
        made = recipe("\n".join(f"{quoted(k)} = {toml(v)}" for k, v in document.items()))
    except SpecError:
        return
    assert made.source.type
    assert not any("\0" in text for text in (made.name, made.source.path, made.source.release, *made.packages))


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_project_are_sound(path: Path) -> None:
    made = load(str(path))
    assert made.name == path.stem
    assert made.description


def test_a_recipe_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    for name, words in (("none", "No such file"), ("binary", "not UTF-8"), ("huge", "too large"), (".", "directory")):
        with pytest.raises(SpecError, match=words):
            load(str(tmp_path / name))


def test_other_image_options_are_checked_as_the_file_s_own() -> None:
    made = recipe(SHORTEST + '[image]\nsize = "1G"\nlabel = "root"')
    assert made.with_image().image == made.image
    assert made.with_image(size="auto", table="mbr").image == made.image._replace(size=None, table="mbr")
    assert made.with_image(format="squashfs").image == ImageOptions("squashfs", None, "none", "")
    with pytest.raises(SpecError, match="as large as its content"):
        made.with_image(format="squashfs", size="1G")
    with pytest.raises(SpecError, match="longer than the 12 bytes"):
        recipe(SHORTEST + '[image]\nlabel = "root-of-trixie"').with_image(format="xfs")
    with pytest.raises(SpecError, match="not one of"):
        made.with_image(format="zfs")


# Where packages come from


def test_the_host_s_own_mirror_serves_other_releases(tmp_path: Path) -> None:
    configured = [
        AptSource("http://apt.example/docker", "bookworm"),  # the first wins, as it does for apt at equal versions
        AptSource("http://site.example/debian/", "bookworm"),
        AptSource("http://site.example/debian/", "bookworm-updates"),
        AptSource("http://site.example/security/", "bookworm-security"),
    ]
    assert mirror.choose(configured[1:], "debian") == {
        "": "http://site.example/debian/",
        "-updates": "http://site.example/debian/",
        "-security": "http://site.example/security/",
    }
    assert mirror.choose(configured[1:], "ubuntu") == {}
    assert mirror.choose([AptSource("cdrom:[x]/", "bookworm")], "debian") == {}
    assert mirror.choose([AptSource("http://x/", "bookworm-security")], "debian") == {}
    os_release = tmp_path / "os-release"
    os_release.write_text('ID="debian"\nVERSION_CODENAME=zurg\n')
    assert mirror.choose([AptSource("http://x/", "zurg")], "debian", str(os_release)) == {"": "http://x/"}
    assert mirror.choose([AptSource("http://x/", "zurg")], "ubuntu", str(os_release)) == {}


def test_the_environment_overrides_the_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keyring = tmp_path / "keys.gpg"
    keyring.touch()
    monkeypatch.setenv("IMGRUN_DEBIAN_KEYRING", str(keyring))
    monkeypatch.setenv("IMGRUN_DEBIAN_MIRROR", "http://u:p@site.example/debian")
    lines = mirror.source_lines(Tools(), "debian", "sid", ["main", "contrib"])
    assert lines == [f"deb [signed-by={keyring}] http://u:p@site.example/debian sid main contrib"]
    assert mirror.without_secrets(lines[0]).endswith("] http://site.example/debian sid main contrib")
    monkeypatch.setenv("IMGRUN_DEBIAN_KEYRING", str(tmp_path / "none.gpg"))
    with pytest.raises(HostError, match=r"the keys of Debian's packages are not here: no .*none\.gpg"):
        mirror.source_lines(Tools(), "debian", "sid", ["main"])


def test_apt_here_is_asked_for_its_sources() -> None:
    tools = Tools()
    try:
        tools.find("apt-get")
    except HostError:
        assert mirror.configured(tools) == []
        return
    sources = mirror.configured(tools)
    assert sources, "apt has none"
    assert all(source.uri and source.suite for source in sources)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("E: Unable to locate package frob", SpecError, "packages: trixie has no package 'frob'"),
        ("E: Package 'frob' has no installation candidate", SpecError, "packages: trixie has no package 'frob'"),
        (
            "E: The repository 'http://m/d trixie Release' does not have a Release file.",
            SpecError,
            "source.release: http://m/d has no release 'trixie'",
        ),
        ("E: The repository 'http://m/d trixie InRelease' is not signed.", HostError, "signed with a key"),
        (
            "E: Failed to fetch http://u:secret@m/d  Could not resolve 'm'",
            HostError,
            "the mirror for trixie cannot be reached: Failed to fetch http://m/d  Could not resolve 'm'",
        ),
        ("I: hm\nE: something else\nE: mmdebstrap failed to run", HostError, "could not make trixie: something else"),
    ],
)
def test_apt_s_words_become_one_line(said: str, kind: type[ImgrunError], words: str) -> None:
    error = _apt_error(recipe(SHORTEST), ToolFailed("mmdebstrap", 25, said.splitlines()))
    assert type(error) is kind
    assert words in error.message
    assert "secret" not in error.message


def test_a_failed_program_is_summed_up() -> None:
    assert ToolFailed("x", 3, []).summary() == "x ended with status 3"
    assert ToolFailed("x", -9, []).summary() == "x was killed by SIGKILL"
    assert ToolFailed("x", 1, ["one", "two"]).summary() == "two"
    assert ToolFailed("x", 1, ["Error:", " Problem: no", "more"]).summary() == "Error: Problem: no more"
    tar = ["tar: This does not look like a tar archive", "tar: Exiting with failure status due to previous errors"]
    assert ToolFailed("tar", 2, tar).summary() == "tar: This does not look like a tar archive"


# Names in the cache, sizes


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGRUN_CACHE", "/c")
    assert cache.directory() == "/c"
    monkeypatch.delenv("IMGRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.directory() == "/x/imgrun"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache.directory() == "/h/.cache/imgrun"


def test_packages_alone_name_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.key(recipe('packages = ["a", "b"]\n' + SHORTEST))
    assert cache.key(recipe('name = "x"\npackages = ["b", "a"]\n' + SHORTEST + '[image]\nformat = "xfs"')) == first
    assert cache.key(recipe('packages = ["a"]\n' + SHORTEST)) != first
    assert cache.key(recipe('packages = ["a", "b"]\n' + SHORTEST.replace("trixie", "sid"))) != first
    text = f'packages = ["a"]\nsource = {{type = "fedora", release = "42", repos = "{tmp_path}"}}'
    (tmp_path / "a.repo").write_text("[a]\n")
    before = cache.key(recipe(text))
    (tmp_path / "a.repo").write_text("[b]\n")
    assert cache.key(recipe(text)) != before
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert cache.key(recipe('packages = ["a", "b"]\n' + SHORTEST)) != first


def test_what_is_cached_is_made_once_and_old_things_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGRUN_CACHE", str(tmp_path / "c"))
    made, said = [], []

    def make(path: str) -> None:
        made.append(path)
        Path(path).write_text(str(len(made)))

    def base(fresh: bool = False) -> tuple[str, bool]:
        return cache.base(recipe(SHORTEST), make, fresh=fresh, fallback=str(tmp_path / "fallback"), progress=said.append)

    first, cached = base()
    assert not cached
    assert base() == (first, True)
    assert Path(first).read_text() == "1"
    old = tmp_path / "c" / "debian-old-1.tar"
    recent = tmp_path / "c" / "debian-recent-1.tar"
    for path, days in ((old, 40), (recent, 3)):
        path.touch()
        when = path.stat().st_mtime - days * 86400
        os.utime(path, (when, when))
    assert base(fresh=True) == (first, False)
    assert Path(first).read_text() == "2"
    assert sorted(os.listdir(tmp_path / "c")) == sorted([os.path.basename(first), recent.name])

    def fail(path: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.base(recipe(SHORTEST), fail, fresh=True, fallback="", progress=said.append)
    assert Path(first).read_text() == "2"
    assert sorted(os.listdir(tmp_path / "c")) == sorted([os.path.basename(first), recent.name])


def test_a_cache_that_others_can_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "c"
    place.mkdir()
    place.chmod(0o777)
    monkeypatch.setenv("IMGRUN_CACHE", str(place))
    said: list[str] = []
    fallback = tmp_path / "fallback"
    result = cache.base(
        recipe(SHORTEST), lambda path: Path(path).touch(), fresh=False, fallback=str(fallback), progress=said.append
    )
    assert result == (str(fallback), False)
    assert fallback.exists()
    assert said == [f"not kept for the next build: {place}: others can write there"]
    assert os.listdir(place) == []


@given(st.sampled_from(["ext4", "ext2", "xfs", "btrfs"]), st.integers(0, 1 << 40), st.integers(1, 1 << 24))
def test_an_automatic_size_has_room(format: str, size: int, inodes: int) -> None:
    found = mkfs.automatic_size(format, mkfs.Content("", size, inodes))
    assert found >= size + inodes * 512 + (128 << 20)
    assert found % 4096 == 0


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "99999999999", "١"])
def test_a_source_date_must_be_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(SpecError, match="SOURCE_DATE_EPOCH"):
        mkfs.source_date()
