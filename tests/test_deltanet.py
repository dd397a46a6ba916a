"""deltanet.py against the recurrence, token by token in float64: values, states, every gradient,
both forms of the walk from chunk to chunk; and its Triton kernels compiled for a GPU not there."""

import os
import random
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import deltanet
from deltanet import CHUNK, Chunks, gated_delta_rule, gated_delta_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta")
EDGES = [0, 1, 2, 31, 63, 64, 65, 127, 128, 130]
MIXED = [5, 0, 64, 1, 150, 65, 63, 128, 0, 300]


@pytest.fixture(autouse=True)
def seed():
    """Fresh inputs every run; the seed of a failure is in its captured output. One thread: tiny
    shapes."""
    seed, threads = random.SystemRandom().randrange(2**31), torch.get_num_threads()
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def using(form):
    """Step and walk in one form, on any device (Triton: in its interpreter without a GPU)."""
    with pytest.MonkeyPatch.context() as patch:
        walk = deltanet._walk if form == "plain" else deltanet._Walk.apply
        patch.setattr(deltanet, "_walk", walk)
        patch.setattr(deltanet, "_Walk", SimpleNamespace(apply=walk))
        step = deltanet._step if form == "plain" else deltanet._step_triton
        patch.setattr(deltanet, "_step", step)
        patch.setattr(deltanet, "_step_triton", step)
        yield


@pytest.fixture(params=["plain", "triton"])
def form(request):
    if request.param == "triton" and deltanet.triton is None:
        pytest.skip("triton is not installed")
    with using(request.param):
        yield request.param


def chunks_of(lengths):
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return Chunks(cu_seqlens, lengths)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def inputs(T, V=2, dk=16, dv=16):
    """q, k, v, g, beta as the model makes them: unit keys, 0 < beta < 1, all kinds of decay."""
    g = -torch.exp(torch.empty(T, V, device=DEVICE).uniform_(-6, 1))
    beta = torch.randn(T, V, device=DEVICE).sigmoid()
    return unit(T, V, dk) * dk**-0.5, unit(T, V, dk), torch.randn(T, V, dv, device=DEVICE), g, beta


def naive(q, k, v, g, beta, lengths):
    """The two lines of the recurrence, one token at a time."""
    outputs, states = [], []
    for parts in zip(*(x.split(lengths) for x in (q, k, v, g, beta)), strict=True):
        S = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for q_t, k_t, v_t, g_t, beta_t in zip(*parts, strict=True):
            S = g_t.exp()[:, None, None] * S
            error = v_t - torch.einsum("hkv,hk->hv", S, k_t)
            S = S + torch.einsum("hk,h,hv->hkv", k_t, beta_t, error)
            outputs.append(torch.einsum("hkv,hk->hv", S, q_t))
        states.append(S)
    o = torch.stack(outputs) if outputs else sum(x.sum() for x in (q, k, v, g, beta)) * v
    return o, torch.stack(states)


def differentiated(function, case, upstream):
    """o, final states and the five gradients of <o, upstream[0]> + <final, upstream[1]>."""
    leaves = [x.detach().clone().requires_grad_() for x in case]
    out = function(*leaves)
    # the final states of empty sequences are constants
    pairs = [(o, u.to(o.dtype)) for o, u in zip(out, upstream, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [*(o.detach() for o in out), *(x.grad for x in leaves)]


def chunked(case, lengths, upstream):
    return differentiated(lambda *x: gated_delta_rule(*x, chunks_of(lengths)), case, upstream)


def recurrent(case, lengths, upstream):
    return differentiated(lambda *x: naive(*x, lengths), [x.double() for x in case], upstream)


def upstream_of(case, lengths):
    _, k, v, _, _ = case
    state = len(lengths), k.shape[1], k.shape[2], v.shape[2]
    return torch.randn(v.shape, device=DEVICE), torch.randn(state, device=DEVICE)


def worst(got, want):
    """{name: largest difference relative to the largest value}; that of a gradient counts as 1 if
    it is less, which is the size of the upstream gradients (terms of dg may cancel to nothing)."""
    errors = {}
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} for {tuple(y.shape)}"
        assert x.isfinite().all(), f"{name} is not finite"
        if y.numel():
            scale = max(1e-2 if name in ("o", "final") else 1.0, y.abs().max().item())
            errors[name] = (x.double() - y.double()).abs().max().item() / scale
    return errors


def assert_close(got, want, tolerance=2e-5):
    errors = worst(got, want)
    assert all(error <= tolerance for error in errors.values()), errors


# ---------------------------------------------------------------- against the recurrence


@pytest.mark.parametrize(
    "lengths",
    [[0], [0, 0], [1], [63], [64], [65], [150], [400], MIXED],
    ids=lambda lengths: "mixed" if lengths is MIXED else "+".join(map(str, lengths)),
)
def test_matches_recurrence(form, lengths):
    """A token at the edge of a chunk, a state handed over, or a boundary between sequences is wrong
    in the values, the final states or a gradient."""
    case = inputs(sum(lengths), V=2, dk=16, dv=12)
    upstream = upstream_of(case, lengths)
    got = chunked(case, lengths, upstream)
    assert_close(got, recurrent(case, lengths, upstream))
    assert got[0].dtype == got[1].dtype == torch.float32


@pytest.mark.parametrize("V, dk, dv", [(1, 1, 1), (3, 5, 3), (2, 24, 40), (1, 33, 7), (2, 16, 65)])
def test_shapes(form, V, dk, dv):
    """Widths that are no powers of two, dk != dv and several blocks of columns: the kernel's masks,
    or a transposed state."""
    lengths = [70, 0, 3, 129]
    case = inputs(sum(lengths), V, dk, dv)
    upstream = upstream_of(case, lengths)
    assert_close(chunked(case, lengths, upstream), recurrent(case, lengths, upstream))


@pytest.mark.parametrize(
    "name",
    [
        "g = -30",
        "g of all sizes",
        "g = 0",
        "beta = 0",
        "beta = 1",
        "identical keys",
        "opposite keys",
    ],
)
def test_extremes(form, name):
    """exp of a sum of decays overflows or divides 0 by 0, or the triangular solve loses digits."""
    lengths = [150, 64, 7]
    q, k, v, g, beta = inputs(sum(lengths), V=2, dk=8, dv=12)
    if name == "g = -30":
        g = torch.full_like(g, -30)
    elif name == "g of all sizes":
        g = torch.rand_like(g) * torch.where(torch.rand_like(g) < 0.7, -0.1, -30.0)
    elif name == "g = 0":
        g = torch.zeros_like(g)
    elif name == "beta = 0":
        beta = torch.zeros_like(beta)
    elif name == "beta = 1":
        g, beta = g / 100, torch.ones_like(beta)
    else:
        k, g, beta = k[:1].expand_as(k).clone(), torch.zeros_like(g), torch.ones_like(beta)
        if name == "opposite keys":
            k[::2] *= -1
    case = (q, k, v, g, beta)
    upstream = upstream_of(case, lengths)
    # differences of sums of g, which reach some hundreds, are known to 1e-5 or so in float32
    tolerance = 2e-4 if name == "g of all sizes" or "keys" in name else 2e-5
    got = chunked(case, lengths, upstream)
    assert_close(got, recurrent(case, lengths, upstream), tolerance)
    if name == "beta = 0":
        assert not got[0].any() and not got[1].any()


def test_remembers(form):
    """beta = 1, g = 0, orthonormal keys: S is a dictionary, whatever number of chunks lies between
    writing and reading. (The one result that needs no oracle.)"""
    T, dk = 300, 16
    k = torch.eye(dk, device=DEVICE)[torch.arange(T, device=DEVICE) % dk][:, None]
    v, q = torch.randn(T, 1, 5, device=DEVICE), k.roll(1, 0)  # reads what the token before wrote
    g, beta = torch.zeros(T, 1, device=DEVICE), torch.ones(T, 1, device=DEVICE)
    o, final = gated_delta_rule(q, k, v, g, beta, chunks_of([T]))
    assert (o[1:] - v[:-1]).abs().max() < 1e-5
    assert (final[0, 0] - v[-dk:, 0].roll(T % dk, 0)).abs().max() < 1e-5


# ---------------------------------------------------------------- from chunk to chunk


def walked(walk, tensors, start, lengths, upstream):
    """X, S, final and the gradients of W, U, K and fade; no gradient flows into what is None."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = walk(*leaves, start, chunks_of(lengths))
    loss = sum((o * u).sum() for o, u in zip(out, upstream, strict=True) if u is not None)
    if loss.requires_grad:  # states that no chunk has changed are constants
        loss.backward()
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return [*(o.detach() for o in out), *gradients]


@pytest.mark.parametrize("used", ["X S final", "X", "S", "final"])
@pytest.mark.parametrize("lengths", [[0], [30], MIXED], ids=["0", "30", "mixed"])
def test_walk(lengths, used):
    """The Triton kernels, forward and backward, against autograd through the plain loop (itself
    once more in float64); gradients that enter at X, at S and at the final states."""
    if deltanet.triton is None:
        pytest.skip("triton is not installed")
    V, dk, dv = 2, 6, 35
    C, B = chunks_of(lengths).total, len(lengths)
    # transposed, as _rule hands them over; a chunk's W, U, K of about 1, so that S neither dies out
    # nor explodes
    W, U, K = (
        torch.randn(C, V, width, CHUNK, device=DEVICE).mT * size
        for width, size in ((dk, 0.05), (dv, 1.0), (dk, 0.05))
    )
    tensors = W, U, K, torch.rand(C, V, device=DEVICE)
    start = torch.randn(B, V, dk, dv, device=DEVICE)
    shapes = {"X": (C, V, CHUNK, dv), "S": (C, V, dk, dv), "final": (B, V, dk, dv)}
    upstream = [
        torch.randn(shape, device=DEVICE) if name in used.split() else None
        for name, shape in shapes.items()
    ]
    want = walked(deltanet._walk, [x.double() for x in tensors], start.double(), lengths, upstream)
    for walk in (deltanet._walk, deltanet._Walk.apply):
        got = walked(walk, tensors, start, lengths, upstream)
        for x, y in zip(got, want, strict=True):
            assert x.shape == y.shape
            if y.numel():
                scale = max(1.0, y.abs().max().item())
                assert (x - y).abs().max() <= 1e-5 * scale


def test_expanded_upstream(form):
    """sum() hands the backward a gradient of stride 0, which a kernel must not walk as laid out."""
    lengths = [70, 5]
    case = inputs(sum(lengths), dk=6, dv=9)
    leaves = [x.clone().requires_grad_() for x in case]
    o, final = gated_delta_rule(*leaves, chunks_of(lengths))
    (o.sum() + final.sum()).backward()
    ones = [torch.ones_like(x) for x in (o, final)]
    want = recurrent(case, lengths, ones)
    assert_close([o.detach(), final.detach(), *(x.grad for x in leaves)], want)


# ---------------------------------------------------------------- one answer, however computed


@pytest.mark.parametrize("together", [1, 2, 5])
def test_head_groups(form, monkeypatch, together):
    """Long packs take their heads in turns, to bound the memory: the same values and gradients, and
    never more heads at once than was said."""
    lengths = [70, 3, 0, 65]
    T = sum(lengths)
    case = inputs(T, V=5, dk=6, dv=9)
    upstream = upstream_of(case, lengths)
    want = chunked(case, lengths, upstream)
    seen, rule = [], deltanet._rule
    monkeypatch.setattr(deltanet, "_rule", lambda q, *x: seen.append(q.shape[1]) or rule(q, *x))
    monkeypatch.setattr(deltanet, "TOKEN_HEADS", together * T + T - 1)
    assert_close(chunked(case, lengths, upstream), want, 3e-6)
    assert max(seen) == together
    with torch.no_grad():
        got = gated_delta_rule(*case, chunks_of(lengths))
    for x, y in zip(got, want[:2], strict=True):
        assert (x - y).abs().max() <= 3e-6 * y.abs().max()
    monkeypatch.setattr(deltanet, "TOKEN_HEADS", 1)  # less than one head: still one at a time
    assert_close(chunked(case, lengths, upstream), want, 3e-6)


def test_packed_is_separate(form):
    """What lies beside a sequence must not matter, not even by rounding worth mentioning."""
    case = inputs(sum(MIXED), dk=6, dv=9)
    upstream = upstream_of(case, MIXED)
    packed = chunked(case, MIXED, upstream)
    tokens = [x.split(MIXED) for i, x in enumerate(packed) if i != 1]  # all but the final states
    parts = zip(*(x.split(MIXED) for x in (*case, upstream[0])), strict=True)
    for b, (*part, d_o) in enumerate(parts):
        alone = chunked(part, [MIXED[b]], (d_o, upstream[1][b : b + 1]))
        mine = [x[b] for x in tokens]
        assert_close([mine[0], packed[1][b : b + 1], *mine[1:]], alone, 1e-6)


def test_inputs_unmodified(form):
    """Inputs keep their values, their layout does not matter, and the backward runs twice."""
    lengths = [70, 5]
    case = inputs(sum(lengths), dk=6, dv=9)
    clones = [x.clone() for x in case]
    out = gated_delta_rule(*case, chunks_of(lengths))
    assert all(torch.equal(x, y) for x, y in zip(case, clones, strict=True))
    wide = [torch.stack((x, x), 1)[:, 1].requires_grad_() for x in case]
    again = gated_delta_rule(*wide, chunks_of(lengths))
    assert all(torch.equal(x, y) for x, y in zip(out, again, strict=True))
    upstream = upstream_of(case, lengths)
    first = torch.autograd.grad(again, wide, upstream, retain_graph=True)
    second = torch.autograd.grad(again, wide, upstream)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_bfloat16(form):
    """16-bit inputs: all arithmetic stays float32, gradients come back with bfloat16's rounding and
    no more."""
    lengths = [70, 5, 130]
    case = [x.bfloat16() for x in inputs(sum(lengths), dk=6, dv=9)]
    upstream = upstream_of(case, lengths)
    got, want = chunked(case, lengths, upstream), recurrent(case, lengths, upstream)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 5
    assert max(worst(got, want)[name] for name in ("o", "final")) < 2e-5
    assert_close(got, want, 1e-2)


def test_step(form):
    """The sampler's recurrence, a token of every slot at a time, is the chunked rule; the state it
    is given is updated in place, and no slot's but its own."""
    S, T, V, dk, dv = 3, 70, 2, 6, 41
    case = [x.unflatten(0, (S, T)) for x in inputs(S * T, V, dk, dv)]
    want, final = gated_delta_rule(*(x.flatten(0, 1) for x in case), chunks_of([T] * S))
    slots = torch.randn(S + 2, V, dk, dv, device=DEVICE)
    slots[:S] = 0
    beyond = slots[S:].clone()
    got = [gated_delta_step(*(x[:, t] for x in case), slots[:S]) for t in range(T)]
    got = torch.stack(got, 1).flatten(0, 1)
    for x, y in ((got, want), (slots[:S], final)):
        assert x.dtype == torch.float32 and (x - y).abs().max() <= 2e-5 * y.abs().max()
    assert torch.equal(slots[S:], beyond)


def test_step_against_float64(form):
    """One step from an arbitrary state, 16-bit inputs: the formula, in float32."""
    S, V, dk, dv = 4, 2, 5, 3
    case = [x.bfloat16() for x in inputs(S, V, dk, dv)]
    state = torch.randn(S, V, dk, dv, device=DEVICE)
    q, k, v, g, beta = (x.double() for x in case)
    want = g.exp()[..., None, None] * state.double()
    error = beta[..., None] * (v - torch.einsum("shkv,shk->shv", want, k))
    want = want + torch.einsum("shk,shv->shkv", k, error)
    o = gated_delta_step(*case, state)
    assert o.dtype == torch.float32 and (state - want).abs().max() < 1e-5
    assert (o - torch.einsum("shkv,shk->shv", want, q)).abs().max() < 1e-5


def test_chunks():
    """Every token has a place of its own, in order, and no chunk holds two sequences."""
    chunks = chunks_of(MIXED)
    assert chunks.total == len((chunks.place // CHUNK).unique()) == sum(chunks.sizes)
    assert (chunks.place.diff() > 0).all()
    segment = torch.arange(len(MIXED)).repeat_interleave(torch.tensor(MIXED)).to(DEVICE)
    owner = torch.full((chunks.total,), -1, device=DEVICE)
    owner[chunks.place // CHUNK] = segment
    assert torch.equal(owner[chunks.place // CHUNK], segment)


@settings(deadline=None, max_examples=25, database=None)
@given(
    lengths=st.lists(st.sampled_from(EDGES), min_size=1, max_size=4),
    V=st.integers(1, 3),
    dk=st.integers(1, 20),
    dv=st.integers(1, 40),
    decay=st.floats(-7, 3),
    form=st.sampled_from(["plain", "triton"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, V, dk, dv, decay, form, seed):
    """Whatever the lengths, widths and decay are."""
    torch.manual_seed(seed)
    q, k, v, g, beta = inputs(sum(lengths), V, dk, dv)
    g = -torch.exp(decay + torch.rand_like(g))
    case, upstream = (q, k, v, g, beta), upstream_of((q, k, v, g, beta), lengths)
    with using(form if deltanet.triton else "plain"):
        got = chunked(case, lengths, upstream)
    assert_close(got, recurrent(case, lengths, upstream), 1e-4)


# ---------------------------------------------------------------- compiled, without a GPU

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import deltanet

for kernel, block, warps in ((deltanet._step_kernel, 32, 4), (deltanet._walk_kernel, 16, 8),
                             (deltanet._walk_back_kernel, 16, 8)):
    constants = {"N": deltanet.CHUNK, "DK": 128, "BLOCK": block}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        integers = {"first_ptr": "*i64", "count_ptr": "*i64", "V": "i32", "dk": "i32", "dv": "i32"}
        signature[name] = integers.get(name, "*fp32")
        hints[i,] = [["tt.divisibility", 16]]  # as a launch finds them
    source = ASTSource(kernel, signature, constants, hints)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})
    print(kernel.__name__, len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


def test_kernels_compile(tmp_path):
    """What the interpreter accepts, the compiler may refuse, or ask for more shared memory than an
    H100 has (227 KiB): dk = dv = 128, as in every published Qwen3.5."""
    if deltanet.triton is None:
        pytest.skip("triton is not installed")
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this triton has no NVIDIA backend")
    (tmp_path / "kernels_for_h100.py").write_text(COMPILE)  # a file: triton reads sources
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "kernels_for_h100.py"],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in rows] == [
        "_step_kernel", "_walk_kernel", "_walk_back_kernel"]
    for name, size, shared in rows:
        assert int(size) > 0 and int(shared) <= 227 * 1024, f"{name}: {shared} bytes shared"
