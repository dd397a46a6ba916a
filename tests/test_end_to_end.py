"""The whole algorithm on a tiny task: every command, the driver, its resume and its report."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

CONFIG = """
output = "{out}"
task = "{here}/task.toml"
sample = "configs/toy/sample.toml"
evaluate = "configs/toy/evaluate.toml"
processes = 1
{more}

[[stage1]]
name = "ce"
config = "configs/toy/stage1.toml"
set = ["steps=6", "train.checkpoint_every=3", "train.checkpoint_at=[]"]
select = "best"

[[stage1]]
name = "mse"
config = "configs/toy/stage1.toml"
set = ["steps=36", "train.checkpoint_every=12", "train.checkpoint_at=[]",
       'loss={{name="mse"}}', "train.lr=1e-3"]
unlearned = true

[[stage2]]
name = "fixed"
config = "configs/toy/stage2.toml"
numerator = "ce"
set = ["signal.0.steps=3", "train.checkpoint_at=[]"]

[[stage2]]
name = "weak"
config = "configs/toy/stage2.toml"
numerator = "mse"
denominator = "mse:unlearned"
set = ["signal.0.steps=3", "train.checkpoint_at=[]"]

[check]
student = "fixed"
teacher = "ce"
"""

TASK = """
output = "unused"
[task]
steps = 2
prompts = 48
validation = 16
test = 24
[shape]
hidden = 32
layers = 2
head_dim = 16
intermediate = 48
[train]
steps = 40
traces = 48
checkpoint_every = 40
"""


def driver(tmp_path, *overrides, more=""):
    (tmp_path / "task.toml").write_text(TASK)
    text = CONFIG.format(out=tmp_path / "out", here=tmp_path, more=more)
    for name, extra in (("sample", "num_prompts = 32\nn = 4\n"), ("evaluate", "")):
        source = (ROOT / f"configs/toy/{name}.toml").read_text()
        for line in extra.splitlines():
            k = line.split(" = ")[0]
            source = (
                "\n".join(line if row.startswith(f"{k} =") else row for row in source.splitlines())
                + "\n"
            )
        (tmp_path / f"{name}.toml").write_text(source)
        text = text.replace(f"configs/toy/{name}.toml", f"{tmp_path}/{name}.toml")
    (tmp_path / "erpd.toml").write_text(text)
    return [
        sys.executable,
        str(ROOT / "erpd.py"),
        "--config",
        str(tmp_path / "erpd.toml"),
        "--set",
        *overrides,
    ]


def test_the_whole_algorithm_is_killed_and_finishes(tmp_path):
    """kill -9 of driver and children in the middle: a second start finishes, a third is idle."""
    command = driver(tmp_path, "seeds=1")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while not (tmp_path / "out/seed_0/round_1/mse/metrics.jsonl").exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert (
        "[sample] done before" in second.stdout
        and "[stage2 fixed] python stage2.py" in second.stdout
    )
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert third.returncode == 0 and third.stdout.count("done before") == 8

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"rows", "selection", "seeds", "config"} <= report.keys() and report["seeds"] == [0]
    names = [(row["policy"], row["step"]) for row in report["rows"]]
    assert names == [
        ("base", None),
        ("ce", 3),
        ("ce", 6),
        ("mse", 12),
        ("mse", 24),
        ("mse", 36),
        ("fixed", 3),
        ("weak", 3),
    ]
    for row in report["rows"]:
        assert {
            "round",
            "policy",
            "step",
            "accuracy",
            "accuracy_se",
            "pass_at_k",
            "kl",
            "kl_se",
            "kl_sequence",
            "entropy",
            "length",
            "truncated",
            "seconds",
        } <= row.keys()
        assert (row["kl"] == 0) == (row["policy"] == "base")
    rules = {(s["run"], s["rule"]): s for s in report["selection"]}
    assert set(rules) == {("ce", "best"), ("mse", "last"), ("mse", "unlearned")}
    unlearned = rules["mse", "unlearned"]
    assert unlearned["step"] in (12, 24)
    assert "12: " in unlearned["why"] and "24: " in unlearned["why"]
    weak = json.loads((tmp_path / "out/seed_0/round_1/weak/run.json").read_text())["config"][
        "signal"
    ][0]
    assert weak["numerator"].endswith("mse/step_000036")
    assert weak["denominator"] == unlearned["path"]
    assert (tmp_path / "out/plot.png").stat().st_size > 10_000
    text = (tmp_path / "out/report.md").read_text()
    assert "At equal KL" in text and "hold" in text.lower()


@pytest.mark.slow
def test_rounds_and_seeds(tmp_path):
    """Round 2 starts from round 1's student, on new rollouts; KL stays to the very first policy."""
    command = driver(tmp_path, "seeds=2", more='rounds = 2\nnext = "fixed"')
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {row["round"] for row in report["rows"]} == {0, 1, 2} and report["seeds"] == [0, 1]
    run = json.loads((tmp_path / "out/seed_1/round_2/ce/run.json").read_text())
    assert run["config"]["policy"].endswith("seed_1/round_1/fixed/step_000003")
    students = [row for row in report["rows"] if row["policy"] == "fixed" and row["seed"] == 0]
    assert students[1]["kl"] > students[0]["kl"] > 0
    assert "difference, mean" in (tmp_path / "out/report.md").read_text()
