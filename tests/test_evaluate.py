"""evaluate.py: estimators, the least KL, comparisons, selection, tables, and a whole evaluation."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import evaluate as E
import grade
import model as models
import rollouts
import runtime
import sample
import toy

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PROBABILITIES = st.floats(0.01, 0.99)


def divergence(a, s):
    """KL of two coins, in nats."""
    return sum(x * math.log(x / y) for x, y in ((a, s), (1 - a, 1 - s)) if x > 0)


def row(policy, role, kl, *accuracies, step=None, se=0.01, **more):
    """A report row; accuracies are those of the samplings "T=1" and "greedy"."""
    cells = {name: {"accuracy": a, "accuracy_se": se} for name, a in zip(
        ("T=1", "greedy"), accuracies, strict=False)}
    return {"policy": policy, "role": role, "step": step, "path": f"runs/{policy}/step_{step}",
            "sampling": cells, "accuracy": accuracies[0], "accuracy_se": se, "kl": kl,
            "kl_se": 0.001, "kl_sequence": 30 * kl, "kl_efficiency": None, "entropy": 0.5,
            "pass_at_k": {"1": accuracies[0], "4": 0.9}, "length": 30.0, "truncated": 0.0,
            "seconds": None, "round": 1, **more}


BASE = row("base", "base", 0.0, 0.5, 0.4)
CONTROL = [row("tuned", "control", 0.01, 0.6, 0.5, step=8),
           row("tuned", "control", 0.04, 0.8, 0.7, step=16)]


# ---------------------------------------------------------------- estimators


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_that_of_all_subsets(n):
    """Any-of-n or the plug-in estimate are biased: the mean over all subsets is not."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert E.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_mean_and_error():
    """The unbiased standard error over problems; one problem has none."""
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, error = E.mean_and_error(values.tolist())
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std() / 40 ** 0.5))
    assert E.mean_and_error([0.25])[0] == 0.25 and math.isnan(E.mean_and_error([0.25])[1])


def test_ratio_and_error():
    """KL per token is a ratio of sums: its error must count the lengths' spread too (bootstrap)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 60, (300,), generator=generator).double()
    noise = torch.rand(300, dtype=torch.float64, generator=generator)
    kl = tokens * noise * 0.1 + 0.5
    ratio, error = E.ratio_and_error(kl.tolist(), tokens.tolist())
    assert ratio == pytest.approx(float(kl.sum() / tokens.sum()))
    drawn = torch.randint(300, (4000, 300), generator=generator)
    bootstrap = (kl[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert error == pytest.approx(float(bootstrap), rel=0.06)
    assert E.ratio_and_error([2.0, 4.0], [1.0, 2.0]) == (2.0, 0.0)
    assert math.isnan(E.ratio_and_error([2.0], [1.0])[1])


# ---------------------------------------------------------------- the least KL


@settings(deadline=None)
@given(s=st.floats(0.001, 0.9), share=st.floats(0.001, 0.999))
def test_least_kl_of_one_prompt(s, share):
    """The closed form of data processing; alike prompts, and hopeless ones, only average it."""
    a = s + share * (1 - s)
    least = divergence(a, s)
    assert E.least_kl([s], a) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert E.least_kl([s] * 5, a) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert E.least_kl([s, 0.0], a / 2) == pytest.approx(least / 2, rel=1e-6, abs=1e-12)
    assert E.least_kl([s, 1.0], (a + 1) / 2) == pytest.approx(least / 2, rel=1e-6, abs=1e-12)


@settings(deadline=None)
@given(success=st.lists(PROBABILITIES, min_size=1, max_size=8), data=st.data())
def test_no_policy_is_below_the_least_kl(success, data):
    """Any other way to the same mean costs at least as much, or the efficiency would exceed 1."""
    other = [data.draw(PROBABILITIES) for _ in success]
    mean = sum(other) / len(other)
    assume(mean > sum(success) / len(success))
    spent = sum(divergence(a, s) for a, s in zip(other, success, strict=True)) / len(success)
    assert E.least_kl(success, mean) <= spent + 1e-9


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
    least = E.least_kl([first, second], mean)
    assert least <= best + 1e-9 and best == pytest.approx(least, rel=1e-3, abs=1e-5)


def test_least_kl_grows_from_zero_to_infinity():
    """0 up to the base's own mean, growing, infinite beyond what the support allows."""
    success = [0.1, 0.5, 0.9, 0.0, 1.0]
    assert E.least_kl(success, 0.5) == E.least_kl(success, 0.2) == 0.0
    values = [E.least_kl(success, 0.5 + 0.01 * i) for i in range(30)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert E.least_kl(success, 0.7999) < math.inf
    assert E.least_kl(success, 0.8) == E.least_kl(success, 1.0) == math.inf
    assert E.least_kl([0.0, 0.0], 0.1) == math.inf and E.least_kl([1.0], 1.0) == 0.0


# ---------------------------------------------------------------- comparisons at equal KL


def test_envelope_never_falls():
    """A run that degrades is compared by the best it had reached at that KL, from the base on."""
    rows = [BASE, row("t", "teacher", 0.09, 0.7, 0.2), row("t", "teacher", 0.01, 0.6, 0.6),
            row("t", "teacher", 0.16, 0.3, 0.3), row("t", "teacher", 0.04, 0.45, 0.9, se=0.02)]
    assert E.envelope(rows, "T=1") == [
        (0.0, 0.5, 0.01), (0.01, 0.6, 0.01), (0.04, 0.6, 0.01), (0.09, 0.7, 0.01),
        (0.16, 0.7, 0.01)]
    assert E.envelope(rows, "greedy")[2:] == [(x, 0.9, 0.02) for x in (0.04, 0.09, 0.16)]


def test_interpolate():
    """Linear in sqrt(KL); the last point beyond the end; a KL rounded to below 0 is the base."""
    points = [(0.0, 0.5, 0.01), (0.01, 0.6, 0.02), (0.04, 0.8, 0.03)]
    for kl, accuracy, error in ((0.0, 0.5, 0.01), (0.01, 0.6, 0.02), (0.04, 0.8, 0.03),
                                (1.0, 0.8, 0.03), (0.0225, 0.7, math.hypot(0.01, 0.015)),
                                (0.0025, 0.55, math.hypot(0.005, 0.01)), (-1e-9, 0.5, 0.01)):
        assert E.interpolate(points, kl) == pytest.approx((accuracy, error)), kl
    below = [(-1e-9, 0.5, 0.01), *points[1:]]
    assert E.interpolate(below, 0.0025)[0] == pytest.approx(0.55, abs=1e-3)


def test_at_equal_kl():
    """Students against teachers and controls, per sampling, errors in quadrature."""
    student = row("s", "student", 0.0225, 0.65, 0.9, step=10)
    found = E.at_equal_kl([BASE, *CONTROL, student, row("p", "policy", 0.02, 0.9, 0.9)])
    assert [(c["student"], c["step"], c["sampling"], c["against"]) for c in found] == [
        ("s", 10, "T=1", "tuned"), ("s", 10, "greedy", "tuned")]
    assert all(c["kl"] == 0.0225 and c["reached"] for c in found)
    assert [c["difference"] for c in found] == pytest.approx([-0.05, 0.3])
    assert [c["se"] for c in found] == pytest.approx([0.01 * 1.5 ** 0.5] * 2)
    far = E.at_equal_kl([BASE, *CONTROL, row("s", "student", 0.05, 0.7, 0.9)])
    assert not any(c["reached"] for c in far) and far[0]["difference"] == pytest.approx(-0.1)


def test_rounds_are_kept_apart():
    """A student is held against the runs of its own round, and named with it."""
    later = row("tuned", "control", 0.0225, 0.9, 0.9, round=2)
    students = [row("s", "student", 0.0225, 0.65, 0.9, round=r, step=10) for r in (1, 2)]
    first, second = (c for c in E.at_equal_kl([BASE, *CONTROL, later, *students])
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
    lines = E.caption(E.at_equal_kl([BASE, weak, alike, short, *CONTROL, *students]))
    assert lines[0] == ("At equal KL, T=1: s@20 is beaten by tuned (-0.050); ties with alike "
                        "(-0.010); beats weak (+0.112); spent more KL than short (-0.250).")
    assert lines[1].startswith("At equal KL, greedy: s@20 ties with alike (+0.000); beats weak")
    assert len(lines) == 2 and E.caption([]) == []


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
    chosen = E.select(run_rows, "t", rule)
    assert (chosen["run"], chosen["rule"], chosen["step"]) == ("t", rule, step)
    assert chosen["path"].endswith(f"step_{step:06d}") and why in chosen["why"]


def test_select_refuses_what_is_not_there(run_rows):
    """A misspelt run, or one without a checkpoint in steps 10-30, is an error, not a guess."""
    with pytest.raises(ValueError, match="no evaluated policy is named 'other'"):
        E.select(run_rows, "other", "best")
    outside = [r for r in run_rows if r["step"] in (None, 4, 40)]
    with pytest.raises(ValueError, match="t has no checkpoint between steps 10 and 30"):
        E.select(outside, "t", "unlearned")


def test_checkpoints(tmp_path):
    """A run folder stands for its checkpoints by growing step; leftovers are none."""
    for name in ("step_000100", "step_000020", "step_000003.tmp"):
        (tmp_path / name).mkdir()
        if not name.endswith("tmp"):
            (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step_000007").mkdir()  # without a config.json
    assert E.checkpoints(tmp_path) == [(20, tmp_path / "step_000020"),
                                       (100, tmp_path / "step_000100")]
    assert E.checkpoints(tmp_path / "step_000020") == [(20, tmp_path / "step_000020")]
    with pytest.raises(ValueError, match="neither a checkpoint"):
        E.checkpoints(tmp_path / "step_000007")


# ---------------------------------------------------------------- table and plot


def test_table():
    """One line a row, as many cells as the head has."""
    rows = [BASE, *CONTROL, row("s", "student", 0.02, 0.65, 0.9, step=10, seconds=12.4,
                                kl_efficiency=0.345)]
    head, rule, *body = E.table(rows, ["T=1", "greedy"]).splitlines()
    assert len(body) == len(rows) and len({line.count("|") for line in (head, rule, *body)}) == 1
    cells = [cell.strip() for cell in body[-1].strip("|").split("|")]
    assert cells == ["s", "10", "0.650 ± 0.010", "0.900 ± 0.010", "0.650", "0.900",
                     "0.02000 ± 0.00100", "0.6000", "0.34", "0.500", "30.0", "0.000", "12"]
    assert [line.split("|")[1].strip() for line in body] == ["base", "tuned", "tuned", "s"]


@pytest.mark.parametrize("rows", [
    [BASE], [BASE, *CONTROL, row("s", "student", 0.02, 0.65, 0.9), row("p", "policy", 0.0, 1, 1)]],
    ids=["base alone", "all roles"])
def test_plot(tmp_path, rows):
    """A headless machine must get its picture, also of a base alone."""
    E.plot(rows, ("T=1", [0.3, 0.7]), tmp_path / "plot.png", ["a note"])
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------- config


CONFIG = """
base = "{folder}/base"
prompts = "{folder}/prompts.jsonl"
output = "{folder}/report"
max_new_tokens = 12
lenient = true
pass_at = [1, 2, 4]
max_tokens = 90
seed = 3
[[policy]]
name = "teacher"
path = "{folder}/teacher"
role = "teacher"
[[policy]]
name = "student"
path = "{folder}/student/step_000010"
role = "student"
[[sampling]]
name = "T=1"
n = 4
[[sampling]]
name = "T=0.6"
temperature = 0.6
top_p = 0.95
n = 2
[[sampling]]
name = "greedy"
temperature = 0.0
n = 1
[[select]]
run = "teacher"
rule = "best"
[[select]]
run = "teacher"
rule = "unlearned"
"""


@pytest.mark.parametrize("override, message", [
    ("samplings=[]", r"unknown key samplings; did you mean sampling\?"),
    ("policy.0.rolle='x'", r"unknown key policy\[0\]\.rolle; did you mean policy\[0\]\.role\?"),
    ("sampling=[]", "sampling"), ("select.0.rule='first'", "select.rule must be one of best, last"),
    ("policy.0.role='techer'", "role must be one of"),
    ("sampling.1.name='T=1'", "T=1"), ("sampling.1.name='divergence'", "divergence")])
def test_bad_configs_are_refused(tmp_path, override, message):
    """Said at once, not after hours of sampling, and never by mixing two columns up."""
    (tmp_path / "c.toml").write_text(CONFIG)
    runtime.read_config(E.Config, tmp_path / "c.toml")
    with pytest.raises(ValueError, match=message):
        runtime.read_config(E.Config, tmp_path / "c.toml", [override])


# ---------------------------------------------------------------- a whole evaluation


def perturb(source, target, size, seed):
    """A copy of a checkpoint with noise on every weight."""
    network = models.load(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * p.abs().mean() * torch.randn(p.shape, generator=generator))
    models.save(network, target)


def launch(*command):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def evaluate_here(monkeypatch, folder, *overrides):
    """evaluate.main() in this process, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--config", str(folder / "c.toml"), *(["--set", *overrides] if overrides else [])]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    try:
        E.main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny base, a teacher's run, a student, evaluated by two ranks; a misspelt key refused."""
    folder = tmp_path_factory.mktemp("evaluated")
    shape = toy.Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48)
    toy.write_initial_policy(folder / "initial", toy.Config(output="", shape=shape))
    network = models.load(folder / "initial", dtype=torch.float32)
    with torch.no_grad():
        network.model.embed_tokens.weight.mul_(10)
    models.save(network, folder / "base")
    for run, step, size in (("teacher", 10, 0.1), ("teacher", 20, 0.3), ("student", 10, 0.2)):
        perturb(folder / "base", folder / run / f"step_{step:06d}", size, step)
    (folder / "teacher" / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, "seconds": 0.5, "p_positive": 0.9 - 0.01 * i}) + "\n"
        for i in range(1, 31)))
    problems = ["1+2=", "3*7-4=", "9-9=", "4=", "1*3*7*9=", "5+5-1="]
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"id": i, "problem": text, "answer": str(i % 3), "success": 0.1 + 0.1 * i}) +
        "\n" for i, text in enumerate(problems)))
    (folder / "c.toml").write_text(CONFIG.format(folder=folder))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    config = ["--config", str(folder / "c.toml")]
    whole, misspelt = launch(*two, *config), launch("evaluate.py", *config, "--set", "max_token=9")
    out, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    _, refusal = misspelt.communicate(timeout=120)
    return {"folder": folder, "out": out, "refusal": (misspelt.returncode, refusal),
            "report": json.loads((folder / "report" / "report.json").read_text())}


def test_a_misspelt_key_stops_the_command(evaluated):
    """Exit status 2 and the nearest key."""
    status, text = evaluated["refusal"]
    assert status == 2 and "unknown key max_token; did you mean max_tokens?" in text


def test_the_report_holds_what_is_promised(evaluated):
    """Other tools read these keys."""
    report, folder = evaluated["report"], evaluated["folder"]
    assert {"rows", "selection", "seeds", "config", "comparisons", "success"} <= set(report)
    keys = {"round", "policy", "role", "step", "path", "fingerprint", "sampling", "accuracy",
            "accuracy_se", "pass_at_k", "kl", "kl_se", "kl_sequence", "entropy", "length",
            "truncated", "seconds", "kl_efficiency", "least_kl_sequence"}
    assert all(keys <= set(r) for r in report["rows"])
    assert [(r["policy"], r["step"], r["role"]) for r in report["rows"]] == [
        ("base", None, "base"), ("teacher", 10, "teacher"), ("teacher", 20, "teacher"),
        ("student", 10, "student")]
    assert [r["seconds"] for r in report["rows"]] == [None, 5.0, 10.0, None]
    assert report["seeds"] == [3] and report["config"]["max_new_tokens"] == 12
    best, unlearned = report["selection"]
    accuracy = {r["step"]: r["accuracy"] for r in report["rows"] if r["policy"] == "teacher"}
    assert accuracy[best["step"]] == max(accuracy.values()) and unlearned["step"] == 20
    assert report["success"] == {"from": "the prompts file", "sampling": "T=1",
                                 "mean": pytest.approx(0.35)}
    assert len(report["comparisons"]) == 3  # one student, one teacher, three samplings
    text = (folder / "report" / "report.md").read_text()
    assert text.strip() in evaluated["out"] and text.count("\n| ") == 4
    assert "At equal KL, greedy: student@10" in text and "Selected teacher@" in text
    assert (folder / "report" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    for r in report["rows"]:
        assert r["fingerprint"] == models.fingerprint(r["path"])


def test_the_base_is_at_kl_zero(evaluated):
    """Exactly: the line of every plot starts there."""
    base, *others = evaluated["report"]["rows"]
    assert (base["kl"], base["kl_se"], base["kl_sequence"]) == (0.0, 0.0, 0.0)
    assert base["kl_efficiency"] is None
    assert 0 < others[0]["kl"] < others[2]["kl"] < others[1]["kl"]


@pytest.mark.parametrize("place", [0, 2, 3], ids=["base", "teacher", "student"])
def test_numbers_by_another_way(evaluated, place):
    """Accuracy, length, entropy and exact KL again: sampled anew, scored in float64 one by one."""
    folder, got = evaluated["folder"], evaluated["report"]["rows"][place]
    rows = rollouts.read_prompts(folder / "prompts.jsonl")
    tokenizer, path = models.Tokenizer(folder / "base"), got["path"]
    prompts = [tokenizer.encode(r["problem"]) for r in rows]
    sampled = sample.generate(models.load(path, dtype=torch.float32), prompts, n=4, slots=5,
                              max_new_tokens=12, stop=tokenizer.stop, seed=3, ids=range(6))
    new, old = (models.load(p, dtype=torch.float64) for p in (path, folder / "base"))
    kl, entropy, tokens = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    right, undecided = [0.0] * 6, 0
    for s in sampled:
        text = torch.tensor([*prompts[s.prompt], *s.tokens])
        with torch.no_grad():
            p, q = (torch.log_softmax(m(text, torch.tensor([0, len(text)])) @ m.head.T, 1)
                    [len(prompts[s.prompt]) - 1:-1] for m in (new, old))
        kl[s.prompt] += (p.exp() * (p - q)).sum()
        entropy[s.prompt] -= (p.exp() * p).sum()
        tokens[s.prompt] += len(s.tokens)
        verdict = grade.grade(tokenizer.decode(s.tokens), rows[s.prompt]["answer"], lenient=True)
        right[s.prompt] += verdict == 1.0
        undecided += verdict is None
    ratio, error = E.ratio_and_error(kl.tolist(), tokens.tolist())
    assert got["kl"] == pytest.approx(ratio, rel=1e-4, abs=1e-7)
    assert got["kl_se"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert got["kl_sequence"] == pytest.approx(float(kl.sum()) / 24, rel=1e-4, abs=1e-7)
    assert got["entropy"] == pytest.approx(float(entropy.sum() / tokens.sum()), rel=1e-5)
    assert got["length"] == float(tokens.sum()) / 24
    assert got["truncated"] == sum(not s.finished for s in sampled) / 24
    assert got["undecided"] == undecided / 24
    assert (got["accuracy"], got["accuracy_se"]) == pytest.approx(
        E.mean_and_error([c / 4 for c in right]))
    assert got["pass_at_k"] == pytest.approx({
        str(k): sum(E.pass_at_k(4, int(c), k) for c in right) / 6 for k in (1, 2, 4)})
    success = [r["success"] for r in rows]
    if got["least_kl_sequence"] is None:  # within the noise of the accuracy
        assert got["accuracy"] - 0.35 <= 2 * got["accuracy_se"] and got["kl_efficiency"] is None
    else:
        assert got["least_kl_sequence"] == pytest.approx(E.least_kl(success, got["accuracy"]))


def test_a_second_run_reuses_the_cells(evaluated, monkeypatch):
    """A stopped evaluation goes on where it was; asked again, it only draws the report anew."""
    folder = evaluated["folder"]
    cells = sorted((folder / "report" / "cells").iterdir())
    before = [(f, f.stat().st_mtime_ns) for f in cells]
    assert len(before) == 4
    monkeypatch.setattr(E, "measure", None)  # would fail if anything were sampled
    evaluate_here(monkeypatch, folder)
    assert [(f, f.stat().st_mtime_ns) for f in sorted(
        (folder / "report" / "cells").iterdir())] == before
    again = json.loads((folder / "report" / "report.json").read_text())
    assert again == evaluated["report"]


def test_one_rank_finds_the_same_as_two(evaluated, monkeypatch, tmp_path):
    """Ranks share the prompts; no prompt may be lost, doubled or drawn differently."""
    evaluate_here(monkeypatch, evaluated["folder"], f"output={tmp_path}", "plot=false")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert not (tmp_path / "plot.png").exists()
    for one, two in zip(rows, evaluated["report"]["rows"], strict=True):
        for name in ("accuracy", "accuracy_se", "length", "truncated", "pass_at_k"):
            assert one[name] == two[name], name
        for name in ("kl", "kl_se", "kl_sequence", "entropy"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name
        assert one["sampling"] == two["sampling"]


def test_other_settings_are_other_cells(evaluated, monkeypatch, tmp_path):
    """Without a sampling drawn as KL is scored, KL has its own pass and no efficiency is given."""
    folder = evaluated["folder"]
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps({k: v for k, v in line.items() if k != "success"}) + "\n" for line in lines))
    evaluate_here(monkeypatch, folder, f"output={tmp_path}", f"prompts={tmp_path}/p.jsonl",
                  "limit=3", "kl_temperature=0.7", "kl_samples=2", "sampling.0.n=2", "plot=false",
                  "select=[]", "pass_at=[1]")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["success"] is None  # no sampling is of the distribution that KL is measured of
    assert all(r["kl_efficiency"] is None for r in report["rows"])
    assert report["rows"][0]["kl"] == 0.0 and report["rows"][1]["kl"] > 0
    cells = [json.loads(f.read_text())["cells"] for f in (tmp_path / "cells").iterdir()]
    for cell in cells:
        assert set(cell) == {"T=1", "T=0.6", "greedy", "kl", "divergence"}
        assert [d["sequences"] for d in cell["divergence"]] == [2, 2, 2]
        assert [d["tokens"] for d in cell["divergence"]] == [d["length"] for d in cell["kl"]]


def test_equal_names_are_refused(evaluated, monkeypatch, tmp_path):
    """Two policies of one name would be one line in table and plot."""
    with pytest.raises(ValueError, match="policy names must differ: 'teacher' stands twice"):
        evaluate_here(monkeypatch, evaluated["folder"], f"output={tmp_path}",
                      "policy.1.name=teacher")
