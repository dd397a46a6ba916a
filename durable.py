"""durable.py - files and folders that appear whole or not at all.

A run may be killed at any instruction, a disk may be full, a machine may lose power. Whoever reads
a name must find something complete under it, so everything is written aside, flushed to the disk
(fsync), and only then renamed, which a file system does at once. What is left over from a writer
that was killed is called *.tmp or *.old, is never read, and makes way for the next writer.

    with durable.folder("run/step_000016") as aside:
        (aside / "config.json").write_text("{}")

A write that fails (disk full, no permission) raises OSError and leaves what was there before.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file


def write_text(path, text):
    """A text file, whole or not at all; folders above it are made."""
    with _file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """A safetensors file of {name: tensor}, whole or not at all; folders above it are made."""
    with _file(path) as aside:
        try:
            save_file(tensors, aside, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written: {error}") from None


@contextmanager
def reading(file, remedy="delete it to have it made again"):
    """Around the reading of a file that we wrote ourselves: whatever turns out to be wrong with it
    becomes one ValueError that names it. `require` says what must hold.
    """
    try:
        yield
    except IsADirectoryError:
        raise ValueError(f"{file}: is a folder, where a file should be") from None
    except Wrong as error:
        raise ValueError(f"{file}: {error}; {remedy}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError,
            OverflowError, RuntimeError, SafetensorError) as error:
        text = str(error)
        if not text.startswith(f"{file}: "):
            text = f"{file}: damaged ({type(error).__name__}: {text:.120})"
        raise ValueError(f"{text}; {remedy}") from None


class Wrong(ValueError):
    """A complaint that does not know its file yet."""


def require(condition, complaint):
    if not condition:
        raise Wrong(complaint)


def number(value, low=float("-inf"), high=float("inf")):
    """Whether a value read from a file is a finite number in [low, high]; true and false are none.
    """
    return type(value) in (int, float) and low <= value <= high and abs(value) < float("inf")


def read_object(file, **kinds):
    """A JSON object of our own that must have the given keys, each of its kind."""
    with reading(file):
        data = json.loads(Path(file).read_text(encoding="utf-8"))
        require(isinstance(data, dict), "not a JSON object")
        for key, kind in kinds.items():
            require(isinstance(data.get(key), kind), f"{key} must be a {kind.__name__}")
    return data


def read_lines(file, numbers=(), **kinds):
    """The JSON objects of a file of lines, [] where there is none; half a line at the end counts
    for nothing. The given keys must be there, of their kinds; those of `numbers` may be.
    """
    rows = []
    for place, row in whole_lines(file):
        with reading(place):
            require(isinstance(row, dict), "not a JSON object")
            for key, kind in kinds.items():
                require(type(row.get(key)) in (kind if isinstance(kind, tuple) else (kind,)),
                        f"{key} is {row.get(key)!r:.40}")
            for key in numbers:
                require(row.get(key) is None or number(row[key]), f"{key} is {row.get(key)!r:.40}")
        rows.append(row)
    return rows


def whole_lines(file):
    """(place, JSON value) of each whole line of a file, none where there is no file."""
    if not Path(file).exists():
        return
    with reading(file):
        lines = Path(file).read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if line:
            with reading(f"{file}, line {number}"):
                value = json.loads(line.decode("utf-8"))
            yield f"{file}, line {number}", value


@contextmanager
def folder(path):
    """A folder to fill, which then takes its place at `path`; if filling fails it is removed."""
    aside = clear(path)
    try:
        yield aside
        publish(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def clear(path):
    """An empty folder beside `path`, to be filled (perhaps by several processes) and published."""
    aside = Path(path).with_name(Path(path).name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def publish(aside, path):
    """Put folder `aside` in the place of `path`, all of it on the disk before its name is."""
    path, old = Path(path), Path(path).with_name(Path(path).name + ".old")
    for file in aside.rglob("*"):
        _sync(file)
    _sync(aside)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(aside, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _file(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
