"""decoding.py: its kernels (in Triton's interpreter where there is no GPU) against model.py and
sample.py, whose plain form is the oracle; and compiled for a GPU that is not there."""

import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, loud

import decoding
import mixing
import model as M
import sample

pytestmark = pytest.mark.skipif(decoding.triton is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = dict(vocab=64, hidden=24, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate=20,
             linear=(False,) * 3)
KINDS = {
    "qwen3": {},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "llama": {"qk_norm": False, "tied": False},
    "odd": {"heads": 6, "kv_heads": 2, "head_dim": 20, "hidden": 40, "intermediate": 1100},
    "one key head": {"kv_heads": 1, "o_bias": True},
    "qwen3.5": {"layers": 4, "rotary": 2, "zero_centred": True, "gated": True,
                "delta": M.Delta(2, 4, 8, 12, 4), "linear": (True, True, True, False)},
}


@pytest.fixture(autouse=True)
def seed():
    seed = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def build(kind, dtype=torch.float32):
    network = M.Transformer(M.Config(**{**SHAPE, **KINDS[kind]}))
    loud(network)
    network = network.to(dtype)
    for name, p in network.named_parameters():
        if M.FLOAT32.search(name):
            p.data = p.data.float()
    return network.to(DEVICE)


def prefilled(network, lengths, max_len=200):
    """A cache whose slots hold random prompts, with pages for 40 more tokens each."""
    cache = mixing.Cache(network, len(lengths) + 1, max_len)
    assert all(cache.grow(s, n + 40) for s, n in enumerate(lengths))
    cache.sync()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(64, (sum(lengths),), device=DEVICE)
    network.prefill(tokens, bounds, cache, torch.arange(len(lengths), device=DEVICE))
    return cache


def copy(cache, other):
    other.table.copy_(cache.table)
    for one, two in zip(cache.layers, other.layers, strict=True):
        for x, y in zip(one, two, strict=True):
            y.copy_(x)


LENGTHS = [1, 16, 33, 150]


@pytest.mark.parametrize("programs", [1, 1024], ids=["whole", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_models(kind, programs, monkeypatch):
    """Hidden states and everything that is left in the cache, over several steps; long sequences
    split over programs or not."""
    monkeypatch.setattr(decoding, "PROGRAMS", programs)
    network = build(kind)
    cache, twin = prefilled(network, LENGTHS), mixing.Cache(network, len(LENGTHS) + 1, 200)
    copy(cache, twin)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    steps = torch.randint(64, (3, len(LENGTHS)), device=DEVICE)
    want = [network.decode(new, lengths + i, cache) for i, new in enumerate(steps)]
    decoding.fuse(network)
    for i, new in enumerate(steps):
        got = decoding.forward(network, new, lengths + i, twin)
        assert (got - want[i]).abs().max() < 1e-4
    for mine, other in zip(twin.layers, cache.layers, strict=True):
        for x, y in zip(mine, other, strict=True):
            assert (x - y).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_a_step_in_16_bits(kind):
    """Errors stay those of rounding (the interpreter multiplies no bfloat16, so float16 there)."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    network = build(kind, dtype)
    cache = prefilled(network, LENGTHS)
    new, lengths = torch.randint(64, (4,), device=DEVICE), torch.tensor(LENGTHS, device=DEVICE)
    exact = build(kind)
    exact.load_state_dict(network.state_dict())
    memory = mixing.Cache(exact, 5, 200)
    copy(cache, memory)
    want = exact.decode(new, lengths, memory)
    decoding.fuse(network)
    got = decoding.forward(network, new, lengths, cache)
    assert got.dtype == dtype
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_fuse_keeps_the_weights():
    """Names, values and the plain forward pass stay; the parts lie in one tensor."""
    network = build("qwen2")
    tokens, bounds = torch.randint(64, (30,), device=DEVICE), torch.tensor([0, 30])
    before = {name: p.clone() for name, p in network.state_dict().items()}
    want = network(tokens, bounds)
    decoding.fuse(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert torch.equal(network(tokens, bounds), want)
    mlp = network.model.layers[0].mlp
    assert mlp.up_proj.weight.data_ptr() == mlp.joined[0][20:].data_ptr()


def test_long_and_short_sequences_together(monkeypatch):
    """One query each over 1 to 3000 tokens, split many ways: some splits have no page at all."""
    S, A, K, D, page = 4, 6, 2, 16, 16
    lengths = torch.tensor([0, 15, 16, 2999], device=DEVICE)
    table = torch.randperm(4 * 188, device=DEVICE).int().view(4, 188)
    q = torch.randn(S, A, D, device=DEVICE)
    keys, values = (torch.randn(4 * 188, page, K, D, device=DEVICE) for _ in range(2))
    want = []
    for s, n in enumerate(lengths.tolist()):
        k, v = (x[table[s].long()].flatten(0, 1)[:n + 1].repeat_interleave(3, 1)
                for x in (keys, values))
        p = (torch.einsum("ad,tad->at", q[s], k) / D**0.5).softmax(1)
        want.append(torch.einsum("at,tad->ad", p, v))
    for programs, share in ((1, 8), (1, 500), (32, 8), (1024, 8)):
        monkeypatch.setattr(decoding, "PROGRAMS", programs)
        monkeypatch.setattr(decoding, "SHARE", share)
        got = decoding.attend_pages(q, keys, values, table, lengths)
        assert (got - torch.stack(want)).abs().max() < 1e-5


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("V", [1, 33, 4096, 10_001])
@pytest.mark.parametrize("settings", [
    {"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5}, {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02}], ids=str)
def test_draw_is_pick(V, settings):
    """The same token and log-prob as the plain form, which sorts, at the same uniform number."""
    S, truncated = 12, len(settings) > 1
    logits = 3 * torch.randn(S, V, device=DEVICE)
    logits[::5, ::2] = float("-inf")
    logits[::5, 0] = 0.0
    uniform = torch.rand(S, dtype=torch.float64, device=DEVICE)
    uniform[:3] = torch.tensor([0.0, 0.5, 1 - 2**-52])
    tokens, logp = decoding.draw(logits, uniform, **settings)
    want, want_logp = sample.pick(logits, uniform, **settings)
    temperature = settings["temperature"] or 1.0
    log_p = torch.log_softmax(logits.double() / temperature, 1)
    mine = log_p.gather(1, tokens[:, None])[:, 0]
    assert (logp - mine).abs().max() < 1e-5 and mine.isfinite().all()
    same = tokens == want
    if not settings["temperature"]:
        assert same.all() and (logp - want_logp).abs().max() < 1e-5
    elif not truncated:  # rounding may tip a draw whose uniform number lies on an edge
        p = log_p.exp()
        high = p.cumsum(1).gather(1, tokens[:, None])[:, 0]
        low = high - mine.exp()
        assert ((low - 1e-5 <= uniform) & (uniform <= high + 1e-5)).all()
        assert same.float().mean() > 0.6
    else:  # in another order than pick, which sorts: of the tokens that stay
        p, order = log_p.exp().sort(1, descending=True)
        drop = torch.arange(V, device=DEVICE) >= settings.get("top_k", V)
        mass = p.masked_fill(drop, 0)
        mass = (mass / mass.sum(1, keepdim=True)).cumsum(1).roll(1, 1)
        mass[:, 0] = 0
        drop = drop | (mass >= settings.get("top_p", 2) + 1e-6)
        drop = drop | (p < settings.get("min_p", 0) * p[:, :1] * (1 - 1e-5))
        rank = (order == tokens[:, None]).nonzero()[:, 1]
        assert not drop[torch.arange(S, device=DEVICE), rank].any()


def test_truncation_keeps_what_it_should():
    """Probabilities 0.4, 0.3, 0.2, 0.1 in no order, far apart in the vocabulary: exactly those that
    each rule leaves are drawn, with the odds that they have among themselves."""
    V, S = decoding.CHUNK + 40, 10
    p = torch.zeros(V, dtype=torch.float64)
    places = [decoding.CHUNK + 5, 7, 3, 4000]
    p[places] = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    logits = p.log().float().expand(S, V).contiguous().to(DEVICE)
    uniform = ((torch.arange(S, device=DEVICE) + 0.5) / S).double()
    for settings, left in (({"top_p": 0.65}, 2), ({"top_p": 0.75}, 3), ({"top_k": 1}, 1),
                           ({"top_k": 3}, 3), ({"top_k": 9}, 4), ({"min_p": 0.6}, 2),
                           ({"top_k": 3, "top_p": 0.7}, 2), ({"top_p": 0.01}, 1),
                           ({"top_k": 2, "min_p": 0.2}, 2), ({"top_p": 0.9999}, 4)):
        tokens, logp = decoding.draw(logits, uniform, temperature=1.0, **settings)
        odds = torch.bincount(tokens.cpu(), minlength=V)[places] / S
        want = torch.tensor([0.4, 0.3, 0.2, 0.1][:left] + [0.0] * (4 - left))
        assert (odds - want / want.sum()).abs().max() < 0.1, settings
        assert (logp.cpu() - p[tokens.cpu()].log()).abs().max() < 1e-5  # before truncation


def test_draws_have_the_distribution():
    """Chi-square over many uniform numbers, on a boundary between chunks."""
    V, S = decoding.CHUNK + 8, 400
    logits = torch.full((1, V), -30.0, device=DEVICE)
    logits[0, decoding.CHUNK - 4:decoding.CHUNK + 4] = torch.randn(8, device=DEVICE)
    p = logits.double().softmax(1)[0]
    uniform = sample._uniform(torch.arange(S), torch.zeros(S, dtype=torch.long)).to(DEVICE)
    tokens = torch.cat([decoding.draw(logits.expand(100, V).contiguous(), part, temperature=1.0)[0]
                        for part in uniform.split(100)])
    seen = torch.bincount(tokens, minlength=V)
    live = p > 1e-6
    chi = ((seen - S * p)[live].square() / (S * p)[live]).sum()
    assert seen[~live].sum() == 0 and chi < 30  # 7 degrees of freedom: p < 1e-4


# ---------------------------------------------------------------- compiled, without a GPU

COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import decoding, kernels

def build(kernel, constants, warps=4, stages=3, **types):
    signature = {name: constants.get(name) is not None and "constexpr" or types.get(name, "i32")
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if types.get(name, "").startswith("*") or name in ("D", "H", "I", "WIDTH", "width")}
    made = compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                   target=GPUTarget("cuda", 90, 32),
                   options={"num_warps": warps, "num_stages": stages})
    print(kernel.__name__, made.metadata.shared)
    assert made.metadata.shared <= 227 * 1024

b, f, l, i, d = "*bf16", "*fp32", "*i64", "*i32", "*fp64"
build(decoding._add_norm_kernel, dict(ADD=True, CENTRED=False, BLOCK=4096), 8, x_ptr=b,
      delta_ptr=b, w_ptr=b, total_ptr=b, h_ptr=b, eps="fp32")
build(decoding._place_kernel, dict(NORM=True, CENTRED=False, HEADS=8, BLOCK=128), qkv_ptr=b,
      q_ptr=b, k_ptr=b, v_ptr=b, page_ptr=l, row_ptr=l, cos_ptr=f, sin_ptr=f, qw_ptr=b, kw_ptr=b,
      eps="fp32")
for splits, kind, wide, stages in ((1, b, 128, 5), (8, b, 128, 5), (4, b, 256, 5), (1, f, 128, 5),
                                   (1, f, 256, 2)):
    build(decoding._attend_kernel,
          dict(GROUP=4, ROWS=16, BLOCK=wide, PAGE=64, SPLITS=splits, LEAST=8), stages=stages,
          q_ptr=kind, k_ptr=kind, v_ptr=kind, table_ptr=i, length_ptr=l,
          o_ptr=kind if splits == 1 else f, lse_ptr=f, scale="fp32")
build(decoding._join_kernel, dict(SPLITS=8, BLOCK=128), 1, part_ptr=f, lse_ptr=f, o_ptr=b)
build(decoding._silu_mul_kernel, dict(BLOCK=1024), x_ptr=b, y_ptr=b)
for cut in (False, True):
    build(decoding._chunk_kernel, dict(CUT=cut, BLOCK=4096), x_ptr=f, top_ptr=f, total_ptr=f,
          edge_ptr=f, scale="fp32")
for k in (False, True):
    build(decoding._edge_kernel,
          dict(TOP_P=True, TOP_K=k, MIN_P=True, CHUNKS=64, EDGES=8, BLOCK=1024), 8, x_ptr=f,
          top_ptr=f, total_ptr=f, edge_ptr=f, scale="fp32", top_p="fp32", min_p="fp32")
for greedy, cut in ((False, False), (False, True), (True, False)):
    build(decoding._draw_kernel, dict(GREEDY=greedy, CUT=cut, CHUNKS=64, BLOCK=4096), x_ptr=f,
          top_ptr=f, total_ptr=f, kept_ptr=f, edge_ptr=f, uniform_ptr=d, token_ptr=l, logp_ptr=f,
          scale="fp32")
for moment in (0, 1, 2):
    build(kernels._fold_kernel, dict(MOMENT=moment, BLOCK=1024), x_ptr=f, y_ptr=f, target_ptr=l,
          top_ptr=f, total_ptr=f, moment_ptr=f, origin_ptr=f, picked_ptr=f, scale="fp32")
    build(kernels._grad_kernel, dict(MOMENT=moment, BLOCK=2048), x_ptr=f, y_ptr=f, dx_ptr=b,
          target_ptr=l, top_ptr=f, rest_ptr=f, origin_ptr=f, mean_ptr=f, g_ptr=f, h_ptr=f,
          scale="fp32")
"""


def test_kernels_compile_for_a_gpu():
    """The interpreter forgives what a compiler does not; shared memory must fit an H100 or H200."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE, str(ROOT)], env=environment,
                            capture_output=True, text=True, timeout=300)
    if "ptxas" in result.stderr and "not found" in result.stderr:
        pytest.skip("no ptxas")
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
