"""memory.py: its arithmetic against what autograd keeps, and against the peak of whole training
steps, sampling and scoring as the CPU's allocator sees them."""

import gc
import json
import random
import weakref

import pytest
import torch
from conftest import ROOT, write_policy
from torch.profiler import ProfilerActivity, profile

import deltanet
import divergence
import kernels
import memory
import mixing
import model as models
import runtime
import sample

FOLDERS = sorted(file.parent for file in (ROOT / "configs").glob("*/config.json"))


class Unseen(torch.autograd.Function):
    """Keeps what a fused operation keeps, computes nothing: shapes are enough to count bytes."""

    @staticmethod
    def forward(ctx, like, *tensors):
        out = torch.empty_like(like)
        ctx.save_for_backward(out, *tensors)
        return out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_what_a_block_keeps(folder, monkeypatch):
    """Count the bytes that autograd keeps of a real block, in bfloat16, without its memory."""
    c, T = models.read_config(folder), 4096

    def flash(q, k, v, packed):
        group = q.shape[1] // k.shape[1]
        return Unseen.apply(q, q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    def walk(W, U, K, fade, state, chunks):
        S = U.new_empty(*W.shape[:2], W.shape[3], U.shape[3])
        return Unseen.apply(U, W, K, fade), Unseen.apply(S), S[:1]

    monkeypatch.setattr(mixing, "attention", flash)
    monkeypatch.setattr(deltanet, "_walk", walk)
    monkeypatch.setattr(deltanet, "TOKEN_HEADS", 1 << 40)  # grouping is checked below
    monkeypatch.setattr(memory, "TOKEN_HEADS", 1 << 40)
    most = 0
    for linear in set(c.linear):
        with torch.device("meta"):
            block = models.Block(c, linear).bfloat16()
            x = torch.empty(T, c.hidden, dtype=torch.bfloat16, requires_grad=True)
            cos = torch.empty(T, 1, c.rotary // 2)
        mix = object.__new__(mixing.Packed)
        mix.cu_seqlens = torch.tensor([0, T], device="meta")
        mix.segment = torch.zeros(T, dtype=torch.long, device="meta")
        mix.chunks = deltanet.Chunks(torch.tensor([0, T]), [T])
        mix.chunks.place = mix.chunks.place.to("meta")
        kept, own = {}, {p.untyped_storage()._cdata for p in block.parameters()}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x, cos, cos, mix, None)
        most = max(most, sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own))
    assert memory.kept(c, T) == pytest.approx(most, rel=0.12)


# ---------------------------------------------------------------- whole runs, as they are


def scaled(folder, tmp_path, vocab):
    """A model of a real architecture, an eighth as wide, four layers deep, on the CPU."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text.setdefault("head_dim", 128)
    text |= {"hidden_size": text["hidden_size"] // 8, "num_hidden_layers": 4, "vocab_size": vocab,
             "intermediate_size": text["intermediate_size"] // 8, "num_key_value_heads": 1,
             "num_attention_heads": max(text["num_attention_heads"] // 8, 1)}
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:4]
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if name in text:
            text[name] //= 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = models.Transformer(models.read_config(tmp_path))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def peak(work):
    """The most bytes of tensors that `work` holds above what there was, by the allocator's events.
    """
    gc.collect()  # what earlier tests have left must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def within(measured, parts, loose):
    """Bounded, and not by a bound that says nothing."""
    bound = parts["peak"] - parts["reserve"]
    assert measured <= bound <= loose * measured, f"{measured / 1e6} MB, {memory.text(parts)}"


FAMILIES = ("qwen3_4b", "justrl_1_5b", "nanbeige4_3b", "qwen3_5_9b")  # tied and not, Llama to 3.5


@pytest.mark.parametrize("family, T, vocab, recompute, keep_attention, frozen", [
    *((family, T, vocab, True, False, 0) for family in FAMILIES
      for T, vocab in ((1024, 512), (3000, 512), (2048, 8192))),
    *((family, 2048, 8192, True, False, 1) for family in ("qwen3_4b", "nanbeige4_3b")),
    ("qwen3_4b", 3000, 512, True, True, 0), ("qwen3_4b", 3000, 512, False, False, 0),
    ("qwen3_4b", 3000, 512, True, False, 2)])
def test_training_stays_within_its_bound(family, T, vocab, recompute, keep_attention, frozen,
                                         tmp_path):
    """Two steps as runtime.py sets them up: FSDP2, activation checkpointing, AdamW; frozen policies
    beside it for exact KL."""
    model, *others = (scaled(ROOT / "configs" / family, tmp_path, vocab)
                      for _ in range(1 + frozen))
    ranks = runtime.start()
    try:
        tokens = torch.randint(0, vocab, (T,))
        cu_seqlens = torch.tensor([0, T // 2 + 17, T - T // 5, T])

        def train():
            for block in model.model.layers:
                block.recompute, block.keep_attention = recompute, keep_attention
            for policy in (model, *others):
                runtime.shard(policy, ranks)
            optimizer = runtime.adamw(model, 1e-4, [0.9, 0.95], 0.0)
            for _ in range(2):
                places = tokens, cu_seqlens, torch.arange(1, T)
                logp, entropy, kl = model.logp_kl(
                    *places, {i: other.states(*places) for i, other in enumerate(others)})
                (logp.sum() + entropy.sum() + sum(x.sum() for x in kl.values())).backward()
                runtime.clip_gradients(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        weights = 4 * memory.weights(model.config)[0] * (1 + frozen)
        within(weights + peak(train), memory.training(
            model.config, T, 1, device="cpu", batch=T, step=T, recompute=recompute,
            keep_attention=keep_attention, frozen=frozen), loose=2.2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("vocab", [512, 8192])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_stays_within_its_bound(family, vocab, truncated, tmp_path):
    model = scaled(ROOT / "configs" / family, tmp_path, vocab)
    options = dict(top_p=0.9, top_k=50, min_p=0.01) if truncated else {}
    prompts = [[1] * 40 for _ in range(40)]
    measured = peak(lambda: sample.generate(model, prompts, n=2, max_new_tokens=20, slots=64,
                                            **options))
    within(4 * memory.weights(model.config)[0] + measured,
           memory.sampling(model.config, 64, 60, 40, device="cpu"), loose=2.5)


def test_prompts_are_run_a_few_at_a_time(monkeypatch, tmp_path):
    """However many slots are free, a prefill is of at most PREFILL tokens; a longer prompt goes in
    pieces."""
    model = scaled(ROOT / "configs" / "qwen3_4b", tmp_path, 64)
    seen = []
    monkeypatch.setattr(memory, "PREFILL", 100)

    def counted(run):
        return lambda tokens, *rest: (seen.append(len(tokens)), run(tokens, *rest))[1]

    for name in ("prefill", "go_on"):
        monkeypatch.setattr(model, name, counted(getattr(model, name)))
    prompts = [[1] * size for size in (30, 30, 30, 30, 130, 30, 99, 1)]
    options = dict(n=3, max_new_tokens=4, slots=24)
    few = sample.generate(model, prompts, **options)
    assert max(seen) == 100 and sum(seen) == 380
    monkeypatch.setattr(memory, "PREFILL", 1 << 20)
    assert [s.tokens for s in sample.generate(model, prompts, **options)] == [
        s.tokens for s in few]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_stays_within_its_bound(family, both, tmp_path, monkeypatch):
    """With both models there, and with the base loaded in the policy's place."""
    policy, base = (scaled(ROOT / "configs" / family, tmp_path, 4096) for _ in range(2))
    config = policy.config
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 1 << 22)
    monkeypatch.setattr(memory, "SLICE_ELEMENTS", 1 << 22)
    monkeypatch.setattr(divergence, "together", lambda *_: both)
    sequences = [(i, [1] * 20, [2] * (150 + 40 * i)) for i in range(8)]
    assert max(len(pack.tokens) for pack in divergence.packs(
        sequences, 1024, torch.device("cpu"))) <= 1024
    holder, total = [policy], 4 * memory.weights(config)[0]
    gone = weakref.ref(policy)
    del policy

    def load(*_, **__):
        assert both or gone() is None  # the policy has made room
        return base

    monkeypatch.setattr(models, "load", load)
    measured = peak(lambda: divergence.score(
        holder, "policy", "base", {0: sequences}, max_tokens=1024, temperature=1.0))
    waiting = 0 if both else 4 * config.hidden * sum(len(s[2]) for s in sequences)
    before = 2 * total if both else total  # the base's weights take the place of the policy's
    bound = memory.scoring(config, 1024, device="cpu", both=both)
    within(before + measured - waiting + (0 if both else 4 * config.vocab * config.hidden),
           bound, loose=3.0)


@pytest.mark.parametrize("waiting", [1, 20_000, 1e9])
def test_taking_turns_changes_nothing(tmp_path, monkeypatch, waiting):
    """However many hidden states may wait for the base: the same sums, loaded in turns."""
    folders = [write_policy(tmp_path / f"{i}", seed=i) for i in range(2)]
    rng = random.Random(0)
    jobs = {name: [(rng.randrange(3), [1] * rng.randint(1, 9),
                    [rng.randrange(20) for _ in range(rng.randint(1, 40))]) for _ in range(12)]
            for name in "ab"}
    loaded, load = [], models.load
    monkeypatch.setattr(models, "load", lambda path, **k: (loaded.append(path), load(path, **k))[1])

    def cells(both):
        monkeypatch.setattr(divergence, "together", lambda *_: both)
        return divergence.score([load(folders[0], dtype=torch.float32)], *folders, jobs,
                                max_tokens=64, temperature=0.8)

    expected = cells(True)
    monkeypatch.setattr(divergence, "WAITING", waiting)
    loaded.clear()
    found = cells(False)
    turns = loaded.count(folders[1])
    assert loaded == [folders[1], *folders * (turns - 1)]
    assert turns == 1 if waiting == 1e9 else turns > 2
    for name in jobs:
        assert found[name].keys() == expected[name].keys()
        for problem, cell in found[name].items():
            assert cell == pytest.approx(expected[name][problem], rel=1e-6)


def test_a_bound_adds_up():
    config = models.read_config(ROOT / "configs" / "qwen3_5_27b")
    small, large = memory.training(config, 8192, 8), memory.training(config, 32768, 8)
    assert small["state"] == large["state"] == 16 * memory.weights(config)[0] // 8
    assert memory.training(config, 8192, 16)["state"] * 2 == small["state"]
    assert small["peak"] < large["peak"]
    at = memory.longest(config, 8, 141)
    assert at % 1024 == 0 and memory.training(config, at, 8)["peak"] <= 141e9
    assert memory.training(config, at + 2048, 8)["peak"] > 141e9
    assert memory.longest(config, 1, 80) == 0  # 430 GB of state fit no GPU
