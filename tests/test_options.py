"""options.py: configs from files and overrides, their mistakes; every shipped config, every key."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import pytest
from conftest import ROOT

import erpd
import evaluate
import options
import sample
import sharpen
import stage1
import stage2
import toy
from options import key, section

COMMANDS = {
    "sample": sample,
    "stage1": stage1,
    "stage2": stage2,
    "evaluate": evaluate,
    "erpd": erpd,
    "rounds": erpd,
    "sharpen": sharpen,
}
TASKS = ("r5", "f5", "f8", "r8")


def kind_of(file):
    """The command a shipped config is for: its name says so."""
    name = file.stem.split("_")[0]
    if file.parent.name == "paper" and name not in COMMANDS:
        return erpd  # a table or a figure
    return toy if name in TASKS else COMMANDS[name]


@dataclass(frozen=True)
class Inner:
    rate: float = key(0.5, "a rate")
    names: list[str] = key([], "names")


@dataclass(frozen=True)
class Outer:
    path: str = key(help="a path")
    count: int = key(3, "how many")
    maybe: str | None = key(None, "perhaps")
    inner: Inner = section(Inner)
    many: list[Inner] = key([], "several")


def write(tmp_path, text):
    file = tmp_path / "x.toml"
    file.write_text(text)
    return file


def test_config_reads_files_and_overrides(tmp_path):
    file = write(
        tmp_path, 'path = "a"\n[inner]\nrate = 1\n[[many]]\nrate = 2.0\n[[many]]\nnames = ["x"]\n'
    )
    c = options.read_config(
        Outer, file, ["count=7", "inner.rate=1e-5", "many.1.rate=3", "path=some/where.txt"]
    )
    assert (c.path, c.count, c.inner.rate, c.many[0].rate, c.many[1].rate, c.many[1].names) == (
        "some/where.txt",
        7,
        1e-5,
        2.0,
        3.0,
        ["x"],
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("path = 'a'\ncuont = 1", "unknown key cuont; did you mean count?"),
        ("path = 'a'\n[inner]\nraet = 1", "unknown key inner.raet; did you mean inner.rate?"),
        ("path = 'a'\ncount = 'x'", "key count must be int, not 'x'"),
        ("path = 'a'\ncount = true", "key count must be int, not True"),
        ("path = 'a'\ncount = 1.5", "key count must be int, not 1.5"),
        ("path = 'a'\ninner = 3", "key inner must be a section"),
        ("path = 'a'\n[inner]\nnames = [1]", r"key inner.names\[0\] must be str"),
        ("count = 1", "key path is missing"),
        ("path = ", "not TOML"),
    ],
)
def test_config_mistakes_name_file_and_key(tmp_path, text, message):
    with pytest.raises(ValueError, match="x.toml.*" + message):
        options.read_config(Outer, write(tmp_path, text))


def test_config_override_mistakes():
    for override, message in {
        "count": "expected key=value",
        "count.x=1": "no section count|not a key",
        "path.x=1": ".",
    }.items():
        with pytest.raises(ValueError, match=message):
            options.read_config(Outer, None, ["path=a", "count=1", override])


def test_overrides_add_sections():
    """One past the last section is a new one; none yet: the first."""
    c = options.read_config(Outer, None, [
        "path=a", "many.0.rate=2.0", 'many.0.names=["x"]', "many.1.rate=3.0"])
    assert c.many == [Inner(2.0, ["x"]), Inner(3.0)]
    with pytest.raises(ValueError, match="no section 2"):
        options.read_config(Outer, None, ["path=a", "many.0.rate=2.0", "many.2.rate=3.0"])


def test_toml_written_reads_back(tmp_path):
    c = Outer(
        path='quo"te\\ / ü',
        inner=Inner(rate=1e-7, names=["a", "b"]),
        many=[Inner(), Inner(rate=2.0)],
    )
    assert options.read_config(Outer, write(tmp_path, options.to_toml(c))) == c
    for module in (*COMMANDS.values(), toy):
        assert tomllib.loads(options.to_toml({"x": {"a b": 1.0, "list": []}})) == {
            "x": {"a b": 1.0, "list": []}
        }, module


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*/**/*.toml")), ids=lambda f: f.stem)
def test_every_shipped_config_parses(file):
    options.read_config(kind_of(file).Config, file)


def test_every_config_key_is_read_by_its_command():
    """A key that is accepted and never used is a silent lie."""

    def names(kind):
        for f in dataclasses.fields(kind):
            yield f.name

    for module in (*COMMANDS.values(), toy):
        source = re.sub(
            r"^\s+\w+: [^\n]*= (key|section)\(.*$", "", open(module.__file__).read(), flags=re.M
        )
        kinds = [
            k
            for k in vars(module).values()
            if dataclasses.is_dataclass(k) and k.__module__ == module.__name__
        ]
        for kind in kinds:
            for name in names(kind):
                assert re.search(rf"(\.{name}\b|\"{name}\")", source), (
                    f"{module.__name__}: {kind.__name__}.{name} is never read"
                )


@pytest.mark.parametrize(
    "script", sorted(COMMANDS.keys() - {"rounds"} | {"toy", "rollouts", "plan"}))
def test_help_lists_every_key(script):
    """Every README command parses, and says what its keys mean."""
    result = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    if script in COMMANDS:
        for f in dataclasses.fields(COMMANDS[script].Config):
            assert f.name in result.stdout
