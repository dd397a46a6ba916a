"""results.py - the numbers of an evaluation: estimators, comparisons, tables, plots.

evaluate.py counts, for each policy, benchmark, sampling and prompt, the rewards and lengths of K
samples and the sums of KL and entropy. Here they become a report:

    AVG@K       mean over problems of the share of K samples that are right. Its standard error and
                its 95 % interval are by bootstrap over problems: with 30 problems these matter most
    pass@k      1 - C(n - c, k) / C(n, k), unbiased, from n samples of which c are right
    majority@K  share of problems whose most frequent answer is right; a tie counts its share
    KL          sum of all tokens' KL / number of tokens (kl_sequence: mean of the sequences' sums;
                kl_sampled: log pi - log base of the drawn tokens in the place of the exact KL)
    KL efficiency
                the least sequence KL at which any policy reaches this accuracy, over the sequence
                KL spent. A prompt solved with probability s by the base costs at least
                a ln(a/s) + (1-a) ln((1-a)/(1-s)) to be solved with probability a (data processing),
                and the cheapest way to a mean accuracy tilts all prompts alike:
                a = s e^b / (s e^b + 1 - s)

Two policies are compared on the same problems: the interval is of the paired difference.
docs/evaluation.md says what is counted and why.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy

import durable

DRAWS = 2000  # of every bootstrap, always the same ones

# ---------------------------------------------------------------- estimators


def pass_at_k(n, c, k):
    """Unbiased probability that one of k samples is right, from n samples of which c are."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(rewards, groups):
    """Whether the most frequent answer is right: the share of right ones among the most frequent.

    groups: of each sample the number of its answer, None without one. Equal answers may differ in
    verdict only where the grader could not decide one of them.
    """
    sizes, right = {}, {}
    for reward, group in zip(rewards, groups, strict=True):
        if group is not None:
            sizes[group] = sizes.get(group, 0) + 1
            right[group] = max(right.get(group, 0.0), reward or 0.0)
    top = [group for group, size in sizes.items() if size == max(sizes.values())]
    return sum(right[group] for group in top) / len(top) if top else 0.0


@lru_cache(maxsize=8)
def _resampled(n):
    """How often each of n problems occurs in each draw, [DRAWS, n]."""
    return numpy.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)


def mean_and_error(values):
    """Mean over independent problems, its standard error and 95 % interval by bootstrap:
    (mean, error, low, high).
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, float("nan"), float("nan"), float("nan")
    means = _resampled(n) @ numpy.array(values) / n
    low, high = numpy.quantile(means, (0.025, 0.975))
    return mean, float(means.std()), float(low), float(high)


def ratio_and_error(numerators, denominators):
    """Sum / sum and its standard error over independent problems (delta method)."""
    n, ratio, mean = (len(numerators), sum(numerators) / sum(denominators),
                      sum(denominators) / len(denominators))
    spread = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(spread / (n - 1) / n) / mean if n > 1 else float("nan")


def least_kl(success, accuracy):
    """Least mean sequence KL, in nats, at which any policy reaches a mean accuracy;
    success: the base's, per prompt.

    0 at or below the base's own mean; inf beyond what its support allows (prompts with success 0
    stay unsolved).
    """
    if accuracy <= sum(success) / len(success):
        return 0.0
    movable = [s for s in success if 0 < s < 1]
    certain = sum(s >= 1 for s in success)
    if accuracy >= (len(movable) + certain) / len(success):
        return float("inf")

    def tilt(b):
        return [s / (s + (1 - s) * math.exp(-b)) for s in movable]

    low, high = 0.0, 60.0
    for _ in range(100):
        b = (low + high) / 2
        low, high = (b, high) if (sum(tilt(b)) + certain) / len(success) < accuracy else (low, b)
    kl = sum(_xlogy(a, s) + _xlogy(1 - a, 1 - s) for a, s in zip(tilt(high), movable, strict=True))
    return kl / len(success)


def _xlogy(a, s):
    return a * math.log(a / s) if a > 0 else 0.0


# ---------------------------------------------------------------- a policy on a benchmark


def summarise(cells, samplings, pass_at, success):
    """Per-prompt counts of one policy -> a report row.

    samplings: names, the first is the main one; success: {"sampling": the one drawn as KL is
    scored, "values": the base's probability of success, per prompt}, or None: not known.
    """
    row = {"sampling": {}}
    for name in samplings:
        part = cells[name]
        n, total = len(part[0]["rewards"]), sum(len(c["rewards"]) for c in part)
        cell = {"n": n, "undecided": sum(c["rewards"].count(None) for c in part) / total,
                "length": sum(sum(c["lengths"]) for c in part) / total,
                "truncated": sum(c["truncated"] for c in part) / total,
                "majority": None, "judged": None}
        cell |= zip(("accuracy", "accuracy_se", "accuracy_low", "accuracy_high"),
                    mean_and_error(shares(part)), strict=True)
        if all(c["majority"] is not None for c in part):
            cell["majority"] = sum(c["majority"] for c in part) / len(part)
        if all("judged" in c and None not in c["judged"] for c in part):
            cell["judged"] = sum(sum(c["judged"]) / n for c in part) / len(part)
        row["sampling"][name] = cell
    first = cells[samplings[0]]
    row |= row["sampling"][samplings[0]]
    row["pass_at_k"] = {str(k): sum(pass_at_k(row["n"], c["rewards"].count(1.0), k)
                                    for c in first) / len(first)
                        for k in pass_at if k <= row["n"]}
    d = cells["divergence"]
    row["kl"], row["kl_se"] = ratio_and_error([c["kl"] for c in d], [c["tokens"] for c in d])
    row["kl_sampled"], row["kl_sampled_se"] = ratio_and_error(
        [c["kl_sampled"] for c in d], [c["tokens"] for c in d])
    row["kl_sampled_sequence"] = sum(c["kl_sampled"] for c in d) / sum(c["sequences"] for c in d)
    row["kl_sequence"] = sum(c["kl"] for c in d) / sum(c["sequences"] for c in d)
    row["entropy"] = sum(c["entropy"] for c in d) / sum(c["tokens"] for c in d)
    row["least_kl_sequence"] = row["kl_efficiency"] = None
    if success and row["kl_sequence"] > 0:
        at = row["sampling"][success["sampling"]]  # the distribution that KL is measured of
        floor = least_kl(success["values"], at["accuracy"])
        # a gain within the noise of the accuracy says nothing of what it cost
        mean = sum(success["values"]) / len(success["values"])
        clear = at["accuracy"] - mean > 2 * at["accuracy_se"]
        if clear and math.isfinite(floor):
            row["least_kl_sequence"], row["kl_efficiency"] = floor, floor / row["kl_sequence"]
    return row


def shares(part):
    """Of each prompt the share of its samples that are right; undecided ones are not."""
    return [c["rewards"].count(1.0) / len(c["rewards"]) for c in part]


def paired(a, b):
    """Difference of two policies' shares on the same problems: (mean, error, low, high)."""
    return mean_and_error([x - y for x, y in zip(shares(a), shares(b), strict=True)])


# ---------------------------------------------------------------- selection, comparison


def read_metrics(folder):
    return durable.read_lines(Path(folder) / "metrics.jsonl", ["seconds", "p_positive"], step=int)


def select(rows, run, rule):
    """Pick one checkpoint of a run -> {"run", "rule", "step", "path", "why"}; its accuracy is the
    mean over benchmarks. run: its label.
    """
    of_path = {}
    for row in rows:
        if label(row) == run:
            of_path.setdefault(row["path"], []).append(row)
    if not of_path:
        raise ValueError(f"select: no evaluated policy is named {run!r}")
    mine = [{"step": same[0]["step"], "path": path,
             "accuracy": sum(row["accuracy"] for row in same) / len(same)}
            for path, same in of_path.items()]
    if rule == "last":
        chosen, why = mine[-1], "last checkpoint"
    elif rule == "best":
        chosen = max(mine, key=lambda row: row["accuracy"])
        why = "accuracy " + ", ".join(f"{row['step']}: {row['accuracy']:.3f}" for row in mine)
    else:
        # line s + 1 of the metrics is of the policy after step s; after the last, line s must serve
        p = {m["step"]: m["p_positive"] for m in read_metrics(Path(mine[0]["path"]).parent)
             if m.get("p_positive") is not None}
        curve = {row["step"]: p[line] for row in mine if row["step"] is not None
                 for line in (row["step"], row["step"] + 1) if line in p}
        early = [row for row in mine if row["step"] in curve and 10 <= row["step"] <= 30]
        if not early:
            raise ValueError(f"select: {run} has no checkpoint between steps 10 and 30 "
                             "to be the unlearned policy")
        chosen = min(early, key=lambda row: curve[row["step"]])
        why = "mean p on positives " + ", ".join(
            f"{row['step']}: {curve[row['step']]:.3f}" for row in early)
    return {"run": run, "rule": rule, "step": chosen["step"], "path": chosen["path"], "why": why}


def by_benchmark(rows):
    """{benchmark: its rows}, in order."""
    return {name: [row for row in rows if row["benchmark"] == name]
            for name in dict.fromkeys(row["benchmark"] for row in rows)}


def at_equal_kl(rows):
    """Every student against every single-stage run at the student's own KL:
    [{student, step, benchmark, sampling, against, ...}].

    A run's accuracy at that KL is interpolated in sqrt(KL) on its upper envelope, from the base on;
    "reached" is false where the run never spent that much KL (its best is compared then). Standard
    errors add in quadrature.
    """
    comparisons = []
    for benchmark, same in by_benchmark(rows).items():
        base = next(row for row in same if row["role"] == "base")
        for student in (row for row in same if row["role"] == "student"):
            rivals = [row for row in same if row["role"] in ("teacher", "control")
                      and row["round"] == student["round"]]
            names = dict.fromkeys(row["policy"] for row in rivals)
            for name, which in ((name, which) for name in names for which in student["sampling"]):
                points = envelope([base, *(row for row in rivals if row["policy"] == name)], which)
                accuracy, error = interpolate(points, student["kl"])
                mine = student["sampling"][which]
                comparisons.append({
                    "student": label(student), "step": student["step"], "benchmark": benchmark,
                    "sampling": which, "against": name, "kl": student["kl"],
                    "difference": mine["accuracy"] - accuracy,
                    "se": math.hypot(mine["accuracy_se"], error),
                    "reached": points[-1][0] >= student["kl"]})
    return comparisons


def label(row):
    """A run's name, with its round from the second on."""
    return row["policy"] + (f" (round {row['round']})" if row["round"] > 1 else "")


def envelope(rows, which):
    """[(kl, accuracy, se)] by growing KL:
    the best accuracy that a run had reached at that KL or below.
    """
    best, points = rows[0]["sampling"][which], []
    for row in sorted(rows, key=lambda row: row["kl"]):
        best = max(best, row["sampling"][which], key=lambda cell: cell["accuracy"])
        points.append((row["kl"], best["accuracy"], best["accuracy_se"]))
    return points


def interpolate(points, kl):
    """Accuracy and its error at `kl`, linear in sqrt(kl) between points, beyond them the last's."""
    kl, points = max(kl, 0.0), [(max(x, 0.0), y, e) for x, y, e in points]  # -1e-9 is rounding
    for (x0, y0, e0), (x1, y1, e1) in zip(points, points[1:], strict=False):
        if x0 <= kl < x1:
            w = (math.sqrt(kl) - math.sqrt(x0)) / (math.sqrt(x1) - math.sqrt(x0))
            return (1 - w) * y0 + w * y1, math.hypot((1 - w) * e0, w * e1)
    return points[-1][1:]


def caption(comparisons):
    """Plain words for each student's last checkpoint at equal KL, the unfavourable first;
    a tie is within 2 se.
    """
    last = {c["student"]: c["step"] for c in comparisons}
    several, lines = len({c["benchmark"] for c in comparisons}) > 1, []
    for student, benchmark, which in dict.fromkeys(
            (c["student"], c["benchmark"], c["sampling"]) for c in comparisons):
        words = {"is beaten by": [], "ties with": [], "beats": [], "spent more KL than": []}
        for c in comparisons:
            if (c["student"], c["step"], c["benchmark"], c["sampling"]) == (
                    student, last[student], benchmark, which):
                tie = abs(c["difference"]) <= 2 * c["se"]
                verb = "spent more KL than" if not c["reached"] else "ties with" if tie else \
                    "beats" if c["difference"] > 0 else "is beaten by"
                words[verb].append(f"{c['against']} ({c['difference']:+.3f})")
        said = "; ".join(f"{verb} {', '.join(names)}" for verb, names in words.items() if names)
        lines.append(f"At equal KL, {f'{benchmark}, ' if several else ''}{which}: "
                     f"{student}@{last[student]} {said}.")
    return lines


# ---------------------------------------------------------------- tables and plots


def table(rows, columns):
    """Report rows of one benchmark -> markdown. `columns`: names of the samplings."""
    passes = list(rows[0]["pass_at_k"])
    judged = [c for c in columns if rows[0]["sampling"][c]["judged"] is not None]
    head = ["policy", "step", *columns, *(f"{c}, judged" for c in judged),
            *(f"pass@{k}" for k in passes), f"majority@{rows[0]['n']}", "KL / token",
            "sampled", "KL / sequence", "KL efficiency", "entropy", "length", "truncated",
            "undecided", "training s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [label(row), "" if row["step"] is None else str(row["step"])]
        cells += [f"{row['sampling'][c]['accuracy']:.3f} ± {row['sampling'][c]['accuracy_se']:.3f}"
                  for c in columns]
        cells += [f"{row['sampling'][c]['judged']:.3f}" for c in judged]
        cells += [f"{row['pass_at_k'][k]:.3f}" for k in passes]
        cells += ["" if row["majority"] is None else f"{row['majority']:.3f}"]
        cells += [f"{row['kl']:.5f} ± {row['kl_se']:.5f}", f"{row['kl_sampled']:.5f}",
                  f"{row['kl_sequence']:.4f}",
                  "" if row["kl_efficiency"] is None else f"{row['kl_efficiency']:.2f}",
                  f"{row['entropy']:.3f}", f"{row['length']:.1f}", f"{row['truncated']:.3f}",
                  f"{row['undecided']:.3f}",
                  "" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overview(rows):
    """Accuracy of every policy on every benchmark, and their mean -> markdown."""
    names = list(by_benchmark(rows))
    lines = [f"| policy | step | {' | '.join(names)} | mean |", "|---" * (len(names) + 3) + "|"]
    of_path = {}
    for row in rows:
        of_path.setdefault((label(row), row["step"], row["path"]), {})[row["benchmark"]] = row
    for (policy, step, _), cells in of_path.items():
        values = [cells[name]["accuracy"] for name in names]
        lines.append(f"| {policy} | {'' if step is None else step} | "
                     + " | ".join(f"{cells[name]['accuracy']:.3f} ± "
                                  f"{cells[name]['accuracy_se']:.3f}" for name in names)
                     + f" | {sum(values) / len(values):.3f} |")
    return "\n".join(lines) + "\n"


def differences(pairs):
    """Paired comparisons -> markdown."""
    lines = ["| policy | minus | benchmark | sampling | difference | 95 % interval |",
             "|---|---|---|---|---|---|"]
    def at(name, step):
        return name if step is None else f"{name}@{step}"

    lines += [f"| {at(p['policy'], p['step'])} | {at(p['against'], p['against_step'])} "
              f"| {p['benchmark']} | {p['sampling']} "
              f"| {p['difference']:+.3f} ± {p['se']:.3f} | {p['low']:+.3f} to {p['high']:+.3f} |"
              for p in pairs]
    return "\n".join(lines) + "\n"


def plot(rows, success, path, notes=()):
    """Accuracy against KL per token -> PNG; a panel each for the first and the last sampling.

    success: {"sampling", "values": the base's probability of success per prompt} for the least KL,
    or None.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base = next(row for row in rows if row["role"] == "base")
    styles = {"teacher": dict(marker="o", linestyle="-"),
              "control": dict(marker="s", linestyle=":", markersize=5),
              "student": dict(marker="*", linestyle="-", linewidth=2.2, markersize=12),
              "policy": dict(marker="d", linestyle="-")}
    spent = [row["kl"] for row in rows if row["kl"] > 0] or [1e-3]
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6))
    columns = list(base["sampling"])
    for panel, which in zip(panels, (columns[0], columns[-1]), strict=True):
        if success and which == success["sampling"]:
            mean = sum(success["values"]) / len(success["values"])
            levels = [mean + (0.995 - mean) * i / 60 for i in range(1, 61)]
            bound = [(least_kl(success["values"], a) / base["length"], a) for a in levels]
            panel.plot([x for x, _ in bound if x < 2 * max(spent)],
                       [y for x, y in bound if x < 2 * max(spent)], "k--",
                       linewidth=1, label="least KL of any policy")
        panel.axhline(base["sampling"][which]["accuracy"], color="grey", linewidth=0.8,
                      label="base")
        for name in dict.fromkeys(label(row) for row in rows if row["role"] != "base"):
            line = [row for row in rows if label(row) == name]
            panel.errorbar([r["kl"] for r in line],
                           [r["sampling"][which]["accuracy"] for r in line],
                           [r["sampling"][which]["accuracy_se"] for r in line],
                           label=f"{name} ({line[0]['role']})",
                           elinewidth=0.7, **styles[line[0]["role"]])
        panel.set(xscale="log", xlim=(min(spent) / 1.5, 1.5 * max(spent)),
                  xlabel="KL(policy || base) per token, nats", ylabel="accuracy", title=which)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="upper left")
    if notes:
        figure.text(0.01, 0.005, "\n".join(notes), fontsize=6.5, va="bottom")
    figure.tight_layout(rect=(0, 0.028 * len(notes), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


CURVES = ("p_positive", "p_negative", "kl_reverse", "entropy", "grad_norm", "loss")


def curves(folders, path):
    """Training curves of run folders {name: folder}, from their metrics.jsonl -> PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 7))
    for panel, quantity in zip(panels.flat, CURVES, strict=True):
        for name, folder in folders.items():
            points = [(m["step"], m[quantity]) for m in read_metrics(folder)
                      if durable.number(m.get(quantity))]
            panel.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1)
        panel.set(title=quantity, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def finite(value):
    """The same with null for what is not a number: NaN is not JSON."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(folder, report, draw):
    """report.json, report.md and the plots from a report; returns the text."""
    folder, groups = Path(folder), by_benchmark(report["rows"])
    known = {name: {**told, "mean": sum(told["values"]) / len(told["values"])}
             for name, told in report["success"].items()}
    for told in known.values():
        del told["values"]
    durable.write_text(folder / "report.json", json.dumps(
        finite({**report, "success": known}), indent=2))
    text = overview(report["rows"]) if len(groups) > 1 else ""
    for name, rows in groups.items():
        text += (f"\n## {name}\n\n" if len(groups) > 1 else "") + table(
            rows, list(rows[0]["sampling"]))
    for chosen in report["selection"]:
        text += (f"\nSelected {chosen['run']}@{chosen['step']} "
                 f"(rule {chosen['rule']}: {chosen['why']}).\n")
    if report["judge"]:
        said = ", ".join(f"{name} {value}" for name, value in report["judge"].items() if value)
        text += f"\nA language model judged the answers that the grader does not accept: {said}.\n"
    if report["paired"]:
        text += "\n" + differences(report["paired"])
    notes = caption(report["comparisons"])
    text += "".join(f"\n{line}\n" for line in notes)
    durable.write_text(folder / "report.md", text)
    if draw:
        for name, rows in groups.items():
            mine = [c for c in report["comparisons"] if c["benchmark"] == name]
            plot(rows, report["success"].get(name), folder / (
                "plot.png" if len(groups) == 1 else f"plot_{name}.png"), caption(mine))
        runs = {label(row): Path(row["path"]).parent for row in report["rows"]
                if row["step"] is not None
                and (Path(row["path"]).parent / "metrics.jsonl").is_file()}
        if runs:
            curves(runs, folder / "curves.png")
    return text
