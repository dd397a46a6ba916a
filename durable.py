"""durable.py - files and folders that appear whole or not at all.

A run may be killed at any instruction, a disk may be full, a machine may lose power. Whoever reads
a name must find something complete under it, so everything is written aside, flushed to the disk
(fsync), and only then renamed, which a file system does at once. What is left over from a writer
that was killed is called *.tmp or *.old, is never read, and makes way for the next writer.

    with durable.folder("run/step_000016") as aside:
        (aside / "config.json").write_text("{}")

A write that fails (disk full, no permission) raises OSError and leaves what was there before.
"""

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
