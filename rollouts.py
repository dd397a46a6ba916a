"""rollouts.py - the fixed batch: prompts in, rollouts on disk, micro-batches out.

ERPD trains both stages on one batch of rollouts, written once and never changed. It is a folder of
safetensors shards, each written aside and renamed, so that a killed sampler loses only what was in
flight:

    batch/shard-00000.safetensors
        tokens int32 [T]          prompt + response of every sequence, end to end
        cu_seqlens int64 [N+1]    boundaries
        prompt_length int32 [N]   response = the rest, end-of-sequence included
        prompt int32 [N]          row of the prompts file
        reward float32 [N]        nan: the grader could not decide
        finished bool [N]         false: truncated
        sampler_logp float32 [T]
    batch/logp.<policy>.t<temperature>.safetensors
        a column added later: float32 [T] over all shards

Every token column is aligned with the token it scores (0 on prompt tokens). A shard's metadata
carries the header: policy and its fingerprint, sampling settings, seed, format. Log-prob columns
are named by the fingerprint of the checkpoint that produced them, so several teachers share a
batch without collision.

    python rollouts.py show batch/ --policy POLICY
        # a few rollouts with rewards, and statistics
    python rollouts.py import responses.jsonl batch/ --policy POLICY
        # rollouts sampled elsewhere (vLLM, SGLang)

An imported row holds "problem" (or "messages", or "prompt" as final text, or "prompt_ids"),
"response" (or "response_ids", the stop token included), and optionally "answer" (graded here),
"reward", "logp" [response tokens] and "finished" (default true). Rows with the same prompt form a
group.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import durable
import grade
import hf
import model as models
import sandbox

FORMAT = 1
COLUMNS = {"tokens": torch.int32, "cu_seqlens": torch.int64, "prompt_length": torch.int32,
           "prompt": torch.int32, "reward": torch.float32, "finished": torch.bool,
           "sampler_logp": torch.float32}


# ---------------------------------------------------------------- prompts


def read_json_lines(path):
    """Yield (place, dict) for each line of a JSONL file; ValueError names file and line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a huge number
            raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        yield f"{path}, line {number}", row


def read_prompts(path, *, problem="problem", answer="answer", tests="tests"):
    """A prompts file -> list of rows {"id", "problem" or "messages", "answer" or "tests", ...},
    with their "place" in it.

    `problem`, `answer` and `tests` name the file's own fields; tests (of a program) are what
    sandbox.read_tests takes, or HumanEval's code beside its `entry_point`. ValueError on a row
    without them, or a repeated id.
    """
    rows, seen = [], {}
    for place, row in read_json_lines(path):
        row = {"id": len(rows), **row}
        for name, source in (("problem", problem), ("answer", answer)):
            if source in row:
                row[name] = row[source]
            elif not (name == "problem" and "messages" in row or name == "answer" and tests in row):
                raise ValueError(f"{path}: field {source!r} is missing ({place})")
        check_row(place, row)
        if tests in row:
            row["tests"] = row[tests] if "entry_point" not in row else {
                "code": row[tests], "entry_point": row["entry_point"],
                "prompt": row.get("problem", "")}
            try:
                sandbox.read_tests(row["tests"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
        row |= {name: str(row[name]) for name in ("id", "answer") if name in row}
        row["place"] = place
        if row["id"] in seen:
            raise ValueError(f"{place}: id {row['id']!r:.80} stands already at {seen[row['id']]}")
        seen[row["id"]] = place
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no prompts")
    return rows


def rewards(rows, responses, *, lenient=False, workers=0, seconds=5, code_seconds=6.0,
            code_memory_mb=1024, code_workers=0, allow_unsandboxed=False):
    """Grade responses, each to the prompt's row beside it: a list of 1.0, 0.0 or None (undecided).

    Programs are run by sandbox.py where the row has tests, answers compared by grade.py elsewhere.
    """
    graded, code = [None] * len(rows), [i for i, row in enumerate(rows) if "tests" in row]
    if code:
        tests = {}  # of each row once: there may be megabytes
        for i in code:
            if id(rows[i]) not in tests:
                tests[id(rows[i])] = sandbox.read_tests(rows[i]["tests"])
        verdicts = sandbox.grade_many(
            [responses[i] for i in code], [tests[id(rows[i])] for i in code],
            workers=code_workers or None, seconds=code_seconds, memory_mb=code_memory_mb,
            allow_unsandboxed=allow_unsandboxed)
        for i, verdict in zip(code, verdicts, strict=True):
            graded[i] = verdict
    answers = [i for i, row in enumerate(rows) if "tests" not in row]
    verdicts = grade.grade_many([responses[i] for i in answers],
                                [rows[i]["answer"] for i in answers],
                                lenient=lenient, workers=workers, seconds=seconds)
    for i, verdict in zip(answers, verdicts, strict=True):
        graded[i] = verdict
    return graded


def graded_text(tokenizer, prompt, response):
    """Token ids -> what of a response is graded: its text, behind the `<think>` that its prompt
    ends in while it has not closed that.
    """
    text = tokenizer.decode(response)
    opened = tokenizer.decode(prompt[-16:], special=True).rstrip().endswith("<think>")
    if opened and "</think>" not in tokenizer.decode(response, special=True):
        return "<think>" + text
    return text


def check_row(place, row):
    """ValueError where a field of a prompt or of an imported row is there, but not what it must be.
    """
    def text(value):  # half of a surrogate pair is in JSON, but in no text
        return (isinstance(value, str) and bool(value)
                and not any("\ud800" <= c <= "\udfff" for c in value))

    messages = row.get("messages")
    for name, right, what in (
            ("id", text(row.get("id", 0)) or type(row.get("id", 0)) is int, "text or a number"),
            ("problem", text(row.get("problem", "x")) or "messages" in row, "text, not empty"),
            ("answer", text(row.get("answer", "x")) or durable.number(row.get("answer")),
             "text or a number, not empty"),
            ("response", not row.get("response") or not isinstance(row["response"], str)
             or text(row["response"]), "text"),
            ("messages", "messages" not in row or isinstance(messages, list) and bool(messages)
             and all(isinstance(m, dict) and text(m.get("role")) and isinstance(
                 m.get("content"), str) for m in messages),
             'a list of {"role", "content"}, not empty'),
            ("success", durable.number(row.get("success", 0), 0, 1), "a number in [0, 1]")):
        if not right:
            raise ValueError(f"{place}: {name} must be {what}, not {row[name]!r:.80}")


def check_tokens(place, tokens, vocab, path):
    """ValueError where token ids do not fit a vocabulary: another model's tokenizer made them."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
        raise ValueError(f"{place}: token {max(tokens)} is outside the vocabulary of {vocab}: "
                         f"the tokenizer of {path} does not belong to the model")


def prompt_tokens(tokenizer, row, template="{problem}", system="", variables=None, prefix=""):
    """Token ids of a prompt row: `template` around the problem (or the row's own messages), the
    system message before it, the tokenizer's chat template with its `variables` around both, then
    the answer's `prefix`, unless the template ends in it. A tokenizer without chat template gets
    plain text.
    """
    messages = row.get("messages") or [
        {"role": "user", "content": template.replace("{problem}", str(row["problem"]))}]
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    text = tokenizer.render(messages, **(variables or {}))
    return tokenizer.encode(text if text.endswith(prefix) else text + prefix,
                            special=tokenizer.template is None)


# ---------------------------------------------------------------- the batch


@dataclass(frozen=True)
class Batch:
    """The whole batch in memory; columns as in the module's docstring. N sequences, T tokens."""

    folder: Path
    header: dict
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    prompt_length: torch.Tensor
    prompt: torch.Tensor
    reward: torch.Tensor
    finished: torch.Tensor
    sampler_logp: torch.Tensor

    def __len__(self):
        return len(self.prompt)

    @property
    def temperature(self):
        return self.header["temperature"]

    @cached_property
    def lengths(self):
        return self.cu_seqlens.diff()  # [N]

    @cached_property
    def response_length(self):
        return self.lengths - self.prompt_length  # [N]

    @cached_property
    def response(self):
        """bool [T]: which tokens belong to a response."""
        position = (torch.arange(len(self.tokens))
                    - self.cu_seqlens[:-1].repeat_interleave(self.lengths))
        return position >= self.prompt_length.repeat_interleave(self.lengths)

    @cached_property
    def digest(self):
        """Sixteen hex digits of tokens, boundaries and rewards."""
        digest = hashlib.sha256()
        for column in (self.tokens, self.cu_seqlens, self.prompt_length, self.prompt, self.reward):
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()[:16]

    def share(self, indices, max_tokens, rank, world):
        """This rank's micro-batches of `indices`: an equal number on every rank,
        the last ones perhaps empty.
        """
        return (micro_batch(self, rows) for rows in plan(self, indices, max_tokens, world)[rank])

    def _column_file(self, policy, temperature):
        return self.folder / f"logp.{policy}.t{temperature:g}.safetensors"

    def read_column(self, policy, temperature):
        """Log-probs [T] under the checkpoint with fingerprint `policy`,
        or None if not yet computed.
        """
        file = self._column_file(policy, temperature)
        if not file.is_file():
            return None
        with durable.reading(file, "delete it to have it computed again"):
            with hf.tensors(file) as tensors:
                meta, logp = tensors.metadata(), tensors.get_tensor("logp")
            durable.require(meta["batch"] == self.digest, "belongs to another batch")
            durable.require(meta["fingerprint"] == policy and
                            meta["temperature"] == f"{temperature:g}", "is of another checkpoint")
            durable.require(logp.shape == self.tokens.shape and logp.dtype == torch.float32
                            and bool(logp.isfinite().all()) and float(logp.max()) <= 1e-3,
                            "logp must be float32 log-probs, one a token")
        return logp

    def write_column(self, policy, temperature, logp, path):
        """Keep log-probs [T] of a checkpoint beside the shards."""
        meta = {"policy": str(path), "fingerprint": policy,
                "temperature": f"{temperature:g}", "batch": self.digest}
        durable.write_tensors(self._column_file(policy, temperature),
                              {"logp": logp.float().contiguous()}, meta)


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences packed for one forward pass.

    `row` [B] are their rows in the batch, n counts response tokens.

    tokens [t], cu_seqlens [B+1]; scored [n] places of the response tokens in `tokens`;
    segment [n] their sequence in this micro-batch; place [n] their place in the batch's token
    columns. With no sequence left for this rank it holds one dummy token and n = 0, so that
    collectives still meet.
    """

    row: torch.Tensor
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    scored: torch.Tensor
    segment: torch.Tensor
    place: torch.Tensor

    @property
    def packed(self):
        """(tokens, cu_seqlens, scored) for a method of the model. The boundaries as numbers: FSDP2
        would send a tensor to the GPU, and the model, which looks at them, would wait for it.
        """
        return self.tokens, self.cu_seqlens.tolist(), self.scored

    def to(self, device):
        """On the device, but for cu_seqlens."""
        return MicroBatch(**{
            name: value if name == "cu_seqlens" else send(value, device)
            for name, value in vars(self).items()})


def send(tensor, device):
    """A host tensor to the device, without waiting for what runs there: from pinned memory."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def micro_batch(batch, rows):
    """Pack the given rows of a batch, in order."""
    if not len(rows):
        empty = torch.zeros(0, dtype=torch.long)
        return MicroBatch(empty, torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]),
                          empty, empty, empty)
    row = torch.as_tensor(rows, dtype=torch.long)
    lengths = batch.lengths[row]
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    owner = torch.arange(len(row)).repeat_interleave(lengths)  # [t]
    place = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[owner] + batch.cu_seqlens[row][owner]
    scored = batch.response[place].nonzero()[:, 0]
    return MicroBatch(row, batch.tokens[place], cu_seqlens, scored, owner[scored], place[scored])


def pack(batch, indices, max_tokens):
    """Micro-batches of whole sequences, at most max_tokens tokens each, covering `indices` once."""
    return [micro_batch(batch, rows) for rows in plan(batch, indices, max_tokens, 1)[0]]


def require_fit(batch, indices, max_tokens):
    """ValueError if a sequence is longer than a micro-batch may be."""
    row = max(map(int, indices), key=lambda i: int(batch.lengths[i]), default=None)
    if row is not None and batch.lengths[row] > max_tokens:
        raise ValueError(f"{batch.folder}: row {row} has {int(batch.lengths[row])} tokens, "
                         f"more than max_tokens = {max_tokens}; one sequence must fit a micro-batch"
                         " (raise max_tokens, or sample with a smaller max_new_tokens)")


def plan(batch, indices, max_tokens, world):
    """Share rows over ranks and micro-steps: [world][steps] lists of rows, balanced by tokens.

    Every rank gets the same number of steps (some may be empty). Longest first: to the rank with
    the fewest tokens, there into the first micro-batch with room. ValueError for a sequence longer
    than max_tokens.
    """
    require_fit(batch, indices, max_tokens)
    lengths = batch.lengths.tolist()
    load, steps, room = [0] * world, [[] for _ in range(world)], [[] for _ in range(world)]
    for row in sorted((int(i) for i in indices), key=lambda i: -lengths[i]):
        n = lengths[row]
        rank = load.index(min(load))
        load[rank] += n
        step = next((s for s, free in enumerate(room[rank]) if free >= n), None)
        if step is None:
            steps[rank].append([row])
            room[rank].append(max_tokens - n)
        else:
            steps[rank][step].append(row)
            room[rank][step] -= n
    most = max(len(s) for s in steps)
    return [s + [[]] * (most - len(s)) for s in steps]


# ---------------------------------------------------------------- on disk


def write_shard(folder, number, header, *,
                tokens, prompt_length, prompt, reward, finished, sampler_logp):
    """Write one shard from lists: tokens and sampler_logp are lists of sequences,
    the others of numbers.

    reward may hold None (undecided). The file appears whole or not at all.
    """
    lengths = torch.tensor([len(t) for t in tokens])
    columns = {
        "tokens": torch.tensor([t for sequence in tokens for t in sequence]),
        "cu_seqlens": torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))),
        "prompt_length": torch.tensor(prompt_length), "prompt": torch.tensor(prompt),
        "reward": torch.tensor([float("nan") if r is None else r for r in reward]),
        "finished": torch.tensor(finished),
        "sampler_logp": torch.tensor([x for sequence in sampler_logp for x in sequence]),
    }
    columns = {name: column.to(COLUMNS[name]) for name, column in columns.items()}
    durable.write_tensors(shard_file(folder, number), columns,
           {"header": json.dumps({"format": FORMAT, **header}, sort_keys=True)})


def shard_file(folder, number):
    return Path(folder) / f"shard-{number:05d}.safetensors"


class Journal:
    """Finished responses of a shard that is not complete yet, a line each, so that a killed sampler
    loses only what was in flight. Removed once the shard is written.
    """

    def __init__(self, folder, number, header, rows, n, longest, vocab):
        """`entries`: {(prompt row, sample): (tokens, logp, finished)} of an earlier start with the
        same header; a half line at the end, or another header's lines, count for nothing.

        `rows` are the shard's prompts, `n`, `longest` and `vocab` bound what a response may be.
        """
        self.file = Path(folder) / f"shard-{number:05d}.journal"
        self.run = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        self.entries = {}
        kept = []
        for place, line in durable.whole_lines(self.file):
            with durable.reading(place):
                run, row, sample, tokens, logp, finished = line
                kept.append(json.dumps(line) + "\n")
                if run != self.run:
                    continue
                durable.require(row in rows and type(row) is type(sample) is int
                                and 0 <= sample < n, "a response that was not asked for")
                durable.require(0 < len(tokens) == len(logp) <= longest and all(
                    type(t) is int and 0 <= t < vocab for t in tokens), "no response")
                durable.require(type(finished) is bool and all(
                    durable.number(x, high=1e-3) for x in logp), "no log-probs")
                self.entries[row, sample] = (tokens, logp, finished)
        if self.file.exists():  # without half a line: what follows must begin one of its own
            durable.write_text(self.file, "".join(kept))

    def add(self, row, sample, tokens, logp, finished):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as stream:
            stream.write(json.dumps([self.run, row, sample, tokens, logp, finished]) + "\n")

    def remove(self):
        self.file.unlink(missing_ok=True)


def read_header(file):
    """The header that a shard carries."""
    with hf.tensors(file) as tensors:
        try:
            header = json.loads((tensors.metadata() or {})["header"])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not a rollout shard ({error!r:.120})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a rollout shard (its header is {header!r:.40})")
    if header.get("format") != FORMAT:
        raise ValueError(f"{file}: batch format {header.get('format')!r:.40}, this code reads "
                         f"{FORMAT}")
    for key in ("policy", "fingerprint", "source"):
        if not isinstance(header.get(key), str) or not header[key]:
            raise ValueError(f"{file}: {key} of the header must be text, "
                             f"not {header.get(key)!r:.80}")
    if not durable.number(header.get("temperature"), 1e-6, 1e6):
        raise ValueError(f"{file}: temperature of the header must be a number above 0, "
                         f"not {header.get('temperature')!r:.80}")
    return header


def load(folder):
    """Read a batch folder -> Batch. ValueError names the file, and the row where there is one."""
    folder = Path(folder)
    files = sorted(folder.glob("shard-*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no rollout shards (shard-*.safetensors)")
    header, parts = read_header(files[0]), []
    for file in files:
        theirs = read_header(file)
        if different := [key for key in {*header, *theirs} if header.get(key) != theirs.get(key)]:
            key = sorted(different)[0]
            raise ValueError(f"{file}: {key} is {theirs.get(key)!r:.80}, "
                             f"but {header.get(key)!r:.80} in {files[0].name}: "
                             "shards of different runs lie in one folder")
        with hf.tensors(file) as tensors:
            if missing := set(COLUMNS) - set(tensors.keys()):
                raise ValueError(f"{file}: column {sorted(missing)[0]} is missing")
            parts.append({name: tensors.get_tensor(name) for name in COLUMNS})
        _check(file, parts[-1])
    expected = header.get("shards", len(files))
    if len(files) != expected:
        raise ValueError(f"{folder}: {len(files)} of {expected} shards are here; "
                         "run the sampler again to finish it")
    offset, cu_seqlens = 0, [torch.zeros(1, dtype=torch.long)]
    for part in parts:
        cu_seqlens.append(part["cu_seqlens"][1:] + offset)
        offset = int(cu_seqlens[-1][-1])
    columns = {name: torch.cat([part[name] for part in parts])
               for name in COLUMNS if name != "cu_seqlens"}
    return Batch(folder=folder, header=header, cu_seqlens=torch.cat(cu_seqlens), **columns)


def _check(file, part):
    for name, dtype in COLUMNS.items():
        if part[name].dtype != dtype or part[name].ndim != 1:
            raise ValueError(f"{file}: column {name} must be {dtype} [.], "
                             f"not {part[name].dtype} {list(part[name].shape)}")
    T, N, cu = len(part["tokens"]), len(part["prompt"]), part["cu_seqlens"]
    sizes = {"cu_seqlens": N + 1, "prompt_length": N, "reward": N, "finished": N, "sampler_logp": T}
    for name, size in sizes.items():
        if len(part[name]) != size:
            raise ValueError(
                f"{file}: column {name} has {len(part[name])} entries, expected {size}")
    if int(cu[0]) != 0 or int(cu[-1]) != T:
        raise ValueError(f"{file}: cu_seqlens must run from 0 to {T}, "
                         f"not {int(cu[0])} to {int(cu[-1])}")
    if not N:
        raise ValueError(f"{file}: holds no sequences")
    rows = {
        "the prompt's number is negative": part["prompt"] < 0,
        "the response is empty": cu.diff() <= part["prompt_length"],
        "the prompt is empty": part["prompt_length"] < 1,
        "the reward lies outside [0, 1]": (part["reward"] < 0) | (part["reward"] > 1),
    }
    for complaint, bad in rows.items():
        if bad.any():
            raise ValueError(f"{file}, row {int(bad.nonzero()[0, 0])}: {complaint}")
    for complaint, bad in {
            "a token id is negative": part["tokens"] < 0,
            "a sampler log-prob is not finite": ~part["sampler_logp"].isfinite()}.items():
        if bad.any():
            row = int(torch.searchsorted(cu, bad.nonzero()[0, 0], right=True)) - 1
            raise ValueError(f"{file}, row {row}: {complaint}")


# ---------------------------------------------------------------- import rollouts, look at them


def import_rollouts(responses, folder, policy, *, temperature=1.0, lenient=False, **chat):
    """A JSONL file of responses sampled elsewhere -> a batch folder; returns how many there are.

    `chat`: as prompt_tokens takes it.
    """
    if not durable.number(temperature, 1e-6, 1e6):
        raise ValueError(f"the temperature must be a number above 0, not {temperature}")
    if shard_file(folder, 0).exists():
        raise ValueError(f"{folder}: already holds a batch; choose a new folder")
    tokenizer, vocab = models.Tokenizer(policy), models.read_config(policy).vocab
    groups, columns = {}, {name: [] for name in ("tokens", "prompt_length", "prompt", "reward",
                                                 "finished", "sampler_logp")}
    waiting = []  # (row number, row, text) to be graded, together: tests may run for seconds

    def grade_waiting():
        numbers, rows, texts = zip(*waiting, strict=True)
        verdicts = rewards(rows, texts, lenient=lenient, workers=2)
        for number, verdict in zip(numbers, verdicts, strict=True):
            columns["reward"][number] = verdict
        waiting.clear()

    for place, row in read_json_lines(responses):
        check_row(place, row)
        prompt = row.get("prompt_ids")
        if prompt is None and isinstance(row.get("prompt"), str):
            prompt = tokenizer.encode(row["prompt"])
        elif prompt is None:
            if "problem" not in row and "messages" not in row:
                raise ValueError(f"{place}: needs one of problem, messages, prompt, prompt_ids")
            prompt = prompt_tokens(tokenizer, row, **chat)
        finished = row.get("finished", True)
        if type(finished) is not bool:
            raise ValueError(f"{place}: finished must be true or false, not {finished!r:.80}")
        response = row.get("response_ids")
        if response is None:
            if not isinstance(row.get("response"), str):
                raise ValueError(f"{place}: needs response (text) or response_ids")
            response = tokenizer.encode(row["response"])
            if finished and tokenizer.stop and (not response or response[-1] not in tokenizer.stop):
                response = [*response, tokenizer.stop[0]]  # engines leave it out of the text
        for name, ids in (("prompt", prompt), ("response", response)):
            if not isinstance(ids, list) or not ids or not all(
                    type(t) is int and 0 <= t < vocab for t in ids):
                raise ValueError(
                    f"{place}: the {name} must be token ids in [0, {vocab}) and not empty")
        reward = row.get("reward")
        if reward is None and ("answer" in row or "tests" in row):
            if "tests" not in row:
                row["answer"] = str(row["answer"])
            else:
                try:
                    sandbox.read_tests(row["tests"])
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
            waiting.append((len(columns["reward"]), row, graded_text(tokenizer, prompt, response)))
        elif reward is None:
            raise ValueError(f"{place}: needs reward, or answer or tests to grade against")
        if not (reward is None or type(reward) is bool or durable.number(reward, 0, 1)):
            raise ValueError(f"{place}: reward must be a number in [0, 1], not {reward!r:.80}")
        logp = [0.0] * len(response) if row.get("logp") is None else row["logp"]
        if not isinstance(logp, list) or len(logp) != len(response) or not all(
                durable.number(x, high=1e-3) for x in logp):  # rounding may pass 0
            raise ValueError(f"{place}: logp must hold {len(response)} finite log-probs, "
                             "one a response token")
        columns["tokens"].append([*prompt, *response])
        columns["prompt_length"].append(len(prompt))
        columns["prompt"].append(groups.setdefault(tuple(prompt), len(groups)))
        columns["reward"].append(reward)
        columns["finished"].append(finished)
        columns["sampler_logp"].append([0.0] * len(prompt) + logp)
        if len(waiting) == 1024:
            grade_waiting()
    if not groups:
        raise ValueError(f"{responses}: no responses")
    if waiting:
        grade_waiting()
    header = {"policy": str(policy), "fingerprint": models.fingerprint(policy),
              "temperature": float(temperature), "source": "import", "shards": 1}
    write_shard(folder, 0, header, **columns)
    return len(columns["prompt"])


def show(folder, policy=None, count=3):
    """Print a batch's header, statistics and a few rollouts
    (as text if a policy's tokenizer is given).
    """
    batch = load(folder)
    policy = policy or batch.header["policy"]
    tokenizer = models.Tokenizer(policy)
    check_tokens(folder, [int(batch.tokens.min()), int(batch.tokens.max())],
                 models.read_config(policy).vocab, policy)
    print(json.dumps(batch.header, indent=2))
    reward = batch.reward.nan_to_num()
    groups = torch.unique(batch.prompt)
    mean = torch.stack([reward[batch.prompt == g].mean() for g in groups])
    print(f"{len(batch)} rollouts of {len(groups)} prompts, {len(batch.tokens)} tokens; "
          f"mean reward {reward.mean():.3f}; "
          f"{((mean > 0) & (mean < 1)).float().mean():.0%} of the prompts have both outcomes; "
          f"{int(batch.reward.isnan().sum())} undecided; {int((~batch.finished).sum())} truncated; "
          f"response length {batch.response_length.float().mean():.1f} "
          f"(longest {int(batch.response_length.max())})")
    for row in torch.linspace(0, len(batch) - 1, min(count, len(batch))).long().tolist():
        lo, hi = batch.cu_seqlens[row:row + 2].tolist()
        cut = lo + int(batch.prompt_length[row])
        end = "" if batch.finished[row] else " [truncated]"
        print(f"\n--- row {row}, prompt {int(batch.prompt[row])}, "
              f"reward {float(batch.reward[row]):g}{end}")
        print(tokenizer.decode(batch.tokens[lo:cut].tolist(), special=True))
        print(">>>", tokenizer.decode(batch.tokens[cut:hi].tolist(), special=True))


def main():
    parser = argparse.ArgumentParser(
        description="Look at a batch of rollouts, or make one from responses sampled elsewhere.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("show", help="print statistics and a few rollouts")
    look.add_argument("batch")
    look.add_argument("--policy", help="checkpoint folder whose tokenizer to use; "
                                       "default: the one named in the batch")
    look.add_argument("--count", type=int, default=3)
    bring = commands.add_parser("import", help="make a batch from a JSONL file of responses")
    bring.add_argument("responses")
    bring.add_argument("batch")
    bring.add_argument("--policy", required=True, help="checkpoint folder that sampled them")
    bring.add_argument("--temperature", type=float, required=True,
                       help="temperature they were sampled at; all log-probs are taken at it")
    bring.add_argument("--template", default="{problem}", help="text around the problem")
    bring.add_argument("--system", default="", help="system message")
    bring.add_argument("--variables", default={}, type=json.loads, metavar="JSON",
                       help="switches of the chat template")
    bring.add_argument("--prefix", default="", help="how every answer begins, part of the prompt")
    bring.add_argument("--lenient", action="store_true", help="grade unboxed answers too")
    args = parser.parse_args()
    try:
        if not isinstance(getattr(args, "variables", {}), dict):
            raise ValueError(f"--variables must be a JSON object, not {args.variables!r:.80}")
        if args.command == "show":
            show(args.batch, args.policy, args.count)
        else:
            count = import_rollouts(
                args.responses, args.batch, args.policy, temperature=args.temperature,
                lenient=args.lenient, template=args.template, system=args.system,
                variables=args.variables, prefix=args.prefix)
            print(f"{count} rollouts written to {args.batch}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
