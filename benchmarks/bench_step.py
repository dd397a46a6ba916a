"""bench_step.py - one training step of stage 1 on a model of Qwen3-4B's shape, random weights.

The project's own path: float32 weights sharded by FSDP2 and computed in bfloat16, log-probs and
entropies of every response token by model.logp, SAPO as the loss, gradient clipping and AdamW. A
micro-batch of T tokens is one sequence (128 of them the prompt) or, with --lengths mix, eight of
unequal lengths, packed (128 each are prompts).

    python benchmarks/bench_step.py                          # every mode, 8192 and 32768 tokens
    python benchmarks/bench_step.py --recompute layer --compile on --lengths mix
    python benchmarks/bench_step.py --tiny                   # small shapes, a CPU too: a trial

Rows are what a block keeps for its backward pass (layer: its input only; attention: also what goes
into attention and comes out; none: everything, nothing is computed again), each without and with
torch.compile, and last transformers' Qwen3ForCausalLM: bfloat16 weights, sdpa attention, gradient
checkpointing, the sequences of a mix one after the other, and a cross-entropy averaged over tokens
(Liger-Kernel's fused one where it is installed, which needs a product less than per-token log-probs
with a gradient from outside; else in chunks).

Columns: forward and backward in ms, and tokens of the micro-batch a second from it; MFU, its
arithmetic (six per weight of a matrix product and token, the head for scored tokens only, and
causal attention; nothing computed again counts) over the time, against --peak TFLOP/s and against
an 8192^3 product in the same run; clipping and AdamW in ms; and the most memory allocated, beside
memory.py's bound (which adds a reserve that the allocator does not see). The peer's memory holds no
optimiser state, and weights and gradients of 16 bits. A first pass of another length is not timed,
so that compiled code is measured as training meets it: for lengths that change.
"""

from functools import partial

import measure
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import losses
import memory
import model as models
import runtime

QWEN3_4B = models.Config(
    vocab=151936, hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728,
    eps=1e-6, tied=True, qk_norm=True, rope_theta=1e6, linear=(False,) * 36)
TINY = models.Config(
    vocab=500, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128,
    eps=1e-6, tied=True, qk_norm=True, rope_theta=1e6, linear=(False,) * 2)
SHAPES = {"qwen3_4b": QWEN3_4B, "tiny": TINY}
RECOMPUTE = {  # what a row's name means in the words of the [train] section
    "layer": {"recompute": True, "keep_attention": False},
    "attention": {"recompute": True, "keep_attention": True},
    "none": {"recompute": False, "keep_attention": False}}
PROMPT, SEQUENCES, CHUNK = 128, 8, 1024


def lengths(tokens, kind):
    """Of the sequences of a micro-batch: one, or several in the proportion 8 : 7 : ... : 1."""
    if kind == "whole":
        return [tokens]
    parts = [tokens * n // (SEQUENCES * (SEQUENCES + 1) // 2) for n in range(SEQUENCES, 0, -1)]
    return [parts[0] + tokens - sum(parts), *parts[1:]]


def micro_batch(sizes, vocab, prompt, device):
    """tokens [T], cu_seqlens [B+1] (which stays on the CPU), and of the scored tokens their places
    and sequences [N] and advantages of either sign.
    """
    T, bounds = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    segment = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    scored = (torch.arange(T) - bounds[segment] >= prompt).nonzero()[:, 0]
    tokens, advantage = torch.randint(vocab, (T,)), torch.randn(len(sizes))[segment[scored]]
    return tokens.to(device), bounds, *(x.to(device) for x in (scored, segment[scored], advantage))


def arithmetic(config, sizes, prompt):
    """Multiplications and additions of a forward and backward pass, nothing counted twice."""
    with torch.device("meta"):
        blocks = models.Transformer(config).model.layers
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    scored = sum(max(size - prompt, 0) for size in sizes)
    products = 6 * (weights * sum(sizes) + config.vocab * config.hidden * scored)
    pairs = sum(size**2 / 2 for size in sizes)  # of a query and a key that it sees
    return products + 3 * config.layers * 2 * 2 * config.heads * config.head_dim * pairs


# ---------------------------------------------------------------- our step


def build(config, recompute, compiled, ranks):
    """A random policy that learns, and its optimiser: what runtime.policy does with a checkpoint.
    """
    with ranks.device:
        model = models.Transformer(config)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    runtime.shard(model, ranks)
    for block in model.model.layers:
        block.recompute, block.keep_attention = RECOMPUTE[recompute].values()
        if compiled:
            block.fuse()
    return model, runtime.adamw(model, 1e-6, (0.9, 0.95), 0.0)


def backward(model, batch, ranks):
    """The inner part of stage1.py's loop."""
    tokens, bounds, scored, segment, advantage = batch
    logp, _ = model.logp(tokens, bounds, scored, entropy=True)
    old_logp = logp.detach() - 0.1 * advantage  # moved a little since the batch was sampled
    loss = losses.aggregate(losses.sapo(logp, old_logp, advantage), segment, "token",
                            tokens=len(logp))
    (loss * ranks.world).backward()


def update(model, optimizer):
    runtime.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def time_ours(model, optimizer, sizes, args, ranks):
    """(forward and backward ms, update ms, most bytes allocated)."""
    def step(sizes):
        batch = micro_batch(sizes, model.config.vocab, args.prompt, ranks.device)
        before = measure.mark()
        backward(model, batch, ranks)
        between = measure.mark()
        update(model, optimizer)
        return before, between, measure.mark()

    for warmup in ([max(size * 7 // 8, 2) for size in sizes], sizes, sizes):
        step(warmup)
    if measure.CUDA:
        torch.cuda.reset_peak_memory_stats()
    marks = [step(sizes) for _ in range(args.repeats)]
    return (measure.median([(a, b) for a, b, _ in marks]),
            measure.median([(b, c) for _, b, c in marks]), runtime.memory_gib(ranks) * 2**30)


def ours(config, recompute, compiled, args, ranks):
    """{tokens: what time_ours measures}, up to the first size that does not fit."""
    name = f"{recompute}, {'compiled' if compiled else 'not compiled'}"
    pair = measure.attempt(name, partial(build, config, recompute, compiled, ranks))
    measured = {}
    for tokens in sorted(args.tokens) if pair else ():
        result = measure.attempt(f"{name}, {tokens} tokens", partial(
            time_ours, *pair, lengths(tokens, args.lengths), args, ranks))
        if result is None:
            break  # what a failed pass left behind is not worth measuring
        measured[tokens] = result
    return measured


# ---------------------------------------------------------------- the peer's step


def build_peer(config):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    c = config
    theirs = Qwen3Config(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        intermediate_size=c.intermediate, rms_norm_eps=c.eps, tie_word_embeddings=c.tied,
        max_position_embeddings=1 << 20, use_cache=False, attn_implementation="sdpa")
    with measure.DEVICE:
        model = Qwen3ForCausalLM(theirs)
    model = model.to(measure.DEVICE, measure.DTYPE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def cross_entropy(hidden, head, targets):
    return F.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")


def chunked(hidden, head, targets):
    return sum(checkpoint(cross_entropy, part, head, target, use_reentrant=False)
               for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True))


def peer_loss():
    """(its name, hidden, head, targets -> their summed cross-entropy)."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return "chunked CE", chunked
    return "Liger CE", partial(liger_fused_linear_cross_entropy, reduction="sum")


def time_peer(model, loss, sizes, args, ranks):
    tokens, _, scored, *_ = micro_batch(sizes, model.config.vocab_size, args.prompt, ranks.device)

    def step():
        model.zero_grad(set_to_none=True)
        before = measure.mark()
        for sequence in tokens.split(sizes):
            if len(sequence) > args.prompt:
                hidden = model.model(input_ids=sequence[None]).last_hidden_state[0]
                total = loss(hidden[args.prompt - 1:-1], model.lm_head.weight,
                             sequence[args.prompt:])
                (total / len(scored)).backward()
        return before, measure.mark()

    for _ in range(2):
        step()
    if measure.CUDA:
        torch.cuda.reset_peak_memory_stats()
    return measure.median([step() for _ in range(args.repeats)]), None, (
        runtime.memory_gib(ranks) * 2**30)


def peer(config, args, ranks):
    """(its name, {tokens: what time_peer measures})."""
    loss_name, loss = peer_loss()
    name = f"transformers, {loss_name}"
    model, measured = measure.attempt(name, partial(build_peer, config)), {}
    for tokens in sorted(args.tokens) if model else ():
        result = measure.attempt(f"{name}, {tokens} tokens", partial(
            time_peer, model, loss, lengths(tokens, args.lengths), args, ranks))
        measured |= {tokens: result} if result else {}
    return name, measured


# ---------------------------------------------------------------- the table


def record(config, measured, what, compiled, args, limits, ranks):
    """A record of each size measured."""
    for tokens, (both, updated, peak) in measured.items():
        sizes = lengths(tokens, args.lengths)
        rate = arithmetic(config, sizes, args.prompt) / both / 1e9  # TFLOP/s
        bound = memory.training(config, tokens, ranks.world, device=ranks.device.type,
                                **RECOMPUTE[what])["peak"] if what in RECOMPUTE else None
        yield {"bench": "step", "what": what, "compiled": compiled, "tokens": tokens,
               "sequences": len(sizes), "shape": args.shape, "both_ms": both, "update_ms": updated,
               "tokens_per_second": tokens / both * 1e3, "tflop_s": rate, "mfu": rate / args.peak,
               "of_product": rate / limits["product_tflop_s"], "peak_bytes": peak,
               "bound_bytes": bound}


def cells(r, args):
    bound = r["bound_bytes"] and r["bound_bytes"] / 1e9
    return {"tokens": str(r["tokens"]), "kept for backward": r["what"],
            "compiled": {True: "yes", False: "no", None: ""}[r["compiled"]],
            "fwd+bwd ms": f"{r['both_ms']:.1f}", "tokens/s": f"{r['tokens_per_second']:.0f}",
            f"MFU of {args.peak:g}": f"{r['mfu']:.1%}", "MFU of product": f"{r['of_product']:.1%}",
            "update ms": measure.number(r["update_ms"], ".1f"),
            "peak GB": f"{r['peak_bytes'] / 1e9:.1f}", "bound GB": measure.number(bound, ".1f")}


def main():
    parser = measure.parser(__doc__, repeats=5)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_4b")
    parser.add_argument("--lengths", choices=("whole", "mix"), default="whole")
    parser.add_argument("--recompute", choices=RECOMPUTE, nargs="+", default=[*RECOMPUTE])
    parser.add_argument("--compile", choices=("off", "on"), nargs="+", default=("off", "on"))
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--peak", type=float, default=989.0,
                        help="TFLOP/s to count MFU against: dense bfloat16 of an H100 or H200")
    args = parser.parse_args()
    args.prompt = PROMPT
    if args.tiny:
        args.tokens, args.shape, args.repeats, args.prompt = [96, 200], "tiny", 2, 4
    measure.begin(args)
    config, ranks, limits = SHAPES[args.shape], runtime.start(), measure.ceilings(args.tiny)
    records = []

    def report(measured, what, compiled):
        for r in record(config, measured, what, compiled, args, limits, ranks):
            records.append(r)
            print(" | ".join(cells(r, args).values()), flush=True)
        torch.compiler.reset()  # or the next model's blocks would count as recompilations
        measure.free()

    for recompute in args.recompute:
        for compiled in args.compile:
            report(ours(config, recompute, compiled == "on", args, ranks), recompute,
                   compiled == "on")
    if not args.no_peer:
        name, measured = peer(config, args, ranks)
        report(measured, name, None)
    records.sort(key=lambda r: r["tokens"])
    measure.finish([cells(r, args) for r in records], records, limits, args.json)


if __name__ == "__main__":
    runtime.command(main)
