"""bench_sample.py - sampling from a model of Qwen3-4B's shape, random weights, beside its floor.

sample.generate in bfloat16 at temperature 1, without a stop token: many sequences of one length,
and a long-tailed mix (--requests) through fewer slots, which are filled again as sequences end.

    python benchmarks/bench_sample.py                       # 64 and 256 sequences, the mix, peers
    python benchmarks/bench_sample.py --no-peer --requests 0 --sequences 256 --profile
    python benchmarks/bench_sample.py --tiny                # small shapes, a CPU too: a trial

Rows are ours, and transformers' with the same weights: generate with its dynamic cache, with its
static cache (which it compiles by itself on a GPU), and generate_batch, its continuous batching, as
it is and with CUDA graphs. These make --peer-tokens tokens a sequence, and their floor is that of
as many. What is timed has run before; of the mix a shorter call of the same batch sizes.

Columns: new tokens a second of a whole call, from lists of prompts to lists of tokens (prefill, and
of ours the recording of CUDA graphs, included; the median of --repeats, one call of the mix and of
peers); of decoding alone, by the median time between two looks of the host while all sequences are
live. Both as shares of a floor: what must be read, over the bandwidth of a device copy in the same
run. That is keys and values of each sequence for each of its tokens, and all weights once a step,
of which there are as many as the longest sequence has tokens, or as tokens fill the slots if that
is more. Busy slots: the live ones when the host looks, as long as requests wait.

The check, on a few sequences (of the mix the longest): the share of tokens of a greedy call of the
same size that are the likeliest in model.py's own forward pass over the same text, and
|sampler's log p - model.logp| of the tokens of the timed call. On random weights the two likeliest
tokens are often closer than bfloat16 can tell; in float32, on a CPU, expect 100% and below 1e-5.
"""

import gc
import math
import statistics
from functools import partial
from unittest import mock

import measure
import torch
from bench_step import SHAPES

import kernels
import memory
import mixing
import model as models
import runtime
import sample

CHECKED = 4  # sequences of a row that are compared with the forward pass
MIX = dict(median=600, sigma=1.0, least=16, most=8192)  # lengths: log-normal, then clipped
TINY_MIX = dict(median=6, sigma=1.0, least=2, most=16)


def build(config):
    with measure.DEVICE:
        model = models.Transformer(config).to(measure.DTYPE).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model


def texts(count, length, vocab, seed):
    """Random prompts, no two alike."""
    return torch.randint(vocab, (count, length),
                         generator=torch.Generator().manual_seed(seed)).tolist()


def mix_lengths(count, seed, *, median, sigma, least, most):
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (median * (sigma * normal).exp()).round().long().clamp(least, most).tolist()


def floor(config, prompt, limits, slots, bandwidth):
    """Seconds in which weights, keys and values can be read for so many tokens of each sequence.

    The j-th token of a response (the 0th is the prefill's) reads prompt + j tokens of the cache.
    """
    weights = memory.weights(config)[0] * measure.DTYPE.itemsize  # the embedding is the head
    token = mixing.Cache.bytes(config, 0, 1, measure.DTYPE)
    steps = max(-(-sum(limits) // slots), max(limits))
    read = sum(n * prompt + n * (n - 1) // 2 for n in limits)
    return (steps * weights + read * token) / bandwidth


# ---------------------------------------------------------------- our sampler


def call(model, prompts, limits, slots, pages, temperature=1.0):
    """((mark before, mark after), [(mark, live, waiting)] of each look, what was drawn)."""
    gc.collect()  # the cache of the call before
    looks, before = [], measure.mark()
    drawn = sample.generate(
        model, prompts, max_new_tokens=limits, temperature=temperature, slots=slots, pages=pages,
        watch=lambda live, waiting: looks.append((measure.mark(), live, waiting)))
    return (before, measure.mark()), looks, drawn


def rehearsal(prompts, limits, slots, look):
    """Prompts and limits of a short call that meets every batch size and the longest length of a
    long one: sequences end one after the other, a fifth of them in each window.
    """
    short = [look * (1 + int(math.log(slots / (i + 1), 1.25))) for i in range(slots)]
    longest = len(prompts[0]) + max(limits) - short[0]
    return [(prompts[0] * longest)[:max(longest, 1)], *prompts[1:slots]], short


def time_ours(model, prompts, limits, slots, repeats):
    """What a record says of our sampler."""
    slots, pages = sample.capacity(model, prompts, max(limits), len(prompts), slots)
    look, mixed = sample.LOOK[measure.DEVICE.type], len({*limits}) > 1
    call(model, *(rehearsal(prompts, limits, slots, look) if mixed else (prompts, limits)),
         slots, pages)
    runs = [call(model, prompts, limits, slots, pages) for _ in range(repeats)]
    spans, every, (*_, drawn) = zip(*runs, strict=True)
    if [len(s.tokens) for s in drawn] != limits:
        raise RuntimeError(f"{sum(len(s.tokens) for s in drawn)} tokens came, not {sum(limits)}")
    windows = [(a, b) for looks in every
               for (a, live, _), (b, later, _) in zip(looks, looks[1:], strict=False)
               if live == later == slots and not mixed]
    # all but the last few of these have as many steps
    busy = [live / slots for looks in every for _, live, waiting in looks if waiting]
    longest = sorted(range(len(limits)), key=lambda i: -limits[i])[:CHECKED]
    gaps = torch.cat([check(model, prompts[i], drawn[i], False) for i in longest])
    likely = None if mixed else call(model, prompts, limits, slots, pages, temperature=0.0)[2]
    equal = likely and torch.cat([check(model, prompts[i], likely[i], True) for i in longest])
    return {"tokens": sum(limits), "seconds": measure.median(spans) / 1e3, "pages": pages,
            "decode_tokens_per_second": (
                slots * look / measure.median(windows) * 1e3 if windows else None),
            "busy": statistics.mean(busy) if busy else None,
            "equal": equal.mean().item() if likely else None,
            "gap_mean": gaps.mean().item(), "gap_max": gaps.max().item()}


@torch.no_grad()
def check(model, prompt, drawn, greedy):
    """Of each token of a response, by a forward pass over the whole: whether it is the likeliest,
    or how far its log-probability is from the sampler's.
    """
    text = torch.tensor(prompt + drawn.tokens, device=measure.DEVICE)
    bounds = torch.tensor([0, len(text)])
    scored = torch.arange(len(prompt), len(text), device=measure.DEVICE)
    if greedy:
        logits = kernels.logits(model(text, bounds)[scored - 1], model.head)
        return (logits.argmax(1) == text[scored]).double()
    logp, _ = model.logp(text, bounds, scored)
    return (logp - torch.tensor(drawn.logp, device=measure.DEVICE)).abs()


def profile(model, args):
    """Print where the time of one window of steps goes, kernels launched one by one."""
    S, steps = max(args.sequences), sample.LOOK[measure.DEVICE.type]
    prompts = texts(S, args.prompt + args.new // 2, model.config.vocab, args.seed)
    profiler = torch.profiler.profile()
    # the first two windows compile what is new; int() does nothing
    looks = iter((int, int, profiler.start, profiler.stop))
    with mock.patch.object(sample, "recorded", lambda step: step):
        sample.generate(model, prompts, max_new_tokens=1 + 4 * steps, slots=S,
                        watch=lambda live, waiting: next(looks, int)())
    print(f"\n{steps} steps of {S} sequences of {len(prompts[0])} tokens and a little more")
    print(profiler.key_averages().table(
        sort_by=f"self_{measure.DEVICE.type}_time_total", row_limit=30, max_name_column_width=60))


# ---------------------------------------------------------------- the peers


def build_peer(model):
    """transformers' model with a copy of our weights, and without an end-of-sequence token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    c = model.config
    with measure.DEVICE:
        peer = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
            intermediate_size=c.intermediate, rms_norm_eps=c.eps, tie_word_embeddings=c.tied,
            rope_theta=c.rope_theta, max_position_embeddings=40960, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None, pad_token_id=None)).to(measure.DTYPE).eval()
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights differ in {[*missing, *unexpected][:3]}")
    return peer


def options(new, **kinds):
    from transformers import GenerationConfig
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                            max_new_tokens=new, **kinds)


def generate(peer, prompts, new, **kinds):
    text = torch.tensor(prompts, device=measure.DEVICE)
    drawn = peer.generate(text, attention_mask=torch.ones_like(text),
                          generation_config=options(new, **kinds))
    return drawn[:, text.shape[1]:].tolist()


def generate_batch(peer, prompts, new, **kinds):
    from transformers import ContinuousBatchingConfig
    if not measure.CUDA:
        kinds["num_blocks"] = 64  # or it takes most of the memory
    done = peer.generate_batch(prompts, generation_config=options(new, eos_token_id=-1),
                               continuous_batching_config=ContinuousBatchingConfig(**kinds),
                               persistent_manager=True)  # the second call finds the first one's
    return [result.generated_tokens for result in done.values()]


PEERS = {"transformers, dynamic cache": generate,
         "transformers, static cache": partial(generate, cache_implementation="static"),
         "transformers, generate_batch": generate_batch,
         "transformers, generate_batch, CUDA graphs": partial(generate_batch, use_cuda_graph=True)}


def time_peer(peer, draw, prompts, new):
    try:
        for _ in range(2):  # the first one compiles
            before = measure.mark()
            drawn = draw(peer, prompts, new)
            span = before, measure.mark()
    finally:  # in versions that have it
        getattr(peer, "destroy_cached_continuous_batching_manager", bool)()
    if [len(tokens) for tokens in drawn] != [new] * len(prompts):
        raise RuntimeError(f"{sum(map(len, drawn))} tokens came, not {new * len(prompts)}")
    return {"tokens": new * len(prompts), "seconds": measure.median([span]) / 1e3}


# ---------------------------------------------------------------- the table


def record(what, measured, config, limits, slots, args, ceilings):
    least = floor(config, args.prompt, limits, slots, ceilings["copy_tb_s"] * 1e12)
    top, decode = sum(limits) / least, measured.get("decode_tokens_per_second")
    return {"bench": "sample", "what": what, "shape": args.shape, "sequences": len(limits),
            "slots": slots, "prompt": args.prompt, "longest": max(limits), **measured,
            "tokens_per_second": sum(limits) / measured["seconds"], "floor_per_second": top,
            "of_floor": least / measured["seconds"], "decode_of_floor": decode and decode / top}


def cells(r):
    each, mixed = f"{r['tokens'] / r['sequences']:.0f}", "mixed" in r["what"]
    return {"sampler": r["what"],
            "sequences": f"{r['sequences']}" + f" in {r['slots']} slots" * mixed,
            "new tokens": each + f", up to {r['longest']}" * mixed,
            "tokens/s": f"{r['tokens_per_second']:.0f}", "of floor": f"{r['of_floor']:.1%}",
            "decoding tokens/s": measure.number(r.get("decode_tokens_per_second"), ".0f"),
            "decoding of floor": measure.number(r["decode_of_floor"], ".1%"),
            "busy slots": measure.number(r.get("busy"), ".1%"),
            "greedy equal": measure.number(r.get("equal"), ".1%"),
            "logp gap": measure.number(r.get("gap_mean"), ".1e"),
            "largest gap": measure.number(r.get("gap_max"), ".1e")}


def main():
    parser = measure.parser(__doc__, repeats=3, tokens=None)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_4b")
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of a response")
    parser.add_argument("--requests", type=int, default=1024, help="of the mix; 0: no mix")
    parser.add_argument("--slots", type=int, default=256, help="of the mix")
    parser.add_argument("--peer-tokens", type=int, default=128, help="of a peer's response")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--profile", action="store_true", help="first print a profile of decoding")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.sequences, args.prompt, args.new, args.repeats = "tiny", [2, 4], 4, 16, 1
        args.requests, args.slots, args.peer_tokens = min(args.requests, 16), 4, 8
    measure.begin(args)
    config, ceilings, records = SHAPES[args.shape], measure.ceilings(args.tiny), []
    model = build(config)
    if args.profile:
        measure.attempt("profile", partial(profile, model, args))

    def report(what, limits, slots, call):
        measure.free()
        if measured := measure.attempt(f"{what}, {len(limits)} sequences", call):
            records.append(record(what, measured, config, limits, slots, args, ceilings))
            print(" | ".join(cells(records[-1]).values()), flush=True)

    jobs = [("ours", S, [args.new] * S, args.repeats) for S in args.sequences]
    if args.requests:
        limits = mix_lengths(args.requests, args.seed, **(TINY_MIX if args.tiny else MIX))
        jobs.append(("ours, mixed lengths", min(args.slots, args.requests), limits, 1))
    for name, slots, limits, repeats in jobs:
        prompts = texts(len(limits), args.prompt, config.vocab, args.seed)
        report(name, limits, slots, partial(time_ours, model, prompts, limits, slots, repeats))
    peer = None if args.no_peer else measure.attempt("transformers", partial(build_peer, model))
    del model
    for name, draw in PEERS.items() if peer else ():
        for S in args.sequences:
            prompts = texts(S, args.prompt, config.vocab, args.seed)
            report(name, [args.peer_tokens] * S, S, partial(
                time_peer, peer, draw, prompts, args.peer_tokens))
            torch.compiler.reset()
    measure.finish([cells(r) for r in records], records, ceilings, args.json)


if __name__ == "__main__":
    runtime.command(main)
