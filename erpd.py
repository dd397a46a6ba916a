"""erpd.py - the whole algorithm, as the commands a person would type: sample, stage 1, stage 2,
evaluate; in rounds.

    round k:   sample a fresh batch from policy k-1   sample.py
               teachers (and controls) on it          stage1.py, one run each
               pick each teacher's checkpoint         evaluate.py on validation prompts
               students of those teachers             stage2.py, from policy k-1
               accuracy, KL, tables, plot             evaluate.py on test prompts; KL to the very
                                                      first policy
               policy k = the run named `next`

Every command is printed before it runs and works when typed by hand. A command that has completed
is not run again, a stopped one goes on where it stopped: start erpd.py again. `seeds` repeats
everything and reports paired differences. Configs with the same `output` share what they have in
common: task, batch, runs of the same name, samples.

A run is named by `name` (a teacher's selected, else the last checkpoint), `name@16` (a step),
`name:unlearned` (rule of evaluate.py); with `~1` behind it, the one of a round before. Instead of
`rounds` and `next`, [[path]] sections say for each round which run the next one starts from:
several paths part after the first round, in which every run is run; later ones run what their
path needs.

    python erpd.py --config configs/toy/erpd.toml                  # the demo (make demo)
    python erpd.py --config configs/toy/erpd.toml --set seeds=3    # the demo, three times
    python erpd.py --config configs/toy/paper/table1.toml          # a table of the paper
"""

import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import claims
import durable
import evaluate
import options
import results
import rollouts
import runtime
import sample
import sharpen
import stage1
import stage2
from options import key, section


@dataclass(frozen=True)
class Stage1:
    name: str = key(help="name of the run")
    config: str = key(help="stage1.py's config")
    set: list[str] = key([], "overrides, section.key=value")
    role: str = key("teacher", "teacher, or control (a single-stage run to compare with)")
    select: str = key(
        "last", "rule that picks the teacher's checkpoint on validation prompts: best or last")
    unlearned: bool = key(
        False, "also pick its unlearned checkpoint (steps 10-30), as 'name:unlearned'")
    start: str = key("", "a run listed before it, to train on from (recovery of an unlearned "
                         "policy); empty: pi_old")
    carry: bool = key(False, "in later rounds take over the optimiser state of the same run's "
                             "round before (an on-policy phase: rounds of one step)")
    sample: list[str] = key([], "overrides of sample.py's config in later rounds that end in it")

    def __post_init__(self):
        check_name("stage1.name", self.name)
        options.one_of("stage1.role", self.role, ("teacher", "control"))
        options.one_of("stage1.select", self.select, ("best", "last"))
        if self.role == "control" and options.given_unread(self, {"select", "unlearned"}):
            raise ValueError(f"stage1 {self.name}: no checkpoint of a control is selected; "
                             "select and unlearned are for teachers")


@dataclass(frozen=True)
class Signal:
    numerator: str = key(help="a run (see above), 'old', 'none' or a checkpoint folder")
    denominator: str = key("old", "the same, or 'evolving'")
    set: list[str] = key([], "overrides of the signal's other keys: steps=16")


@dataclass(frozen=True)
class Stage2:
    name: str = key(help="name of the run")
    config: str = key(help="stage2.py's config, with one [[signal]]")
    numerator: str = key(help="a run (see above), 'old', 'none' or a checkpoint folder")
    denominator: str = key("old", "the same, or 'evolving'")
    then: list[Signal] = key([], "signals that follow on the same student (teacher ensembles)")
    set: list[str] = key([], "overrides, section.key=value")

    def __post_init__(self):
        check_name("stage2.name", self.name)

    @property
    def signals(self):
        return [Signal(self.numerator, self.denominator), *self.then]


def check_name(key, name):
    """ValueError unless a run's name can be the name of its folder, inside its round's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name) or name in (
            "batch", "validation", "evaluation", "base", "sharpened", "old", "none", "evolving"):
        raise ValueError(f"{key}: {name!r:.80} cannot name a folder of its own; take letters, "
                         "digits, '_', '-' and '.'")


@dataclass(frozen=True)
class Rounds:
    """[[path]]: which run each next round starts from."""

    name: str = key(help="name of the path, of its folder and before its runs' names")
    runs: list[str] = key(help="the run that each round is for and the next one starts from: "
                               "'ce', 'ce@32', 'online*10' for ten rounds")

    @property
    def goals(self):
        return [run for text in self.runs for run, _, times in [text.partition("*")]
                for _ in range(int(times or 1))]


@dataclass(frozen=True)
class Check:
    student: str = key(
        "", "stage-2 run whose last checkpoint is held against the following; empty: no check")
    teacher: str = key("", "stage-1 run, its selected checkpoint")
    sampling: str = key("greedy", "column in which student and teacher are compared")
    within: float = key(0.02, "the student's accuracy is at most this much below the teacher's")
    kl_share: float = key(0.5, "at no more than this share of the teacher's KL")
    gain: float = key(0.05, "and at least this much above the base in the main column")


@dataclass(frozen=True)
class Config:
    output: str = key(help="run folder")
    sample: str = key(help="sample.py's config")
    evaluate: str = key(help="evaluate.py's config; base, prompts and policies are filled in")
    task: str = key(
        "", "toy.py's config, to make prompts and a base policy; else give the next four keys")
    policy: str = key("", "checkpoint folder of the first policy")
    prompts: str = key("", "training prompts, JSONL")
    validation: str = key("", "validation prompts, JSONL: checkpoints are selected on them")
    test: str = key("", "test prompts, JSONL")
    report: str = key("", "folder of report.json, report.md, plot.png; empty: output")
    record: str = key("", "JSON-lines file that every finished seed is appended to (claims.py)")
    rounds: int = key(1, "fresh batches")
    next: str = key(
        "", "run whose last (stage 2) or selected (stage 1) checkpoint starts the next round")
    path: list[Rounds] = key([], "[[path]] sections, in the place of rounds and next")
    evaluate_every: int = key(1, "rounds between evaluations; the last of a path always has one")
    seeds: int = key(1, "repetitions, with seeds first_seed, first_seed + 1, ...")
    first_seed: int = key(0, "several machines can share the work")
    processes: int = key(1, "ranks of every command: GPUs of the machine, or CPU cores")
    sharpened: list[float] = key(
        [], "temperatures at which the first policy itself is a control, 'sharpened'")
    stage1: list[Stage1] = key([], "[[stage1]] sections: teachers and controls")
    stage2: list[Stage2] = key([], "[[stage2]] sections: students")
    check: Check = section(Check)
    claim: list[claims.Claim] = key([], "[[claim]] sections: what is held against the rows, "
                                        "written down before they are known")
    expected: dict[str, float] = key(
        {}, "seconds that each phase is expected to take, printed at the start")

    def __post_init__(self):
        if not self.task and not all((self.policy, self.prompts, self.validation, self.test)):
            raise ValueError("give task, or all of policy, prompts, validation and test")
        names = [r.name for r in (*self.stage1, *self.stage2)]
        if self.rounds > 1 and (self.next not in names or self.path):
            raise ValueError("rounds > 1 need next, the run to go on from, and no [[path]]; "
                             f"{self.next!r} is none of the runs")
        for name in ("rounds", "evaluate_every", "seeds", "processes"):
            options.in_range(name, getattr(self, name), least=1)
        options.in_range("first_seed", self.first_seed, least=0)
        if repeated := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"the name {repeated[0]!r} is used already; every run needs its own")
        if self.path and self.next:
            raise ValueError("next is not read where there are [[path]] sections")
        for path in self.path:
            check_name("path.name", path.name)
            if not path.runs:
                raise ValueError(f"path {path.name}: runs must name at least one run")
            for text in path.runs:
                run, _ = re.fullmatch(r"(.*?)(\*[1-9][0-9]{0,5})?", text, flags=re.S).groups()
                if split(run)[0] not in names or split(run)[3]:
                    raise ValueError(f"path {path.name}: {text!r:.80} is none of the runs")
        if len({path.name for path in self.path} | set(names)) < len(self.path) + len(names):
            raise ValueError("the names of paths must differ, from those of runs, too")
        if self.check.student and (
                self.check.student not in [r.name for r in self.stage2]
                or self.check.teacher not in [r.name for r in self.stage1 if r.role == "teacher"]):
            raise ValueError("check.student must name a [[stage2]] run and check.teacher a "
                             f"[[stage1]] run of role teacher, not {self.check.student!r} and "
                             f"{self.check.teacher!r}")
        unlearned = {r.name for r in self.stage1 if r.unlearned}
        for where, ref in self.references:
            name, rule, _, back = split(ref)
            before = names[:names.index(where)] if where in names and not back else names
            if ref not in ("old", "none", "evolving") and not Path(ref).exists() and (
                    name not in before or rule and name not in unlearned):
                raise ValueError(f"{where}: {ref!r} is neither a run listed before it "
                                 "(with `unlearned = true` for ':unlearned') nor a "
                                 "checkpoint folder")
        best = {r.name for r in self.stage1 if r.select == "best"}
        for run in self.stage1:
            name, rule, step, back = split(run.start)
            if run.start in ("old", "none", "evolving") or not back and (
                    rule or step is None and name in best):
                raise ValueError(f"{run.name}: start = {run.start!r} is needed before checkpoints "
                                 "are selected; name a step, as in 'mse@16', or leave it out")
        goals = {split(goal)[0] for _, path in self.paths for goal in path[1:]}
        for run in self.stage1:
            if (run.sample or run.carry) and run.name not in goals:
                raise ValueError(f"{run.name}: no later round is for it; sample and carry are "
                                 "not read")
        for path, k, goal, runs in self.schedule:
            there = [runs for name, _, _, runs in self.schedule if name == path]
            if goal and split(goal)[0] not in runs:
                raise ValueError(f"round {k} of path {path!r} cannot be for {goal!r}, which is "
                                 "made of an earlier round")
            for run in (*self.stage1, *self.stage2):
                for ref in references(run) if run.name in runs else ():
                    name, _, _, back = split(ref)
                    if name in names and (back >= k or name not in there[k - 1 - back]):
                        raise ValueError(f"{run.name}: there is no {ref!r} in round {k} of path "
                                         f"{path!r}")
        if self.check.student and not {self.check.student, self.check.teacher} <= next(
                runs for _, k, _, runs in reversed(self.schedule) if k == self.rounds):
            raise ValueError("check.student and check.teacher must be of the last round")

    @property
    def paths(self):
        """[(name, the run that each round is for)]; the only path of `rounds` has no name."""
        return [(p.name, p.goals) for p in self.path] or [("", [self.next] * self.rounds)]

    @property
    def schedule(self):
        """[(path, round, the run it is for, names of the runs that are run)]. The first round runs
        all that is not made of an earlier one.
        """
        first, names = set(), {r.name for r in (*self.stage1, *self.stage2)}
        for run in (*self.stage1, *self.stage2):
            if all(not back and (name in first or name not in names)
                   for name, _, _, back in map(split, references(run))):
                first.add(run.name)
        return [(path, k, goal, needed(self, goal) if k > 1 else first)
                for path, goals in self.paths for k, goal in enumerate(goals, 1)]

    @property
    def references(self):
        """[(run or path, what it names)]: all that must be a run or a checkpoint."""
        return [(run.name, ref) for run in (*self.stage1, *self.stage2)
                for ref in references(run)] + [
            (f"path {path.name}", goal) for path in self.path for goal in path.goals]


def split(ref):
    """'mse@16~1' -> (run, rule or None, step or None, rounds back); a folder's name is no run."""
    run, rule, step, back = re.fullmatch(
        r"(.*?)(?:(:unlearned)|@([0-9]{1,9}))?(?:~([0-9]{1,5}))?", ref, flags=re.S).groups()
    return run, rule, step and int(step), int(back or 0)


def references(run):
    """The checkpoints that a run is made of, as its config names them."""
    if isinstance(run, Stage1):
        return [run.start] if run.start else []
    return [side for s in run.signals for side in (s.numerator, s.denominator)]


def needed(cfg, goal):
    """Names of the runs of a round that `goal` is made of, itself included."""
    runs, wanted = (*cfg.stage1, *cfg.stage2), {split(goal)[0]}
    for run in reversed(runs):
        if run.name in wanted:
            wanted |= {name for name, _, _, back in map(split, references(run)) if not back}
    return wanted & {run.name for run in runs}


# ---------------------------------------------------------------- running commands


class Driver:
    """Prints and runs commands; remembers in commands.jsonl those of a seed that completed,
    by command and config file. Where a command reads what another has made again since, it is run
    again, too.
    """

    def __init__(self, cfg, folder):
        self.cfg, self.log = cfg, Path(folder) / "commands.jsonl"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # whole lines only: a killed driver may have left half a line
        entries = durable.read_lines(self.log, key=str, seconds=(int, float), arguments=list)
        durable.write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in entries))
        # the last of each command: its output is what another config file made of it since
        self.done = {json.dumps(entry["arguments"]): {**entry, "line": line}
                     for line, entry in enumerate(entries)}
        self.lines = len(entries)
        self.made = {}  # output folder of this config's commands: the line that says it is there
        self.seconds = {}  # of this config's phases

    def run(self, phase, script, config, overrides=()):
        arguments = [script, *(["--config", str(config)] if config else []),
                     *(["--set", *overrides] if overrides else [])]
        launch, program = ["python"], [sys.executable]
        if self.cfg.processes > 1:  # a rank alone needs no agent, and starts in half the time
            launch = ["torchrun", "--standalone", "--nproc-per-node", str(self.cfg.processes)]
            program += ["-m", "torch.distributed.run", *launch[1:]]
        text = json.dumps([launch, arguments, Path(config).read_text() if config else ""])
        identity = hashlib.sha256(text.encode()).hexdigest()[:24]
        output = next((x.removeprefix("output=") for x in overrides if x.startswith("output=")), "")
        newest = max((line for folder, line in self.made.items()
                      if re.search(re.escape(folder) + r"(?![\w.-])", text)), default=-1)
        print(f"\n[{phase}] {shlex.join(launch + arguments)}", flush=True)
        before = self.done.get(json.dumps(arguments), {"key": ""})
        if before["key"] == identity and before["line"] > newest:
            print(f"[{phase}] done before, in {before['seconds']:.0f} s", flush=True)
            self._count(phase, output, before)
            return
        threads = max(1, (os.cpu_count() or 1) // self.cfg.processes)
        began = time.perf_counter()
        result = subprocess.run(
            [*program, *arguments], env={"OMP_NUM_THREADS": str(threads), **os.environ},
            preexec_fn=runtime.end_with_parent)
        if result.returncode:
            print(f"error: the command above stopped with status {result.returncode}; "
                  "run the same command again to go on", file=sys.stderr)
            sys.exit(2)
        seconds = time.perf_counter() - began
        entry = {"key": identity, "phase": phase, "seconds": seconds, "arguments": arguments}
        with open(self.log, "a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"[{phase}] {seconds:.0f} s", flush=True)
        self.done[json.dumps(arguments)] = entry = {**entry, "line": self.lines}
        self.lines += 1
        self._count(phase, output, entry)

    def _count(self, phase, output, entry):
        self.seconds[phase] = self.seconds.get(phase, 0.0) + entry["seconds"]
        if output:
            self.made[output] = entry["line"]


def check_configs(cfg):
    """Read every config that will be needed before anything runs, filled in as it will be."""
    for name in ("prompts", "validation", "test"):
        if (file := getattr(cfg, name)) and not Path(file).is_file():
            raise ValueError(f"{name} = {file}: there is no such file")
    options.read_config(sample.Config, cfg.sample, ["policy=x", "prompts=x", "output=x"])
    kept = {}
    for run in cfg.stage1:
        c = options.read_config(stage1.Config, run.config,
                                ["policy=x", "batch=x", "output=x", *run.set])
        kept[run.name] = steps_kept(c.train, c.steps)
        if run.unlearned and not any(10 <= step <= 30 for step in kept[run.name]):
            raise ValueError(f"{run.name}: unlearned = true needs a checkpoint between steps 10 "
                             "and 30; see its train.checkpoint_at and train.checkpoint_every")
        options.read_config(sample.Config, cfg.sample,
                            ["policy=x", "prompts=x", "output=x", *run.sample])
    for run in cfg.stage2:
        c = options.read_config(stage2.Config, run.config,
                                ["batch=x", "output=x", *signal_overrides(run), *run.set])
        kept[run.name] = steps_kept(c.train, sum(s.steps for s in c.signal))
    for where, ref in cfg.references:
        name, _, step, _ = split(ref)
        if step is not None and name in kept and step not in kept[name]:
            raise ValueError(f"{where}: {name} keeps no checkpoint of step {step}; "
                             "see its train.checkpoint_at and train.checkpoint_every")
    if cfg.sharpened:
        sharpen.Config("x", "x", cfg.sharpened)
    options.read_config(evaluate.Config, cfg.evaluate, [
        "base=x", "prompts=x", "benchmark=[]", "compare=[]", "output=x"])
    template = tomllib.loads(Path(cfg.evaluate).read_text(encoding="utf-8"))
    check_claims(cfg, kept, [s["name"] for s in template["sampling"]])
    if unread := [name for name in ("benchmark", "compare", "judge") if template.get(name)]:
        print(f"note: {', '.join(unread)} of {cfg.evaluate} is not read in rounds; they evaluate "
              "on `validation` and `test`", flush=True)


def steps_kept(train, steps):
    """Steps of which a run keeps a checkpoint."""
    every = range(train.checkpoint_every, steps + 1, train.checkpoint_every)
    return {*every, *(s for s in train.checkpoint_at if 0 < s <= steps), steps}


def check_claims(cfg, kept, columns):
    """ValueError unless every claim names rows, steps and columns that there will be."""
    rows = {"base": {None}}
    curves = {"base": (), "sharpened": ()}  # of rows that lack some
    if cfg.sharpened:
        rows["sharpened"] = {round(100 * tau) for tau in cfg.sharpened}
    teachers = {run.name for run in cfg.stage1}
    for path, k, _, runs in cfg.schedule:
        last = k == len(dict(cfg.paths)[path])
        if k == 1 or k % cfg.evaluate_every == 0 or last:
            prefix = f"{path}." if path and k > 1 else ""
            for run in runs:
                label = results.label({"policy": prefix + run, "round": k})
                rows[label] = kept[run]
                if run in teachers:
                    curves[label] = set(claims.CURVES) - {"signal_negative"}
    for claim in cfg.claim:
        for ref in (claim.of, claim.against):
            name, step = claims.parts(ref)
            if name not in rows or step is not None and step not in rows[name]:
                raise ValueError(f"claim {claim.text!r:.60}: there will be no {ref!r}; "
                                 f"rows are {', '.join(rows)}")
        if claim.measure not in (*claims.MEASURES, *curves.get(claim.of, claims.CURVES)):
            raise ValueError(f"claim {claim.text!r:.60}: {claim.of} will have no {claim.measure}")
        if claim.sampling not in columns:
            raise ValueError(f"claim {claim.text!r:.60}: no [[sampling]] is named "
                             f"{claim.sampling!r}, but {', '.join(columns)}")


def signal_overrides(run, checkpoint=lambda ref: ref):
    """A [[stage2]] section's signals, for stage2.py."""
    return [f"signal.{i}.{text}" for i, s in enumerate(run.signals) for text in (
        f"numerator={checkpoint(s.numerator)}", f"denominator={checkpoint(s.denominator)}",
        *s.set)]


# ---------------------------------------------------------------- one seed


class Round(NamedTuple):
    """What a round left behind."""

    folder: Path
    chosen: dict[str, str]  # selected checkpoints: of each teacher, and 'teacher:unlearned'
    rows: dict[str, dict]  # of each run its [[policy]] section for evaluate.py
    selection: list[dict]


def run_seed(cfg, driver, seed):
    """All rounds of one seed -> report of all that is evaluated, with the rows of all rounds."""
    root = Path(cfg.output) / f"seed_{seed}"
    if cfg.task:
        driver.run("task", "toy.py", cfg.task, [f"output={root}/task", f"seed={seed}"])
    first = cfg.policy or f"{root}/task/policy"
    prompts, validation, test = (
        getattr(cfg, name) or f"{root}/task/prompts_{split}.jsonl" for name, split in (
            ("prompts", "train"), ("validation", "validation"), ("test", "test")))
    template = tomllib.loads(Path(cfg.evaluate).read_text(encoding="utf-8"))
    template["samples"] = f"{root}/samples"
    reports = (Path(cfg.report) if cfg.report else Path(cfg.output)) / f"seed_{seed}"
    evaluated, selection = [], []
    if cfg.sharpened:
        folder = f"{root}/sharpened_{'_'.join(f'{tau:g}' for tau in cfg.sharpened)}"
        driver.run("sharpen", "sharpen.py", "", [
            f"policy={first}", f"output={folder}", f"temperatures={cfg.sharpened}"])
        evaluated.append({"name": "sharpened", "path": folder, "role": "control", "round": 1})
    opening, report = None, None
    for name, goals in cfg.paths:
        rounds = []
        for k, goal in enumerate(goals, 1):
            at = Path(name if k > 1 else "", f"round_{k}")
            policy = first if k == 1 else checkpoint(goals[k - 2], rounds)
            here = opening if k == 1 and opening else one_round(
                cfg, driver, seed, k, goal if k > 1 else None, root / at, policy, prompts, rounds,
                lambda rows, rules, at=at: score(
                    driver, "validation", template, reports / at / "validation", first,
                    validation, seed, rows, sampling=template["sampling"][:1], select=rules,
                    plot=False)["selection"])
            rounds.append(here)
            if here is opening:
                continue
            opening = opening or here
            prefix = f"{name}." if name and k > 1 else ""
            selection += [{**s, "round": k, "run": prefix + s["run"]} for s in here.selection]
            if k % cfg.evaluate_every == 0 or k in (1, len(goals)):
                evaluated += [{**row, "name": prefix + row["name"]} for row in here.rows.values()]
                report = score(driver, "evaluate", template, reports / at / "evaluation", first,
                               test, seed, evaluated)
    return {**report, "selection": selection, "wall": driver.seconds}


def one_round(cfg, driver, seed, k, goal, folder, policy, prompts, before, select):
    """Sample, train teachers, select, train students. `goal`: the run that the round is for;
    None: all of them. select(rows, rules): teachers' checkpoints on validation prompts.
    """
    batch, rounds = f"batch={folder}/batch", [*before, None]
    wanted = needed(cfg, goal) if goal else cfg.schedule[0][3]
    goal = next((run for run in cfg.stage1 if goal and run.name == split(goal)[0]), None)
    driver.run("sample", "sample.py", cfg.sample, [
        f"policy={policy}", f"prompts={prompts}", f"output={folder}/batch",
        f"seed={1000 * seed + k}", *(goal.sample if goal else [])])
    rounds[-1] = here = Round(folder, {}, {}, [])
    teachers = [run for run in cfg.stage1 if run.name in wanted]
    for run in teachers:
        carried = run.carry and before and run.name in before[-1].rows
        driver.run(f"stage1 {run.name}", "stage1.py", run.config, [
            f"policy={checkpoint(run.start, rounds) if run.start else policy}", batch,
            f"output={folder}/{run.name}", f"train.seed={seed}",
            *([f"optimizer={before[-1].folder / run.name}"] if carried else []), *run.set])
        here.rows[run.name] = {"name": run.name, "path": f"{folder}/{run.name}",
                               "role": run.role, "round": k}
        if run.role == "teacher" and run.select == "last":
            step, path = evaluate.checkpoints(folder / run.name)[-1]
            here.selection.append({"run": run.name, "rule": "last", "step": step,
                                   "path": str(path), "why": "last checkpoint"})
    rules = [(run.name, rule) for run in teachers if run.role == "teacher"
             for rule, asked in (("best", run.select == "best"), ("unlearned", run.unlearned))
             if asked]
    if rules:
        here.selection.extend(select(
            [here.rows[name] for name in dict(rules)],
            [{"run": name, "rule": rule} for name, rule in rules]))
    here.chosen.update({s["run"] + (":unlearned" if s["rule"] == "unlearned" else ""): s["path"]
                        for s in here.selection})
    for run in cfg.stage2:
        if run.name in wanted:
            driver.run(f"stage2 {run.name}", "stage2.py", run.config, [
                f"policy={policy}", batch, f"output={folder}/{run.name}",
                *signal_overrides(run, lambda ref: checkpoint(ref, rounds)),
                f"train.seed={seed}", *run.set])
            here.rows[run.name] = {"name": run.name, "path": f"{folder}/{run.name}",
                                   "role": "student", "round": k}
    return here


def checkpoint(ref, rounds):
    """The folder that `ref` means in the last of `rounds`; 'old' and folders are what they are.
    ValueError if there is no such checkpoint.
    """
    run, rule, step, back = split(ref)
    if back >= len(rounds) or run not in rounds[-1 - back].rows:
        if back or rule:
            raise ValueError(f"{ref}: no such run in that round")
        return ref
    there = rounds[-1 - back]
    if step is not None:
        return f"{there.folder}/{run}/step_{step:06d}"
    if rule:
        return there.chosen[run + rule]
    return there.chosen.get(run) or str(evaluate.checkpoints(there.folder / run)[-1][1])


def score(driver, phase, template, folder, base, prompts, seed, policies, **more):
    """Write evaluate.py's config into `folder`, run it, read its report."""
    config = {**template, "base": base, "prompts": prompts, "benchmark": [], "compare": [],
              "judge": {}, "output": str(folder), "seed": seed, "policy": policies, **more}
    durable.write_text(folder / "evaluate.toml", options.to_toml(config))
    driver.run(phase, "evaluate.py", folder / "evaluate.toml")
    return durable.read_object(folder / "report.json", rows=list, selection=list)


# ---------------------------------------------------------------- what came out


def check(cfg, report):
    """The demo's promise, held against the rows of one seed -> [(text, holds)]."""
    c, rows, k = cfg.check, report["rows"], cfg.rounds
    chosen = next(s for s in report["selection"] if s["run"] == c.teacher and s["round"] == k)
    teacher = next(r for r in rows if r["path"] == chosen["path"])
    student = [r for r in rows if r["policy"] == c.student and r["round"] == k][-1]
    base = next(r for r in rows if r["role"] == "base")
    near = student["sampling"][c.sampling]["accuracy"] - teacher["sampling"][c.sampling]["accuracy"]
    share = student["kl"] / teacher["kl"]
    gain = student["accuracy"] - base["accuracy"]
    return [(f"{c.student}@{student['step']} - {c.teacher}@{teacher['step']}, {c.sampling}: "
             f"{near:+.3f} (at least {-c.within:+.3f})", near >= -c.within),
            (f"its KL is {share:.2f} of the teacher's (at most {c.kl_share})", share <= c.kl_share),
            (f"{c.student}@{student['step']} - base, {next(iter(base['sampling']))}: "
             f"{gain:+.3f} (at least {c.gain:+.3f})", gain >= c.gain)]


def average(values):
    """Mean of equally shaped rows of several seeds, number by number;
    *_se becomes the standard error over seeds.
    """
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], dict):
        mean = {name: average([v[name] for v in values]) for name in values[0]}
        for name in [n for n in mean if f"{n}_se" in mean]:
            mean[f"{name}_se"] = statistics.stdev([v[name] for v in values]) / len(values) ** 0.5
        return mean
    if None in values or all(v == values[0] for v in values) or isinstance(values[0], str):
        return None if None in values else values[0]
    return sum(values) / len(values)


def paired(reports):
    """Differences paired by seed -> markdown: students minus base,
    students minus their controls at equal KL.
    """
    lines = ["| student | minus | sampling | difference, mean ± std over seeds | seeds above 0 |",
             "|---|---|---|---|---|"]
    found = {}
    for report in reports:
        base = next(r for r in report["rows"] if r["role"] == "base")
        for row in (r for r in report["rows"] if r["role"] == "student"):
            for which, cell in row["sampling"].items():
                difference = cell["accuracy"] - base["sampling"][which]["accuracy"]
                found.setdefault((f"{results.label(row)}@{row['step']}", "base", which),
                                 []).append(difference)
        for c in report["comparisons"]:
            against = c["against"] + (" at equal KL" if c["reached"] else ", its best (less KL)")
            found.setdefault((f"{c['student']}@{c['step']}", against, c["sampling"]),
                             []).append(c["difference"])
    for (student, against, which), d in sorted(found.items()):
        spread = f" ± {statistics.stdev(d):.3f}" if len(d) > 1 else ""
        lines.append(f"| {student} | {against} | {which} | {statistics.mean(d):+.3f}{spread} "
                     f"| {sum(x > 0 for x in d)} of {len(d)} |")
    return "\n".join(lines) + "\n"


def finish(cfg, reports):
    """report.json, report.md and plot.png of the whole run, from the reports of its seeds."""
    folder, columns = Path(cfg.report or cfg.output), list(reports[0]["rows"][0]["sampling"])
    rows = [average(list(same)) for same in zip(*(r["rows"] for r in reports), strict=True)]
    success = None
    if known := reports[0]["success"].get("prompts"):  # every seed has its own table of facts
        rows_of = [rollouts.read_prompts(r["config"]["prompts"]) for r in reports]
        if all("success" in row for part in rows_of for row in part):
            success = {"sampling": known["sampling"],
                       "values": [row["success"] for part in rows_of for row in part]}
    text = results.table(rows, columns)
    seeds = range(cfg.first_seed, cfg.first_seed + len(reports))
    for seed, report in zip(seeds, reports, strict=True):
        text += "".join(f"\nseed {seed}: selected {s['step']} of "
                        f"{results.label({**s, 'policy': s['run']})} (rule {s['rule']})."
                        for s in report["selection"])
    text += "\n"
    if len(reports) == 1:
        notes = results.caption(reports[0]["comparisons"])
        text += "".join(f"\n{line}\n" for line in notes)
    else:
        notes = [f"mean of {len(reports)} seeds; paired differences in report.md"]
        text += "\n" + paired(reports)
    if cfg.check.student:
        for seed, report in zip(seeds, reports, strict=True):
            text += "".join(f"\nseed {seed}: {'holds' if holds else 'DOES NOT HOLD'}: {said}"
                            for said, holds in check(cfg, report))
    durable.write_text(folder / "report.json", json.dumps({
        **{name: [{**x, "seed": seed} for seed, r in zip(seeds, reports, strict=True)
                  for x in r[name]] for name in ("rows", "selection", "comparisons")},
        "seeds": list(seeds), "config": reports[0]["config"]}, indent=2))
    if cfg.claim:
        held = {seed: claims.record(cfg, seed, r) for seed, r in zip(seeds, reports, strict=True)}
        text += "\n" + claims.table(cfg.claim, held)
    durable.write_text(folder / "report.md", text + "\n")
    results.plot(rows, success, folder / "plot.png", notes)
    print(f"\n{text}\n\n{folder}/report.md, {folder}/plot.png", flush=True)


def main():
    cfg = options.parse(Config, __doc__)
    check_configs(cfg)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    drivers = [Driver(cfg, Path(cfg.output) / f"seed_{seed}") for seed in seeds]
    if cfg.record and Path(cfg.record).exists():
        claims.read(cfg.record)  # it is whole: not found out after hours
    if cfg.expected:
        print("expected seconds a seed, on two CPU cores (start again to resume at any point):")
        for phase, seconds in cfg.expected.items():
            print(f"  {phase:24s} {seconds:5.0f}")
        print(f"  {'in all':24s} {sum(cfg.expected.values()):5.0f}"
              + (f"  x {cfg.seeds} seeds" if cfg.seeds > 1 else ""), flush=True)
    began = time.perf_counter()
    reports = []
    for driver, seed in zip(drivers, seeds, strict=True):
        reports.append(run_seed(cfg, driver, seed))
        if cfg.record:
            claims.append(cfg.record, claims.record(cfg, seed, reports[-1]))
    finish(cfg, reports)
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    runtime.command(main)
