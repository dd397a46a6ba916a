"""evaluate.py: configs, and whole evaluations: benchmarks, samples kept, graded again, judged."""

import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import evaluate as E
import grade
import model as models
import options
import responses
import results
import rollouts
import sample
import toy

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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
    ("sampling=[]", "sampling"), ("prompts=''", "prompts, or"),
    ("select.0.rule='first'", "select.rule must be one of best, last"),
    ("policy.0.role='techer'", "role must be one of"),
    ("sampling.1.name='T=1'", "T=1"), ("sampling.1.name='divergence'", "divergence")])
def test_bad_configs_are_refused(tmp_path, override, message):
    """Said at once, not after hours of sampling, and never by mixing two columns up."""
    (tmp_path / "c.toml").write_text(CONFIG)
    options.read_config(E.Config, tmp_path / "c.toml")
    with pytest.raises(ValueError, match=message):
        options.read_config(E.Config, tmp_path / "c.toml", [override])


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
    assert report["success"] == {"prompts": {"from": "the prompts file", "sampling": "T=1",
                                             "mean": pytest.approx(0.35)}}
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
    assert (base["kl"], base["kl_se"], base["kl_sequence"], base["kl_sampled"]) == (0.0,) * 4
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
    kl, drawn, entropy, tokens = (torch.zeros(6, dtype=torch.float64) for _ in range(4))
    right, undecided = [0.0] * 6, 0
    for s in sampled:
        text = torch.tensor([*prompts[s.prompt], *s.tokens])
        with torch.no_grad():
            p, q = (torch.log_softmax(m(text, torch.tensor([0, len(text)])) @ m.head.T, 1)
                    [len(prompts[s.prompt]) - 1:-1] for m in (new, old))
        kl[s.prompt] += (p.exp() * (p - q)).sum()
        drawn[s.prompt] += (p - q).gather(1, torch.tensor(s.tokens)[:, None]).sum()
        entropy[s.prompt] -= (p.exp() * p).sum()
        tokens[s.prompt] += len(s.tokens)
        verdict = grade.grade(tokenizer.decode(s.tokens), rows[s.prompt]["answer"], lenient=True)
        right[s.prompt] += verdict == 1.0
        undecided += verdict is None
    ratio, error = results.ratio_and_error(kl.tolist(), tokens.tolist())
    assert got["kl"] == pytest.approx(ratio, rel=1e-4, abs=1e-7)
    assert got["kl_se"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert got["kl_sequence"] == pytest.approx(float(kl.sum()) / 24, rel=1e-4, abs=1e-7)
    assert got["kl_sampled"] == pytest.approx(
        float(drawn.sum() / tokens.sum()), rel=1e-4, abs=1e-7)
    assert got["entropy"] == pytest.approx(float(entropy.sum() / tokens.sum()), rel=1e-5)
    assert got["length"] == float(tokens.sum()) / 24
    assert got["truncated"] == sum(not s.finished for s in sampled) / 24
    assert got["undecided"] == undecided / 24
    assert [got[name] for name in ("accuracy", "accuracy_se", "accuracy_low", "accuracy_high")
            ] == pytest.approx(results.mean_and_error([c / 4 for c in right]))
    assert got["pass_at_k"] == pytest.approx({
        str(k): sum(results.pass_at_k(4, int(c), k) for c in right) / 6 for k in (1, 2, 4)})
    success = [r["success"] for r in rows]
    if got["least_kl_sequence"] is None:  # within the noise of the accuracy
        assert got["accuracy"] - 0.35 <= 2 * got["accuracy_se"] and got["kl_efficiency"] is None
    else:
        assert got["least_kl_sequence"] == pytest.approx(results.least_kl(success, got["accuracy"]))


def test_a_second_run_measures_nothing(evaluated, monkeypatch):
    """A stopped evaluation goes on where it was; asked again, it only draws the report anew."""
    folder = evaluated["folder"]
    before = {f: f.stat().st_mtime_ns for f in (folder / "report" / "samples").rglob("*")}
    monkeypatch.setattr(E, "measure", None)  # would fail if anything were sampled
    evaluate_here(monkeypatch, folder)
    assert {f: f.stat().st_mtime_ns for f in (folder / "report" / "samples").rglob("*")} == before
    assert json.loads((folder / "report" / "report.json").read_text()) == evaluated["report"]


def test_one_rank_finds_the_same_as_two(evaluated, monkeypatch, tmp_path):
    """Ranks share the prompts; no prompt may be lost, doubled or drawn differently."""
    evaluate_here(monkeypatch, evaluated["folder"], f"output={tmp_path}", "plot=false")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert not (tmp_path / "plot.png").exists()
    for one, two in zip(rows, evaluated["report"]["rows"], strict=True):
        assert one.pop("samples") != two["samples"]
        for name in ("accuracy", "accuracy_se", "length", "truncated", "pass_at_k"):
            assert one[name] == two[name], name
        for name in ("kl", "kl_se", "kl_sequence", "entropy"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7), name
        assert one["sampling"] == two["sampling"]


def test_other_settings_are_other_cells(evaluated, monkeypatch, tmp_path):
    """Without a sampling drawn as KL is scored, KL has its own pass and no efficiency is given."""
    folder = evaluated["folder"]
    told = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "p.jsonl").write_text("".join(
        json.dumps({k: v for k, v in line.items() if k != "success"}) + "\n" for line in told))
    evaluate_here(monkeypatch, folder, f"output={tmp_path}", f"prompts={tmp_path}/p.jsonl",
                  "limit=3", "kl_temperature=0.7", "kl_samples=2", "sampling.0.n=2", "plot=false",
                  "select=[]", "pass_at=[1]")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["success"] == {}  # no sampling is of the distribution that KL is measured of
    assert all(r["kl_efficiency"] is None for r in report["rows"])
    assert report["rows"][0]["kl"] == 0.0 and report["rows"][1]["kl"] > 0
    passes = [part for part in (tmp_path / "samples").iterdir() if list(part.glob("kl_*"))]
    assert len(passes) == 4
    for part in passes:
        cells = json.loads(next(part.glob("kl_*")).read_text())["cells"]
        assert not list(part.glob("rewards_*"))  # nobody asks for the rewards of that pass
        assert [cell["sequences"] for cell in cells] == [2, 2, 2]
        drawn = lines(tmp_path)[part.name]
        assert [cell["tokens"] for cell in cells] == [
            sum(len(drawn[p, j]["tokens"]) for j in range(2)) for p in range(3)]


def test_equal_names_are_refused(evaluated, monkeypatch, tmp_path):
    """Two policies of one name would be one line in table and plot."""
    with pytest.raises(ValueError, match="policy names must differ: 'teacher' stands twice"):
        evaluate_here(monkeypatch, evaluated["folder"], f"output={tmp_path}",
                      "policy.1.name=teacher")


# ---------------------------------------------------------------- samples are kept


def jsonl(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines(folder):
    """Every kept sample, {folder of the sampling: {(problem, sample): line}}."""
    return {part.name: {(line["problem"], line["sample"]): line for file in part.glob("rank_*")
                        for line in map(json.loads, file.read_text().splitlines())}
            for part in (folder / "samples").iterdir()}


@pytest.fixture
def copied(evaluated, tmp_path):
    """The evaluation's folder, to be damaged."""
    shutil.copytree(evaluated["folder"] / "report", tmp_path / "report")
    return tmp_path / "report"


def rerun(monkeypatch, evaluated, folder, *overrides):
    evaluate_here(monkeypatch, evaluated["folder"], f"output={folder}", "plot=false", *overrides)
    return json.loads((folder / "report.json").read_text())


def forget(folder):
    """Leave the samples, take away what was made of them."""
    for file in (*folder.glob("samples/*/rewards_*"), *folder.glob("samples/*/kl_*")):
        file.unlink()


def test_every_sample_is_kept_once(evaluated, copied):
    """4 policies in 3 samplings of 4, 2 and 1 samples of 6 problems; each folder says what it is
    of."""
    kept = lines(copied)
    assert sorted(len(part) for part in kept.values()) == 4 * [6] + 4 * [12] + 4 * [24]
    assert sum(len(f.read_text().splitlines()) for f in copied.glob("samples/*/rank_*")) == 4 * 42
    tokenizer = models.Tokenizer(evaluated["folder"] / "base")
    for line in next(iter(kept.values())).values():
        assert line["text"] == tokenizer.decode(line["tokens"])
    for row in evaluated["report"]["rows"]:
        for name, folder in row["samples"].items():
            told = json.loads((Path(folder) / "settings.json").read_text())
            assert told["policy"].startswith(row["policy"]) and told["sampling"]["name"] == name
            assert told["problems"] == list("012345")


def test_a_killed_evaluation_goes_on(evaluated, copied, monkeypatch):
    """Kill -9 in the middle: half a line, files of more ranks than there are now. What is there is
    not drawn again, what is not is drawn the same."""
    whole = lines(copied)
    forget(copied)
    for part in sorted(copied.glob("samples/*"))[:6]:
        first, second = sorted(part.glob("rank_*"))
        text = first.read_text()
        first.write_text(text[:2 * len(text) // 3])
        second.rename(second.with_name("rank_007.jsonl"))
    drawn, stream = [], sample.stream
    monkeypatch.setattr(sample, "stream", lambda *a, **k: (
        drawn.append(item) or item for item in stream(*a, **k)))
    again = rerun(monkeypatch, evaluated, copied)
    assert 0 < len(drawn) < 4 * 42 / 3
    for name, part in lines(copied).items():
        assert part.keys() == whole[name].keys()
        assert all(part[k]["tokens"] == whole[name][k]["tokens"] for k in part)
    assert sum(len(f.read_text().splitlines()) for f in copied.glob("samples/*/rank_*")) == 4 * 42
    for a, b in zip(again["rows"], evaluated["report"]["rows"], strict=True):
        assert a["sampling"] == b["sampling"]


def test_more_samples_join_those_that_are_there(evaluated, copied, monkeypatch):
    """Another name and a larger n: only what is missing is drawn. A smaller n uses the first."""
    before = lines(copied)
    report = rerun(monkeypatch, evaluated, copied, "sampling.0.n=6", "sampling.0.name='six'")
    after = lines(copied)
    assert before.keys() == after.keys()
    grown = [name for name in before if len(after[name]) > len(before[name])]
    assert len(grown) == 4 and all(len(after[name]) == 36 for name in grown)
    for name in before:
        assert all(after[name][k] == before[name][k] for k in before[name])
    assert report["rows"][0]["n"] == 6
    monkeypatch.setattr(sample, "stream", None)
    fewer = rerun(monkeypatch, evaluated, copied, "sampling.0.n=2", "pass_at=[1]")
    assert fewer["rows"][0]["n"] == 2


def test_a_new_grader_over_old_samples(evaluated, copied, monkeypatch):
    """--regrade, other gold answers, another grader: counted anew, nothing drawn or scored."""
    monkeypatch.setattr(models, "load", None)
    reward = 1.0
    monkeypatch.setattr(rollouts, "rewards", lambda rows, texts, **options: [reward, None] * (
        len(rows) // 2))
    before = evaluated["report"]["rows"]
    assert [r["accuracy"] for r in rerun(monkeypatch, evaluated, copied)["rows"]] == [
        r["accuracy"] for r in before]
    with monkeypatch.context() as patched:
        patched.setattr(options, "parse", lambda kind, text, switches, parse=options.parse: parse(
            kind, text, [*sys.argv[1:], "--regrade"], switches))
        after = rerun(patched, evaluated, copied)["rows"]
    assert all(r["accuracy"] == r["undecided"] == 0.5 for r in after)
    assert [(r["kl"], r["length"]) for r in after] == [(r["kl"], r["length"]) for r in before]
    reward = 0.0
    rows = [json.loads(line) for line in (evaluated["folder"] / "prompts.jsonl").open()]
    corrected = jsonl(copied / "p.jsonl", *(row | {"answer": "7"} for row in rows))
    after = rerun(monkeypatch, evaluated, copied, f"prompts={corrected}")["rows"]
    assert all(r["accuracy"] == 0.0 for r in after)
    monkeypatch.setattr(responses, "GRADER", ("grade",))
    reward = 1.0
    after = rerun(monkeypatch, evaluated, copied)["rows"]
    assert all(r["accuracy"] == 0.5 for r in after)


def test_another_prompt_means_other_samples(evaluated, copied, monkeypatch):
    """A changed chat template is another question, although the weights are the same."""
    before = lines(copied)
    rerun(monkeypatch, evaluated, copied, 'chat.template="{problem} "', "select=[]")
    after = lines(copied)
    assert len(after) == 2 * len(before) and before.keys() < after.keys()


def test_a_damaged_sample_is_named(evaluated, copied, monkeypatch):
    forget(copied)
    file = min(copied.glob("samples/*/rank_*"))
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"problem": 6}), *rest]) + "\n")
    with pytest.raises(ValueError, match=f"{file}, line 1: .*not asked for.*delete"):
        rerun(monkeypatch, evaluated, copied)


@pytest.mark.parametrize("override, words", [
    ("limit=-2", "limit"), ("slots=-1", "slots"), ("max_tokens=0", "max_tokens"),
    ("sampling.0.top_p=2.0", "sampling.top_p"), ("kl_temperature=0.0", "kl_temperature"),
    ("kl_samples=0", "kl_samples"), ("judge.endpoint=x", "endpoint and model")])
def test_impossible_values_are_refused_at_once(tmp_path, override, words):
    (tmp_path / "c.toml").write_text(CONFIG)
    with pytest.raises(ValueError, match=words):
        options.read_config(E.Config, tmp_path / "c.toml", [override])


def test_policies_of_two_rounds(evaluated, copied, monkeypatch):
    """A name alone is not enough where a run has several rounds."""
    folder = evaluated["folder"]
    policies = ",".join(f'{{name="x",path="{folder}/{path}",role="student",round={k}}}' for k, path
                        in ((1, "teacher/step_000020"), (2, "base")))
    options = [f"policy=[{policies}]", "select=[]"]
    with pytest.raises(ValueError, match="must name one"):
        rerun(monkeypatch, evaluated, copied, *options, 'compare=[{policy="y"}]')
    report = rerun(monkeypatch, evaluated, copied, *options,
                   'compare=[{policy="x"},{policy="x (round 2)"}]')
    first, second = (p for p in report["paired"] if p["sampling"] == "T=1")
    assert first["step"] == 20 and second["step"] is None
    assert (second["difference"], second["low"]) == (0.0, 0.0)
    base, one, two = report["rows"]
    assert first["difference"] == pytest.approx(one["accuracy"] - base["accuracy"])
    assert two["accuracy"] == base["accuracy"]


# ---------------------------------------------------------------- benchmarks, code, the judge


def test_benchmarks(evaluated, monkeypatch, tmp_path):
    """A named set from a local file in its own fields, sampled as its table says, beside one of
    ours; compared pairwise."""
    own = jsonl(tmp_path / "own.jsonl", *(
        {"question": f"{i}+{i}=", "answer": f"so\n#### {2 * i}"} for i in range(1, 4)))
    ours = jsonl(tmp_path / "ours.jsonl", *(
        {"id": i, "problem": f"{i}*{i}=", "answer": i * i} for i in range(1, 3)))
    entry = E.problems.entry("gsm8k")
    monkeypatch.setattr(E.problems, "entries", lambda: {"gsm8k": dataclasses.replace(
        entry, k=2, max_new_tokens=5, prompt="{problem}")})
    sets = f'benchmark=[{{name="gsm8k",prompts="{own}"}},{{name="ours",prompts="{ours}"}}]'
    rest = ["prompts=''", "pass_at=[1,2]", "select=[]", "max_new_tokens=8",
            'compare=[{policy="student"},{policy="student",against="teacher"}]']
    with pytest.raises(ValueError, match="benchmark ours is not in .*needs a .*sampling"):
        rerun(monkeypatch, evaluated, tmp_path / "none", sets, "sampling=[]", *rest)
    report = rerun(monkeypatch, evaluated, tmp_path / "out", sets, *rest)
    assert [(r["policy"], r["benchmark"]) for r in report["rows"]] == [
        (name, b) for name in ("base", "teacher", "teacher", "student") for b in ("gsm8k", "ours")]
    assert len(report["paired"]) == 2 * 2 * 3
    for pair in report["paired"]:
        assert pair["low"] <= pair["difference"] <= pair["high"]
        cells = {r["policy"]: r["sampling"][pair["sampling"]]["accuracy"] for r in report["rows"]
                 if r["benchmark"] == pair["benchmark"]}
        assert pair["difference"] == pytest.approx(cells[pair["policy"]] - cells[pair["against"]])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| policy | step | gsm8k | ours | mean |" in text and "## ours" in text
    alone = rerun(monkeypatch, evaluated, tmp_path / "out", sets.split("},{")[0] + "}]",
                  "sampling=[]", *rest[:3], "max_new_tokens=0")
    assert max(r["length"] for r in report["rows"]) > 5 >= max(r["length"] for r in alone["rows"])
    assert list(alone["rows"][0]["sampling"]) == ["AVG@2"] and alone["rows"][0]["n"] == 2


def test_programs(evaluated, monkeypatch, tmp_path):
    """A prompts file of programs: graded by running them, no majority among them."""
    tests = {"inputs": ["2"], "outputs": ["4"]}
    file = jsonl(tmp_path / "p.jsonl", {"id": "a", "problem": "double", "tests": tests},
                 {"id": "b", "problem": "1+1=", "answer": "3"})
    program = "```python\nprint(2 * int(input()))\n```"
    monkeypatch.setattr(models.Tokenizer, "decode", lambda *_, **__: program)
    try:
        E.sandbox.check()
    except OSError as error:
        pytest.skip(f"no isolation here: {error}")
    report = rerun(monkeypatch, evaluated, tmp_path / "out", f"prompts={file}", "select=[]")
    assert all(r["accuracy"] == 0.5 and r["majority"] is None for r in report["rows"])
    file.write_text(file.read_text().replace('["4"]', '["5"]'))
    report = rerun(monkeypatch, evaluated, tmp_path / "out", f"prompts={file}", "select=[]")
    assert all(r["accuracy"] == 0.0 for r in report["rows"])
    file.write_text(file.read_text().replace('["5"]', '["5", "6"]'))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: tests: "):
        rerun(monkeypatch, evaluated, tmp_path / "out", f"prompts={file}", "select=[]")


def test_the_judge_is_asked_about_what_is_not_right(evaluated, copied, monkeypatch):
    """Its verdicts stand beside the grader's, in a cache for the next time."""
    seen = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(json.loads(body)["messages"][0]["content"])
            reply = json.dumps({"choices": [{"message": {"content": "VERDICT: equal"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = [f'judge.endpoint="http://127.0.0.1:{server.server_port}/v1"', 'judge.model="m"']
    try:
        report = rerun(monkeypatch, evaluated, copied, *options)
        asked = len(seen)
        again = rerun(monkeypatch, evaluated, copied, *options)
        assert len(seen) == asked == report["judge"]["asked"] > 0
        assert again["rows"] == report["rows"] and again["judge"]["asked"] == 0
    finally:
        server.shutdown()
        server.server_close()
    cells = [json.loads(f.read_text())["cells"] for f in copied.glob("samples/*/rewards_*")]
    wrong = sum(a is not None for part in cells for cell in part for a in cell["answers"])
    assert wrong >= asked  # equal ones are asked once
    for a, b in zip(report["rows"], evaluated["report"]["rows"], strict=True):
        assert a["accuracy"] == b["accuracy"] and a["judged"] > a["accuracy"]
    text = (copied / "report.md").read_text()
    assert "T=1, judged" in text and "judged the answers" in text and "model m" in text
    # a budget that is not enough gives no number, nor does a server that is gone; the report stands
    (copied / "judge.jsonl").unlink()
    report = rerun(monkeypatch, evaluated, copied, *options)
    assert report["rows"][0]["judged"] is None and "refused" in report["judge"]["reason"]
