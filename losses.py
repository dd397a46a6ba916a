"""losses.py - every objective of Extreme Region Policy Distillation, as pure functions of tensors.

ERPD trains a policy twice on one fixed batch of rollouts drawn from pi_old:

  stage 1   many steps on a loss below (CE, SAPO, GRPO, MSE, ...), pushed until the policy is in an
            extreme region. That policy is only a teacher, pi_ext.
  stage 2   the teacher's token signal   r_t = log pi_num(y_t|s_t) - log pi_den(y_t|s_t)
            (pi_num = pi_ext, pi_den = pi_old in the simplest case) is whitened over the batch and
            used as the advantage of a clipped surrogate that starts again from pi_old:

                token_signal -> sign_mask -> whiten -> grpo (the PPO clip)

            The clip and a small number of steps are the trust region.

Words. The *batch* is the whole fixed set of rollouts; a *minibatch* is what one optimiser step
uses; a *micro-batch* is the part of it that one rank runs at a time. *Unlearning* is an early phase
of the MSE loss in which even right answers become less likely; a policy from that phase is a useful
denominator, and *recovery* is training on from it. Eq. and Table numbers are the ERPD paper's.

Shapes. T counts response tokens only (end-of-sequence included, prompt excluded) of all sequences
of a micro-batch; B counts sequences; `segment` [T] int64 is the index of each token's sequence.
Everything is packed, nothing is padded. `logp` [T] are log-probabilities under the policy being
trained, `old_logp` [T] under the policy that generated the batch, both float32;
rho = exp(logp - old_logp).
A token loss maps [T] -> [T] and is averaged by `aggregate` over the minibatch of all ranks.
Everything here is minimised. No function modifies its inputs.

Sources: ERPD 2605.25582; PPO 1707.06347; GRPO 2402.03300; clip-higher (DAPO) 2503.14476;
Dr.GRPO 2503.20783; SAPO 2511.20347; CISPO 2506.13585; VESPO 2602.10693; implicit reward (CE)
2412.01981; RWR (Peters and Schaal 2007); GAE 1506.02438; value pretraining (VC-PPO) 2503.01491;
length-adaptive lambda (VAPO) 2504.05118; KL estimators: Schulman 2020.
"""

import math

import torch
import torch.nn.functional as F


def ratio(logp, old_logp):
    """rho = pi_theta / pi_old of each sampled token, [T].

    The log-ratio is capped at 20 so that a runaway token stays finite in float32 (and SAPO's
    gradient is not inf * 0); beyond e^20 the gradient is zero.
    """
    return torch.exp((logp - old_logp).clamp(max=20.0))


# ---------------------------------------------------------------- stage 1: the teacher's objectives


def grpo(logp, old_logp, advantage, *, clip_low=0.2, clip_high=0.28):
    """PPO's clipped surrogate: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). [T] -> [T]

    Stage 1's GRPO with A = group_advantage, its PPO with A = gae, and stage 2's trust region with
    A = the whitened signal (Eq. 9). The gradient vanishes where rho is past the upper bound with
    A > 0, or past the lower one with A < 0.
    """
    rho = ratio(logp, old_logp)
    clipped = rho.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(rho * advantage, clipped * advantage)


def sapo(logp, old_logp, advantage, *, tau_pos=1.0, tau_neg=1.05):
    """Soft clip: -f(rho) A with f(r) = (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0.
    [T] -> [T]

    f'(1) = 1, so on-policy it is the plain policy gradient; off-policy the gate closes smoothly.
    """
    tau = torch.where(advantage > 0, tau_pos, tau_neg)
    gate = 4.0 / tau * torch.sigmoid(tau * (ratio(logp, old_logp) - 1.0))
    return -gate * advantage


def cispo(logp, old_logp, advantage, *, clip_high=4.0):
    """-sg(min(rho, 1 + clip_high)) A log pi_theta: the weight is truncated, the gradient never is.
    [T] -> [T]
    """
    weight = ratio(logp, old_logp).clamp(max=1.0 + clip_high).detach()
    return -weight * advantage * logp


def vespo(logp, old_logp, advantage, segment, *, c_pos=(2.0, 3.0), c_neg=(3.0, 2.0)):
    """-sg(phi(W)) A log pi_theta, every token weighed by the ratio of its whole response.
    [T] -> [T]

    W = exp(sum_t(logp - old_logp)) of the response, phi(W) = W^c1 exp(c2 (1 - W)) with (c1, c2) by
    the sign of A. phi(1) = 1, so on-policy it is the plain policy gradient; it vanishes towards
    W = 0 and W = inf: what pi_theta has left behind or run away with no longer teaches. log W is
    held in [log 1e-8, 20], where phi is 0 or nearly so.
    """
    log_ratio = (logp - old_logp).detach()
    log_w = logp.new_zeros(_sequences(segment)).index_add(0, segment, log_ratio)
    log_w = log_w.clamp(math.log(1e-8), 20.0)[segment]  # [T]
    c1, c2 = (torch.where(advantage > 0, pos, neg) for pos, neg in zip(c_pos, c_neg, strict=True))
    phi = torch.exp(c1 * log_w + c2 * (1.0 - log_w.exp()))
    return -phi * advantage * logp


def ce(logp, ref_logp, reward, segment, *, beta, aggregate="sum"):
    """Cross-entropy on the implicit reward (Eqs. 1-3). [T] -> [B]

    r(y) = beta * sum_t log(pi_theta / pi_ref)(y_t)      ("mean": divided by the response length)
    loss = -[R log sigmoid(r) + (1 - R) log(1 - sigmoid(r))],   reward R [B] in {0, 1}

    The policy is trained as its own classifier of right and wrong: the log-ratio is the logit.
    pi_ref is pi_old unless a recovery run says otherwise. No KL is computed, but a larger beta
    needs a smaller log-ratio for the same logit: it acts as the strength of a KL constraint.
    """
    r = logp.new_zeros(len(reward)).index_add(0, segment, logp - ref_logp)  # [B]
    if aggregate == "mean":
        r = r / _lengths(segment, len(reward))
    elif aggregate != "sum":
        raise ValueError(f'ce: aggregate must be "sum" or "mean", not {aggregate!r}')
    return F.binary_cross_entropy_with_logits(beta * r, reward.to(r.dtype), reduction="none")


def mse(logp, reward, segment, *, negative_weight=1.0):
    """(pi_theta(y_t|s_t) - R)^2: each token's probability is fitted to the outcome (Eq. 10).
    [T] -> [T]

    No constraint at all. Early on it *unlearns*: sampled tokens have p near 1, so the error is on
    the negatives (R = 0) and drags everything down. `negative_weight` > 1 on their tokens unlearns
    more.
    """
    R = reward.to(logp.dtype)[segment]
    return torch.where(R > 0, 1.0, negative_weight) * (logp.exp() - R) ** 2


def sft(logp, reward, segment):
    """-log pi_theta on the responses with reward 1, zero on the others (recovery, Table 9).
    [T] -> [T]
    """
    return -logp * (reward[segment] > 0)


def rwr(logp, weight):
    """-w log pi_theta: reward-weighted regression, w [T] from tilted_weight. [T] -> [T]

    On pi_old's samples this is the maximum likelihood of pi* = pi_old exp(tilt R) / Z, the optimum
    of KL-regularised RL with coefficient 1 / tilt (2205.11275): what one stage could do at best.
    """
    return -weight * logp


# ---------------------------------------------------------------- advantages and averages


def group_advantage(reward, prompt, *, normalize=True):
    """A = (R - mean) / (std + 1e-6) within the responses to one prompt; unbiased std.
    [B], [B] -> [B]

    normalize=False is Dr.GRPO's advantage, R - mean. `prompt` [B] integer names each response's
    group. A group of one, or of equal rewards, gives 0.
    """
    _, group = torch.unique(prompt, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    zeros = reward.new_zeros(groups)
    # counted from the group's smallest reward, so that equal rewards cancel exactly in float32
    least = zeros.scatter_reduce(0, group, reward, "amin", include_self=False)
    above = reward - least[group]
    count = zeros.index_add(0, group, torch.ones_like(reward))
    centred = above - (zeros.index_add(0, group, above) / count)[group]
    if not normalize:
        return centred
    std = (zeros.index_add(0, group, centred ** 2) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-6)[group]


def aggregate(loss, segment, how="token", *, tokens=None, sequences=None, length=None):
    """Average a token loss [T] into a scalar, normalised by counts of the global minibatch.

    "token"     sum_t loss / tokens                            every token weighs the same (default)
    "sequence"  sum_b (mean over b's tokens) / sequences       every response weighs the same
    "fixed"     sum_t loss / (sequences * length)              Dr.GRPO: `length` is a constant
    `tokens` and `sequences` are the counts over all ranks and micro-batches, so that the sum of the
    micro-batches' results is the result on the whole; left out, they are counted here. A sequence
    is never split between micro-batches.
    """
    if how == "token":
        return loss.sum() / _at_least_one(len(loss) if tokens is None else tokens)
    sequences = _at_least_one(_sequences(segment) if sequences is None else sequences)
    if how == "sequence":
        return (loss / _lengths(segment, _sequences(segment))[segment]).sum() / sequences
    if how == "fixed":
        if not length:
            raise ValueError('aggregate: how = "fixed" needs length, the constant number of tokens')
        return loss.sum() / (sequences * length)
    raise ValueError(f'aggregate: how must be "token", "sequence" or "fixed", not {how!r}')


def _sequences(segment):
    return int(segment.max()) + 1 if len(segment) else 0  # B


def _lengths(segment, B):
    return torch.bincount(segment, minlength=B).clamp(min=1).float()  # [B]


def _at_least_one(count):
    return max(count, 1) if isinstance(count, (int, float)) else count.clamp(min=1)


def tilted_weight(reward, prompt, tilt):
    """exp(tilt R) over its mean within the responses to one prompt. [B], [B] -> [B]

    The importance weight pi* / pi_old of each response, Z estimated from the prompt's own group.
    """
    _, group = torch.unique(prompt, return_inverse=True)
    tilted = torch.exp(tilt * reward)
    total, count = (tilted.new_zeros(len(prompt)).index_add(0, group, x)
                    for x in (tilted, torch.ones_like(tilted)))
    return tilted * (count / total)[group]


# ---------------------------------------------------------------- a value network's advantage (PPO)


def gae(value, reward, segment, *, lam):
    """Generalised advantage estimation, gamma = 1. [T], [B], [T] -> (A [T], target [T])

        delta_t = r_t + V(s_t+1) - V(s_t)          A_t = sum_l lam^l delta_t+l

    value[t] = V(s_t), of the state in which token t is chosen. The reward R comes with the last
    token of a response, and V is 0 after it. lam is a number, or one a sequence [B]. target is the
    return, which is R at every token; lam = 1 gives A_t = R - V(s_t), lam = 0 gives delta_t.
    The tokens of a sequence lie side by side, in order.
    """
    target = reward.to(value.dtype)[segment]
    last = torch.ones_like(segment, dtype=torch.bool)
    last[:-1] = segment[1:] != segment[:-1]
    advantage = torch.where(last, target, value.roll(-1)) - value  # delta
    weight = torch.as_tensor(lam, dtype=value.dtype, device=value.device)
    weight = weight[segment] if weight.ndim else weight.expand_as(value)
    # doubling: A_t holds the first `reach` terms, those of A_t+reach are the next as many
    reach = 1
    while (inside := segment[reach:] == segment[:-reach]).any():
        ahead = torch.where(inside, weight[:-reach] * advantage[reach:], 0.0)
        advantage = advantage + F.pad(ahead, (0, reach))
        weight, reach = weight * weight, 2 * reach  # lam^reach
    return advantage, target


def adaptive_lambda(length, alpha):
    """gae's lambda for responses of such lengths: 1 - 1 / (alpha length), in [0, 1]. [B] -> [B]

    Unclamped, the weights lam^l of a response add up to alpha length: a fixed share of it.
    """
    return (1.0 - 1.0 / (alpha * length)).clamp(0.0, 1.0)


def value_loss(value, target):
    """(V - R)^2 / 2. [T] -> [T]"""
    return 0.5 * (value - target) ** 2


def explained_variance(value, target):
    """1 - Var(R - V) / Var(R) over the tokens given: 1 for a perfect prediction, 0 for a constant,
    nan where R itself is constant. [T], [T] -> scalar
    """
    value, target = value.double(), target.double()
    if len(target) < 2 or not target.var() > 0:
        return target.new_tensor(float("nan"))
    return 1.0 - (target - value).var() / target.var()


# ---------------------------------------------------------------- divergences


def reverse_kl(logp, old_logp):
    """Penalty KL(pi_theta || pi_old) on tokens that pi_old sampled: rho d - rho + 1, d = log rho.
    [T] -> [T]

    E_old[rho d] is the KL; 1 - rho has zero mean and makes every term >= 0. The gradient flows
    through rho.
    """
    d = (logp - old_logp).clamp(max=20.0)
    rho = d.exp()
    return rho * d - rho + 1.0


def forward_kl(logp, old_logp):
    """Penalty KL(pi_old || pi_theta) on tokens that pi_old sampled: rho - 1 - d, each term >= 0.
    [T] -> [T]
    """
    d = (logp - old_logp).clamp(max=20.0)
    return d.exp() - 1.0 - d


def k1(logp, ref_logp):
    """log(pi/ref) at tokens sampled from pi: unbiased for KL(pi || ref), may be negative.
    [T] -> [T]

    For reporting, like k2. As a *loss* on such tokens its gradient has zero mean; on pi_old's
    tokens it would only lower their probability.
    """
    return logp - ref_logp


def k2(logp, ref_logp):
    """(log(pi/ref))^2 / 2 at tokens sampled from pi: biased, but its gradient is the reverse KL's.
    [T] -> [T]
    """
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp):
    """exp(-d) - 1 + d, d = log(pi/ref), at tokens sampled from pi:
    unbiased for KL(pi || ref), >= 0. [T] -> [T]

    On pi_old's tokens, with ref = pi_old, it estimates chi^2(old || pi) - KL(old || pi) instead:
    a usable penalty, never to be reported as "KL".
    """
    d = (logp - ref_logp).clamp(min=-20.0)
    return torch.exp(-d) - 1.0 + d


PENALTIES = {"reverse": reverse_kl, "forward": forward_kl, "k3": k3}  # on pi_old's tokens


# ---------------------------------------------------------------- stage 2: the teacher's signal


def token_signal(numerator, denominator):
    """r_t = log pi_num(y_t|s_t) - log pi_den(y_t|s_t). [T], [T] -> [T]

    Strategy 1: pi_ext over pi_old (or over the current pi_theta, detached: "evolving");
    strategy 2: the MSE teacher over the unlearned checkpoint; strategy 3: over an earlier, weaker
    policy. None drops its term (Table 7); both None is a ValueError.
    """
    if numerator is None and denominator is None:
        raise ValueError("token_signal: numerator and denominator cannot both be none")
    if denominator is None:
        return numerator.clone()
    return -denominator if numerator is None else numerator - denominator


def sign_mask(signal, reward, segment, keep="both"):
    """On responses with reward 1 keep only the positive or only the negative signal (Table 12).
    [T] -> [T]

    Responses with reward 0 are left as they are. Applied before whitening.
    """
    if keep == "both":
        return signal.clone()
    if keep not in ("positive", "negative"):
        raise ValueError(f'sign_mask: keep must be "both", "positive" or "negative", not {keep!r}')
    kept = signal.clamp(min=0.0) if keep == "positive" else signal.clamp(max=0.0)
    return torch.where(reward[segment] > 0, kept, signal)


def whiten(x, *, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8), unbiased variance, over all tokens given. [T] -> [T]

    shift_mean=False divides only, so that tokens zeroed by the sign mask stay zero.
    Needs two tokens.
    """
    if len(x) < 2:
        raise ValueError(f"whiten: {len(x)} token(s) have no variance; at least 2 are needed")
    scale = torch.rsqrt(x.var() + 1e-8)
    return (x - x.mean()) * scale if shift_mean else x * scale


# ---------------------------------------------------------------- what a run must make visible


@torch.no_grad()
def diagnostics(logp, old_logp, entropy, advantage, reward, segment, *,
                clip_low=0.2, clip_high=0.28):
    """Numbers of one whole minibatch, as a dict of floats.

    All [T] but reward, which `segment` indexes (rows of a minibatch or of the whole batch);
    entropy and advantage may be None.
    clip_*: share of tokens whose clipped gradient is zero;
    kl_*: both directions, per token on pi_old's prefixes;
    explained_variance: of the rewards R by the probabilities p, over response tokens.
    """
    logp, old_logp = logp.double(), old_logp.double()
    d, p = logp - old_logp, logp.exp()
    rho = d.clamp(max=20.0).exp()
    R = reward.double()[segment]
    quantiles = d.sort().values[[int(q * (len(d) - 1)) for q in (0.01, 0.5, 0.99)]]
    result = {
        "p_positive": p[R > 0].mean(), "p_negative": p[R == 0].mean(),
        "log_ratio_q01": quantiles[0], "log_ratio_q50": quantiles[1], "log_ratio_q99": quantiles[2],
        "ratio_min": rho.min(), "ratio_max": rho.max(),
        "kl_reverse": reverse_kl(logp, old_logp).mean(),
        "kl_forward": forward_kl(logp, old_logp).mean(),
        "explained_variance": explained_variance(p[R >= 0], R[R >= 0]),  # of decided rewards
    }
    if advantage is not None:
        result["clip_low"] = ((rho < 1.0 - clip_low) & (advantage < 0)).double().mean()
        result["clip_high"] = ((rho > 1.0 + clip_high) & (advantage > 0)).double().mean()
    if entropy is not None:
        result["entropy"] = entropy.double().mean()
    return {name: float(value) for name, value in result.items()}
