"""sample.py - rollouts: a KV-cache sampler with continuous batching, and the collector of the
fixed batch.

A slot of the cache holds one growing sequence. Each turn of the loop either fills free slots (the
prompts that are next in line run once, packed, and their keys and values are copied to a slot for
each of their samples) or decodes one token for every live slot. A finished sequence leaves, the
last live slot moves into its place, and the next prompt takes the room: the batch stays full until
the queue is empty.

Randomness is a function of (seed, prompt id, sample number, position) alone: a token is drawn by
inverting the cumulative distribution at a hashed uniform number. So a sequence does not depend on
its neighbours, slots, ranks or on where a run was interrupted (up to rounding: a different batch
shape may change the last bits of a logit).

`logp` of a token is at the sampling temperature and *before* top-k, top-p and min-p: log pi, not
log of the truncated distribution. Training recomputes it anyway (old_logp); the difference is
measured and printed there.

    python sample.py --config configs/toy/sample.toml
    torchrun --nproc-per-node 8 sample.py --config configs/qwen3_4b/sample.toml

Ranks take shards of prompts from one counter, so that a long response keeps no other rank waiting,
and grade a finished shard in a thread beside the sampling. A killed sampler started again keeps
every response it had finished: those of complete shards, and in a journal those of shards that were
not complete yet.
"""

import hashlib
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import durable
import hf
import kernels
import memory
import mixing
import model as models
import options
import rollouts
import runtime
import sandbox
from options import key, section


class Sequence(NamedTuple):
    """A sampled response: its prompt's place in the list, tokens (stop token included),
    log-probs, whether it stopped.
    """

    prompt: int
    tokens: list[int]
    logp: list[float]
    finished: bool


def generate(model, prompts, *, n=1, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
             presence_penalty=0.0, repetition_penalty=1.0, stop=(), stop_strings=(), decode=None,
             seed=0, slots=256, ids=None, progress=False):
    """Sample n responses to each of `prompts` (lists of token ids) -> list of Sequence,
    prompt by prompt.

    temperature 0 is greedy (its logp is at temperature 1). Truncation in this order: top_k (0:
    off), top_p, min_p (relative to the likeliest token); the likeliest token always stays. Before
    it, presence_penalty is taken off the logits of tokens that the response has already, and logits
    of those that it or the prompt has are divided by repetition_penalty (multiplied below 0).
    `stop` token ids end a response and belong to it, as does what completes one of `stop_strings`,
    for which decode(tokens) -> text is needed. `ids` identify the prompts to the random numbers
    (default: their places); `progress` shows a bar. ValueError on an empty prompt.
    """
    settings = dict(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
                    repetition_penalty=repetition_penalty, stop=stop, stop_strings=stop_strings,
                    decode=decode, seed=seed, slots=slots, ids=ids)
    drawn = tqdm(stream(model, prompts, **settings), total=len(prompts) * n, unit="seq",
                 disable=not progress, mininterval=5, leave=False, delay=10)
    finished = {(s.prompt, sample): s for s, sample in drawn}
    return [finished[place] for place in sorted(finished)]


@torch.no_grad()
def stream(model, prompts, *, n, max_new_tokens, temperature, top_p, top_k, min_p, stop, seed,
           slots, presence_penalty=0.0, repetition_penalty=1.0, stop_strings=(), decode=None,
           ids=None, skip=frozenset(), feed=None):
    """`generate`, yielding (Sequence, sample number) as they finish, without those that `skip`
    names as (prompt, sample number). With `feed` not all prompts: whenever slots are free,
    feed() -> [(prompt, sample number)] says what comes next, None that nothing does.
    """
    if empty := [i for i, p in enumerate(prompts) if not len(p)]:
        raise ValueError(f"prompt {empty[0]} is empty")
    if (max_new_tokens < 1 or n < 1 or not 0 <= temperature < float("inf")
            or not 0 < top_p <= 1 or top_k < 0 or not 0 <= min_p <= 1
            or not abs(presence_penalty) < float("inf")
            or not 0 < repetition_penalty < float("inf")):
        raise ValueError(
            "sampling needs max_new_tokens >= 1, n >= 1, temperature >= 0, 0 < top_p <= 1, "
            "top_k >= 0, 0 <= min_p <= 1, a finite presence_penalty, repetition_penalty > 0; "
            f"got {max_new_tokens}, {n}, {temperature}, {top_p}, {top_k}, {min_p}, "
            f"{presence_penalty}, {repetition_penalty}")
    if stop_strings and (not decode or not all(stop_strings)):
        raise ValueError("stop_strings must not be empty, and need `decode`")
    device, stop = model.device, frozenset(stop)
    penalties = presence_penalty or repetition_penalty != 1.0
    ids = range(len(prompts)) if ids is None else ids
    queue = deque()
    if feed is None:
        queue.extend((p, sample) for p in range(len(prompts)) for sample in range(n)
                     if (p, sample) not in skip)
        if not queue:
            return
        slots = min(slots, len(queue))
    cache = mixing.Cache(model, slots, max(map(len, prompts)) + max_new_tokens)
    live = []  # one dict a slot, slots 0 .. len(live) - 1
    said = prompted = None  # tokens of each slot's response and prompt, [slots, V]
    if penalties:
        said, prompted = (torch.zeros(slots, len(model.head), dtype=torch.bool, device=device)
                          for _ in range(2))

    while True:
        room = slots - len(live)
        while feed and len(queue) < room:
            if (more := feed()) is None:
                feed = None
            else:
                queue.extend(more)
        if not queue and not live:
            return
        # few, large prefills
        if queue and (not live or room >= min(len(queue), max(slots // 8, 1))):
            new = next_in_line(queue, room, [len(prompt) for prompt in prompts])
            unique = list(dict.fromkeys(p for p, _ in new))
            place = {p: i for i, p in enumerate(unique)}
            lengths = torch.tensor([len(prompts[p]) for p in unique])
            cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
            packed = torch.tensor([t for p in unique for t in prompts[p]])
            which = torch.tensor([place[p] for p, _ in new], device=device)
            slot = torch.arange(len(live), len(live) + len(new), device=device)
            hidden = model.prefill(
                packed.to(device), cu_seqlens.to(device), cache, which, slot)[which]
            rows = [{"prompt": p, "sample": sample, "seed": _seed(seed, ids[p], sample),
                     "length": len(prompts[p]), "tokens": [], "logp": []} for p, sample in new]
            if penalties:
                said[slot] = prompted[slot] = False
                for at, (p, _) in zip(slot.tolist(), new, strict=True):
                    prompted[at, torch.tensor(prompts[p], device=device)] = True
            live += rows
        else:
            rows, slot = live, torch.arange(len(live), device=device)
            tokens = torch.tensor([row["tokens"][-1] for row in rows], device=device)
            cached = [row["length"] for row in rows]
            hidden = model.decode(
                tokens, torch.tensor(cached, device=device), cache, max(cached) + 1)
            for row in rows:
                row["length"] += 1

        uniform = _uniform(torch.tensor([row["seed"] for row in rows]),
                           torch.tensor([len(row["tokens"]) for row in rows]))
        logits = kernels.logits(hidden, model.head)  # [S, V] float32
        tokens, logp = pick(
            logits, uniform.to(device), temperature=temperature, top_p=top_p, top_k=top_k,
            min_p=min_p, penalised=penalise(logits, said[slot], prompted[slot], presence_penalty,
                                            repetition_penalty) if penalties else None)
        if penalties:
            said[slot, tokens] = True
        for row, token, lp in zip(rows, tokens.tolist(), logp.tolist(), strict=True):
            row["tokens"].append(token)
            row["logp"].append(lp)

        stopped = [ends(row["tokens"], stop, stop_strings, decode) for row in live]
        over = [i for i, row in enumerate(live)
                if stopped[i] or len(row["tokens"]) == max_new_tokens]
        for i in over:
            row = live[i]
            yield Sequence(row["prompt"], row["tokens"], row["logp"], stopped[i]), row["sample"]
        if over:  # the last live slots move into the places that became free
            left = len(live) - len(over)
            gone = set(over)
            source, target = ([i for i in range(left, len(live)) if i not in gone],
                              [i for i in over if i < left])
            if source:
                cache.move(source, target, max(live[i]["length"] for i in source))
                if penalties:
                    said[target], prompted[target] = said[source], prompted[source]
            for a, b in zip(source, target, strict=True):
                live[b] = live[a]
            del live[left:]


def next_in_line(queue, room, lengths):
    """Take (prompt, sample) from the queue: at most `room`, of prompts of memory.PREFILL tokens in
    all, or one prompt that is longer.
    """
    new, tokens, last = [], 0, None
    while queue and len(new) < room:
        prompt = queue[0][0]
        if prompt != last:  # samples of one prompt share its prefill
            tokens, last = tokens + lengths[prompt], prompt
            if new and tokens > memory.PREFILL:
                break
        new.append(queue.popleft())
    return new


def ends(tokens, stop, stop_strings, decode):
    """Whether the last token is one of `stop`, or completes one of `stop_strings`."""
    if tokens[-1] in stop or not stop_strings:
        return tokens[-1] in stop
    tail = decode(tokens[-4 * max(map(len, stop_strings)) - 4:])  # a character may take 4 tokens
    return any(string in tail for string in stop_strings)


def penalise(logits, said, prompted, presence, repetition):
    """Logits [S, V] less those of tokens that have occurred: said, prompted [S, V] bool."""
    shrunk = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(said | prompted, shrunk, logits) - presence * said


def pick(logits, uniform, *, temperature, top_p=1.0, top_k=0, min_p=0.0, penalised=None):
    """Draw one token a row: logits [S, V] float32, uniform [S] float64 in [0, 1)
    -> (tokens [S], logp [S]), drawn from the `penalised` logits if there are any; logp is of the
    others.
    """
    logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    drawn = logits if penalised is None else penalised
    p = logp.exp() if penalised is None else torch.softmax(
        penalised / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = drawn.argmax(-1)
    elif top_p == 1.0 and top_k == 0 and min_p == 0.0:
        tokens = _invert(p.double(), uniform)
    else:
        p, order = p.double().sort(dim=-1, descending=True, stable=True)
        drop = torch.zeros_like(p, dtype=torch.bool)
        if top_k:
            drop[:, top_k:] = True
        kept = p.masked_fill(drop, 0.0)
        share = kept / kept.sum(-1, keepdim=True)
        drop |= share.cumsum(-1) - share >= top_p  # the mass before this token already suffices
        drop |= p < min_p * p[:, :1]
        drop[:, 0] = False
        tokens = order.gather(1, _invert(p.masked_fill(drop, 0.0), uniform)[:, None])[:, 0]
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _invert(p, uniform):
    """Index at which the cumulative sum of p [S, V] (not necessarily normalised) passes
    uniform * total.
    """
    total = p.cumsum(-1)
    index = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)[:, 0]
    return index.clamp(max=p.shape[1] - 1)


def _seed(seed, prompt_id, sample):
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{prompt_id}/{sample}".encode(), digest_size=8).digest(),
        "little", signed=True)


def _uniform(seeds, positions):
    """52 random bits in [0, 1) from (sequence seed, position): splitmix64's finaliser.

    int64 [S], [S] -> float64 [S]
    """
    def logical_shift(x, bits):
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping
    x = (x ^ logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return logical_shift(x ^ logical_shift(x, 31), 12).double() * 2.0 ** -52


def default_slots(model, prompts, max_new_tokens, available):
    """How many sequences fit the free GPU memory (9/10 of it), at most MOST_SLOTS and `available`.
    """
    most = min(MOST_SLOTS[model.device.type], available)
    if model.device.type != "cuda":
        return most
    longest = max(map(len, prompts))
    length = longest + max_new_tokens
    one = memory.sampling(model.config, 1, length, longest)
    torch.cuda.empty_cache()  # what torch keeps for reuse is free, too
    free = 0.9 * torch.cuda.mem_get_info(model.device)[0] - memory.forward(
        model.config, max(longest, memory.PREFILL), 2)
    fit = int(free / (one["cache"] + one["draw"]))
    if fit < 1:
        raise ValueError(f"not even one sequence of {length} tokens fits this GPU's memory; "
                         "lower max_new_tokens")
    return min(fit, most)


MOST_SLOTS = {"cpu": 512, "cuda": 1024}


# ---------------------------------------------------------------- collecting a batch


@dataclass(frozen=True)
class Config:
    policy: str = key(help="checkpoint folder to sample from")
    prompts: str = key(help="JSONL file of prompts")
    output: str = key(help="batch folder to write")
    num_prompts: int = key(0, "draw this many prompts by the seed; 0: all, in order (paper: 1000)")
    n: int = key(16, "responses a prompt (paper: 16)")
    max_new_tokens: int = key(32768, "longest response (paper: 32768)")
    temperature: float = key(1.0, "sampling temperature (paper: 0.6, 1.0 for Qwen3.5)")
    top_p: float = key(1.0, "nucleus; below 1, rho = pi_theta / pi_old ignores the truncation")
    top_k: int = key(0, "0: off")
    min_p: float = key(0.0, "0: off")
    stop_tokens: list[int] = key([], "token ids that end a response, beside the model's own")
    stop_strings: list[str] = key([], "texts that end a response, and stay in it")
    seed: int = key(0, "of the choice of prompts and of every sequence")
    problem: str = key("problem", "name of the problem field in the prompts file")
    answer: str = key("answer", "name of the answer field")
    tests: str = key("tests", "name of the field of a program's tests")
    lenient: bool = key(False, "grade unboxed answers too (base models)")
    slots: int = key(0, "sequences decoded at a time; 0: as many as fit")
    prompts_per_shard: int = key(4, "prompts of one file, and what a rank takes at a time")
    chat: runtime.Chat = section(runtime.Chat)
    grading: runtime.Grading = section(runtime.Grading)

    def __post_init__(self):
        for name, least in (("num_prompts", 0), ("n", 1), ("prompts_per_shard", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


def main():
    cfg = options.parse(Config, __doc__)
    ranks = runtime.start()
    rows = rollouts.read_prompts(
        cfg.prompts, problem=cfg.problem, answer=cfg.answer, tests=cfg.tests)
    if any("tests" in row for row in rows):
        ranks.print(f"programs: {sandbox.check(cfg.grading.allow_unsandboxed)}")
    if cfg.num_prompts > len(rows):
        raise ValueError(
            f"{cfg.prompts}: num_prompts = {cfg.num_prompts}, but the file has {len(rows)}")
    chosen = sorted(random.Random(f"prompts-{cfg.seed}").sample(
        range(len(rows)), cfg.num_prompts or len(rows)))
    shards = [chosen[i:i + cfg.prompts_per_shard]
              for i in range(0, len(chosen), cfg.prompts_per_shard)]
    header = {"policy": cfg.policy, "fingerprint": runtime.fingerprint(cfg.policy, ranks),
              "prompts": cfg.prompts,
              "prompts_digest": hashlib.sha256(Path(cfg.prompts).read_bytes()).hexdigest()[:16],
              "shards": len(shards), "source": "sample", "chat": asdict(cfg.chat),
              "grading": {name: value for name, value in asdict(cfg.grading).items()
                          if "workers" not in name},
              **{name: getattr(cfg, name) for name in (
                  "num_prompts", "n", "max_new_tokens", "temperature", "top_p", "top_k", "min_p",
                  "stop_tokens", "stop_strings", "seed", "problem", "answer", "tests", "lenient",
                  "prompts_per_shard")}}
    if cfg.temperature == 0:
        raise ValueError("temperature 0 (greedy) makes n equal responses without log-probs: "
                         "no batch to learn from")

    runtime.lock(cfg.output, ranks)
    wanted = {"format": rollouts.FORMAT, **header}
    for file in sorted(Path(cfg.output).glob("shard-*.safetensors")):
        there = rollouts.read_header(file)
        if differ := sorted(k for k in {*there, *wanted} if there.get(k) != wanted.get(k)):
            k = differ[0]
            raise ValueError(f"{file}: sampled with {k} = {there.get(k)!r:.80}, "
                             f"now {wanted.get(k)!r:.80}; "
                             "choose another output")
    dist.barrier()
    todo = ranks.agree([s for s in range(len(shards))  # one counter needs one list
                        if not rollouts.shard_file(cfg.output, s).is_file()])
    if todo:
        collect(cfg, ranks, rows, shards, todo, header)
    dist.barrier()
    if ranks.rank == 0:
        batch = rollouts.load(cfg.output)
        print(f"{cfg.output}: {len(batch)} rollouts, mean reward {batch.reward.nanmean():.3f}, "
              f"{int(batch.reward.isnan().sum())} undecided, "
              f"{int((~batch.finished).sum())} truncated, "
              f"mean length {batch.response_length.float().mean():.1f}", flush=True)


def check_prompts(rows, prompts, tokenizer, vocab, stop_tokens=()):
    """ValueError, before anything is sampled, where the tokenizer is not the model's, a prompt is
    longer than what the model is made for, or a stop token is none.
    """
    rollouts.check_tokens("stop_tokens", stop_tokens, vocab, tokenizer.path)
    config = hf.read_json(tokenizer.path / "config.json")
    context = (config.get("text_config") or config).get("max_position_embeddings")
    for row, tokens in zip(rows, prompts, strict=True):
        rollouts.check_tokens(row["place"], tokens, vocab, tokenizer.path)
        if durable.number(context, 1) and len(tokens) >= context:
            raise ValueError(f"{row['place']}: the prompt has {len(tokens)} tokens, "
                             f"and the model is made for {context}")
    rollouts.check_tokens(f"{tokenizer.path}/generation_config.json: eos_token_id",
                          list(tokenizer.stop), vocab, tokenizer.path)


def collect(cfg, ranks, rows, shards, todo, header):
    """Sample, grade and write the shards `todo` together with the other ranks."""
    tokenizer = models.Tokenizer(cfg.policy)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    model = models.load(cfg.policy, dtype=dtype, device=ranks.device)
    order = [row for s in todo for row in shards[s]]
    prompts = [rollouts.prompt_tokens(tokenizer, rows[row], **asdict(cfg.chat)) for row in order]
    check_prompts([rows[row] for row in order], prompts, tokenizer, model.config.vocab,
                  cfg.stop_tokens)
    place = {row: p for p, row in enumerate(order)}
    total, share = len(prompts) * cfg.n, -(-len(prompts) * cfg.n // ranks.world)
    slots = min(cfg.slots or default_slots(model, prompts, cfg.max_new_tokens, share), share)
    longest = max(map(len, prompts))
    ranks.print(memory.text(memory.sampling(model.config, slots, longest + cfg.max_new_tokens,
                                            longest, device=ranks.device.type)))
    shard_of = {row: s for s in todo for row in shards[s]}
    journal, found = {}, {}  # of the shards that this rank has taken and not written yet
    rewards, writing, clipped = [], [], 0
    began, tokens, seen = time.perf_counter(), 0, 0
    progress = tqdm(total=total, desc=f"sampling ({ranks.world} rank(s), {slots} slots each)",
                    unit="seq", disable=ranks.rank != 0, mininterval=5)

    def add(s, row, sample, sequence):
        nonlocal seen
        found[s][row, sample] = sequence
        seen = ranks.store.add("sampled", 1)  # of all ranks
        if len(found[s]) == len(shards[s]) * cfg.n:
            writing.append(beside.submit(finish, s, sorted(found.pop(s).items())))

    def take():
        """The next shard that nobody has taken: what is left to sample of it."""
        if (i := ranks.store.add("taken", 1) - 1) >= len(todo):
            return None
        s = todo[i]
        known = journal[s] = rollouts.Journal(cfg.output, s, header, shards[s], cfg.n,
                                              cfg.max_new_tokens, model.config.vocab)
        found[s] = {}
        for (row, sample), entry in known.entries.items():
            add(s, row, sample, Sequence(place[row], *entry))
        return [(place[row], sample) for row in shards[s] for sample in range(cfg.n)
                if (row, sample) not in known.entries]

    def finish(s, done):
        """Grade a shard and write it."""
        reward = rollouts.rewards(
            [rows[row] for (row, _), _ in done], [tokenizer.decode(q.tokens) for _, q in done],
            lenient=cfg.lenient, **asdict(cfg.grading))
        starts = [prompts[q.prompt] for _, q in done]
        rollouts.write_shard(
            cfg.output, s, header,
            tokens=[p + q.tokens for p, (_, q) in zip(starts, done, strict=True)],
            prompt_length=[len(p) for p in starts], prompt=[row for (row, _), _ in done],
            reward=reward, finished=[q.finished for _, q in done],
            sampler_logp=[[0.0] * len(p) + q.logp for p, (_, q) in zip(starts, done, strict=True)])
        journal.pop(s).remove()
        rewards.extend(r for r in reward if r is not None)

    with ThreadPoolExecutor(1) as beside:
        for sequence, sample in stream(
                model, prompts, n=cfg.n, max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k, min_p=cfg.min_p,
                stop=(*tokenizer.stop, *cfg.stop_tokens), stop_strings=cfg.stop_strings,
                decode=partial(tokenizer.decode, special=True), seed=cfg.seed, slots=slots,
                ids=order, feed=take):
            row = order[sequence.prompt]
            s = shard_of[row]
            journal[s].add(row, sample, *sequence[1:])
            add(s, row, sample, sequence)
            tokens, clipped = tokens + len(sequence.tokens), clipped + (not sequence.finished)
            progress.update(seen - progress.n)
            progress.set_postfix_str(
                f"{tokens / (time.perf_counter() - began):.0f} tokens/s a rank, mean reward "
                f"{sum(rewards) / max(len(rewards), 1):.3f}, truncated {clipped}", refresh=False)
            while writing and writing[0].done():
                writing.pop(0).result()
    for written in writing:
        written.result()
    progress.update(total - progress.n)
    progress.close()


if __name__ == "__main__":
    runtime.command(main)
