"""The value network: what it learns, that its values depend on the data alone, that nothing is lost
on the way, and that a policy trained with them is a checkpoint like any other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from conftest import ROOT, command, movement_error, same_bits, write_batch, write_hybrid
from safetensors.torch import load_file, save_file

import critic
import losses
import model as models
import rollouts
import runtime
import stage1

QUICK = [
    "steps=3",
    "loss.name=ppo",
    "value.steps=6",
    "value.lr=1e-3",
    "value.alpha=1.0",
    "train.prompts_per_step=4",
    "train.lr=1e-3",
    "train.warmup=1",
    "train.max_tokens=64",
    "train.recompute=false",
    "train.checkpoint_every=2",
]


def arguments(policy, batch, output, *more):
    return [f"policy={policy}", f"batch={batch}", f"output={output}", *QUICK, *more]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(output):
    """A copy: the file is mapped into memory, and some tests write over it."""
    return load_file(output / "critic/values.safetensors")["value"].clone()


class Said:
    """Stands in for Ranks where only its voice is asked for."""

    def __init__(self):
        self.text = ""

    def print(self, *text):
        self.text += " ".join(map(str, text)) + "\n"


# ---------------------------------------------------------------- what it learns


def test_it_learns_which_prompts_are_easy(run, tmp_path, policy):
    """Rewards that the prompt decides: the variance they explain rises from none to nearly all."""
    parity = [float(p % 2) for p in range(8) for _ in range(4)]
    batch = write_batch(tmp_path / "batch", policy, reward=parity)
    more = ["steps=1", "value.steps=60", "value.lr=3e-3", "value.prompts_per_step=8"]
    run(stage1, *arguments(policy, batch, tmp_path / "x", *more))
    rows = metrics(tmp_path / "x/critic")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["explained_variance"] == 0 and rows[-1]["explained_variance"] > 0.9
    assert rows[0]["value_positive"] == pytest.approx(0.5)  # the mean reward, to begin with
    assert rows[-1]["value_positive"] > 0.8 and rows[-1]["value_negative"] < 0.2
    b, value = rollouts.load(batch), values(tmp_path / "x")
    assert value.shape == b.tokens.shape and (value[~b.response] == 0).all()
    reward = b.reward.repeat_interleave(b.lengths)
    assert ((value > 0.5) == (reward == 1))[b.response].float().mean() > 0.9


def test_ppo_improves_its_surrogate(run, tmp_path, policy, batch):
    """Whole batch a step: the loss starts at minus the mean of whitened advantages, which is 0, and
    falls."""
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=30", "train.prompts_per_step=8",
                           "train.lr=3e-3", "train.checkpoint_every=30"))
    rows = metrics(tmp_path / "x")
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss"] < -0.1
    assert rows[-1]["clip_low"] > 0 and rows[-1]["clip_high"] > 0


def test_the_policy_holds_no_value_head(run, tmp_path, policy, batch):
    """A checkpoint of a PPO run is a policy folder with the source's very tensors; the critic's own
    folder holds no checkpoint, but the head is in its state."""
    run(stage1, *arguments(policy, batch, tmp_path / "x"))
    folder = tmp_path / "x/step_000003"
    assert load_file(folder / "model.safetensors").keys() == load_file(
        policy / "model.safetensors").keys()
    assert models.load(folder).config == models.load(policy).config
    assert not models.checkpoints(tmp_path / "x/critic")
    state, = (tmp_path / "x/critic/state").iterdir()
    part, = state.iterdir()
    assert load_file(part)["weight.value_head.weight"].abs().sum() > 0


def test_it_is_gone_before_the_policy_is_loaded(run, monkeypatch, tmp_path, policy, batch):
    """PPO takes no more memory than another stage 1: one network at a time, moments and all."""
    networks, load = [], runtime.policy

    def watched(*arguments, **options):
        assert not [network for network in networks if network() is not None]
        network = load(*arguments, **options)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(runtime, "policy", watched)
    run(stage1, *arguments(policy, batch, tmp_path / "x"))
    assert len(networks) >= 2


# ---------------------------------------------------------------- A_t


def test_advantages_of_the_rows_trained_on(policy, batch):
    """gae of each kept response with its own lambda, whitened over these alone; 0 elsewhere."""
    b = rollouts.load(batch)
    kept = torch.arange(len(b))[::3]
    value = torch.where(b.response, torch.rand(len(b.tokens)), 0.0)
    said = Said()
    raw = critic.advantage(value, b, kept, critic.Value(alpha=0.4, whiten=False), said)
    inside = torch.zeros(len(b.tokens), dtype=torch.bool)
    for row in kept.tolist():
        end = int(b.cu_seqlens[row + 1])
        n = int(b.response_length[row])
        lam = min(max(1 - 1 / (0.4 * n), 0.0), 1.0)
        A, following = 0.0, float(b.reward[row])
        for t in reversed(range(end - n, end)):
            A = following - float(value[t]) + lam * A
            following = float(value[t])
            assert float(raw[t]) == pytest.approx(A, abs=1e-5)
        inside[end - n:end] = True
    assert (raw[~inside] == 0).all()
    white = critic.advantage(value, b, kept, critic.Value(alpha=0.4), said)
    torch.testing.assert_close(white[inside], losses.whiten(raw[inside]))
    assert (white[~inside] == 0).all()
    assert "note:" not in said.text
    critic.advantage(value, b, kept, critic.Value(), said)  # the paper's alpha, 13 tokens at most
    assert "lambda 0 to 0, 0 for 100% of the responses" in said.text
    assert "raise value.alpha" in said.text


def test_the_surrogate_gets_them(run, monkeypatch, tmp_path, policy, batch):
    """What the clip is given are the advantages of the values on file, token for token."""
    given, clip = [], losses.grpo

    def watched(logp, old_logp, advantage, **options):
        given.append(advantage)
        return clip(logp, old_logp, advantage, **options)

    monkeypatch.setattr(losses, "grpo", watched)
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=1", "train.prompts_per_step=8",
                           "train.max_tokens=4000"))
    b = rollouts.load(batch)
    settings = critic.Value(alpha=1.0)
    want = critic.advantage(values(tmp_path / "x"), b, torch.arange(len(b)), settings, Said())
    micro, = b.share(range(len(b)), 4000, 0, 1)
    assert len(given) == 1 and torch.equal(given[0], want[micro.place]) and want.any()


def test_undecided_rows_are_not_learnt_from(run, tmp_path, policy, capsys):
    """A row without a reward enters neither the values' training nor the advantages."""
    b = rollouts.load(write_batch(tmp_path / "full", policy))
    reward = [None if i % 4 == 1 else float(r) for i, r in enumerate(b.reward)]
    batch = write_batch(tmp_path / "batch", policy, reward=reward)
    run(stage1, *arguments(policy, batch, tmp_path / "x", "drop_unfinished=true"))
    assert all(row["loss"] is not None for row in metrics(tmp_path / "x/critic"))
    assert "16 of 32 rollouts" in capsys.readouterr().out
    assert values(tmp_path / "x").isfinite().all()


# ---------------------------------------------------------------- the same, however computed


def test_micro_batches_and_recomputation_give_the_same_values(run, tmp_path, policy, batch):
    for name, more in {
        "a": ["train.max_tokens=30"],
        "b": ["train.max_tokens=4000", "train.recompute=true"],
    }.items():
        run(stage1, *arguments(policy, batch, tmp_path / name, *more))
    a, b = values(tmp_path / "a"), values(tmp_path / "b")
    assert (a - b).abs().max() < 1e-4 and b.std() > 1e-2
    assert movement_error(tmp_path / "a/step_000003", tmp_path / "b/step_000003", policy) < 1e-2


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_two_ranks_give_the_values_of_one(kind, run, tmp_path, policy, batch):
    """A head of one row over two ranks; an output projection of its own that the critic does
    without; state of two ranks, its last steps done by one."""
    if kind == "untied":
        policy = write_hybrid(tmp_path / "policy")
        batch = write_batch(tmp_path / "batch", policy)
    run(stage1, *arguments(policy, batch, tmp_path / "one"))
    result = command("stage1.py", *arguments(policy, batch, tmp_path / "two"), ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert (one - two).abs().max() < 1e-4 and one.std() > 1e-2
    ends = [tmp_path / name / "step_000003" for name in ("two", "one")]
    assert movement_error(*ends, policy) < 1e-2
    for a, b in zip(*(metrics(tmp_path / name / "critic") for name in ("one", "two")), strict=True):
        for key in ("loss", "grad_norm", "explained_variance", "value_positive"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
    shutil.copytree(tmp_path / "two/critic", tmp_path / "mixed/critic")
    (tmp_path / "mixed/critic/values.safetensors").unlink()
    run(stage1, *arguments(policy, batch, tmp_path / "mixed"))
    assert (values(tmp_path / "mixed") - one).abs().max() < 1e-4


# ---------------------------------------------------------------- killed


def start(settings):
    return subprocess.Popen([sys.executable, str(ROOT / "stage1.py"), "--set", *map(str, settings)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def when(process, condition):
    """Wait for the condition, which must come true while the process runs."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline
        time.sleep(0.002)


def test_killed_and_resumed_equals_uninterrupted(run, tmp_path, policy, batch, capsys):
    """kill -9 between two states of the critic, and once its values are there: values and policy
    are the same bits."""
    more = ["steps=12", "value.steps=40", "train.checkpoint_every=7"]
    settings = arguments(policy, batch, tmp_path / "killed", *more)
    folder = tmp_path / "killed/critic"
    for condition in (lambda: lines(folder) >= 17, (folder / "values.safetensors").is_file):
        process = start(settings)
        when(process, condition)
        os.kill(process.pid, signal.SIGKILL)
        text = process.communicate()[0]
    assert "resumed from" in text
    assert not (tmp_path / "killed/done.json").exists()
    run(stage1, *settings)
    said = capsys.readouterr().out
    assert "value pretraining" not in said and "values explain" in said
    run(stage1, *arguments(policy, batch, tmp_path / "whole", *more))
    assert torch.equal(values(tmp_path / "killed"), values(tmp_path / "whole"))
    assert same_bits(tmp_path / "killed/step_000012", tmp_path / "whole/step_000012")
    assert [m["step"] for m in metrics(folder)] == list(range(1, 41))
    assert [m["loss"] for m in metrics(folder)] == [
        m["loss"] for m in metrics(tmp_path / "whole/critic")]


def test_sigterm_saves_the_critic(run, tmp_path, policy, batch):
    """A scheduler's notice during value pretraining: its state is saved, the same command goes on
    there, to the same bits."""
    more = ["value.steps=30", "train.checkpoint_every=99"]
    settings = arguments(policy, batch, tmp_path / "x", *more)
    process = start(settings)
    when(process, lambda: lines(tmp_path / "x/critic") >= 3)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "stopped by SIGTERM after step" in text, text
    saved, = (tmp_path / "x/critic/state").iterdir()
    assert 3 <= int(saved.name.removeprefix("step_")) < 30
    run(stage1, *settings)
    run(stage1, *arguments(policy, batch, tmp_path / "y", *more))
    assert torch.equal(values(tmp_path / "x"), values(tmp_path / "y"))
    assert same_bits(tmp_path / "x/step_000003", tmp_path / "y/step_000003")


def test_sigterm_while_the_values_are_scored(run, tmp_path, policy, batch, monkeypatch):
    """The state after pretraining is there already: nothing is written again, nothing is lost."""
    settings = arguments(policy, batch, tmp_path / "x", "value.steps=2", "train.max_tokens=100")
    listen, calls = runtime.Run.stop_if_asked, []

    def ask(self, step, *rest):
        calls.append(step)
        self.asked |= calls.count(2) == 2  # between two micro-batches
        listen(self, step, *rest)

    def leave(status):
        raise SystemExit(status)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "stop_if_asked", ask)
        patch.setattr(runtime.os, "_exit", leave)
        with pytest.raises(SystemExit, match="143"):
            run(stage1, *settings)
    assert [p.name for p in (tmp_path / "x/critic/state").iterdir()] == ["step_000002"]
    run(stage1, *settings)
    run(stage1, *arguments(policy, batch, tmp_path / "y", "value.steps=2", "train.max_tokens=100"))
    assert torch.equal(values(tmp_path / "x"), values(tmp_path / "y"))


# ---------------------------------------------------------------- damaged, or another's


def test_wrong_values_are_refused(run, tmp_path, policy, batch):
    """One message that names the file and what to do; nothing is trained with what it holds."""
    settings = arguments(policy, batch, tmp_path / "x", "steps=1", "value.steps=1")
    run(stage1, *settings)
    file = tmp_path / "x/critic/values.safetensors"
    whole, value = file.read_bytes(), values(tmp_path / "x")
    other = write_batch(tmp_path / "other", policy, seed=5)
    run(stage1, *arguments(policy, other, tmp_path / "z", "steps=1", "value.steps=1"))
    shutil.rmtree(tmp_path / "x/state")
    shutil.rmtree(tmp_path / "x/step_000001")
    (tmp_path / "x/done.json").unlink()
    meta = {"made_from": "{}"}

    def store(tensors, metadata=meta):
        save_file(tensors, file, metadata=metadata)

    for damage, words in (
        (lambda: file.write_bytes(whole[:-9]), "not a readable"),
        (lambda: file.write_bytes(b"nonsense"), "not a readable"),
        (lambda: file.write_bytes(b""), "not a readable"),
        (lambda: store({"value": value}, None), "damaged"),
        (lambda: store({"value": value}, {"made_from": "["}), "damaged"),
        (lambda: store({"value": value}, {"made_from": "[]"}), "damaged"),
        (lambda: store({"other": value}), "not a readable"),
        (lambda: store({"value": value}), "made from something else .*policy: None"),
        (lambda: shutil.copy(tmp_path / "z/critic/values.safetensors", file), "batch: "),
    ):
        damage()
        with pytest.raises(ValueError, match=f"values.safetensors: .*{words}.*delete"):
            run(stage1, *settings)
        assert not (tmp_path / "x/step_000001").exists()
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="steps: 1 -> 2"):
        run(stage1, *settings, "value.steps=2")
    with pytest.raises(ValueError, match="lr: 0.001 -> 0.002"):
        run(stage1, *settings, "value.lr=2e-3")
    b = rollouts.load(batch)
    for wrong in (value[:-1], value.double(), torch.full_like(value, float("nan"))):
        store({"value": wrong})
        with pytest.raises(ValueError, match="value must be float32, one a token; delete"):
            critic.read(file, {}, b)
    file.write_bytes(whole)
    run(stage1, *settings, "train.max_tokens=200", "value.alpha=0.7")  # what V does not depend on
    assert file.read_bytes() == whole


def test_keys_of_the_value_network_are_said_elsewhere(run, tmp_path, policy, batch, capsys):
    """[value] is read by PPO alone, and PPO reads no key of group advantages."""
    for name, more, words in (
        ("sapo", ["value.alpha=0.5"], "value.alpha"),
        ("ppo", ["loss.normalize=false"], "loss.normalize"),
    ):
        run(stage1, *(a for a in arguments(policy, batch, tmp_path / name, "steps=1",
                                           f"loss.name={name}", *more)
                      if name == "ppo" or not a.startswith(("value.steps", "value.lr",
                                                            "value.alpha=1"))))
        said = capsys.readouterr().out
        assert f"note: {words} is given, but these settings do not read it" in said
        assert said.count("note:") == 1
