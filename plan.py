"""plan.py - what a run will need, by arithmetic: memory of a GPU, longest sequence, hours.

    python plan.py configs/qwen3_5_27b                  # its table, and each of its configs
    python plan.py configs/qwen3_5_27b --gpus 16
    python stage1.py --config configs/qwen3_5_27b/stage1_mse.toml --plan    # of one command

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
import rollouts
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
    # a tied head is the embedding: gathered throughout, its gradient waits for the first layer
    resident = 4 * head if config.tied else 0
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


def needs(config, cfg, gpus=8, response=None):
    """What a run needs: (parts of a GPU's memory in bytes, its GPUs' size in GB or None if no known
    size is enough, hours). `response` is the mean length of responses; None: half the longest.
    """
    if isinstance(cfg, erpd.Config):
        trains = runtime.read_config(stage1.Config, cfg.stage1[0].config, cfg.stage1[0].set)
        longest = runtime.read_config(sample.Config, cfg.sample).max_new_tokens
    else:
        trains = cfg if isinstance(cfg, stage1.Config | stage2.Config) else None
        longest = trains.train.max_tokens if trains else cfg.max_new_tokens
    if trains:
        parts = memory(config, trains.train.max_tokens, gpus)
    else:  # weights and the cache of one longest sequence; the rest of a GPU makes it faster
        parts = {"weights": 2 * weights(config)[0], "cache": mixing.Cache.bytes_per_slot(
            config, cfg.max_new_tokens + PROMPT, torch.bfloat16)}
        parts["peak"] = sum(parts.values()) + RESERVE
    size = next((size for size in SIZES if parts["peak"] <= size * 1e9), None)
    return parts, size, hours(config, cfg, gpus, size or SIZES[-1], response or longest // 2)


def estimate(file, gpus=8):
    """A run config in a model's folder -> one line: GPUs, memory, hours."""
    file = Path(file)
    cfg = runtime.read_config(KINDS[file.stem.split("_")[0]], file)
    parts, size, time = needs(models.read_config(file.parent), cfg, gpus, _response(file))
    least = "at least " if "cache" in parts else ""
    return (f"{gpus} x {size} GB, {least}{parts['peak'] / 1e9:.0f} GB a GPU, {time:.1f} hours"
            if size else f"{parts['peak'] / 1e9:.0f} GB a GPU, more than {gpus} x {SIZES[-1]} GB")


def describe(kind, cfg, file, gpus):
    """The plan of one command, as text: what `--plan` prints."""
    policy = next((getattr(cfg, name) for name in ("policy", "base")
                   if isinstance(getattr(cfg, name, None), str)), "")
    beside = Path(file or ".").parent
    if isinstance(cfg, stage2.Config) and not policy and not (beside / "config.json").is_file():
        policy = rollouts.load(cfg.batch).header["policy"]
    if not Path(policy).is_dir() and (beside / "config.json").is_file():
        policy = beside  # the shape without the weights: nothing need be fetched for a plan
    elif not policy:
        raise ValueError(f"{file}: names no policy to plan for")
    config, response = models.read_config(policy), _response(file)
    parts, size, time = needs(config, cfg, gpus, response)
    lines = [f"{kind} with {weights(config)[0] / 1e9:.2f} billion weights on {gpus} GPUs "
             "(arithmetic, not measured)",
             "memory of a GPU, GB: " + ", ".join(
                 f"{name} {part / 1e9:.1f}" for name, part in parts.items())
             + f" (reserve {RESERVE / 1e9:.1f})"]
    if isinstance(cfg, stage1.Config | stage2.Config):
        steps = cfg.steps if isinstance(cfg, stage1.Config) else sum(s.steps for s in cfg.signal)
        tokens = cfg.train.prompts_per_step * 16 * ((response or cfg.train.max_tokens // 2)
                                                    + PROMPT)
        lines.append(f"longest sequence {cfg.train.max_tokens} tokens; {steps} steps of "
                     f"{cfg.train.prompts_per_step} prompts x 16 responses, about "
                     f"{tokens / 1e6:.1f} million tokens a step")
    lines.append(f"about {time:.1f} hours on {gpus} x {size} GB" if size else
                 f"more than {gpus} x {SIZES[-1]} GB: take more GPUs, or a smaller max_tokens")
    return "\n".join(lines)


def _response(file):
    return hf.read_json(Path(file or ".").parent / "config.json").get("_mean_response")


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
    parser.add_argument("what", nargs="+", help="folders with config.json, and run configs; "
                                                "or one command (stage1.py, ...)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--config", help="of a command")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="of a command")
    args = parser.parse_args()
    if args.what[0].endswith(".py"):
        kind = Path(args.what[0]).stem
        kind = "rounds" if kind == "erpd" else kind
        if kind not in KINDS:
            raise ValueError(f"there is no plan for {args.what[0]}; there is one for sample.py, "
                             "stage1.py, stage2.py, evaluate.py and erpd.py")
        cfg = runtime.read_config(KINDS[kind], args.config, args.set)
        return print(describe(kind, cfg, args.config, args.gpus))
    print(HEADER.replace("8 x", f"{args.gpus} x"))
    for folder in args.what:
        print(table(folder, args.gpus))
    for folder in args.what:
        for file in sorted(Path(folder).glob("*.toml")):
            print(f"{file}: {estimate(file, args.gpus)}")


if __name__ == "__main__":
    runtime.command(main)
