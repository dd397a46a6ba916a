"""erpd.py: names of runs and checkpoints, paths of rounds; what is run, and from where."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import claims
import erpd
import options
import rollouts

TASK = """
output = "unused"
[task]
steps = 2
prompts = 48
validation = 8
test = 12
[shape]
hidden = 32
layers = 2
head_dim = 16
intermediate = 48
[train]
steps = 20
traces = 32
"""
STAGE1 = """
policy = ""
batch = ""
output = ""
steps = 4
[loss]
name = "grpo"
[train]
prompts_per_step = 4
lr = 1e-3
warmup = 0
max_tokens = 4096
checkpoint_every = 2
"""
STAGE2 = """
batch = ""
output = ""
[[signal]]
numerator = "old"
steps = 2
[train]
prompts_per_step = 4
lr = 1e-3
max_tokens = 4096
"""
CONFIG = """
output = "HERE/out"
report = "HERE/report"
record = "HERE/records/tiny.jsonl"
task = "HERE/task.toml"
sample = "HERE/sample.toml"
evaluate = "HERE/evaluate.toml"
sharpened = [0.5]
evaluate_every = 2

[[path]]
name = "distil"
runs = ["student", "both", "back"]
[[path]]
name = "on_policy"
runs = ["online*3"]

[[stage1]]
name = "teacher"
config = "HERE/stage1.toml"
[[stage1]]
name = "recovered"
config = "HERE/stage1.toml"
start = "teacher@2"
set = ['loss={name="ce", reference="start"}']
[[stage1]]
name = "online"
role = "control"
config = "HERE/stage1.toml"
carry = true
sample = ["num_prompts=4"]
set = ["steps=1"]

[[stage2]]
name = "student"
config = "HERE/stage2.toml"
numerator = "teacher"
[[stage2]]
name = "both"
config = "HERE/stage2.toml"
numerator = "teacher"
denominator = "evolving"
then = [{numerator = "recovered", denominator = "teacher@2", set = ["steps=3"]}]
[[stage2]]
name = "back"
config = "HERE/stage2.toml"
numerator = "teacher"
denominator = "student~2"

[[claim]]
text = "one"
of = "student"
least = -1.0
[[claim]]
text = "two"
of = "distil.back (round 3)@2"
against = "sharpened"
measure = "equal_kl"
sampling = "greedy"
most = 1.0
"""


def place(folder, text=CONFIG):
    sample = (ROOT / "configs/toy/sample.toml").read_text()
    for name, was, now in (("num_prompts", 512, 12), ("n", 16, 4), ("max_new_tokens", 160, 24)):
        sample, found = re.subn(rf"^{name} = {was}", f"{name} = {now}", sample, flags=re.M)
        assert found == 1
    evaluate = (ROOT / "configs/toy/evaluate.toml").read_text().replace("= 160", "= 24")
    for name, content in (("task", TASK), ("stage1", STAGE1), ("stage2", STAGE2),
                          ("sample", sample), ("evaluate", evaluate), ("erpd", text)):
        (folder / f"{name}.toml").write_text(content.replace("HERE", str(folder)))
    return folder / "erpd.toml"


def settings(folder):
    return json.loads((folder / "run.json").read_text())["config"]


def test_paths_part_after_the_first_round(tmp_path):
    """Two paths of three rounds: where every run starts, what it is made of, what is reported."""
    command = [sys.executable, str(ROOT / "erpd.py"), "--config", str(place(tmp_path))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    out = tmp_path / "out/seed_0"
    first = out / "round_1"
    # all but what needs an earlier round
    assert {p.name for p in first.iterdir()} == {
        "batch", "teacher", "recovered", "online", "student", "both"}
    assert settings(first / "recovered")["policy"] == f"{first}/teacher/step_000002"
    assert settings(first / "recovered")["loss"]["reference"] == "start"
    second, third = out / "distil/round_2", out / "distil/round_3"
    assert {p.name for p in second.iterdir()} == {"batch", "teacher", "recovered", "both"}
    assert {p.name for p in third.iterdir()} == {"batch", "teacher", "back"}
    assert settings(second / "teacher")["policy"] == f"{first}/student/step_000002"
    signals = settings(second / "both")["signal"]
    assert [(s["numerator"], s["denominator"], s["steps"]) for s in signals] == [
        (f"{second}/teacher/step_000004", "evolving", 2),
        (f"{second}/recovered/step_000004", f"{second}/teacher/step_000002", 3)]
    assert settings(third / "back")["signal"][0]["denominator"] == f"{first}/student/step_000002"
    assert settings(third / "teacher")["policy"] == f"{second}/both/step_000005"
    # the on-policy phase: fresh prompts, the optimiser goes on
    for k in (2, 3):
        online = settings(out / f"on_policy/round_{k}/online")
        before = first if k == 2 else out / "on_policy/round_2"
        assert online["optimizer"] == f"{before}/online"
        assert online["policy"] == f"{before}/online/step_000001"
        batch = rollouts.load(out / f"on_policy/round_{k}/batch")
        assert batch.header["policy"] == online["policy"] and len(batch) == 4 * 4
    # rows: the first round, every second one and the last of each path
    report = json.loads((tmp_path / "report/report.json").read_text())
    rows = [(row["policy"], row["round"], row["step"]) for row in report["rows"]]
    assert len(set(rows)) == len(rows)
    assert {(name, k) for name, k, _ in rows} == {
        ("base", 0), *((name, 1) for name in (
            "sharpened", "teacher", "recovered", "online", "student", "both")),
        *((f"distil.{name}", 2) for name in ("teacher", "recovered", "both")),
        *((f"distil.{name}", 3) for name in ("teacher", "back")),
        ("on_policy.online", 2), ("on_policy.online", 3)}
    assert ("sharpened", 1, 50) in rows
    # the record, and the claims on it
    record = claims.read(tmp_path / "records/tiny.jsonl")[0]
    assert record["experiment"] == "tiny" and len(record["rows"]) == len(rows)
    assert record["curves"]["teacher"]["step"] == [1, 2, 3, 4]
    assert result.stdout.count("| **too few seeds** |") == 2
    # again: nothing to do, nothing recorded twice
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0
    assert again.stdout.count("done before") == again.stdout.count("] python") > 20
    assert len((tmp_path / "records/tiny.jsonl").read_text().splitlines()) == 1
    # another config of the same output does only what is new
    other = place(tmp_path, CONFIG.split("[[claim]]")[0].replace("HERE/report", "HERE/second")
                  .replace('"student", "both", "back"', '"both"').replace("online*3", "online*2"))
    third = subprocess.run([*command[:3], str(other)], cwd=ROOT, capture_output=True, text=True,
                           timeout=100)
    assert third.returncode == 0, third.stdout[-2000:] + third.stderr[-2000:]
    ran = [line for line in third.stdout.splitlines() if re.match(r"\[.*\] \d+ s", line)]
    assert [line.split()[0] for line in ran] == ["[evaluate]"] * 2


@pytest.mark.parametrize("ref, parts", [
    ("ce", ("ce", None, None, 0)), ("ce@16", ("ce", None, 16, 0)),
    ("ce:unlearned", ("ce", ":unlearned", None, 0)), ("ce~2", ("ce", None, None, 2)),
    ("ce@16~1", ("ce", None, 16, 1)), ("a.b-c_1@0~12", ("a.b-c_1", None, 0, 12)),
    ("runs/x/step_000016", ("runs/x/step_000016", None, None, 0)),
])  # fmt: skip
def test_references(ref, parts):
    assert erpd.split(ref) == parts


@pytest.mark.parametrize("change, words", [
    (("student~2", "students~2"), "back: 'students~2' is neither a run"),
    (('start = "teacher@2"', 'start = "recovered"'), "recovered: 'recovered' is neither"),
    (("teacher@2", "teacher:unlearned"), "teacher:unlearned.* is neither"),
    (('start = "teacher@2"', 'start = "teacher:unlearned"\nunlearned = true'), "neither"),
    (('config = "HERE/stage1.toml"\n[[stage1]]\nname = "recovered"\nconfig = "HERE/stage1.toml"\n'
      'start = "teacher@2"', 'config = "HERE/stage1.toml"\nselect = "best"\n[[stage1]]\n'
      'name = "recovered"\nconfig = "HERE/stage1.toml"\nstart = "teacher"'), "name a step"),
    (('"online*3"', '"online*0"'), "path on_policy"),
    (('"online*3"', '"offline"'), "path on_policy: 'offline' is none of the runs"),
    (('name = "on_policy"', 'name = "distil"'), "names of paths"),
    (('name = "on_policy"', 'name = "old"'), "path.name: 'old'"),
    (("evaluate_every = 2", "evaluate_every = 0"), "evaluate_every"),
    (("evaluate_every = 2", "rounds = 2"), "no \\[\\[path\\]\\]"),
    (("least = -1.0", ""), "claim 'one': give one of least and most"),
    (('against = "sharpened"', 'against = "sharpened@50"'), "against a whole run"),
    (('measure = "equal_kl"', 'measure = "colour"'), "measure must be one of accuracy"),
    (('runs = ["online*3"]', "runs = []"), "at least one run"),
    (('runs = ["online*3"]', 'runs = ["back", "online"]'), "made of an earlier round"),
    (('"both", "back"]', '"both", "teacher", "back"]'), "no 'student~2' in round 4 of path 'dis"),
    (('"online*3"', '"online:unlearned"'), "path on_policy: 'online:unlearned' is neither"),
    (('"online*3"', '"online"'), "no later round is for it"),
    (('start = "teacher@2"', 'start = "old"'), "leave it out"),
    (("evaluate_every = 2", 'next = "teacher"'), "next is not read"),
    (("evaluate_every = 2", 'check = {student = "student", teacher = "online"}'), "check.student"),
])  # fmt: skip
def test_what_does_not_fit_together(tmp_path, change, words):
    assert CONFIG.count(change[0]) >= 1
    with pytest.raises(ValueError, match=words):
        options.read_config(erpd.Config, place(tmp_path, CONFIG.replace(*change)))


@pytest.mark.parametrize("change, words", [
    (('numerator = "recovered"', 'numerator = "recovered@3"'), "keeps no checkpoint of step 3"),
    (("sharpened = [0.5]", "sharpened = [0.501]"), "hundredths"),
    (("num_prompts=4", "num_prompt=4"), "num_prompt"),
    (('"student", "both"', '"student@1", "both"'),
     "path distil: student keeps no checkpoint of step 1"),
    (('of = "student"', 'of = "student@3"'), "claim 'one': there will be no 'student@3'"),
    (('of = "student"', 'of = "distil.both (round 3)"'), "there will be no"),
    (('sampling = "greedy"', 'sampling = "T=2"'), "no \\[\\[sampling\\]\\] is named 'T=2'"),
    (('of = "student"', 'of = "teacher"\nmeasure = "signal_negative"'), "have no signal_negative"),
    (('of = "student"', 'of = "base"\nmeasure = "p_positive"'), "base will have no p_positive"),
    (('config = "HERE/stage1.toml"\n[[stage1]]\nname = "recovered"',
      'config = "HERE/stage1.toml"\nunlearned = true\n[[stage1]]\nname = "recovered"'),
     "teacher: unlearned = true needs a checkpoint between steps 10 and 30"),
    (('task = "HERE/task.toml"', 'policy = "p"\nprompts = "nowhere.jsonl"\nvalidation = "v"\n'
      'test = "t"'), "prompts = nowhere.jsonl: there is no such file"),
])  # fmt: skip
def test_what_is_seen_before_anything_runs(tmp_path, change, words):
    assert CONFIG.count(change[0]) >= 1
    with pytest.raises(ValueError, match=words):
        erpd.check_configs(
            options.read_config(erpd.Config, place(tmp_path, CONFIG.replace(*change))))


def test_a_command_runs_again_when_its_output_is_of_another_config(tmp_path, monkeypatch):
    """Two configs that write one folder in turn: A, B, A runs three times, A, A once."""
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: (
        ran.append(command), subprocess.CompletedProcess(command, 0))[1])
    driver = erpd.Driver(erpd.Config(output="x", sample="s", evaluate="e", task="t"), tmp_path)
    file = tmp_path / "e.toml"
    for text in ("a = 1", "a = 1", "a = 2", "a = 1", "a = 1"):
        file.write_text(text)
        driver.run("evaluate", "evaluate.py", file)
        driver = erpd.Driver(driver.cfg, tmp_path)
    assert len(ran) == 3


def test_what_is_made_of_a_run_is_made_again_with_it(tmp_path, monkeypatch):
    """sample, a, b, a student of a, evaluation; then a anew: its student and the evaluation follow,
    b does not, neither at once nor when the driver was stopped in between.
    """
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: (
        ran.append(command[1]), subprocess.CompletedProcess(command, 0))[1])
    cfg = erpd.Config(output="x", sample="s", evaluate="e", task="t")
    report = tmp_path / "evaluate.toml"
    report.write_text("".join(f'[[policy]]\npath = "x/{name}"\n' for name in ("a", "a-2", "s")))

    def pipeline(steps, stop=False):
        driver = erpd.Driver(cfg, tmp_path)
        ran.clear()
        driver.run("sample", "sample.py", "", ["output=x/batch"])
        driver.run("a", "a.py", "", ["batch=x/batch", "output=x/a", f"steps={steps}"])
        if stop:
            return
        driver.run("b", "b.py", "", ["batch=x/batch", "output=x/a-2"])
        driver.run("student", "student.py", "", ["numerator=x/a/step_000002", "output=x/s"])
        driver.run("evaluate", "evaluate.py", report)
        return list(ran)

    assert pipeline(2) == ["sample.py", "a.py", "b.py", "student.py", "evaluate.py"]
    assert pipeline(2) == []
    assert pipeline(4) == ["a.py", "student.py", "evaluate.py"]
    pipeline(6, stop=True)
    assert ran == ["a.py"]
    assert pipeline(6) == ["student.py", "evaluate.py"]
    assert pipeline(6) == []


def test_runs_of_one_name_are_one_run():
    """Experiments share a folder: the same name must mean the same settings in all of them."""
    found = {}
    for file in sorted((ROOT / "configs/toy/paper").glob("*.toml")):
        if file.stem.split("_")[0] in ("sample", "stage1"):
            continue
        cfg = options.read_config(erpd.Config, file)
        erpd.check_configs(cfg)
        assert (cfg.report.endswith(file.stem) and cfg.record.endswith(f"{file.stem}.jsonl")
                and cfg.claim), file
        for run in (*cfg.stage1, *cfg.stage2):
            key = (cfg.output, run.name)
            made = (run.config, run.set, erpd.references(run), getattr(run, "then", None))
            assert found.setdefault(key, made) == made, (file, run.name)
