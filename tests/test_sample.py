"""sample.py: the sampler against full forwards and transformers, its randomness, and the collector.

A tiny random checkpoint whose distributions are far from uniform.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, write_hybrid

import decoding
import grade
import memory
import mixing
import model as models
import rollouts
import runtime
import sample as S
import sandbox
import toy

PROMPTS = [[5, 9, 3], [4] * 11, [7], [8, 2, 6, 12, 20, 9, 3], [13, 14], [15, 4, 4, 9, 1]]
STOPS = (1, 6, 11, 17, 22)  # so many that lengths differ widely
TRUNCATED = dict(temperature=0.7, top_p=0.9, top_k=12, min_p=0.02)
RUN = dict(num_prompts=0, n=3, max_new_tokens=20, temperature=1.1, seed=5, prompts_per_shard=3,
           slots=4, lenient=True)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A checkpoint folder: the toy task's tokenizer, random weights with large logits."""
    folder = tmp_path_factory.mktemp("sampler")
    shape = toy.Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48)
    toy.write_initial_policy(folder / "initial", toy.Config(output="", shape=shape))
    network = models.load(folder / "initial", dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                p.mul_(15.0 if "embed" in name else 2.0)
    models.save(network, folder / "policy")
    return folder / "policy"


@pytest.fixture(scope="module")
def network(policy):
    return models.load(policy, dtype=torch.float32)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """The commands called in this process run on the CPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def generate(network, prompts=PROMPTS, **changes):
    return S.generate(network, prompts, **{"n": 3, "max_new_tokens": 14, "stop": STOPS, **changes})


def tokens(sequences):
    return [s.tokens for s in sequences]


def packed_logp(network, pairs, temperature):
    """Log-probs of each response by one packed forward pass of the trainer: list of lists."""
    flat = [t for prompt, response in pairs for t in (*prompt, *response)]
    cu_seqlens = torch.tensor([0, *(len(p) + len(r) for p, r in pairs)]).cumsum(0)
    starts = cu_seqlens[:-1].tolist()
    scored = [a + len(p) + i for a, (p, r) in zip(starts, pairs, strict=True)
              for i in range(len(r))]
    with torch.no_grad():
        logp, _ = network.logp(torch.tensor(flat), cu_seqlens, torch.tensor(scored),
                               temperature=temperature)
    return [part.tolist() for part in logp.split([len(r) for _, r in pairs])]


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


# ---------------------------------------------------------------- greedy


def test_greedy_equals_a_naive_loop(network):
    """A wrong position or a stale cache entry after a move changes the likeliest token."""
    for s in generate(network, n=1, temperature=0.0, slots=2):
        context, response, logp = list(PROMPTS[s.prompt]), [], []
        while len(response) < 14 and (not response or response[-1] not in STOPS):
            hidden = network(torch.tensor(context), torch.tensor([0, len(context)]))
            row = torch.log_softmax(hidden[-1].detach() @ network.head.detach().T, 0)
            response.append(int(row.argmax()))
            logp.append(float(row.max()))
            context.append(response[-1])
        assert s.tokens == response and s.finished == (response[-1] in STOPS)
        assert s.logp == pytest.approx(logp, abs=1e-5)


def test_a_hybrid_model(tmp_path):
    """DeltaNet layers: greedy equals transformers and the full forward over and over; draws do not
    depend on slots, which are reused by sequences of other prompts."""
    network = models.load(write_hybrid(tmp_path / "policy"), dtype=torch.float32)
    settings = dict(n=1, max_new_tokens=12, temperature=0.0, stop=(1,))
    greedy = S.generate(network, PROMPTS, slots=3, **settings)
    for start, sequence in zip(PROMPTS, greedy, strict=True):
        tokens = start + sequence.tokens
        hidden = network(torch.tensor(tokens), torch.tensor([0, len(tokens)]))
        assert (hidden @ network.head.T).argmax(1)[len(start) - 1 : -1].tolist() == sequence.tokens
    settings = dict(n=4, max_new_tokens=20, temperature=1.0, stop=STOPS, seed=3)
    few, many = (S.generate(network, PROMPTS, slots=slots, **settings) for slots in (2, 24))
    assert [s.tokens for s in few] == [s.tokens for s in many]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "policy", dtype=torch.float32)
    for start, sequence in zip(PROMPTS, greedy, strict=True):
        out = theirs.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False,
                              eos_token_id=1, pad_token_id=0)
        assert out[0, len(start):].tolist() == sequence.tokens


def test_greedy_equals_transformers(policy, network):
    """What we sample must be what every other engine samples from the same folder."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ours = generate(network, n=1, temperature=0.0, stop=(1,))
    for s, prompt in zip(ours, PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=14, eos_token_id=1, pad_token_id=0)
        assert s.tokens == out[0, len(prompt):].tolist()


@pytest.mark.parametrize("repetition, presence", [(1.4, 0.0), (0.7, 0.0), (1.0, 2.5), (1.3, -1.5)])
def test_penalties_by_hand(policy, network, repetition, presence):
    """Greedy, one token after the other: logits of what has occurred, by the formulas of Keskar et
    al. (2019) and of OpenAI's interface. Prompts count for repetition only; slots are reused."""
    penalties = dict(presence_penalty=presence, repetition_penalty=repetition)
    ours = generate(network, n=1, temperature=0.0, stop=(1,), slots=2, **penalties)
    plain = tokens(generate(network, n=1, temperature=0.0, stop=(1,)))
    assert tokens(ours) != plain
    for s in ours:
        context, response = list(PROMPTS[s.prompt]), []
        for _ in s.tokens:
            hidden = network(torch.tensor(context), torch.tensor([0, len(context)]))
            logits = (hidden[-1].detach() @ network.head.detach().T).tolist()
            for t in set(context):
                logits[t] = logits[t] / repetition if logits[t] > 0 else logits[t] * repetition
            for t in set(response):
                logits[t] -= presence
            response.append(max(range(len(logits)), key=logits.__getitem__))
            context.append(response[-1])
        assert s.tokens == response
    # log pi is of the policy itself
    pairs = [(PROMPTS[s.prompt], s.tokens) for s in ours]
    assert_close([s.logp for s in ours], packed_logp(network, pairs, 1.0))
    if presence == 0:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        for s, prompt in zip(ours, PROMPTS, strict=True):
            ids = torch.tensor([prompt])
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=14, eos_token_id=1, pad_token_id=0,
                                  repetition_penalty=repetition)
            assert s.tokens == out[0, len(prompt):].tolist()


def test_penalties_leave_neighbours_alone(network):
    """Draws under penalties do not depend on slots, which are emptied and moved."""
    settings = dict(n=5, max_new_tokens=30, presence_penalty=1.0, repetition_penalty=1.2)
    want = tokens(generate(network, slots=64, **settings))
    assert want != tokens(generate(network, n=5, max_new_tokens=30))
    for slots in (1, 4, 7):
        assert tokens(generate(network, slots=slots, **settings)) == want


def test_penalties_draw_from_the_penalised_distribution():
    """Chi-square of the draws against the softmax of the penalised logits."""
    logits = torch.tensor([[1.0, 0.5, -0.5, 0.2, -1.0]]).expand(20000, 5)
    said = torch.tensor([True, False, True, False, False]).expand(20000, 5)
    prompted = torch.tensor([False, True, False, False, True]).expand(20000, 5)
    penalised = S.penalise(logits, said, prompted, 0.3, 1.5)
    hand = torch.tensor([1.0 / 1.5 - 0.3, 0.5 / 1.5, -0.5 * 1.5 - 0.3, 0.2, -1.0 * 1.5])
    assert penalised[0].allclose(hand)
    uniform = S._uniform(torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    drawn, logp = S.pick(logits, uniform, temperature=0.8, penalised=penalised)
    expected = torch.softmax(hand.double() / 0.8, 0) * 20000
    counts = torch.bincount(drawn, minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # 99.9 % of chi-square, 4
    assert logp.allclose(torch.log_softmax(logits / 0.8, 1).gather(1, drawn[:, None])[:, 0])


def test_stop_strings(policy, network):
    """A response ends with the token that completes one of them, however tokens split it."""
    tokenizer = models.Tokenizer(policy)
    free = generate(network, n=8, max_new_tokens=24, stop=())
    text = [tokenizer.decode(s.tokens) for s in free]
    wanted = sorted({t[i:i + 2] for t in text for i in range(3, len(t) - 1)})[::9]
    got = generate(network, n=8, max_new_tokens=24, stop=(), stop_strings=wanted,
                   decode=tokenizer.decode, slots=5)
    assert {s.finished for s in got} == {True, False}
    for s, whole in zip(got, free, strict=True):
        mine = tokenizer.decode(s.tokens)
        assert s.tokens == whole.tokens[:len(s.tokens)]
        assert s.finished == any(string in mine for string in wanted)
        assert not any(string in tokenizer.decode(s.tokens[:-1]) for string in wanted)
        assert s.finished or len(s.tokens) == 24
    with pytest.raises(ValueError, match="stop_strings"):
        generate(network, stop_strings=("a",))
    with pytest.raises(ValueError, match="stop_strings"):
        generate(network, stop_strings=("",), decode=tokenizer.decode)


# ---------------------------------------------------------------- a sequence stands alone


@pytest.mark.parametrize("settings", [{}, TRUNCATED], ids=["plain", "truncated"])
def test_slots_change_nothing(network, settings):
    """Continuous batching may move sequences between slots, never their contents."""
    want = generate(network, **settings)
    for slots in (1, 3, 64):
        got = generate(network, slots=slots, **settings)
        assert tokens(got) == tokens(want)
        assert_close([s.logp for s in got], [s.logp for s in want])
        assert [s[0] for s in got] == [p for p in range(6) for _ in range(3)]


@pytest.mark.parametrize("look", [1, 3, 8])
@pytest.mark.parametrize("pages", [0, 4, 7, 11])
def test_pages_and_looks_change_nothing(network, monkeypatch, pages, look):
    """Where pages run out sequences wait, give theirs back and go on later, in pieces if they have
    grown long: nothing is lost, and no token depends on it."""
    monkeypatch.setitem(mixing.PAGE, "cpu", 8)
    settings = dict(max_new_tokens=[3, 14, 9, 1, 14, 12], repetition_penalty=1.2)
    want = generate(network, **settings)
    waited, make_room = [], S.make_room

    def watched(cache, live, *rest):
        waiting = make_room(cache, live, *rest)
        waited.extend(waiting)
        held = [page for pages in cache.held for page in pages]
        assert len(cache.free) + len(set(held)) == (pages or 24) and 0 not in held
        return waiting

    monkeypatch.setattr(S, "make_room", watched)
    monkeypatch.setitem(S.LOOK, "cpu", look)
    monkeypatch.setattr(memory, "PREFILL", 9)
    got = generate(network, slots=6, pages=pages, **settings)
    assert tokens(got) == tokens(want) and [s[0] for s in got] == [s[0] for s in want]
    assert_close([s.logp for s in got], [s.logp for s in want])
    assert waited or look > 1 or pages not in (4, 7)


def test_pages_for_one_sequence_at_least(network):
    with pytest.raises(ValueError, match="1 pages of 16 tokens do not hold one sequence of 25"):
        generate(network, pages=1)


def test_the_host_is_told(network):
    """watch sees every slot busy while prompts wait."""
    seen = []
    generate(network, n=10, slots=4, watch=lambda *a: seen.append(a))
    assert seen[0] == (4, 56) and seen[-1][1] == 0
    assert all(live == 4 for live, waiting in seen if waiting)


@pytest.mark.parametrize("write, more", [
    ("policy", {}), ("hybrid", {}), ("policy", TRUNCATED | {"repetition_penalty": 1.2})],
    ids=["policy", "hybrid", "truncated"])
def test_the_kernels_of_a_gpu_draw_the_same(network, write, more, monkeypatch, tmp_path):
    """The step that a GPU records, in Triton's interpreter: the same tokens from first to last,
    and log-probs that are the trainer's.
    """
    if decoding.triton is None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter; on a GPU, test_gpu.py has the real thing")
    make = network if write == "policy" else models.load(
        write_hybrid(tmp_path / "p"), dtype=torch.float32)
    settings = dict(n=2, max_new_tokens=6, slots=5, **more)
    want = generate(make, PROMPTS[:4], **settings)
    fused = deepcopy(make)
    decoding.fuse(fused)
    monkeypatch.setattr(models.Transformer, "decode", decoding.forward)
    monkeypatch.setattr(S, "pick", decoding.draw)
    got = generate(fused, PROMPTS[:4], **settings)
    if not more:  # a truncated distribution is not drawn from in the order of its odds there
        assert tokens(got) == tokens(want)
    pairs = [(PROMPTS[s.prompt], s.tokens) for s in got]
    assert_close([s.logp for s in got], packed_logp(
        make, pairs, more.get("temperature", 1.0)), 1e-4)


def test_batch_sizes():
    """Few of them, never too small, at most a half more than needed, none above the slots."""
    sizes = [S.batch_size(live, 1000, "cuda") for live in range(1, 1001)]
    assert all(live <= size <= live * 1.5 for live, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 20 and max(sizes) == 1000
    assert S.batch_size(77, 1000, "cpu") == 77


def test_neighbours_number_and_order_change_nothing(network):
    """A resumed run samples other neighbours: its sequences must be the same."""
    whole = tokens(generate(network, n=4, slots=5))
    per_prompt = [whole[4 * p:4 * p + 4] for p in range(len(PROMPTS))]
    for chosen in ([3, 0], [5], [2, 4, 1]):
        some = generate(network, [PROMPTS[p] for p in chosen], n=2, ids=chosen, slots=3)
        assert tokens(some) == [t for p in chosen for t in per_prompt[p][:2]]
        assert [s.prompt for s in some] == [i for i in range(len(chosen)) for _ in range(2)]


def test_the_seed_decides(network):
    """Equal seeds repeat a run; others, other ids and other samples are other draws."""
    want = tokens(generate(network, seed=3))
    assert want == tokens(generate(network, seed=3))
    assert want != tokens(generate(network, seed=4))
    twice = tokens(generate(network, [PROMPTS[1]] * 2, n=8))
    assert twice[:8] != twice[8:] and len({tuple(t) for t in twice}) > 8
    named = tokens(generate(network, [PROMPTS[1]] * 2, n=8, ids=["a", "a"]))
    assert named[:8] == named[8:]


@pytest.mark.parametrize("settings, temperature", [
    ({}, 1.0), (TRUNCATED, 0.7), ({"temperature": 1.6}, 1.6), ({"temperature": 0.0}, 1.0)])
def test_logp_is_the_trainers(network, settings, temperature):
    """logp is log pi at the temperature before truncation: the ratio of the first step is 1."""
    sequences = generate(network, **settings)
    pairs = [(PROMPTS[s.prompt], s.tokens) for s in sequences]
    assert_close([s.logp for s in sequences], packed_logp(network, pairs, temperature))


def test_stop_tokens_and_truncation(network):
    """The stop token belongs to the response, nothing follows it, and only it means finished."""
    sequences = generate(network, n=20, max_new_tokens=6, slots=7)
    for s in sequences:
        assert len(s.tokens) == len(s.logp) <= 6
        assert not set(s.tokens[:-1]) & set(STOPS)
        assert s.finished == (s.tokens[-1] in STOPS)
        assert s.finished or len(s.tokens) == 6
    assert {s.finished for s in sequences} == {True, False}
    assert any(s.finished and len(s.tokens) == 6 for s in sequences)  # stopped at the last moment
    assert all(not s.finished and len(s.tokens) == 4
               for s in generate(network, stop=(), max_new_tokens=4))
    assert all(len(s.tokens) == 1 for s in generate(network, max_new_tokens=1))


def test_unequal_lengths_lose_nothing(policy):
    """Each prompt and sample comes out exactly once, however slots empty and fill. In float64: in
    float32 a draw may fall within rounding of the border of two tokens.
    """
    network = models.load(policy, dtype=torch.float64)
    prompts = [[3 + i % 20] * (1 + 7 * i % 23) for i in range(17)]
    want = tokens(generate(network, prompts, n=5, max_new_tokens=60, stop=(1, 6)))
    assert min(map(len, want)) < 4 and max(map(len, want)) > 30
    settings = dict(n=5, max_new_tokens=60, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
                    stop=(1, 6), seed=0)
    for slots in (2, 9, 16):
        seen = [(s.prompt, sample) for s, sample in S.stream(network, prompts, slots=slots,
                                                            **settings)]
        assert len(seen) == 85 and set(seen) == {(p, k) for p in range(17) for k in range(5)}
        assert tokens(generate(network, prompts, slots=slots, **settings)) == want


@pytest.mark.parametrize("bad", [
    {"n": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")},
    {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.1}, {"slots": 0},
    {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")},
    {"presence_penalty": float("inf")},
    {"prompts": [[3], []]}], ids=str)
def test_bad_settings_are_refused(network, bad):
    """A setting that means nothing must not give samples that look fine."""
    with pytest.raises(ValueError):
        generate(network, **bad)


def test_no_prompts(network):
    """A rank without prompts samples nothing."""
    assert generate(network, []) == []


# ---------------------------------------------------------------- drawing a token


def p_value(counts, p):
    """Of Pearson's chi-square test; cells expected below 5 are joined."""
    expected = p.double() * counts.sum()
    small = expected < 5
    if small.any():
        counts = torch.cat((counts[~small], counts[small].sum()[None]))
        expected = torch.cat((expected[~small], expected[small].sum()[None]))
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    half = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def truncated(p, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that is meant, by a loop over tokens from the likeliest on."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[:top_k or len(p)]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if not kept or (mass / total < top_p and p[i] >= min_p * p[order[0]]):
            kept.append(i)
        mass += p[i]
    out = torch.zeros(len(p), dtype=torch.float64)
    out[kept] = torch.tensor([p[i] for i in kept], dtype=torch.float64)
    return out / out.sum()


CUTS = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 99}, {"top_p": 0.8}, {"top_p": 1e-6},
        {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05}]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_pick_has_the_distribution_that_is_meant(cut, temperature):
    """On a grid of uniforms each token is drawn in proportion to its renormalised probability."""
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(2))
    logp = torch.log_softmax(logits / temperature, 0)
    want, grid = truncated(logp.exp().tolist(), **cut), 20000
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    drawn, drawn_logp = S.pick(logits.expand(grid, -1), uniform, temperature=temperature, **cut)
    counts = torch.bincount(drawn, minlength=24)
    assert ((counts - want * grid).abs() <= 1.0 + 1e-3).all()
    assert drawn_logp.allclose(logp[drawn], atol=1e-6, rtol=0)  # before truncation


@pytest.mark.parametrize("cut", [{}, CUTS[-1]], ids=["plain", "truncated"])
def test_pick_with_our_uniforms_passes_chi_square(cut):
    """The hash and the inversion together: seeds and positions as a run has them."""
    logits = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    want = truncated(torch.softmax(logits, 0).tolist(), **cut)
    seeds = torch.tensor([S._seed(0, p, k) for p in range(200) for k in range(4)])
    seeds, positions = seeds.repeat_interleave(50), torch.arange(50).repeat(len(seeds))
    drawn, _ = S.pick(logits.expand(len(seeds), -1), S._uniform(seeds, positions),
                      temperature=1.0, **cut)
    counts = torch.bincount(drawn, minlength=24)
    assert not counts[want == 0].any()
    assert p_value(counts.double(), want) > 1e-3


def test_the_sampler_draws_from_the_model(network):
    """First tokens of many samples against the softmax of the prompt's last hidden state."""
    prompt = torch.tensor(PROMPTS[3])
    hidden = network(prompt, torch.tensor([0, len(prompt)]))[-1].detach()
    p = torch.softmax(hidden @ network.head.detach().T / 0.8, 0)
    drawn = generate(network, [PROMPTS[3]], n=4000, max_new_tokens=1, temperature=0.8, slots=999)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in drawn]), minlength=len(p))
    assert p_value(counts.double(), p) > 1e-3


@pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.999}], ids=str)
def test_impossible_tokens_are_never_drawn(cut):
    """At the ends of [0, 1) rounding must not reach a token of probability zero."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(500, 9, generator=generator)
    impossible = torch.rand(500, 9, generator=generator) < 0.5
    impossible[:, 4] = False
    impossible[:, 0] = impossible[:, -1] = True  # those that the ends would fall on
    logits[impossible] = float("-inf")
    for u in (0.0, 1.0 - 2.0 ** -52, 1.0 - 2.0 ** -53, 0.5):
        uniform = torch.full((500,), u, dtype=torch.float64)
        drawn, logp = S.pick(logits, uniform, temperature=1.0, **cut)
        assert not impossible.gather(1, drawn[:, None]).any() and logp.isfinite().all()


def test_ends_of_the_unit_interval():
    """The first and the last possible token are within reach, and no index is beyond."""
    logits, ends = torch.zeros(2, 5), torch.tensor([0.0, 1.0 - 2.0 ** -52], dtype=torch.float64)
    assert S.pick(logits, ends, temperature=1.0)[0].tolist() == [0, 4]
    assert set(S.pick(logits, ends, temperature=1.0, top_k=3)[0].tolist()) == {0, 2}


# ---------------------------------------------------------------- random numbers


def splitmix(seed, position):
    """Python integers, after the published splitmix64."""
    mask = (1 << 64) - 1
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 12) / 2 ** 52


def test_uniform_is_splitmix():
    """A wrapped multiplication or a signed shift gone wrong would skew every sample."""
    seeds = [0, 1, -1, 2**63 - 1, -2**63, S._seed(0, 0, 0), S._seed(9, "x", 3)]
    pairs = [(s, t) for s in seeds for t in (0, 1, 2, 1000, 40000)]
    got = S._uniform(*torch.tensor(pairs).T)
    assert got.dtype == torch.float64 and got.tolist() == [splitmix(s, t) for s, t in pairs]


def test_frozen_values():
    """Published batches must stay reproducible: these numbers never change."""
    seed = S._seed(0, 0, 0)
    assert seed == -8829620128957328363 and S._seed(1, "id", 2) != S._seed(1, "id", 3)
    got = S._uniform(torch.tensor([0, seed]), torch.tensor([0, 7])).tolist()
    assert got == [0.8833108082136425, 0.19712080947888477]  # the first: 0xe220a8397b1dcdaf


def test_uniform_is_uniform_and_independent():
    """Neighbouring positions, samples and seeds must not move together."""
    names = [(seed, p, k) for seed in range(2) for p in range(100) for k in range(10)]
    seeds = torch.tensor([S._seed(*name) for name in names])
    u = S._uniform(seeds.repeat_interleave(100), torch.arange(100).repeat(len(seeds)))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    n = len(u)
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.histc(u, 64, 0, 1)
    assert p_value(counts, torch.full((64,), 1 / 64)) > 1e-3
    u = u.view(2, 100, 10, 100)  # run seed, prompt, sample, position
    for axis in range(4):
        size = u.shape[axis] - 1
        near, far = u.narrow(axis, 0, size).flatten(), u.narrow(axis, 1, size).flatten()
        correlation = float(torch.corrcoef(torch.stack((near, far)))[0, 1])
        assert abs(correlation) < 5 / len(near) ** 0.5, f"axis {axis}"
    sequential = S._uniform(torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    pair = torch.stack((sequential[:-1], sequential[1:]))
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 20000 ** 0.5


# ---------------------------------------------------------------- collecting a batch


def arguments(folder, **changes):
    """Command-line settings of the run that the collector's tests share."""
    settings = {"policy": str(folder / "policy"), "prompts": str(folder / "prompts.jsonl"),
                "output": str(folder / "batch"), **RUN, **changes}
    return ["--set", *(f"{name}={json.dumps(value)}" for name, value in settings.items())]


def launch(*command):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def sample_here(monkeypatch, arguments):
    """sample.main() in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    try:
        S.main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def collected(policy, tmp_path_factory):
    """Five prompts sampled by one process into batch/ and by two into two/; the folder."""
    folder = tmp_path_factory.mktemp("collected")
    shutil.copytree(policy, folder / "policy")
    problems = {"1+2=": "8", "3*7-4=": "2", "9-9=": "46", "4=": "3", "1*3*7*9=": "8"}
    (folder / "prompts.jsonl").write_text("".join(  # answers that this policy hits now and then
        json.dumps({"id": f"p{i}", "problem": text, "answer": answer}) + "\n"
        for i, (text, answer) in enumerate(problems.items())))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    running = [launch("sample.py", *arguments(folder)),
               launch(*two, *arguments(folder, output=str(folder / "two"), slots=7))]
    for process in running:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert "15 rollouts, mean reward" in out
    return folder


@pytest.fixture
def copy(collected, tmp_path):
    """A copy of the folder that a test may damage."""
    return shutil.copytree(collected, tmp_path / "run", ignore=shutil.ignore_patterns("two"))


def assert_same_rollouts(a, b, header=True):
    assert not header or a.header == b.header
    for name in ("tokens", "cu_seqlens", "prompt_length", "prompt", "finished"):
        assert getattr(a, name).equal(getattr(b, name)), name
    assert a.reward.nan_to_num(-1).equal(b.reward.nan_to_num(-1))
    assert a.sampler_logp.allclose(b.sampler_logp, atol=1e-5, rtol=0)


def test_the_batch_is_what_generate_samples(collected, network):
    """Prompts, responses, rewards and log-probs must belong together, row by row."""
    batch = rollouts.load(collected / "batch")
    rows = rollouts.read_prompts(collected / "prompts.jsonl")
    tokenizer = models.Tokenizer(collected / "policy")
    prompts = [tokenizer.encode(row["problem"]) for row in rows]
    wanted = S.generate(network, prompts, n=3, max_new_tokens=20, temperature=1.1, seed=5,
                        stop=tokenizer.stop)
    assert len(batch) == 15 and batch.prompt.tolist() == [p for p in range(5) for _ in range(3)]
    for i, s in enumerate(wanted):
        a, b = batch.cu_seqlens[i:i + 2].tolist()
        cut = a + int(batch.prompt_length[i])
        assert batch.tokens[a:cut].tolist() == prompts[s.prompt]
        assert batch.tokens[cut:b].tolist() == s.tokens
        assert bool(batch.finished[i]) == s.finished == (s.tokens[-1] in tokenizer.stop)
        assert batch.sampler_logp[cut:b].tolist() == pytest.approx(s.logp, abs=1e-5)
        assert not batch.sampler_logp[a:cut].any()
        verdict = grade.grade(tokenizer.decode(s.tokens), rows[s.prompt]["answer"], lenient=True)
        assert batch.reward[i].nan_to_num(-1) == (-1 if verdict is None else verdict)
    assert set(batch.reward.tolist()) == {0.0, 1.0}
    assert batch.header["fingerprint"] == models.fingerprint(collected / "policy")
    shown = {name: batch.header[name] for name in ("n", "max_new_tokens", "temperature", "seed")}
    assert shown == {name: RUN[name] for name in shown}


def test_two_ranks_give_the_same_batch(collected):
    """The number of ranks changes nothing but the speed."""
    assert_same_rollouts(rollouts.load(collected / "two"), rollouts.load(collected / "batch"))


def alone(collected, tmp_path, world, **changes):
    """What S.collect is called with, by the first of `world` ranks of which the others are slow."""
    cfg = S.Config(policy=str(collected / "policy"), prompts=str(collected / "prompts.jsonl"),
                   output=str(tmp_path / "batch"), **{**RUN, "prompts_per_shard": 1, **changes})
    ranks = runtime.Ranks(0, world, torch.device("cpu"), None, dist.HashStore())
    shards = [[row] for row in range(5)]
    header = {"policy": "p", "n": cfg.n}
    return cfg, ranks, rollouts.read_prompts(cfg.prompts), shards, list(range(5)), header


def test_ranks_take_from_one_counter(collected, tmp_path):
    """While two shards are held up elsewhere, a rank goes on with all the others."""
    given = alone(collected, tmp_path, 2)
    given[1].store.add("taken", 2)
    S.collect(*given)
    assert sorted(p.name for p in (tmp_path / "batch").glob("shard-*")) == [
        f"shard-{s:05d}.safetensors" for s in (2, 3, 4)]
    assert given[1].store.add("sampled", 0) == 3 * RUN["n"]
    assert not list((tmp_path / "batch").glob("*.journal"))


def test_grading_stalls_no_sampling(collected, tmp_path, monkeypatch):
    """The first shard is graded while the last is still being sampled; and what goes wrong in
    grading stops the run."""
    journal, added = rollouts.Journal, threading.Event()

    class Watched(journal):
        def add(self, row, *rest):
            super().add(row, *rest)
            if row == 4:
                added.set()

    def slow(rows, texts, **_):
        assert added.wait(60)  # would never come if sampling waited for this
        return [0.0] * len(rows)

    monkeypatch.setattr(rollouts, "Journal", Watched)
    monkeypatch.setattr(rollouts, "rewards", slow)
    S.collect(*alone(collected, tmp_path, 1, slots=1))
    assert len(list((tmp_path / "batch").glob("shard-*.safetensors"))) == 5

    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(rollouts, "rewards", broken)
    with pytest.raises(OSError, match="no space"):
        S.collect(*alone(collected, tmp_path / "again", 1))
    assert len(list((tmp_path / "again/batch").glob("*.journal"))) > 0  # nothing sampled is lost


@pytest.mark.parametrize("lost", [[0], [1], [0, 1], []], ids=str)
def test_a_killed_run_goes_on(collected, copy, monkeypatch, lost):
    """A restart keeps what is there, bit for bit, and fills in the rest, the same."""
    before = {}
    for number in range(2):
        file = rollouts.shard_file(copy / "batch", number)
        if number in lost:  # what a killed run leaves: nothing, or a file in flight
            file.rename(f"{file}.4711.tmp")
        else:
            before[file] = file.read_bytes(), file.stat().st_mtime_ns
    settings = arguments(collected, output=str(copy / "batch"), slots=2)
    if lost:
        with pytest.raises(ValueError, match="shards"):
            rollouts.load(copy / "batch")
    sample_here(monkeypatch, settings)
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before
    again, whole = rollouts.load(copy / "batch"), rollouts.load(collected / "batch")
    assert_same_rollouts(again, whole)


@pytest.mark.parametrize("name, value", [
    ("temperature", 0.9), ("seed", 6), ("n", 4), ("max_new_tokens", 21), ("top_p", 0.9),
    ("top_k", 3), ("min_p", 0.1), ("chat.template", "{problem}="), ("lenient", False),
    ("num_prompts", 4), ("prompts_per_shard", 4), ("answer", "id")])
def test_changed_settings_are_refused(collected, copy, monkeypatch, name, value):
    """Half a batch of one setting and half of another, in one folder, is neither."""
    rollouts.shard_file(copy / "batch", 1).unlink()
    settings = arguments(collected, output=str(copy / "batch"), **{name: value})
    with pytest.raises(ValueError, match=rf"shard-00000.*sampled with {name.partition('.')[0]} = "):
        sample_here(monkeypatch, settings)
    assert not rollouts.shard_file(copy / "batch", 1).exists()


def test_another_policy_or_prompts_file_is_refused(collected, copy, monkeypatch):
    """A file's name is not its contents."""
    shutil.rmtree(copy / "batch")
    monkeypatch.chdir(copy)
    settings = arguments(copy, policy="policy", prompts="prompts.jsonl", output="batch", n=1)
    sample_here(monkeypatch, settings)
    with open("prompts.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="sampled with prompts_digest = "):
        sample_here(monkeypatch, settings)
    shutil.copyfile(collected / "prompts.jsonl", "prompts.jsonl")
    changed = models.load("policy", dtype=torch.float32)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.01)
    models.save(changed, "policy")
    with pytest.raises(ValueError, match="sampled with fingerprint = "):
        sample_here(monkeypatch, settings)


def test_prompts_are_drawn_by_the_seed(collected, tmp_path, monkeypatch):
    """num_prompts chooses different prompts for different seeds, in the file's order."""
    chosen = set()
    for seed in range(4):
        output = tmp_path / str(seed)
        sample_here(monkeypatch, arguments(collected, output=str(output), num_prompts=2, n=1,
                                           seed=seed, max_new_tokens=2))
        rows = rollouts.load(output).prompt.tolist()
        assert rows == sorted(set(rows)) and len(rows) == 2
        chosen.add(tuple(rows))
    assert len(chosen) > 1


@pytest.mark.parametrize("changes, message", [
    ({"num_prompts": 6}, "num_prompts = 6, but the file has 5"), ({"temperature": 0.0}, "greedy"),
    ({"n": 0}, "n must be at least 1"), ({"num_prompts": -1}, "num_prompts"),
    ({"prompts_per_shard": 0}, "prompts_per_shard")], ids=str)
def test_runs_that_make_no_batch_are_refused(collected, tmp_path, monkeypatch, changes, message):
    """Said before anything is sampled, naming the key."""
    with pytest.raises(ValueError, match=message):
        sample_here(monkeypatch, arguments(collected, output=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()


def test_exit_status_of_a_refusal(collected):
    """A script must see that nothing was sampled, a person why."""
    process = launch("sample.py", *arguments(collected, temperature=0.5))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: " in errors and "sampled with temperature = 1.1, now 0.5" in errors


def test_programs_are_rewarded_by_running_them(run, policy, tmp_path, monkeypatch):
    """Rows with tests in the place of an answer; refused at the start where nothing isolates."""
    try:
        sandbox.check()
    except PermissionError as error:
        pytest.skip(str(error))
    rows = [{"id": str(n), "problem": "double", "tests": {"inputs": ["2"], "outputs": [str(n)]}}
            for n in (4, 5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = "```python\nprint(2 * int(input()))\n```"
    monkeypatch.setattr(models.Tokenizer, "decode", lambda *_, **__: program)
    arguments = [f"policy={policy}", f"prompts={tmp_path}/p.jsonl", "n=2", "max_new_tokens=4"]
    run(S, *arguments, f"output={tmp_path}/batch")
    assert rollouts.load(tmp_path / "batch").reward.tolist() == [1.0, 1.0, 0.0, 0.0]

    def refuse(allowed):
        raise PermissionError("programs cannot be isolated here")

    monkeypatch.setattr(sandbox, "check", refuse)
    with pytest.raises(PermissionError, match="isolated"):
        run(S, *arguments, f"output={tmp_path}/other")
    assert not (tmp_path / "other").exists()
