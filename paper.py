"""paper.py - RESULTS.md's numbers and pictures, from the seeds that were recorded.

Every experiment is a config of erpd.py in configs/toy/paper/, and every seed that it finishes is a
line of docs/results/<experiment>.jsonl, whichever machine ran it. Here these lines become the
blocks of RESULTS.md, between `<!-- table1 claims -->` and `<!-- end -->`, and docs/results/*.png.
What is written between the blocks is written by hand.

    python erpd.py --config configs/toy/paper/table7.toml --set seeds=5     # record
    python paper.py                                                         # write it down
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import claims
import durable
import erpd
import options
import results
import runtime

CONFIGS, RECORDS = Path("configs/toy/paper"), Path("docs/results")
COLUMNS = ("T=1", "T=0.6 top-p 0.95", "greedy")
CONTROLS = {  # a single stage each, and the runs of it, whichever is best at a KL
    "SAPO": ("sapo",), "SAPO + KL": ("sapo_kl",), "RWR": ("rwr",), "sharpened": ("sharpened",),
    "CE, beta 2": ("ce2_fast", "ce2_slow", "ce2_long", "ce_strong")}


# ---------------------------------------------------------------- tables


def average(entries):
    """Records {seed: record} -> rows in their order: [(label, step, {quantity: [value a seed]})].
    """
    found = {}
    for entry in entries.values():
        for row in entry["rows"]:
            cells = found.setdefault((results.label(row), row["step"]), {})
            for name in ("kl", "kl_efficiency", "entropy", "length", "seconds", "round", "role"):
                cells.setdefault(name, []).append(row[name])
            for which, cell in row["sampling"].items():
                cells.setdefault(which, []).append(cell["accuracy"])
    return [(label, step, cells) for (label, step), cells in found.items()]


def mean(values):
    """Mean of the numbers that are there; None without one."""
    values = [x for x in values if x is not None]
    return statistics.mean(values) if values else None


def spread(values):
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def rows(entries):
    """Every evaluated policy, mean ± standard error over seeds -> markdown."""
    lines = [f"| policy | step | {' | '.join(COLUMNS)} | KL / token | KL efficiency | entropy |",
             "|---" * (len(COLUMNS) + 5) + "|"]
    for label, step, cells in average(entries):
        accuracies = [f"{mean(cells[c]):.3f} ± {spread(cells[c]):.3f}" for c in COLUMNS]
        efficiency = cells["kl_efficiency"]
        efficiency = None if None in efficiency else mean(efficiency)  # a gain clear on every seed
        lines.append(f"| {label} | {'' if step is None else step} | {' | '.join(accuracies)} "
                     f"| {mean(cells['kl']):.4f} | "
                     f"{'' if efficiency is None else f'{efficiency:.2f}'} "
                     f"| {mean(cells['entropy']):.3f} |")
    return "\n".join(lines) + "\n"


def selected(entries):
    """Which checkpoints validation prompts picked, by seed -> text."""
    found = {}
    for entry in entries.values():
        for s in entry["selection"]:
            if s["rule"] != "last":
                found.setdefault(f"{s['run']} ({s['rule']})", []).append(f"{s['step']}")
    return "; ".join(f"{name}: {', '.join(steps)}" for name, steps in found.items())


def provenance(name, entries):
    """Command, machine, wall-clock -> text."""
    machines = sorted({f"{e['machine']['cores']} cores, {e['machine']['cpu']}, torch "
                       f"{e['machine']['torch']}" for e in entries.values()})
    minutes = [sum(e["wall"].values()) / 60 for e in entries.values()]
    picked = selected(entries)
    processes = sorted({str(e["machine"]["processes"]) for e in entries.values()})
    return (f"`python erpd.py --config {CONFIGS}/{name}.toml --set first_seed={min(entries)} "
            f"seeds={len(entries)}`; {statistics.mean(minutes):.0f} minutes a seed in "
            f"{' or '.join(processes)} process(es) on {'; '.join(machines)}, with what it shares "
            "with other experiments."
            + (f" Selected on validation prompts, by seed: {picked}." if picked else "") + "\n")


def summary(names):
    """How many claims of each experiment hold -> markdown."""
    lines = ["| experiment | seeds | hold | fail | undecided | too few seeds |", "|---" * 6 + "|"]
    for name in names:
        asked, entries = config_of(name).claim, claims.read(RECORDS / f"{name}.jsonl")
        verdicts = [claims.verdict(c, [x for x, _ in (
            claims.value(c, e) for e in entries.values()) if x is not None]) for c in asked]
        counts = [str(verdicts.count(v)) for v in ("holds", "fails", "undecided", "too few seeds")]
        lines.append(f"| {name} | {len(entries)} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def controls(column):
    """Every student minus the best of each control at no more KL, and of its own teacher's path,
    paired by seed -> markdown. The student's step is the one that claims name first, else its last.
    A control may stand in the record of another experiment, if that is of the same batch of the
    same first policy.
    """
    records = {name: claims.read(RECORDS / f"{name}.jsonl") for name in recorded()}
    configs = {name: config_of(name) for name in records}

    def origin(name, entry):  # what records of one batch of one first policy have in common
        return configs[name].output, entry["seed"], json.dumps(entry["rows"][0]["sampling"])

    paths = {}  # {origin: {(run, step): row}}
    for name, entries in records.items():
        for entry in entries.values():
            for row in entry["rows"]:
                paths.setdefault(origin(name, entry), {})[results.label(row), row["step"]] = row
    columns = ["its teacher", *CONTROLS]
    lines = [f"| experiment | student | KL / token | {' | '.join(columns)} |",
             "|---" * (len(columns) + 3) + "|"]
    for name, entries in records.items():
        teachers = {s.name: s.numerator.partition("@")[0] for s in configs[name].stage2
                    if not s.then}
        claimed = dict(claims.parts(c.of) for c in reversed(configs[name].claim))
        points = average(entries)
        for label in dict.fromkeys(label for label, _, cells in points
                                   if cells["role"][0] == "student"):
            rows = {step: cells for which, step, cells in points if which == label}
            step = claimed.get(label) or max(rows)
            cells = []
            for runs in ((teachers.get(label),), *CONTROLS.values()):
                claim = claims.Claim("", of=f"{label}@{step}", against="control", least=0.0,
                                     measure="equal_kl", sampling=column)
                found = []
                for entry in entries.values():
                    path = [{**row, "policy": "control", "round": 1}
                            for (run, _), row in paths[origin(name, entry)].items() if run in runs]
                    if path:
                        found.append(claims.value(claim, {
                            **entry, "rows": [*entry["rows"], *path]}))
                cells.append(difference(found))
            if any(cells):
                lines.append(f"| {name} | {label}@{step} | {mean(rows[step]['kl']):.4f} "
                             f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(found):
    """[(value, note)] by seed -> mean ± 95 %; a star where the control ends at less KL."""
    if not found:
        return ""
    center, half = claims.interval([x for x, _ in found])
    few = "1 seed" if len(found) == 1 else f"{len(found)} seeds"
    spread = f" ± {half:.3f}" if len(found) > 2 else f" ({few})"
    return f"{center:+.3f}{spread}{'*' if any(note for _, note in found) else ''}"


def recorded():
    return sorted(p.stem for p in RECORDS.glob("*.jsonl"))


def config_of(name):
    return options.read_config(erpd.Config, CONFIGS / f"{name}.toml")


# ---------------------------------------------------------------- figures


def figure(panels, size=(13, 4.2)):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, panels, figsize=size)
    for axis in axes:
        axis.grid(alpha=0.3)
    return drawn, axes


def frontier(entries, path):
    """Accuracy against KL of every run, mean and standard error over seeds."""
    drawn, axes = figure(len(COLUMNS), (15, 5.2))
    styles = {"teacher": "o-", "control": "s:", "student": "*-"}
    points = average(entries)
    for axis, column in zip(axes, COLUMNS, strict=True):
        for name in dict.fromkeys(label for label, _, _ in points if label != "base"):
            line = [cells for label, _, cells in points if label == name]
            axis.errorbar([mean(c["kl"]) for c in line], [mean(c[column]) for c in line],
                          [spread(c[column]) for c in line], fmt=styles[line[0]["role"][0]],
                          markersize=9 if line[0]["role"][0] == "student" else 4, linewidth=1,
                          elinewidth=0.6, label=name)
        axis.axhline(mean(points[0][2][column]), color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="KL(policy || base) per token, nats", ylabel="accuracy",
                 title=column)
    axes[0].legend(fontsize=7)
    finish(drawn, path)


def dynamics(entries, runs, path, column="T=0.6 top-p 0.95"):
    """Accuracy and KL at checkpoints, and the training curves, by step."""
    curves = ("entropy", "p_positive", "p_negative", "explained_variance")
    drawn, axes = figure(2 + len(curves), (21, 3.8))
    for run in runs:
        line = [(step, cells) for label, step, cells in average(entries) if label == run]
        base = average(entries)[0][2]
        for axis, name in zip(axes, (column, "kl"), strict=False):
            axis.errorbar([0, *(step for step, _ in line)],
                          [mean(c[name]) for c in (base, *(c for _, c in line))],
                          [spread(c[name]) for c in (base, *(c for _, c in line))],
                          marker="o", markersize=3, linewidth=1, label=run)
        for axis, name in zip(axes[2:], curves, strict=True):
            seeds = [e["curves"][run] for e in entries.values() if run in e["curves"]]
            axis.plot(seeds[0]["step"], [mean(x) for x in zip(
                *(curve[name] for curve in seeds), strict=True)], linewidth=1, label=run)
    for axis, name in zip(axes, (f"accuracy, {column}", "KL / token", *curves), strict=True):
        axis.set(title=name, xlabel="step")
    axes[1].set_yscale("symlog", linthresh=1e-3)
    axes[0].legend(fontsize=7)
    finish(drawn, path)


def rounds(entries, path):
    """Accuracy of each path's last policy by round, and the KL to the first policy."""
    drawn, axes = figure(3)
    for name, goals in config_of("table2").paths:
        line = []
        for k, goal in enumerate(goals, 1):
            run, at, step = goal.partition("@")
            label = run if k == 1 else f"{name}.{run} (round {k})"
            line.append([claims.find(e, label + at + step) for e in entries.values()])
        start = [claims.find(e, "base") for e in entries.values()]
        for axis, column in zip(axes, ("T=1", "T=0.6 top-p 0.95"), strict=False):
            cells = [[r["sampling"][column]["accuracy"] for r in same] for same in (start, *line)]
            axis.errorbar(range(len(cells)), [mean(c) for c in cells], [spread(c) for c in cells],
                          marker="o", markersize=4, label=name)
            axis.set(title=f"accuracy, {column}", xlabel="round")
        axes[2].plot(range(len(line) + 1), [mean([r["kl"] for r in same])
                                            for same in (start, *line)], marker="o", markersize=4)
    axes[2].set(title="KL / token to the first policy", xlabel="round")
    axes[0].legend(fontsize=8)
    finish(drawn, path)


def bars(entries, path):
    """Every student's last checkpoint, above the base."""
    drawn, axes = figure(len(COLUMNS), (15, 4.2))
    points = average(entries)
    last = {label: cells for label, _, cells in points if cells["role"][0] == "student"}
    for axis, column in zip(axes, COLUMNS, strict=True):
        gain = [[x - b for x, b in zip(cells[column], points[0][2][column], strict=True)]
                for cells in last.values()]
        axis.barh(range(len(last)), [mean(g) for g in gain], xerr=[spread(g) for g in gain])
        axis.set(yticks=range(len(last)), yticklabels=list(last) if axis is axes[0] else [],
                 title=f"{column}: minus base")
        axis.axvline(0, color="black", linewidth=0.8)
    finish(drawn, path)


def finish(drawn, path):
    from matplotlib import pyplot as plt
    drawn.tight_layout()
    drawn.savefig(path, dpi=90)
    plt.close(drawn)


FIGURES = {  # name of the picture: (experiment, how it is drawn)
    "figure4": ("figure4", lambda e, p: dynamics(e, ["ppo", "grpo", "sapo", "ce"], p)),
    "figure5": ("figure5", lambda e, p: dynamics(e, ["mse"], p)),
    "figure6": ("figure6", frontier),
    "frontier": ("table1", frontier),
    "rounds": ("table2", rounds),
    "signals": ("table7", bars),
    "ensembles": ("table8", bars),
    "figure9": ("table9", lambda e, p: dynamics(e, ["mse", "mse_fast", "mse_negative_4"], p)),
    "full": ("full", frontier),
    "rules8": ("rules8", frontier),
    "recovery": ("few5", lambda e, p: dynamics(e, ["mse"], p)),
}


# ---------------------------------------------------------------- the page


def block(what):
    """The content of one block: 'summary', 'controls greedy', 'table1 claims', 'table1 rows' or
    'table1 run'.
    """
    if what == "summary":
        return summary(recorded())
    if what.startswith("controls "):
        return controls(what.partition(" ")[2])
    name, part = what.split()
    if not (RECORDS / f"{name}.jsonl").exists():
        return "Not recorded yet.\n"
    entries = claims.read(RECORDS / f"{name}.jsonl")
    if part == "claims":
        return claims.table(config_of(name).claim, entries)
    return rows(entries) if part == "rows" else provenance(name, entries)


def page(text):
    """RESULTS.md with its blocks made anew."""
    return re.sub(r"(<!-- (?!end)(.+?) -->\n).*?(<!-- end -->)",
                  lambda m: m[1] + block(m[2]) + m[3], text, flags=re.S)


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    durable.write_text(Path("RESULTS.md"), page(Path("RESULTS.md").read_text(encoding="utf-8")))
    for name, (experiment, draw) in FIGURES.items():
        if (RECORDS / f"{experiment}.jsonl").exists():
            draw(claims.read(RECORDS / f"{experiment}.jsonl"), RECORDS / f"{name}.png")
    print("RESULTS.md and docs/results/*.png are written")


if __name__ == "__main__":
    runtime.command(main)
