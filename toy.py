"""toy.py - the embedded default: a small task with real errors in it, and a base policy trained
from scratch.

The task ("hearsay table"): arithmetic modulo 10, strictly left to right, written out step by step.

    prompt    4*7*7*7*3-4=        response    w4*7=8,8*7=6;h6*7=2|2*3=6,6-4=2.          answer 2

The truth is a table of 210 facts (10 states x 21 operations: + - with 1..9, * with 3, 7, 9, so that
an error never cancels by absorption). The demonstrators the base policy learns from share a
corrupted copy: each fact f has one wrong value, written with probability q_f, and the chain goes on
from what was written. So the base is wrong at temperature 0 too, on facts whose wrong value is
believed more often than not, and a batch of rollouts holds the information to find out. Fillers,
separators and the order of operands carry entropy that no reward depends on.

    task.kind    which facts are bad, and how strongly believed (q); other facts err with a small q
    rules (R)    - with a < b, b >= 4: the borrow is forgotten;  * with a >= 7: 5 too much;
                 + with a + b >= 15: 1 too much. q ~ U(.45, .55). What is learnt about one fact
                 generalises to its rule.
    facts (F)    a share `bad` of all facts, at random. q ~ U(.5, .65): the mode is wrong.

A policy's exact success on a prompt under the corrupted table follows by dynamic programming over
the 10 states. It is written into the prompts files as "success" and gives the least KL at which any
policy reaches a given accuracy (evaluate.py). It is the demonstrators' success; the trained base
matches it to a few points.

    python toy.py --config configs/toy/r5.toml      # writes prompts, tokenizer and the base policy
"""

import json
import random
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import durable
import model as models
import options
import runtime
from options import key, section

OPERATIONS = [(op, b) for op in "+-*" for b in ((3, 7, 9) if op == "*" else range(1, 10))]  # 21
CHARACTERS = "_.0123456789+-*=,;:|hmw"  # "_" is padding, "." ends a response


@dataclass(frozen=True)
class Task:
    kind: str = key("rules", "rules (R) or facts (F)")
    steps: int = key(5, "operations in a problem: 5 for the CPU, 8 or 10 for a GPU")
    bad: float = key(
        0.16, "facts: share of facts whose wrong value is believed more often than not")
    filler: float = key(0.25, "probability of each of three filler characters before an equation")
    restate: float = key(0.0, "probability of restating the remaining expression after an equation")
    prompts: int = key(2048, "training prompts; sample.py draws the batch's from them")
    validation: int = key(192, "prompts that checkpoints are selected on")
    test: int = key(576, "prompts that results are reported on")


@dataclass(frozen=True)
class Shape:
    hidden: int = key(96, "width")
    layers: int = key(3, "blocks")
    heads: int = key(4, "query heads")
    kv_heads: int = key(2, "key/value heads")
    head_dim: int = key(24, "head width")
    intermediate: int = key(256, "MLP width")


@dataclass(frozen=True)
class Train:
    steps: int = key(900, "supervised steps; fresh traces every step")
    traces: int = key(96, "demonstrations a step")
    lr: float = key(4e-3, "peak learning rate; 50 steps of warm-up, cosine to 5 %")
    checkpoint_every: int = key(300, "steps between checkpoints")


@dataclass(frozen=True)
class Config:
    output: str = key(help="folder for prompts_*.jsonl and policy/")
    seed: int = key(0, "corrupted table, prompts, initial weights, demonstrations")
    task: Task = section(Task)
    shape: Shape = section(Shape)
    train: Train = section(Train)

    def __post_init__(self):
        options.one_of("task.kind", self.task.kind, ("rules", "facts"))


# ---------------------------------------------------------------- the task


def truth(a, op, b):
    return (a + b if op == "+" else a - b if op == "-" else a * b) % 10


def corrupted_table(task, seed):
    """{(a, op, b): (wrong value, probability that it is written)} for all 210 facts."""
    rng = random.Random(f"table-{seed}")
    table = {}
    for a in range(10):
        for op, b in OPERATIONS:
            right = truth(a, op, b)
            if task.kind == "rules":
                wrong = {"-": (b - a) % 10, "*": (right + 5) % 10, "+": (right + 1) % 10}[op]
                bad = {"-": a < b and b >= 4, "*": a >= 7, "+": a + b >= 15}[op]
                q = rng.uniform(0.45, 0.55) if bad else rng.uniform(0.0, 0.03)
                if wrong == right:  # b - a = a - b modulo 10: forgetting the borrow does no harm
                    wrong = (right + rng.randint(1, 9)) % 10
            else:
                wrong = (right + rng.randint(1, 9)) % 10
                q = rng.uniform(0.5, 0.65) if rng.random() < task.bad else rng.uniform(0.0, 0.06)
            table[a, op, b] = wrong, q
    return table


def success(table, start, operations):
    """Probability that a chain through the corrupted table ends at the true answer:
    10-state dynamic programming.
    """
    belief, right = [float(a == start) for a in range(10)], start
    for op, b in operations:
        following = [0.0] * 10
        for a, p in enumerate(belief):
            wrong, q = table[a, op, b]
            following[wrong] += p * q
            following[truth(a, op, b)] += p * (1 - q)
        belief, right = following, truth(right, op, b)
    return belief[right]


def problem(rng, steps):
    return rng.randrange(10), [rng.choice(OPERATIONS) for _ in range(steps)]


def problem_text(start, operations):
    return str(start) + "".join(f"{op}{b}" for op, b in operations) + "="


def split(text):
    """Where a problem belongs, for every seed alike: "test", "validation" or "train"."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(text.encode()) % 10, "train")


def demonstration(rng, task, table, start, operations):
    """One demonstrator's written solution."""
    value, text = start, ""
    for i, (op, b) in enumerate(operations):
        text += "".join(rng.choice("hmw") for _ in range(3) if rng.random() < task.filler)
        wrong, q = table[value, op, b]
        result = wrong if rng.random() < q else truth(value, op, b)
        left, right = (b, value) if op != "-" and rng.random() < 0.5 else (value, b)
        text += f"{left}{op}{right}={result}"
        value, rest = result, operations[i + 1:]
        if not rest:
            text += "."
        elif rng.random() < task.restate:
            text += ":" + problem_text(value, rest)[:-1] + rng.choice(",;")
        else:
            text += rng.choice(",;|")
    return text


def write_prompts(cfg, table):
    folder, rng, seen = Path(cfg.output), random.Random(f"prompts-{cfg.seed}"), set()
    rows = {"train": [], "validation": [], "test": []}
    sizes = {"train": cfg.task.prompts, "validation": cfg.task.validation, "test": cfg.task.test}
    misses = 0
    while any(len(rows[name]) < sizes[name] for name in rows):
        start, operations = problem(rng, cfg.task.steps)
        text = problem_text(start, operations)
        name = split(text)
        if text in seen or len(rows[name]) == sizes[name]:
            misses += 1
            if misses > 100_000:
                lacking = next(n for n in rows if len(rows[n]) < sizes[n])
                raise ValueError(f"task.steps = {cfg.task.steps} gives too few different problems "
                                 f"for {sizes[lacking]} {lacking} prompts; ask for fewer")
            continue
        misses = 0
        seen.add(text)
        answer = start
        for op, b in operations:
            answer = truth(answer, op, b)
        rows[name].append({"id": f"{name}-{len(rows[name])}", "problem": text,
                           "answer": str(answer),
                           "success": round(success(table, start, operations), 6)})
    for name, part in rows.items():
        durable.write_text(folder / f"prompts_{name}.jsonl",
                           "".join(json.dumps(row) + "\n" for row in part))
    return {name: sum(row["success"] for row in part) / len(part) for name, part in rows.items()}


# ---------------------------------------------------------------- the base policy


def write_initial_policy(folder, cfg, vocab=32):
    """A random policy as a Hugging Face folder, with a character tokenizer that has no chat
    template.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    folder, s = Path(folder), cfg.shape
    source = folder.with_name(folder.name + ".source")
    source.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(kinds.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "_", "eos_token": ".",
        "unk_token": "_", "clean_up_tokenization_spaces": False}, indent=2))
    (source / "generation_config.json").write_text(json.dumps({
        "eos_token_id": CHARACTERS.index("."), "pad_token_id": 0}))
    (source / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocab,
        "hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "intermediate_size": s.intermediate, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "attention_bias": False, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "eos_token_id": CHARACTERS.index("."), "pad_token_id": 0,
        "torch_dtype": "float32"}, indent=2))
    model = models.Transformer(models.read_config(source))
    model.source = source
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:  # norms keep their ones; what writes into the residual starts at half
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5 * (
                    0.5 if name.split(".")[-2] in ("o_proj", "down_proj") else 1)
                p.normal_(0.0, std, generator=generator)
    models.save(model, folder)
    shutil.rmtree(source)


def traces(cfg, table, tokenizer, step, rank, world):
    """This rank's demonstrations of a step, packed:
    (tokens [T], cu_seqlens [B+1], scored [n], count over all ranks).
    """
    rng = random.Random(f"traces-{cfg.seed}-{step}")
    sequences = []
    while len(sequences) < cfg.train.traces:
        start, operations = problem(rng, cfg.task.steps)
        prompt = problem_text(start, operations)
        if split(prompt) == "train":
            sequences.append((prompt, demonstration(rng, cfg.task, table, start, operations)))
    tokens, cu_seqlens, scored = [], [0], []
    for prompt, response in sequences[rank::world]:
        scored += range(len(tokens) + len(prompt), len(tokens) + len(prompt) + len(response))
        tokens += tokenizer.encode(prompt + response)
        cu_seqlens.append(len(tokens))
    return (*map(torch.tensor, (tokens, cu_seqlens, scored)),
            sum(len(response) for _, response in sequences))


def main():
    cfg = options.parse(Config, __doc__)
    ranks = runtime.start()
    ranks.note_unread("task", cfg.task, {"bad"} if cfg.task.kind == "rules" else set())
    folder, table = Path(cfg.output), corrupted_table(cfg.task, cfg.seed)
    run = runtime.Run(folder / "sft", cfg, {}, ranks)
    if run.done and (folder / "policy").is_dir():
        return ranks.print(f"{folder}: already complete")
    initial = folder / "sft" / "initial"
    if ranks.rank == 0:
        means = write_prompts(cfg, table)
        print("exact success of the demonstrators: "
              + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
        if not initial.is_dir():
            write_initial_policy(initial, cfg)
    dist.barrier()

    tokenizer = models.Tokenizer(initial)
    model = runtime.policy(initial, ranks)
    optimizer = runtime.adamw(model, cfg.train.lr, (0.9, 0.98), 0.01)
    run.restore(model, optimizer)
    cosine = torch.cos(torch.linspace(
        0, torch.pi, max(cfg.train.steps, 2), dtype=torch.float64)).tolist()
    began, nats, tokens_seen = time.perf_counter(), 0.0, 0
    for step in range(run.first, cfg.train.steps):
        run.stop_if_asked(step, model, optimizer)
        tokens, cu_seqlens, scored, total = traces(
            cfg, table, tokenizer, step, ranks.rank, ranks.world)
        logp, _ = model.logp(*(x.to(ranks.device) for x in (tokens, cu_seqlens, scored)))
        loss = -logp.sum() / total
        (loss * ranks.world).backward()
        grad_norm = runtime.clip_gradients(model, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = runtime.warmup(cfg.train.lr * (0.525 + 0.475 * cosine[step]), step, 50)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        nats, tokens_seen = nats + float(loss) * total, tokens_seen + total
        if (step + 1) % 50 == 0 or step + 1 == cfg.train.steps:
            run.log(step + 1, {"nats_per_token": nats / tokens_seen, "grad_norm": grad_norm,
                               "lr": optimizer.param_groups[0]["lr"],
                               "seconds": time.perf_counter() - began})
            began, nats, tokens_seen = time.perf_counter(), 0.0, 0
        if (step + 1) % cfg.train.checkpoint_every == 0 or step + 1 == cfg.train.steps:
            run.checkpoint(step + 1, model, optimizer)
    if ranks.rank == 0:
        final = folder / "sft" / f"step_{cfg.train.steps:06d}"
        with durable.folder(folder / "policy") as aside:
            shutil.copytree(final, aside, dirs_exist_ok=True)
    run.finish(steps=cfg.train.steps)


if __name__ == "__main__":
    runtime.command(main)
