"""The student's loop: the signal is the one asked for, the trust region starts at pi_old."""

import json
import math
import shutil

import pytest
import torch
from conftest import (
    command,
    exact_kl,
    movement_error,
    same_bits,
    weights,
    write_batch,
    write_policy,
)
from test_stage1 import kill_in_the_middle, metrics

import losses
import model as models
import rollouts
import stage2

QUICK = [
    "train.prompts_per_step=4",
    "train.lr=1e-3",
    "train.warmup=1",
    "train.max_tokens=64",
    "train.recompute=false",
]


def arguments(batch, output, numerator, denominator="old", steps=3, *more):
    signal = f'signal=[{{numerator="{numerator}", denominator="{denominator}", steps={steps}}}]'
    return [f"batch={batch}", f"output={output}", signal, *QUICK, *more]


def perturbed(folder, source, scale, seed=7):
    """A copy of a policy with noise on every weight."""
    model = models.load(source, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * scale)
    models.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, policy):
    return perturbed(tmp_path_factory.mktemp("teacher") / "teacher", policy, 0.05)


def logp_of(path, b):
    """log-probs of all response tokens, in the batch's order, by one plain forward pass."""
    micro = rollouts.micro_batch(b, range(len(b)))
    model = models.load(path, dtype=torch.float32)
    return model, micro, model.logp(micro.tokens, micro.cu_seqlens, micro.scored)[0]


def test_first_step_is_the_plain_signal_gradient(run, tmp_path, policy, batch, teacher):
    """rho = 1: no clip, gradient = -mean(A grad log pi), A whitened over the whole batch."""
    run(
        stage2,
        *arguments(
            batch,
            tmp_path / "x",
            teacher,
            "old",
            1,
            "train.prompts_per_step=8",
            "train.max_tokens=5000",
        ),
    )
    b = rollouts.load(batch)
    model, micro, old = logp_of(policy, b)
    _, _, ext = logp_of(teacher, b)
    r = (ext - old).detach()
    A = (r - r.mean()) / r.std()
    (-(A * old).mean()).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    row = metrics(tmp_path / "x")[0]
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["signal_std"] == pytest.approx(float(r.std()), rel=1e-4)
    assert row["clip_low"] == row["clip_high"] == 0


def test_student_moves_towards_the_teacher(run, tmp_path, policy, batch, teacher):
    """Distillation raises the whitened signal's mean under the student, fixed and evolving."""
    b = rollouts.load(batch)
    _, _, old = logp_of(policy, b)
    _, _, ext = logp_of(teacher, b)
    for denominator in ("old", "evolving"):
        run(
            stage2,
            *arguments(
                batch, tmp_path / denominator, teacher, denominator, 12, "train.prompts_per_step=8"
            ),
        )
        _, _, new = logp_of(tmp_path / denominator / "step_000012", b)
        moved = torch.corrcoef(torch.stack([new - old, ext - old]).detach())
        assert float(moved[0, 1]) > 0.5, denominator


def test_evolving_whitens_per_minibatch_over_all_ranks(run, tmp_path, policy, batch, teacher):
    """The signal changes as the student does; two ranks whiten over both their halves."""
    run(stage2, *arguments(batch, tmp_path / "one", teacher, "evolving", 3))
    result = command(
        "stage2.py", *arguments(batch, tmp_path / "two", teacher, "evolving", 3), ranks=2
    )
    assert result.returncode == 0, result.stderr
    assert movement_error(tmp_path / "two/step_000003", tmp_path / "one/step_000003", policy) < 1e-3
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [x["signal_std"] for x in a] == pytest.approx([x["signal_std"] for x in b], rel=1e-4)
    assert len({x["signal_std"] for x in a}) == 3  # it changes as the student does


def test_whole_distributions(run, tmp_path, policy, batch, teacher, capsys):
    """The loss is the exact KL to the teacher, a penalty that to pi_old; two ranks agree; a token
    signal may follow; what is not read is said."""
    full = f'signal=[{{numerator="{teacher}", full=true, denominator="none", steps=12}}]'
    settings = [full, "train.prompts_per_step=8", "train.checkpoint_every=1"]
    run(stage2, *arguments(batch, tmp_path / "one", teacher, "old", 12, *settings,
                           "trust.kl=exact", "trust.kl_coef=0.5", "trust.clip_low=0.1"))
    said = capsys.readouterr().out
    for key in ("signal.0.denominator", "trust.clip_low"):
        assert f"{key} is given, but these settings do not read it" in said
    assert said.count("is given, but") == 2
    b = rollouts.load(batch)
    there, rows = [policy, tmp_path / "one/step_000011"], metrics(tmp_path / "one")
    to_teacher, to_old = ([float(exact_kl(p, q, b).mean()) for p in there]
                          for q in (teacher, policy))
    for at, row in enumerate((rows[0], rows[11])):
        assert row["loss"] == pytest.approx(to_teacher[at] + 0.5 * to_old[at], rel=1e-4)
    assert to_teacher[1] < 0.8 * to_teacher[0] and to_old[1] > 0
    assert rows[11]["signal_std"] < rows[0]["signal_std"] and "clip_high" not in rows[0]
    both = (f'signal=[{{numerator="{teacher}", full=true, steps=2}}, '
            f'{{numerator="{teacher}", steps=1}}]')
    for name, ranks in (("a", 1), ("b", 2)):
        result = command("stage2.py", *arguments(batch, tmp_path / name, teacher, "old", 3, both),
                         ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert movement_error(tmp_path / "b/step_000003", tmp_path / "a/step_000003", policy) < 1e-3


@pytest.mark.parametrize("denominator", ["old", "evolving", "full"])
def test_killed_and_resumed_equals_uninterrupted(
    run, tmp_path, policy, batch, teacher, denominator
):
    more = ["train.checkpoint_every=7"]
    if denominator == "full":
        more += [f'signal=[{{numerator="{teacher}", full=true, steps=50}}]',
                 "trust.kl=exact", "trust.kl_coef=0.1"]
    settings = arguments(batch, tmp_path / "killed", teacher, denominator, 50, *more)
    kill_in_the_middle("stage2.py", settings, tmp_path / "killed", 17)
    assert not (tmp_path / "killed/done.json").exists()
    run(stage2, *settings)
    run(stage2, *arguments(batch, tmp_path / "whole", teacher, denominator, 50, *more))
    assert same_bits(tmp_path / "killed/step_000050", tmp_path / "whole/step_000050")
    assert [m["loss"] for m in metrics(tmp_path / "killed")] == [
        m["loss"] for m in metrics(tmp_path / "whole")
    ]


def test_micro_batching_gives_the_same_student(run, tmp_path, policy, batch, teacher):
    for name, tokens in (("a", 20), ("b", 4000)):
        run(
            stage2,
            *arguments(
                batch,
                tmp_path / name,
                teacher,
                "old",
                3,
                f"train.max_tokens={tokens}",
                "trust.kl_coef=0.1",
                "trust.entropy_coef=0.1",
                "trust.average=sequence",
            ),
        )
    assert movement_error(tmp_path / "a/step_000003", tmp_path / "b/step_000003", policy) < 1e-3


def test_identical_checkpoints_give_no_signal_and_rounding_is_refused(
    run, tmp_path, policy, batch, capsys
):
    """Whitening erases scale: without these guards, rounding noise would train the student."""
    run(stage2, *arguments(batch, tmp_path / "same", policy, "old", 2))
    assert "the signal is zero" in capsys.readouterr().out
    assert same_bits(tmp_path / "same/step_000002", policy)
    almost = perturbed(tmp_path / "almost", policy, 1e-9)
    with pytest.raises(ValueError, match="re-scoring noise"):
        run(stage2, *arguments(batch, tmp_path / "noise", almost, "old", 2))


def test_a_checkpoint_may_be_named_like_an_input(run, tmp_path, policy, batch, teacher,
                                                 monkeypatch):
    """numerator = policy is the folder policy, not the policy."""
    shutil.copytree(teacher, tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    run(stage2, *arguments(batch, tmp_path / "x", "policy", "old", 2))
    run(stage2, *arguments(batch, tmp_path / "y", teacher, "old", 2))
    assert same_bits(tmp_path / "x/step_000002", tmp_path / "y/step_000002")


def test_every_signal_is_looked_at_before_the_first_step(run, tmp_path, policy, batch, teacher):
    almost = perturbed(tmp_path / "almost", policy, 1e-9)
    signal = f'signal=[{{numerator="{teacher}", steps=2}}, {{numerator="{almost}", steps=2}}]'
    with pytest.raises(ValueError, match="re-scoring noise"):
        run(stage2, f"batch={batch}", f"output={tmp_path / 'x'}", signal, *QUICK)
    assert not metrics(tmp_path / "x")


def test_arriving_at_the_teacher_is_said(run, tmp_path, policy, batch, capsys):
    run(stage2, *arguments(batch, tmp_path / "x", policy, "evolving", 2))
    said = capsys.readouterr().out
    assert said.count(f"step 1: the student cannot be told from {policy}; the signal is zero") == 1
    assert said.count("cannot be told") == 1
    assert same_bits(tmp_path / "x/step_000002", policy)


@pytest.mark.parametrize(
    "pair", [("T", "U"), ("old", "U"), ("none", "U"), ("T", "none"), ("none", "evolving")]
)
def test_every_pair_of_the_table(run, tmp_path, policy, batch, teacher, pair):
    """Strategies 2 and 3 and the single terms: the advantage is the pair's, computed by hand."""
    unlearned = perturbed(tmp_path / "unlearned", policy, 0.04, seed=9)
    names = [{"T": teacher, "U": unlearned}.get(side, side) for side in pair]
    run(
        stage2,
        *arguments(
            batch, tmp_path / "x", *names, 1, "train.prompts_per_step=8", "train.max_tokens=5000"
        ),
    )
    b = rollouts.load(batch)
    terms = [
        None if n == "none" else logp_of(policy if n in ("old", "evolving") else n, b)[2].detach()
        for n in names
    ]
    raw = losses.token_signal(*terms)
    assert metrics(tmp_path / "x")[0]["signal_std"] == pytest.approx(float(raw.std()), rel=1e-4)


def test_mask_and_whitening_options(run, tmp_path, policy, batch, teacher):
    b = rollouts.load(batch)
    _, micro, old = logp_of(policy, b)
    raw = (logp_of(teacher, b)[2] - old).detach()
    for keep in ("positive", "negative"):
        signal = f'signal=[{{numerator="{teacher}", steps=1, keep="{keep}", shift_mean=false}}]'
        run(
            stage2,
            *arguments(
                batch, tmp_path / keep, teacher, "old", 1, signal, "train.prompts_per_step=8"
            ),
        )
        masked = losses.sign_mask(raw, b.reward, micro.segment, keep)
        assert metrics(tmp_path / keep)[0]["signal_std"] == pytest.approx(
            float(masked.std()), rel=1e-4
        )


def test_ensemble_runs_its_signals_one_after_another(run, tmp_path, policy, batch, teacher):
    """Two phases of two steps: the second phase's signal starts at step 3."""
    other = perturbed(tmp_path / "other", policy, 0.02, seed=11)
    signal = f'signal=[{{numerator="{teacher}", steps=2}}, {{numerator="{other}", steps=2}}]'
    run(stage2, f"batch={batch}", f"output={tmp_path / 'x'}", signal, *QUICK)
    std = [m["signal_std"] for m in metrics(tmp_path / "x")]
    assert std[0] == std[1] != std[2] == std[3]


def test_no_teacher_is_touched_and_columns_are_reused(run, tmp_path, policy, teacher):
    folder, before = write_batch(tmp_path / "batch", policy), weights(teacher)
    run(stage2, *arguments(folder, tmp_path / "x", teacher))
    columns = {f.name: f.stat().st_mtime_ns for f in folder.glob("logp.*")}
    assert len(columns) == 2
    run(stage2, *arguments(folder, tmp_path / "y", teacher))
    assert columns == {f.name: f.stat().st_mtime_ns for f in folder.glob("logp.*")}
    assert all(torch.equal(before[n], w) for n, w in weights(teacher).items())


def test_wrong_inputs_stop_with_one_message(run, tmp_path, policy, batch, teacher):
    for settings, words in (
        (arguments(batch, tmp_path / "x", "none", "none"), "cannot both be 'none'"),
        (arguments(batch, tmp_path / "x", "evolving", "old"), "can only be the denominator"),
        ([f"batch={batch}", f"output={tmp_path}/x"], "at least one"),
        (arguments(batch, tmp_path / "x", "old", "none", 3, "signal.0.full=true"),
         "signal.full needs a checkpoint"),
        (arguments(batch, tmp_path / "x", tmp_path / "nowhere"), "there is no such folder"),
        (
            arguments(batch, tmp_path / "x", teacher, "old", 3, f"policy={teacher}"),
            "is not the policy that sampled",
        ),
        (
            arguments(batch, tmp_path / "x", teacher, "old", 3, "trust.clip=0.1"),
            "did you mean trust.clip_low",
        ),
        (
            arguments(batch, tmp_path / "x", teacher, "old", 3, "signal.0.kep=both"),
            "did you mean signal",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            run(stage2, *settings)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        run(stage2, *arguments(batch, tmp_path / "x", tmp_path / "bad"))
    other = write_policy(tmp_path / "other", seed=4)
    assert not same_bits(other, policy)
