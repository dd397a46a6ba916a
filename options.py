"""options.py - what a command is told: a frozen dataclass, filled from TOML and the command line.

    @dataclass(frozen=True)
    class Config:
        steps: int = key(64, "optimiser steps")       # [train] and [[signal]] are classes, too
        train: Train = section(Train)

    cfg = options.parse(Config, __doc__)              # --config FILE.toml --set train.lr=1e-5 ...

A key that does not exist is an error that names the nearest one that does, a wrong type one that
names file, key and type; `--help` lists all keys with their defaults and meanings.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import tomllib
import types
import typing
from pathlib import Path


def key(default=dataclasses.MISSING, help=""):
    """A config key: its default (none: it must be given) and what it means,
    with the reason for the default.
    """
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def section(kind):
    """A config section: a dataclass of keys, all of which may be left out."""
    return dataclasses.field(default_factory=kind)


def parse(kind, description, argv=None, switches=()):
    """Command line -> the dataclass `kind`: --config FILE.toml, then --set overrides.

    `switches` are keys that can be set by a flag of their own. ValueError names file and key.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys:\n" + "\n".join(_describe(kind)))
    parser.add_argument("--config", metavar="FILE.toml", help="configuration file; keys below")
    parser.add_argument(
        "--set", metavar="section.key=value", nargs="+", action="extend", default=[],
        help="override single keys; a value that is not TOML is taken as text")
    parser.add_argument("--plan", nargs="?", const="8", metavar="8xh100", help="print what the run "
                        "would need on such GPUs (memory, steps, tokens, hours) and exit; "
                        "see plan.py")
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=f"the same as --set {name}=true")
    args = parser.parse_args(argv)
    args.set += [f"{name}=true" for name in switches if getattr(args, name)]
    config = read_config(kind, args.config, args.set)
    if args.plan:
        if int(os.environ.get("RANK", 0)) == 0:
            program = Path(sys.argv[0])
            sys.stdout.flush()
            os.execv(sys.executable, [
                sys.executable, str(program.with_name("plan.py")), program.name,
                "--gpus", args.plan, *(["--config", args.config] if args.config else []),
                *(["--set", *args.set] if args.set else [])])
        sys.exit()
    return config


def one_of(name, value, allowed):
    """ValueError unless a config value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def in_range(name, value, *, above=None, least=None, most=None):
    """ValueError unless a config value is a finite number within bounds."""
    if (not math.isfinite(value) or above is not None and not value > above
            or least is not None and value < least or most is not None and value > most):
        bounds = [f"{word} {bound}" for word, bound in (
            ("above", above), ("at least", least), ("at most", most)) if bound is not None]
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'finite'}, not {value}")


def given_unread(section, unread):
    """Which of the keys `unread` were given a value other than their default, sorted."""
    return sorted(f.name for f in dataclasses.fields(section)
                  if f.name in unread and getattr(section, f.name) != f.default)


def read_config(kind, file=None, overrides=()):
    """TOML file and ["section.key=value", ...] -> an instance of the dataclass `kind`."""
    data = {}
    if file:
        try:
            data = tomllib.loads(Path(file).read_text())
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number too long
            raise ValueError(f"{file}: not TOML: {str(error):.200}") from None
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: expected key=value")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, leaf = path.split(".")
        table = data
        for parent, below in zip(parents, [*parents[1:], leaf], strict=False):
            # a number picks from a list of sections, --set signal.0.steps=16, or adds the next
            if isinstance(table, list) and parent.isdigit() and int(parent) <= len(table):
                table += [{}] * (int(parent) == len(table))
                table = table[int(parent)]
            elif isinstance(table, dict):
                table = table.setdefault(parent, [] if below == "0" else {})
            else:
                raise ValueError(f"--set {override}: there is no section {parent}")
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: {leaf} is not a key of a section")
        table[leaf] = value
    try:
        return _build(kind, data, "", file or "command line")
    except ValueError as error:  # a rule over several keys knows no file
        if file is None or str(file) in str(error):
            raise
        raise ValueError(f"{file}: {error}") from None


def _build(kind, data, prefix, file):
    fields, hints = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    for name in data:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            raise ValueError(f"{file}: unknown key {prefix}{name}; did you mean {prefix}{near[0]}?")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], prefix + name, file)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(
                f"{file}: key {prefix}{name} is missing ({f.metadata.get('help', '')})")
    return kind(**values)


def _value(hint, value, name, file):
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, name + ".", file)
    elif typing.get_origin(hint) is list:
        if isinstance(value, list):
            return [_value(typing.get_args(hint)[0], v, f"{name}[{i}]", file)
                    for i, v in enumerate(value)]
    elif typing.get_origin(hint) is dict:
        if isinstance(value, dict):
            return {k: _value(typing.get_args(hint)[1], v, f"{name}.{k}", file)
                    for k, v in value.items()}
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    expected = ("a section" if dataclasses.is_dataclass(hint)
                else getattr(hint, "__name__", str(hint)))
    raise ValueError(f"{file}: key {name} must be {expected}, not {value!r:.80}")


def _describe(kind, prefix=""):
    for f, hint in zip(dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True):
        if dataclasses.is_dataclass(hint):
            yield from _describe(hint, f"{prefix}{f.name}.")
            continue
        if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            yield from _describe(typing.get_args(hint)[0], f"{prefix}{f.name}[].")
            continue
        default = "required" if f.default is f.default_factory else \
            f.default if f.default is not dataclasses.MISSING else f.default_factory()
        yield (f"  {prefix}{f.name} = {default}\n"
               f"      {f.metadata.get('help', '')}").replace("%", "%%")


def to_toml(config):
    """A config dataclass (or dict) -> TOML text that reads back to it;
    keys that are None are left out.
    """
    data = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    plain, sections = {}, ""
    for name, value in data.items():
        if isinstance(value, dict):
            sections += f"\n[{name}]\n{_toml_lines(value)}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            sections += "".join(f"\n[[{name}]]\n{_toml_lines(item)}" for item in value)
        else:
            plain[name] = value
    return _toml_lines(plain) + sections


def _toml_lines(data):
    return "".join(f"{_toml_key(k)} = {_toml_value(v)}\n" for k, v in data.items()
                   if v is not None)


def _toml_value(value):
    if isinstance(value, dict):  # a table within a section: on one line
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _toml_key(name):
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)
