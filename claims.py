"""claims.py - a claim written down before its numbers are known, and what the numbers say.

A config of erpd.py lists [[claim]] sections. Each names a quantity, measured once a seed,

    accuracy     of `of` minus that of `against`, in one column (`sampling`)
    equal_kl     of `of` minus the best that the run `against` has reached at no more KL
                 (interpolated in sqrt(KL) between its checkpoints)
    kl           KL per token of `of` over that of `against`
    entropy      of `of` minus that of `against`
    p_positive, p_negative, kl_reverse, explained_variance, loss, signal_negative
                 the last value of that column of `of`'s metrics.jsonl

and a threshold that its mean over seeds is held against. The interval is Student's, 95 %, over
seeds: "holds" if it lies wholly on the claim's side, "fails" if wholly on the other, else
"undecided"; fewer than three seeds decide nothing. Every seed that erpd.py finishes becomes a line
of a record file, from any machine, so that tables can be made of them later (paper.py).
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import durable
import options
import results
import runtime
from options import key

# 97.5 % quantile of Student's t, for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)
CURVES = ("p_positive", "p_negative", "kl_reverse", "entropy", "explained_variance", "loss",
          "signal_negative")
MEASURES = ("accuracy", "equal_kl", "kl", "entropy")
KEPT = ("policy", "round", "role", "step", "kl", "kl_se", "kl_sequence", "kl_efficiency",
        "entropy", "length", "pass_at_k", "seconds")
CELL = ("accuracy", "accuracy_se", "truncated")


@dataclass(frozen=True)
class Claim:
    text: str = key(help="the claim, in words")
    of: str = key(help="'run@step', 'run' (the selected, else the last checkpoint) or 'base'; "
                       "'run (round 2)@10' and 'path.run (round 2)' in later rounds")
    paper: str = key("", "what the paper reports on it")
    against: str = key("base", "the same; for equal_kl a run without a step")
    measure: str = key("accuracy", "accuracy, equal_kl, kl, entropy or a column (see claims.py)")
    sampling: str = key("T=1", "column of accuracy and equal_kl")
    least: float = key(float("-inf"), "the claim holds if the mean is at least this")
    most: float = key(float("inf"), "and at most this")

    def __post_init__(self):
        if (self.least > float("-inf")) == (self.most < float("inf")):
            raise ValueError(f"claim {self.text!r:.60}: give one of least and most")
        options.one_of(f"claim {self.text!r:.60}: measure", self.measure,
                       dict.fromkeys((*MEASURES, *CURVES)))
        if self.measure not in MEASURES and parts(self.of)[1] is not None:
            raise ValueError(f"claim {self.text!r:.60}: {self.measure} is the run's last; "
                             f"of = {self.of!r:.60} names a step")
        if self.measure == "kl" and self.against == "base":
            raise ValueError(f"claim {self.text!r:.60}: the base's KL to itself is 0, and nothing "
                             "is a multiple of it; name another in `against`")
        if self.measure == "equal_kl" and parts(self.against)[1] is not None:
            raise ValueError(f"claim {self.text!r:.60}: at equal KL a student is held against a "
                             f"whole run; against = {self.against!r:.60} is one step of it")


def parts(ref):
    """'run (round 2)@10' -> ('run (round 2)', 10); None without a step."""
    name, at, step = ref.rpartition("@")
    return (name, int(step)) if at and step.isdigit() else (ref, None)


# ---------------------------------------------------------------- records


def record(cfg, seed, report):
    """One seed's report -> what is kept of it: numbers to five digits, a point of the training
    curves every fourth step.
    """
    rows, curves = [], {}
    for row in report["rows"]:
        rows.append({**{name: row[name] for name in KEPT}, "sampling": {
            which: {name: cell[name] for name in CELL} for which, cell in row["sampling"].items()}})
        if row["step"] is not None and results.label(row) not in curves:
            lines = results.read_metrics(Path(row["path"]).parent)
            lines = [m for m in lines if m["step"] % 4 == 0 or m["step"] <= 4 or m is lines[-1]]
            if lines:
                curves[results.label(row)] = {"step": [m["step"] for m in lines], **{
                    name: [m.get(name) for m in lines] for name in CURVES}}
    selection = [{"run": results.label({"policy": s["run"], "round": s["round"]}),
                  "rule": s["rule"], "step": s["step"]} for s in report["selection"]]
    return _rounded(results.finite({
        "experiment": Path(cfg.record or "report").stem, "seed": seed, "settings": _settings(cfg),
        "machine": _machine(cfg), "wall": report["wall"], "rows": rows, "selection": selection,
        "curves": curves}))


def _settings(cfg):
    """A digest of all that decides the numbers: the config, and the text of those it names."""
    data = dataclasses.asdict(cfg)
    for name in ("output", "report", "record", "seeds", "first_seed", "processes", "claim",
                 "expected"):
        del data[name]
    files = sorted({cfg.task, cfg.sample, cfg.evaluate, *(
        run.config for run in (*cfg.stage1, *cfg.stage2))} - {""})
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    return hashlib.sha256(json.dumps([data, texts]).encode()).hexdigest()[:16]


def _machine(cfg):
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return {"cpu": name, "cores": os.cpu_count(), "processes": cfg.processes,
            **runtime.versions()}


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append(file, entry):
    """Add a record, unless the very same counts already. Half a line of a killed run goes. Several
    runs of a machine may share the file.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(Path(file).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = _entries(file)
        counts = _latest(known).get(entry["seed"])
        if not counts or {**counts, "wall": 0, "machine": 0} != {**entry, "wall": 0, "machine": 0}:
            durable.write_text(file, "".join(json.dumps(e) + "\n" for e in (*known, entry)))
    finally:
        os.close(folder)


def read(file):
    """{seed: record} of one experiment: the last of each seed, and only those made with the
    settings of the file's last line. ValueError if there is none.
    """
    entries = _entries(file)
    if not entries:
        raise ValueError(f"{file}: holds no record")
    return _latest(entries)


def _entries(file):
    return durable.read_lines(file, experiment=str, seed=int, settings=str, rows=list,
                              selection=list, curves=dict)


def _latest(entries):
    return {entry["seed"]: entry for entry in sorted(entries, key=lambda e: e["seed"])
            if entry["settings"] == entries[-1]["settings"]}


# ---------------------------------------------------------------- claims


def find(entry, ref):
    """The row that `ref` means in one seed's record. ValueError if there is none."""
    name, step = parts(ref)
    mine = [row for row in entry["rows"] if results.label(row) == name]
    if step is None:
        chosen = [s["step"] for s in entry["selection"]
                  if s["run"] == name and s["rule"] != "unlearned"]
        step = chosen[0] if chosen else mine[-1]["step"] if mine else None
    for row in mine:
        if row["step"] == step:
            return row
    raise ValueError(f"{ref}: no such row in {entry['experiment']}, seed {entry['seed']}; there "
                     f"are {', '.join(dict.fromkeys(results.label(r) for r in entry['rows']))}")


def value(claim, entry):
    """A claim's quantity in one seed -> (number or None, note)."""
    if claim.measure not in MEASURES:
        curve = entry["curves"].get(claim.of, {})
        if claim.measure not in curve:
            raise ValueError(f"claim {claim.text!r:.60}: {claim.of} has no {claim.measure}")
        return curve[claim.measure][-1], ""
    mine = find(entry, claim.of)
    other = find(entry, claim.against)
    if claim.measure == "kl":
        return (mine["kl"] / other["kl"] if other["kl"] > 0 else None), ""
    if claim.measure == "entropy":
        return mine["entropy"] - other["entropy"], ""
    accuracy, rival = (row["sampling"][claim.sampling]["accuracy"] for row in (mine, other))
    if claim.measure == "accuracy":
        return accuracy - rival, ""
    points = results.envelope([find(entry, "base"), *(
        row for row in entry["rows"] if results.label(row) == claim.against)], claim.sampling)
    return (accuracy - results.interpolate(points, mine["kl"])[0],
            "" if points[-1][0] >= mine["kl"] else "its best, at less KL")


def interval(values):
    """(mean, half of the 95 % interval) over seeds; half is inf for one seed."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, float("inf")
    return mean, STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(values) / n ** 0.5


def verdict(claim, values):
    """"holds", "fails", "undecided" or, below three seeds, "too few seeds"."""
    if len(values) < 3:
        return "too few seeds"
    mean, half = interval(values)
    low, high = mean - half, mean + half
    if claim.least <= low and high <= claim.most:
        return "holds"
    return "fails" if high < claim.least or low > claim.most else "undecided"


def table(asked, entries):
    """Claims against records {seed: record} -> markdown."""
    lines = ["| claim | the paper | measured | counts if | mean ± 95 % (by seed) | verdict |",
             "|---|---|---|---|---|---|"]
    for claim in asked:
        found = [value(claim, entry) for entry in entries.values()]
        values = [x for x, _ in found if x is not None]
        notes = sorted({note for _, note in found if note})
        if len(values) < len(found):
            notes.append(f"{len(values)} of {len(found)} seeds have one")
        what = {"accuracy": f"{claim.sampling}: {claim.of} - {claim.against}",
                "equal_kl": f"{claim.sampling}: {claim.of} - {claim.against} at equal KL",
                "kl": f"KL of {claim.of} / {claim.against}",
                "entropy": f"entropy: {claim.of} - {claim.against}"}.get(
                    claim.measure, f"{claim.measure} of {claim.of}")
        mean, half = interval(values) if values else (float("nan"),) * 2
        spread = f" ± {half:.3f}" if len(values) > 1 else ""
        sign = "" if claim.measure == "kl" else "+"
        bound = (f"≥ {claim.least:{sign}g}" if claim.least > float("-inf")
                 else f"≤ {claim.most:{sign}g}")
        each = ", ".join(f"{x:{sign}.3f}" for x in values)
        lines.append(f"| {claim.text} | {claim.paper} | {what}{''.join(f' ({n})' for n in notes)} "
                     f"| {bound} | {mean:{sign}.3f}{spread} ({each}) "
                     f"| **{verdict(claim, values)}** |")
    return "\n".join(lines) + "\n"
