"""losses.py against hand-written tables, exact expectations over a small softmax, finite
differences and numpy."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses

settings.register_profile("quick", max_examples=60, deadline=None, database=None)
settings.load_profile("quick")
EXTREME = [-math.inf, -1e4, -30.0, -20.0, 0.0, 20.0, 30.0, 1e4]  # log-ratios


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


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(loss, logp):
    """loss(logp) and the gradient of its sum with respect to logp."""
    logp = logp.detach().clone().requires_grad_()
    value = loss(logp)
    value.sum().backward()
    return value.detach(), logp.grad


def batch(T=12, B=4, dtype=torch.float64):
    """logp, old_logp, advantage [T], reward [B] with both outcomes, segment [T] with every sequence
    in it."""
    logp = -3 * torch.rand(T, dtype=dtype) - 0.01
    old_logp = -3 * torch.rand(T, dtype=dtype) - 0.01
    reward = torch.tensor([1.0, 0.0] * B, dtype=dtype)[:B]
    segment = torch.arange(T) * B // T
    return logp, old_logp, torch.randn(T, dtype=dtype), reward, segment


# every loss as a function of logp alone, given a batch
LOSSES = {
    "grpo": lambda l, old, A, R, s: losses.grpo(l, old, A),
    "sapo": lambda l, old, A, R, s: losses.sapo(l, old, A),
    "ce sum": lambda l, old, A, R, s: losses.ce(l, old, R, s, beta=0.3),
    "ce mean": lambda l, old, A, R, s: losses.ce(l, old, R, s, beta=3.0, aggregate="mean"),
    "value_loss": lambda l, old, A, R, s: losses.value_loss(l, R[s]),
    "mse": lambda l, old, A, R, s: losses.mse(l, R, s),
    "mse weighted": lambda l, old, A, R, s: losses.mse(l, R, s, negative_weight=3.0),
    "sft": lambda l, old, A, R, s: losses.sft(l, R, s),
    "reverse_kl": lambda l, old, A, R, s: losses.reverse_kl(l, old),
    "forward_kl": lambda l, old, A, R, s: losses.forward_kl(l, old),
    "k1": lambda l, old, A, R, s: losses.k1(l, old),
    "k2": lambda l, old, A, R, s: losses.k2(l, old),
    "k3": lambda l, old, A, R, s: losses.k3(l, old),
    "aggregate token": lambda l, old, A, R, s: losses.aggregate(l * A, s),
    "aggregate sequence": lambda l, old, A, R, s: losses.aggregate(l * A, s, "sequence"),
    "aggregate fixed": lambda l, old, A, R, s: losses.aggregate(l * A, s, "fixed", length=7),
}
# and the functions without a gradient to speak of
OTHERS = {
    "cispo": lambda l, old, A, R, s: losses.cispo(
        l, old, A
    ),  # its weight is detached: no finite difference sees that
    "vespo": lambda l, old, A, R, s: losses.vespo(l, old, A, s),  # the same
    "gae": lambda l, old, A, R, s: losses.gae(l, R, s, lam=0.7)[0],
    "gae target": lambda l, old, A, R, s: losses.gae(l, R, s, lam=f64(0, 0.2, 0.9, 1))[1],
    "adaptive_lambda": lambda l, old, A, R, s: losses.adaptive_lambda(R + 1, 0.7),
    "explained_variance": lambda l, old, A, R, s: losses.explained_variance(l, R[s]),
    "ratio": lambda l, old, A, R, s: losses.ratio(l, old),
    "group_advantage": lambda l, old, A, R, s: losses.group_advantage(
        R, torch.tensor([5, 5, 2, 2])
    ),
    "group_advantage raw": lambda l, old, A, R, s: losses.group_advantage(
        R, s[:4], normalize=False
    ),
    "token_signal": lambda l, old, A, R, s: losses.token_signal(l, old),
    "sign_mask both": lambda l, old, A, R, s: losses.sign_mask(A, R, s),
    "sign_mask positive": lambda l, old, A, R, s: losses.sign_mask(A, R, s, "positive"),
    "sign_mask negative": lambda l, old, A, R, s: losses.sign_mask(A, R, s, "negative"),
    "whiten": lambda l, old, A, R, s: losses.whiten(A),
    "whiten scale": lambda l, old, A, R, s: losses.whiten(A, shift_mean=False),
    "diagnostics": lambda l, old, A, R, s: losses.diagnostics(l, old, -l, A, R, s),
}


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_inputs_unmodified(name):
    """An in-place operation on an argument, or a result that shares its memory, corrupts the next
    use of the batch."""
    given = batch()
    clones = [x.clone() for x in given]
    result = {**LOSSES, **OTHERS}[name](*given)
    if isinstance(result, torch.Tensor):
        result.add_(1.0)
    assert all(torch.equal(x, y) for x, y in zip(given, clones, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    """Autograd's gradient of each loss is the derivative of the value it reports."""
    logp, *rest = batch()
    assert torch.autograd.gradcheck(lambda l: LOSSES[name](l, *rest), logp.requires_grad_())


@pytest.mark.parametrize("name", [*LOSSES, "cispo", "vespo", "gae"])
def test_float32_and_shape(name):
    """Losses stay float32 (a stray float64 constant would double every buffer) and one number a
    token or sequence."""
    given = batch(dtype=torch.float32)
    value = {**LOSSES, **OTHERS}[name](*given)
    assert value.dtype == torch.float32
    assert value.shape == (
        (4,) if name.startswith("ce") else () if name.startswith("aggregate") else (12,)
    )


# ---------------------------------------------------------------- stage 1, by hand


@pytest.mark.parametrize(
    "A, rho, loss, slope",
    [
        (+1, 0.5, -0.50, -1),
        (+1, 1.0, -1.0, -1),
        (+1, 1.5, -1.28, 0),
        (-1, 0.5, +0.80, 0),
        (-1, 1.0, +1.0, +1),
        (-1, 1.5, +1.50, +1),
    ],
)
def test_ppo_clip_signs(A, rho, loss, slope):
    """The clip's value and d/d ratio; taking max for negative advantages reverses the last row's
    slopes."""
    value, gradient = value_and_gradient(lambda l: losses.grpo(l, f64(0), f64(A)), f64(rho).log())
    torch.testing.assert_close(value, f64(loss))
    torch.testing.assert_close(gradient / rho, f64(slope))  # d/d logp = rho d/d rho


def test_ppo_clip_arguments():
    """clip_low and clip_high belong to their own side."""
    value = losses.grpo(f64(0.5, 1.5).log(), f64(0, 0), f64(-1, 1), clip_low=0.1, clip_high=0.4)
    torch.testing.assert_close(value, f64(0.9, -1.4))


@pytest.mark.parametrize("A, tau", [(1.7, 1.0), (-0.6, 1.05), (0.8, 2.0)])
def test_sapo(A, tau):
    """-(4/tau) sigmoid(tau (rho - 1)) A, whose gradient weight on log pi is 4 p (1 - p) rho: 1 at
    rho = 1."""
    rho = f64(0.2, 0.9, 1.0, 1.35, 4.0)
    taus = {"tau_pos": tau} if A > 0 else {"tau_neg": tau}
    value, gradient = value_and_gradient(
        lambda l: losses.sapo(l, l * 0, f64(A).expand(5), **taus), rho.log()
    )
    p = 1 / (1 + torch.exp(-tau * (rho - 1)))
    # tau travels in float32
    torch.testing.assert_close(value, -4 / tau * p * A, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, -A * 4 * p * (1 - p) * rho, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[2], f64(-A)[0])


def test_cispo():
    """The truncated weight multiplies the gradient and is not differentiated; it is capped at 1 +
    eps."""
    rho, A = f64(0.1, 1.0, 4.9, 9.0), f64(1, -2, 1, 3)
    _, gradient = value_and_gradient(lambda l: losses.cispo(l, torch.zeros_like(l), A), rho.log())
    torch.testing.assert_close(gradient, -f64(0.1, 1.0, 4.9, 5.0) * A)
    value = losses.cispo(f64(-1), f64(-2), f64(3), clip_high=0.5)
    torch.testing.assert_close(value, f64(1.5 * 3 * 1))


@pytest.mark.parametrize("A, c1, c2", [(1.5, 2, 3), (-0.5, 3, 2)])
def test_vespo(A, c1, c2):
    """phi(W) = W^c1 exp(c2 (1 - W)) of the whole response weighs each of its tokens and is not
    differentiated; the constants go by the sign of the advantage."""
    d, segment = f64(0.3, -0.1, 0.4, -2.0, 0.0), torch.tensor([0, 0, 0, 1, 2])
    old = f64(-1, -2, -0.5, -0.2, -3)
    W = torch.exp(f64(0.6, 0.6, 0.6, -2.0, 0.0))
    phi = W**c1 * torch.exp(c2 * (1 - W))
    value, gradient = value_and_gradient(
        lambda l: losses.vespo(l, old, f64(A).expand(5), segment), old + d
    )
    torch.testing.assert_close(gradient, -phi * A)
    torch.testing.assert_close(value, -phi * A * (old + d))
    assert phi[4] == 1 and gradient[4] == -A


def test_vespo_constants():
    """c_pos and c_neg belong to their own side, even within a response; (0, 0) weighs nothing."""
    given = f64(-1, -1), f64(-2, -2), f64(1, -1), torch.tensor([0, 0])
    W, none = math.exp(2), (0.0, 0.0)
    for c_pos, c_neg, want in (
        ((1.0, 0.5), none, (W * math.exp(0.5 * (1 - W)), -1)),
        (none, (0.5, 0.1), (1, -(W**0.5) * math.exp(0.1 * (1 - W)))),
    ):
        value = losses.vespo(*given, c_pos=c_pos, c_neg=c_neg)
        torch.testing.assert_close(value, f64(*want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
def test_vespo_saturates(A):
    """log W of thousands, and of a token that has become impossible: no weight is left, and what
    happens to one response is none of another's business."""
    for d in (*EXTREME[1:], math.nan):
        logp = torch.tensor([d, -1.0, -2.0] if d == d else [-math.inf, -1.0, -2.0])
        old, segment = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0, 0, 1])
        value, gradient = value_and_gradient(
            lambda l, old=old, segment=segment: losses.vespo(
                l, old, torch.full((3,), A), segment
            ),
            logp,
        )
        assert gradient.isfinite().all() and value[1:].isfinite().all()
        assert gradient[2] == -A and (d == 0 or gradient[:2].abs().max() < 1e-13)


def test_vespo_bounds():
    """log W is held in [log 1e-8, 20], even where c2 = 0 leaves nothing else to hold it."""
    zero = torch.zeros(4)
    value = losses.vespo(torch.tensor([-1e4, -19.0, 25.0, 1e4]), zero, zero + 1, torch.arange(4),
                         c_pos=(0.5, 0.0))
    want = -torch.tensor([1e-4, 1e-4, math.exp(10), math.exp(10)])
    torch.testing.assert_close(value / torch.tensor([-1e4, -19.0, 25.0, 1e4]), want)


def test_vespo_packing():
    """A response weighs the same alone, among others, and in any order."""
    logp, old, A, _, segment = batch(T=30, B=4)
    whole = losses.vespo(logp, old, A, segment)
    for i in range(4):
        own = segment == i
        alone = losses.vespo(logp[own], old[own], A[own], segment[own] * 0)
        torch.testing.assert_close(whole[own], alone)
    order = torch.randperm(30)
    shuffled = losses.vespo(logp[order], old[order], A[order], segment[order])
    torch.testing.assert_close(shuffled, whole[order])
    nothing = torch.empty(0)
    assert losses.vespo(nothing, nothing, nothing, nothing.long()).shape == (0,)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_ce(how):
    """-log sigmoid(beta r) or -log(1 - sigmoid(beta r)) of a sequence; d/dr = beta (sigmoid(beta r)
    - R)."""
    logp, ref = f64(-1, -2, -0.5, -3), f64(-2, -2.5, -0.1, -1)
    segment, reward, beta = torch.tensor([0, 0, 1, 1]), f64(1, 0), 0.4
    value, gradient = value_and_gradient(
        lambda l: losses.ce(l, ref, reward, segment, beta=beta, aggregate=how), logp
    )
    n = 2 if how == "mean" else 1
    s0, s1 = (1 / (1 + math.exp(-beta * r / n)) for r in (1.5, -2.4))
    torch.testing.assert_close(value, f64(-math.log(s0), -math.log(1 - s1)))
    d0, d1 = beta / n * (s0 - 1), beta / n * s1
    torch.testing.assert_close(gradient, f64(d0, d0, d1, d1))


def test_ce_extremes():
    """A sequence log-ratio of thousands must not become log(0); an interleaved or empty sequence
    must find its sum."""
    logp, segment = f64(-5000, 0, 0, 5000), torch.tensor([0, 2, 2, 0])
    value, gradient = value_and_gradient(
        lambda l: losses.ce(
            l, torch.zeros(4, dtype=torch.float64), f64(1, 1, 0), segment, beta=1.0
        ),
        logp,
    )
    torch.testing.assert_close(value, f64(math.log(2), math.log(2), math.log(2)))
    for l in (-5000.0, 5000.0):
        value, gradient = value_and_gradient(
            lambda l: losses.ce(
                l, torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), beta=1.0
            ),
            torch.full((2,), l),
        )
        assert value.tolist() == [max(-l, 0), max(l, 0)] and gradient.isfinite().all()
    with pytest.raises(ValueError, match="median"):
        losses.ce(logp, logp, f64(1, 1, 0), segment, beta=1.0, aggregate="median")


def test_mse():
    """(p - R)^2 with gradient 2 (p - R) p; negative_weight multiplies tokens of reward 0 and
    nothing else."""
    p, segment, reward = f64(0.9, 0.2, 0.9, 0.2), torch.tensor([0, 0, 1, 1]), f64(1, 0)
    for weight in (1.0, 2.5):
        value, gradient = value_and_gradient(
            lambda l, w=weight: losses.mse(l, reward, segment, negative_weight=w), p.log()
        )
        torch.testing.assert_close(value, f64(0.01, 0.64, 0.81 * weight, 0.04 * weight))
        torch.testing.assert_close(gradient, f64(-0.18, -0.32, 1.62 * weight, 0.08 * weight))


def test_sft():
    """The negative log-likelihood of rewarded responses; the others contribute neither value nor
    gradient."""
    value, gradient = value_and_gradient(
        lambda l: losses.sft(l, f64(0, 1), torch.tensor([0, 1, 1])), f64(-1, -2, -3)
    )
    assert value.tolist() == [0, 2, 3] and gradient.tolist() == [0, -1, -1]


@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", ["grpo", "sapo", "cispo"])
def test_runaway_ratio_is_finite(name, A):
    """exp of a large log-ratio overflows float32, and inf * 0 in a gradient is nan: a policy loss
    must survive both."""
    d = torch.tensor(
        [x for x in EXTREME if x != -math.inf or name != "cispo"]
    )  # cispo is logp itself, -inf at p = 0
    value, gradient = value_and_gradient(
        lambda l: getattr(losses, name)(l, torch.zeros_like(l), torch.full_like(l, A)), d
    )
    assert value.isfinite().all() and gradient.isfinite().all()
    assert losses.ratio(d, torch.zeros_like(d)).isfinite().all()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "k3"])
def test_extreme_kl(name):
    """A KL term on a runaway token: finite, >= 0, and its gradient may vanish but never point
    further away."""
    d = torch.tensor(EXTREME[1:])
    value, gradient = value_and_gradient(lambda l: getattr(losses, name)(l, torch.zeros_like(l)), d)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value >= 0).all()
    assert (gradient * d >= 0).all(), f"gradient {gradient.tolist()} at log-ratios {d.tolist()}"


# ---------------------------------------------------------------- exact expectations over a softmax
# of six


def softmaxes():
    """Logits of pi (differentiable), and log-probabilities of a fixed other policy; six actions."""
    return torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(
        6, dtype=torch.float64
    ).log_softmax(0)


def expectation(term, sampler, logits):
    """E over actions of `term`, and the gradient in the logits of that expectation at fixed
    samples."""
    value = (sampler.exp().detach() * term).sum()
    return value.detach(), torch.autograd.grad(value, logits, retain_graph=True)[0]


def kl(p, q):
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_estimators_on_own_samples(name):
    """Tokens from pi: E k1 = E k3 = KL(pi || ref); the gradients are 0, (k2) KL(pi || ref)'s, (k3)
    KL(ref || pi)'s."""
    logits, q = softmaxes()
    p = logits.log_softmax(0)
    value, gradient = expectation(getattr(losses, name)(p, q), p, logits)
    exact = {"k1": 0 * kl(p, q), "k2": kl(p, q), "k3": kl(q, p)}[name]
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits, retain_graph=True)[0])
    if name != "k2":  # biased in value
        torch.testing.assert_close(value, kl(p, q).detach())


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_penalties_on_old_samples(name):
    """Tokens from pi_old: the two penalties are the two directions of the KL, in value and in
    gradient."""
    logits, old = softmaxes()
    p = logits.log_softmax(0)
    value, gradient = expectation(getattr(losses, name)(p, old), old, logits)
    exact = kl(p, old) if name == "reverse_kl" else kl(old, p)
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "k2", "k3"])
def test_divergence_terms_are_not_negative(name):
    """Every term (not only the mean) is >= 0, up to rounding, and 0 at equality."""
    d = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (getattr(losses, name)(d, torch.zeros_like(d)) > -1e-14).all()
    assert getattr(losses, name)(d, d).eq(0).all()


@pytest.mark.parametrize("name", ["grpo", "sapo", "cispo", "vespo"])
def test_on_policy_is_the_policy_gradient(name):
    """At pi = pi_old each of the four has gradient -A: the clip must be inactive on the first
    step."""
    logp, _, A, _, segment = batch()
    more = (segment,) if name == "vespo" else ()
    _, gradient = value_and_gradient(lambda l: getattr(losses, name)(l, logp, A, *more), logp)
    torch.testing.assert_close(gradient, -A, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- advantages and averages


@pytest.mark.parametrize("normalize", [True, False])
def test_group_advantage(normalize):
    """Against numpy, group by group: sizes 1 to 6, prompts named by arbitrary ids in any order."""
    prompt = torch.tensor([7] * 5 + [-3] * 6 + [10**12] + [0] * 2)[torch.randperm(14)]
    reward = torch.randint(9, (14,)) / 8  # far apart or equal: float32 has no say
    got = losses.group_advantage(reward, prompt, normalize=normalize)
    for i in range(14):
        group = reward[prompt == prompt[i]].double().numpy()
        want = reward[i].item() - group.mean()
        if normalize and len(group) > 1:
            want /= np.std(group, ddof=1) + 1e-6
        assert abs(got[i].item() - (want if len(group) > 1 else 0.0)) < 1e-5
    assert got.dtype == torch.float32 and losses.group_advantage(
        torch.empty(0), torch.empty(0).long()
    ).shape == (0,)


@given(
    st.lists(
        st.tuples(st.floats(-1000, 1000, width=32), st.integers(1, 17)), min_size=1, max_size=5
    ),
    st.booleans(),
)
@settings(max_examples=200)
def test_equal_rewards_give_exactly_zero(groups, normalize):
    """1/3 seven times over has a float32 mean that is not 1/3: noise divided by itself would be an
    advantage."""
    reward = torch.cat([torch.full((n,), value) for value, n in groups])
    prompt = torch.cat([torch.full((n,), i) for i, (_, n) in enumerate(groups)])
    assert losses.group_advantage(reward, prompt, normalize=normalize).eq(0).all()


@pytest.mark.parametrize("value", [1 / 3, 0.1, 1.0, 3.3, 1000.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_examples(value, normalize):
    """The same on fixed cases, beside a group that does vary."""
    reward, prompt = torch.tensor([value] * 7 + [0.0, 1.0]), torch.tensor([4] * 7 + [1] * 2)
    A = losses.group_advantage(reward, prompt, normalize=normalize)
    assert A[:7].eq(0).all() and A[7] < 0 < A[8]


def test_aggregate_by_hand():
    """The three averages of losses 1, 2, 3 | 10 and an unknown name."""
    loss, segment = f64(1, 2, 3, 10), torch.tensor([0, 0, 0, 1])
    assert losses.aggregate(loss, segment) == 4
    assert losses.aggregate(loss, segment, "sequence") == 6
    assert losses.aggregate(loss, segment, "fixed", length=4) == 2
    assert losses.aggregate(loss, segment, tokens=torch.tensor(8)) == 2
    assert losses.aggregate(loss, segment, "sequence", sequences=torch.tensor(4)) == 3
    with pytest.raises(ValueError, match="length"):
        losses.aggregate(loss, segment, "fixed")
    with pytest.raises(ValueError, match="median"):
        losses.aggregate(loss, segment, "median")


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=8),
    st.integers(0, 2**31),
    st.sampled_from(["token", "sequence", "fixed"]),
)
def test_micro_batches_add_up(sequences, seed, how):
    """Any split of the sequences (into empty micro-batches too), given global counts, adds up:
    value and gradient."""
    torch.manual_seed(seed)
    lengths = [n for n, _ in sequences]
    weight, logp = (
        torch.randn(sum(lengths), dtype=torch.float64),
        torch.randn(sum(lengths), dtype=torch.float64),
    )
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    counts = {"tokens": sum(lengths), "sequences": len(lengths), "length": 11}

    def split(logp):
        total = 0
        for micro in range(5):
            members = [i for i, (_, m) in enumerate(sequences) if m == micro]
            rows = torch.cat(
                [torch.where(segment == i)[0] for i in members] or [torch.empty(0).long()]
            )
            sizes = torch.tensor([lengths[i] for i in members], dtype=torch.long)
            local = torch.repeat_interleave(torch.arange(len(members)), sizes)
            total = total + losses.aggregate(weight[rows] * logp[rows], local, how, **counts)
        return total

    whole = value_and_gradient(
        lambda l: losses.aggregate(weight * l, segment, how, length=11), logp
    )
    torch.testing.assert_close(value_and_gradient(split, logp), whole)


@pytest.mark.parametrize("how", ["token", "sequence", "fixed"])
@pytest.mark.parametrize(
    "counts", [{}, {"tokens": 5, "sequences": 2}, {"tokens": 0, "sequences": 0}]
)
def test_empty_micro_batch(how, counts):
    """A rank with nothing left to do contributes 0 and a gradient of 0, not 0/0."""
    logp = torch.empty(0, requires_grad=True)
    value = losses.aggregate(logp * 2, torch.empty(0).long(), how, length=7, **counts)
    value.backward()
    assert value == 0 and logp.grad.shape == (0,)


# ---------------------------------------------------------------- a value network's advantage


def gae_loop(value, reward, segment, lam):
    """The definition, token by token from the end."""
    T, A = len(value), [0.0] * len(value)
    for t in reversed(range(T)):
        end = t == T - 1 or segment[t + 1] != segment[t]
        delta = (reward[segment[t]] if end else value[t + 1]) - value[t]
        A[t] = delta + (0.0 if end else lam[segment[t]] * A[t + 1])
    return f64(*A)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.3, 0.97, 1.0])), min_size=1,
             max_size=9),
    st.integers(0, 2**31),
)
def test_gae_against_a_loop(sequences, seed):
    """Doubling gives the sum of the definition: lengths around powers of two, a lambda each."""
    torch.manual_seed(seed)
    lengths, lam = torch.tensor([n for n, _ in sequences]), f64(*(lam for _, lam in sequences))
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    value, reward = torch.randn(len(segment), dtype=torch.float64), torch.randint(2, lengths.shape)
    A, target = losses.gae(value, reward.float(), segment, lam=lam)
    want = gae_loop(value, reward, segment, lam)
    torch.testing.assert_close(A, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(target, reward.double()[segment])
    one, _ = losses.gae(value, reward.float(), segment, lam=0.9)
    torch.testing.assert_close(one, gae_loop(value, reward, segment, [0.9] * len(lengths)))


def test_gae_limits():
    """lambda 1 is R - V, lambda 0 the step of V; a constant V of the reward is worth nothing."""
    value, reward, segment = f64(0.2, 0.5, 0.9, 0.4, 0.1), f64(1, 0), torch.tensor([0, 0, 0, 1, 1])
    for lam, want in (
        (1, (0.8, 0.5, 0.1, -0.4, -0.1)),
        (0, (0.3, 0.4, 0.1, -0.3, -0.1)),
        (f64(1, 0), (0.8, 0.5, 0.1, -0.3, -0.1)),
        (0.5, (0.3 + 0.2 + 0.025, 0.4 + 0.05, 0.1, -0.3 - 0.05, -0.1)),
    ):
        torch.testing.assert_close(losses.gae(value, reward, segment, lam=lam)[0], f64(*want))
    assert losses.gae(reward[segment], reward, segment, lam=0.7)[0].eq(0).all()
    empty = torch.empty(0)
    assert losses.gae(empty, empty, empty.long(), lam=0.5)[0].shape == (0,)


def test_gae_of_a_long_response():
    """20 thousand tokens in float32: the sum neither drifts nor takes a loop over tokens."""
    T = 20_000
    value, segment = torch.rand(2 * T), torch.arange(2).repeat_interleave(T)
    A, _ = losses.gae(value, torch.tensor([1.0, 0.0]), segment, lam=1.0)
    torch.testing.assert_close(A, torch.tensor([1.0, 0.0])[segment] - value, rtol=0, atol=1e-4)
    lam = losses.adaptive_lambda(torch.tensor([T, T]), 0.05)
    A, _ = losses.gae(value, torch.tensor([1.0, 0.0]), segment, lam=lam)
    want = gae_loop(value.double(), f64(1, 0), segment, lam.double())
    torch.testing.assert_close(A.double(), want, rtol=0, atol=1e-4)


def test_adaptive_lambda():
    """1 - 1 / (alpha length): -1 and below are 0, 32768 tokens nearly 1; sum lam^l = alpha length.
    """
    length = torch.tensor([10, 20, 40, 1000, 32768])
    got = losses.adaptive_lambda(length, 0.05)
    torch.testing.assert_close(got, torch.tensor([0, 0, 0.5, 0.98, 0.99939]), rtol=0, atol=1e-5)
    assert got[0] == got[1] == 0
    torch.testing.assert_close(1 / (1 - got[2:]), 0.05 * length[2:], rtol=1e-3, atol=0)


def test_value_loss_and_explained_variance():
    """Half the squared error; a constant explains nothing, the truth everything."""
    value, target = f64(0.2, 0.9, 0.4), f64(0, 1, 1)
    got, gradient = value_and_gradient(lambda v: losses.value_loss(v, target), value)
    torch.testing.assert_close(got, f64(0.02, 0.005, 0.18))
    torch.testing.assert_close(gradient, value - target)
    assert losses.explained_variance(target, target) == 1
    assert losses.explained_variance(f64(7, 7, 7), target) == 0
    assert losses.explained_variance(1 - target, target) < 0
    assert losses.explained_variance(value, f64(1, 1, 1)).isnan()
    assert losses.explained_variance(f64(1), f64(1)).isnan()


# ---------------------------------------------------------------- stage 2


def test_token_signal():
    """Numerator minus denominator; either may be absent, and both absent is a mistake in a
    config."""
    num, den = f64(-1, -2), f64(-3, -0.5)
    assert losses.token_signal(num, den).tolist() == [2, -1.5]
    assert losses.token_signal(num, None).tolist() == [-1, -2]
    assert losses.token_signal(None, den).tolist() == [3, 0.5]
    assert losses.token_signal(num, num.clone()).eq(0).all()
    with pytest.raises(ValueError, match="none"):
        losses.token_signal(None, None)
    alone = losses.token_signal(num, None)
    alone.zero_()
    assert num.tolist() == [-1, -2]


def test_sign_mask():
    """Only rewarded responses are masked; the rest keep both signs."""
    signal, reward, segment = f64(1, -2, 3, -4, 0), f64(1, 0), torch.tensor([0, 0, 1, 1, 0])
    assert losses.sign_mask(signal, reward, segment).tolist() == [1, -2, 3, -4, 0]
    assert losses.sign_mask(signal, reward, segment, "positive").tolist() == [1, 0, 3, -4, 0]
    assert losses.sign_mask(signal, reward, segment, "negative").tolist() == [0, -2, 3, -4, 0]
    with pytest.raises(ValueError, match="sometimes"):
        losses.sign_mask(signal, reward, segment, "sometimes")


def test_whiten():
    """Mean 0 and unbiased variance 1; without the shift, zeros stay zeros and only the scale
    changes."""
    x = 5 + 0.03 * torch.randn(1000, dtype=torch.float64)
    y = losses.whiten(x)
    torch.testing.assert_close(y, (x - x.mean()) / torch.sqrt(x.var() + 1e-8))
    assert abs(y.mean()) < 1e-9 and abs(np.std(y.numpy(), ddof=1) - 1) < 1e-4
    x[::3] = 0
    scaled = losses.whiten(x, shift_mean=False)
    assert scaled[::3].eq(0).all()
    torch.testing.assert_close(scaled, x / torch.sqrt(x.var() + 1e-8))


def test_whiten_degenerate():
    """One token has no variance (nan); a constant signal has a variance of 0 or of rounding noise
    (inf)."""
    for n in (0, 1):
        with pytest.raises(ValueError, match=str(n)):
            losses.whiten(torch.zeros(n))
    for value in (0.0, 1 / 3, -7.7):
        for shift in (True, False):
            assert losses.whiten(torch.full((101,), value), shift_mean=shift).isfinite().all()
    assert losses.whiten(torch.zeros(5)).eq(0).all()


def test_teacher_equal_to_reference():
    """pi_ext == pi_old: no signal, no advantage, no gradient."""
    logp, _, _, reward, segment = batch(dtype=torch.float32)
    signal = losses.sign_mask(losses.token_signal(logp, logp.clone()), reward, segment, "negative")
    A = losses.whiten(signal)
    _, gradient = value_and_gradient(lambda l: losses.grpo(l, logp, A), logp)
    assert signal.eq(0).all() and A.eq(0).all() and gradient.eq(0).all()


# ---------------------------------------------------------------- diagnostics


def test_diagnostics_before_any_update():
    """pi = pi_old: ratio 1, nothing clipped even by a clip of 0, both KLs 0. (A ratio that is
    always 1 is next.)"""
    logp, _, A, reward, segment = batch(dtype=torch.float32)
    d = losses.diagnostics(
        logp, logp.clone(), None, A, reward, segment, clip_low=0.0, clip_high=0.0
    )
    assert d["ratio_min"] == d["ratio_max"] == 1
    assert (
        d["clip_low"]
        == d["clip_high"]
        == d["kl_reverse"]
        == d["kl_forward"]
        == d["log_ratio_q50"]
        == 0
    )
    assert "entropy" not in d
    moved = losses.diagnostics(logp + 0.5, logp, None, A, reward, segment)
    assert moved["ratio_max"] > 1 and moved["clip_high"] == (A > 0).double().mean().item()


def test_diagnostics_by_hand():
    """Every number of a batch of four tokens."""
    p, old, entropy = f64(0.9, 0.2, 0.5, 0.4), f64(0.45, 0.4, 0.5, 0.5), f64(1, 2, 3, 6)
    A, reward, segment = f64(1, -1, 1, 1), f64(1, 0), torch.tensor([0, 0, 1, 1])
    d = losses.diagnostics(p.log(), old.log(), entropy, A, reward, segment)
    rho = [2.0, 0.5, 1.0, 0.8]
    want = {
        "p_positive": 0.55,
        "p_negative": 0.45,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "entropy": 3.0,
        "log_ratio_q01": math.log(0.5),
        "log_ratio_q50": math.log(0.8),
        "log_ratio_q99": 0.0,
        "kl_reverse": sum(r * math.log(r) - r + 1 for r in rho) / 4,
        "kl_forward": sum(r - 1 - math.log(r) for r in rho) / 4,
        "explained_variance": 1
        - np.var([0.1, 0.8, -0.5, -0.4], ddof=1) / np.var([1, 1, 0, 0], ddof=1),
        "clip_low": 0.25,
        "clip_high": 0.25,
    }
    assert d.keys() == want.keys()
    for name, value in want.items():
        assert d[name] == pytest.approx(value), name
    assert all(isinstance(value, float) for value in d.values())


def test_diagnostics_match_the_clip():
    """The clip fractions count exactly the tokens whose surrogate has no gradient."""
    logp, old, A, reward, segment = batch(T=400)
    d = losses.diagnostics(logp, old, None, A, reward, segment)
    _, gradient = value_and_gradient(lambda l: losses.grpo(l, old, A), logp)
    assert d["clip_low"] + d["clip_high"] == pytest.approx((gradient == 0).double().mean().item())


def test_diagnostics_undefined():
    """A constant outcome has no variance to explain and one side without tokens: nan, as
    documented, and no crash."""
    logp, old, _, _, segment = batch()
    for value, absent in ((0.0, "p_positive"), (1.0, "p_negative")):
        d = losses.diagnostics(logp, old, None, None, torch.full((4,), value), segment)
        assert math.isnan(d["explained_variance"]) and math.isnan(d[absent]) and "clip_low" not in d
    perfect = losses.diagnostics(
        f64(0, -math.inf), f64(0, -1), None, None, f64(1, 0), torch.tensor([0, 1])
    )
    assert perfect["explained_variance"] == 1
    undecided = losses.diagnostics(
        f64(0, -math.inf, -1), f64(0, -1, -1), None, None, f64(1, 0, math.nan), torch.arange(3)
    )
    assert undecided["explained_variance"] == 1
