"""Bad input: every file that is read, against everything that goes wrong with files. Each case must
end in one clear message with file and place (a ValueError or OSError, which commands turn into one
line and exit status 2), and must leave outputs as they were. Then the readers under fuzzing, and
what must never happen with files of strangers: no code is run, no name in them becomes a path.

FUZZ=2000 pytest tests/test_inputs.py -k fuzz tries that many random examples of each kind (else a
few that never change)."""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, command, write_batch, write_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import erpd
import evaluate
import hf
import model as models
import options
import rollouts
import runtime
import sample
import stage1
import stage2

DEEP = "[" * 200_000 + "]" * 200_000
SHARD = "shard-00000.safetensors"


def case(name, *values):
    """A row of a table."""
    return pytest.param(*values, id=name)


class Hangs(BaseException):
    """It took too long."""


@contextlib.contextmanager
def within(seconds):
    def ring(*_):
        raise Hangs(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def refused(*words, seconds=20):
    """One line of bounded length that holds each of `words` (patterns), soon."""
    with within(seconds), pytest.raises((ValueError, OSError)) as caught:
        yield
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), f"{word!r} is not in: {text[:500]}"
    assert "\n" not in text.strip(), text[:500]
    assert len(text) < 2000, f"{len(text)} characters: {text[:200]}"


def snapshot(folder):
    """{relative name: bytes} of all files below a folder; None for folders. A .lock is empty and
    says nothing."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob("*"))
        if p.name != ".lock"
    }


@contextlib.contextmanager
def untouched(folder, but=()):
    """What lies in a folder is afterwards as it was; files named in `but` may have changed."""
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    changed = {n for n in {*before, *after} if before.get(n, 0) != after.get(n, 0)}
    assert changed - set(but) == set()


@pytest.fixture
def output(tmp_path):
    """An output folder that holds something."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "keep.txt").write_text("what was here before")
    return folder


@pytest.fixture
def copied(tmp_path, policy):
    """A copy of the policy, to be damaged."""
    return Path(shutil.copytree(policy, tmp_path / "copied"))


@pytest.fixture
def copied_batch(tmp_path, batch):
    """A copy of the batch without columns, to be damaged."""
    folder = tmp_path / "batch"
    folder.mkdir()
    shutil.copyfile(batch / SHARD, folder / SHARD)
    return folder


PROMPTS = [{"problem": "1+2=", "answer": "3"}, {"problem": "9-4=", "answer": "5"}]
TRAIN = ("steps=1", "train.prompts_per_step=4", "train.max_tokens=128", "train.recompute=false")


def jsonl(file, *rows):
    """Rows as lines: dicts, or text or bytes as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
             for r in rows]  # fmt: skip
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def place(file, content):
    """Put bytes, a folder or nothing where a file should be."""
    if file.is_file():
        file.unlink()
    if content is dir:
        file.mkdir(parents=True)
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def sampling(policy, prompts, output, *more):
    return (f"policy={policy}", f"prompts={prompts}", f"output={output}", "n=2",
            "max_new_tokens=4", "lenient=true", *more)  # fmt: skip


def evaluating(policy, prompts, output, *more):
    return (f"base={policy}", f"prompts={prompts}", f"output={output}", "max_new_tokens=4",
            'sampling=[{name="T=1",n=2}]', "pass_at=[1]", "plot=false", *more)  # fmt: skip


def training(policy, batch, output, *more):
    return (f"policy={policy}", f"batch={batch}", f"output={output}", *TRAIN, *more)


def distilling(policy, batch, output, *more):
    return (f"policy={policy}", f"batch={batch}", f"output={output}", *TRAIN[1:],
            'signal=[{numerator="old",denominator="none",steps=1}]', *more)  # fmt: skip


# ---------------------------------------------------------------- prompts, of both commands

A, B = (json.dumps(row) for row in PROMPTS)
UTF16 = (A + "\n").encode("utf-16")
BAD_JSON_LINES = {  # bytes of line 2
    "truncated": A[:20],
    "not UTF-8": b'{"problem": "\xff\xfe", "answer": "1"}',
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "deeply nested": '{"problem": "1=", "answer": "1", "x": ' + DEEP + "}",
    "huge line": "x" * 3_000_000,
    "huge number": '{"problem": "1=", "answer": ' + "9" * 5000 + "}",
    "zero bytes": b"\0" * 100,
    "two objects": A + A,
}
HUGE_ID = "i" * 100_000

BAD_FILES = [
    case("missing", None, "cannot be read: No such file"),
    case("a directory", dir, "cannot be read: Is a directory"),
    case("empty", b"", "no prompts"),
    case("blank", b"\n\n  \n", "no prompts"),
    case("UTF-16", UTF16, "line 1: "),
    *(case(f"line: {name}", A.encode() + b"\n" + (x if isinstance(x, bytes) else x.encode()),
           "line 2: not a JSON object") for name, x in BAD_JSON_LINES.items()),
]  # fmt: skip

BAD_PROMPTS = [
    case("no problem", {"answer": "1"}, "'problem' is missing .*line 3"),
    case("no answer", {"problem": "1="}, "'answer' is missing .*line 3"),
    case("same id", {"id": "0", **PROMPTS[0]}, "line 3: id '0' stands already at .*line 1"),
    case("same id as a number", {"id": 0, **PROMPTS[0]}, "line 3: id '0' stands already"),
    case("id null", {"id": None, **PROMPTS[0]}, "line 3"),
    case("id an object", {"id": {"a": 1}, **PROMPTS[0]}, "line 3"),
    case("problem null", {"problem": None, "answer": "1"}, "line 3"),
    case("problem a number", {"problem": 5, "answer": "1"}, "line 3"),
    case("problem a list", {"problem": ["1"], "answer": "1"}, "line 3"),
    case("problem empty", {"problem": "", "answer": "1"}, "line 3"),
    case("problem half a surrogate", '{"problem": "\\ud800", "answer": "1"}', "line 3"),
    case("answer null", {"problem": "1=", "answer": None}, "line 3"),
    case("answer a list", {"problem": "1=", "answer": ["1"]}, "line 3"),
    case("answer an object", {"problem": "1=", "answer": {}}, "line 3"),
    case("answer empty", {"problem": "1=", "answer": ""}, "line 3"),
    case("messages empty", {"messages": [], "answer": "1"}, "line 3"),
    case("messages text", {"messages": "1=", "answer": "1"}, "line 3"),
    case("messages an object", {"messages": {"role": "user"}, "answer": "1"}, "line 3"),
    case("messages of text", {"messages": ["1="], "answer": "1"}, "line 3"),
    case("messages null", {"messages": None, "answer": "1"}, "line 3"),
    case("message without content", {"messages": [{"role": "user"}], "answer": "1"}, "line 3"),
    case("content a number", {"messages": [{"role": "user", "content": 5}], "answer": "1"},
         "line 3"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", BAD_FILES)
@pytest.mark.parametrize("which", ["sample", "evaluate"])
def test_prompts_files(run, tmp_path, policy, output, which, content, words):
    """Of both commands that read prompts."""
    file = place(tmp_path / "p.jsonl", content)
    arguments = (sampling if which == "sample" else evaluating)(policy, file, output)
    with untouched(output), refused(r"p\.jsonl.*" + words):
        run({"sample": sample, "evaluate": evaluate}[which], *arguments)


@pytest.mark.parametrize("row, words", BAD_PROMPTS)
@pytest.mark.parametrize("which", ["sample", "evaluate"])
def test_prompts_rows(run, tmp_path, policy, output, which, row, words):
    """A prompt that is not what it should be must not become the text 'None'."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS, row)
    arguments = (sampling if which == "sample" else evaluating)(policy, file, output)
    with untouched(output), refused(r"p\.jsonl.*" + words):
        run({"sample": sample, "evaluate": evaluate}[which], *arguments)


@pytest.mark.parametrize("name", ["problem", "answer"])
def test_prompts_fields_of_another_name(run, tmp_path, policy, output, name):
    """The file's own names are given by the config."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(r"p\.jsonl: field 'solution' is missing \(.*line 1\)"):
        run(sample, *sampling(policy, file, output, f"{name}=solution"))


def test_same_huge_id(run, tmp_path, policy, output):
    """A message stays readable whatever the file holds."""
    rows = [{"id": HUGE_ID, **row} for row in PROMPTS]
    with untouched(output), refused(r"p\.jsonl, line 2: id"):
        run(sample, *sampling(policy, jsonl(tmp_path / "p.jsonl", *rows), output))


def test_too_few_prompts(run, tmp_path, policy, output):
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(r"p\.jsonl: num_prompts = 3, but the file has 2"):
        run(sample, *sampling(policy, file, output, "num_prompts=3"))


@pytest.mark.parametrize("which", ["sample", "evaluate"])
def test_prompts_longer_than_the_model(run, tmp_path, policy, output, which):
    """The policy has 512 positions; a prompt of 600 tokens is far from anything it was trained on,
    and a pasted book would ask for a cache of its length."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS, {"problem": "1+" * 300, "answer": "1"})
    arguments = (sampling if which == "sample" else evaluating)(policy, file, output)
    with untouched(output), refused(r"p\.jsonl.*line 3"):
        run({"sample": sample, "evaluate": evaluate}[which], *arguments)


@pytest.mark.parametrize("success", [
    case("text", '"x"'), case("null", "null"), case("a list", "[0.5]"), case("NaN", "NaN"),
    case("infinite", "Infinity"), case("above 1", "1.5"), case("negative", "-0.25"),
])  # fmt: skip
def test_prompts_success(run, tmp_path, policy, output, success):
    """A probability; it enters the least KL."""
    rows = [f'{{"problem": "{p}", "answer": "1", "success": {s}}}'
            for p, s in (("1=", 0.5), ("2=", success))]  # fmt: skip
    file = jsonl(tmp_path / "p.jsonl", *rows)
    with untouched(output), refused(r"p\.jsonl.*line 2.*success"):
        run(evaluate, *evaluating(policy, file, output))


# ---------------------------------------------------------------- shards of a batch


def edit_shard(file, *, metadata=None, **columns):
    """Rewrite a shard with other columns (None: left out) and header entries (None: left out)."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["header"])
    tensors = {n: t for n, t in {**tensors, **columns}.items() if t is not None}
    if not isinstance(metadata, str):
        header |= metadata or {}
        metadata = json.dumps({k: v for k, v in header.items() if v is not None})
    save_file(tensors, file, metadata={"header": metadata})
    return file


def safetensors(header, data=b"", length=None):
    """The bytes of a safetensors file from its header (text, bytes or data)."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BYTES16 = b"\0" * 16
HOSTILE = {  # safetensors files that no library should open, and why
    "empty": b"",
    "7 bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header of 2^63 bytes": safetensors("{}", length=2**63),
    "header of 2^64-1 bytes": safetensors("{}", length=2**64 - 1),
    "header of 1 TB": safetensors("{}", length=2**40),
    "header of 99 MB that is not there": safetensors("{}", length=99_000_000),
    "header of text": safetensors("hello"),
    "header a list": safetensors("[]"),
    "header not UTF-8": safetensors(b'{"\xff": 1}'),
    "header deeply nested": safetensors(DEEP),
    "an entry of text": safetensors({"a": "x"}, BYTES16),
    "an entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [4]}}, BYTES16),
    "unknown dtype": safetensors({"a": entry(dtype="F99")}, BYTES16),
    "offsets beyond the file": safetensors({"a": entry(offsets=(0, 1 << 40))}, BYTES16),
    "offsets beyond, shape to match": safetensors(
        {"a": entry(shape=(1 << 38,), offsets=(0, 1 << 40))}, BYTES16
    ),
    "offsets reversed": safetensors({"a": entry(offsets=(16, 0))}, BYTES16),
    "offsets negative": safetensors({"a": entry(offsets=(-16, 0))}, BYTES16),
    "offsets not numbers": safetensors({"a": entry(offsets=("0", "16"))}, BYTES16),
    "one offset": safetensors({"a": entry(offsets=(0,))}, BYTES16),
    "overlapping": safetensors({"a": entry(), "b": entry()}, BYTES16),
    "overlapping in part": safetensors({"a": entry(), "b": entry(offsets=(8, 24))}, BYTES16 * 2),
    "a hole": safetensors({"a": entry(), "b": entry(offsets=(32, 48))}, BYTES16 * 3),
    "data left over": safetensors({"a": entry()}, BYTES16 * 2),
    "shape negative": safetensors({"a": entry(shape=(-4,))}, BYTES16),
    "shape negative twice": safetensors({"a": entry(shape=(-2, -2))}, BYTES16),
    "shape of 2^62": safetensors({"a": entry(shape=(2**62,))}, BYTES16),
    "shape that wraps to 4": safetensors({"a": entry(shape=(2**62, 4, 4))}, BYTES16),
    "shape that wraps to 0": safetensors({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "shape not numbers": safetensors({"a": entry(shape=("4",))}, BYTES16),
    "shape of fractions": safetensors({"a": entry(shape=(4.5,))}, BYTES16),
    "shape smaller than data": safetensors({"a": entry(shape=(3,))}, BYTES16),
    "metadata not text": safetensors({"__metadata__": {"header": 5}, "a": entry()}, BYTES16),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94.",
    "a zip, as torch.save makes": b"PK\x03\x04" + b"\0" * 60,
}


def no_response(columns):
    """Row 1 ends where its prompt does."""
    length = columns["prompt_length"].clone()
    length[1] = int(columns["cu_seqlens"].diff()[1])
    return {"prompt_length": length}


def put(name, index, value):
    def change(columns):
        columns[name] = columns[name].clone()
        columns[name][index] = value
        return {name: columns[name]}

    return change


def nothing(columns):
    """No sequences at all."""
    empty = {name: column[:0].clone() for name, column in columns.items()}
    return {**empty, "cu_seqlens": torch.zeros(1, dtype=torch.long)}


COLUMN_CASES = [
    *(case(f"{name} left out", lambda c, name=name: {name: None}, f"column {name} is missing")
      for name in rollouts.COLUMNS),
    *(case(f"{name} of another dtype", lambda c, name=name: {name: c[name].to(torch.float64)},
           f"column {name} must be") for name in rollouts.COLUMNS),
    *(case(f"{name} of two dimensions", lambda c, name=name: {name: c[name][None].clone()},
           f"column {name} must be") for name in rollouts.COLUMNS),
    *(case(f"{name} too short", lambda c, name=name: {name: c[name][:-1].clone()}, "column|cu_seq")
      for name in rollouts.COLUMNS),
    *(case(f"{name} empty", lambda c, name=name: {name: c[name][:0].clone()}, "column|cu_seqlens")
      for name in rollouts.COLUMNS),
    case("no sequences", nothing, "no rollouts|no sequences|empty"),
    case("empty response", no_response, ", row 1: the response is empty"),
    case("empty prompt", put("prompt_length", 2, 0), ", row 2: the prompt is empty"),
    case("negative prompt length", put("prompt_length", 2, -1), ", row 2: the prompt is empty"),
    case("reward above 1", put("reward", 3, 1.25), r", row 3: the reward lies outside \[0, 1\]"),
    case("reward below 0", put("reward", 3, -1.0), r", row 3: the reward lies outside \[0, 1\]"),
    case("reward infinite", put("reward", 3, torch.inf), r", row 3: the reward lies outside"),
    case("log-prob NaN", put("sampler_logp", 0, torch.nan), ", row 0: a sampler log-prob"),
    case("log-prob infinite", put("sampler_logp", -1, torch.inf), ", row 31: a sampler log-prob"),
    case("token negative", put("tokens", 0, -1), ", row 0: a token id is negative"),
    case("token outside the vocabulary", put("tokens", 0, 32), "token 32, the vocab.*has 32"),
    case("token of 2^31", put("tokens", -1, 2**31 - 1), "token 2147483647"),
    case("boundaries fall", put("cu_seqlens", 1, 10**6), ", row 1: "),
    case("boundaries fall far", put("cu_seqlens", 1, -(2**62)), ", row 0: "),
    case("boundaries overflow", put("cu_seqlens", 1, -(2**63)), ", row "),
    case("prompt index negative", put("prompt", 0, -7), ", row 0"),
]  # fmt: skip

HEADER_CASES = [
    case("header not JSON", "{", "not a rollout shard"),
    case("header empty", "", "not a rollout shard"),
    case("header a list", "[]", "not a rollout shard|must"),
    case("header null", "null", "not a rollout shard|must"),
    case("header a number", "5", "not a rollout shard|must"),
    case("header deeply nested", DEEP, "not a rollout shard"),
    case("format of the future", {"format": 2}, "batch format 2, this code reads 1"),
    case("format left out", {"format": None}, "batch format None"),
    *(case(f"{key} left out", {key: None}, key)
      for key in ("policy", "fingerprint", "temperature", "source")),
    *(case(f"temperature {value}", {"temperature": value}, "temperature")
      for value in ("hot", 0, -1.0, float("inf"), [1], True)),
    case("temperature nan", {"temperature": float("nan")}, "temperature"),
    *(case(f"policy {value!r}", {"policy": value}, "policy") for value in (5, ["a"], "")),
    case("fingerprint of another policy", {"fingerprint": "f" * 16}, "not the policy that sampled"),
    *(case(f"shards {value!r}", {"shards": value}, "shards") for value in (0, 2, "x", 10**9)),
]  # fmt: skip


def refuse_batch(run, policy, batch, output, *words):
    """Both stages refuse, and keep no checkpoint."""
    for module, arguments in ((stage1, training), (stage2, distilling)):
        with refused(*words):
            run(module, *arguments(policy, batch, output))
    assert not list(output.glob("step_*"))


@pytest.mark.parametrize("change, words", COLUMN_CASES)
def test_shard_columns(run, policy, copied_batch, output, change, words):
    """What is wrong in a shard would otherwise be a wrong gradient."""
    file = copied_batch / SHARD
    edit_shard(file, **change(load_file(file)))
    refuse_batch(run, policy, copied_batch, output, words)


@pytest.mark.parametrize("metadata, words", HEADER_CASES)
def test_shard_headers(run, policy, copied_batch, output, metadata, words):
    """The header says what the batch is: everything read of it is checked, by the shard's name."""
    edit_shard(copied_batch / SHARD, metadata=metadata)
    refuse_batch(run, policy, copied_batch, output, "batch", words)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_shard_bytes(run, policy, copied_batch, output, content):
    (copied_batch / SHARD).write_bytes(content)
    with untouched(output):
        refuse_batch(run, policy, copied_batch, output, SHARD)


def test_shard_cut_anywhere(copied_batch):
    """A copy that broke off, at any length."""
    data = (copied_batch / SHARD).read_bytes()
    for keep in [*range(0, len(data), max(1, len(data) // 200)), len(data) - 1]:
        (copied_batch / SHARD).write_bytes(data[:keep])
        with refused(SHARD):
            rollouts.load(copied_batch)




@pytest.mark.parametrize("name", [SHARD, "shard-00001.safetensors"])
def test_shard_is_a_directory(copied_batch, name):
    place(copied_batch / name, dir)
    with refused(name):
        rollouts.load(copied_batch)


def test_batch_is_missing_or_a_file(run, tmp_path, policy, output):
    file = place(tmp_path / "file", b"x")
    for path in (tmp_path / "nowhere", file, file / "below"):
        with untouched(output), refused(f"{path}: no rollout shards"):
            run(stage1, *training(policy, path, output))


@pytest.mark.parametrize("key, value", [
    ("policy", "elsewhere"), ("fingerprint", "f" * 16), ("temperature", 0.5), ("source", "sample"),
])  # fmt: skip
def test_two_policies_in_one_batch(run, policy, copied_batch, output, key, value):
    """Rollouts of two policies have no common pi_old."""
    second = copied_batch / "shard-00001.safetensors"
    shutil.copyfile(copied_batch / SHARD, second)
    edit_shard(second, metadata={key: value})
    with untouched(output), refused(f"shard-00001.*{key} is {value!r}, but .* in {SHARD}"):
        run(stage1, *training(policy, copied_batch, output))


def test_two_policies_of_long_names(policy, copied_batch):
    second = copied_batch / "shard-00001.safetensors"
    shutil.copyfile(copied_batch / SHARD, second)
    edit_shard(second, metadata={"policy": "p" * 100_000})
    with refused("shard-00001.*policy is "):
        rollouts.load(copied_batch)


@pytest.mark.parametrize("change, words", [
    case("tokens outside the vocabulary", put("tokens", 0, 32), "token 32"),
    case("no reward decided", lambda c: {"reward": torch.full_like(c["reward"], torch.nan)},
         "no row is left to train on"),
])  # fmt: skip
def test_a_refused_batch_leaves_no_run(run, policy, copied_batch, output, change, words):
    """A folder that began a run it cannot do stands in the way of nothing, but is not untouched."""
    file = copied_batch / SHARD
    edit_shard(file, **change(load_file(file)))
    with untouched(output), refused(words):
        run(stage1, *training(policy, copied_batch, output))


def test_a_sequence_longer_than_the_limit(run, policy, batch, output):
    with untouched(output), refused("batch: row .* more than max_tokens = 7"):
        run(stage1, *training(policy, batch, output, "train.max_tokens=7"))


@pytest.mark.parametrize("content", [
    case("empty", b""), case("text", b"hello"), case("a directory", dir),
    case("another file", safetensors({"a": entry()}, BYTES16)),
])  # fmt: skip
def test_sampling_onto_a_damaged_shard(run, tmp_path, policy, output, content):
    """A shard that is there but is none must be named, not taken for done."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    place(output / SHARD, content)
    with untouched(output), refused(SHARD):
        run(sample, *sampling(policy, file, output))


@pytest.mark.parametrize("change, words", [
    *(c for c in COLUMN_CASES if c.id in ("reward left out", "reward above 1", "log-prob NaN")),
    case("no sequences", nothing, SHARD),
    case("token outside", put("tokens", 0, 99), "token"),
])  # fmt: skip
def test_show_refuses(policy, copied_batch, change, words):
    file = copied_batch / SHARD
    edit_shard(file, **change(load_file(file)))
    with refused(words), contextlib.redirect_stdout(io.StringIO()):
        rollouts.show(copied_batch, policy)


# ---------------------------------------------------------------- log-prob columns


def column_file(batch, policy):
    return batch / f"logp.{models.fingerprint(policy)}.t1.safetensors"


LOGP_CASES = [
    case("no metadata", lambda t, m: (t, None), ""),
    case("batch left out", lambda t, m: (t, {"policy": "x"}), ""),
    case("another batch", lambda t, m: (t, {**m, "batch": "0" * 16}), "belongs to another batch"),
    case("no logp", lambda t, m: ({"lgop": t}, m), "not a readable"),
    case("too short", lambda t, m: (t[:-1].clone(), m), ""),
    case("too long", lambda t, m: (torch.cat((t, t)), m), ""),
    case("empty", lambda t, m: (t[:0].clone(), m), ""),
    case("two dimensions", lambda t, m: (t[None].clone(), m), ""),
    case("float64", lambda t, m: (t.double(), m), ""),
    case("int32", lambda t, m: (t.int(), m), ""),
    case("NaN", lambda t, m: (torch.full_like(t, torch.nan), m), ""),
    case("one NaN", lambda t, m: (torch.where(torch.arange(len(t)) == 9, torch.nan, t), m), ""),
    case("infinite", lambda t, m: (torch.full_like(t, -torch.inf), m), ""),
    case("of another policy", lambda t, m: (t, {**m, "fingerprint": "f" * 16}), ""),
    case("of another temperature", lambda t, m: (t, {**m, "temperature": "0.5"}), ""),
]  # fmt: skip


@pytest.fixture
def with_column(policy, copied_batch):
    batch = rollouts.load(copied_batch)
    batch.write_column(models.fingerprint(policy), 1.0, -torch.rand(len(batch.tokens)), policy)
    return copied_batch


@pytest.mark.parametrize("change, words", LOGP_CASES)
def test_columns(run, policy, with_column, output, change, words):
    """A column that does not fit must not become rho; the way out is to delete it."""
    file = column_file(with_column, policy)
    with safe_open(file, framework="pt") as opened:
        tensors, metadata = change(opened.get_tensor("logp"), opened.metadata())
    tensors = tensors if isinstance(tensors, dict) else {"logp": tensors}
    save_file(tensors, file, metadata=metadata)
    for module, arguments in ((stage1, training), (stage2, distilling)):
        with refused(re.escape(file.name) + ".*" + words + ".*delete it"):
            run(module, *arguments(policy, with_column, output))
    assert not list(output.glob("step_*"))


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_column_bytes(policy, with_column, content):
    file = column_file(with_column, policy)
    file.write_bytes(content)
    with refused(re.escape(file.name) + ".*delete it"):
        rollouts.load(with_column).read_column(models.fingerprint(policy), 1.0)


def test_column_is_a_directory(run, policy, copied_batch, output):
    file = place(column_file(copied_batch, policy), dir)
    with refused(re.escape(file.name)):
        run(stage1, *training(policy, copied_batch, output))
    assert not list(output.glob("step_*"))


# ---------------------------------------------------------------- imported responses

GOOD = {"problem": "1+2=", "response": "3.", "reward": 1}
IMPORT_CASES = [
    *(case(name, x, "line 2: not a JSON object") for name, x in BAD_JSON_LINES.items()),
    case("tokens outside", {**GOOD, "response_ids": [1, 32]}, r"line 2: .*response.*\[0, 32\)"),
    case("prompt tokens outside", {**GOOD, "prompt_ids": [2**40]}, r"line 2: .*prompt.*\[0, 32\)"),
    case("tokens of fractions", {**GOOD, "response_ids": [1.0]}, "line 2: the response must"),
    case("tokens true", {**GOOD, "response_ids": [True]}, "line 2: the response must"),
    case("empty response", {**GOOD, "response_ids": []}, "line 2: the response must"),
    case("empty prompt", {**GOOD, "prompt": ""}, "line 2: the prompt must"),
    case("empty problem", {**GOOD, "problem": ""}, "line 2: problem must"),
    case("reward above 1", {**GOOD, "reward": 2}, "line 2: reward must be"),
    case("reward infinite", '{"problem":"1=","response":"3.","reward":Infinity}', "line 2: reward"),
    case("reward of 400 digits", {**GOOD, "reward": 10**400}, "line 2: reward must be"),
    case("reward of huge text", {**GOOD, "reward": "1" * 100_000}, "line 2: reward must be"),
    case("logp of 400 digits", {**GOOD, "logp": [10**400, 0]}, "line 2: logp must"),
    case("logp true", {**GOOD, "logp": [True, False]}, "line 2: logp must"),
    case("logp above 0", {**GOOD, "logp": [0.5, 3]}, "line 2: logp"),
    case("logp NaN", '{"problem":"1=","response":"3.","reward":1,"logp":[NaN,0]}', "line 2: logp"),
    case("finished text", {**GOOD, "finished": "false"}, "line 2: finished"),
    case("finished a list", {**GOOD, "finished": []}, "line 2: finished"),
    case("finished null", {**GOOD, "finished": None}, "line 2: finished"),
    case("answer null", {"problem": "1=", "response": "3.", "answer": None}, "line 2"),
    case("answer a list", {"problem": "1=", "response": "3.", "answer": [1]}, "line 2"),
    case("problem null", {**GOOD, "problem": None}, "line 2"),
    case("problem a list", {**GOOD, "problem": ["1="]}, "line 2"),
    case("messages empty", {"messages": [], "response": "3.", "reward": 1}, "line 2"),
    case("messages text", {"messages": "1=", "response": "3.", "reward": 1}, "line 2"),
    case("messages of numbers", {"messages": [1], "response": "3.", "reward": 1}, "line 2"),
    case("half a surrogate", '{"problem":"1=","response":"\\ud800","reward":1}', "line 2"),
    case("response and ids of nothing", {**GOOD, "response": None}, "line 2: needs response"),
]  # fmt: skip


@pytest.mark.parametrize("row, words", IMPORT_CASES)
def test_imports(tmp_path, policy, row, words):
    file = jsonl(tmp_path / "r.jsonl", GOOD, row, GOOD)
    with refused(r"r\.jsonl, " + words):
        rollouts.import_rollouts(file, tmp_path / "new", policy)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content, words", [
    case("missing", None, "cannot be read: No such file"),
    case("a directory", dir, "cannot be read: Is a directory"),
    case("empty", b"", "no responses"), case("blank", b"\n\n", "no responses"),
    case("UTF-16", json.dumps(GOOD).encode("utf-16"), "line 1"),
])  # fmt: skip
def test_import_files(tmp_path, policy, content, words):
    file = place(tmp_path / "r.jsonl", content)
    with refused(r"r\.jsonl.*" + words):
        rollouts.import_rollouts(file, tmp_path / "new", policy)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_import_temperature(tmp_path, policy, temperature):
    file = jsonl(tmp_path / "r.jsonl", GOOD)
    with refused("temperature"):
        rollouts.import_rollouts(file, tmp_path / "new", policy, temperature=temperature)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- configs

TABLES = "".join(f"[a{'.b' * i}]\n" for i in range(3))
CONFIG_CASES = [
    case("missing", None, "cannot be read: No such file"),
    case("a directory", dir, "cannot be read: Is a directory"),
    case("empty", b"", "key policy is missing"),
    case("truncated", b'policy = "a', "not TOML"),
    case("not UTF-8", b'policy = "\xff"', "not TOML"),
    case("UTF-16", 'policy = "a"'.encode("utf-16"), "not TOML"),
    case("zero bytes", b"\0" * 10, "not TOML"),
    case("JSON", b'{"policy": "a"}', "not TOML"),
    case("a key twice", b'policy = "a"\npolicy = "b"', "not TOML"),
    case("a section twice", b"[loss]\n[loss]\n", "not TOML"),
    case("huge line", b"x" * 1_000_000, "not TOML"),
    case("deeply nested", ("policy = " + "[" * 5000).encode(), "not TOML"),
    case("policy a number", b"policy = 5", "key policy must be str, not 5"),
    case("policy a huge number", b"policy = " + b"9" * 5000, "not TOML|must be str"),
    case("policy a list", b'policy = ["a"]', "key policy must be str"),
    case("policy huge", b"policy = [" + b"1," * 50_000 + b"]", "key policy must be str"),
    case("steps of text", b'policy = "a"\nbatch = "b"\noutput = "c"\nsteps = "5"', "key steps"),
    case("a section as a list", b'policy="a"\nbatch="b"\noutput="c"\n[[loss]]\n', "key loss must"),
    case("unknown", b"polciy = 5", "unknown key polciy; did you mean policy"),
    case("a date", b"policy = 2020-01-01", "key policy must be str"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", CONFIG_CASES)
def test_config_files(run, tmp_path, content, words):
    file = place(tmp_path / "c.toml", content)
    with refused(r"c\.toml.*" + words):
        run(stage1, f"output={tmp_path}/out", config=file)
    assert not (tmp_path / "out").exists()


NUMBER_CASES = [
    case("lr NaN", "train.lr=nan", "lr"),
    case("lr infinite", "train.lr=inf", "lr"),
    case("clip NaN", "train.clip=nan", "clip"),
    case("betas of one", "train.betas=[0.9]", "betas"),
    case("betas of 2", "train.betas=[0.9,2.0]", "betas"),
    case("weight decay negative", "train.weight_decay=-1.0", "weight_decay"),
    case("weight decay NaN", "train.weight_decay=nan", "weight_decay"),
    case("steps 0", "steps=0", "steps"),
    case("steps negative", "steps=-1", "steps"),
    case("warmup negative", "train.warmup=-1", "warmup"),
    case("replicas negative", "train.replicas=-1", "replicas"),
    case("replicas too many", "train.replicas=3", "replicas = 3 does not divide 1"),
    case("temperature negative", "logprob_temperature=-1.0", "temperature"),
    case("temperature NaN", "logprob_temperature=nan", "temperature"),
    case("beta NaN", "loss.beta=nan", "beta"),
    case("seed of 70 bits", f"train.seed={2**70}", "seed"),
]  # fmt: skip


@pytest.mark.parametrize("override, words", NUMBER_CASES)
def test_config_numbers(run, policy, batch, output, override, words):
    """A number that means nothing must be said by its key, before anything is written."""
    with untouched(output), refused(words):
        run(stage1, *training(policy, batch, output, override))


# ---------------------------------------------------------------- checkpoints

SHAPE_CASES = [
    *(case(f"{key} {value!r:.20}", {key: value}, r"config\.json.*" + key)
      for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "intermediate_size")
      for value in ("32", -2, 2.5, [2], True, 0)
      # absent and 0 are the same to these
      if not (value == 0 and value is not False and key in ("num_key_value_heads", "head_dim"))),
    case("10 million layers", {"num_hidden_layers": 10**7}, r"config\.json.*num_hidden_layers"),
    case("heads that do not divide", {"num_key_value_heads": 3}, r"config\.json.*num_key_value"),
    case("odd head width", {"head_dim": 15}, r"config\.json.*head_dim"),
    case("architectures text", {"architectures": "Qwen3ForCausalLM"}, r"config\.json.*architect"),
    case("architectures a list of lists", {"architectures": [["a"]]}, r"config\.json.*architect"),
    case("architectures an object", {"architectures": {"a": 1}}, r"config\.json.*architect"),
    case("text_config text", {"text_config": "x"}, r"config\.json.*text_config"),
    case("text_config a list", {"text_config": [1]}, r"config\.json.*text_config"),
    case("layer_types text", {"layer_types": "full"}, r"config\.json.*layer_types"),
    case("layer_types a number", {"layer_types": 2}, r"config\.json.*layer_types"),
    case("layer_types of lists", {"layer_types": [[], []]}, r"config\.json.*layer_types"),
    case("rope_scaling text", {"rope_scaling": "llama3"}, r"config\.json.*rope"),
    case("rope_parameters a list", {"rope_parameters": [1]}, r"config\.json.*rope"),
    case("rope_theta text", {"rope_theta": "x"}, r"config\.json.*rope_theta"),
    case("rope_theta a list", {"rope_theta": []}, r"config\.json.*rope_theta"),
    case("rope_theta 0", {"rope_theta": 0}, r"config\.json.*rope_theta"),
    case("rope_theta negative", {"rope_theta": -1e4}, r"config\.json.*rope_theta"),
    case("eps text", {"rms_norm_eps": "x"}, r"config\.json.*rms_norm_eps"),
    case("eps negative", {"rms_norm_eps": -1.0}, r"config\.json.*rms_norm_eps"),
    case("tied text", {"tie_word_embeddings": "false"}, r"config\.json.*tie_word"),
    case("hidden_act a list", {"hidden_act": ["silu"]}, r"config\.json.*hidden_act"),
    case("vocabulary of 2^62", {"vocab_size": 2**62}, "vocab|shape|2\\^|config"),
    case("hidden of 2^40", {"hidden_size": 2**40}, "hidden|shape"),
]  # fmt: skip


def edit_json(file, **changes):
    data = {**(json.loads(file.read_text()) if file.is_file() else {}), **changes}
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return file


@pytest.mark.parametrize("changes, words", SHAPE_CASES)
def test_checkpoint_shapes(copied, changes, words):
    """config.json is the first file of a stranger that is read: by file and key."""
    edit_json(copied / "config.json", **changes)
    with refused(words, seconds=10):
        config = models.read_config(copied)
        assert config.layers < 10_000, "is taken for a model"
        models.load(copied, dtype=torch.float32)


JSON_BYTES = {
    "empty": b"",
    "truncated": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "text": b'"x"',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deeply nested": DEEP.encode(),
    "deeply nested objects": ('{"a":' * 200_000).encode(),
    "huge number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "huge line": b"x" * 3_000_000,
}
FOLDER_FILES = ("config.json", "generation_config.json", "tokenizer_config.json",
                "special_tokens_map.json", "chat_template.json")  # fmt: skip


@pytest.mark.parametrize("kind", [case(k, k) for k in JSON_BYTES])
@pytest.mark.parametrize("name", FOLDER_FILES)
def test_checkpoint_json(run, tmp_path, copied, output, name, kind):
    """Every JSON file of a checkpoint, through the command that reads it."""
    (copied / name).write_bytes(JSON_BYTES[kind])
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(re.escape(name)):
        run(sample, *sampling(copied, file, output))


@pytest.mark.parametrize("name", [
    case("config.json", "config.json"), case("tokenizer.json", "tokenizer.json"),
    case("model.safetensors", "model.safetensors"),
    *(case(n, n) for n in (*FOLDER_FILES[1:], "chat_template.jinja",
                                            "model.safetensors.index.json")),
])  # fmt: skip
def test_checkpoint_directory_for_a_file(run, tmp_path, copied, output, name):
    place(copied / name, dir)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(re.escape(name)):
        run(sample, *sampling(copied, file, output))


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_checkpoint_bytes(run, batch, copied, output, content):
    (copied / "model.safetensors").write_bytes(content)
    with untouched(output), refused("model.safetensors"):
        run(stage1, *training(copied, batch, output))


EMBED = "model.embed_tokens.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
TENSOR_CASES = [
    case("NaN", lambda t: t[EMBED][3].fill_(torch.nan), EMBED + ".*not finite"),
    case("infinite", lambda t: t[GATE][3].fill_(torch.inf), GATE + ".*not finite"),
    case("left out", lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    case("too many", lambda t: t.update(extra=torch.zeros(1)), "extra"),
    case("transposed", lambda t: t.update({GATE: t[GATE].T.contiguous()}), GATE + ".*shape"),
    case("scalar", lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}),
         "model.norm.weight.*shape"),
    case("integers", lambda t: t.update({EMBED: t[EMBED].int()}), EMBED),
    case("truth values", lambda t: t.update({EMBED: t[EMBED] > 0}), EMBED),
    case("complex", lambda t: t.update({EMBED: t[EMBED].to(torch.complex64)}), EMBED),
]  # fmt: skip


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, words", TENSOR_CASES)
def test_checkpoint_tensors(run, batch, copied, output, change, words):
    """Of the policy that is trained, where another sampled the batch."""
    edit_weights(copied, change)
    with safe_open(batch / SHARD, framework="pt") as opened:
        old = json.loads(opened.metadata()["header"])["policy"]
    with refused(words):
        run(stage1, *training(copied, batch, output, f"old={old}"))
    assert not list(output.glob("step_*"))


def test_a_refused_checkpoint_leaves_no_run(run, batch, copied, output):
    edit_weights(copied, TENSOR_CASES[2].values[0])
    with untouched(output), refused("model.norm.weight"):
        run(stage1, *training(copied, batch, output))


INDEX_CASES = [
    *(case(k, v, r"index\.json") for k, v in JSON_BYTES.items() if k != "deeply nested"
      and k != "deeply nested objects"),
    case("deeply nested", DEEP, r"index\.json"),
    case("no map", '{"metadata": {}}', r"index\.json"),
    case("map empty", '{"weight_map": {}}', r"index\.json"),
    case("names no file", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    case("name null", '{"weight_map": {"a": null}}', r"index\.json"),
    case("name of zero bytes", '{"weight_map": {"a": "\\u0000"}}', r"missing|index\.json"),
    case("name too long", '{"weight_map": {"a": "' + "x" * 5000 + '"}}', "missing|index|too long"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", INDEX_CASES)
def test_checkpoint_index(run, batch, copied, output, content, words):
    (copied / "model.safetensors").unlink()
    place(copied / "model.safetensors.index.json", content)
    with untouched(output), refused(words):
        run(stage1, *training(copied, batch, output))


@pytest.mark.parametrize("what", ["missing", "a file", "empty"])
def test_checkpoint_is_none(run, tmp_path, batch, output, what):
    path = tmp_path / "checkpoint"
    if what != "missing":
        place(path, dir if what == "empty" else b"x")
    with untouched(output), refused("checkpoint"):
        run(stage1, *training(path, batch, output))


# ---------------------------------------------------------------- tokenizer and chat template

TOKENIZER_BYTES = {**JSON_BYTES, "no model": b'{"version": "1.0"}',
                   "unknown model": b'{"version": "1.0", "model": {"type": "Neural"}}',
                   "unknown version": b'{"version": "9.0", "model": {}}'}  # fmt: skip


@pytest.mark.parametrize("content", TOKENIZER_BYTES.values(), ids=TOKENIZER_BYTES)
def test_tokenizers(run, tmp_path, copied, output, content):
    (copied / "tokenizer.json").write_bytes(content)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(r"tokenizer\.json"):
        run(sample, *sampling(copied, file, output))


@pytest.mark.parametrize("which", ["sample", "evaluate", "import"])
def test_tokenizer_that_cannot_encode(run, tmp_path, copied, output, which):
    """It is read without complaint, but has no token for what it does not know."""
    data = json.loads((copied / "tokenizer.json").read_text())
    data["model"]["unk_token"] = "[UNK]"
    (copied / "tokenizer.json").write_text(json.dumps(data))
    file = jsonl(tmp_path / "p.jsonl", {"problem": "Why?", "answer": "1", "response": "1"})
    with untouched(output), refused("copied|p.jsonl.*line 1"):
        if which == "import":
            rollouts.import_rollouts(file, output / "batch", copied)
        else:
            arguments = (sampling if which == "sample" else evaluating)(copied, file, output)
            run({"sample": sample, "evaluate": evaluate}[which], *arguments)


def another_tokenizer(folder):
    """The same letters with numbers of which many are outside the vocabulary."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {letter: i * 100 for letter, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("which", ["sample", "evaluate"])
def test_wrong_tokenizer(run, tmp_path, copied, output, which):
    """A folder put together from two models."""
    another_tokenizer(copied)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    arguments = (sampling if which == "sample" else evaluating)(copied, file, output)
    with untouched(output), refused("copied", "tokenizer|vocabulary"):
        run({"sample": sample, "evaluate": evaluate}[which], *arguments)


def test_wrong_tokenizer_of_an_import(tmp_path, copied):
    another_tokenizer(copied)
    with refused(r"r\.jsonl, line 1: the prompt must be token ids in \[0, 32\)"):
        rollouts.import_rollouts(jsonl(tmp_path / "r.jsonl", GOOD), tmp_path / "new", copied)
    assert not (tmp_path / "new").exists()


def test_base_of_another_vocabulary(run, tmp_path, policy, copied, output):
    """KL to a base with another vocabulary means nothing: to be said first."""
    edit_weights(copied, lambda tensors: tensors.update({EMBED: tensors[EMBED][:30].clone()}))
    edit_json(copied / "config.json", vocab_size=30)
    file, other = jsonl(tmp_path / "p.jsonl", *PROMPTS), f'policy=[{{name="b",path="{copied}"}}]'
    with refused("copied.*vocab"):
        run(evaluate, *evaluating(policy, file, output, other))


STOP_CASES = [
    case("text", "2", r"generation_config\.json: eos_token_id"),
    case("true", True, r"generation_config\.json: eos_token_id"),
    case("a fraction", 2.0, r"generation_config\.json: eos_token_id"),
    case("an object", {"id": 2}, r"generation_config\.json: eos_token_id"),
    case("lists of lists", [[2]], r"generation_config\.json: eos_token_id"),
    case("negative", -1, r"generation_config\.json: eos_token_id"),
    case("outside the vocabulary", 99, r"generation_config\.json: eos_token_id"),
    case("a huge list", ["x"] * 100_000, r"generation_config\.json: eos_token_id"),
]  # fmt: skip


@pytest.mark.parametrize("eos, words", STOP_CASES)
def test_generation_config(run, tmp_path, copied, output, eos, words):
    """A stop token that cannot be drawn makes every response a truncated one."""
    edit_json(copied / "generation_config.json", eos_token_id=eos)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(words):
        run(sample, *sampling(copied, file, output))


TEMPLATE_CASES = [
    case("not UTF-8", b"\xff\xfe", r"chat_template\.jinja"),
    case("not a template", b"{% if %}", "chat template"),
    case("not closed", b"{{ messages", "chat template"),
    case("unknown tag", b"{% exec %}", "chat template"),
    case("unknown name", b"{{ nothing.below }}", "chat template"),
    case("unknown filter", b"{{ messages | shell }}", "chat template"),
    case("refuses", b"{{ raise_exception('no system message') }}", "no system message"),
    case("refuses in many lines", b"{{ raise_exception('a\\nb\\nc') }}", "chat template"),
    case("refuses at length", b"{{ raise_exception('x' * 100000) }}", "chat template"),
    case("divides by zero", b"{{ 1 / 0 }}", "chat template"),
    case("the object behind", b"{{ messages.__class__.__mro__ }}", "chat template"),
    case("imports", b"{% import 'os' as os %}", "chat template"),
    case("includes a file", b"{% include '/etc/passwd' %}", "chat template"),
    case("extends a file", b"{% extends '../../x' %}", "chat template"),
    case("deeply nested", b"{{ " + b"(" * 5000 + b")" * 5000 + b" }}", "chat template"),
    case("huge text", b"{{ 'x' * 10000000000 }}", "chat template"),
    case("huge range", b"{% for i in range(10**9) %}{% endfor %}", "chat template"),
    case("renders nothing", b"{# #}", "chat template|prompt.*empty"),
]  # fmt: skip


@pytest.mark.parametrize("content, words", TEMPLATE_CASES)
def test_chat_templates(run, tmp_path, copied, output, content, words):
    """The policy's template is code of a stranger, run in a sandbox: it renders or is refused, by
    the folder's name."""
    (copied / "chat_template.jinja").write_bytes(content)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with untouched(output), refused(words):
        run(sample, *sampling(copied, file, output))


def test_chat_template_is_named(run, tmp_path, copied, output):
    (copied / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with refused("copied"):
        run(sample, *sampling(copied, file, output))


# ---------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory, policy, batch):
    """A finished stage-1 run of two steps, and the same one killed after its first."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("finished", "killed"):
        shutil.copytree(batch, folder / "batch", dirs_exist_ok=True)
        arguments = [*training(policy, folder / "batch", folder / name), "steps=2",
                     "train.checkpoint_every=1"]  # fmt: skip
        before, sys.argv = sys.argv, [stage1.__file__, "--set", *arguments]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                stage1.main()
        finally:
            sys.argv = before
            dist.destroy_process_group()
    (folder / "killed" / "done.json").unlink()
    shutil.rmtree(folder / "killed" / "step_000002")
    state = folder / "killed" / "state"
    (state / "step_000002").rename(state / "step_000001")
    return folder


@pytest.fixture
def runs(tmp_path, finished_runs):
    """Copies of both, to be damaged: a run may lie anywhere."""
    for name in ("finished", "killed"):
        shutil.copytree(finished_runs / name, tmp_path / name)
    return finished_runs


def again(run, policy, runs, folder):
    """The same command once more."""
    run(stage1, *training(policy, runs / "batch", folder), "steps=2", "train.checkpoint_every=1")


def test_undamaged_runs_go_on(run, tmp_path, policy, runs, capsys):
    """Or the tables below would mean nothing."""
    with untouched(tmp_path / "finished"):
        again(run, policy, runs, tmp_path / "finished")
    assert "already complete" in capsys.readouterr().out
    again(run, policy, runs, tmp_path / "killed")
    assert "resumed from" in capsys.readouterr().out
    assert (tmp_path / "killed" / "done.json").is_file()


STARTED = ("run.json", "config.toml")  # each start is noted in its environments
RUN_JSON_CASES = [
    *(case(k, v) for k, v in JSON_BYTES.items()),
    case("no config", '{"inputs": {}, "environments": []}'),
    case("no inputs", '{"config": {}, "environments": []}'),
    case("config a list", '{"config": [], "inputs": {}, "environments": []}'),
    case("config null", '{"config": null, "inputs": {}, "environments": []}'),
    case("inputs text", '{"config": {}, "inputs": "", "environments": []}'),
    case("config deeply nested", '{"config": ' + '{"a":' * 900 + "1" + "}" * 900
         + ', "inputs": {}, "environments": []}'),
]  # fmt: skip


@pytest.mark.parametrize("content", RUN_JSON_CASES)
@pytest.mark.parametrize("name", ["finished", "killed"])
def test_run_json(run, tmp_path, policy, runs, name, content):
    """The record of a run, of which checkpoints exist: without it nobody knows what they are."""
    place(tmp_path / name / "run.json", content)
    with untouched(tmp_path / name), refused(r"run\.json"):
        again(run, policy, runs, tmp_path / name)


@pytest.mark.parametrize("content", [
    *(case(k, v) for k, v in JSON_BYTES.items()),
    case("no config", '{"inputs": {}, "steps": 2}'),
    case("no inputs", '{"config": {}, "steps": 2}'),
])  # fmt: skip
def test_done_json(run, tmp_path, policy, runs, content):
    place(tmp_path / "finished" / "done.json", content)
    with untouched(tmp_path / "finished"), refused(r"done\.json"):
        again(run, policy, runs, tmp_path / "finished")


@pytest.mark.parametrize("name", [
    *(case(n, n) for n in ("run.json", "metrics.jsonl", "config.toml")),
    case("done.json", "done.json"),
])  # fmt: skip
def test_run_files_are_directories(run, tmp_path, policy, runs, name):
    """Said before the steps, not after them."""
    folder = tmp_path / "killed"
    place(folder / name, dir)
    with untouched(folder, STARTED), refused(re.escape(name)):
        again(run, policy, runs, folder)


METRICS_CASES = [
    *(case(k, v + (b"\n" if isinstance(v, bytes) else "\n")) for k, v in BAD_JSON_LINES.items()
      if k not in ("huge number",)),
    case("no step", b'{"loss": 1.0}\n'),
    case("step of text", b'{"step": "2"}\n'),
    case("step null", b'{"step": null}\n'),
    case("grad_norm of text", b'{"step": 1, "grad_norm": "x"}\n'),
    case("huge number", b'{"step": ' + b"9" * 5000 + b"}\n"),
]  # fmt: skip


@pytest.mark.parametrize("line", METRICS_CASES)
def test_metrics_of_a_run(run, tmp_path, policy, runs, line):
    """A line in the middle that is none. (Half a line at the end is what a kill leaves.)"""
    file = tmp_path / "killed" / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(first + line + b"".join(rest))
    with untouched(tmp_path / "killed", STARTED), refused(r"metrics\.jsonl, line 2"):
        again(run, policy, runs, tmp_path / "killed")


@pytest.mark.parametrize("line", [
    *(case(k, v) for k, v in BAD_JSON_LINES.items() if k != "huge number"),
    case("no step", '{"seconds": 1.0}'),
    case("step of text", '{"step": "2", "seconds": 1.0}'),
    case("seconds of text", '{"step": 1, "seconds": "x"}'),
    case("p_positive of text", '{"step": 11, "p_positive": "x"}'),
])  # fmt: skip
def test_metrics_of_an_evaluation(run, tmp_path, policy, output, line):
    """evaluate.py reads seconds and p_positive of them."""
    folder = tmp_path / "trained"
    shutil.copytree(policy, folder / "step_000010")
    jsonl(folder / "metrics.jsonl", {"step": 11, "seconds": 1.0, "p_positive": 0.5}, line)
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    with refused(r"metrics\.jsonl, line 2"):
        run(evaluate, *evaluating(policy, file, output, f'policy=[{{name="a",path="{folder}"}}]',
                                  'select=[{run="a",rule="unlearned"}]'))  # fmt: skip
    assert not (output / "report.json").exists()


def part(folder):
    [file] = (folder / "state" / "step_000001").glob("*.safetensors")
    return file


def damage_state(folder, how):
    file = part(folder)
    tensors = load_file(file)
    name = "exp_avg_sq." + GATE
    if how == "truncated":
        return file.write_bytes(file.read_bytes()[:-100])
    if how == "no parts":
        return file.unlink()
    if how == "a directory":
        return place(file, dir)
    if how == "a part twice":
        return shutil.copyfile(file, file.with_name("shard-00002-" + file.name[12:]))
    if how == "a tensor left out":
        del tensors[name]
    elif how == "transposed":
        tensors[name] = tensors[name].T.contiguous()
    elif how == "too short":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "one row, to be broadcast":
        tensors[name] = tensors[name][:1].clone()
    elif how == "another dtype":
        tensors[name] = tensors[name].to(torch.int64)
    elif how == "NaN weights":
        tensors["weight." + name.removeprefix("exp_avg_sq.")][0, 0] = torch.nan
    elif how == "NaN moments":
        tensors[name][0, 0] = torch.nan
    elif how == "negative moments":
        tensors[name].sub_(1.0)
    save_file(tensors, file)


STATE_CASES = [
    "truncated",
    "no parts",
    "a directory",
    "a part twice",
    "a tensor left out",
    "transposed",
    "too short",
    "one row, to be broadcast",
    "another dtype",
    "NaN weights",
    "NaN moments",
    "negative moments",
]


@pytest.mark.parametrize("how", [case(k, k) for k in STATE_CASES])
def test_resume_state(run, tmp_path, policy, runs, how):
    """What a run goes on from. Said by the file's name, and nothing is done."""
    folder = tmp_path / "killed"
    damage_state(folder, how)
    kept = {n: b for n, b in snapshot(folder).items() if n.startswith(("step_", "state"))}
    with refused("state.step_000001"):
        again(run, policy, runs, folder)
    assert kept == {n: b for n, b in snapshot(folder).items() if n.startswith(("step_", "state"))}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_resume_state_bytes(run, tmp_path, policy, runs, content):
    part(tmp_path / "killed").write_bytes(content)
    with refused(r"state.step_000001.shard-00001-\S*safetensors"):
        again(run, policy, runs, tmp_path / "killed")


@pytest.mark.parametrize("path", [
    case("a file", "file"), case("below a file", "file/below"),
])  # fmt: skip
@pytest.mark.parametrize("which", ["sample", "evaluate", "stage1", "stage2"])
def test_output_is_a_file(run, tmp_path, policy, batch, which, path):
    """A directory is needed where a file is."""
    (tmp_path / "file").write_text("mine")
    prompts = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    module, arguments, source = {
        "sample": (sample, sampling, prompts),
        "evaluate": (evaluate, evaluating, prompts),
        "stage1": (stage1, training, batch),
        "stage2": (stage2, distilling, batch),
    }[which]
    with refused("file"):
        run(module, *arguments(policy, source, tmp_path / path))
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- erpd's commands.jsonl and names


def driver(folder):
    return erpd.Driver(erpd.Config(output="x", sample="s", evaluate="e", task="t"), folder)


COMMAND_CASES = [
    *(case(k, v) for k, v in BAD_JSON_LINES.items()),
    case("no key", '{"seconds": 1.0, "arguments": []}'),
    case("no seconds", '{"key": "a", "arguments": []}'),
    case("no arguments", '{"key": "a", "seconds": 1.0}'),
    case("key a list", '{"key": ["a"], "seconds": 1.0, "arguments": []}'),
    case("seconds text", '{"key": "a", "seconds": "x", "arguments": []}'),
]  # fmt: skip


@pytest.mark.parametrize("line", COMMAND_CASES)
def test_commands_jsonl(tmp_path, line):
    """A line in the middle that is none. (Half a line at the end is what a kill leaves.)"""
    good = {"key": "a" * 24, "phase": "sample", "seconds": 1.0, "arguments": []}
    jsonl(tmp_path / "commands.jsonl", good, line, good)
    with untouched(tmp_path), refused(r"commands\.jsonl, line 2"):
        driver(tmp_path)


def test_commands_jsonl_is_a_directory(tmp_path):
    place(tmp_path / "commands.jsonl", dir)
    with refused(r"commands\.jsonl"):
        driver(tmp_path)


ROUNDS = """
output = "{output}"
sample = "{folder}/sample.toml"
evaluate = "{folder}/evaluate.toml"
policy = "p"
prompts = "FILE"
validation = "FILE"
test = "FILE"
[[stage1]]
name = {name}
config = "{folder}/stage1.toml"
""".replace("FILE", __file__)  # is there, and is not read
ESCAPES = ["../x", "..", ".", "", "/tmp/x", "a/../../../x", "a/b", "batch", "validation",
           "evaluation", "x" * 300, "a\\u0000b", "a\\nb", "~/x"]  # fmt: skip


@pytest.mark.parametrize("section", ["stage1", "stage2"])
@pytest.mark.parametrize("name", [
    case(n[:20] or "nothing", n) for n in ESCAPES
])  # fmt: skip
def test_names_of_runs_are_names(tmp_path, name, section):
    """A run's name becomes a folder of its round: it must stay in there, and be no other's."""
    text = ROUNDS.format(output=tmp_path / "out", folder=tmp_path, name=f'"{name}"')
    text = text.replace("[[stage1]]", f"[[{section}]]")
    text += 'numerator = "old"\n' if section == "stage2" else ""
    file = place(tmp_path / "rounds.toml", text)
    with refused("name"):
        options.read_config(erpd.Config, file)


@pytest.mark.parametrize("key", [
    case("sample", "sample"), case("evaluate", "evaluate"),
    case("stage1", "stage1"),
])  # fmt: skip
@pytest.mark.parametrize("content", [case("missing", None), case("a directory", dir)])
def test_configs_of_rounds(run, tmp_path, monkeypatch, key, content):
    """Configs that rounds name are looked at before the hours they take."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a command was run"))
    for name in ("sample", "evaluate", "stage1"):
        place(tmp_path / f"{name}.toml", b"" if name != key else content)
    text = ROUNDS.format(output=tmp_path / "out", folder=tmp_path, name='"a"')
    with refused(rf"{key}\.toml"):
        run(erpd, "seeds=1", config=place(tmp_path / "rounds.toml", text))


@pytest.mark.parametrize("content, words", [
    case("not TOML", b"= 5", r"evaluate\.toml"),
    case("not UTF-8", b"\xff", r"evaluate\.toml"),
    case("no sampling", b"", r"evaluate\.toml"),
])  # fmt: skip
def test_evaluation_config_of_rounds(run, tmp_path, monkeypatch, content, words):
    """erpd fills in evaluate.py's config, so it reads it itself."""
    monkeypatch.setattr(erpd.Driver, "run", lambda *_: None)
    for name in ("sample", "stage1"):
        place(tmp_path / f"{name}.toml", b"")
    place(tmp_path / "evaluate.toml", content)
    text = ROUNDS.format(output=tmp_path / "out", folder=tmp_path, name='"a"')
    with refused(words):
        run(erpd, "seeds=1", config=place(tmp_path / "rounds.toml", text))


# ---------------------------------------------------------------- the sampler's journal


def journal_lines(run, tmp_path, policy, file, output):
    """Lines of a whole journal, and the batch that they become."""
    kept = []
    remove = rollouts.Journal.remove
    try:
        rollouts.Journal.remove = lambda self: (kept.append(self.file.read_text()), remove(self))
        run(sample, *sampling(policy, file, output))
    finally:
        rollouts.Journal.remove = remove
    return kept[0].splitlines()


def changed(index, value):
    def change(line):
        data = json.loads(line)
        data[index] = value(data[index]) if callable(value) else value
        return json.dumps(data)

    return change


JOURNAL_CASES = [
    *(case(k, lambda line, v=v: v) for k, v in BAD_JSON_LINES.items()),
    case("too few entries", lambda line: json.dumps(json.loads(line)[:-1])),
    case("too many entries", lambda line: json.dumps([*json.loads(line), 1])),
    case("a row of another shard", changed(1, 99)),
    case("a row of text", changed(1, "0")),
    case("a row that is a list", changed(1, [0])),
    case("a row of a fraction", changed(1, 0.5)),
    case("a sample too many", changed(2, 7)),
    case("a sample of text", changed(2, "0")),
    case("no tokens", changed(3, [])),
    case("tokens of text", changed(3, "12")),
    case("tokens null", changed(3, None)),
    case("tokens outside the vocabulary", changed(3, lambda t: [99] * len(t))),
    case("a negative token", changed(3, lambda t: [-1] * len(t))),
    case("more tokens than asked for", changed(3, lambda t: t * 9)),
    case("log-probs too few", changed(4, lambda t: t[:-1])),
    case("log-probs NaN", changed(4, lambda t: [float("nan")] * len(t))),
    case("log-probs of text", changed(4, lambda t: ["x"] * len(t))),
    case("finished a number", changed(5, 5)),
]  # fmt: skip


@pytest.mark.parametrize("change", JOURNAL_CASES)
def test_journal(run, tmp_path, policy, change):
    """A journal with a line that is none: named, or the response is drawn again; never another
    batch, never a shard that cannot be read."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    lines = journal_lines(run, tmp_path, policy, file, tmp_path / "clean")
    want = load_file(tmp_path / "clean" / SHARD)
    journal = place(tmp_path / "out", dir) / "shard-00000.journal"
    jsonl(journal, lines[0], change(lines[1]), lines[2])
    try:
        with within(20):
            run(sample, *sampling(policy, file, tmp_path / "out"))
    except (ValueError, OSError) as error:
        assert re.search(r"shard-00000\.journal, line 2", str(error)), error
        assert not (tmp_path / "out" / SHARD).exists()
        return
    got = load_file(tmp_path / "out" / SHARD)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want if name != "sampler_logp")
    assert torch.allclose(want["sampler_logp"], got["sampler_logp"], atol=1e-5)


def test_journal_is_whole_again(run, tmp_path, policy):
    """The same without damage, so that the test above means something."""
    file = jsonl(tmp_path / "p.jsonl", *PROMPTS)
    lines = journal_lines(run, tmp_path, policy, file, tmp_path / "clean")
    for i, content in enumerate((lines, lines[:2], [*lines[:3], lines[3][:9]], [])):
        place(tmp_path / f"out{i}", dir)
        (tmp_path / f"out{i}" / "shard-00000.journal").write_text("\n".join([*content, ""])[:-1])
        run(sample, *sampling(policy, file, tmp_path / f"out{i}"))
        got, want = (load_file(tmp_path / n / SHARD) for n in (f"out{i}", "clean"))
        assert all(torch.equal(want[n], got[n]) for n in want if n != "sampler_logp")


# ---------------------------------------------------------------- cells of an evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, policy):
    folder = tmp_path_factory.mktemp("cells")
    file = jsonl(folder / "p.jsonl", *PROMPTS)
    arguments = evaluating(policy, file, folder / "out")
    before, sys.argv = sys.argv, [evaluate.__file__, "--set", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate.main()
    finally:
        sys.argv = before
        dist.destroy_process_group()
    return folder


def without(*path):
    def change(data):
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return data

    return change


def with_value(value, *path):
    def change(data):
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return data

    return change


REWARDS_CASES = [
    *(case(k, v) for k, v in JSON_BYTES.items()),
    case("no cells", without("cells")),
    case("cells an object", with_value({}, "cells")),
    case("a prompt too few", without("cells", 1)),
    case("no prompts", with_value([], "cells")),
    case("a count left out", without("cells", 0, "rewards")),
    case("a reward of text", with_value("1", "cells", 0, "rewards", 0)),
    case("a reward of 5", with_value(5, "cells", 0, "rewards", 0)),
    case("no rewards", with_value([], "cells", 0, "rewards")),
    case("a number for rewards", with_value(1, "cells", 0, "rewards")),
    case("fewer drawn", without("cells", 0, "rewards", 1)),
    case("an empty response", with_value(0, "cells", 0, "lengths", 0)),
    case("more truncated than drawn", with_value(5, "cells", 0, "truncated")),
    case("a majority of 2", with_value(2.0, "cells", 0, "majority")),
    case("a number for an answer", with_value([1, None], "cells", 0, "answers")),
]  # fmt: skip
KL_CASES = [
    *(case(k, v) for k, v in JSON_BYTES.items()),
    case("no cells", without("cells")),
    case("no seconds", without("seconds")),
    case("seconds text", with_value("x", "seconds")),
    case("a prompt too few", without("cells", 1)),
    case("KL NaN", with_value(float("nan"), "cells", 0, "kl")),
    case("KL null", with_value(None, "cells", 0, "kl")),
    case("an estimate of text", with_value("0", "cells", 0, "kl_sampled")),
    case("no tokens", with_value(0, "cells", 0, "tokens")),
    case("other sequences", with_value(7, "cells", 0, "sequences")),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, change",
    [
        *(pytest.param("rewards", *c.values, id=f"rewards {c.id}") for c in REWARDS_CASES),
        *(pytest.param("kl", *c.values, id=f"kl {c.id}") for c in KL_CASES),
    ],
)
def test_measurements(run, tmp_path, policy, evaluated, kind, change):
    """Named, or measured again; never another number."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    (cell,) = (folder / "out" / "samples").glob(f"*/{kind}_*")
    if callable(change):
        cell.write_text(json.dumps(change(json.loads(cell.read_text()))))
    else:
        place(cell, change)
    before = (folder / "out" / "report.json").read_bytes()
    with within(20), pytest.raises((ValueError, OSError), match=cell.name):
        run(evaluate, *evaluating(policy, folder / "p.jsonl", folder / "out"))
    assert (folder / "out" / "report.json").read_bytes() == before


SAMPLE_CASES = [
    *(case(k, v) for k, v in BAD_JSON_LINES.items() if k != "huge number"),
    *(case(k, json.dumps({"problem": 0, "sample": 1, "tokens": [1, 2], "finished": True,
                          "text": "x"} | change)) for k, change in {
        "a problem too many": {"problem": 2},
        "a negative problem": {"problem": -1},
        "a negative sample": {"sample": -1},
        "a sample of text": {"sample": "1"},
        "no tokens": {"tokens": []},
        "too many tokens": {"tokens": [1] * 5},
        "a token outside the vocabulary": {"tokens": [1, 1000]},
        "finished of text": {"finished": "yes"},
        "text null": {"text": None},
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize("line", SAMPLE_CASES)
def test_kept_samples(run, tmp_path, policy, evaluated, line):
    """A line that is no sample of this evaluation."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    (part,) = (folder / "out" / "samples").iterdir()
    for file in (*part.glob("rewards_*"), *part.glob("kl_*")):
        file.unlink()
    (file,) = part.glob("rank_*")
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(line + b"\n" + file.read_bytes())
    with refused(f"{file.name}, line 1"):
        run(evaluate, *evaluating(policy, folder / "p.jsonl", folder / "out"))


def test_undamaged_measurements_are_used(run, tmp_path, policy, evaluated, monkeypatch):
    """Or the table above would mean nothing."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "copy"))
    monkeypatch.setattr(evaluate, "measure", lambda *_: pytest.fail("measured again"))
    run(evaluate, *evaluating(policy, folder / "p.jsonl", folder / "out"))


# ---------------------------------------------------------------- as a person sees it


def damage(folder, policy, batch, what):
    """Damage one input of a command -> (script, arguments, name in the message)."""
    prompts, out = jsonl(folder / "p.jsonl", *PROMPTS), folder / "out"
    if what == "prompts":
        jsonl(prompts, A, "{")
        return "sample.py", sampling(policy, prompts, out), r"p\.jsonl, line 2"
    if what == "benchmark":
        jsonl(prompts, A, b"\xff")
        return "evaluate.py", evaluating(policy, prompts, out), r"p\.jsonl, line 2"
    if what == "shard":
        copy = Path(shutil.copytree(batch, folder / "batch"))
        (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-1])
        return "stage1.py", training(policy, copy, out), SHARD
    if what == "checkpoint":
        copy = Path(shutil.copytree(policy, folder / "policy"))
        place(copy / "config.json", "[")
        return "stage2.py", distilling(copy, batch, out), r"config\.json"
    if what == "rounds":
        for name in ("sample", "stage1", "evaluate"):
            place(folder / f"{name}.toml", b"[[sampling]]\nname='x'" if name == "evaluate" else b"")
        place(out / "seed_0" / "commands.jsonl", dir)
        text = ROUNDS.format(output=out, folder=folder, name='"a"')
        return "erpd.py", ["seeds=1"], r"commands\.jsonl", place(folder / "r.toml", text)
    raise AssertionError(what)


def one_line(result, words):
    """Exit status 2 and one line 'error: ...' that holds `words`; no traceback."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(words, errors[0]), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("what", ["prompts", "benchmark", "shard", "checkpoint", "rounds"])
def test_exit_status(tmp_path, policy, batch, output, what):
    """Status 2, one line that names the file, no traceback, and the output as it was."""
    script, arguments, words, *config = damage(tmp_path, policy, batch, what)
    with untouched(output):
        result = command(script, *arguments, config=config[0] if config else None)
    one_line(result, words)


@pytest.mark.parametrize("what", [
    case("responses", "responses"), case("not a batch", "not a batch"),
    case("output is a file", "output is a file"),
    case("variables a list", "variables"),
])  # fmt: skip
def test_exit_status_of_rollouts(tmp_path, policy, output, monkeypatch, capsys, what):
    """The two commands of rollouts.py have their own main: the same, here."""
    new = place(tmp_path / "new", b"mine") if what == "output is a file" else output
    good = jsonl(tmp_path / "r.jsonl", GOOD, *(["{"] if what == "responses" else []))
    arguments, words = ["import", good, new, "--policy", policy, "--temperature", 1], "r.jsonl"
    if what == "not a batch":
        arguments, words = ["show", output, "--policy", policy], "out: no rollout shards"
    elif what == "variables":
        arguments, words = [*arguments, "--variables", "[1]"], "variables"
    elif what == "output is a file":
        words = "new"
    monkeypatch.setattr(sys, "argv", ["rollouts.py", *map(str, arguments)])
    with untouched(output), pytest.raises(SystemExit) as left:
        rollouts.main()
    assert left.value.code == 2 and re.search(words, capsys.readouterr().err)


# ---------------------------------------------------------------- nothing of a stranger is run

SOURCES = sorted(ROOT.glob("*.py"))
FORBIDDEN = {
    r"\btorch\.load\b": "unpickles",
    r"\bc?[pP]ickle\b(?! is|,)": "runs code",
    r"\b(dill|joblib|cloudpickle|shelve|marshal)\.": "runs code",
    r"(?<![\w.])(eval|exec|compile)\(": "runs text",
    r"\b__import__\b|\bimportlib\b": "imports by name",
    r"shell\s*=\s*True": "a shell",
    r"\bos\.(system|popen)\b|getoutput": "a shell",
    r"\byaml\.(load|unsafe_load|full_load)\b": "makes objects",
    r"\b(sympify|parse_expr|parse_latex)\(": "evals text",
    r"trust_remote_code": "runs code of a repository",
    r"np\.load\b|numpy\.load\b|allow_pickle": "unpickles",
    r"extractall|unpack_archive": "writes where an archive says",
    r"from_string\((?!self\.template\))": "a template outside the sandbox",
}


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=FORBIDDEN.values())
def test_sources_run_nothing(pattern):
    """What turns data into code is nowhere in the sources (comments and docstrings left out)."""
    assert len(SOURCES) >= 16
    for file in SOURCES:
        if file.name == "sandbox.py" and FORBIDDEN[pattern].startswith("runs "):
            continue  # running a stranger's program is what it is for, locked down in a process
        source = re.sub(r'r?"""[\s\S]*?"""|#[^\n]*', "", file.read_text())
        assert not re.search(pattern, source), f"{file.name}: {pattern}: {FORBIDDEN[pattern]}"


class Canary:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json",
                                  "config.json", "generation_config.json"])  # fmt: skip
def test_pickles_are_not_opened(tmp_path, copied, name):
    """Neither by their usual name nor by the name of something else."""
    (copied / "model.safetensors").unlink()
    torch.save(Canary(tmp_path / "ran"), copied / name)
    with refused("copied"):
        models.load(copied)
        models.Tokenizer(copied)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["shard", "column", "state"])
def test_pickles_are_no_tensors(run, tmp_path, policy, with_column, runs, kind):
    file = {"shard": with_column / SHARD, "column": column_file(with_column, policy),
            "state": part(tmp_path / "killed")}[kind]  # fmt: skip
    torch.save({"tokens": Canary(tmp_path / "ran")}, file)
    if kind == "state":
        with pytest.raises(Exception, match="."):  # how it is said: test_resume_state_bytes
            again(run, policy, runs, tmp_path / "killed")
    else:
        with refused(re.escape(file.name)):
            rollouts.load(with_column).read_column(models.fingerprint(policy), 1.0)
    assert not (tmp_path / "ran").exists()


MEASURE = """
import json, resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import hf, model as models, rollouts
from pathlib import Path
files = sorted(Path({folder!r}).iterdir())
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
for folder in files:
    for read in (lambda: models.load(folder), lambda: models.fingerprint(folder),
                 lambda: rollouts.load(folder)):
        try:
            read()
            print(folder.name, "was read")
        except (ValueError, OSError) as error:
            assert folder.name in str(error), error
print("all refused")
"""


def test_hostile_tensors_take_no_memory(tmp_path, policy):
    """With 300 MB of addresses to spare, no header makes a reader ask for more."""
    folder = place(tmp_path / "all", dir)
    for i, content in enumerate(HOSTILE.values()):
        copy = Path(shutil.copytree(policy, folder / f"m{i:03d}"))
        (copy / "model.safetensors").write_bytes(content)
        (copy / SHARD).write_bytes(content)
    code = MEASURE.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=120)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all refused\n"


# ---------------------------------------------------------------- no name becomes a path

TRAVERSAL = ["../x", "../../x", "/tmp/erpd_escape", "a/b", "..", "x\0y", "~/x"]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_names_in_an_index_stay_inside(tmp_path, copied, name):
    """A weight file is looked for in its checkpoint and nowhere else."""
    outside = tmp_path / "x"
    shutil.copyfile(copied / "model.safetensors", outside)
    (copied / "model.safetensors").unlink()
    weight_map = {EMBED: name}
    place(copied / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    with refused("copied"):
        models.load(copied, dtype=torch.float32)


@pytest.mark.parametrize("name", TRAVERSAL)
def test_prompt_ids_are_no_paths(run, tmp_path, policy, name):
    """Ids and problems of a prompts file name no file."""
    inside = place(tmp_path / "a" / "b", dir)
    file = jsonl(inside / "p.jsonl", *({"id": name + str(i), **p} for i, p in enumerate(PROMPTS)))
    run(sample, *sampling(policy, file, inside / "out"))
    run(evaluate, *evaluating(policy, file, inside / "report"))
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in inside.iterdir()} == {"p.jsonl", "out", "report"}
    assert {p.name for p in (inside / "report").iterdir()} == {
        ".lock", "samples", "report.json", "report.md"}  # fmt: skip
    assert {p.name for p in (inside / "out").iterdir()} == {".lock", SHARD}


@pytest.mark.parametrize("name", TRAVERSAL)
def test_policy_names_are_no_paths(run, tmp_path, policy, name):
    """Names of policies and samplings are written into reports only."""
    inside = place(tmp_path / "a" / "b", dir)
    file = jsonl(inside / "p.jsonl", *PROMPTS)
    toml = inside / "c.toml"
    text = json.dumps(name)
    toml.write_text(
        f'base = "{policy}"\nprompts = "{file}"\noutput = "{inside}/report"\nmax_new_tokens = 4\n'
        f"plot = false\npass_at = [1]\n[[sampling]]\nname = {text}\nn = 1\n[[policy]]\n"
        f'name = {text}\npath = "{policy}"\n[[select]]\nrun = {text}\nrule = "last"\n'
    )
    run(evaluate, "limit=1", config=toml)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    assert {p.name for p in inside.iterdir()} == {"p.jsonl", "c.toml", "report"}
    assert {p.name for p in (inside / "report").iterdir()} == {
        ".lock", "samples", "report.json", "report.md"}  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSAL)
def test_names_in_a_header_are_no_files(policy, copied_batch, name):
    """The header's fingerprint names columns only after it was compared with the policy's own."""
    before = snapshot(copied_batch.parent)
    edit_shard(copied_batch / SHARD, metadata={"fingerprint": name, "policy": name})
    with contextlib.suppress(ValueError):
        rollouts.load(copied_batch)
    after = snapshot(copied_batch.parent)
    assert before.keys() == after.keys()


# ---------------------------------------------------------------- fuzzing

FUZZ = int(os.environ.get("FUZZ", 0))
LIMIT = 200 * 2**20


def fuzz(examples=60):
    return settings(
        max_examples=FUZZ or examples,
        derandomize=not FUZZ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SPECIAL = [b"", b"\0", b"\xff", b"\n", b"{", b"}", b"[", b"]", b'"', b"null", b"NaN", b"-1",
           b"1e999", b"\xed\xa0\x80", b"9" * 50, b"true", b",", b":", b"\xff" * 8]  # fmt: skip


@st.composite
def mutated(draw, data):
    """Bytes of a valid file with a few things done to them."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "bit", "insert", "delete", "cut", "repeat"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(SPECIAL))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 50))]
    return bytes(data)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1e308, "", "None", "../x"])
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                               max_size=3),
    max_leaves=6)  # fmt: skip


def paths(data, prefix=()):
    """All places within a JSON value."""
    yield prefix
    items = enumerate(data) if isinstance(data, list) else ()
    for key, value in data.items() if isinstance(data, dict) else items:
        yield from paths(value, (*prefix, key))


@st.composite
def replaced(draw, data):
    """A JSON value of which one or two places hold something else, or are gone."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = (None, *draw(st.sampled_from(list(paths(data)))))
        holder = {None: data}
        inner = holder
        for key in path:
            inner = inner[key]
        if last is not None and isinstance(inner, dict) and draw(st.integers(0, 3)) == 0:
            del inner[last]
        else:
            inner[last] = draw(ANYTHING)
        data = holder[None]
    return data


def survives(read, *names):
    """`read` returns something or refuses by one of `names`, soon and in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = None
    try:
        with within(20):
            result = read()
    except (ValueError, OSError) as error:
        assert any(str(name) in str(error) for name in names), f"names no file: {error!r:.300}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LIMIT, f"{grown / 2**20:.0f} MB"
    return result


def dumps(value):
    return json.dumps(value).encode()


ROWS = [
    {"id": "a", "problem": "1+2=", "answer": "3", "success": 0.5},
    {"messages": [{"role": "user", "content": "4="}], "answer": 4},
]


@fuzz(150)
@given(rows=st.lists(replaced(ROWS[0]) | replaced(ROWS[1]), min_size=1, max_size=3))
def test_fuzz_prompts(rows, policy, tmp_path_factory):
    """What read_prompts lets through can be rendered and tokenized."""
    file = tmp_path_factory.mktemp("f") / "p.jsonl"
    file.write_bytes(b"\n".join(map(dumps, rows)))
    tokenizer = models.Tokenizer(policy)

    def read():
        prompts = rollouts.read_prompts(file)
        return [rollouts.prompt_tokens(tokenizer, row) for row in prompts]

    for tokens in survives(read, "p.jsonl") or ():
        assert tokens and all(type(t) is int for t in tokens)


@fuzz(150)
@given(content=mutated("\n".join(map(json.dumps, ROWS)).encode()) | st.binary(max_size=60))
def test_fuzz_prompts_bytes(content, tmp_path_factory):
    file = tmp_path_factory.mktemp("f") / "p.jsonl"
    file.write_bytes(content)
    rows = survives(lambda: rollouts.read_prompts(file), "p.jsonl") or []
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(isinstance(row["answer"], str) for row in rows)


RESPONSES = [
    {"problem": "1+2=", "response": "3.", "answer": "3", "logp": [-1.0, -0.5], "finished": True},
    {"prompt_ids": [1, 2, 3], "response_ids": [4, 5], "reward": 0.5, "finished": False},
    {"messages": [{"role": "user", "content": "4="}], "response": "4", "reward": 1},
]


@fuzz(150)
@given(content=st.lists(st.sampled_from(RESPONSES).flatmap(replaced), min_size=1, max_size=3).map(
    lambda rows: b"\n".join(map(dumps, rows))))  # fmt: skip
def test_fuzz_imports(content, policy, tmp_path_factory):
    import_and_load(content, policy, tmp_path_factory.mktemp("f"))


@fuzz(100)
@given(content=mutated("\n".join(map(json.dumps, RESPONSES)).encode()))
def test_fuzz_imports_bytes(content, policy, tmp_path_factory):
    import_and_load(content, policy, tmp_path_factory.mktemp("f"))


def import_and_load(content, policy, folder):
    """What was imported is a batch that can be read."""
    file = folder / "r.jsonl"
    file.write_bytes(content)
    count = survives(
        lambda: rollouts.import_rollouts(file, folder / "batch", policy), "r.jsonl", "batch"
    )
    assert (count is None) == (not (folder / "batch").exists())
    if count:
        consistent(rollouts.load(folder / "batch"))


def consistent(batch):
    """What holds of every batch that was read."""
    assert isinstance(batch.header, dict)
    assert int(batch.cu_seqlens[0]) == 0 and int(batch.cu_seqlens[-1]) == len(batch.tokens)
    assert bool((batch.lengths > batch.prompt_length).all()) and bool((batch.tokens >= 0).all())
    assert len(batch) + 1 == len(batch.cu_seqlens)
    assert bool(((batch.reward >= 0) & (batch.reward <= 1) | batch.reward.isnan()).all())
    assert len(batch.response) == len(batch.sampler_logp) == len(batch.tokens)
    assert bool(batch.sampler_logp.isfinite().all())
    if len(batch):
        rollouts.pack(batch, range(len(batch)), int(batch.lengths.max()))


def fuzz_bytes(valid):
    """Of a safetensors file: mutations of all of it, or of its header with the length kept true."""
    length = struct.unpack("<Q", valid[:8])[0]
    text, data = valid[8 : 8 + length], valid[8 + length :]
    whole = json.loads(text)
    return (
        mutated(valid)
        | mutated(text).map(lambda t: safetensors(t, data))
        | replaced(whole).map(lambda h: safetensors(json.dumps(h), data))
    )


@fuzz(200)
@given(data=st.data())
def test_fuzz_shards(data, batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    file = edit_shard(
        Path(shutil.copyfile(batch / SHARD, folder / SHARD)), metadata={"policy": "p"}
    )
    file.write_bytes(data.draw(fuzz_bytes(file.read_bytes())))
    read = survives(lambda: rollouts.load(folder), folder.name)
    if read is not None:
        consistent(read)


@fuzz(100)
@given(data=st.data())
def test_fuzz_headers(data, batch, tmp_path_factory):
    """What a header that was read says can be used."""
    folder = tmp_path_factory.mktemp("f")
    shutil.copyfile(batch / SHARD, folder / SHARD)
    with safe_open(folder / SHARD, framework="pt") as opened:
        header = json.loads(opened.metadata()["header"])
    header["policy"] = "p"  # and not a folder of another name each time
    edit_shard(folder / SHARD, metadata=json.dumps(data.draw(replaced(header))))
    read = survives(lambda: rollouts.load(folder), folder.name)
    if read is not None:
        assert isinstance(read.header["policy"], str) and isinstance(read.header["source"], str)
        assert 0 < read.header["temperature"] < float("inf")


@fuzz(100)
@given(data=st.data())
def test_fuzz_columns(data, batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    shutil.copyfile(batch / SHARD, folder / SHARD)
    read = rollouts.load(folder)
    read.write_column("a" * 16, 1.0, torch.full((len(read.tokens),), -0.5), "p")
    file = folder / f"logp.{'a' * 16}.t1.safetensors"
    file.write_bytes(data.draw(fuzz_bytes(file.read_bytes())))
    logp = survives(lambda: read.read_column("a" * 16, 1.0), file.name)
    if logp is not None:
        assert logp.shape == read.tokens.shape and logp.dtype == torch.float32
        assert bool(logp.isfinite().all())


@fuzz(80)
@given(data=st.data())
def test_fuzz_weights(data, policy, tmp_path_factory):
    """A checkpoint loads with finite weights of the right shapes, or is refused."""
    folder = Path(shutil.copytree(policy, tmp_path_factory.mktemp("f") / "m"))
    file = folder / "model.safetensors"
    file.write_bytes(data.draw(fuzz_bytes(file.read_bytes())))
    model = survives(lambda: models.load(folder, dtype=torch.float32), str(folder))
    if model is not None:
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    survives(lambda: models.fingerprint(folder), str(folder))


@fuzz(150)
@given(data=st.data())
def test_fuzz_config_json(data, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    config = json.loads((policy / "config.json").read_text())
    (folder / "config.json").write_bytes(dumps(data.draw(replaced(config))))
    read = survives(lambda: models.read_config(folder), "config.json")
    if read is not None and read.layers < 1000:
        assert all(type(x) is int and x > 0 for x in (read.vocab, read.hidden, read.heads))


@fuzz(100)
@given(data=st.data())
def test_fuzz_config_json_bytes(data, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    text = (policy / "config.json").read_bytes()
    (folder / "config.json").write_bytes(data.draw(mutated(text)))
    survives(lambda: models.read_config(folder), "config.json")


@fuzz(100)
@given(data=st.data())
def test_fuzz_index(data, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    index = {"metadata": {"total_size": 5}, "weight_map": {"a": "x.safetensors", "b": "y"}}
    content = data.draw(replaced(index).map(dumps) | mutated(dumps(index)))
    (folder / "model.safetensors.index.json").write_bytes(content)
    for file in survives(lambda: hf.weight_files(folder), str(folder)) or ():
        assert file.parent == folder and file.is_file()


TOKENIZER_FILES = {
    "tokenizer_config.json": {"eos_token": {"content": "."}, "chat_template": "{{ messages }}",
                              "added_tokens_decoder": {"1": {"content": "x"}},
                              "extra_special_tokens": {"a_token": "x"}},
    "special_tokens_map.json": {"eos_token": {"content": "."}, "bos_token": "."},
    "generation_config.json": {"eos_token_id": [2, 3], "pad_token_id": 0},
    "chat_template.json": {"chat_template": "{{ bos_token }}{{ messages[0].content }}"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@fuzz(60)
@given(data=st.data())
def test_fuzz_tokenizer_settings(data, policy, name, tmp_path_factory):
    """Read, and a conversation renders to text or is refused."""
    folder = Path(shutil.copytree(policy, tmp_path_factory.mktemp("f") / "m"))
    valid = TOKENIZER_FILES[name]
    content = data.draw(replaced(valid).map(dumps) | mutated(dumps(valid)))
    (folder / name).write_bytes(content)
    tokenizer = survives(lambda: models.Tokenizer(folder), str(folder))
    if tokenizer is not None:
        assert all(type(i) is int for i in tokenizer.stop)
        text = survives(lambda: tokenizer.render([{"role": "user", "content": "1="}]), "template")
        assert text is None or isinstance(text, str)


@fuzz(80)
@given(data=st.data())
def test_fuzz_tokenizer(data, policy, tmp_path_factory):
    folder = Path(shutil.copytree(policy, tmp_path_factory.mktemp("f") / "m"))
    file = folder / "tokenizer.json"
    valid = json.loads(file.read_text())
    file.write_bytes(data.draw(mutated(dumps(valid)) | replaced(valid).map(dumps)))
    tokenizer = survives(lambda: models.Tokenizer(folder), "tokenizer.json")
    if tokenizer is not None:
        survives(lambda: tokenizer.decode(tokenizer.encode("1+2=")), str(folder))


TEMPLATE = """{%- for m in messages -%}{% if m.role == "user" %}<u>{{ m["content"] | trim }}</u>
{% elif loop.last %}{{ raise_exception("no") }}{% endif %}{%- endfor -%}{% macro f(a) %}
{{ a ~ ns.x }}{% endmacro %}{% set ns = namespace(x=1) %}{{ f(2) }}
{% if add_generation_prompt %}<a>{% endif %}"""


@fuzz(120)
@given(content=mutated(TEMPLATE.encode()))
def test_fuzz_templates(content, policy, tmp_path_factory):
    folder = Path(shutil.copytree(policy, tmp_path_factory.mktemp("f") / "m"))
    (folder / "chat_template.jinja").write_bytes(content)
    tokenizer = survives(lambda: models.Tokenizer(folder), "chat_template.jinja")
    if tokenizer is not None:
        survives(lambda: tokenizer.render([{"role": "user", "content": "1="}]), "template")


@pytest.mark.parametrize("kind", [sample, stage1, stage2, evaluate, erpd],
                         ids=lambda module: module.__name__)  # fmt: skip
@fuzz(60)
@given(data=st.data())
def test_fuzz_toml(data, kind, tmp_path_factory):
    name = {"erpd": "toy/erpd"}.get(kind.__name__, f"toy/{kind.__name__}")
    text = (ROOT / "configs" / f"{name}.toml").read_bytes()
    file = tmp_path_factory.mktemp("f") / "c.toml"
    file.write_bytes(data.draw(mutated(text)))
    with contextlib.suppress(UnicodeDecodeError):
        content = file.read_text()
        if "\r" in content:
            return
    # what a section refuses about its own values names the key
    survives(lambda: options.read_config(kind.Config, file), "c.toml", *KEYS)


KEYS = ("loss.", "train.", "trust.", "signal", "policy", "sampling", "select", "pass_at",
        "check", "stage1", "stage2", "next", "name", "num_prompts", "n must")  # fmt: skip


@fuzz(150)
@given(data=st.data())
def test_fuzz_journals(data, tmp_path_factory):
    """Entries that are read are whole."""
    folder, header = tmp_path_factory.mktemp("f"), {"a": 1}
    bounds = ([0], 2, 20, 32)
    run = rollouts.Journal(folder, 0, header, *bounds).run
    valid = [[run, 0, 0, [1, 2], [-1.0, -2.0], True], [run, 0, 1, [3], [-1.5], False]]
    lines = data.draw(replaced(valid[0]).map(dumps) | mutated(b"\n".join(map(dumps, valid))))
    (folder / "shard-00000.journal").write_bytes(lines + b"\n" + dumps(valid[1]) + b"\n")
    journal = survives(lambda: rollouts.Journal(folder, 0, header, *bounds), "shard-00000.journal")
    for (row, number), (tokens, logp, finished) in (journal.entries if journal else {}).items():
        assert type(row) is int and type(number) is int and isinstance(finished, bool)
        assert tokens and len(tokens) == len(logp)
        assert all(type(t) is int and t >= 0 for t in tokens)


@pytest.fixture
def ranks():
    yield runtime.start()
    while runtime._locks:
        runtime._locks.pop().close()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["run.json", "done.json", "metrics.jsonl"])
@fuzz(60)
@given(data=st.data())
def test_fuzz_run_folders(data, name, ranks, finished_runs, tmp_path_factory):
    """A run folder is opened, or one of its files is named."""
    folder = tmp_path_factory.mktemp("f") / "run"
    shutil.copytree(finished_runs / "killed", folder)
    record = json.loads((folder / "run.json").read_text())
    record["config"]["output"] = str(folder)
    (folder / "run.json").write_text(json.dumps(record))
    config = options._build(stage1.Config, record["config"], "", "record")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    if name == "metrics.jsonl":
        line = data.draw(replaced(json.loads(lines[0])).map(dumps) | mutated(lines[0]))
        content = b"\n".join([line, *lines[1:], b""])
    else:
        valid = record if name == "run.json" else {"config": record["config"], "steps": 2}
        content = data.draw(replaced(valid).map(dumps) | mutated(dumps(valid)))
    (folder / name).write_bytes(content)

    def read():
        while runtime._locks:
            runtime._locks.pop().close()
        return runtime.Run(folder, config, record["inputs"], ranks, may_grow=("steps",))

    run = survives(read, str(folder))
    if run is not None:
        assert all(isinstance(n, int | float) for n in run.norms)


@fuzz(100)
@given(data=st.data())
def test_fuzz_commands(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    valid = {"key": "a" * 24, "phase": "sample", "seconds": 1.5, "arguments": ["x"]}
    content = data.draw(replaced(valid).map(dumps) | mutated(dumps(valid)))
    (folder / "commands.jsonl").write_bytes(content + b"\n")
    made = survives(lambda: driver(folder), "commands.jsonl")
    for entry in made.done.values() if made else ():
        assert isinstance(entry["key"], str) and isinstance(entry["seconds"], int | float)


def test_fuzz_finds_something(tmp_path):
    """The fuzzer's own pieces do what they say: mutations mutate, replacements replace."""
    rng, valid = random.Random(0), dumps(ROWS[0])
    assert set(paths({"a": [1, {"b": 2}]})) == {
        (), ("a",), ("a", 0), ("a", 1), ("a", 1, "b")}  # fmt: skip
    assert rng.random() < 1 and valid
    with pytest.raises(AssertionError, match="names no file"):
        survives(lambda: int("x"), "file")
    with pytest.raises(Hangs), within(0.05):
        while True:
            pass
    write_policy(tmp_path / "p")
    write_batch(tmp_path / "b", tmp_path / "p", prompts=2, n=2)
    consistent(rollouts.load(tmp_path / "b"))
