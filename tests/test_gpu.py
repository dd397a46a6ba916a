"""What only a GPU can show: compiled Triton kernels, variable-length attention, bfloat16."""

import json

import pytest
import torch
from conftest import command, write_policy

import kernels
import model as models
import rollouts
import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("T, H, V", [(1, 64, 33), (257, 128, 1000), (130, 256, 50_001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_logp_against_float64(T, H, V, dtype, monkeypatch):
    """|logits| to about 100, several slices; the error bounds that the kernels promise."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", T * 13_001)
    hidden = torch.randn(T, H, device="cuda").to(dtype)
    head = (torch.randn(V, H, device="cuda") * 20 / H**0.5).to(dtype)
    targets = torch.randint(V, (T,), device="cuda")
    hidden.requires_grad_(), head.requires_grad_()
    logp, entropy = kernels.linear_logp(hidden, head, targets, temperature=0.8)
    g, h = torch.randn(2, T, device="cuda")
    got = torch.autograd.grad((g * logp + h * entropy).sum(), (hidden, head))
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    log_p = torch.log_softmax(exact_hidden @ exact_head.T / 0.8, 1)
    exact_logp, exact_entropy = (
        log_p.gather(1, targets[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(1),
    )
    want = torch.autograd.grad(
        (g * exact_logp + h * exact_entropy).sum(), (exact_hidden, exact_head)
    )
    assert (logp - exact_logp).abs().max() < 1e-4 and (entropy - exact_entropy).abs().max() < 1e-4
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * b.abs().max()


def test_packed_attention_in_bfloat16(tmp_path):
    """The variable-length kernel sees the sequences of the padded float32 path, and no others."""
    folder = write_policy(tmp_path / "policy")
    lengths = [1, 5, 70, 33]
    tokens = torch.randint(1, 23, (sum(lengths),), device="cuda")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda")
    exact = models.load(folder, dtype=torch.float32, device="cuda")(tokens, cu)
    model = models.load(folder, dtype=torch.bfloat16, device="cuda")
    assert (model(tokens, cu) - exact).abs().max() < 0.05 * exact.abs().max()
    tokens2 = tokens.clone()
    tokens2[6:76] = torch.randint(1, 23, (70,), device="cuda")
    keep = torch.cat([torch.arange(6), torch.arange(76, 109)]).cuda()
    assert torch.equal(model(tokens, cu)[keep], model(tokens2, cu)[keep])


def test_sampling_on_the_gpu(tmp_path):
    """Same seed, same tokens, whatever the slots; float32 so that rounding does not tip a draw."""
    model = models.load(write_policy(tmp_path / "policy"), dtype=torch.float32, device="cuda")
    prompts = [[3, 4], [5], [6, 7, 8, 9]] * 5
    settings = dict(
        n=3, max_new_tokens=20, temperature=0.9, top_p=0.95, top_k=10, stop=(1,), seed=3
    )
    few, many = (sample.generate(model, prompts, slots=slots, **settings) for slots in (4, 64))
    assert [s.tokens for s in few] == [s.tokens for s in many]


def test_the_commands_on_the_gpu(tmp_path):
    """All commands, bfloat16 over float32 weights; the sampler-trainer gap is small."""
    policy = write_policy(tmp_path / "policy")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"id": i, "problem": f"{i % 10}+{i // 10}=", "answer": str(i % 7)}) + "\n"
            for i in range(40)
        )
    )
    steps = [
        (
            "sample.py",
            f"policy={policy}",
            f"prompts={prompts}",
            f"output={tmp_path}/batch",
            "n=8",
            "max_new_tokens=20",
            "lenient=true",
        ),
        (
            "stage1.py",
            f"policy={policy}",
            f"batch={tmp_path}/batch",
            f"output={tmp_path}/t",
            "steps=6",
            "train.lr=1e-3",
            "train.prompts_per_step=16",
            "loss.name=sapo",
        ),
        (
            "stage2.py",
            f"batch={tmp_path}/batch",
            f"output={tmp_path}/s",
            "train.prompts_per_step=16",
            "train.lr=1e-3",
            f'signal=[{{numerator="{tmp_path}/t/step_000006", denominator="evolving", steps=3}}]',
        ),
        (
            "evaluate.py",
            f"base={policy}",
            f"prompts={prompts}",
            f"output={tmp_path}/e",
            "lenient=true",
            "max_new_tokens=20",
            f'policy=[{{name="s", path="{tmp_path}/s", role="student"}}]',
            'sampling=[{name="T=1"}]',
        ),
    ]
    for script, *overrides in steps:
        result = command(script, *overrides)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    batch = rollouts.load(tmp_path / "batch")
    gap = (batch.read_column(models.fingerprint(policy), 1.0) - batch.sampler_logp)[
        batch.response
    ].abs()
    assert gap.mean() < 0.02
    row = json.loads((tmp_path / "e/report.json").read_text())["rows"][1]
    assert row["kl"] > 0
