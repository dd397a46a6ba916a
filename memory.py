"""memory.py - how much memory a run takes at most, by arithmetic, before it starts.

Stage 1, stage 2, sample.py and evaluate.py print this bound when they begin, `--plan` prints it
without beginning. For P weights over N ranks, micro-batches of T tokens, H hidden width, L layers,
V vocabulary, I width of the MLP, A heads of D, computing in w bytes (bfloat16 on a GPU: 2, float32
on a CPU: 4):

    training
      state      16 P / N        float32 weights, gradients, two moments of AdamW
      inputs     w T H L         input of every block, kept by activation checkpointing; with
                                 keep_attention + w T (2 A + 2 K) D L, without recompute all that
                                 a block keeps
      a block    10 w P_block    gathered (this one and the next), gradients, reductions in flight
                 + w/2 T (22 H + 14 I + 6 A D + ...)   kept for its backward pass, and at work in it
      or head    4 w V H         gathered, its gradient, the reduction
                 + (8 + 2 w) T H + slices of the logits
      batch      4 bytes a token of the batch (CPU: 64), 64 a token of the largest minibatch
      frozen     4 P / N + w (V H + T H), two blocks gathered: each policy of an exact KL
    sampling     weights, cache (its pages, and DeltaNet's states of every slot), one prefill or the
                 draw of a token a slot
    scoring      policy and base (or one, and the other's head), a forward pass, chunks of logits
    reserve      CUDA, NCCL, fragmentation (or Python and torch)

Blocks and head take turns, so the larger counts. What a block keeps is counted from autograd
(tests/test_memory.py counts again and measures whole steps on a CPU); the GPU's reserve and
fragmentation are assumed. metrics.jsonl has the peak so far beside the bound.
"""

from dataclasses import dataclass

import torch

import mixing
import model as models
from deltanet import TOKEN_HEADS
from kernels import SLICE_ELEMENTS

GIB = 2**30
PREFILL = 16384  # tokens of prompts that the sampler runs at a time; longer ones go in pieces


@dataclass(frozen=True)
class Device:
    """What differs between a GPU and a CPU."""

    width: int    # bytes of a number in computation
    slices: int   # copies of a slice of logits held at once
    batch: int    # bytes a token of the whole batch
    reserve: int  # bytes


DEVICES = {"cuda": Device(2, 3, 4, 3 * GIB), "cpu": Device(4, 8, 64, GIB)}


def weights(config):
    """Number of weights: (all of them, the largest block, output projection)."""
    with torch.device("meta"):
        model = models.Transformer(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    return sum(p.numel() for p in model.parameters()), max(blocks), config.vocab * config.hidden


def kept(config, tokens):
    """Bytes that the backward pass of one block needs, activations in bfloat16: the larger kind."""
    c = config
    common = (26 if c.zero_centred else 18) * c.hidden + 8 * c.intermediate
    attention = (16 if c.gated else 14 if c.qk_norm else 6) * c.heads * c.head_dim
    largest = tokens * (common + attention)
    if c.delta:
        heads = tokens * c.delta.v_heads
        rule = 3_500 * heads + 11_200 * min(heads, TOKEN_HEADS)  # groups of heads take turns
        largest = max(largest, tokens * common + rule * c.delta.v_dim // 128)
    return largest


def forward(config, tokens, width):
    """Bytes of a forward pass that keeps nothing for a backward pass."""
    c = config
    largest = tokens * max(3 * width * c.intermediate, 8 * (width + 1) * c.heads * c.head_dim)
    if c.delta:
        heads = tokens * c.delta.v_heads
        rule = 2_500 * heads + 11_200 * min(heads, TOKEN_HEADS)
        largest = max(largest, rule * c.delta.v_dim // 128)
    return largest + 20 * tokens * c.hidden


def training(config, tokens, ranks, *, device="cuda", batch=0, step=0, recompute=True,
             keep_attention=False, frozen=0):
    """Bytes on one of `ranks` while training on micro-batches of `tokens`: {part: bytes}, the last
    of them "peak". batch, step: tokens of the batch and of its largest minibatch; frozen: policies
    beside the one that learns, for exact KL.
    """
    d, (total, block, head) = DEVICES[device], weights(config)
    delta_heads = config.delta.v_heads if config.delta else 0
    working = kept(config, tokens) + tokens * (
        6 * config.intermediate + 4 * config.hidden + 600 * delta_heads)
    logits = d.slices * min(4 * tokens * config.vocab, 4 * SLICE_ELEMENTS)
    inputs = d.width * tokens * config.hidden * config.layers
    if not recompute:
        inputs += kept(config, tokens) * d.width // 2 * config.layers
    elif keep_attention:  # queries, keys, values, a gate, and what comes of them
        heads = (2 + config.gated) * config.heads + 2 * config.kv_heads
        inputs += d.width * tokens * heads * config.head_dim * config.linear.count(False)
    parts = {"state": 16 * total // ranks, "inputs": inputs,
             "block": 10 * d.width * block + working * d.width // 2,
             "head": 4 * d.width * head + (8 + 2 * d.width) * tokens * config.hidden + logits,
             "batch": d.batch * batch + 64 * step, "reserve": d.reserve}
    if frozen:
        parts["frozen"] = frozen * (4 * total // ranks + d.width * (head + 2 * block)
                                    + d.width * tokens * config.hidden)
        parts["head"] += logits + 4 * tokens * config.hidden * frozen
    # a tied head is the embedding: gathered throughout, its gradient waits for the first layer
    resident = 2 * d.width * head if config.tied else 0
    return with_peak(parts, max(parts["block"] + resident, parts["head"]))


def sampling(config, slots, length, prompt, *, device="cuda", tokens=0):
    """Bytes while `slots` sequences of up to `length` tokens are sampled; `prompt`: tokens of the
    longest prompt, part of the length; `tokens`: of all of them together that the cache has room
    for (0: each its longest).
    """
    d, total, page = DEVICES[device], weights(config)[0], mixing.PAGE[device]
    dtype = {2: torch.bfloat16, 4: torch.float32}[d.width]
    parts = {"weights": d.width * total,
             "cache": mixing.Cache.bytes(
                 config, slots, page + (tokens or slots * -(-length // page) * page), dtype),
             "prefill": forward(config, min(PREFILL, max(length, slots * prompt)), d.width),
             "draw": 64 * slots * config.vocab + forward(config, slots, d.width),
             "reserve": d.reserve}
    return with_peak(parts, max(parts["prefill"], parts["draw"]))


def scoring(config, tokens, *, device="cuda", both=True):
    """Bytes while a policy's KL to its base is scored in packs of `tokens`, with both of them there
    or one after the other.
    """
    d, (total, _, head) = DEVICES[device], weights(config)
    chunks = 2 * d.slices * min(4 * tokens * config.vocab, 4 * SLICE_ELEMENTS)
    parts = {"weights": d.width * (2 * total if both else total + head),
             "forward": forward(config, tokens, d.width),
             "logits": 4 * d.width * tokens * config.hidden + chunks, "reserve": d.reserve}
    return with_peak(parts, max(parts["forward"], parts["logits"]))


def with_peak(parts, turns):
    """Add up: of the parts that take turns only the largest counts, `turns`."""
    alternate = {"block", "head", "prefill", "draw", "forward", "logits"}
    return parts | {"peak": turns + sum(n for name, n in parts.items() if name not in alternate)}


def text(parts):
    """The bound in one line, in GB (1e9 bytes)."""
    *rest, peak = (f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"memory of a rank, at most, GB: {peak} ({', '.join(rest)})"


def longest(config, gpus, gigabytes):
    """The longest sequence (in steps of 1024 tokens) that trains on GPUs of that size; 0: none."""
    low, high = 0, 1 << 20
    while high - low > 1024:
        middle = (low + high) // 2
        fits = training(config, middle, gpus)["peak"] <= gigabytes * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return low // 1024 * 1024
