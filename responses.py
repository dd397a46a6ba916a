"""responses.py - what a policy answered: samples that are kept as they finish, and their rewards.

A folder holds the samples of one checkpoint to the prompts of one benchmark in one way of sampling;
its name is a digest of all that decides them (checkpoint, prompts as tokens, temperature,
truncation and penalties, what ends a response, longest response, seed), and settings.json says it
in words. Lines in rank_000.jsonl ...

    {"problem": 3, "sample": 0, "finished": true, "tokens": [...], "text": "..."}

are of the rank that drew them, each whole or not counted: a killed run goes on where it was, at any
number of ranks, and more samples a problem are drawn to those that are there. Beside them

    rewards_....json    what the grader says of the first n samples of each problem, by a digest of
                        the gold answers, the grader's settings and its very code: verdicts of two
                        graders never mix
    kl_....json         what divergence.py measured of them, by a digest of base and temperature
"""

import hashlib
import json
import os
import re
from array import array
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import durable
import grade
import results
import rollouts
import sample

GRADER = ("grade", "answers", "latex", "values", "sandbox")  # the files that decide a verdict
ADVICE = "delete it, to have it made again"


def digest(value):
    """24 hex digits of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


class Samples:
    """This rank's share of the samples of one folder, of problems rank, rank + world, ...:
    `found` {(problem, sample): (tokens, finished, text)}.
    """

    def __init__(self, folder, ranks, problems, n, longest, vocab):
        self.folder, self.ranks = Path(folder), ranks
        self.file = self.folder / f"rank_{ranks.rank:03d}.jsonl"
        self.mine = range(ranks.rank, problems, ranks.world)
        self.problems, self.n, self.longest, self.vocab, self.found = (
            problems, n, longest, vocab, {})
        if self.file.exists():  # without half a line of a killed run
            whole = self.file.read_bytes().rfind(b"\n") + 1
            os.truncate(self.file, whole)

    def read(self):
        """What any rank has drawn of this rank's problems. ValueError names file and line."""
        for file in sorted(self.folder.glob("rank_*.jsonl")):
            with open(file, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    other = re.match(rb'\{"problem": ([0-9]{1,9}),', line)
                    mine = not other or int(other[1]) in self.mine or (
                        int(other[1]) >= self.problems and self.ranks.rank == 0)
                    if line.endswith(b"\n") and mine:
                        self._take(f"{file}, line {number}", line)

    def _take(self, place, line):
        with durable.reading(place, "delete the file, to draw its samples again"):
            row = json.loads(line.decode("utf-8"))
            problem, j, tokens = row["problem"], row["sample"], row["tokens"]
            durable.require(type(problem) is type(j) is int and 0 <= problem < self.problems
                            and j >= 0, "a sample that was not asked for")
            durable.require(0 < len(tokens) <= self.longest and all(
                type(t) is int and 0 <= t < self.vocab for t in tokens), "no response")
            durable.require(type(row["finished"]) is bool and isinstance(row["text"], str),
                            "no response")
        if problem in self.mine and j < self.n:
            self.found[problem, j] = array("i", tokens), row["finished"], row["text"]

    def add(self, problem, j, tokens, finished, text):
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"problem": problem, "sample": j, "finished": finished,
                                     "tokens": tokens, "text": text}) + "\n")
        self.found[problem, j] = array("i", tokens), finished, text

    @property
    def complete(self):
        return len(self.found) == len(self.mine) * self.n

    def draw(self, model, prompts, s, *, seed, slots, pages, tokenizer, stop_tokens=(),
             stop_strings=()):
        """Draw what is missing; s: the settings of the sampling."""
        self.folder.mkdir(parents=True, exist_ok=True)
        skip = {(place, j) for place, p in enumerate(self.mine) for j in range(self.n)
                if (p, j) in self.found}
        stream = sample.stream(
            model, [prompts[p] for p in self.mine], n=self.n, max_new_tokens=self.longest,
            temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p,
            presence_penalty=s.presence_penalty, repetition_penalty=s.repetition_penalty,
            stop=(*tokenizer.stop, *stop_tokens), stop_strings=stop_strings,
            decode=partial(tokenizer.decode, special=True), seed=seed, slots=slots, pages=pages,
            ids=self.mine, skip=skip)
        for q, j in tqdm(stream, total=len(self.mine) * self.n - len(skip), unit="seq",
                         disable=self.ranks.rank != 0, leave=False, delay=10, mininterval=5,
                         desc=s.name):
            p = self.mine[q.prompt]
            self.add(p, j, q.tokens, q.finished,
                     rollouts.graded_text(tokenizer, prompts[p], q.tokens))


def gather(cells, ranks, problems):
    """{problem: cell} of every rank -> a list, on every rank."""
    pieces = [None] * ranks.world
    dist.all_gather_object(pieces, cells)
    merged = {p: cell for piece in pieces for p, cell in piece.items()}
    return [merged[p] for p in range(problems)]


# ---------------------------------------------------------------- rewards


def rewards_file(folder, rows, n, lenient, grading):
    """Where the rewards of a folder's first n samples are kept."""
    code = [Path(grade.__file__).with_name(f"{name}.py").read_bytes() for name in GRADER]
    golds = [[row.get("answer"), row.get("tests")] for row in rows]
    limits = {name: value for name, value in asdict(grading).items() if "workers" not in name}
    return Path(folder) / "rewards_{}.json".format(digest([
        golds, n, lenient, limits, hashlib.sha256(b"".join(code)).hexdigest()]))


def graded(samples, rows, lenient, grading):
    """Grade this rank's samples: {problem: rewards, lengths, truncated, majority and, of what is
    not right, the answers}.
    """
    cells, n = {}, samples.n
    places = [(p, j) for p in samples.mine for j in range(n)]
    texts = [samples.found[place][2] for place in places]
    rewards = rollouts.rewards([rows[p] for p, _ in places], texts, lenient=lenient,
                               **asdict(grading))
    for i, p in enumerate(samples.mine):
        own = slice(i * n, (i + 1) * n)
        tokens, finished, _ = zip(*(samples.found[place] for place in places[own]), strict=True)
        cell = cells[p] = {"rewards": rewards[own], "lengths": [len(t) for t in tokens],
                           "truncated": finished.count(False), "majority": None}
        if "answer" in rows[p]:
            answers = [grade.extract(text, lenient=lenient) for text in texts[own]]
            cell["majority"] = results.majority(cell["rewards"], groups(cell["rewards"], answers))
            cell["answers"] = [answer and answer[:1000] if reward != 1.0 else None
                               for answer, reward in zip(answers, cell["rewards"], strict=True)]
    return cells


def groups(rewards, answers):
    """Number equal answers alike: those that are right, and the others by grade.equal."""
    seen, numbers = [], []
    for reward, answer in zip(rewards, answers, strict=True):
        if answer is None:
            numbers.append(None)
        elif reward == 1.0:
            numbers.append(-1)
        else:
            same = next((i for i, other in enumerate(seen)
                         if other == answer or grade.equal(answer, other)), len(seen))
            seen += [answer] if same == len(seen) else []
            numbers.append(same)
    return numbers


def read_rewards(file, problems, n):
    """The rewards kept in a file, if they are of so many problems and samples."""
    cells = durable.read_object(file, cells=list)["cells"]
    with durable.reading(file, ADVICE):
        durable.require(len(cells) == problems, f"has {len(cells)} problems")
        for cell in cells:
            durable.require(
                all(x is None or durable.number(x, 0, 1) for x in cell["rewards"])
                and all(durable.number(x, 1) for x in cell["lengths"])
                and len(cell["rewards"]) == len(cell["lengths"]) == n
                and durable.number(cell["truncated"], 0, n)
                and (cell["majority"] is None or durable.number(cell["majority"], 0, 1)),
                str(cell))
            durable.require(all(answer is None or isinstance(answer, str)
                                for answer in cell.get("answers", [])), str(cell))
    return cells


def read_kl(file, problems, n):
    """(what divergence.py measured of each problem, seconds), kept in a file."""
    stored = durable.read_object(file, cells=list)
    with durable.reading(file, ADVICE):
        durable.require(durable.number(stored["seconds"], 0), "seconds")
        durable.require(len(stored["cells"]) == problems, f"has {len(stored['cells'])} problems")
        for cell in stored["cells"]:  # sums of KL and entropy may round to a little below 0
            durable.require(durable.number(cell["kl"], -1) and durable.number(cell["entropy"], -1)
                            and durable.number(cell["kl_sampled"]) and cell["tokens"] > 0
                            and cell["sequences"] == n, str(cell))
    return stored["cells"], stored["seconds"]
