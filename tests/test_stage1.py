"""The teacher's loop: its result depends on the data alone, and nothing is lost on the way."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    command,
    exact_kl,
    movement_error,
    same_bits,
    weights,
    write_batch,
    write_hybrid,
    write_policy,
)
from safetensors.torch import load_file, save_file

import losses
import model as models
import rollouts
import runtime
import stage1
import stage2

QUICK = [
    "train.prompts_per_step=4",
    "train.lr=1e-3",
    "train.warmup=1",
    "train.max_tokens=64",
    "train.recompute=false",
]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def arguments(policy, batch, output, *more):
    return [f"policy={policy}", f"batch={batch}", f"output={output}", *QUICK, *more]


@pytest.mark.parametrize("name", [*stage1.READS])
@pytest.mark.parametrize("average", ["token", "sequence", "fixed"])
def test_micro_batching_leaves_the_gradient_alone(name, average, policy, batch):
    """1 x 8 = 2 x 4 = 8 x 1: a mean per micro-batch instead of over the minibatch would show."""
    b, model = rollouts.load(batch), models.load(policy, dtype=torch.float32)
    c = stage1.Loss(
        name=name,
        beta=0.5,
        average=average,
        fixed_length=9,
        kl_coef=0.3,
        entropy_coef=0.1,
        negative_weight=2.0,
    )
    advantage = losses.group_advantage(b.reward, b.prompt)
    count = {"tokens": int(b.response_length.sum()), "sequences": len(b)}
    torch.manual_seed(0)
    old = torch.randn(len(b.tokens)) * 0.3 - 3.0
    gradients = []
    for max_tokens in (19, 60, 10_000):
        model.zero_grad()
        for micro in rollouts.pack(b, range(len(b)), max_tokens):
            logp, entropy = model.logp(micro.tokens, micro.cu_seqlens, micro.scored, entropy=True)
            stage1.objective(
                c,
                logp,
                old[micro.place],
                old[micro.place],
                entropy,
                advantage[micro.row][micro.segment],
                b.reward[micro.row],
                micro.segment,
                count,
            ).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for g in gradients[:2]:
        assert (g - gradients[2]).abs().max() <= 1e-5 * gradients[2].abs().max()


@pytest.mark.parametrize("keep_attention", ["false", "true"])
def test_micro_batches_and_recomputation_give_the_same_policy(
    run, tmp_path, policy, batch, keep_attention
):
    for name, more in {
        "a": ["train.max_tokens=30"],
        "b": ["train.max_tokens=4000", "train.recompute=true",
              f"train.keep_attention={keep_attention}"],
    }.items():
        run(
            stage1,
            *arguments(
                policy,
                batch,
                tmp_path / name,
                "steps=4",
                "loss.name=sapo",
                "loss.kl_coef=0.1",
                *more,
            ),
        )
    assert movement_error(tmp_path / "a/step_000004", tmp_path / "b/step_000004", policy) < 1e-3


@pytest.mark.slow
def test_two_ranks_with_compiled_layers_give_the_same_policy(run, tmp_path, policy, batch):
    """torch.compile inside FSDP2 and activation checkpointing, micro-batches of many lengths."""
    settings = ["steps=3", "loss.name=sapo", "loss.entropy_coef=0.01", "train.max_tokens=90"]
    run(stage1, *arguments(policy, batch, tmp_path / "plain", *settings))
    result = command("stage1.py", *arguments(
        policy, batch, tmp_path / "fused", *settings, "train.compile=true", "train.recompute=true",
        "train.keep_attention=true"), ranks=2)
    assert result.returncode == 0, result.stderr
    assert movement_error(
        tmp_path / "fused/step_000003", tmp_path / "plain/step_000003", policy) < 1e-3


def test_two_ranks_give_the_policy_of_one(run, tmp_path, policy, batch):
    settings = ["steps=3", "loss.name=ce", "loss.beta=0.5", "loss.entropy_coef=0.01"]
    run(stage1, *arguments(policy, batch, tmp_path / "one", *settings))
    result = command("stage1.py", *arguments(policy, batch, tmp_path / "two", *settings), ranks=2)
    assert result.returncode == 0, result.stderr
    assert movement_error(tmp_path / "two/step_000003", tmp_path / "one/step_000003", policy) < 1e-3
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "entropy", "kl_reverse", "p_positive", "grad_norm", "ratio_max"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_exact_kl_penalty(run, tmp_path):
    """The second step's loss holds KL(pi_theta || pi_old) over the vocabulary; two ranks agree,
    with a head of its own; nothing of pi_old's copy moves."""
    policy = write_hybrid(tmp_path / "policy")
    batch = write_batch(tmp_path / "batch", policy)
    settings = ["steps=2", "loss.name=sft", "loss.kl=exact", "loss.kl_coef=3.0",
                "train.prompts_per_step=8", "train.checkpoint_every=1"]
    run(stage1, *arguments(policy, batch, tmp_path / "one", *settings))
    b, after = rollouts.load(batch), tmp_path / "one/step_000001"
    micro = rollouts.micro_batch(b, range(len(b)))
    logp = models.load(after, dtype=torch.float32).logp(
        micro.tokens, micro.cu_seqlens, micro.scored)[0].detach()
    sft = losses.sft(logp, b.reward, micro.segment).mean()
    kl = exact_kl(after, policy, b).mean()
    first, second = (row["loss"] for row in metrics(tmp_path / "one"))
    assert second == pytest.approx(float(sft + 3.0 * kl), rel=1e-4) and kl > 1e-3
    result = command("stage1.py", *arguments(policy, batch, tmp_path / "two", *settings), ranks=2)
    assert result.returncode == 0, result.stderr
    assert movement_error(tmp_path / "two/step_000002", tmp_path / "one/step_000002", policy) < 1e-3


def test_state_written_by_two_ranks_is_resumed_by_one(run, tmp_path, policy, batch):
    """A rank's part is contiguous rows; joining them wrongly would scramble the optimiser."""
    result = command(
        "stage1.py", *arguments(policy, batch, tmp_path / "x", "steps=2"), ranks=2
    )
    assert result.returncode == 0, result.stderr
    for part in (tmp_path / "x/state/step_000002").iterdir():  # not without both of them
        part.rename(tmp_path / "aside")
        with pytest.raises(ValueError, match="step_000002: .* is (not whole|missing|.*, not)"):
            run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=4"))
        (tmp_path / "aside").rename(part)
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=4"))
    run(stage1, *arguments(policy, batch, tmp_path / "y", "steps=4"))
    assert movement_error(tmp_path / "x/step_000004", tmp_path / "y/step_000004", policy) < 1e-3


def test_the_optimiser_of_another_run_is_taken_over(run, tmp_path, policy, batch):
    """Weights are this run's, moments and their step the other's: as if it had not stopped."""
    settings = ["train.warmup=0", "loss.name=sapo"]
    run(stage1, *arguments(policy, batch, tmp_path / "a", "steps=2", *settings))
    ends = tmp_path / "a/step_000002"
    run(stage1, *arguments(ends, batch, tmp_path / "b", "steps=1", *settings,
                           f"old={policy}", f"optimizer={tmp_path / 'a'}"))
    model = models.load(tmp_path / "b/step_000001", dtype=torch.float32)
    states = {}
    for name, folder in (("a", "a/state/step_000002"), ("b", "b/state/step_000001")):
        [file] = (tmp_path / folder).iterdir()
        states[name] = load_file(file)
    for name, _ in model.named_parameters():
        assert states["a"][f"step.{name}"] == 2 and states["b"][f"step.{name}"] == 3
        # both moments went on from the other's with one and the same gradient
        first, second = (states["b"][f"{kind}.{name}"] - decay * states["a"][f"{kind}.{name}"]
                         for kind, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)))
        torch.testing.assert_close((first / 0.1) ** 2, second / 0.05, rtol=1e-2, atol=1e-7)
        assert first.abs().max() > 0
    with pytest.raises(ValueError, match="no resume state"):
        run(stage1, *arguments(policy, batch, tmp_path / "c", f"optimizer={policy}"))



def test_rounds_of_a_16_bit_policy_lose_nothing(run, tmp_path):
    """Checkpoints are rounded to bfloat16, the state that goes with them is not: two steps and
    one that goes on from them are three, warm-up and all."""
    policy = write_policy(tmp_path / "policy")
    file = policy / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file, {"format": "pt"})
    batch = write_batch(tmp_path / "batch", policy)
    settings = ["train.prompts_per_step=8", "train.lr=1e-4", "train.warmup=5"]
    run(stage1, *arguments(policy, batch, tmp_path / "a", "steps=2", *settings))
    run(stage1, *arguments(tmp_path / "a/step_000002", batch, tmp_path / "b", "steps=1", *settings,
                           f"old={policy}", f"optimizer={tmp_path / 'a'}"))
    run(stage1, *arguments(policy, batch, tmp_path / "c", "steps=3", *settings))
    [b], [c] = ((tmp_path / state).iterdir()
                for state in ("b/state/step_000001", "c/state/step_000003"))
    b, c = load_file(b), load_file(c)
    assert b.keys() == c.keys() and all(torch.equal(b[name], c[name]) for name in c)
    assert weights(tmp_path / "c/step_000003").keys() and any(
        not torch.equal(x, c["weight." + name])
        for name, x in weights(tmp_path / "c/step_000003").items())


def test_a_taken_over_run_needs_the_other_no_more(run, tmp_path, policy, batch, capsys):
    """Once it has a state of its own, or is complete."""
    run(stage1, *arguments(policy, batch, tmp_path / "a", "steps=1"))
    settings = arguments(tmp_path / "a/step_000001", batch, tmp_path / "b", f"old={policy}",
                         f"optimizer={tmp_path / 'a'}")
    run(stage1, *settings, "steps=1")
    shutil.rmtree(tmp_path / "a/state")
    run(stage1, *settings, "steps=1")
    assert "already complete" in capsys.readouterr().out
    run(stage1, *settings, "steps=2")


def test_hybrid_sharding_on_a_two_by_two_mesh(run, tmp_path, policy, batch):
    run(stage1, *arguments(policy, batch, tmp_path / "one", "steps=2"))
    result = command(
        "stage1.py",
        *arguments(policy, batch, tmp_path / "four", "steps=2", "train.replicas=2"),
        ranks=4,
    )
    assert result.returncode == 0, result.stderr
    assert (
        movement_error(tmp_path / "four/step_000002", tmp_path / "one/step_000002", policy) < 1e-3
    )


def kill_in_the_middle(script, settings, output, lines):
    """Start a command, kill -9 it once metrics.jsonl has `lines` lines."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "--set", *map(str, settings)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline, file = time.time() + 120, output / "metrics.jsonl"
    while not (file.is_file() and file.read_text().count("\n") >= lines):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.time() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_a_hybrid_model_on_two_ranks_resumed_by_one(run, tmp_path):
    """Qwen3.5's layers: scalars of fewer heads than ranks (an empty shard), an untied head gathered
    on its own, float32 decays; state of two ranks, finished by one."""
    policy = write_hybrid(tmp_path / "policy")
    batch = write_batch(tmp_path / "batch", policy)
    whole = arguments(policy, batch, tmp_path / "one", "steps=4")
    run(stage1, *whole)
    half = command("stage1.py", *arguments(policy, batch, tmp_path / "x", "steps=2"), ranks=2)
    assert half.returncode == 0, half.stderr
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=4"))
    ends = [tmp_path / name / "step_000004" for name in ("one", "x")]
    assert movement_error(*ends, policy) < 1e-3
    assert (ends[0] / "config.json").read_text() == (policy / "config.json").read_text()


def test_killed_and_resumed_equals_uninterrupted(run, tmp_path, policy, batch):
    settings = ["steps=60", "train.checkpoint_every=7", "loss.name=sapo"]
    kill_in_the_middle(
        "stage1.py",
        arguments(policy, batch, tmp_path / "killed", *settings),
        tmp_path / "killed",
        17,
    )
    assert not (tmp_path / "killed/done.json").exists()
    run(stage1, *arguments(policy, batch, tmp_path / "killed", *settings))
    run(stage1, *arguments(policy, batch, tmp_path / "whole", *settings))
    for step in (7, 14, 21, 60):
        assert same_bits(tmp_path / f"killed/step_{step:06d}", tmp_path / f"whole/step_{step:06d}")
    assert [m["step"] for m in metrics(tmp_path / "killed")] == list(range(1, 61))
    assert [m["loss"] for m in metrics(tmp_path / "killed")] == [
        m["loss"] for m in metrics(tmp_path / "whole")
    ]
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_ratio_is_one_before_the_first_update_and_not_after(run, tmp_path, policy, batch):
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=2", "loss.name=grpo"))
    first, second = metrics(tmp_path / "x")
    assert first["ratio_min"] == pytest.approx(1, abs=1e-4) and first["ratio_max"] == pytest.approx(
        1, abs=1e-4
    )
    assert first["clip_low"] == first["clip_high"] == 0
    assert second["ratio_max"] > 1.001


def test_every_loss_learns_what_it_says(run, tmp_path, policy, batch):
    """One fixed batch, overfitted: positives and negatives part, or both fall, as promised."""

    def last(name, *more):
        run(
            stage1,
            *arguments(
                policy,
                batch,
                tmp_path / name,
                "steps=40",
                f"loss.name={name}",
                "train.lr=3e-3",
                "train.prompts_per_step=8",
                *more,
            ),
        )
        rows = metrics(tmp_path / name)
        return rows[0], rows[-1]

    for name, more in {
        "ce": ["loss.beta=0.5"],
        "sapo": [],
        "grpo": [],
        "cispo": [],
        "vespo": [],
    }.items():
        first, final = last(name, *more)
        assert (
            final["p_positive"] - final["p_negative"]
            > first["p_positive"] - first["p_negative"] + 0.02
        ), name
    first, final = last("sft")
    assert final["loss"] < first["loss"] - 0.3
    first, final = last("mse")
    assert (
        final["loss"] < first["loss"] and final["explained_variance"] > first["explained_variance"]
    )


def test_undecided_and_unfinished_rows_are_left_out(run, tmp_path, policy, capsys):
    """A nan reward must act as if the row had never been sampled."""
    write_batch(tmp_path / "full", policy)
    b = rollouts.load(tmp_path / "full")
    reward = [None if i % 5 == 0 else float(r) for i, r in enumerate(b.reward)]
    write_batch(tmp_path / "undecided", policy, reward=reward)
    run(
        stage1,
        *arguments(
            policy, tmp_path / "undecided", tmp_path / "u", "steps=2", "loss.name=grpo"
        ),
    )
    assert "25 of 32 rollouts (7 undecided left out, 8 truncated)" in capsys.readouterr().out
    run(
        stage1,
        *arguments(
            policy, tmp_path / "full", tmp_path / "f", "steps=1", "drop_unfinished=true"
        ),
    )
    assert (
        "24 of 32 rollouts (0 undecided left out, 8 truncated left out)" in capsys.readouterr().out
    )


def test_recovery_starts_from_another_policy_than_the_batch(run, tmp_path, policy, batch):
    """pi_ref = start or old: both are honoured, and differ."""
    run(
        stage1,
        *arguments(
            policy, batch, tmp_path / "mse", "steps=3", "loss.name=mse", "train.lr=1e-2"
        ),
    )
    start = tmp_path / "mse/step_000003"
    for reference in ("start", "old"):
        run(
            stage1,
            *arguments(
                start, batch, tmp_path / reference, "steps=2", f"loss.reference={reference}"
            ),
        )
    a, b = metrics(tmp_path / "start")[0], metrics(tmp_path / "old")[0]
    assert a["loss"] == pytest.approx(0.6931, abs=1e-3)  # log-ratio 0 to its own start
    assert abs(b["loss"] - a["loss"]) > 1e-4


@pytest.mark.parametrize("setting, words", [
    ("loss.beta=0", "loss.beta must be above 0"),
    ("loss.tau_pos=0", "loss.tau_pos must be above 0"),
    ("train.checkpoint_at=[2, 0]", "train.checkpoint_at must be at least 1, not 0"),
    ("train.prompts_per_step=9", "a minibatch of 9 prompts is larger than the batch"),
])
def test_what_cannot_be_is_said_before_anything_is_computed(run, tmp_path, policy, setting, words):
    write_batch(tmp_path / "batch", policy)
    with pytest.raises(ValueError, match=re.escape(words)):
        run(stage1, *arguments(policy, tmp_path / "batch", tmp_path / "x", setting))
    assert not list((tmp_path / "batch").glob("logp.*")) and not (tmp_path / "x").exists()


def test_non_finite_stops_before_the_update_and_names_rows(run, tmp_path, policy, batch):
    settings = arguments(
        policy, batch, tmp_path / "x", "steps=9", "train.checkpoint_every=1", "train.lr=1e38"
    )
    with pytest.raises(
        ValueError,
        match=r"step \d+: .* not finite; nothing was updated. Rows of the batch concerned: \d+",
    ):
        run(stage1, *settings, "train.clip=1e38")
    saved = sorted((tmp_path / "x").glob("step_*"))
    assert saved and not (tmp_path / "x/done.json").exists()


def test_resume_with_other_settings_is_refused(run, tmp_path, policy, batch):
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=2"))
    with pytest.raises(
        ValueError,
        match=r"Different: config.loss.beta: 0.05 -> 0.7|Different: loss.beta: 0.05 -> 0.7",
    ):
        run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=2", "loss.beta=0.7"))
    write_batch(tmp_path / "other", policy, seed=5)
    with pytest.raises(ValueError, match="batch"):
        run(stage1, *arguments(policy, tmp_path / "other", tmp_path / "x", "steps=2"))


def test_steps_may_be_raised_and_a_finished_run_is_left_alone(run, tmp_path, policy, batch, capsys):
    for name, plan in {"x": (2, 2, 4), "y": (4,)}.items():
        for steps in plan:
            run(stage1, *arguments(policy, batch, tmp_path / name, f"steps={steps}"))
    assert "already complete" in capsys.readouterr().out
    assert same_bits(tmp_path / "x/step_000004", tmp_path / "y/step_000004")


def test_a_finished_run_without_its_state_does_not_begin_anew(run, tmp_path, policy, batch,
                                                              monkeypatch, capsys):
    """It may be looked at, moved, its inputs be spelt otherwise; not be raised, and not be lost."""
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=2"))
    shutil.rmtree(tmp_path / "x/state")
    (tmp_path / "x").rename(tmp_path / "moved")
    before = {p: p.read_bytes() for p in (tmp_path / "moved").rglob("*") if p.is_file()}
    monkeypatch.chdir(batch.parent)
    run(stage1, *arguments(f"{policy}/", batch.name, tmp_path / "moved", "steps=2"))
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="its resume state is gone"):
        run(stage1, *arguments(policy, batch, tmp_path / "moved", "steps=3"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "moved").rglob("*") if p.is_file()}


def test_steps_may_not_be_lowered(run, tmp_path, policy, batch):
    """What was learnt is not unlearnt: a run of 4 steps is none of 2."""
    run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=4"))
    with pytest.raises(ValueError, match="Different: steps: 4 -> 2"):
        run(stage1, *arguments(policy, batch, tmp_path / "x", "steps=2"))
    assert json.loads((tmp_path / "x/done.json").read_text())["steps"] == 4


def test_memory_may_be_saved_half_way(run, tmp_path, policy, batch, capsys):
    """max_tokens and the like may differ when a run goes on, or is found finished."""
    settings = arguments(policy, batch, tmp_path / "x")
    run(stage1, *settings, "steps=2")
    run(stage1, *settings, "steps=4", "train.max_tokens=32", "train.recompute=true")
    run(stage1, *settings, "steps=4")
    assert "already complete" in capsys.readouterr().out
    run(stage1, *arguments(policy, batch, tmp_path / "y", "steps=4"))
    assert movement_error(tmp_path / "x/step_000004", tmp_path / "y/step_000004", policy) < 1e-3
    with pytest.raises(ValueError, match="Different: train.checkpoint_every"):
        run(stage1, *settings, "steps=4", "train.checkpoint_every=1")


@pytest.mark.parametrize("cut, words", [({"top_p": 0.9, "min_p": 0.1}, "top_p, min_p"),
                                        ({"top_k": 5, "top_p": 1.0}, "top_k")])
def test_truncated_sampling_is_said(run, tmp_path, policy, cut, words, capsys):
    """In both stages, at whatever temperature."""
    write_batch(tmp_path / "b", policy, header=cut)
    settings = arguments(policy, tmp_path / "b", tmp_path / "x", "steps=1",
                         "logprob_temperature=0.8")
    run(stage1, *settings)
    said = f"sampled with {words}; rho = pi_theta / pi_old ignores that truncation"
    assert capsys.readouterr().out.count(said) == 1
    run(stage2, f"batch={tmp_path / 'b'}", f"output={tmp_path / 'y'}", *QUICK,
        f'signal=[{{numerator="{tmp_path / "x/step_000001"}", steps=1}}]')
    assert capsys.readouterr().out.count(said) == 1


def test_wrong_inputs_stop_with_one_message(run, tmp_path, policy, batch):
    from conftest import write_policy

    other = write_policy(tmp_path / "other", seed=3)
    with pytest.raises(ValueError, match="is not the policy that sampled"):
        run(stage1, *arguments(policy, batch, tmp_path / "x", f"old={other}"))
    for override, words in {
        "loss.name=gpro": "loss.name must be one of",
        "loss.kl=k9": "loss.kl must be one of",
        "loss.average=fixed": "fixed_length",
        "loss.bta=1": "did you mean loss.beta",
        "steps=many": "steps must be int",
        "value.alpha=0": "value.alpha must be above 0",
        "value.steps=0": "value.steps must be above 0",
        "value.prompts_per_step=-1": "value.prompts_per_step must be at least 0",
        "loss.c1_neg=-1": "loss.c1_neg must be at least 0",
        "train.prompts_per_step=99": "larger than the batch",
        "train.max_tokens=5": "more than max_tokens",
    }.items():
        with pytest.raises(ValueError, match=words):
            run(stage1, *arguments(policy, batch, tmp_path / "z", override))
    result = command("stage1.py", *arguments(policy, tmp_path / "nowhere", tmp_path / "z"))
    assert (
        result.returncode == 2
        and "no rollout shards" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_minibatches_cover_epochs_without_a_seam():
    prompt = torch.arange(10).repeat_interleave(3)
    rows = [runtime.minibatch(prompt, step, 4, seed=1) for step in range(5)]
    assert all(len(r) == 12 for r in rows)
    counts = torch.bincount(prompt[torch.cat(rows)], minlength=10)
    assert (counts == 6).all()  # five steps of four prompts are two epochs of ten
    assert torch.equal(runtime.minibatch(prompt, 3, 4, seed=1), rows[3])
    assert not torch.equal(runtime.minibatch(prompt, 0, 4, seed=2), rows[0])


def test_old_logp_is_the_trainers_own_and_kept_beside_the_batch(run, tmp_path, policy):
    folder = write_batch(tmp_path / "batch", policy)
    run(stage1, *arguments(policy, folder, tmp_path / "x", "steps=1"))
    b, model = rollouts.load(folder), models.load(policy, dtype=torch.float32)
    column = b.read_column(models.fingerprint(policy), 1.0)
    for row in range(0, len(b), 5):
        lo, hi = b.cu_seqlens[row : row + 2].tolist()
        hidden = model(b.tokens[lo:hi], torch.tensor([0, hi - lo]))
        logp = torch.log_softmax(hidden @ model.head.T, -1)[:-1].gather(
            1, b.tokens[lo + 1 : hi, None].long()
        )[:, 0]
        start = int(b.prompt_length[row])
        assert torch.allclose(column[lo + start : hi], logp[start - 1 :].detach(), atol=1e-5)
        assert (column[lo : lo + start] == 0).all()
    assert weights(policy)  # the source policy is untouched


def test_keys_that_an_objective_does_not_read_are_said(run, tmp_path, policy, batch, capsys):
    """No option is accepted and silently ignored."""
    run(
        stage1,
        *arguments(policy, batch, tmp_path / "x", "steps=1", "loss.name=mse", "loss.beta=0.7"),
    )
    said = capsys.readouterr().out
    assert "loss.beta is given, but these settings do not read it" in said
    assert said.count("is given, but") == 1


def test_every_objective_says_what_it_reads():
    """Each key of an objective is a key of [loss], read by it alone or named as unread."""
    keys = {f.name for f in dataclasses.fields(stage1.Loss)}
    shared = {"name", "average", "fixed_length", "kl", "kl_coef", "entropy_coef"}
    assert set.union(*stage1.READS.values()) == keys - shared
    for name, reads in stage1.READS.items():
        loss = stage1.Loss(name=name, average="fixed", fixed_length=5, kl_coef=0.1)
        assert loss.unread == keys - shared - reads
    assert stage1.READS["ppo"] == {"clip_low", "clip_high"}
    assert stage1.READS["vespo"] == {"c1_pos", "c2_pos", "c1_neg", "c2_neg", "normalize"}


def test_the_constants_of_vespo_arrive(policy, batch):
    """Each of the four keys changes the loss on its own side of the advantage."""
    logp, old, segment = torch.tensor([-1.0, -1.2]), torch.tensor([-1.1, -1.1]), torch.arange(2)

    def loss(A, **keys):
        c = stage1.Loss(name="vespo", **keys)
        return float(stage1.objective(c, logp, old, old, None, torch.full((2,), A), None, segment,
                                      {"tokens": 2, "sequences": 2}))

    for side, A in (("pos", 1.0), ("neg", -1.0)):
        for c in ("c1", "c2"):
            assert loss(A, **{f"{c}_{side}": 0.5}) != loss(A)
            assert loss(-A, **{f"{c}_{side}": 0.5}) == loss(-A)


def test_a_finished_run_outlives_its_resume_state(run, tmp_path, policy, batch, capsys):
    """The state is large and may be deleted; the checkpoints are then neither lost nor redone."""
    settings = arguments(policy, batch, tmp_path / "x", "steps=2")
    run(stage1, *settings)
    shutil.rmtree(tmp_path / "x/state")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "x/step_000002").iterdir()}
    run(stage1, *settings)
    assert "already complete" in capsys.readouterr().out
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "x/step_000002").iterdir()}
    with pytest.raises(ValueError, match="loss.name"):
        run(stage1, *settings, "loss.name=sft")
