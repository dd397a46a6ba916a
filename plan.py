"""plan.py - what a run will need, by arithmetic: memory of a GPU, longest sequence, hours.

    python plan.py configs/qwen3_5_27b                  # its table, and each of its configs
    python plan.py configs/qwen3_5_27b --gpus 16xh200   # on other GPUs
    python stage1.py --config configs/qwen3_5_27b/stage1_mse.toml --plan    # of one command

Memory is the bound of memory.py, which a run prints when it begins. Time takes the published peaks
of a GPU (where none is named, the first of H100 and H200 that is large enough) and assumes

    training    35 % of its matrix rate, recomputation not counted as useful
    sampling    60 % of its bandwidth for weights and a cache that fills the memory (paged, half
                full on average); the sampler of this repository is not there yet

and responses of the length that config.json gives as `_mean_response`: the paper's mean on AIME24
(Table 10), ours for Qwen3.5. None of it was measured.
"""

import argparse
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

import erpd
import evaluate
import hf
import memory
import mixing
import model as models
import options
import problems
import rollouts
import runtime
import sample
import stage1
import stage2


@dataclass(frozen=True)
class GPU:
    """A GPU as published: memory, dense bfloat16 rate, bandwidth."""

    name: str
    gigabytes: float
    flops: float
    bandwidth: float


GPUS = {gpu.name.lower(): gpu for gpu in (
    GPU("L40S", 48, 362e12, 0.864e12), GPU("A100", 80, 312e12, 2.04e12),
    GPU("H100", 80, 989e12, 3.35e12), GPU("H200", 141, 989e12, 4.8e12),
    GPU("B200", 180, 2250e12, 8.0e12))}
USUAL = (GPUS["h100"], GPUS["h200"])  # taken in turn where none is named
PROMPT = 256  # tokens; what is small needs no better guess
PROMPTS, PROBLEMS = 1000, 30  # of a batch that names no number, of a set of unknown size
LONGEST = 32768  # response of an evaluation that names no bound
KINDS = {"sample": sample.Config, "stage1": stage1.Config, "stage2": stage2.Config,
         "evaluate": evaluate.Config, "rounds": erpd.Config}


def draws(cfg):
    """What is sampled: [(responses, longest response)], of a batch or of all policies."""
    if isinstance(cfg, sample.Config):
        return [((cfg.num_prompts or PROMPTS) * cfg.n, cfg.max_new_tokens)]
    sets, found = problems.entries(), []
    for b in cfg.benchmark or [evaluate.Benchmark("prompts")]:
        entry = sets.get(b.name)
        number = min(entry.size if entry and entry.size else PROBLEMS, cfg.limit or 1 << 30)
        each = sum((b.n or s.n) if s.temperature else 1 for s in cfg.sampling) or b.n or entry.k
        if evaluate.untruncated(cfg, cfg.sampling) is None:
            each += cfg.kl_samples
        longest = cfg.max_new_tokens or (entry.max_new_tokens if entry else LONGEST)
        # a run's folder stands for all its checkpoints, once it is there
        policies = 1 + sum(len(evaluate.checkpoints(p.path)) if Path(p.path).is_dir() else 1
                           for p in cfg.policy)
        found.append((number * each * policies, longest))
    return found


def forward_flops(config, tokens, length):
    """Operations of a forward pass over `tokens` in sequences of `length`."""
    total, _, head = memory.weights(config)
    full = config.layers - sum(config.linear)
    products = 2 * (total if config.tied else total - head)  # looking up an embedding costs nothing
    return tokens * (products + full * 2 * config.heads * config.head_dim * length)


def hours(config, cfg, gpus, gpu, response):
    """Hours of a run on so many of a GPU, its responses `response` tokens long in the mean;
    of rounds without their evaluations, whose prompts are not known.
    """
    if isinstance(cfg, erpd.Config):
        total, sampling = 0.0, {run.name: run.sample for run in cfg.stage1}
        for i, (_, k, goal, names) in enumerate(cfg.schedule):
            if k > 1 or i == 0:  # paths share the first round
                changes = sampling.get(erpd.split(goal)[0], []) if k > 1 else []
                parts = [options.read_config(sample.Config, cfg.sample, changes),
                         *stages(cfg, names)]
                total += sum(hours(config, part, gpus, gpu, response) for part in parts)
        return total
    if isinstance(cfg, sample.Config | evaluate.Config):
        tokens = sum(number * min(response, longest) for number, longest in draws(cfg))
        response = min(response, max(longest for _, longest in draws(cfg)))
        size = 2 * memory.weights(config)[0]
        slot = mixing.Cache.bytes(config, 1, response // 2 + PROMPT, torch.bfloat16)
        free = gpu.gigabytes * 1e9 - size - memory.DEVICES["cuda"].reserve
        rate = gpus * (free / slot) / ((size + free) / (0.6 * gpu.bandwidth))  # tokens a second
        return tokens / rate / 3600
    length, n = response + PROMPT, 16
    forward = forward_flops(config, length, length) / (gpus * 0.35 * gpu.flops) / 3600
    scored, passes = 1, 0
    if isinstance(cfg, stage1.Config):
        passes = (3 + len(cfg.frozen)) * cfg.steps
        if cfg.loss.name == "ppo":
            share = (cfg.value.prompts_per_step or cfg.train.prompts_per_step
                     ) / cfg.train.prompts_per_step
            passes, scored = passes + 3 * cfg.value.steps * share, scored + 1
    else:
        for s in cfg.signal:
            once_more = (s.full or s.denominator == "evolving") + ("old" in cfg.frozen)
            passes += (3 + once_more) * s.steps
            scored += len({s.numerator, s.denominator} - {"old", "evolving", "none"})
    return forward * n * (passes * cfg.train.prompts_per_step + scored * PROMPTS)


def needs(config, cfg, gpus=8, gpu=None, response=None):
    """What a run needs: (parts of a GPU's memory in bytes, the GPU, whether it is large enough,
    hours). `response` is the mean length of responses; None: half the longest.
    """
    if isinstance(cfg, erpd.Config):
        runs = stages(cfg, {run.name for run in (*cfg.stage1, *cfg.stage2)})
        longest = options.read_config(sample.Config, cfg.sample).max_new_tokens
    else:
        runs = [cfg]
        trains = isinstance(cfg, stage1.Config | stage2.Config)
        longest = cfg.train.max_tokens if trains else max(longest for _, longest in draws(cfg))
    for one in [gpu] if gpu else USUAL:
        room = one.gigabytes * 1e9
        parts = max((most(config, run, gpus, response, room) for run in runs),
                    key=lambda parts: parts["peak"])
        if parts["peak"] <= room:
            break
    return parts, one, parts["peak"] <= room, hours(
        config, cfg, gpus, one, response or longest // 2)


def stages(cfg, names):
    """The configs of the runs of a round that are named."""
    return [options.read_config(kind, run.config, run.set)
            for kind, many in ((stage1.Config, cfg.stage1), (stage2.Config, cfg.stage2))
            for run in many if run.name in names]


def most(config, cfg, gpus, response, room):
    """The memory of one command: {part: bytes}; room: bytes of a GPU."""
    if isinstance(cfg, stage1.Config | stage2.Config):
        step = step_tokens(cfg, response)
        return memory.training(config, cfg.train.max_tokens, gpus, step=step,
                               recompute=cfg.train.recompute,
                               keep_attention=cfg.train.keep_attention, frozen=len(cfg.frozen),
                               batch=step * PROMPTS // cfg.train.prompts_per_step)
    # one sequence at a time; the rest of a GPU makes it faster
    length = max(longest for _, longest in draws(cfg)) + PROMPT
    parts = memory.sampling(config, cfg.slots or 1, length, PROMPT)
    if isinstance(cfg, sample.Config):
        return parts
    scored = [memory.scoring(config, max(cfg.max_tokens, length), both=both)
              for both in (True, False)]
    return max(parts, next((s for s in scored if s["peak"] <= room), scored[1]),
               key=lambda parts: parts["peak"])


def step_tokens(cfg, response):
    """Tokens of a minibatch of a stage, prompts and responses."""
    return cfg.train.prompts_per_step * 16 * ((response or cfg.train.max_tokens // 2) + PROMPT)


def estimate(file, gpus=8, gpu=None):
    """A run config in a model's folder -> one line: GPUs, memory, hours."""
    file = Path(file)
    cfg = options.read_config(KINDS[file.stem.split("_")[0]], file)
    parts, gpu, fits, time = needs(
        models.read_config(file.parent), cfg, gpus, gpu, _response(file))
    least = "" if "state" in parts else "at least "
    size = f"{parts['peak'] / 1e9:.0f} GB a GPU"
    return (f"{gpus} x {gpu.name}, {least}{size}, {said(time, cfg)}" if fits else
            f"{size}, more than {gpus} x {gpu.name}")


def said(time, cfg):
    return f"{time:.1f} hours" + " without evaluation" * isinstance(cfg, erpd.Config)


def describe(kind, cfg, file, gpus, gpu):
    """The plan of one command, as text: what `--plan` prints."""
    name = "base" if isinstance(cfg, evaluate.Config) else "policy"
    policy, beside = getattr(cfg, name), Path(file or ".").parent
    own = tomllib.loads(Path(file).read_text(encoding="utf-8")).get(name, "") if file else ""
    if isinstance(cfg, stage2.Config) and not policy and not (beside / "config.json").is_file():
        policy = rollouts.load(cfg.batch).header["policy"]
    if not Path(policy).is_dir() and (beside / "config.json").is_file():
        if policy != own:
            raise ValueError(f"{name} = {policy} is no folder, and the shape beside {file} is that "
                             f"of {own}; fetch the model and give its folder")
        policy = beside  # the shape without the weights: nothing need be fetched for a plan
    elif not policy:
        raise ValueError(f"{file}: names no policy to plan for"
                         + (" (the embedded task makes its own, which fits anywhere)"
                            if getattr(cfg, "task", "") else ""))
    config, response = models.read_config(policy), _response(file)
    parts, gpu, fits, time = needs(config, cfg, gpus, gpu, response)
    lines = [f"{kind} with {memory.weights(config)[0] / 1e9:.2f} billion weights on "
             f"{gpus} x {gpu.name} of {gpu.gigabytes} GB (arithmetic, not measured)",
             memory.text(parts)]
    if isinstance(cfg, stage1.Config | stage2.Config):
        steps = cfg.steps if isinstance(cfg, stage1.Config) else sum(s.steps for s in cfg.signal)
        tokens = step_tokens(cfg, response)
        lines.append(f"longest sequence {cfg.train.max_tokens} tokens; {steps} steps of "
                     f"{cfg.train.prompts_per_step} prompts x 16 responses, about "
                     f"{tokens / 1e6:.1f} million tokens a step")
    if isinstance(cfg, sample.Config | evaluate.Config):
        number = sum(number for number, _ in draws(cfg))
        tokens = sum(number * min(response or longest // 2, longest)
                     for number, longest in draws(cfg))
        lines.append(f"{number} responses, about {tokens / 1e6:.1f} million tokens")
    lines.append(f"about {said(time, cfg)}" if fits else "more than there is: take more or larger "
                 "GPUs, or a smaller max_tokens (max_new_tokens in sampling)")
    return "\n".join(lines)


def _response(file):
    return hf.read_json(Path(file or ".").parent / "config.json").get("_mean_response")


def table(folder, gpus=8):
    """One row of docs/models.md: what a model needs on `gpus` GPUs."""
    config = models.read_config(folder)
    total, _, _ = memory.weights(config)
    cache = mixing.Cache.bytes(config, 1, 32768, torch.bfloat16)
    at = [memory.longest(config, gpus, gpu.gigabytes) for gpu in USUAL]
    return (f"| {Path(folder).name} | {total / 1e9:.2f} | {16 * total / gpus / 1e9:.1f} "
            f"| {memory.training(config, 32768, gpus)['peak'] / 1e9:.0f} "
            + "".join(f"| {f'{n // 1024}k' if n else 'none'} " for n in at)
            + f"| {cache / 1e9:.2f} |")


HEADER = """\
| model | billion weights | state, GB a GPU | peak at 32k tokens, GB | longest, 8 x H100 | \
longest, 8 x H200 | cache of 32k tokens, GB |
|---|---|---|---|---|---|---|"""


def machine(text):
    """"8" or "16xh200" -> (number of GPUs, GPU or None)."""
    number, _, kind = text.partition("x")
    if not number.isdecimal() or int(number) < 1 or kind and kind not in GPUS:
        raise ValueError(f"--gpus (or --plan) {text}: expected a number of GPUs, or number and "
                         f"kind as in 8xh200; kinds are {', '.join(GPUS)}")
    return int(number), GPUS.get(kind)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="folders with config.json, and run configs; "
                                                "or one command (stage1.py, ...)")
    parser.add_argument("--gpus", default="8", help="how many, and of which kind if that matters: "
                        f"8, 16xh200; kinds are {', '.join(GPUS)}")
    parser.add_argument("--config", help="of a command")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="of a command")
    args = parser.parse_args()
    gpus, gpu = machine(args.gpus)
    if args.what[0].endswith(".py"):
        kind = Path(args.what[0]).stem
        kind = "rounds" if kind == "erpd" else kind
        if kind not in KINDS:
            raise ValueError(f"there is no plan for {args.what[0]}; there is one for sample.py, "
                             "stage1.py, stage2.py, evaluate.py and erpd.py")
        cfg = options.read_config(KINDS[kind], args.config, args.set)
        return print(describe(kind, cfg, args.config, gpus, gpu))
    print(HEADER.replace("8 x", f"{gpus} x"))
    folders = [folder for folder in args.what if len(args.what) == 1  # configs/*/: configs/toy, too
               or (Path(folder) / "config.json").is_file()]
    for folder in folders:
        print(table(folder, gpus))
    for folder in folders:
        for file in sorted(Path(folder).glob("*.toml")):
            print(f"{file}: {estimate(file, gpus, gpu)}")


if __name__ == "__main__":
    runtime.command(main)
