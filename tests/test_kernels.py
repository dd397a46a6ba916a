"""kernels.py against float64 autograd over the whole [T, V] logits: values, every gradient, both
forms."""

import random

import pytest
import torch

import kernels
from kernels import linear_kl, linear_logp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture(params=["plain", "triton"])
def form(request, monkeypatch):
    """Each test that asks for it runs on the plain form and on Triton (in its interpreter where
    there is no GPU)."""
    if request.param == "triton" and kernels.triton is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(kernels, "_use_triton", lambda tensor: request.param == "triton")
    return request.param


def inputs(T, V, H=8, size=1.0, dtype=torch.float32):
    """Random hidden [T, H] and head [V, H] whose largest logit is about `size`, and targets [T]."""
    hidden, head = torch.randn(T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    if T:
        hidden *= size / (hidden @ head.T).abs().max()
    return hidden.to(dtype), head.to(dtype), torch.randint(V, (T,), device=DEVICE)


def weights(T):
    """Arbitrary upstream gradients, of logp and of the entropy."""
    return torch.randn(T, device=DEVICE), torch.randn(T, device=DEVICE)


def run(hidden, head, targets, g, h, **options):
    """logp, entropy, d hidden, d head of sum(g logp + h entropy), as linear_logp gives them."""
    hidden, head = (x.detach().clone().requires_grad_() for x in (hidden, head))
    logp, entropy = linear_logp(hidden, head, targets, **options)
    torch.autograd.backward((logp, entropy), (g, h))
    return logp.detach(), entropy.detach(), hidden.grad, head.grad


def reference(hidden, head, targets, g, h, temperature=1.0):
    """The same four in float64, from the definition."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    log_p = (hidden @ head.T / temperature).log_softmax(1)  # [T, V]
    logp = log_p.gather(1, targets.long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    torch.autograd.backward((logp, entropy), (g.double(), h.double()))
    return logp.detach(), entropy.detach(), hidden.grad, head.grad


def assert_close(got, want, tolerance=1e-5):
    """Element by element, relative to the largest value there is."""
    for name, x, y in zip(("logp", "entropy", "d hidden", "d head"), got, want, strict=False):
        assert x.shape == y.shape, f"{name}: {tuple(x.shape)} for {tuple(y.shape)}"
        if y.numel():
            error, scale = (
                (x.double() - y.double()).abs().max().item(),
                max(1.0, y.abs().max().item()),
            )
            assert error <= tolerance * scale, (
                f"{name}: off by {error:.2e}, where the largest value is {scale:.2e}"
            )


def assert_bounds(got, want):
    """What linear_logp promises in float32 for |logits| up to 100."""
    assert all(x.isfinite().all() for x in got)
    assert max((x - y).abs().max() for x, y in zip(got[:2], want[:2], strict=True)) <= 1e-4
    for x, y in zip(got[2:], want[2:], strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


# ---------------------------------------------------------------- linear_logp


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "T, V, columns",
    [
        (0, 33, None),
        (1, 1, None),
        (1, 33, 4),
        (7, 1, None),
        (7, 33, 5),
        (7, 33, 33),
        (7, 1000, 300),
        (130, 33, 20),
        (130, 1000, 999),
        (2, 5000, None),
    ],
)
def test_matches_float64(form, monkeypatch, T, V, columns, temperature):
    """The online softmax, its backward, or a slice that does not divide V (V = 5000: several blocks
    a row) is wrong."""
    if columns:
        monkeypatch.setattr(kernels, "SLICE_ELEMENTS", T * columns)
    case = (*inputs(T, V, size=5.0), *weights(T))
    assert_close(run(*case, temperature=temperature), reference(*case, temperature))


@pytest.mark.parametrize("columns", [4, 33])
def test_saturated(form, monkeypatch, columns):
    """|logits| up to 100, p of 0 and 1 and the largest logit in any slice: exp overflows or a
    gradient is nan."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 20 * columns)
    case = (*inputs(20, 33, size=100.0), *weights(20))
    assert_bounds(run(*case), reference(*case))


@pytest.mark.parametrize("T, H, V", [(30, 256, 50_001), (257, 128, 1000), (65, 1000, 333)])
def test_promised_bounds(form, monkeypatch, T, H, V):
    """|logits| of 100, where float32 has five digits after the point: sums of many terms, an lse or
    an E_p[x] kept as one number of that size would each cost the gradients their bound."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", T * 13_001)
    case = (*inputs(T, V, H, size=80.0), *weights(T))
    assert_bounds(run(*case, temperature=0.8), reference(*case, 0.8))


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_minus_infinity(form, monkeypatch, columns):
    """Logits of -inf (a slice full of them, the first one too) must drop out of both sums, not turn
    them into nan."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 5 * columns)
    hidden, head = torch.rand(5, 3, device=DEVICE) + 0.1, torch.randn(6, 3, device=DEVICE)
    head[[0, 1, 4]] = float("-inf")
    targets = torch.tensor([2, 3, 5, 2, 0], device=DEVICE)  # the last is impossible
    logp, entropy = linear_logp(hidden, head, targets)
    assert logp[-1] == float("-inf")
    log_p = (hidden @ head[[2, 3, 5]].T).double().log_softmax(1)
    column = torch.tensor([0, 1, 2, 0], device=DEVICE)[:, None]
    assert_close(
        (logp[:4], entropy), (log_p[:4].gather(1, column)[:, 0], -(log_p.exp() * log_p).sum(1))
    )


def test_bfloat16(form, monkeypatch):
    """16-bit inputs: values stay float32-exact, gradients come back in bfloat16 with its rounding
    and no more."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 30 * 64)
    case = (*inputs(30, 200, size=5.0, dtype=torch.bfloat16), *weights(30))
    got, want = run(*case), reference(*case)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert_close(got[:2], want[:2])
    assert_close(got, want, 1e-2)


def test_without_entropy(form):
    """entropy=False must change nothing about logp and its gradients."""
    hidden, head, targets = inputs(7, 33)
    g, _ = weights(7)
    want = run(hidden, head, targets, g, torch.zeros_like(g))
    a, b = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logp, entropy = linear_logp(a, b, targets, entropy=False)
    logp.backward(g)
    assert entropy is None
    assert (
        torch.equal(logp, want[0]) and torch.equal(a.grad, want[2]) and torch.equal(b.grad, want[3])
    )


def test_expanded_upstream(form):
    """sum() and mean() hand the backward a gradient of stride 0, which a kernel must not walk as
    laid out."""
    hidden, head, targets = inputs(7, 33)
    a, b = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logp, entropy = linear_logp(a, b, targets)
    (logp.sum() + entropy.mean()).backward()
    one = torch.ones(7, device=DEVICE)
    assert_close(
        (logp.detach(), entropy.detach(), a.grad, b.grad),
        reference(hidden, head, targets, one, one / 7),
    )


def test_entropy_alone(form):
    """A loss of the entropy only, with an unused logp: its missing upstream gradient is 0."""
    hidden, head, targets = inputs(7, 33, size=4.0)
    a, b = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    _, entropy = linear_logp(a, b, targets)
    entropy.sum().backward()
    want = reference(
        hidden, head, targets, torch.zeros(7, device=DEVICE), torch.ones(7, device=DEVICE)
    )
    assert_close((a.grad, b.grad), want[2:])


def test_one_of_two_gradients(form):
    """A frozen head (or frozen body) must leave the other's gradient as it was, and get none
    itself."""
    hidden, head, targets = inputs(7, 33)
    g, h = weights(7)
    want = run(hidden, head, targets, g, h)
    for which in (0, 1):
        pair = [hidden.clone(), head.clone()]
        pair[which].requires_grad_()
        torch.autograd.backward(linear_logp(*pair, targets), (g, h))
        assert torch.equal(pair[which].grad, want[2 + which]) and pair[1 - which].grad is None


def test_inputs_unmodified(form):
    """The backward works in place: on the slice alone, never on what it was given; so it can also
    run twice."""
    hidden, head, targets = inputs(7, 33)
    g, h = weights(7)
    given = (hidden, head, targets, g, h)
    clones = [x.clone() for x in given]
    hidden.requires_grad_(), head.requires_grad_()
    out = linear_logp(hidden, head, targets)
    first = torch.autograd.grad(out, (hidden, head), (g, h), retain_graph=True)
    again = torch.autograd.grad(out, (hidden, head), (g, h))
    assert all(torch.equal(x.detach(), y) for x, y in zip(given, clones, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_layout_and_integer_type(form):
    """A transposed head, a strided hidden, int32 targets: the answer depends on values, not on
    layout."""
    hidden, head, targets = inputs(7, 33)
    want = linear_logp(hidden, head, targets)
    wide = torch.stack((hidden, hidden), 2)[..., 0]
    got = linear_logp(wide, head.T.contiguous().T, targets.int())
    assert_close(got, want, 1e-6)


def test_logits_never_whole(form, monkeypatch):
    """No product may hold more than SLICE_ELEMENTS logits, in either direction: the point of the
    file."""
    T, V, held = 16, 1000, []
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", T * 100)

    def counted(inner):
        def product(*factors, **out):
            result = inner(*factors, **out)
            held.append(result.numel())
            return result
        return product

    for name in ("_logits_of", "_product"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name)))
    run(*inputs(T, V), *weights(T))
    assert len(held) >= 20 and max(held) == T * 100  # ten slices, forward and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(dtype):
    """The sampler's few rows: float32 whatever the weights are."""
    hidden, head, _ = inputs(3, 33, size=5.0, dtype=dtype)
    x = kernels.logits(hidden, head)
    assert x.dtype == torch.float32
    assert_close((x,), (hidden.double() @ head.double().T,))


def test_wrong_shapes():
    """Each misfit is refused with the shapes in the message, before anything broadcasts."""
    hidden, head, targets = inputs(7, 33)
    with pytest.raises(ValueError, match=r"\(7, 8\).*\(33, 7\)"):
        linear_logp(hidden, head[:, :7], targets)
    with pytest.raises(ValueError, match=r"\(1, 7, 8\)"):
        linear_logp(hidden[None], head, targets)
    with pytest.raises(ValueError, match=r"\[7\].*\[6\]"):
        linear_logp(hidden, head, targets[:6])
    with pytest.raises(ValueError, match=r"\[7\].*\[7, 1\]"):
        linear_logp(hidden, head, targets[:, None])
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            linear_logp(hidden, head, targets, temperature=temperature)


# ---------------------------------------------------------------- linear_kl


def pair(T, V):
    """Two policies of different width: hidden and head of p, hidden and head of q."""
    (hidden_p, head_p, _), (hidden_q, head_q, _) = (
        inputs(T, V, H=8, size=5.0),
        inputs(T, V, H=5, size=5.0),
    )
    return hidden_p, head_p, hidden_q, head_q


def kl_run(function, tensors, g):
    """The KL and its gradients with respect to p."""
    hidden_p, head_p = (x.detach().clone().requires_grad_() for x in tensors[:2])
    kl = function(hidden_p, head_p, *tensors[2:])
    kl.backward(g.to(kl.dtype))
    return kl.detach(), hidden_p.grad, head_p.grad


def kl_reference(temperature):
    def function(hidden_p, head_p, hidden_q, head_q):
        log_p = (hidden_p @ head_p.T / temperature).log_softmax(1)
        log_q = (hidden_q @ head_q.T / temperature).log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)

    return function


@pytest.mark.parametrize(
    "T, V, columns", [(1, 1, 1), (7, 33, 5), (7, 33, 33), (130, 100, 60), (3, 3000, 1111)]
)
def test_kl_matches_float64(form, monkeypatch, T, V, columns):
    """KL(p || q), its direction, its gradient, and slices that do not divide V."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 2 * T * columns)
    tensors, (g, _) = pair(T, V), weights(T)
    got = kl_run(lambda *x: linear_kl(*x, temperature=0.7), tensors, g)
    want = kl_run(kl_reference(0.7), [x.double() for x in tensors], g)
    for x, y in zip(got, want, strict=True):
        assert_close((x,), (y,), 2e-5)
    assert (got[0] > -1e-5).all() and got[0].dtype == torch.float32


def test_kl_saturated(form, monkeypatch):
    """Logits up to 100, p close to 0 and 1, divergences of up to 200 nats: E_p[y] as one number of
    that size would cost the gradients their bound. KL itself can be no better than float32 logits
    200 apart, an ulp of 1.53e-5: times E_p|log p/q - KL| through p, at most twice through q."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 2 * 20 * 70)
    p, q = (inputs(20, 200, size=100.0)[:2] for _ in range(2))
    g, _ = weights(20)
    got = kl_run(linear_kl, (*p, *q), g)
    want = kl_run(kl_reference(1.0), [x.double() for x in (*p, *q)], g)
    log_p, log_q = ((x.double() @ w.double().T).log_softmax(1) for x, w in (p, q))
    spread = (log_p.exp() * (log_p - log_q - want[0][:, None]).abs()).sum(1)
    assert ((got[0] - want[0]).abs() <= 1.53e-5 * (spread + 2.0)).all()
    for x, y in zip(got[1:], want[1:], strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()


def test_kl_of_impossible_tokens(form):
    """A token that p cannot take counts 0 (even if q cannot either); one that only q cannot take
    makes the divergence infinite, and no NaN."""
    hidden_p = hidden_q = torch.ones(1, 1, device=DEVICE)
    inf = float("inf")
    heads = torch.tensor([[0.0, -inf, -inf], [0.0, 1.0, -inf], [0.0, 0.0, 0.0]], device=DEVICE)
    none, q_wide, everywhere = (row[:, None] for row in heads)
    assert linear_kl(hidden_p, none, hidden_q, none).item() == 0
    assert linear_kl(hidden_p, none, hidden_q, q_wide).item() == pytest.approx(1.3132617)
    assert linear_kl(hidden_p, q_wide, hidden_q, none).item() == inf
    assert linear_kl(hidden_p, none, hidden_q, everywhere).item() == pytest.approx(1.0986123)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_kl_of_masked_tokens(form, monkeypatch, columns):
    """Masks of -inf and of the least finite number where p is certain, in a slice before or after:
    what has no weight leaves no trace."""
    monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 2 * columns)
    one, least = torch.ones(1, 1, device=DEVICE), torch.finfo(torch.float32).min
    p = torch.tensor([-250.0, -0.1, 120.0, 0.0], device=DEVICE)[:, None]
    for masked in (float("-inf"), least):
        q = torch.tensor([masked, 0.0, 0.0, 0.0], device=DEVICE)[:, None]
        head = p.clone().requires_grad_()
        divergence = linear_kl(one, head, one, q)
        divergence.sum().backward()
        assert divergence.item() == pytest.approx(1.0986123)
        assert head.grad.abs().max() < 1e-5
    entropy = linear_logp(one, torch.tensor([least, least, 1.0, 2.0], device=DEVICE)[:, None],
                          torch.tensor([3], device=DEVICE))[1]
    assert entropy.item() == pytest.approx(0.5822031)


def test_kl_in_bfloat16(form):
    """Rounded inputs, exact arithmetic; d/dx alone is rounded on the way to its products."""
    tensors, (g, _) = [x.bfloat16() for x in pair(40, 300)], weights(40)
    got = kl_run(linear_kl, tensors, g)
    want = kl_run(kl_reference(1.0), [x.double() for x in tensors], g)
    assert (got[0] - want[0]).abs().max() < 1e-4 and got[1].dtype == torch.bfloat16
    for x, y in zip(got[1:], want[1:], strict=True):
        assert (x - y).abs().max() <= 1e-2 * y.abs().max()


def test_kl_sliced_is_whole(form, monkeypatch):
    """The answer must not depend on how much of the vocabulary fits at once."""
    tensors, (g, _) = pair(13, 33), weights(13)
    whole = kl_run(linear_kl, tensors, g)
    for columns in (1, 4, 13):
        monkeypatch.setattr(kernels, "SLICE_ELEMENTS", 2 * 13 * columns)
        for x, y in zip(kl_run(linear_kl, tensors, g), whole, strict=True):
            assert_close((x,), (y,), 4e-6)


def test_kl_of_equals_is_zero(form):
    """p == q: exactly no divergence, and no gradient."""
    hidden, head, _ = inputs(7, 33, size=30.0)
    kl, *grads = kl_run(linear_kl, (hidden, head, hidden, head), torch.ones(7, device=DEVICE))
    assert torch.equal(kl, torch.zeros_like(kl))
    assert all(x.abs().max() < 1e-5 for x in grads)


def test_kl_of_no_tokens(form):
    """An empty micro-batch gives an empty result that still takes part in the backward pass."""
    tensors = pair(0, 33)
    tensors[1].requires_grad_()
    kl = linear_kl(*tensors)
    assert kl.shape == (0,) and kl.dtype == torch.float32
    kl.sum().backward()
    assert torch.equal(tensors[1].grad, torch.zeros_like(tensors[1]))


def test_kl_loses_no_gradient_silently():
    """q is a constant: whoever wants its gradient is told, and without gradients nobody is."""
    tensors = [x.requires_grad_() for x in pair(3, 33)]
    with pytest.raises(ValueError, match="no gradient with respect to q"):
        linear_kl(*tensors)
    with torch.no_grad():
        linear_kl(*tensors)


def test_kl_wrong_shapes():
    """Policies over different tokens or vocabularies are refused with the shapes in the message."""
    hidden_p, head_p, hidden_q, head_q = pair(7, 33)
    with pytest.raises(ValueError, match=r"\(7, 8\).*\(6, 5\)"):
        linear_kl(hidden_p, head_p, hidden_q[:6], head_q)
    with pytest.raises(ValueError, match=r"\(33, 8\).*\(32, 5\)"):
        linear_kl(hidden_p, head_p, hidden_q, head_q[:32])


@pytest.mark.parametrize("target", [-1, 33])
def test_targets_outside_the_vocabulary(target):
    """Silently, they would score as a logit of 0."""
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 33\)"):
        linear_logp(torch.randn(2, 8), torch.randn(33, 8), torch.tensor([0, target]))
