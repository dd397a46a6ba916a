"""kernels.py - from hidden states to log-probabilities without ever holding the [T, V] logits.

An RL loss needs two numbers of every token: the log-probability of the token that was taken and,
sometimes, the entropy of the distribution it came from. With logits
x = hidden @ head.T / temperature

    logp_t    = x_t[target_t] - lse_t,         lse_t = log sum_v exp(x_tv)
    entropy_t = lse_t - sum_v p_tv x_tv,       p = softmax(x)

and the exact divergence of two policies needs the same with y = x - x^q in the place of x:

    KL_t(p || q) = lse^q_t - (lse_t - sum_v p_tv y_tv).

So one quantity besides logp, s_t = lse_t - E_p[y_t], serves both (y = x: the entropy). For upstream
gradients g (of logp) and h (of s),

    d/dx_tv   = g_t (1[v = target_t] - p_tv) - h_t p_tv (y_tv - E_p[y_t]).

The vocabulary is walked in slices. The forward pass folds each slice of logits into a running
(max, sum, sum p y, target logit) per token, as online softmax does. Float32 leaves a logit of 100
five digits behind the point, too few for lse and E_p[y], so both are counted from the likeliest
token: lse = top + rest, and y from its value there, the origin. The backward pass recomputes
the slice, turns it into d/dx, and multiplies once for d hidden (accumulated in float32) and once
for that slice's rows of d head, each of which is one product over all T tokens. Matrix products are
torch's; what is done to a slice between them is one Triton pass on a GPU and the same arithmetic in
plain torch elsewhere. The plain form is the oracle.

Log-probabilities, sums and logits are float32 whatever the inputs are; of 16-bit inputs, d/dx is
rounded to 16 bits before its two products. (Online softmax: Milakov & Gimelshein, 1805.02867.)
"""

import math
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the plain torch form serves
    triton = None

SLICE_ELEMENTS = 1 << 28  # float32 logits held at once: 1 GiB

# a long 16-bit product may be cut in pieces: their sum, too, is float32
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def linear_logp(hidden, head, targets, *, temperature=1.0, entropy=True):
    """Log-probabilities of `targets` (and entropies) under softmax(hidden @ head.T / temperature).

    hidden [T, H], head [V, H] (one floating dtype), targets [T] integer in [0, V).
    Returns (logp [T], entropy [T] or None), float32, differentiable with respect to hidden and head
    through both. The products accumulate in float32. Raises ValueError on shapes that do not fit
    and (on a CPU) on targets outside the vocabulary.
    """
    _check(hidden, head, temperature)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], one a row of hidden, "
                         f"not {list(targets.shape)}")
    if len(targets) and not targets.is_cuda:  # on a GPU the look would cost a synchronisation
        if int(targets.min()) < 0 or int(targets.max()) >= len(head):
            raise ValueError(f"targets must lie in [0, {len(head)}), found {int(targets.min())} "
                             f"to {int(targets.max())}")
    logp, H, _ = _Linear.apply(hidden, head, targets.long(), 1.0 / temperature, entropy, None)
    return logp, (H if entropy else None)


def linear_kl(hidden_p, head_p, hidden_q, head_q, *, temperature=1.0):
    """Exact KL(p || q) of every token over the whole vocabulary, in nats: [T] float32.

    hidden_p [T, H], head_p [V, H] and hidden_q [T, H'], head_q [V, H'] are the two policies' last
    hidden states and output projections. Differentiable with respect to p's; q is a constant.
    Raises ValueError on shapes that do not fit and where a gradient of q would be lost.
    """
    _check(hidden_p, head_p, temperature)
    _check(hidden_q, head_q, temperature)
    if len(hidden_p) != len(hidden_q) or len(head_p) != len(head_q):
        raise ValueError("the two policies differ in tokens or vocabulary: "
                         f"hidden {tuple(hidden_p.shape)} and {tuple(hidden_q.shape)}, "
                         f"head {tuple(head_p.shape)} and {tuple(head_q.shape)}")
    if torch.is_grad_enabled() and (hidden_q.requires_grad or head_q.requires_grad):
        raise ValueError("linear_kl has no gradient with respect to q; detach hidden_q and head_q")
    nothing = torch.zeros(len(hidden_p), dtype=torch.long, device=hidden_p.device)
    _, spread, lse_q = _Linear.apply(
        hidden_p, head_p, nothing, 1.0 / temperature, True, (hidden_q, head_q))
    return lse_q - spread


def logits(hidden, head):
    """hidden [S, H] @ head.T [H, V] -> [S, V] in float32,
    for the few rows that a sampler decodes at a time.
    """
    return _product(hidden, head.T)


def _check(hidden, head, temperature):
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError("hidden [T, H] and head [V, H] do not fit: "
                         f"{tuple(hidden.shape)} and {tuple(head.shape)}")
    if not temperature > 0:
        raise ValueError("temperature must be above 0 (greedy has no log-probabilities), "
                         f"not {temperature}")


class _Linear(torch.autograd.Function):
    """(logp, s, lse of q); s is there if `moment`, y = x - x^q if there is q = (hidden, head)."""

    @staticmethod
    def forward(ctx, hidden, head, targets, scale, moment, q):
        sums, sums_q = _Sums(hidden), _Sums(hidden)
        fold = _fold_triton if _use_triton(hidden) else _fold
        for rows, x, y in _logits(hidden, head, q):
            fold(x, y, scale, targets - rows.start, moment, sums)
            if q is not None:
                fold(y, None, scale, targets - rows.start, False, sums_q)
        rest, mean = sums.total.log(), sums.moment / sums.total  # mean: E_p[y] - origin
        ctx.save_for_backward(hidden, head, targets, sums.top, rest, sums.origin, mean, *(q or ()))
        ctx.scale, ctx.moment = scale, moment
        lse_q = sums_q.top + sums_q.total.log()
        ctx.mark_non_differentiable(lse_q)
        return sums.picked - sums.top - rest, sums.top - sums.origin + rest - mean, lse_q

    @staticmethod
    def backward(ctx, g, h, _):
        hidden, head, targets, top, rest, origin, mean, *q = ctx.saved_tensors
        T, q, (need_hidden, need_head) = len(hidden), q or None, ctx.needs_input_grad[:2]
        d_hidden = (torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
                    if need_hidden else None)
        d_head = torch.empty_like(head, memory_format=torch.contiguous_format)
        grad = _grad_triton if _use_triton(hidden) else _grad
        room = hidden.new_empty(T * _width(T, len(head), q))
        for rows, x, y in _logits(hidden, head, q):
            dx = room[:x.numel()].view(x.shape)
            grad(x, y, ctx.scale, targets - rows.start, top, rest, origin, mean, g, h, ctx.moment,
                 dx)
            if need_hidden:
                _accumulate(d_hidden, dx, head[rows])
            if need_head and hidden.is_cuda:  # summed in float32, rounded once
                torch.mm(dx.T, hidden, out=d_head[rows])
            elif need_head:
                d_head[rows] = _product(dx.T, hidden).to(head.dtype)
        return ((d_hidden.to(hidden.dtype) if need_hidden else None),
                (d_head if need_head else None), None, None, None, None)


class _Sums:
    """What is known of each token after some slices, [T] float32."""

    def __init__(self, hidden):
        self.top = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)  # max x
        # sum e^(x - top), sum e^(x - top) (y - origin), y where x is top, x[target]
        self.total, self.moment, self.origin, self.picked = (
            torch.zeros_like(self.top) for _ in range(4))


def _width(T, V, q):
    """Columns of a slice: of all slices but the last a multiple of 128, for aligned rows."""
    width = max(1, min(V, SLICE_ELEMENTS // (2 if q else 1) // max(T, 1)))
    return width if width in (1, V) or width < 128 else width // 128 * 128


def _logits(hidden, head, q):
    """(rows, x [T, S], y or None) slice by slice, float32 before temperature, in memory that the
    next slice overwrites.
    """
    T, V = len(hidden), len(head)
    width = _width(T, V, q)
    room, room_q = (hidden.new_empty(T * width if wanted else 0, dtype=torch.float32)
                    for wanted in (True, q))
    for start in range(0, V, width):
        rows = slice(start, min(start + width, V))
        shape = T, rows.stop - rows.start
        x = _logits_of(hidden, head[rows], room[:math.prod(shape)].view(shape))
        yield rows, x, q and _logits_of(q[0], q[1][rows], room_q[:x.numel()].view(shape))


def _logits_of(hidden, head, out):
    """hidden @ head.T in float32; of float32 factors a product in float64, rounded once, since at
    logits of 100 the precision of every gradient rests on it.
    """
    if hidden.dtype != torch.float32 and hidden.is_cuda:
        return _product(hidden, head.T, out=out)
    wide, width = hidden.double(), max(1, (1 << 24) // max(len(hidden), 1))
    for x, rows in zip(out.split(width, 1), head.split(width), strict=True):
        x.copy_(wide @ rows.double().T)
    return out


def _product(a, b, out=None):
    """a @ b in float32, from float32 or from 16-bit factors with float32 accumulation."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _accumulate(total, a, b):
    """total += a @ b, float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    elif _adds_within_the_product():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


@cache
def _adds_within_the_product():
    """Whether this torch adds a 16-bit product to a float32 sum without a pass of its own."""
    a = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        return bool((torch.addmm(a.float(), a, a, out_dtype=torch.float32) == 17).all())
    except (RuntimeError, TypeError):
        return False


# ---- what is done to one slice of logits x [T, S]: the plain form (the oracle) ----


def _fold(x, y, scale, target, moment, sums):
    """Fold a slice into the running sums, in place; y is the logits of q, if any.

    `target` counts from the slice's first column.
    """
    x = x * scale
    here, column = x.max(1, keepdim=True)
    top = torch.maximum(sums.top, here[:, 0])
    shift = torch.where(top.isneginf(), 0.0, top)  # a slice (or row) of -inf gives no nan
    old = torch.exp(sums.top - shift)
    e = torch.exp(x - shift[:, None])  # [T, S]
    sums.total.mul_(old)
    if moment:  # 0 * inf counts as 0
        y = x if y is None else x - y * scale
        there = y.gather(1, column)[:, 0]
        origin = torch.where((top > sums.top) & there.isfinite(), there, sums.origin)
        moved = sums.total * (sums.origin - origin)  # what was counted from the old origin
        sums.moment.copy_(torch.where(old > 0, sums.moment * old + moved, 0.0))
        sums.moment.add_(torch.where(e > 0, e * (y - origin[:, None]), 0.0).sum(1))
        sums.origin.copy_(origin)
    sums.total.add_(e.sum(1))
    here = (target >= 0) & (target < x.shape[1])
    column = target.clamp(0, x.shape[1] - 1)[:, None]
    sums.picked.add_(torch.where(here, x.gather(1, column)[:, 0], 0.0))
    sums.top.copy_(top)


def _grad(x, y, scale, target, top, rest, origin, mean, g, h, moment, dx):
    """d loss / d (hidden @ head.T) of a slice, [T, S], into dx."""
    x = x * scale
    y = x if y is None else x - y * scale
    p = torch.exp(x - top[:, None] - rest[:, None])
    slope = g[:, None]
    if moment:
        slope = slope + h[:, None] * (y - origin[:, None] - mean[:, None])
    grad = torch.where(p > 0, -p * slope, 0.0)
    here = (target >= 0) & (target < x.shape[1])
    grad.scatter_add_(1, target.clamp(0, x.shape[1] - 1)[:, None],
                      torch.where(here, g, 0.0)[:, None])
    dx.copy_(grad * scale)


# ---- the same in Triton: a program a row to fold it, a program a piece of a row for gradients ----


def _use_triton(tensor):
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _fold_kernel(x_ptr, y_ptr, target_ptr, top_ptr, total_ptr, moment_ptr, origin_ptr,
                     picked_ptr, S, scale, MOMENT: tl.constexpr, BLOCK: tl.constexpr):
        """Every lane folds its own columns; only at the end are lanes and earlier slices joined.

        MOMENT 0: none, 1: of x, 2: of x - y.
        """
        row = tl.program_id(0).to(tl.int64)  # T * S may pass 2^31
        x_ptr += row * S
        y_ptr += row * S
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        moment = tl.zeros((BLOCK,), tl.float32)
        origin = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, S, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, mask=column < S, other=float("-inf")) * scale
            new_top = tl.maximum(top, x)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            old = tl.exp(top - shift)
            e = tl.exp(x - shift)
            total *= old
            if MOMENT > 0:  # 0 * inf counts as 0
                y = x
                if MOMENT == 2:
                    y -= tl.load(y_ptr + column, mask=column < S, other=0.0) * scale
                new_origin = tl.where((x > top) & (tl.abs(y) < float("inf")), y, origin)
                moment = tl.where(old > 0, moment * old + total * (origin - new_origin), 0.0)
                moment += tl.where(e > 0, e * (y - new_origin), 0.0)
                origin = new_origin
            total += e
            top = new_top
        before = tl.load(top_ptr + row)
        top_here = tl.max(top, 0)
        new_top = tl.maximum(before, top_here)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        old = tl.exp(before - shift)
        lane = tl.exp(top - shift)
        total *= lane
        total_before = tl.load(total_ptr + row) * old
        tl.store(total_ptr + row, total_before + tl.sum(total, 0))
        if MOMENT > 0:
            origin_before = tl.load(origin_ptr + row)
            origin_here = tl.max(tl.where(top == top_here, origin, float("-inf")), 0)
            new_origin = tl.where(top_here > before, origin_here, origin_before)
            moment = tl.where(lane > 0, moment * lane + total * (origin - new_origin), 0.0)
            moment_before = tl.load(moment_ptr + row) * old
            moment_before += total_before * (origin_before - new_origin)
            moment_before = tl.where(old > 0, moment_before, 0.0)
            tl.store(moment_ptr + row, moment_before + tl.sum(moment, 0))
            tl.store(origin_ptr + row, new_origin)
        tl.store(top_ptr + row, new_top)
        target = tl.load(target_ptr + row)
        here = (target >= 0) & (target < S)
        picked = tl.load(x_ptr + target, mask=here, other=0.0) * scale
        tl.store(picked_ptr + row, tl.load(picked_ptr + row) + picked)

    @triton.jit
    def _grad_kernel(x_ptr, y_ptr, dx_ptr, target_ptr, top_ptr, rest_ptr, origin_ptr, mean_ptr,
                     g_ptr, h_ptr, S, scale, MOMENT: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = row * S + column
        g = tl.load(g_ptr + row)
        slope = g
        x = tl.load(x_ptr + place, mask=column < S, other=float("-inf")) * scale
        p = tl.exp(x - tl.load(top_ptr + row) - tl.load(rest_ptr + row))
        if MOMENT > 0:
            y = x
            if MOMENT == 2:
                y -= tl.load(y_ptr + place, mask=column < S, other=0.0) * scale
            y = tl.where(p > 0, y - tl.load(origin_ptr + row) - tl.load(mean_ptr + row), 0.0)
            slope = g + tl.load(h_ptr + row) * y
        dx = tl.where(column == tl.load(target_ptr + row), g, 0.0) - p * slope
        tl.store(dx_ptr + place, (dx * scale).to(dx_ptr.dtype.element_ty), mask=column < S)


def _fold_triton(x, y, scale, target, moment, sums):
    if x.numel():
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _fold_kernel[(len(x),)](
            x, x if y is None else y, target, sums.top, sums.total, sums.moment, sums.origin,
            sums.picked, x.shape[1], scale, MOMENT=moment * (1 if y is None else 2), BLOCK=block)


def _grad_triton(x, y, scale, target, top, rest, origin, mean, g, h, moment, dx):
    if x.numel():
        block = min(2048, triton.next_power_of_2(x.shape[1]))
        g, h = g.contiguous(), h.contiguous()  # an upstream sum() hands over an expanded scalar
        _grad_kernel[(len(x), triton.cdiv(x.shape[1], block))](
            x, x if y is None else y, dx, target, top, rest, origin, mean, g, h, x.shape[1], scale,
            MOMENT=moment * (1 if y is None else 2), BLOCK=block)
