"""plan.py - what a run will need, by arithmetic: memory of a GPU, longest sequence, hours.

    python plan.py configs/qwen3_5_27b                  # its table, and each of its configs
    python plan.py configs/qwen3_5_27b --gpus 16

Memory of a GPU in training, for P weights over N GPUs, micro-batches of T tokens, H hidden width,
L layers, V vocabulary, I width of the MLP, A heads of D:

    state       16 P / N           float32 weights, gradients, two moments of AdamW
    inputs      2 T H L            bfloat16 input of every block, kept by activation checkpointing
    a block     10 P_block         gathered (this one and the next), its gradient, the reduction
                + T (18 H + 8 I + 6 A D + ...)   what one block keeps for its backward pass
    or the head 8 V H + 3 GiB      gathered, its gradient, the reduction; slices of logits
    reserve     3 GiB              CUDA, NCCL, fragmentation

Blocks and head take turns, so the larger counts. The numbers in the second line of a block are
counted from what autograd keeps (tests/test_plan.py counts again). Nothing here was measured on a
GPU. Time takes the published peak of an H100 and assumes

    training    35 % of 989 TFLOP/s, recomputation not counted as useful
    sampling    60 % of 3.35 TB/s for weights and a cache that fills the memory (paged, half full
                on average); the sampler of this repository is not there yet

and responses of the length that config.json gives as `_mean_response`: the paper's mean on AIME24
(Table 10), ours for Qwen3.5. Evaluations are taken to have 30 problems.
"""

import argparse
from pathlib import Path

import torch

import erpd
import evaluate
import hf
import mixing
import model as models
import runtime
import sample
import stage1
import stage2
from deltanet import TOKEN_HEADS

GIB = 2**30
FLOPS, BANDWIDTH = 0.35 * 989e12, 0.60 * 3.35e12
RESERVE = LOGITS = 3 * GIB
SIZES = (80, 141)  # GB of an H100 and of an H200
PROMPT = 256  # tokens; what is small needs no better guess
PROMPTS, PROBLEMS = 1000, 30  # of a batch that names no number, of an evaluation
KINDS = {"sample": sample.Config, "stage1": stage1.Config, "stage2": stage2.Config,
         "evaluate": evaluate.Config, "rounds": erpd.Config}


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


def memory(config, tokens, gpus):
    """Bytes of a GPU while training on micro-batches of `tokens`: {part: bytes}, with the peak."""
    total, block, head = weights(config)
    parts = {"state": 16 * total // gpus, "inputs": 2 * tokens * config.hidden * config.layers,
             "block": 10 * block + kept(config, tokens), "head": 8 * head + LOGITS}
    resident = 2 * head if config.tied else 0  # a tied head is an embedding: gathered throughout
    return {**parts, "peak": parts["state"] + parts["inputs"] + RESERVE
            + max(parts["block"] + resident, parts["head"])}


def longest(config, gpus, gigabytes):
    """The longest sequence (in steps of 1024 tokens) that trains on GPUs of that size; 0: none."""
    low, high = 0, 1 << 20
    while high - low > 1024:
        middle = (low + high) // 2
        fits = memory(config, middle, gpus)["peak"] <= gigabytes * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return low // 1024 * 1024


def forward_flops(config, tokens, length):
    """Operations of a forward pass over `tokens` in sequences of `length`."""
    total, _, head = weights(config)
    full = config.layers - sum(config.linear)
    products = 2 * (total if config.tied else total - head)  # looking up an embedding costs nothing
    return tokens * (products + full * 2 * config.heads * config.head_dim * length)


def hours(config, cfg, gpus, gigabytes, response):
    """Hours of a run on GPUs of that size, its responses `response` tokens long in the mean."""
    if isinstance(cfg, erpd.Config):
        runs = [runtime.read_config(kind, run.config, run.set)
                for kind, many in ((stage1.Config, cfg.stage1), (stage2.Config, cfg.stage2))
                for run in many]
        parts = [runtime.read_config(sample.Config, cfg.sample), *runs]
        return cfg.rounds * sum(hours(config, part, gpus, gigabytes, response) for part in parts)
    if isinstance(cfg, sample.Config | evaluate.Config):
        if isinstance(cfg, sample.Config):
            responses = (cfg.num_prompts or PROMPTS) * cfg.n
        else:
            responses = PROBLEMS * (1 + len(cfg.policy)) * (
                sum(s.n for s in cfg.sampling) + cfg.kl_samples)
        response = min(response, cfg.max_new_tokens)
        size = 2 * weights(config)[0]
        slot = mixing.Cache.bytes_per_slot(config, response // 2 + PROMPT, torch.bfloat16)
        free = gigabytes * 1e9 - size - RESERVE
        rate = gpus * (free / slot) / ((size + free) / BANDWIDTH)  # tokens a second
        return responses * response / rate / 3600
    length, n = response + PROMPT, 16
    forward = forward_flops(config, length, length) / (gpus * FLOPS) / 3600  # of one response
    scored, passes = 1, 0
    if isinstance(cfg, stage1.Config):
        passes = 3 * cfg.steps
    else:
        for s in cfg.signal:
            passes += (4 if s.denominator == "evolving" else 3) * s.steps
            scored += len({s.numerator, s.denominator} - {"old", "evolving", "none"})
    return forward * n * (passes * cfg.train.prompts_per_step + scored * PROMPTS)


def estimate(file, gpus=8):
    """A run config in a model's folder -> one line: GPUs, memory, hours."""
    file = Path(file)
    config = models.read_config(file.parent)
    response = hf.read_json(file.parent / "config.json")["_mean_response"]
    kind = KINDS[file.stem.split("_")[0]]
    cfg = runtime.read_config(kind, file)
    trains = cfg if kind in (stage1.Config, stage2.Config) else None
    if kind is erpd.Config:
        trains = runtime.read_config(stage1.Config, cfg.stage1[0].config)
    if trains:
        need = memory(config, trains.train.max_tokens, gpus)["peak"]
    else:  # weights and the cache of one longest sequence; the rest of the GPU makes it faster
        need = 2 * weights(config)[0] + RESERVE + mixing.Cache.bytes_per_slot(
            config, cfg.max_new_tokens, torch.bfloat16)
    fitting = [size for size in SIZES if need <= size * 1e9]
    if not fitting:
        return f"{need / 1e9:.0f} GB a GPU: more than {gpus} x {SIZES[-1]} GB"
    time = hours(config, cfg, gpus, fitting[0], response)
    return (f"{gpus} x {fitting[0]} GB, {'' if trains else 'at least '}{need / 1e9:.0f} GB a GPU, "
            f"{time:.1f} hours")


def table(folder, gpus=8):
    """One row of docs/models.md: what a model needs on `gpus` GPUs."""
    config = models.read_config(folder)
    total, _, _ = weights(config)
    cache = mixing.Cache.bytes_per_slot(config, 32768, torch.bfloat16)
    at = {size: longest(config, gpus, size) for size in SIZES}
    return (f"| {Path(folder).name} | {total / 1e9:.2f} | {16 * total / gpus / 1e9:.1f} "
            f"| {memory(config, 32768, gpus)['peak'] / 1e9:.0f} "
            + "".join(f"| {f'{at[size] // 1024}k' if at[size] else 'none'} " for size in SIZES)
            + f"| {cache / 1e9:.2f} |")


HEADER = """\
| model | billion weights | state, GB a GPU | peak at 32k tokens, GB | longest, 8 x 80 GB | \
longest, 8 x 141 GB | cache of 32k tokens, GB |
|---|---|---|---|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", help="folders with config.json, and run configs")
    parser.add_argument("--gpus", type=int, default=8)
    args = parser.parse_args()
    print(HEADER.replace("8 x", f"{args.gpus} x"))
    for folder in args.folder:
        print(table(folder, args.gpus))
    for folder in args.folder:
        for file in sorted(Path(folder).glob("*.toml")):
            print(f"{file}: {estimate(file, args.gpus)}")


if __name__ == "__main__":
    runtime.command(main)
