"""From words on the command line to a spec, and how the command refuses what it does not understand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from command import COMMAND, Done, Imgrun, refused, text
from hypothesis import given
from hypothesis import strategies as st

from imgrun import cli
from imgrun.cli import COMMANDS, command_words
from imgrun.cli.start import parse_environment, spec_from_flags, start
from imgrun.errors import SpecError
from imgrun.spec import JobSpec, Mount


def parse(*words: str) -> JobSpec:
    """What ``start`` makes of its words."""
    flags: dict[str, Any] = start.make_context("start", list(words)).params
    flags["command"] = command_words(flags["command"])
    return spec_from_flags(flags)


@pytest.fixture
def run(state_dir: Path) -> Imgrun:
    return Imgrun(None)


def test_every_flag() -> None:
    assert parse(
        *"--name n --hostname h -u user -w /w -e A=1 --env B=2=3 --read-only --partition 2 --scratch-size 8M -v /s:/d:ro"
        " --tmpfs /t:1M --mount type=image,src=/i2,dst=/e -m 1G --swap 0 --cpus 1.5 --cpu-weight 5 --cpuset 0 --pids 9"
        " --io-weight 3 --io-max /dev/sda:rbps=1M --time-limit 1h --rlimit nofile=5 --rlimit core=0 --userns off --init none"
        " --network none --seccomp default -t --stop-signal INT --stop-timeout 3s /i.img -- cmd -x --name y".split()
    ) == JobSpec(
        image="/i.img", command=("cmd", "-x", "--name", "y"), name="n", hostname="h", user="user", workdir="/w",
        env={"A": "1", "B": "2=3"}, root="read-only", partition="2", scratch_size="8M",  # type: ignore[arg-type]
        mounts=(Mount("bind", "/d", "/s", ro=True), Mount("tmpfs", "/t", size=1 << 20), Mount("image", "/e", "/i2", ro=True)),
        memory="1G", swap=0, cpus=1.5, cpu_weight=5, cpuset="0", pids=9, io_weight=3,  # type: ignore[arg-type]
        io_max=(cli_io_max(),), time_limit="1h",  # type: ignore[arg-type]
        rlimits=("nofile=5", "core=0"), userns="off", init="none", network="none", seccomp="default",  # type: ignore[arg-type]
        tty=True, stop_signal=2, stop_timeout=3.0,
    )  # fmt: skip


def cli_io_max() -> Any:
    from imgrun.spec import parse_io_max

    return parse_io_max("/dev/sda:rbps=1M")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("/i", "cmd"), ("cmd",)),
        (("/i", "--", "cmd"), ("cmd",)),
        (("--", "/i", "cmd"), ("cmd",)),
        (("/i", "cmd", "--"), ("cmd", "--")),
        (("/i", "cmd", "--name", "x"), ("cmd", "--name", "x")),
        (("/i", "--", "--", "x"), ("--", "x")),
        (("/i", "--", "-x"), ("-x",)),
        (("/i", "cmd", ""), ("cmd", "")),
    ],
)
def test_where_the_command_begins(words: tuple[str, ...], command: tuple[str, ...]) -> None:
    assert parse(*words).command == command


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=10)


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_the_words_of_the_command_are_passed_as_they_are(words: list[str]) -> None:
    assert parse("/i", "--", *words).command == tuple(words)


@pytest.mark.parametrize(
    "words",
    [
        (), ("/i",), ("/i", "--"), ("--writable", "--read-only", "/i", "c"), ("-m", "x", "/i", "c"), ("-v", "", "/i", "c"),
        ("-v", "/s:/d", "--tmpfs", "/d", "/i", "c"), ("--stop-signal", "X", "/i", "c"), ("-e", "=x", "/i", "c"),
        ("--writable", "--scratch-size", "1G", "/i", "c"), ("--init", "image", "/i", "c"), ("--env-file", "/nope", "/i", "c"),
    ],
)  # fmt: skip
def test_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        parse(*words)
    assert caught.value.hint


@pytest.mark.parametrize("words", [("--cpus", "x", "/i", "c"), ("--nope", "/i", "c"), ("--userns", "on", "/i", "c"), ("-m",)])
def test_refused_by_click(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parse(*words)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "mine")
    monkeypatch.delenv("UNSET", raising=False)
    path = tmp_path / "env"
    path.write_text("# a comment\n\n  A=from file\nB=x=y \nSET=file\n  \n")
    assert parse_environment((), (str(path),)) == {"A": "from file", "B": "x=y ", "SET": "file"}
    assert parse_environment(("SET", "UNSET", "A=", "C=1"), (str(path),)) == {"A": "", "B": "x=y ", "SET": "mine", "C": "1"}
    path.write_text("A=1\nno equals\n")
    with pytest.raises(SpecError, match="line 2"):
        parse_environment((), (str(path),))
    path.write_bytes(b"\xff=1")
    with pytest.raises(SpecError, match="cannot read"):
        parse_environment((), (str(path),))


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        """
        image = "i.img"
        command = ["file"]
        env = {A = "1", B = "2"}
        tty = true
        [limits]
        memory = "1G"
        rlimits = {core = 0}
        [[mounts]]
        src = "/one"
        dst = "/d"
        [[mounts]]
        src = "/two"
        dst = "/e"
        """
    )
    spec = parse("--spec", str(path))
    assert (spec.image, spec.command, spec.memory) == (str(tmp_path / "i.img"), ("file",), 1 << 30)
    spec = parse("--spec", str(path), "-m", "2G", "-e", "B=3", "-v", "/three:/d", "--rlimit", "nofile=5", "cmd", "arg")
    assert (spec.command, spec.memory, spec.tty) == (("cmd", "arg"), 2 << 30, True)
    assert spec.env == {"A": "1", "B": "3"}
    assert [(m.dst, m.src) for m in spec.mounts] == [("/e", "/two"), ("/d", "/three")]
    assert [limit.name for limit in spec.rlimits] == ["core", "nofile"]
    path.write_text("command = ['file']")
    assert parse("--spec", str(path), "/other.img").image == "/other.img"


# -- the real command --------------------------------------------------------------------------------------------------


def test_help_of_everything(run: Imgrun) -> None:
    for words in ((), *((name,) for name in COMMANDS)):
        done = run(*words, "--help")
        assert done.status == 0, done
        assert done.stdout.startswith("Usage: imgrun")
        assert done.stderr == ""
    assert run("-h").status == 0


def test_version(run: Imgrun) -> None:
    from imgrun import __version__

    done = run("--version")
    assert (done.status, done.stdout, done.stderr) == (0, f"imgrun {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ("nope",), ("--nope",), ("start", "--nope"), ("start",), ("start", "/i"), ("start", "--cpus", "x", "/i", "c"),
        ("inspect",), ("inspect", "x"), ("logs", "x"), ("wait", "x"), ("wait", "--timeout", "soon", "x"), ("rm",),
        ("rm", "x"), ("stop", "x"), ("signal", "x"), ("signal", "x", "TERM"), ("exec", "x"), ("exec", "x", "true"),
        ("gc", "--older-than", "x"), ("start", "--result", "/nope/r.json", "/i", "c"), ("start", "/nope.img", "c"),
        ("start", "-d", "--timings", "/i", "c"), ("start", "--spec", "/nope.toml"),
        ("start", "--rlimit", "nofile=x", "/i", "c"), ("start", "-d", "--json", "/i", "c"),
        ("start", "-e", "", "/i", "c"), ("start", "--result", "", "/i", "c"), ("start", "--slurm", "--htcondor", "/i", "c"),
        ("start", "--checkpoint-signal", "USR1", "/i", "c"), ("start", "--checkpoint-exit-code", "256", "/i", "c"),
        ("start", "--checkpoint-dir", "/etc/passwd", "/i", "c"), ("start", "--checkpoint-dir", "/proc/x/y", "/i", "c"),
        ("start", "--checkpoint-dir", "/etc", "/i", "c"), ("restore", "-d", "--result", "x", "/nope"),
        ("restore", "/nope"), ("check", "/nope"), ("check", "x"), ("checkpoint", "x"), ("checkpoint", "--to", "/x", "x"),
        ("stats", "x"), ("update", "x"), ("update", "--memory", "1G", "x"), ("submit", "--to", "slurm", "--spec", "/nope"),
        ("submit", "--to", "pbs", "--spec", "/nope"), ("image", "inspect", "/nope"), ("image", "build", "/nope", "/x"),
    ],
)  # fmt: skip
def test_every_error_is_a_line_and_a_hint(run: Imgrun, words: tuple[str, ...]) -> None:
    refused(run(*words), 125)


@pytest.mark.parametrize("words", [(), ("image",)])
def test_no_words_are_a_question(run: Imgrun, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.status, done.stdout) == (125, "")
    assert done.stderr == run(*words, "--help").stdout


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("start", "--memory"), "imgrun start"), (("start", "--nope"), "imgrun start"), (("--nope",), "imgrun"),
        (("image", "build", "--size"), "imgrun image"), (("image", "build", "--nope"), "imgrun image build"),
        (("submit", "--spec", "x"), "imgrun submit"), (("strat",), "imgrun"),
    ],
)  # fmt: skip
def test_it_says_whose_help_to_read(run: Imgrun, words: tuple[str, ...], where: str) -> None:
    done = run(*words)
    refused(done, 125)
    assert done.stderr.splitlines()[1].startswith(f"  see '{where}")
    assert "\\n" not in done.stderr


def test_a_command_that_is_misspelt(run: Imgrun) -> None:
    refused(run("strat"), 125, "'strat'", "'start'")


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("ps",), ("ps", "--json"), ("start", "--help")])
def test_output_that_cannot_be_written(run: Imgrun, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full, env={"PYTHONUNBUFFERED": ""})
    refused(done, 125, "standard output", "No space left on device")


def test_errors_that_cannot_be_written(run: Imgrun) -> None:
    with open("/dev/full", "w") as full:
        assert run("wait", "nope", stderr=full).status == 125


def test_a_reader_that_has_gone(run: Imgrun) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("ps", stdout=write, env={"PYTHONUNBUFFERED": ""})
    os.close(write)
    assert (done.status, done.stderr) == (141, "")


def test_a_working_directory_that_has_gone(run: Imgrun, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    words = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *COMMAND, "start", "some.img", "true"]
    process = subprocess.run(words, cwd=here, capture_output=True, check=False, env={**os.environ, "PYTHONSAFEPATH": "1"})
    refused(Done(process.returncode, text(process.stdout), text(process.stderr)), 125, "working directory")


def test_an_interrupt_while_it_imports_is_no_traceback() -> None:
    for imported in ("click", "imgrun.errors"):
        hook = f"""
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {imported!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
import imgrun.cli
"""
        done = subprocess.run([sys.executable, "-c", hook], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (130, b""), imported


INTERRUPTED = """
import sys
import imgrun.cli
from imgrun.errors import HostError
class Interrupting:  # as a signal does while an enum is made, of which Python makes a RuntimeError
    def __set_name__(self, owner, name):
        raise KeyboardInterrupt
def in_a_class():
    type("Some", (), {"name": Interrupting()})
def in_order():
    try:
        raise KeyboardInterrupt
    finally:
        raise HostError("this was left", "remove it")
def reported(_error):
    raise KeyboardInterrupt
def failing():
    imgrun.cli.report = reported
    raise HostError("x", "y")
imgrun.cli.import_module = lambda name: globals()[sys.argv[1]]()
imgrun.cli.main(["ps"])
"""


@pytest.mark.parametrize(
    ("where", "said"), [("in_a_class", ""), ("in_order", "imgrun: this was left\n  remove it\n"), ("failing", "")]
)
def test_what_an_interrupt_makes_fail_is_interrupted(where: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, where], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, said)


def test_what_is_printed_obeys_no_terminal(run: Imgrun, state_dir: Path) -> None:
    """A job whose image and command have unprintable characters: a line in the list, whatever the locale."""
    from imgrun.state import StateRoot

    spec = JobSpec(image="/nope/a\n\x1b[31m\udcff", command=("echo", "\udcff\n#", "é"))
    job = StateRoot(str(state_dir)).create(spec.to_dict(), keep=True)
    for locale in ("C", "C.UTF-8", "POSIX"):
        done = run("ps", "--all", env={"LC_ALL": locale})
        assert done.status == 0, done
        assert done.stdout.splitlines()[1:] == [done.stdout.splitlines()[-1]], done
        assert r"a\n\x1b[31m\udcff  echo \udcff\n# é" in done.stdout
    job.remove()
    job.release(ended=True)


def test_the_lazy_table_is_complete() -> None:
    context = click.Context(cli.cli)
    for name, (module, _) in COMMANDS.items():
        command = cli.cli.get_command(context, name)
        assert command is not None, f"{module} has no {name}"
        assert command.name == name
    assert cli.cli.get_command(context, "nope") is None
