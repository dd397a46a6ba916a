"""kernels.py - from hidden states to log-probabilities without ever holding the [T, V] logits.

An RL loss needs two numbers of every token: the log-probability of the token that was taken and,
sometimes, the entropy of the distribution it came from. With logits
x = hidden @ head.T / temperature

    logp_t    = x_t[target_t] - lse_t,         lse_t = log sum_v exp(x_tv)
    entropy_t = lse_t - sum_v p_tv x_tv,       p = softmax(x)

and, for upstream gradients g (of logp) and h (of entropy),

    d/dx_tv   = g_t (1[v = target_t] - p_tv) - h_t p_tv (x_tv - sum_u p_tu x_tu).

The vocabulary is walked in slices. The forward pass folds each slice of logits into a running
(max, sum, sum p x, target logit) per token, as online softmax does; the backward pass recomputes
the slice, turns it into d/dx in place, and multiplies once for d hidden (accumulated in float32)
and once for that slice's rows of d head. Matrix products are torch's; what is done to a slice
between them is one Triton pass on a GPU and the same arithmetic in plain torch elsewhere. The
plain form is the oracle.

`linear_kl` is the exact KL(p || q) of two policies over the whole vocabulary, by chunks of tokens.

Everything is float32 whatever the inputs are. (Online softmax: Milakov & Gimelshein, 1805.02867.)
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain torch form serves
    triton = None

SLICE_ELEMENTS = 1 << 28  # float32 logits held at once: 1 GiB


def linear_logp(hidden, head, targets, *, temperature=1.0, entropy=True):
    """Log-probabilities of `targets` (and entropies) under softmax(hidden @ head.T / temperature).

    hidden [T, H], head [V, H] (one floating dtype), targets [T] integer in [0, V).
    Returns (logp [T], entropy [T] or None), float32, differentiable with respect to hidden and head
    through both. The products accumulate in float32. Raises ValueError on shapes that do not fit
    and (on a CPU) on targets outside the vocabulary.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError("hidden [T, H] and head [V, H] do not fit: "
                         f"{tuple(hidden.shape)} and {tuple(head.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], one a row of hidden, "
                         f"not {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError("temperature must be above 0 (greedy has no log-probabilities), "
                         f"not {temperature}")
    if len(targets) and not targets.is_cuda:  # on a GPU the look would cost a synchronisation
        if int(targets.min()) < 0 or int(targets.max()) >= len(head):
            raise ValueError(f"targets must lie in [0, {len(head)}), found {int(targets.min())} "
                             f"to {int(targets.max())}")
    logp, H = _LinearLogp.apply(hidden, head, targets.long(), 1.0 / temperature, entropy)
    return logp, (H if entropy else None)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, scale, entropy):
        T = len(hidden)
        top = hidden.new_full((T,), float("-inf"), dtype=torch.float32)  # running max of x
        # sum e^(x-top), sum e^(x-top) x, x[target]
        total, moment, picked = (torch.zeros_like(top) for _ in range(3))
        fold = _fold_triton if _use_triton(hidden) else _fold
        for rows in _slices(T, len(head)):
            x = _product(hidden, head[rows].T)  # [T, S]
            fold(x, scale, targets - rows.start, top, total, moment, picked)
        lse = top + total.log()
        mean = moment / total  # E_p[x]
        ctx.save_for_backward(hidden, head, targets, lse, mean)
        ctx.scale, ctx.entropy = scale, entropy
        return picked - lse, lse - mean

    @staticmethod
    def backward(ctx, g, h):
        hidden, head, targets, lse, mean = ctx.saved_tensors
        h = h if ctx.entropy else torch.zeros_like(g)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = (torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
                    if need_hidden else None)
        d_head = torch.empty_like(head) if need_head else None
        grad = _grad_triton if _use_triton(hidden) else _grad
        for rows in _slices(len(hidden), len(head)):
            x = _product(hidden, head[rows].T)  # [T, S]
            dx = grad(x, ctx.scale, targets - rows.start, lse, mean, g, h).to(hidden.dtype)
            if need_hidden:
                d_hidden += _product(dx, head[rows])
            if need_head:
                d_head[rows] = _product(dx.T, hidden).to(head.dtype)
        return (d_hidden.to(hidden.dtype) if need_hidden else None), d_head, None, None, None


def logits(hidden, head):
    """hidden [S, H] @ head.T [H, V] -> [S, V] in float32,
    for the few rows that a sampler decodes at a time.
    """
    return _product(hidden, head.T)


def _slices(T, V):
    step = max(1, min(V, SLICE_ELEMENTS // max(T, 1)))
    return [slice(lo, min(lo + step, V)) for lo in range(0, V, step)]


def _product(a, b):
    """a @ b in float32, from float32 or from 16-bit factors with float32 accumulation."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


# ---- what is done to one slice of logits x [T, S]: the plain form (the oracle) ----


def _fold(x, scale, target, top, total, moment, picked):
    """Fold a slice into the running sums, in place.

    `target` counts from the slice's first column.
    """
    x = x * scale
    new_top = torch.maximum(top, x.amax(1))
    shift = torch.where(new_top.isneginf(), 0.0, new_top)  # a slice (or row) of -inf gives no nan
    old = torch.exp(top - shift)
    e = torch.exp(x - shift[:, None])  # [T, S]
    total.mul_(old).add_(e.sum(1))
    moment.mul_(old).add_(torch.where(e > 0, e * x, 0.0).sum(1))  # 0 * -inf counts as 0
    here = (target >= 0) & (target < x.shape[1])
    picked.add_(torch.where(here, x.gather(1, target.clamp(0, x.shape[1] - 1)[:, None])[:, 0], 0.0))
    top.copy_(new_top)


def _grad(x, scale, target, lse, mean, g, h):
    """d loss / d (hidden @ head.T) of a slice, [T, S]."""
    x = x * scale
    p = torch.exp(x - lse[:, None])
    dx = torch.where(p > 0, -p * (g[:, None] + h[:, None] * (x - mean[:, None])), 0.0)
    here = (target >= 0) & (target < x.shape[1])
    dx.scatter_add_(1, target.clamp(0, x.shape[1] - 1)[:, None], torch.where(here, g, 0.0)[:, None])
    return dx * scale


# ---- the same in Triton: one program a row, one pass over the slice ----


def _use_triton(tensor):
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _fold_kernel(x_ptr, target_ptr, top_ptr, total_ptr, moment_ptr, picked_ptr, S, scale,
                     BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # T * S may pass 2^31
        target = tl.load(target_ptr + row)
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        moment = tl.load(moment_ptr + row)
        picked = tl.load(picked_ptr + row)
        for start in range(0, S, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * S + column, mask=column < S, other=float("-inf")) * scale
            new_top = tl.maximum(top, tl.max(x, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            old = tl.exp(top - shift)
            e = tl.exp(x - shift)
            total = total * old + tl.sum(e, 0)
            moment = moment * old + tl.sum(e * tl.where(e > 0, x, 0.0), 0)  # 0 * -inf counts as 0
            picked += tl.sum(tl.where((column == target) & (column < S), x, 0.0), 0)
            top = new_top
        tl.store(top_ptr + row, top)
        tl.store(total_ptr + row, total)
        tl.store(moment_ptr + row, moment)
        tl.store(picked_ptr + row, picked)

    @triton.jit
    def _grad_kernel(x_ptr, target_ptr, lse_ptr, mean_ptr, g_ptr, h_ptr, S, scale,
                     BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(target_ptr + row)
        lse = tl.load(lse_ptr + row)
        mean = tl.load(mean_ptr + row)
        g = tl.load(g_ptr + row)
        h = tl.load(h_ptr + row)
        for start in range(0, S, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * S + column, mask=column < S, other=float("-inf")) * scale
            p = tl.exp(x - lse)
            dx = tl.where(column == target, g, 0.0) - p * (g + h * tl.where(p > 0, x - mean, 0.0))
            tl.store(x_ptr + row * S + column, dx * scale, mask=column < S)


def _fold_triton(x, scale, target, top, total, moment, picked):
    if x.numel():
        block = min(4096, triton.next_power_of_2(x.shape[1]))
        _fold_kernel[(len(x),)](x, target, top, total, moment, picked, x.shape[1], scale,
                                BLOCK=block)


def _grad_triton(x, scale, target, lse, mean, g, h):
    if x.numel():
        block = min(4096, triton.next_power_of_2(x.shape[1]))
        g, h = g.contiguous(), h.contiguous()  # an upstream sum() hands over an expanded scalar
        _grad_kernel[(len(x),)](x, target, lse, mean, g, h, x.shape[1], scale, BLOCK=block)
    return x


# ---- exact divergence of two policies ----


def linear_kl(hidden_p, head_p, hidden_q, head_q, *, temperature=1.0):
    """Exact KL(p || q) of every token over the whole vocabulary, in nats: [T] float32.

    hidden_p [T, H], head_p [V, H] and hidden_q [T, H'], head_q [V, H'] are the two policies' last
    hidden states and output projections. The logits are
    recomputed chunk by chunk. Differentiable in all four where the products are float32 (16-bit on
    a GPU: inference only, which is what evaluate.py needs).
    """
    if len(hidden_p) != len(hidden_q) or len(head_p) != len(head_q):
        raise ValueError("the two policies differ in tokens or vocabulary: "
                         f"hidden {tuple(hidden_p.shape)} and {tuple(hidden_q.shape)}, "
                         f"head {tuple(head_p.shape)} and {tuple(head_q.shape)}")
    step = max(1, SLICE_ELEMENTS // len(head_p))
    chunks = [checkpoint(_kl, hidden_p[i:i + step], head_p, hidden_q[i:i + step], head_q,
                         temperature, use_reentrant=False)
              for i in range(0, max(len(hidden_p), 1), step)]
    return torch.cat(chunks)


def _kl(hidden_p, head_p, hidden_q, head_q, temperature):
    log_p = F.log_softmax(_product(hidden_p, head_p.T) / temperature, dim=1)  # [chunk, V]
    log_q = F.log_softmax(_product(hidden_q, head_q.T) / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
