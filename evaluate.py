"""evaluate.py - what a policy can do and what it cost: AVG@K, pass@k, KL to the base, entropy,
length, on one or several benchmarks. results.py makes numbers, tables and plots of it.

For each policy and benchmark

    samples     K responses to each problem are drawn and kept (responses.py): a killed evaluation
                goes on where it was, at any number of ranks
    rewards     each is graded (grade.py; programs by sandbox.py). A new grader grades the kept
                samples anew, without drawing any; `--regrade` has the same one do it again
    KL          reverse KL(pi || base), exact over the vocabulary at every token of the *new*
                policy's own samples (divergence.py)

Checkpoints are scored here, never inside a training loop. Problems come from a prompts file, or
from [[benchmark]] sections that name sets of configs/problems.toml, with the sampling that is usual
for each. A [[policy]] path may be a checkpoint or a run folder, which stands for all its step_*
checkpoints. [[select]] picks a checkpoint of a run by a rule and writes rule and outcome into
report.json: "best" (accuracy on these problems; use validation prompts, disjoint from the test),
"last", or "unlearned" (the checkpoint of steps 10-30 with the lowest mean probability on positives,
from metrics.jsonl). [[compare]] gives the paired difference of two policies. [judge] asks a
language model about the answers that the grader does not accept; both numbers are reported.

KL efficiency speaks of one distribution, so it is given only where a sampling is untruncated at the
temperature of KL. The base's success it needs is the "success" field of the prompts file where it
has one (toy.py: exact for the demonstrators, whom the base imitates); else an estimate from the
base's own samples, in which prompts never solved cannot rise.

    torchrun --nproc-per-node 2 evaluate.py --config configs/toy/evaluate.toml
        # report.json, report.md, plot.png, curves.png
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import divergence
import durable
import hf
import judge
import memory
import mixing
import model as models
import options
import problems
import responses
import results
import rollouts
import runtime
import sample
import sandbox
from options import key, section


@dataclass(frozen=True)
class Policy:
    name: str = key(help="name of the row, or of the run's rows")
    path: str = key(help="checkpoint folder, or run folder with step_* checkpoints")
    role: str = key(
        "policy", "base, teacher, student, control or policy: how it is drawn and compared")
    round: int = key(0, "round of erpd.py")

    def __post_init__(self):
        options.one_of("policy.role", self.role,
                       ("policy", "base", "teacher", "student", "control"))


@dataclass(frozen=True)
class Sampling:
    name: str = key(help="column of the table")
    temperature: float = key(1.0, "0: greedy")
    top_p: float = key(1.0, "nucleus")
    top_k: int = key(0, "0: off")
    min_p: float = key(0.0, "0: off")
    presence_penalty: float = key(0.0, "off the logits of tokens that the response has already")
    repetition_penalty: float = key(1.0, "divides the logits of those that it or the prompt has")
    n: int = key(4, "samples a prompt: the K of AVG@K (paper: 32; greedy needs 1)")

    def __post_init__(self):
        for name, bounds in (("temperature", dict(least=0)), ("top_p", dict(above=0, most=1)),
                             ("top_k", dict(least=0)), ("min_p", dict(least=0, most=1)),
                             ("presence_penalty", {}), ("repetition_penalty", dict(above=0)),
                             ("n", dict(least=1))):
            options.in_range(f"sampling.{name}", getattr(self, name), **bounds)


@dataclass(frozen=True)
class Select:
    run: str = key(help="name of a [[policy]] that is a run folder; with its round, 'x (round 2)', "
                        "where there are several")
    rule: str = key("best", "best, last or unlearned")

    def __post_init__(self):
        options.one_of("select.rule", self.rule, ("best", "last", "unlearned"))


@dataclass(frozen=True)
class Compare:
    policy: str = key(help="name of a [[policy]], with its round, 'x (round 2)', from the second "
                           "on; its last checkpoint counts")
    against: str = key("base", "name of another, the same")


@dataclass(frozen=True)
class Benchmark:
    name: str = key(help="a set of configs/problems.toml (python problems.py list), or any name")
    prompts: str = key("", "local file; empty: fetched where the set is published")
    n: int = key(0, "samples a problem (greedy: 1); 0: as [[sampling]] or the table says")
    template: str = key("", "the user's turn; empty: the table's for programs, else that of "
                            "[chat], else the table's")

    def __post_init__(self):
        options.in_range("benchmark.n", self.n, least=0)


@dataclass(frozen=True)
class Judge:
    endpoint: str = key("", "https://host/v1 of an OpenAI-compatible server; empty: no judge")
    model: str = key("", "its name there")
    budget: int = key(1000, "most requests of a run; without a verdict for every answer that the "
                            "grader does not accept, no judged number is given")
    key_env: str = key("OPENAI_API_KEY", "environment variable that holds the key")
    max_tokens: int = key(4096, "longest reply")

    def __post_init__(self):
        if bool(self.endpoint) != bool(self.model):
            raise ValueError("judge needs endpoint and model, both of them")
        for name in ("budget", "max_tokens"):
            options.in_range(f"judge.{name}", getattr(self, name), least=1)


@dataclass(frozen=True)
class Config:
    base: str = key(help="checkpoint folder that KL is measured to: the very first policy")
    output: str = key(help="folder for report.json, report.md, plot.png, samples")
    samples: str = key("", "folder where samples are kept, which evaluations may share one after "
                           "another; empty: output/samples")
    prompts: str = key("", "JSONL file of prompts with answers (or tests), or else:")
    benchmark: list[Benchmark] = key([], "[[benchmark]] sections")
    policy: list[Policy] = key([], "one or more [[policy]] sections; the base is always evaluated")
    sampling: list[Sampling] = key([], "[[sampling]] sections; the first is the row's main "
                                       "accuracy; none: as each benchmark's table says")
    select: list[Select] = key([], "[[select]] sections")
    compare: list[Compare] = key([], "[[compare]] sections")
    stop_tokens: list[int] = key([], "token ids that end a response, beside the model's own")
    stop_strings: list[str] = key([], "texts that end a response, and stay in it")
    max_new_tokens: int = key(0, "longest response; 0: as the benchmark's table says, else 32768")
    kl_temperature: float = key(1.0, "temperature at which KL and entropy are sampled and scored")
    kl_samples: int = key(
        1, "samples a prompt for KL, if no [[sampling]] is untruncated at that temperature")
    pass_at: list[int] = key([1, 4], "k of pass@k, for the first [[sampling]]")
    limit: int = key(0, "use only the first problems; 0: all")
    seed: int = key(0, "of every sample")
    max_tokens: int = key(32768, "tokens of a forward pass when KL is scored")
    problem: str = key("problem", "name of the problem field in the prompts file")
    answer: str = key("answer", "name of the answer field")
    tests: str = key("tests", "name of the field of a program's tests")
    lenient: bool = key(False, "grade unboxed answers too (base models)")
    regrade: bool = key(False, "grade the kept samples again")
    slots: int = key(0, "sequences decoded at a time; 0: as many as fit")
    plot: bool = key(True, "draw plot.png and curves.png (needs matplotlib)")
    chat: runtime.Chat = section(runtime.Chat)
    grading: runtime.Grading = section(runtime.Grading)
    judge: Judge = section(Judge)

    def __post_init__(self):
        if bool(self.prompts) == bool(self.benchmark):
            raise ValueError("give prompts, or [[benchmark]] sections, one of them")
        if not self.sampling and not self.benchmark:
            raise ValueError("at least one [[sampling]] section is needed")
        names = [b.name for b in self.benchmark]
        if bad := [n for n in names if names.count(n) > 1 or not n.replace("_", "").isalnum()]:
            raise ValueError(f"benchmark.name {bad[0]!r:.80} is used twice, or is not made of "
                             "letters, digits and _")
        names = [s.name for s in self.sampling]
        if repeated := [n for n in names if names.count(n) > 1 or n in ("kl", "divergence")]:
            raise ValueError(f"sampling.name {repeated[0]!r} is used already; choose another")
        most = self.sampling[0].n if self.sampling else 1 << 30
        if beyond := [k for k in self.pass_at if not 1 <= k <= most]:
            raise ValueError(f"pass_at {beyond[0]} needs that many samples, "
                             f"the first [[sampling]] has n = {most}")
        for name in ("max_new_tokens", "limit", "slots", "seed"):
            options.in_range(name, getattr(self, name), least=0)
        for name in ("max_tokens", "kl_samples"):
            options.in_range(name, getattr(self, name), least=1)
        options.in_range("kl_temperature", self.kl_temperature, above=0)


# ---------------------------------------------------------------- what is evaluated


class Task(NamedTuple):
    """A benchmark as it is run: its problems, how they are sampled, how they become prompts."""

    name: str
    rows: list[dict]
    sampling: list[Sampling]
    chat: runtime.Chat
    max_new_tokens: int


def tasks(cfg, ranks):
    """The benchmarks of a config, read or fetched: a list of Tasks."""
    found, sets = [], problems.entries() if cfg.benchmark else {}
    for b in cfg.benchmark or [Benchmark("prompts", cfg.prompts)]:
        entry = sets.get(b.name)
        sampling, longest, template = cfg.sampling, cfg.max_new_tokens or 32768, b.template
        if entry is None:
            if not b.prompts:
                problems.entry(b.name)  # says which there are
            rows = rollouts.read_prompts(
                b.prompts, problem=cfg.problem, answer=cfg.answer, tests=cfg.tests)
        else:
            rows = [row | {"place": f"{b.name}, problem {i}"}
                    for i, row in enumerate(problems.rows(entry, b.prompts))]
            if entry.size and len(rows) != entry.size:
                ranks.print(f"note: {b.name} has {len(rows)} problems here, as published "
                            f"{entry.size}")
            sampling = sampling or [Sampling(f"AVG@{b.n or entry.k}", entry.temperature,
                                             entry.top_p, n=entry.k)]
            longest = cfg.max_new_tokens or entry.max_new_tokens
            if not template and (entry.tests or cfg.chat.template == runtime.Chat.template):
                template = entry.prompt
        if not sampling:
            raise ValueError(f"benchmark {b.name} is not in configs/problems.toml: "
                             "it needs a [[sampling]] section")
        if b.n:
            sampling = [replace(s, n=b.n if s.temperature else 1) for s in sampling]
        found.append(Task(b.name, rows[:cfg.limit or None], sampling, replace(
            cfg.chat, template=template or cfg.chat.template), longest))
    if any("tests" in row for task in found for row in task.rows):
        sandbox.check(cfg.grading.allow_unsandboxed)  # before anything is sampled
    return found


def untruncated(cfg, sampling):
    """Name of the sampling drawn as KL is scored (its temperature, nothing else), or None."""
    return next((s.name for s in sampling if s == Sampling(
        s.name, temperature=cfg.kl_temperature, n=s.n)), None)


def drawn(cfg, task):
    """The samplings of a task, with a pass of its own for KL where none serves; its name."""
    plain = untruncated(cfg, task.sampling)
    if plain:
        return task.sampling, plain
    return [*task.sampling, Sampling("kl", temperature=cfg.kl_temperature, n=cfg.kl_samples)], "kl"


# ---------------------------------------------------------------- a policy


class Job(NamedTuple):
    """A task for one checkpoint: prompts as tokens, the folder of each sampling, and the files that
    say what came out of it.
    """

    task: Task
    prompts: list[list[int]]
    sampling: dict[str, Sampling]  # with a pass of its own for KL, where none serves
    plain: str  # the one that KL is measured of
    folder: dict[str, Path]
    rewards: dict[str, Path]  # of the task's own samplings
    kl: Path


def job(cfg, task, path, checkpoint, base):
    """What there is to do for one checkpoint and task. checkpoint, base: fingerprints."""
    config, tokenizer = models.read_config(path), models.Tokenizer(path)
    prompts = [rollouts.prompt_tokens(tokenizer, row, **asdict(task.chat)) for row in task.rows]
    sample.check_prompts(task.rows, prompts, tokenizer, config.vocab, cfg.stop_tokens)
    if (vocab := models.read_config(cfg.base).vocab) != config.vocab:
        raise ValueError(f"{path}: has a vocabulary of {config.vocab}, the base of {vocab}: "
                         "there is no KL between them")
    samplings, plain = drawn(cfg, task)
    stop = [*tokenizer.stop, *cfg.stop_tokens, *cfg.stop_strings]
    decides = responses.digest([checkpoint, prompts, stop, task.max_new_tokens,
                                cfg.seed])
    folder = {s.name: Path(cfg.samples or f"{cfg.output}/samples") / responses.digest([
        decides, {**asdict(s), "name": "", "n": 0}]) for s in samplings}
    rewards = {s.name: responses.rewards_file(
        folder[s.name], task.rows, s.n, cfg.lenient, cfg.grading) for s in task.sampling}
    sampling = {s.name: s for s in samplings}
    kl = responses.digest([base, sampling[plain].n, cfg.kl_temperature])
    return Job(task, prompts, sampling, plain, folder, rewards, folder[plain] / f"kl_{kl}.json")


def measure(path, cfg, ranks, jobs, title, tell):
    """Sample, grade and score one policy: write the files of its jobs that are not there.

    tell: print the most memory that it takes.
    """
    began, samples = time.perf_counter(), {}
    tokenizer, vocab = models.Tokenizer(path), models.read_config(path).vocab
    for j in jobs:
        for name, s in j.sampling.items():
            samples[j.task.name, name] = responses.Samples(
                j.folder[name], ranks, len(j.prompts), s.n, j.task.max_new_tokens, vocab)
    dist.barrier()  # every rank has mended its files
    policy = []  # the model, while it is needed

    def load():
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        policy[:] = policy or [models.load(path, dtype=dtype, device=ranks.device)]
        return policy[0]

    for j in jobs:
        for name, s in j.sampling.items():
            mine = samples[j.task.name, name]
            mine.read()  # here: two samplings may share a folder
            lacking = torch.tensor(int(not mine.complete))
            dist.all_reduce(lacking)
            if lacking:
                slots, pages = sample.capacity(load(), j.prompts, j.task.max_new_tokens,
                                               max(1, len(mine.mine) * s.n), cfg.slots)
                if tell:
                    ranks.print(bound(cfg, policy[0].config, jobs, slots, pages, ranks.device))
                    tell = False
                if ranks.rank == 0:
                    durable.write_text(j.folder[name] / "settings.json", json.dumps({
                        "policy": title, "path": str(path), "benchmark": j.task.name,
                        "sampling": asdict(s), "problems": [r["id"] for r in j.task.rows]}))
                mine.draw(load(), j.prompts, s, seed=cfg.seed, slots=slots, pages=pages,
                          tokenizer=tokenizer,
                          stop_tokens=cfg.stop_tokens, stop_strings=cfg.stop_strings)
                dist.barrier()
    for j in jobs:
        for name, file in j.rewards.items():
            if ranks.agree(cfg.regrade or not file.exists()):
                cells = responses.gather(responses.graded(
                    samples[j.task.name, name], j.task.rows, cfg.lenient, cfg.grading),
                    ranks, len(j.prompts))
                if ranks.rank == 0:
                    durable.write_text(file, json.dumps({"cells": cells}))
    todo = ranks.agree([i for i, j in enumerate(jobs) if not j.kl.exists()])
    if not todo:
        return
    load()
    same = hf.folder(path).resolve() == hf.folder(cfg.base).resolve()
    scored = divergence.score(policy, path, None if same else cfg.base, {
        i: [(p, jobs[i].prompts[p], tokens) for (p, _), (tokens, _, _)
            in sorted(samples[jobs[i].task.name, jobs[i].plain].found.items())] for i in todo},
        max_tokens=cfg.max_tokens, temperature=cfg.kl_temperature)
    for i in todo:
        cells = responses.gather(scored[i], ranks, len(jobs[i].prompts))
        if ranks.rank == 0:
            durable.write_text(jobs[i].kl, json.dumps({
                "seconds": time.perf_counter() - began, "cells": cells}))
    dist.barrier()


def bound(cfg, config, jobs, slots, pages, device):
    """The most memory that sampling and scoring take, as text."""
    parts, host = [], 0
    for j in jobs:
        longest = max(map(len, j.prompts))
        length = longest + j.task.max_new_tokens
        most = min(slots, len(j.prompts) * max(s.n for s in j.sampling.values()))
        pack = max(cfg.max_tokens, length)
        both = divergence.together(config, pack, device)
        parts += [memory.sampling(config, most, length, longest, device=device.type,
                                  tokens=pages * mixing.PAGE[device.type]),
                  memory.scoring(config, pack, device=device.type, both=both)]
        host = max(host, 0 if both else divergence.WAITING + 2 * pack * config.hidden)
    return memory.text(max(parts, key=lambda part: part["peak"])) + (
        f"; of the host up to {host / 1e9:.1f} for hidden states" if host else "")


def checkpoints(path):
    """[(step or None, folder)] of a checkpoint or a run folder. ValueError if it is neither."""
    folder = hf.folder(path)
    if (folder / "config.json").is_file():
        step = folder.name.removeprefix("step_")
        return [(int(step) if step.isdigit() else None, folder)]
    found = models.checkpoints(folder)
    if not found:
        raise ValueError(f"{path}: neither a checkpoint (config.json) nor a run folder (step_*)")
    return found


# ---------------------------------------------------------------- the judge


def ask_judge(cfg, measured):
    """Ask about every answer that the grader does not accept, of all policies with one budget;
    -> what to report of it. The judge's rewards stand beside the grader's; None: no verdict.

    measured: [(task, {sampling: cells})].
    """
    places = [(task, cell, j) for task, cells in measured for s in task.sampling
              for row, cell in zip(task.rows, cells[s.name], strict=True) if "answer" in row
              for j, answer in enumerate(cell["answers"]) if answer is not None]
    rows = {id(cell): row for task, cells in measured for s in task.sampling
            for row, cell in zip(task.rows, cells[s.name], strict=True)}
    c = cfg.judge
    try:
        asked = judge.judge(
            [(rows[id(cell)].get("problem", ""), rows[id(cell)]["answer"], cell["answers"][j])
             for _, cell, j in places], endpoint=c.endpoint, model=c.model, budget=c.budget,
            cache=Path(cfg.output) / "judge.jsonl", key_env=c.key_env,
            options={"max_tokens": c.max_tokens})
    except ValueError as error:  # the report needs no judge, and what was answered is kept
        return {"model": c.model, "reason": str(error)}
    for task, cells in measured:
        for s in task.sampling:
            for cell in cells[s.name]:
                if "answers" in cell:
                    cell["judged"] = [float(x == 1.0) for x in cell["rewards"]]
    for (_, cell, j), verdict in zip(places, asked.verdicts, strict=True):
        cell["judged"][j] = None if verdict is None else float(verdict)
    return {"model": c.model, "asked": asked.asked, "cached": asked.cached, "failed": asked.failed,
            "over_budget": asked.over_budget, "reason": asked.reason}


# ---------------------------------------------------------------- the command


def resolve(cfg, name):
    """The label of the [[policy]] that is meant. ValueError unless there is one."""
    labels = {results.label({"policy": p.name, "round": p.round}): p.name
              for p in (Policy("base", cfg.base, "base"), *cfg.policy)}
    meant = [label for label, plain in labels.items() if name in (label, plain)]
    if name not in labels and len(meant) != 1:
        raise ValueError(f"select or compare: {name!r:.80} must name one [[policy]]; there are "
                         f"{', '.join(labels)}")
    return name if name in labels else meant[0]


def main():
    cfg = options.parse(Config, __doc__, switches=("regrade",))
    ranks = runtime.start()
    listed = [Policy("base", cfg.base, "base"), *cfg.policy]
    labels = [results.label({"policy": p.name, "round": p.round}) for p in listed]
    if repeated := {name for name in labels if labels.count(name) > 1}:
        raise ValueError(f"policy names must differ: {sorted(repeated)[0]!r} stands twice")
    for name in [name for c in cfg.compare for name in (c.policy, c.against)] + [
            s.run for s in cfg.select]:
        resolve(cfg, name)
    runtime.lock(cfg.output, ranks)
    if cfg.samples:
        runtime.lock(cfg.samples, ranks)
    for rank in (0, 1):  # what must be fetched is fetched by one rank, before the others look
        if (ranks.rank > 0) == rank:
            todo = tasks(cfg, ranks)
            policies = [(p, label, step, folder) for p, label in zip(listed, labels, strict=True)
                        for step, folder in checkpoints(p.path)]
        dist.barrier()
    base = runtime.fingerprint(cfg.base, ranks)
    if cfg.kl_samples != Config.kl_samples and all(untruncated(cfg, t.sampling) for t in todo):
        ranks.print("note: kl_samples is given, but KL is measured of a [[sampling]] here")
    measured, tell = [], True
    bar = tqdm(policies, desc="evaluating", unit="policy", disable=ranks.rank != 0)
    for entry, label, step, folder in bar:
        bar.set_postfix_str(title := f"{label}@{step}" if step is not None else label)
        checkpoint = runtime.fingerprint(folder, ranks)
        jobs = [job(cfg, task, folder, checkpoint, base) for task in todo]
        files = [file for j in jobs for file in (*j.rewards.values(), j.kl)]
        if ranks.agree(cfg.regrade or not all(file.exists() for file in files)):
            measure(folder, cfg, ranks, jobs, title, tell)
        tell = False
        if ranks.rank == 0:
            for j in jobs:
                cells = {name: responses.read_rewards(file, len(j.prompts), j.sampling[name].n)
                         for name, file in j.rewards.items()}
                cells["divergence"], seconds = responses.read_kl(
                    j.kl, len(j.prompts), j.sampling[j.plain].n)
                measured.append((j.task, cells, {
                    "round": entry.round, "policy": entry.name, "role": entry.role, "step": step,
                    "path": str(folder), "fingerprint": checkpoint, "benchmark": j.task.name,
                    "samples": {name: str(j.folder[name]) for name in j.rewards},
                    "evaluation_seconds": seconds}))
    if ranks.rank == 0:
        print(results.write(cfg.output, report(cfg, todo, measured), cfg.plot), flush=True)


def report(cfg, todo, measured):
    """report.json's content. measured: [(task, cells, what identifies the row)]."""
    judged = ask_judge(cfg, [m[:2] for m in measured]) if cfg.judge.endpoint else None
    success = {}
    for task in todo:  # the base comes first
        if plain := untruncated(cfg, task.sampling):
            exact = all("success" in row for row in task.rows)
            cells = next(cells for other, cells, _ in measured if other is task)
            success[task.name] = {
                "from": "the prompts file" if exact else "the base's samples (estimate)",
                "sampling": plain, "values": [float(row["success"]) for row in task.rows] if exact
                else results.shares(cells[plain])}
    rows, counts = [], {}
    for task, cells, row in measured:
        trained = [m["seconds"] for m in results.read_metrics(Path(row["path"]).parent)
                   if row["step"] is not None and m["step"] <= row["step"]
                   and m.get("seconds") is not None]
        rows.append({**row, **results.summarise(
            cells, [s.name for s in task.sampling], cfg.pass_at, success.get(task.name)),
            "seconds": sum(trained) if trained else None})
        counts[results.label(row), task.name] = cells, row["step"]  # the last checkpoint's stays
    pairs = []
    for c in cfg.compare:
        for task in todo:
            (mine, step), (other, other_step) = (counts[resolve(cfg, name), task.name]
                                                 for name in (c.policy, c.against))
            pairs += [dict(zip(("difference", "se", "low", "high"), results.paired(
                mine[s.name], other[s.name]), strict=True), policy=c.policy, step=step,
                against=c.against, against_step=other_step, benchmark=task.name, sampling=s.name)
                for s in task.sampling]
    return {"rows": rows, "selection": [
                results.select(rows, resolve(cfg, s.run), s.rule) | {"run": s.run}
                for s in cfg.select],
            "comparisons": results.at_equal_kl(rows), "paired": pairs, "seeds": [cfg.seed],
            "judge": judged, "success": success, "config": asdict(cfg)}


if __name__ == "__main__":
    runtime.command(main)
