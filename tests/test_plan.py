"""plan.py: its arithmetic against counts of the real code, and the figures that were written down
from it."""

import re

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import memory
import mixing
import model as models
import options
import plan
import sample

FOLDERS = sorted(file.parent for file in (ROOT / "configs").glob("*/config.json"))
RUNS = sorted(file for folder in FOLDERS for file in folder.glob("*.toml"))
KINDS = ["stage1_ce", "stage1_sapo", "stage1_grpo", "stage1_mse", "stage2_strong", "stage2_weak",
         "stage2_earlier", "sample", "evaluate", "rounds"]


def test_seven_models_each_with_every_run():
    assert len(FOLDERS) == 7
    for folder in FOLDERS:
        assert sorted(KINDS) == sorted(file.stem for file in folder.glob("*.toml")), folder.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_shapes_exist_on_the_meta_device(folder):
    """The real shape, without its memory; sizes as published, in billions."""
    published = {"justrl_1_5b": 1.54, "nanbeige4_3b": 3.93, "qwen3_4b": 4.02,
                 "nemotron_nano_4b": 4.51, "acereason_7b": 7.62, "qwen3_5_9b": 8.95,
                 "qwen3_5_27b": 26.9}
    config = models.read_config(folder)
    with torch.device("meta"):
        model = models.Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e9, 2) == published[folder.name]
    assert memory.weights(config)[0] == total
    assert model.head.shape == (config.vocab, config.hidden)


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_config_says_what_it_needs(file, monkeypatch):
    """The line in its head is today's estimate, not that of a year ago."""
    monkeypatch.chdir(ROOT)
    line = re.search(r"^# Estimate \(plan\.py, not measured\): (.*)\.$", file.read_text(), re.M)
    assert line, f"{file} lacks its estimate"
    assert line[1] == plan.estimate(file.relative_to(ROOT))


def test_the_table_in_the_docs_is_the_plan():
    text = (ROOT / "docs" / "models.md").read_text()
    assert plan.HEADER in text
    for folder in FOLDERS:
        assert plan.table(folder) in text


def test_operations_of_a_forward_pass(monkeypatch, policy):
    """The products with weights against torch's own counter; attention by its definition, causal.
    """
    config = models.read_config(policy)
    monkeypatch.setattr(mixing, "attention", lambda q, k, v, packed: q)
    model, T = models.load(policy, dtype=torch.float32), 64
    with FlopCounterMode(display=False) as counter:
        model.logp(torch.ones(T, dtype=torch.long), torch.tensor([0, T]), torch.arange(1, T))
    assert plan.forward_flops(config, T, 0) == pytest.approx(counter.get_total_flops(), rel=0.05)
    scores_and_mix = 2 * 2 * config.heads * config.head_dim * sum(range(1, T + 1))
    assert plan.forward_flops(config, T, T) - plan.forward_flops(config, T, 0) == pytest.approx(
        config.layers * scores_and_mix, rel=0.05)


def test_evaluations_are_counted_as_their_benchmarks_say():
    """Sizes and K of the table, the extra pass for KL, every policy; a limit."""
    def drawn(*overrides):
        return plan.draws(options.read_config(evaluate.Config, None, [
            "base=x", "output=x", *overrides]))

    sets = 'benchmark=[{name="aime24"},{name="imo_answerbench",n=3}]'
    policies = 'policy=[{name="a",path="a"}]'
    assert drawn(sets, policies, "kl_samples=2") == [
        (30 * (32 + 2) * 2, 80896), (400 * (3 + 2) * 2, 80896)]
    plain = "sampling=[{name='x',n=4},{name='greedy',temperature=0.0,n=1}]"
    assert drawn(sets, plain, "max_new_tokens=10", "limit=7") == [(7 * 5, 10), (7 * 4, 10)]
    assert drawn("prompts=p", plain) == [(30 * 5, 32768)]


def test_the_shape_beside_a_config_is_of_its_own_model(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["plan.py", "stage1.py", "--config", "configs/qwen3_4b/stage1_ce.toml"]
    monkeypatch.setattr("sys.argv", command)
    plan.main()
    assert "4.02 billion weights" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--set", "policy=Qwen/Qwen3-32B"])
    with pytest.raises(ValueError, match="policy = Qwen/Qwen3-32B is no folder.*fetch the model"):
        plan.main()


def test_all_folders_of_configs(monkeypatch, capsys):
    """`python plan.py configs/*/`: one of them has no model."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "estimate", lambda file, gpus, gpu: "an estimate")
    monkeypatch.setattr("sys.argv", ["plan.py", "configs/justrl_1_5b/", "configs/toy/"])
    plan.main()
    assert capsys.readouterr().out.count("an estimate") == len(KINDS)
    monkeypatch.setattr("sys.argv", ["plan.py", "configs/toy/"])
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        plan.main()


def test_runs_that_are_there_count_by_their_checkpoints(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"run/step_{step:06d}").mkdir(parents=True)
        (tmp_path / f"run/step_{step:06d}/config.json").write_text("{}")
    cfg = options.read_config(evaluate.Config, None, [
        "base=x", "output=x", "prompts=p", "sampling=[{name='x',n=4}]",
        f"policy=[{{name='a',path='{tmp_path}/run'}},{{name='b',path='gone'}}]"])
    assert plan.draws(cfg) == [(30 * 4 * 5, 32768)]


@pytest.mark.parametrize("text", ["0", "-1", "x", "8xh1000", "8 x h100", "h100"])
def test_machines_that_do_not_exist(text):
    assert plan.machine("16xh200") == (16, plan.GPUS["h200"])
    with pytest.raises(ValueError, match="16xh200|8xh200"):
        plan.machine(text)


def test_slots_cost_memory():
    config = models.read_config(ROOT / "configs" / "qwen3_4b")

    def peak(*overrides):
        cfg = options.read_config(sample.Config, None, [
            "policy=x", "prompts=x", "output=x", *overrides])
        return plan.needs(config, cfg)[0]["peak"]

    assert peak("slots=64") > 10 * peak()
