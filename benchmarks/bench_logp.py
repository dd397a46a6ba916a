"""bench_logp.py - per-token log-probabilities from hidden states: ours beside the peers.

The job: from hidden [T, H], a head [V, H] and targets [T] to log p of every target, and back to
the gradients of hidden and head for a random upstream gradient per token; with "entropy" in its
name a row also gives the entropy of every token, with an upstream gradient of its own, and
linear_kl gives the exact KL(p || q) to a second policy. bfloat16 on a GPU.

    python benchmarks/bench_logp.py                       # Qwen3-4B's head, 8192 and 32768 tokens
    python benchmarks/bench_logp.py --entropy             # peers that can give it: entropy, too
    python benchmarks/bench_logp.py --tiny                # small shapes, also on a CPU: a trial

Columns: time of the forward pass as in training and of forward and backward together; the latter
over its floor, which is four products T x H x V (forward, recomputed, two gradients; of linear_kl
six: it has two forward and two recomputed) at the rate of an 8192^3 product in the same run; memory
held at most beyond inputs and gradients; the largest errors against float64: of log p and of
entropy or KL, of d hidden over its largest value (these of the first 1024 tokens), and of d head
over its largest value (of 256 rows, half of them targets). d hidden and d head are bfloat16, which
alone rounds by up to 2e-3.

Inputs are random, with the target's logit raised so that its p is spread over 0.01 to 0.99: on
plain random logits p is nearly 0, and kernels that skip small gradients would skip everything.
A peer that is not installed, runs out of memory or fails is left out, with a line that says why.
"""

import math
from functools import partial

import measure
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels

CHUNK = 1024  # tokens that the chunked peers take at a time
CHECKED = 1024  # tokens whose results are compared with float64
ROWS = 256  # rows of the head whose gradient is
SPREAD = 2.0  # standard deviation of the logits, targets aside

# ---------------------------------------------------------------- who takes part


def ours(hidden, head, targets, entropy=False):
    return kernels.linear_logp(hidden, head, targets, entropy=entropy)


def full_logits(hidden, head, targets, entropy=False):
    x = (hidden @ head.T).float()  # [T, V]
    if not entropy:
        return -F.cross_entropy(x, targets, reduction="none"), None
    log_p = x.log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def in_chunks(score, hidden, head, targets, entropy=False):
    """A chunk of tokens at a time, its logits computed again for the backward pass."""
    pieces = [checkpoint(score, part, head, target, entropy, use_reentrant=False)
              for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)]
    logp, entropies = zip(*pieces, strict=True)
    return torch.cat(logp), torch.cat(entropies) if entropy else None


def liger(hidden, head, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    return -liger_fused_linear_cross_entropy(hidden, head, targets, reduction="none"), None


def cut_cross_entropy(filter_eps, hidden, head, targets):
    """filter_eps "auto" leaves out what is too small to count in 16 bits, None leaves out nothing.
    """
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(hidden, head, targets, reduction="none",
                                 filter_eps=filter_eps), None


def verl(hidden, head, targets, entropy=False):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    logp, entropies = linear_cross_entropy(hidden, head, targets, 1.0, "none")  # 1.0: temperature
    return logp, entropies if entropy else None


def torchs_own(hidden, head, targets):
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy
    return -linear_cross_entropy(hidden, head, targets, reduction="none",
                                 options=LinearCrossEntropyOptions()), None


def contestants(entropy):
    """(name, function, whether it gives the entropy) in the table's order."""
    compiled = torch.compile(full_logits)
    able = (("torch, full logits", full_logits),
            (f"torch, chunks of {CHUNK}, checkpoint", partial(in_chunks, full_logits)),
            (f"torch.compile, chunks of {CHUNK}, checkpoint", partial(in_chunks, compiled)),
            ("verl", verl))
    yield "linear_logp (ours)", ours, False
    for name, function in able:
        yield name, function, False
    yield "Liger-Kernel", liger, False
    yield "cut-cross-entropy, filtered", partial(cut_cross_entropy, "auto"), False
    yield "cut-cross-entropy, unfiltered", partial(cut_cross_entropy, None), False
    yield "torch, linear_cross_entropy", torchs_own, False
    yield "linear_logp, entropy (ours)", partial(ours, entropy=True), True
    for name, function in able * entropy:
        yield f"{name}, entropy", partial(function, entropy=True), True


# ---------------------------------------------------------------- inputs and what is right


def make_inputs(T, H, V):
    """hidden [T, H], head [V, H], targets [T]."""
    head = torch.randn(V, H, device=measure.DEVICE) * SPREAD / H**0.5
    hidden = torch.randn(T, H, device=measure.DEVICE)
    targets = torch.randint(V, (T,), device=measure.DEVICE)
    p = torch.empty(T, device=measure.DEVICE).uniform_(0.01, 0.99)
    wanted = math.log(V) + SPREAD**2 / 2 + p.logit()  # the logit that gives p among normal logits
    row = head[targets]  # [T, H]
    missing = wanted - (hidden * row).sum(1)
    hidden += (missing / row.square().sum(1))[:, None] * row
    return hidden.to(measure.DTYPE), head.to(measure.DTYPE), targets


@torch.no_grad()
def reference(hidden, head, targets, g, h, rows, q=None):
    """In float64, in the notation of kernels.py: (logp, s, lse of q, d hidden) of the first tokens
    and d head of `rows`, for upstream gradients g of logp and h of s = lse - E_p[y]; y = x, or
    y = x - x^q with q = (hidden, head).
    """
    hidden, head, g, h = (x.double() for x in (hidden, head, g, h))
    hidden_q, head_q = (x.double() for x in q) if q else (hidden, head)
    logp, lse, mean, lse_q, d_hidden = [], [], [], [], []
    for start in range(0, len(hidden), 256):  # every token: d head needs them all
        part = slice(start, start + 256)
        x = hidden[part] @ head.T  # [256, V]
        x_q = hidden_q[part] @ head_q.T if q else None
        y = x - x_q if q else x
        lse.append(x.logsumexp(1))
        p = (x - lse[-1][:, None]).exp()
        mean.append((p * y).sum(1))
        if start < CHECKED:
            logp.append(x.gather(1, targets[part, None])[:, 0] - lse[-1])
            lse_q.append(x_q.logsumexp(1) if q else torch.zeros_like(lse[-1]))
            dx = -p * (g[part, None] + h[part, None] * (y - mean[-1][:, None]))
            dx.scatter_add_(1, targets[part, None], g[part, None])
            d_hidden.append(dx @ head)
    lse, mean = torch.cat(lse), torch.cat(mean)
    x = hidden @ head[rows].T  # [T, R]
    y = x - hidden_q @ head_q[rows].T if q else x
    dx = -(x - lse[:, None]).exp() * (g[:, None] + h[:, None] * (y - mean[:, None]))
    dx += g[:, None] * (targets[:, None] == rows)
    cut = slice(0, CHECKED)
    return (torch.cat(logp)[cut], (lse - mean)[cut], torch.cat(lse_q)[cut],
            torch.cat(d_hidden)[cut], dx.T @ hidden)


# ---------------------------------------------------------------- one row


def error(got, want, relative=False):
    if got is None:
        return None
    difference = (got[:len(want)].double() - want).abs().max()
    return float(difference / want.abs().max() if relative else difference)


def measure_row(name, call, leaves, upstream, want, rows, products, rate, repeats):
    """Time, memory and errors of `call` -> (logp or None, entropy or KL or None)."""
    def forward():
        return [x for x in call() if x is not None]

    def both():
        outputs = forward()
        return torch.autograd.grad(outputs, leaves, upstream)

    milliseconds = measure.milliseconds(forward, repeats), measure.milliseconds(both, repeats)
    (d_hidden, d_head), extra = measure.with_extra_memory(both)
    logp, second = (x if x is None else x.detach() for x in call())
    want_logp, want_second, want_hidden, want_head = want
    T, H, V = *leaves[0].shape, len(leaves[1])
    floor = products * 2 * T * H * V / rate * 1e3
    return {"what": name, "tokens": T, "hidden": H, "vocab": V,
            "forward_ms": milliseconds[0], "both_ms": milliseconds[1], "floor_ms": floor,
            "of_floor": milliseconds[1] / floor, "extra_bytes": extra,
            "error_logp": error(logp, want_logp), "error_second": error(second, want_second),
            "error_d_hidden": error(d_hidden, want_hidden, relative=True),
            "error_d_head": error(d_head[rows], want_head, relative=True)}


def cells(r):
    extra = r["extra_bytes"] if r["extra_bytes"] is None else r["extra_bytes"] / 1e9
    return {"tokens": str(r["tokens"]), "": r["what"], "fwd ms": f"{r['forward_ms']:.2f}",
            "fwd+bwd ms": f"{r['both_ms']:.2f}", "of floor": f"{r['of_floor']:.2f}",
            "extra GB": measure.number(extra, ".2f"),
            **{f"{column} err": measure.number(r[key], ".0e") for column, key in (
                ("logp", "error_logp"), ("entropy, KL", "error_second"),
                ("d hidden", "error_d_hidden"), ("d head", "error_d_head"))}}


def bench(T, H, V, entropy, limits, repeats):
    """The records of one shape."""
    rate = limits["product_tflop_s"] * 1e12
    hidden, head, targets = make_inputs(T, H, V)
    noise = torch.randn_like(hidden), torch.randn_like(head) * SPREAD / H**0.5
    q = hidden + 0.1 * noise[0], head + 0.1 * noise[1]  # another policy, not far
    g, h = torch.randn(2, T, device=measure.DEVICE)
    rows = torch.cat((targets[:ROWS // 2], torch.randint(V, (ROWS // 2,), device=measure.DEVICE)))

    logp, _, _, *grads = reference(hidden, head, targets, g, torch.zeros_like(h), rows)
    want = {False: (logp, None, *grads)}
    logp, s, _, *grads = reference(hidden, head, targets, g, h, rows)
    want[True] = logp, s, *grads
    _, s, lse_q, *grads = reference(hidden, head, targets, torch.zeros_like(g), -g, rows, q)
    want_kl = None, lse_q - s, *grads
    p = logp.exp().quantile(logp.new_tensor([0.05, 0.5, 0.95])).tolist()
    print("\n{} tokens: p of the targets {:.2f}, {:.2f}, {:.2f} (quantiles 0.05, 0.5, 0.95), KL "
          "{:.3f} on average".format(T, *p, want_kl[1].mean()))

    leaves = hidden.requires_grad_(), head.requires_grad_()
    jobs = [(name, partial(function, *leaves, targets), (g, h) if both else (g,), want[both], 4)
            for name, function, both in contestants(entropy)]
    jobs.append(("linear_kl (ours)", lambda: (None, kernels.linear_kl(*leaves, *q)), (g,), want_kl,
                 6))
    records = []
    for name, call, upstream, right, products in jobs:
        measure.free()
        record = measure.attempt(name, partial(measure_row, name, call, leaves, upstream, right,
                                               rows, products, rate, repeats))
        if record:
            records.append(record)
            print(" | ".join(cells(record).values()), flush=True)
    return records


def main():
    parser = measure.parser(__doc__, repeats=10)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--entropy", action="store_true", help="entropy rows of the peers, too")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.hidden, args.vocab, args.repeats = [96, 1300], 64, 1000, 2
    measure.begin(args)
    limits = measure.ceilings(args.tiny)
    records = [record for T in args.tokens for record in bench(
        T, args.hidden, args.vocab, args.entropy, limits, args.repeats)]
    measure.finish([cells(r) for r in records], [{"bench": "logp", **r} for r in records], limits,
                   args.json)


if __name__ == "__main__":
    main()
