"""mixing.py: packed attention and convolution against each sequence alone, and the cache of a
Qwen3.5, whose states grow out of everything that a slot has seen."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import loud

import mixing
import model as M

LENGTHS = [5, 1, 0, 2, 17, 3, 40, 0, 70]


@pytest.fixture(autouse=True)
def seed():
    """Fresh weights and tokens every run; the seed of a failure is in its captured output. One
    thread: tiny shapes."""
    seed, threads = random.SystemRandom().randrange(2**31), torch.get_num_threads()
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def assert_near(got, want, tolerance=1e-5):
    """Largest difference, relative to the largest value (but at least to 1)."""
    assert got.shape == want.shape and got.isfinite().all()
    if want.numel():
        error, scale = (got - want).abs().max().item(), max(1.0, want.abs().max().item())
        assert error <= tolerance * scale, f"off by {error:.2e}, the largest value is {scale:.2e}"


# ---------------------------------------------------------------- packed


@pytest.mark.parametrize("lengths", [LENGTHS, [2], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("taps", [2, 4])
def test_convolve(taps, lengths):
    """The history of a sequence must start at zeros, not in the one before it; values, and the
    gradients of inputs and taps."""
    C, T = 6, sum(lengths)
    packed = mixing.Packed(boundaries(lengths), "cpu", False)
    x, weight = torch.randn(T, C), torch.randn(C, 1, taps)
    g = torch.randn(T, C)

    def alone(x, weight):
        parts = [part for part in x.split(lengths) if len(part)]
        out = [
            F.conv1d(part.T[None], weight, padding=taps - 1, groups=C)[0, :, : len(part)].T
            for part in parts
        ]
        return torch.cat(out) if parts else x * weight[:, 0].sum()

    results = []
    for function in (packed.convolve, alone):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, g)))
    for got, want in zip(*results, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("A, K", [(4, 4), (6, 2)])
def test_one_by_one(A, K, monkeypatch):
    """What a GPU does with long sequences is what the padded form does."""
    monkeypatch.setattr(mixing, "ROUND", 16)
    T = sum(LENGTHS)
    q, *kv = (torch.randn(T, heads, 8, requires_grad=True) for heads in (A, K, K))
    packed, g = mixing.Packed(boundaries(LENGTHS), "cpu", False), torch.randn(T, A, 8)
    want = mixing.attention(q, *kv, packed)
    got = mixing._one_by_one(q, *kv, packed.sizes)
    assert_near(got, want)
    for x, y in zip(*(torch.autograd.grad(o, (q, *kv), g) for o in (got, want)), strict=True):
        assert_near(x, y)
    assert not packed.few_and_long
    monkeypatch.setattr(mixing, "LONG", T // len(LENGTHS))
    assert packed.few_and_long


@pytest.mark.parametrize("A, K", [(4, 4), (6, 2), (3, 1)])
def test_attend(A, K):
    """Softmax over a sequence's own earlier tokens, whatever groups its length puts it in; each
    query head reads its own key head."""
    D, T = 8, sum(LENGTHS)
    packed = mixing.Packed(boundaries(LENGTHS), "cpu", False)
    tensors, g = [torch.randn(T, heads, D) for heads in (A, K, K)], torch.randn(T, A, D)

    def alone(q, k, v):
        out = []
        k, v = (x.repeat_interleave(A // K, 1) for x in (k, v))
        for q, k, v in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):  # noqa: B020
            scores = torch.einsum("iad,jad->aij", q, k) / math.sqrt(D)
            future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
            p = scores.masked_fill(future, float("-inf")).softmax(-1)
            out.append(torch.einsum("aij,jad->iad", p, v))
        return torch.cat(out)

    results = []
    for function, dtype in ((packed.attend, torch.float32), (alone, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, g.to(dtype))))
    for got, want in zip(*results, strict=True):
        assert_near(got, want)


def test_positions():
    """They restart at every sequence, empty ones included."""
    packed = mixing.Packed(boundaries(LENGTHS), "cpu", False)
    assert packed.positions.tolist() == [t for n in LENGTHS for t in range(n)]
    assert packed.sizes == LENGTHS


# ---------------------------------------------------------------- the cache of a Qwen3.5


def build(taps=4, **changes):
    """A tiny Qwen3.5 (three DeltaNet layers, one of attention) with weights that matter."""
    shape = {
        **{"vocab": 64, "hidden": 24, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8},
        **{"eps": 1e-3, "intermediate": 20, "rotary": 2, "zero_centred": True, "gated": True},
        **{"delta": M.Delta(2, 4, 8, 12, taps), "linear": (True, True, True, False)},
    }
    network = M.Transformer(M.Config(**{**shape, **changes}))
    loud(network)
    return network


@pytest.fixture(scope="module", params=[4, 2], ids=lambda taps: f"taps={taps}")
def network(request):
    torch.manual_seed(seed := random.SystemRandom().randrange(2**31))
    print(f"weights: torch.manual_seed({seed})")
    return build(request.param)


def last(network, text):
    """The hidden state of the last token, by the whole forward pass over this text alone."""
    with torch.no_grad():
        return network(text, torch.tensor([0, len(text)]))[-1]


class Slots:
    """A cache and the texts that its slots should hold; every step is checked."""

    def __init__(self, network, slots, max_len=128):
        self.network, self.cache = network, mixing.Cache(network, slots, max_len)
        self.texts = [None] * slots
        for pair in self.cache.layers:  # what an earlier tenant may have left, and worse
            for x in pair:
                x.fill_(1e4)

    def prefill(self, prompts, prompt, slot):
        """Into the first slot of each prompt; the others share it."""
        tokens, cu_seqlens = torch.cat(prompts), boundaries([len(p) for p in prompts])
        first = [slot[prompt.index(p)] for p in range(len(prompts))]
        for s in slot:
            self.cache.release(s)
        for p, s in enumerate(first):
            assert self.cache.grow(s, len(prompts[p]))
        self.cache.sync()
        got = self.network.prefill(tokens, cu_seqlens, self.cache, torch.tensor(first))
        assert_near(got, torch.stack([last(self.network, p) for p in prompts]), 1e-4)
        for p, s in zip(prompt, slot, strict=True):
            self.texts[s] = prompts[p]
            if s != first[p]:
                assert self.cache.share(first[p], s, len(prompts[p]))
                self.cache.copy([(first[p], s, len(prompts[p]))])

    def decode(self, count, steps=1):
        """New tokens for the first `count` slots, other ones in each."""
        for _ in range(steps):
            lengths = torch.tensor([len(t) for t in self.texts[:count]])
            new = (torch.randint(64, ()) + torch.arange(count)) % 64
            for s in range(count):
                assert self.cache.grow(s, len(self.texts[s]) + 1)
            self.cache.sync()
            got = self.network.decode(new, lengths, self.cache)
            for s in range(count):
                self.texts[s] = torch.cat((self.texts[s], new[s : s + 1]))
                assert_near(got[s], last(self.network, self.texts[s]), 1e-4)

    def move(self, source, target):
        for s, t in zip(source, target, strict=True):
            self.cache.release(t)
            self.cache.move(s, t)
            self.texts[t] = self.texts[s]


def prompts_of(lengths):
    return [torch.randint(64, (n,)) for n in lengths]


def test_prefill_and_decode(network):
    """Prompts shorter than the convolution's window (1, 2 tokens), of one chunk and of several: the
    window, the states and the keys that they leave behind continue as if never interrupted."""
    lengths = [1, 2, 3, 4, 64, 65, 100]
    slots = Slots(network, len(lengths))
    order = torch.randperm(len(lengths)).tolist()
    slots.prefill(prompts_of(lengths), list(range(len(lengths))), order)
    slots.decode(len(lengths), steps=6)


def test_decode_from_one_token(network):
    """Decoding all the way, over the boundary of the chunks that the whole pass is cut into."""
    slots = Slots(network, 1)
    slots.prefill(prompts_of([1]), [0], [0])
    slots.decode(1, steps=70)


def test_shared_prompt(network):
    """Slots that start from one prompt have copies of its states, not the states themselves: their
    texts part at once."""
    slots = Slots(network, 5)
    slots.prefill(prompts_of([2, 9]), [0, 1, 0, 1, 0], [3, 0, 1, 4, 2])
    slots.decode(5, steps=4)


def test_reused_slots(network):
    """Finished slots are overwritten by later ones, new prompts take the place of those: nothing of
    an earlier tenant is left, and the others do not notice."""
    slots = Slots(network, 5)
    slots.prefill(prompts_of([7, 30, 2, 66, 1]), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    slots.decode(5, steps=3)
    slots.move([4, 3], [0, 2])  # 0 and 2 are finished: the last two take their place
    slots.decode(3, steps=2)
    slots.prefill(prompts_of([1, 5]), [0, 1], [4, 3])  # new prompts, some shorter than the window
    slots.decode(5, steps=3)
    slots.prefill(prompts_of([2]), [0, 0], [1, 2])
    slots.decode(5, steps=3)
    slots.move([1], [0])
    slots.decode(1, steps=2)


def four_slots(network):
    """A cache of four slots, all with a page, full of noise; and what it holds."""
    cache = mixing.Cache(network, 4, 16)
    assert all(cache.grow(s, 5) for s in range(4))
    cache.sync()
    return cache, [[x.normal_().clone() for x in pair] for pair in cache.layers]


def rows(cache, linear, slots):
    """Where a layer keeps what is of these slots: themselves, or their pages."""
    return slots if linear else [cache.held[s][0] for s in slots]


def test_prefill_touches_only_its_slots(network):
    """Prompts arrive while other slots are in the middle of a sequence."""
    cache, before = four_slots(network)
    network.prefill(torch.randint(64, (8,)), boundaries([5, 3]), cache, torch.tensor([1, 3]))
    for linear, old, new in zip(network.config.linear, before, cache.layers, strict=True):
        others, (one, three) = rows(cache, linear, [0, 2]), rows(cache, linear, [1, 3])
        for x, y in zip(old, new, strict=True):
            assert torch.equal(x[others], y[others])
            assert not torch.equal(x[one], y[one]) and not torch.equal(x[three], y[three])
            if not linear:  # nor positions beyond the prompt's end
                assert torch.equal(x[three, 3:], y[three, 3:])
                assert torch.equal(x[one, 5:], y[one, 5:])


def test_decode_touches_only_its_slots(network):
    """Slots beyond the first S are finished or wait for a prompt."""
    cache, before = four_slots(network)
    network.decode(torch.tensor([3, 7]), torch.tensor([2, 5]), cache)
    for linear, old, new in zip(network.config.linear, before, cache.layers, strict=True):
        own, others = rows(cache, linear, [0, 1]), rows(cache, linear, [2, 3])
        for x, y in zip(old, new, strict=True):
            assert torch.equal(x[others], y[others]) and not torch.equal(x[own], y[own])


@pytest.mark.parametrize("piece", [1, 3, 16, 40, 64, 100])
def test_long_prompts_in_pieces(network, piece):
    """A prompt that runs piece by piece leaves behind what it leaves in one, in every layer."""
    prompt = torch.randint(64, (150,))
    whole, parts = (mixing.Cache(network, 2, 160) for _ in range(2))
    for cache in (whole, parts):
        assert cache.grow(1, 150)
        cache.sync()
    want = network.prefill(prompt, boundaries([150]), whole, torch.tensor([1]))
    hidden = network.prefill(prompt[:piece], boundaries([piece]), parts, torch.tensor([1]))
    for done in range(piece, 150, piece):
        hidden = network.go_on(prompt[done:done + piece], parts, 1, done)
    assert_near(hidden, want, 1e-4)
    for a, b in zip(parts.layers, whole.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_near(x, y, 1e-4)


def test_pages():
    """Who holds which page: taken as sequences grow, shared where a prompt fills them, given back
    by the last who leaves, and never more than there are."""
    network = build(linear=(False,) * 4)
    cache = mixing.Cache(network, 3, 80, pages=6)
    assert cache.grow(0, 40) and len(cache.held[0]) == 3 and 0 not in cache.held[0]
    assert cache.share(0, 1, 40)  # two full pages shared, the third copied
    assert cache.held[1][:2] == cache.held[0][:2] and cache.held[1][2] not in cache.held[0]
    assert len(cache.free) == 2 and not cache.grow(2, 48) and cache.held[2] == []
    assert cache.grow(2, 32) and not cache.grow(0, 49) and cache.grow(0, 48)
    cache.release(0)
    assert len(cache.free) == 1  # its third page; the others are still slot 1's
    cache.move(1, 0)
    assert len(cache.held[0]) == 3 and cache.held[1] == []
    cache.sync()
    assert cache.table[0, :3].tolist() == cache.held[0] and not cache.table[1].any()
    cache.release(0)
    cache.release(2)
    assert sorted(cache.free) == [1, 2, 3, 4, 5, 6] and not any(cache.users)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3.5", "attention only", "DeltaNet only"])
def test_bytes(kind, dtype):
    """The sampler fits its pages into memory by this figure: it must be what is allocated."""
    attention = {"qwen3.5": [3], "attention only": range(4), "DeltaNet only": []}[kind]
    linear = tuple(i not in attention for i in range(4))
    network = build(linear=linear).to(dtype)
    for slots, max_len in ((1, 1), (3, 50)):
        cache = mixing.Cache(network, slots, max_len)
        tokens = (slots * -(-max_len // cache.page) + 1) * cache.page
        allocated = sum(x.nbytes for pair in cache.layers for x in pair)
        stored = sum(x.untyped_storage().nbytes() for pair in cache.layers for x in pair)
        want = mixing.Cache.bytes(network.config, slots, tokens, dtype)
        assert allocated == stored == want
    states = [pair[1] for pair, delta in zip(cache.layers, linear, strict=True) if delta]
    assert all(state.dtype == torch.float32 for state in states)  # sums of hundreds of tokens
