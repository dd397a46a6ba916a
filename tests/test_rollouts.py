"""rollouts.py: the batch on disk and back, malformed files, prompts, packing, columns, import."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import model as models
import rollouts as R
import sandbox
import toy

HEADER = {"policy": "p", "fingerprint": "0123456789abcdef", "temperature": 1.0, "seed": 0,
          "source": "import"}
ROWS = {  # three sequences of 3 + 2, 2 + 1 and 1 + 4 tokens
    "tokens": [[5, 6, 7, 8, 1], [5, 9, 10], [11, 12, 13, 14, 1]], "prompt_length": [3, 2, 1],
    "prompt": [4, 4, 9], "reward": [1.0, None, 0.25], "finished": [True, False, True],
    "sampler_logp": [[0, 0, 0, -0.5, -1.5], [0, 0, -2.0], [0, -0.1, -0.2, -0.3, -0.4]]}
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 15)), min_size=1, max_size=24)


def write(folder, number=0, header=HEADER, **changes):
    R.write_shard(folder, number, header, **{**ROWS, **changes})
    return R.shard_file(folder, number)


def make(shapes, folder="batch"):
    """A batch in memory of (prompt length, response length) shapes; every token is unique."""
    prompt, response = torch.tensor(shapes).T
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), (prompt + response).cumsum(0)))
    T, N = int(cu_seqlens[-1]), len(shapes)
    return R.Batch(folder=folder, header=HEADER, tokens=torch.arange(T, dtype=torch.int32) + 100,
                   cu_seqlens=cu_seqlens, prompt_length=prompt.int(), prompt=torch.arange(N).int(),
                   reward=torch.ones(N), finished=torch.ones(N, dtype=torch.bool),
                   sampler_logp=torch.zeros(T))


def lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def call(monkeypatch, *arguments):
    """rollouts.main() in this process -> exit status."""
    monkeypatch.setattr(sys, "argv", ["rollouts.py", *map(str, arguments)])
    try:
        R.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny random checkpoint folder with the toy task's character tokenizer."""
    folder = tmp_path_factory.mktemp("import") / "policy"
    shape = toy.Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48)
    toy.write_initial_policy(folder, toy.Config(output="", shape=shape))
    return folder


# ---------------------------------------------------------------- prompts


def test_prompts_are_read(tmp_path):
    """A field mapping or a default id that goes astray would grade against the wrong answer."""
    file = lines(tmp_path / "p.jsonl", {"question": "1+1", "gold": 2, "level": 5}, "",
                 {"id": 7, "question": "2+2", "gold": "4"})
    assert R.read_prompts(file, problem="question", answer="gold") == [
        {"question": "1+1", "gold": 2, "level": 5, "id": "0", "problem": "1+1", "answer": "2",
         "place": f"{file}, line 1"},
        {"id": "7", "question": "2+2", "gold": "4", "problem": "2+2", "answer": "4",
         "place": f"{file}, line 3"}]


def test_prompts_may_be_conversations(tmp_path, policy):
    """A row with messages needs no problem, and the template must leave it alone."""
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    file = lines(tmp_path / "p.jsonl", {"messages": messages, "answer": "3"},
                 {"problem": "4+5=", "answer": "9"})
    talk, problem = R.read_prompts(file)
    tokenizer = models.Tokenizer(policy)
    assert talk["messages"] == messages and "problem" not in talk
    assert tokenizer.decode(R.prompt_tokens(tokenizer, talk, "|{problem}|")) == "1+2=3"
    assert tokenizer.decode(R.prompt_tokens(tokenizer, problem, "|{problem}|")) == "|4+5=|"


@pytest.mark.parametrize("prompt, response, want", [
    ("1+1= <think>\n", r"so \boxed{2}. But wait", 0.0),  # cut, or never closed
    ("1+1= <think>\n", r"so \boxed{3}</think> \boxed{2}", 1.0),
    ("1+1= <think>\n", r"so \boxed{2}</think> 3", 0.0),
    ("<think> 1+1= </think>", r"\boxed{2}", 1.0),
    ("1+1=", r"\boxed{2}", 1.0),
])
def test_thinking_that_the_prompt_opened_belongs_to_the_response(prompt, response, want):
    class Tokenizer:
        def decode(self, tokens, special=False):
            text = "".join(map(chr, tokens))
            return text if special else text.replace("</think>", hidden)

    for hidden in ("</think>", ""):  # a tokenizer may count its mark among the special tokens
        text = R.graded_text(Tokenizer(), [*map(ord, prompt)], [*map(ord, response)])
        if hidden:
            assert R.rewards([{"answer": "2"}], [text]) == [want]
        else:
            assert text.startswith("<think>") == (prompt.endswith("<think>\n")
                                                  and "</think>" not in response)


def test_prompts_have_system_switches_and_a_first_word(policy):
    """What surrounds the problem reaches the chat template, in its place; a system message that
    the row brings itself stays."""
    tokenizer = models.Tokenizer(policy)
    tokenizer.template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}|{% endfor %}{{ think }}")
    row, variables = {"problem": "1"}, {"think": "t"}
    chat = {"template": "+{problem}", "system": "2", "variables": variables, "prefix": "="}

    def text(row):
        return tokenizer.decode(R.prompt_tokens(tokenizer, row, **chat), special=True)

    assert text(row) == tokenizer.decode(tokenizer.encode("s2|u+1|t="), special=True)
    own = {"messages": [{"role": "system", "content": "3"}, {"role": "user", "content": "4"}]}
    assert text(own) == tokenizer.decode(tokenizer.encode("s3|u4|t="), special=True)


def test_plain_prompts_get_what_the_tokenizer_adds(policy):
    """A base model without chat template expects its beginning-of-text token; a chat template
    writes it itself."""
    from tokenizers import processors

    tokenizer = models.Tokenizer(policy)
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="_ $A", special_tokens=[("_", 0)])
    row = {"problem": "1+2="}
    assert R.prompt_tokens(tokenizer, row) == [0, *tokenizer.encode("1+2=")]
    tokenizer.template = "{{ messages[0].content }}"
    assert R.prompt_tokens(tokenizer, row) == tokenizer.encode("1+2=")


GOOD = json.dumps({"id": "a", "problem": "1", "answer": "1"}).encode()


@pytest.mark.parametrize("content, message", [
    (GOOD + b"\n{oops\n", r"p\.jsonl, line 2: not a JSON object"),
    (GOOD + b"\n[1]\n", r"p\.jsonl, line 2: not a JSON object"),
    (GOOD + b'\n\n{"problem": "\xff"}', r"p\.jsonl, line 3: not a JSON object: 'utf-8'"),
    (GOOD + b'\n{"problem": "1"}', r"p\.jsonl: field 'answer' is missing \(.*line 2\)"),
    (GOOD + b'\n{"answer": "1"}', r"p\.jsonl: field 'problem' is missing \(.*line 2\)"),
    (GOOD + b"\n" + GOOD, r"p\.jsonl, line 2: id 'a' stands already at .*p\.jsonl, line 1"),
    (GOOD + b"\n" + b"9" * 5000, r"p\.jsonl, line 2: not a JSON object"),
    (b"", r"p\.jsonl: no prompts"), (b"\n \n", r"p\.jsonl: no prompts")])
def test_bad_prompts_name_file_and_line(tmp_path, content, message):
    """Among ten thousand rows an error without its line is useless."""
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        R.read_prompts(tmp_path / "p.jsonl")


def test_missing_prompts_file(tmp_path):
    """A wrong path must be one clear line."""
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read"):
        R.read_prompts(tmp_path / "nowhere.jsonl")


# ---------------------------------------------------------------- the batch on disk


def test_round_trip(tmp_path):
    """A shifted log-prob or a mangled boundary would train on the wrong tokens."""
    write(tmp_path)
    batch = R.load(tmp_path)
    for name, dtype in R.COLUMNS.items():
        assert getattr(batch, name).dtype == dtype
    assert batch.header == {"format": R.FORMAT, **HEADER} and batch.temperature == 1.0
    assert len(batch) == 3 and batch.cu_seqlens.tolist() == [0, 5, 8, 13]
    assert batch.tokens.tolist() == sum(ROWS["tokens"], [])
    assert batch.prompt_length.tolist() == ROWS["prompt_length"]
    assert batch.prompt.tolist() == ROWS["prompt"] and batch.finished.tolist() == ROWS["finished"]
    assert batch.reward.nan_to_num(-1).tolist() == [1.0, -1.0, 0.25]
    assert batch.sampler_logp.equal(torch.tensor(sum(ROWS["sampler_logp"], [])))
    assert batch.response_length.tolist() == [2, 1, 4]
    assert batch.response.tolist() == [x < 0 for x in sum(ROWS["sampler_logp"], [])]
    assert not batch.sampler_logp[~batch.response].any()
    assert [f.name for f in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_shards_are_joined_in_order(tmp_path):
    """Boundaries must be moved by what lies before them, in whatever order files were written."""
    header = {**HEADER, "shards": 3}
    for number in (2, 0, 1):
        write(tmp_path, number, header, prompt=[10 * number, 10 * number, 10 * number + 1])
    batch = R.load(tmp_path)
    assert batch.prompt.tolist() == [0, 0, 1, 10, 10, 11, 20, 20, 21]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 13, 18, 21, 26, 31, 34, 39]
    sequences = [batch.tokens[a:b].tolist() for a, b in batch.cu_seqlens.unfold(0, 2, 1).tolist()]
    assert sequences == ROWS["tokens"] * 3


def test_incomplete_and_empty_folders_are_refused(tmp_path):
    """Training on half a batch, because the sampler was killed, must not happen silently."""
    with pytest.raises(ValueError, match="no rollout shards"):
        R.load(tmp_path)
    header = {**HEADER, "shards": 3}
    write(tmp_path, 0, header)
    write(tmp_path, 2, header)
    with pytest.raises(ValueError, match=f"{tmp_path.name}: 2 of 3 shards"):
        R.load(tmp_path)


@pytest.mark.parametrize("key, value", [("policy", "q"), ("fingerprint", "f" * 16),
                                        ("temperature", 0.6), ("extra", 1)])
def test_mixed_headers_are_refused(tmp_path, key, value):
    """Rollouts of two policies in one folder have no common old policy."""
    write(tmp_path, 0)
    write(tmp_path, 1, {**HEADER, key: value})
    with pytest.raises(ValueError, match=rf"shard-00001\.safetensors: {key} is {value!r}"):
        R.load(tmp_path)


def put(name, index, value):
    def change(columns):
        columns[name][index] = value
    return change


def replace(name, function):
    def change(columns):
        columns[name] = function(columns[name])
    return change


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("reward"), "column reward is missing"),
    (replace("tokens", lambda x: x.long()), "column tokens must be torch.int32"),
    (replace("reward", lambda x: x.double()), "column reward must be torch.float32"),
    (replace("prompt", lambda x: x[:, None].clone()), "column prompt must be"),
    (replace("reward", lambda x: x[:-1].clone()), "column reward has 2 entries, expected 3"),
    (replace("sampler_logp", lambda x: x[1:].clone()), "column sampler_logp has 12 entries"),
    (replace("cu_seqlens", lambda x: x[:-1].clone()), "column cu_seqlens has 3 entries"),
    (put("cu_seqlens", -1, 12), "cu_seqlens must run from 0 to 13"),
    (put("cu_seqlens", 0, 1), "cu_seqlens must run from 0 to 13"),
    (put("cu_seqlens", 1, 9), ", row 1: "),  # not increasing
    (put("prompt_length", 1, 3), ", row 1: the response is empty"),
    (put("prompt_length", 2, 6), ", row 2: the response is empty"),
    (put("prompt_length", 2, 0), ", row 2: the prompt is empty"),
    (put("reward", 2, 1.5), r", row 2: the reward lies outside \[0, 1\]"),
    (put("reward", 0, -0.1), r", row 0: the reward lies outside \[0, 1\]"),
    (put("sampler_logp", 7, float("nan")), ", row 1: a sampler log-prob is not finite"),
    (put("sampler_logp", 8, float("-inf")), ", row 2: a sampler log-prob is not finite"),
    (put("tokens", 12, -1), ", row 2: a token id is negative")])
def test_malformed_columns_name_file_and_row(tmp_path, change, message):
    """What is wrong in a file would otherwise surface as a wrong gradient, or not at all."""
    write(tmp_path, 0)
    file = write(tmp_path, 1)
    columns = {name: getattr(R.load(tmp_path), name) for name in R.COLUMNS}
    columns = {k: x[:len(x) // 2].clone() if k != "cu_seqlens" else x[:4].clone()
               for k, x in columns.items()}
    change(columns)
    save_file(columns, file, metadata={"header": json.dumps({"format": R.FORMAT, **HEADER})})
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors" + ".*" + message):
        R.load(tmp_path)


@pytest.mark.parametrize("metadata, message", [
    (None, "not a rollout shard"), ({"other": "x"}, "not a rollout shard"),
    ({"header": "{"}, "not a rollout shard"), ({"header": json.dumps(HEADER)}, "format"),
    ({"header": json.dumps({"format": 99, **HEADER})}, "format")])
def test_unknown_headers_are_refused(tmp_path, metadata, message):
    """A file of another format, or of something else, must not be read as if it were ours."""
    file = tmp_path / "shard-00000.safetensors"
    save_file({"tokens": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"shard-00000\.safetensors.*{message}"):
        R.load(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:20], lambda b: b"hello " * 9,
                                    lambda b: b""])
def test_damaged_files_are_named(tmp_path, damage):
    """A copy that broke off must be told from a batch."""
    file = write(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors"):
        R.load(tmp_path)


# ---------------------------------------------------------------- packing


def naive_micro_batch(batch, rows):
    """MicroBatch fields by a loop over tokens."""
    tokens, cu_seqlens, scored, segment, place = [], [0], [], [], []
    for b, row in enumerate(rows):
        start, end = batch.cu_seqlens[row:row + 2].tolist()
        for t in range(start, end):
            if t - start >= int(batch.prompt_length[row]):
                scored.append(len(tokens))
                segment.append(b)
                place.append(t)
            tokens.append(int(batch.tokens[t]))
        cu_seqlens.append(len(tokens))
    return {"row": list(rows), "tokens": tokens, "cu_seqlens": cu_seqlens, "scored": scored,
            "segment": segment, "place": place}


@settings(deadline=None, max_examples=40)
@given(shapes=SHAPES, room=st.integers(0, 40), data=st.data())
def test_pack(shapes, room, data):
    """A response token that is missing, doubled or out of place would bias every gradient."""
    batch, longest = make(shapes), max(map(sum, shapes))
    chosen = data.draw(st.lists(st.sampled_from(range(len(shapes))), unique=True))
    micros = R.pack(batch, chosen, longest + room)
    assert sorted(r for m in micros for r in m.row.tolist()) == sorted(chosen)
    for micro in micros:
        assert 0 < len(micro.tokens) <= longest + room
        naive = naive_micro_batch(batch, micro.row.tolist())
        assert {name: value.tolist() for name, value in vars(micro).items()} == naive
    places = sorted(p for m in micros for p in m.place.tolist())
    owner = torch.arange(len(shapes)).repeat_interleave(batch.lengths)
    wanted = batch.response & torch.isin(owner, torch.tensor(chosen, dtype=torch.long))
    assert places == wanted.nonzero()[:, 0].tolist()


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, room=st.integers(0, 40), world=st.integers(1, 4))
def test_plan(shapes, room, world):
    """Ranks that differ in steps wait for each other for ever; a lopsided plan wastes them."""
    batch, longest = make(shapes), max(map(sum, shapes))
    ranks = R.plan(batch, range(len(shapes)), longest + room, world)
    assert len(ranks) == world and len({len(steps) for steps in ranks}) == 1
    rows = [row for steps in ranks for step in steps for row in step]
    assert sorted(rows) == list(range(len(shapes)))
    lengths = batch.lengths.tolist()
    assert all(sum(lengths[r] for r in s) <= longest + room for steps in ranks for s in steps)
    loads = [sum(lengths[r] for step in steps for r in step) for steps in ranks]
    assert max(loads) - min(loads) <= longest
    shares = [list(batch.share(range(len(shapes)), longest + room, r, world)) for r in range(world)]
    assert [[m.row.tolist() for m in share] for share in shares] == ranks


def test_a_sequence_too_long_is_named():
    """Silently dropping the longest sequences would bias the batch to short ones."""
    batch = make([(2, 3), (4, 5), (1, 1)], "some/batch")
    assert len(R.pack(batch, range(3), 9)) == 2
    with pytest.raises(ValueError, match="some/batch: row 1 has 9 tokens.* max_tokens = 8"):
        R.pack(batch, range(3), 8)


def test_an_empty_micro_batch_still_runs():
    """A rank without work must still enter every collective: one dummy token, nothing scored."""
    batch = make([(2, 3)])
    micro = list(batch.share([0], 10, 1, 2))[0]
    assert micro.tokens.shape == (1,) and micro.cu_seqlens.tolist() == [0, 1]
    for name in ("row", "scored", "segment", "place"):
        assert getattr(micro, name).tolist() == [] and getattr(micro, name).dtype == torch.long
    full = R.micro_batch(batch, [0])
    for name, value in vars(full).items():
        assert getattr(micro, name).dtype == value.dtype, name
    assert vars(full.to("cpu")).keys() == vars(full).keys()
    assert R.pack(batch, [], 10) == []


# ---------------------------------------------------------------- columns


def test_columns(tmp_path):
    """A column found under the wrong checkpoint, temperature or batch is a silently wrong ratio."""
    write(tmp_path)
    batch, logp = R.load(tmp_path), -torch.rand(13)
    assert batch.read_column("aa", 1.0) is None
    batch.write_column("aa", 1.0, logp, "runs/teacher")
    batch.write_column("aa", 0.6, 2 * logp, "runs/teacher")
    batch.write_column("bb", 1.0, (3 * logp).double(), "runs/other")
    assert batch.read_column("aa", 1.0).equal(logp)
    assert batch.read_column("aa", 0.6).equal(2 * logp)
    assert batch.read_column("bb", 1.0).dtype == torch.float32
    assert batch.read_column("bb", 0.6) is None
    assert R.load(tmp_path).read_column("aa", 1.0).equal(logp)  # columns are not taken for shards


@pytest.mark.parametrize("changes", [{"reward": [0.0, None, 0.25]}, {"prompt": [4, 5, 9]},
                                     {"tokens": [[5, 6, 7, 8, 2], *ROWS["tokens"][1:]]}])
def test_columns_of_another_batch_are_refused(tmp_path, changes):
    """Log-probs of rollouts that were sampled anew in the same folder are stale."""
    write(tmp_path)
    R.load(tmp_path).write_column("aa", 1.0, torch.zeros(13), "runs/teacher")
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"logp\.aa\.t1\.safetensors: belongs to another batch"):
        R.load(tmp_path).read_column("aa", 1.0)


def test_a_damaged_column_is_named(tmp_path):
    """The way out (delete it) must be said."""
    write(tmp_path)
    batch = R.load(tmp_path)
    batch.write_column("aa", 1.0, torch.zeros(13), "runs/teacher")
    file = tmp_path / "logp.aa.t1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"logp\.aa\.t1\.safetensors: not a readable.*delete it"):
        batch.read_column("aa", 1.0)


# ---------------------------------------------------------------- import and show


def test_import(tmp_path, policy):
    """Rollouts of another engine must come out as if they had been sampled here."""
    tokenizer = models.Tokenizer(policy)
    ids, dot = tokenizer.encode, tokenizer.stop[0]
    file = lines(
        tmp_path / "r.jsonl",
        {"problem": "1+2=", "response": "1+2=3", "answer": "3"},  # text: the stop token is added
        {"prompt": "1+2=", "response": "1+2=4.", "answer": 3},  # the same prompt as final text
        {"prompt_ids": ids("1+2="), "response_ids": ids("3."), "reward": 0.5, "logp": [-1, -0.25]},
        {"messages": [{"role": "user", "content": "4-1="}], "response": "4-1", "answer": "3",
         "finished": False},
        {"problem": "4-1=", "response": "3", "reward": True})
    count = R.import_rollouts(file, tmp_path / "batch", policy, temperature=0.6, lenient=True)
    batch = R.load(tmp_path / "batch")
    assert count == len(batch) == 5
    assert batch.prompt.tolist() == [0, 0, 0, 1, 1] and batch.prompt_length.tolist() == [4] * 5
    assert batch.reward.tolist() == [1.0, 0.0, 0.5, 0.0, 1.0]
    assert batch.finished.tolist() == [True, True, True, False, True]
    pieces = [batch.tokens[a:b].tolist() for a, b in batch.cu_seqlens.unfold(0, 2, 1).tolist()]
    assert pieces == [ids(t) for t in ("1+2=1+2=3.", "1+2=1+2=4.", "1+2=3.", "4-1=4-1", "4-1=3.")]
    assert pieces[0][-1] == dot
    third = batch.sampler_logp[batch.cu_seqlens[2]:batch.cu_seqlens[3]]
    assert third.tolist() == [0, 0, 0, 0, -1, -0.25]
    assert batch.sampler_logp.count_nonzero() == 2
    assert batch.header["fingerprint"] == models.fingerprint(policy)
    assert batch.header["temperature"] == 0.6 and batch.header["source"] == "import"
    with pytest.raises(ValueError, match="already holds a batch"):
        R.import_rollouts(file, tmp_path / "batch", policy)


def test_import_grades_boxes_unless_lenient(tmp_path, policy):
    """The rewards of an imported batch must follow the grader's own rule."""
    file = lines(tmp_path / "r.jsonl", {"problem": "1+2=", "response": "1+2=3", "answer": "3"})
    R.import_rollouts(file, tmp_path / "batch", policy)
    assert R.load(tmp_path / "batch").reward.tolist() == [0.0]


@pytest.mark.parametrize("row, message", [
    ("{", "not a JSON object"),
    ({"response": "3.", "reward": 1}, "needs one of problem, messages, prompt, prompt_ids"),
    ({"problem": "1=", "reward": 1}, "needs response"),
    ({"problem": "1=", "response": 3, "reward": 1}, "needs response"),
    ({"problem": "1=", "response_ids": [], "reward": 1}, "the response must be token ids"),
    ({"problem": "1=", "response_ids": [3, 32], "reward": 1}, r"token ids in \[0, 32\)"),
    ({"problem": "1=", "response_ids": [-1], "reward": 1}, "the response must be token ids"),
    ({"problem": "1=", "response_ids": 3, "reward": 1}, "the response must be token ids"),
    ({"problem": "1=", "response": "", "finished": False, "reward": 1}, "response must be token"),
    ({"prompt_ids": [], "response": "3.", "reward": 1}, "the prompt must be token ids"),
    ({"prompt_ids": ["1"], "response": "3.", "reward": 1}, "the prompt must be token ids"),
    ({"prompt": 5, "response": "3.", "reward": 1}, "prompt"),
    ({"problem": "1=", "response": "3."}, "needs reward, or answer"),
    ({"problem": "1=", "response": "3.", "reward": None}, "needs reward, or answer"),
    ({"problem": "1=", "response": "3.", "reward": 1.01}, r"reward must be a number in \[0, 1\]"),
    ({"problem": "1=", "response": "3.", "reward": -1}, r"reward must be a number in \[0, 1\]"),
    ({"problem": "1=", "response": "3.", "reward": "1"}, r"reward must be a number in \[0, 1\]"),
    ({"problem": "1=", "response": "3.", "reward": [1]}, r"reward must be a number in \[0, 1\]"),
    ({"problem": "1=", "response": "3.", "reward": float("nan")}, "reward must be a number"),
    ({"problem": "1=", "response": "3.", "reward": 1, "logp": [-1.0]}, "logp must hold 2 finite"),
    ({"problem": "1=", "response": "3.", "reward": 1, "logp": []}, "logp must hold 2 finite"),
    ({"problem": "1=", "response": "3.", "reward": 1, "logp": -1.0}, "logp must hold 2 finite"),
    ({"problem": "1=", "response": "3.", "reward": 1, "logp": [0.0, float("-inf")]}, "2 finite"),
    ({"problem": "1=", "response": "3.", "reward": 1, "logp": [0.0, None]}, "2 finite")])
def test_bad_imports_name_file_and_line(tmp_path, policy, row, message):
    """Rows of other tools come in every shape: one line that says which and why, and no batch."""
    good = {"problem": "1+2=", "response": "3.", "reward": 1}
    file = lines(tmp_path / "r.jsonl", good, row, good)
    with pytest.raises(ValueError, match=rf"r\.jsonl, line 2: .*{message}"):
        R.import_rollouts(file, tmp_path / "batch", policy)
    assert not (tmp_path / "batch").exists()


def test_an_empty_import_is_refused(tmp_path, policy):
    """A batch of no rollouts would fail much later."""
    with pytest.raises(ValueError, match=r"r\.jsonl: no responses"):
        R.import_rollouts(lines(tmp_path / "r.jsonl"), tmp_path / "batch", policy)


def test_show(tmp_path, policy, monkeypatch, capsys):
    """What show prints is what a person trusts the rewards by."""
    file = lines(tmp_path / "r.jsonl", {"problem": "1+2=", "response": "3", "reward": 1},
                 {"problem": "1+2=", "response": "4", "reward": 0, "finished": False},
                 {"problem": "4-1=", "response": "h3", "reward": 0.5})
    assert call(monkeypatch, "import", file, tmp_path / "batch", "--policy", policy,
                "--temperature", "1.0") == 0
    assert "3 rollouts written to" in capsys.readouterr().out
    assert call(monkeypatch, "show", tmp_path / "batch", "--count", 9) == 0
    text = capsys.readouterr().out
    assert "3 rollouts of 2 prompts, 18 tokens; mean reward 0.500" in text
    assert "0 undecided; 1 truncated; response length 2.0 (longest 3)" in text
    assert "--- row 1, prompt 0, reward 0 [truncated]\n1+2=\n>>> 4\n" in text
    assert "--- row 2, prompt 1, reward 0.5\n4-1=\n>>> h3.\n" in text
    assert call(monkeypatch, "show", tmp_path / "nothing") == 2
    assert "error: " in capsys.readouterr().err


def test_commands(tmp_path, policy):
    """The two commands as a person types them: exit status 0 with text, 2 with one clear line."""
    write(tmp_path / "batch")
    bad = lines(tmp_path / "bad.jsonl", {"problem": "1=", "response": "3."})
    commands = [["show", tmp_path / "batch", "--policy", policy],
                ["import", bad, tmp_path / "new", "--policy", policy,
                 "--temperature", "1"]]
    running = [subprocess.Popen([sys.executable, "rollouts.py", *map(str, c)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}) for c in commands]
    (out, _), (_, errors) = (process.communicate(timeout=120) for process in running)
    assert [process.returncode for process in running] == [0, 2]
    assert "3 rollouts of 2 prompts, 13 tokens" in out and ">>> " in out
    assert errors.strip() == (
        f"error: {bad}, line 1: needs reward, or answer or tests to grade against")


# ---------------------------------------------------------------- rewards


SUM = {"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}
RIGHT = "```python\nprint(sum(map(int, input().split())))\n```"


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_programs_and_answers_in_one_file(tmp_path):
    """Each row is graded by what it has; the order stays."""
    try:
        sandbox.check()
    except PermissionError as error:
        pytest.skip(str(error))
    check = "def check(f):\n    assert f(2) == 4\n"
    rows = R.read_prompts(write_rows(
        tmp_path / "p.jsonl", {"problem": "1+1", "answer": 2}, {"problem": "add", "tests": SUM},
        {"problem": "def double(x):\n    'twice'\n", "tests": check, "entry_point": "double"},
        {"problem": "add", "tests": json.dumps(SUM)}))
    assert rows[0]["answer"] == "2" and "answer" not in rows[1]
    double = "```python\ndef double(x):\n    return 2 * x\n```"
    assert R.rewards(rows, [r"\boxed{2}", RIGHT, double, RIGHT]) == [1.0] * 4
    assert R.rewards(rows, [RIGHT, double, RIGHT, r"\boxed{3}"]) == [0.0] * 4
    assert R.rewards([rows[1]] * 3, [RIGHT, "print(3)", RIGHT]) == [1.0, 0.0, 1.0]
    assert R.rewards([], []) == []


def test_undecided_is_none(tmp_path):
    (row,) = R.read_prompts(write_rows(tmp_path / "p.jsonl", {"problem": "x", "answer": 1}))
    assert R.rewards([row], [r"\boxed{9^{9^{9^9}}}"]) == [None]
    assert R.rewards([row], ["it is 1"]) == [0.0]
    assert R.rewards([row], ["it is 1"], lenient=True) == [1.0]
    assert R.rewards([row] * 2, [r"\boxed{1}", r"\boxed{2}"], workers=1) == [1.0, 0.0]


@pytest.mark.parametrize("tests, words", [
    ({"inputs": ["1"], "outputs": []}, "as many"), ("{", "JSON"), ([], ""), (7, ""), (None, ""),
    ({"code": "x"}, "entry_point"), ({"inputs": ["1"]}, "outputs"),
    ({"code": "def f(", "entry_point": "f"}, "the code is no Python")])
def test_malformed_tests_are_refused(tmp_path, tests, words):
    """Before anything is sampled, by file and line."""
    file = write_rows(tmp_path / "p.jsonl", {"problem": "x", "answer": "1"},
                      {"problem": "x", "tests": tests})
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: tests: .*{words}"):
        R.read_prompts(file)


def test_a_row_needs_answer_or_tests(tmp_path):
    with pytest.raises(ValueError, match="field 'answer' is missing"):
        R.read_prompts(write_rows(tmp_path / "p.jsonl", {"problem": "x"}))
    row = {"problem": "x", "input_output": SUM}
    file = write_rows(tmp_path / "p.jsonl", row)
    assert R.read_prompts(file, tests="input_output")[0]["tests"] == SUM
