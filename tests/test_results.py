"""results.py: estimators, the least KL, comparisons, selection, tables, plots."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import results as R

PROBABILITIES = st.floats(0.01, 0.99)


def divergence(a, s):
    """KL of two coins, in nats."""
    return sum(x * math.log(x / y) for x, y in ((a, s), (1 - a, 1 - s)) if x > 0)


def row(policy, role, kl, *accuracies, step=None, se=0.01, **more):
    """A report row; accuracies are those of the samplings "T=1" and "greedy"."""
    cells = {name: {"accuracy": a, "accuracy_se": se, "judged": None} for name, a in zip(
        ("T=1", "greedy"), accuracies, strict=False)}
    return {"policy": policy, "role": role, "step": step, "path": f"runs/{policy}/step_{step}",
            "sampling": cells, "accuracy": accuracies[0], "accuracy_se": se, "kl": kl,
            "kl_se": 0.001, "kl_sequence": 30 * kl, "kl_sampled": kl, "kl_efficiency": None,
            "entropy": 0.5,
            "pass_at_k": {"1": accuracies[0], "4": 0.9}, "length": 30.0, "truncated": 0.0,
            "seconds": None, "round": 1, "benchmark": "prompts", "n": 4, "majority": 0.75,
            "undecided": 0.0, **more}


BASE = row("base", "base", 0.0, 0.5, 0.4)
CONTROL = [row("tuned", "control", 0.01, 0.6, 0.5, step=8),
           row("tuned", "control", 0.04, 0.8, 0.7, step=16)]


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_that_of_all_subsets(n):
    """Any-of-n or the plug-in estimate are biased: the mean over all subsets is not."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert R.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_mean_and_error():
    """The bootstrap's error of a mean is known in closed form; one problem has none."""
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, error, low, high = R.mean_and_error(values.tolist())
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std(correction=0) / 40 ** 0.5), rel=0.05)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert R.mean_and_error(values.tolist()) == (mean, error, low, high)  # the same draws
    assert R.mean_and_error([1.0] * 9) == (1.0, 0.0, 1.0, 1.0)
    mean, *unknown = R.mean_and_error([0.25])
    assert mean == 0.25 and all(math.isnan(x) for x in unknown)


@pytest.mark.parametrize("rewards, groups, share", [
    ([1.0, 1.0, 0.0], [0, 0, 1], 1.0), ([1.0, 0.0, 0.0], [0, 1, 1], 0.0),
    ([1.0, 0.0], [0, 1], 0.5), ([1.0, 0.0, 0.0, 0.0, 0.0], [0, 1, 1, 0, None], 0.5),
    ([0.0, 0.0], [None, None], 0.0), ([0.0, 1.0, 0.0], [None, 2, None], 1.0),
    ([None, None, 1.0], [0, 0, 1], 0.0), ([None, 1.0], [0, 0], 1.0)])
def test_majority(rewards, groups, share):
    """The most frequent answer counts, right or not; a tie counts its share, silence nothing."""
    assert R.majority(rewards, groups) == share


def counted(*rewards, **more):
    return {"rewards": list(rewards), "lengths": [10] * len(rewards), "truncated": 1,
            "majority": 0.5, **more}


def test_summarise():
    """Each number of a row from counts that one can do in one's head."""
    kl = {"kl": 2.0, "kl_sampled": 1.0, "entropy": 8.0, "tokens": 40, "sequences": 2}
    cells = {"a": [counted(1.0, 0.0, None, 0.0), counted(1.0, 1.0, 1.0, 1.0)],
             "b": [counted(0.0), counted(1.0)], "divergence": [kl, {**kl, "kl": 4.0}]}
    r = R.summarise(cells, ["a", "b"], [1, 4, 5], None)
    assert r["accuracy"] == 0.625 and r["undecided"] == 0.125 and r["n"] == 4
    assert r["accuracy_low"] == 0.25 and r["accuracy_high"] == 1.0
    assert r["length"] == 10 and r["truncated"] == 0.25 and r["majority"] == 0.5
    assert r["pass_at_k"] == {"1": 0.625, "4": 1.0}  # not of 5: there are 4 samples
    assert (r["kl"], r["kl_sampled"], r["kl_sequence"], r["entropy"]) == (
        6 / 80, 2 / 80, 1.5, 0.2)
    assert r["kl_efficiency"] is None and r["sampling"]["b"]["accuracy"] == 0.5
    assert r["judged"] is None
    for cell in cells["a"]:
        cell["judged"] = [1.0, 1.0, 0.0, 0.0]
    cells["b"][0]["majority"] = None  # of a program
    r = R.summarise(cells, ["a", "b"], [1], None)
    assert r["judged"] == 0.5 and r["sampling"]["b"]["majority"] is None
    cells["a"][0]["judged"][2] = None  # one answer without a verdict: no number
    assert R.summarise(cells, ["a", "b"], [1], None)["judged"] is None


def test_paired_differences_are_narrower_than_their_parts():
    """Problems differ more than policies: the pairing takes that out."""
    g = torch.Generator().manual_seed(0)
    hard = torch.rand(200, generator=g) < 0.5
    first = [counted(*([1.0] * 4 if h else [0.0] * 4)) for h in hard]
    second = [counted(*([1.0] * 3 + [0.0] if h else [0.0] * 4)) for h in hard]
    mean, error, low, high = R.paired(first, second)
    assert mean == pytest.approx(0.25 * float(hard.float().mean())) and low < mean < high
    assert error < 0.5 * R.mean_and_error(R.shares(first))[1]
    assert R.paired(first, first) == (0.0, 0.0, 0.0, 0.0)


def test_ratio_and_error():
    """KL per token is a ratio of sums: its error must count the lengths' spread too (bootstrap)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, (300,), generator=generator).double()
    noise = torch.rand(300, dtype=torch.float64, generator=generator)
    kl = tokens * noise * 0.1 + 0.5
    ratio, error = R.ratio_and_error(kl.tolist(), tokens.tolist())
    assert ratio == pytest.approx(float(kl.sum() / tokens.sum()))
    drawn = torch.randint(300, (4000, 300), generator=generator)
    bootstrap = (kl[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert error == pytest.approx(float(bootstrap), rel=0.06)
    assert R.ratio_and_error([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    assert math.isnan(R.ratio_and_error([2.0], [1.0])[1])


# ---------------------------------------------------------------- the least KL


@settings(deadline=None)
@given(s=st.floats(0.001, 0.9), share=st.floats(0.001, 0.999))
def test_least_kl_of_one_prompt(s, share):
    """The closed form of data processing; alike prompts, and hopeless ones, only average it."""
    a = s + share * (1 - s)
    least = divergence(a, s)
    assert R.least_kl([s], a) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert R.least_kl([s] * 5, a) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert R.least_kl([s, 0.0], a / 2) == pytest.approx(least / 2, rel=1e-6, abs=1e-12)
    assert R.least_kl([s, 1.0], (a + 1) / 2) == pytest.approx(least / 2, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(success=st.lists(PROBABILITIES, min_size=1, max_size=8), data=st.data())
def test_no_policy_is_below_the_least_kl(success, data):
    """Any other way to the same mean costs at least as much, or the efficiency would exceed 1."""
    other = [data.draw(PROBABILITIES) for _ in success]
    mean = sum(other) / len(other)
    assume(mean > sum(success) / len(success))
    spent = sum(divergence(a, s) for a, s in zip(other, success, strict=True)) / len(success)
    assert R.least_kl(success, mean) <= spent + 1e-9


@settings(deadline=None, max_examples=30)
@given(first=PROBABILITIES, second=PROBABILITIES, share=st.floats(0.05, 0.95))
def test_least_kl_is_reached(first, second, share):
    """A bound below what is possible would flatter nobody: a fine grid of policies comes close."""
    base = (first + second) / 2
    mean = base + share * (1 - base)
    low, high = max(0.0, 2 * mean - 1), min(1.0, 2 * mean)
    ways = [low + (high - low) * i / 4000 for i in range(4001)]
    best = min((divergence(a, first) + divergence(min(max(2 * mean - a, 0), 1), second)) / 2
               for a in ways)
    least = R.least_kl([first, second], mean)
    assert least <= best + 1e-9 and best == pytest.approx(least, rel=1e-3, abs=1e-5)


def test_least_kl_grows_from_zero_to_infinity():
    """0 up to the base's own mean, growing, infinite beyond what the support allows."""
    success = [0.1, 0.5, 0.9, 0.0, 1.0]
    assert R.least_kl(success, 0.5) == R.least_kl(success, 0.2) == 0.0
    values = [R.least_kl(success, 0.5 + 0.01 * i) for i in range(30)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert R.least_kl(success, 0.7999) < math.inf
    assert R.least_kl(success, 0.8) == R.least_kl(success, 1.0) == math.inf
    assert R.least_kl([0.0, 0.0], 0.1) == math.inf and R.least_kl([1.0], 1.0) == 0.0


# ---------------------------------------------------------------- comparisons at equal KL


def test_envelope_never_falls():
    """A run that degrades is compared by the best it had reached at that KL, from the base on."""
    rows = [BASE, row("t", "teacher", 0.09, 0.7, 0.2), row("t", "teacher", 0.01, 0.6, 0.6),
            row("t", "teacher", 0.16, 0.3, 0.3), row("t", "teacher", 0.04, 0.45, 0.9, se=0.02)]
    assert R.envelope(rows, "T=1") == [
        (0.0, 0.5, 0.01), (0.01, 0.6, 0.01), (0.04, 0.6, 0.01), (0.09, 0.7, 0.01),
        (0.16, 0.7, 0.01)]
    assert R.envelope(rows, "greedy")[2:] == [(x, 0.9, 0.02) for x in (0.04, 0.09, 0.16)]


def test_interpolate():
    """Linear in sqrt(KL); the last point beyond the end; a KL rounded to below 0 is the base."""
    points = [(0.0, 0.5, 0.01), (0.01, 0.6, 0.02), (0.04, 0.8, 0.03)]
    for kl, accuracy, error in ((0.0, 0.5, 0.01), (0.01, 0.6, 0.02), (0.04, 0.8, 0.03),
                                (1.0, 0.8, 0.03), (0.0225, 0.7, math.hypot(0.01, 0.015)),
                                (0.0025, 0.55, math.hypot(0.005, 0.01)), (-1e-9, 0.5, 0.01)):
        assert R.interpolate(points, kl) == pytest.approx((accuracy, error)), kl
    below = [(-1e-9, 0.5, 0.01), *points[1:]]
    assert R.interpolate(below, 0.0025)[0] == pytest.approx(0.55, abs=1e-3)


def test_at_equal_kl():
    """Students against teachers and controls, per sampling, errors in quadrature."""
    student = row("s", "student", 0.0225, 0.65, 0.9, step=10)
    found = R.at_equal_kl([BASE, *CONTROL, student, row("p", "policy", 0.02, 0.9, 0.9)])
    assert [(c["student"], c["step"], c["sampling"], c["against"]) for c in found] == [
        ("s", 10, "T=1", "tuned"), ("s", 10, "greedy", "tuned")]
    assert all(c["kl"] == 0.0225 and c["reached"] for c in found)
    assert [c["difference"] for c in found] == pytest.approx([-0.05, 0.3])
    assert [c["se"] for c in found] == pytest.approx([0.01 * 1.5 ** 0.5] * 2)
    far = R.at_equal_kl([BASE, *CONTROL, row("s", "student", 0.05, 0.7, 0.9)])
    assert not any(c["reached"] for c in far) and far[0]["difference"] == pytest.approx(-0.1)


def test_rounds_are_kept_apart():
    """A student is held against the runs of its own round, and named with it."""
    later = row("tuned", "control", 0.0225, 0.9, 0.9, round=2)
    students = [row("s", "student", 0.0225, 0.65, 0.9, round=r, step=10) for r in (1, 2)]
    first, second = (c for c in R.at_equal_kl([BASE, *CONTROL, later, *students])
                     if c["sampling"] == "T=1")
    assert (first["student"], second["student"]) == ("s", "s (round 2)")
    assert [first["difference"], second["difference"]] == pytest.approx([-0.05, -0.25])


def test_the_caption_says_who_wins():
    """A control that beats the student is named first; only the last checkpoint counts."""
    weak = row("weak", "control", 0.04, 0.55, 0.45)
    alike = row("alike", "teacher", 0.0225, 0.66, 0.9)
    short = row("short", "control", 0.001, 0.9, 0.4)
    students = [row("s", "student", 0.01, 0.9, 0.9, step=10),
                row("s", "student", 0.0225, 0.65, 0.9, step=20)]
    lines = R.caption(R.at_equal_kl([BASE, weak, alike, short, *CONTROL, *students]))
    assert lines[0] == ("At equal KL, T=1: s@20 is beaten by tuned (-0.050); ties with alike "
                        "(-0.010); beats weak (+0.112); spent more KL than short (-0.250).")
    assert lines[1].startswith("At equal KL, greedy: s@20 ties with alike (+0.000); beats weak")
    assert len(lines) == 2 and R.caption([]) == []


# ---------------------------------------------------------------- selection


@pytest.fixture
def run_rows(tmp_path):
    """Rows of a run folder whose metrics.jsonl holds p_positive, once undefined."""
    folder = tmp_path / "run"
    folder.mkdir()
    # the line of step s + 1 is of the policy after step s
    curve = {5: 0.1, 11: 0.5, 17: None, 21: 0.3, 31: 0.4, 41: 0.05}
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "p_positive": p}) + "\n" for step, p in curve.items()))
    accuracies = {4: 0.5, 10: 0.7, 16: 0.6, 20: 0.8, 30: 0.75, 40: 0.6}
    return [BASE, *(row("t", "teacher", 0.01, a, step=step, path=str(folder / f"step_{step:06d}"))
                    for step, a in accuracies.items())]


@pytest.mark.parametrize("rule, step, why", [
    ("best", 20, "20: 0.800"), ("last", 40, "last"), ("unlearned", 20, "10: 0.500, 20: 0.300")])
def test_select(run_rows, rule, step, why):
    """The rule decides on the run's own rows, and the report says on what grounds."""
    chosen = R.select(run_rows, "t", rule)
    assert (chosen["run"], chosen["rule"], chosen["step"]) == ("t", rule, step)
    assert chosen["path"].endswith(f"step_{step:06d}") and why in chosen["why"]


def test_the_last_checkpoint_may_be_the_unlearned_one(run_rows):
    """No line of the metrics is of the policy after the last step: that of the step serves."""
    folder = Path(run_rows[1]["path"]).parent
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "p_positive": p}) + "\n"
        for step, p in {10: 0.6, 11: 0.5, 20: 0.3}.items()))
    chosen = R.select(run_rows, "t", "unlearned")
    assert chosen["step"] == 20 and chosen["why"].endswith("10: 0.500, 20: 0.300")


def test_select_refuses_what_is_not_there(run_rows):
    """A misspelt run, or one without a checkpoint in steps 10-30, is an error, not a guess."""
    with pytest.raises(ValueError, match="no evaluated policy is named 'other'"):
        R.select(run_rows, "other", "best")
    outside = [r for r in run_rows if r["step"] in (None, 4, 40)]
    with pytest.raises(ValueError, match="t has no checkpoint between steps 10 and 30"):
        R.select(outside, "t", "unlearned")


# ---------------------------------------------------------------- table and plot


def test_table():
    """One line a row, as many cells as the head has."""
    rows = [BASE, *CONTROL, row("s", "student", 0.02, 0.65, 0.9, step=10, seconds=12.4,
                                kl_efficiency=0.345)]
    head, rule, *body = R.table(rows, ["T=1", "greedy"]).splitlines()
    assert len(body) == len(rows) and len({line.count("|") for line in (head, rule, *body)}) == 1
    cells = [cell.strip() for cell in body[-1].strip("|").split("|")]
    assert cells == ["s", "10", "0.650 ± 0.010", "0.900 ± 0.010", "0.650", "0.900", "0.750",
                     "0.02000 ± 0.00100", "0.02000", "0.6000", "0.34", "0.500", "30.0", "0.000",
                     "0.000", "12"]
    assert [line.split("|")[1].strip() for line in body] == ["base", "tuned", "tuned", "s"]


@pytest.mark.parametrize("rows", [
    [BASE], [BASE, *CONTROL, row("s", "student", 0.02, 0.65, 0.9), row("p", "policy", 0.0, 1, 1)]],
    ids=["base alone", "all roles"])
def test_plot(tmp_path, rows):
    """A headless machine must get its picture, also of a base alone."""
    R.plot(rows, {"sampling": "T=1", "values": [0.3, 0.7]}, tmp_path / "plot.png", ["a note"])
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_judged_beside_graded():
    """Both numbers are shown, never one in the place of the other."""
    rows = [row("base", "base", 0.0, 0.5, 0.4), row("s", "student", 0.02, 0.65, 0.9, step=10)]
    for r in rows:
        r["sampling"]["T=1"]["judged"] = 0.7
    head, _, _, body = R.table(rows, ["T=1", "greedy"]).splitlines()
    assert "| T=1 | greedy | T=1, judged |" in head and "| 0.900 ± 0.010 | 0.700 |" in body


def test_several_benchmarks(tmp_path):
    """A table each, one of all, a plot each; comparisons stay within a benchmark."""
    rows = [r | {"benchmark": name} for name in ("easy", "hard") for r in (
        BASE, CONTROL[0], row("s", "student", 0.02, 0.65, 0.9, step=10))]
    rows[3]["accuracy"], rows[3]["sampling"] = 0.1, {
        name: cell | {"accuracy": 0.1} for name, cell in BASE["sampling"].items()}
    assert R.overview(rows).splitlines()[2] == (
        "| base |  | 0.500 ± 0.010 | 0.100 ± 0.010 | 0.300 |")
    comparisons = R.at_equal_kl(rows)
    assert {c["benchmark"] for c in comparisons} == {"easy", "hard"}
    pair = {"policy": "s", "against": "base", "step": 10, "against_step": None,
            "benchmark": "hard", "sampling": "T=1",
            "difference": 0.15, "se": 0.01, "low": 0.13, "high": 0.17}
    text = R.write(tmp_path, {"rows": rows, "selection": [], "comparisons": comparisons,
                              "paired": [pair], "success": {}, "judge": None}, True)
    assert "## easy" in text and "## hard" in text and "At equal KL, hard, T=1: s@10" in text
    assert "| s@10 | base | hard | T=1 | +0.150 ± 0.010 | +0.130 to +0.170 |" in text
    assert {"plot_easy.png", "plot_hard.png", "report.json", "report.md"} == {
        file.name for file in tmp_path.iterdir()}


def test_curves(tmp_path):
    """From runs of which one has nothing to draw."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": i, "loss": 1 / i, "entropy": None, "p_positive": 0.5}) + "\n"
        for i in range(1, 5)))
    R.curves({"a": tmp_path / "a", "b": tmp_path / "none"}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
