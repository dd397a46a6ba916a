"""sample.py - rollouts: a KV-cache sampler with continuous batching, and the collector of the
fixed batch.

A slot holds one growing sequence; its keys and values lie in pages that it takes as it grows
(mixing.Cache). Each turn of the loop either fills free slots or decodes some tokens for every live
slot. A prompt runs once, its samples share what it leaves behind. A finished sequence leaves, the
last live slot moves into its place, and the next prompt takes the room: the batch stays full until
the queue is empty. Where pages run out, the youngest sequence waits: it gives its pages back and
later goes on from the tokens it has.

What a step needs and changes (tokens, lengths, who is done) lives on the device, in `Slots`. On a
GPU the whole step, from embedding to the drawn token, is one CUDA graph for each batch size, run
LOOK times before the host looks at what was drawn (decoding.py has its kernels).

Randomness is a function of (seed, prompt id, sample number, position) alone: a token is drawn by
inverting the cumulative distribution at a hashed uniform number. So a sequence does not depend on
its neighbours, slots, ranks or on where a run was interrupted (up to rounding: a different batch
shape may change the last bits of a logit, which on a GPU, in bfloat16, tips a draw now and then).

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
import math
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import decoding
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

LOOK = {"cpu": 2, "cuda": 8}  # steps between two looks of the host


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
             seed=0, slots=256, pages=0, ids=None, progress=False, watch=None):
    """Sample n responses to each of `prompts` (lists of token ids) -> list of Sequence,
    prompt by prompt.

    max_new_tokens is one number, or one a prompt. temperature 0 is greedy (its logp is at
    temperature 1). Truncation in this order: top_k (0: off), top_p, min_p (relative to the
    likeliest token); the likeliest token always stays. Before it, presence_penalty is taken off the
    logits of tokens that the response has already, and logits of those that it or the prompt has
    are divided by repetition_penalty (multiplied below 0). `stop` token ids end a response and
    belong to it, as does what completes one of `stop_strings`, for which decode(tokens) -> text is
    needed. `ids` identify the prompts to the random numbers (default: their places). `slots`
    sequences are decoded at a time in `pages` of the cache (0: enough for all of them at their
    longest); neither changes a token, but where a draw falls on the border of two, to rounding.
    `progress` shows a bar; watch(live, waiting) is called before every LOOK steps. ValueError on an
    empty prompt, or pages too few for one sequence.
    """
    settings = dict(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    top_k=top_k, min_p=min_p, presence_penalty=presence_penalty,
                    repetition_penalty=repetition_penalty, stop=stop, stop_strings=stop_strings,
                    decode=decode, seed=seed, slots=slots, pages=pages, ids=ids, watch=watch)
    drawn = tqdm(stream(model, prompts, **settings), total=len(prompts) * n, unit="seq",
                 disable=not progress, mininterval=5, leave=False, delay=10)
    finished = {(s.prompt, sample): s for s, sample in drawn}
    return [finished[place] for place in sorted(finished)]


@dataclass
class Slots:
    """What a decode step reads and writes, on the device, a row a slot."""

    token: torch.Tensor    # [S] the last token, not yet in the cache
    length: torch.Tensor   # [S] tokens in the cache
    count: torch.Tensor    # [S] tokens of the response
    limit: torch.Tensor    # [S] that it may have
    seed: torch.Tensor     # [S]
    uniform: torch.Tensor  # [S, LOOK] of the next draws
    done: torch.Tensor     # [S] bool: nothing more is drawn
    tokens: torch.Tensor   # [S, LOOK] drawn since the host looked
    logp: torch.Tensor     # [S, LOOK]
    column: torch.Tensor   # [1] where the next ones go
    said: torch.Tensor     # [S, V] bool: tokens of the response, [S, 0] where nothing asks
    prompted: torch.Tensor  # [S, V] bool: of the prompt

    @classmethod
    def empty(cls, slots, V, look, device):
        def rows(*shape, dtype=torch.long):
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        return cls(*(rows() for _ in range(5)), rows(look, dtype=torch.float64),
                   rows(dtype=torch.bool) | True, rows(look),
                   rows(look, dtype=torch.float32), torch.zeros(1, dtype=torch.long, device=device),
                   rows(V, dtype=torch.bool), rows(V, dtype=torch.bool))

    def move(self, source, target):
        """Rows `source` take the places of rows `target` (lists)."""
        for field in fields(self):
            if field.name != "column":
                column = getattr(self, field.name)
                column[target] = column[source]


@torch.no_grad()
def stream(model, prompts, *, n, max_new_tokens, temperature, top_p, top_k, min_p, stop, seed,
           slots, pages=0, presence_penalty=0.0, repetition_penalty=1.0, stop_strings=(),
           decode=None, ids=None, skip=frozenset(), feed=None, watch=None):
    """`generate`, yielding (Sequence, sample number) as they finish, without those that `skip`
    names as (prompt, sample number). With `feed` not all prompts: whenever slots are free,
    feed() -> [(prompt, sample number)] says what comes next, None that nothing does.
    """
    limits = ([max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int)
              else list(max_new_tokens))
    if empty := [i for i, p in enumerate(prompts) if not len(p)]:
        raise ValueError(f"prompt {empty[0]} is empty")
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} max_new_tokens for {len(prompts)} prompts")
    if (min(limits, default=1) < 1 or n < 1 or not 0 <= temperature < float("inf")
            or not 0 < top_p <= 1 or top_k < 0 or not 0 <= min_p <= 1
            or not abs(presence_penalty) < float("inf")
            or not 0 < repetition_penalty < float("inf")):
        raise ValueError(
            "sampling needs max_new_tokens >= 1, n >= 1, temperature >= 0, 0 < top_p <= 1, "
            "top_k >= 0, 0 <= min_p <= 1, a finite presence_penalty, repetition_penalty > 0; "
            f"got {min(limits, default=1)}, {n}, {temperature}, {top_p}, {top_k}, {min_p}, "
            f"{presence_penalty}, {repetition_penalty}")
    if stop_strings and (not decode or not all(stop_strings)):
        raise ValueError("stop_strings must not be empty, and need `decode`")
    device, stop = model.device, frozenset(stop)
    ids = range(len(prompts)) if ids is None else ids
    queue, begun = deque(), {}  # begun: (prompt, sample number) -> row, of sequences that wait
    if feed is None:
        queue.extend((p, sample) for p in range(len(prompts)) for sample in range(n)
                     if (p, sample) not in skip)
        if not queue:
            return
        slots = min(slots, len(queue))
    longest = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    if device.type == "cuda":
        decoding.fuse(model)  # before the cache takes what memory there is
    cache = mixing.Cache(model, slots, longest, pages)
    if not 0 < -(-longest // cache.page) <= len(cache.free):
        raise ValueError(f"{len(cache.free)} pages of {cache.page} tokens do not hold one sequence "
                         f"of {longest}")
    penalties = presence_penalty or repetition_penalty != 1.0
    look = LOOK[device.type]
    state = Slots.empty(slots, len(model.head) if penalties else 0, look, device)
    stops = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    ahead = torch.arange(look, device=device)
    live = []  # one dict a slot, slots 0 .. len(live) - 1

    def draw(hidden, rows, uniform):
        """Draw the next token of `rows` (a slice of the slots) from their hidden states [S, H]."""
        logits = kernels.logits(hidden, model.head)  # [S, V] float32
        tokens, logp = (decoding.draw if device.type == "cuda" else pick)(
            logits, uniform, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            penalised=penalise(logits, state.said[rows], state.prompted[rows], presence_penalty,
                               repetition_penalty) if penalties else None)
        going = ~state.done[rows]
        if penalties:
            state.said[rows].scatter_(1, tokens[:, None], True)
        state.token[rows] = torch.where(going, tokens, state.token[rows])
        state.tokens[rows].index_copy_(1, state.column, tokens[:, None])
        state.logp[rows].index_copy_(1, state.column, logp[:, None])
        state.count[rows] += going
        state.done[rows] |= (state.count[rows] >= state.limit[rows]) | (
            tokens[:, None] == stops).any(1)

    def step(S):
        """A token for each of the first S slots that are not done; all of it on the device."""
        rows = slice(0, S)
        one_more = decoding.forward if device.type == "cuda" else type(model).decode
        hidden = one_more(model, state.token[rows], state.length[rows], cache)
        state.length[rows] += ~state.done[rows]
        draw(hidden, rows, state.uniform[rows].index_select(1, state.column)[:, 0])
        state.column += 1

    def collect(rows, at, steps):
        """Take over what was drawn for `rows`, from slot `at` on, in so many steps."""
        here = slice(at, at + len(rows))
        drawn, logps = state.tokens[here, :steps].tolist(), state.logp[here, :steps].tolist()
        counts = state.count[here].tolist()
        for row, tokens, logp, count in zip(rows, drawn, logps, counts, strict=True):
            new = count - len(row["tokens"])
            row["tokens"] += tokens[:new]
            row["logp"] += logp[:new]
            row["stopped"] = row["tokens"][-1] in stop
            for end in range(count - new + 1, count + 1) if stop_strings else ():
                if completes(row["tokens"][:end], stop_strings, decode):
                    row["stopped"] = True  # the device does not know, and has gone on
                    del row["tokens"][end:], row["logp"][end:]
                    break
        state.column.zero_()

    def leave(gone):
        """Free the slots `gone`; the last live ones move into their places."""
        for i in gone:
            cache.release(i)
        gone, left = set(gone), len(live) - len(gone)
        source, target = ([i for i in range(left, len(live)) if i not in gone],
                          [i for i in gone if i < left])
        for a, b in zip(source, target, strict=True):
            cache.move(a, b)
            live[b] = live[a]
        if source:
            state.move(source, target)
        state.done[left:], state.length[left:] = True, 0
        del live[left:]

    if device.type == "cuda":
        step = recorded(step)
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
        new = []
        if queue and (not live or room >= min(len(queue), max(slots // 8, 1))):
            new = admit(cache, queue, begun, prompts, limits, live, slots, look)
        if new:
            at, here = len(live), slice(len(live), len(live) + len(new))
            for row in new:
                row.setdefault("seed", _seed(seed, ids[row["prompt"]], row["sample"]))
            columns = torch.tensor([
                (len(prompts[row["prompt"]]) + len(row["tokens"]), len(row["tokens"]),
                 limits[row["prompt"]], row["seed"]) for row in new], device=device).T
            state.length[here], state.count[here], state.limit[here], state.seed[here] = columns
            state.done[here] = False
            if penalties:
                state.said[here] = state.prompted[here] = False
                for i, row in enumerate(new, at):
                    state.prompted[i, torch.tensor(prompts[row["prompt"]], device=device)] = True
                    state.said[i, torch.tensor(row["tokens"], dtype=torch.long,
                                               device=device)] = True
            draw(prefill(model, cache, prompts, new, at), here,
                 _uniform(state.seed[here], state.count[here]))
            live += new
            collect(new, at, 1)
        else:
            steps = min(look, max(limits[row["prompt"]] - len(row["tokens"]) for row in live))
            waiting = make_room(cache, live, prompts, limits, steps)
            for i in waiting:
                begun[live[i]["prompt"], live[i]["sample"]] = live[i]
                queue.appendleft((live[i]["prompt"], live[i]["sample"]))
            if waiting:
                leave(waiting)
            cache.sync()
            state.uniform.copy_(_uniform(state.seed[:, None], state.count[:, None] + ahead))
            if watch:
                watch(len(live), len(queue))
            for _ in range(steps):
                step(batch_size(len(live), slots, device.type))
            collect(live, 0, steps)

        over = [i for i, row in enumerate(live)
                if row["stopped"] or len(row["tokens"]) == limits[row["prompt"]]]
        for i in over:
            row = live[i]
            yield (Sequence(row["prompt"], row["tokens"], row["logp"], row["stopped"]),
                   row["sample"])
        if over:
            leave(over)


def admit(cache, queue, begun, prompts, limits, live, slots, look):
    """Take sequences from the queue into the slots after the live ones, with pages for what they
    have and the next `look` tokens -> their rows. At most memory.PREFILL tokens of prompts, or one
    that is longer. A page stays in reserve for every other sequence that may need one more.
    """
    def most(p):
        return -(-(len(prompts[p]) + limits[p]) // cache.page)

    at, rows, tokens, source = len(live), [], 0, None
    reserve = sum(most(row["prompt"]) > len(cache.held[i]) for i, row in enumerate(live))
    while queue and at + len(rows) < slots:
        p, sample = queue[0]
        row = begun.get((p, sample)) or {"prompt": p, "sample": sample, "tokens": [], "logp": [],
                                         "stopped": False}
        length, slot = len(prompts[p]) + len(row["tokens"]), at + len(rows)
        # samples of one prompt share its prefill
        shared = source is not None and rows[source]["prompt"] == p and not row["tokens"]
        if not shared:
            tokens += length
            if rows and tokens > memory.PREFILL:
                break
        needed = min(-(-(length + look) // cache.page), most(p))
        if slot and needed - (length // cache.page if shared else 0) + reserve > len(cache.free):
            break
        queue.popleft()
        begun.pop((p, sample), None)
        row["from"] = at + source if shared else slot
        if shared:
            cache.share(at + source, slot, length)
        else:
            cache.grow(slot, length)
            source = None if row["tokens"] else len(rows)
        reserve += most(p) > len(cache.held[slot])
        rows.append(row)
    return rows


def prefill(model, cache, prompts, rows, at):
    """Run the prompts (and what waiting sequences have already) of the rows for slots `at` and on
    -> the hidden state of each row's last token [N, H].
    """
    device = model.device
    texts = {slot: [*prompts[row["prompt"]], *row["tokens"]]
             for slot, row in enumerate(rows, at) if row["from"] == slot}
    cache.sync()
    short = {slot: text for slot, text in texts.items() if len(text) <= memory.PREFILL}
    hidden = {}
    if short:
        bounds = torch.tensor([0, *accumulate(map(len, short.values()))])
        packed = torch.tensor([t for text in short.values() for t in text], device=device)
        last = model.prefill(packed, bounds, cache, torch.tensor(list(short), device=device))
        hidden = dict(zip(short, last, strict=True))
    for slot in texts.keys() - short.keys():  # piece by piece, so that memory stays bounded
        pieces = torch.tensor(texts[slot], device=device).split(memory.PREFILL)
        last = model.prefill(pieces[0], torch.tensor([0, len(pieces[0])]), cache,
                             torch.tensor([slot], device=device))
        for i, piece in enumerate(pieces[1:], 1):
            last = model.go_on(piece, cache, slot, i * memory.PREFILL)
        hidden[slot] = last[0]
    cache.copy([(row["from"], slot, len(texts[row["from"]]))
                for slot, row in enumerate(rows, at) if row["from"] != slot])
    return torch.stack([hidden[row["from"]] for row in rows])


def make_room(cache, live, prompts, limits, steps):
    """Give every live slot pages for `steps` more tokens -> the slots that must wait instead, the
    youngest first.
    """
    wanted = [len(prompts[row["prompt"]]) + min(len(row["tokens"]) + steps, limits[row["prompt"]])
              for row in live]
    if not (short := [i for i, length in enumerate(wanted) if length > cache.room(i)]):
        return []

    def age(i):
        return len(live[i]["tokens"]), -i

    waiting = []
    for i in sorted(short, key=age, reverse=True):
        while i not in waiting and not cache.grow(i, wanted[i]):
            waiting.append(min(set(range(len(live))) - set(waiting), key=age))
            cache.release(waiting[-1])
    return waiting


def recorded(step):
    """step(S), as a CUDA graph for each S. The first time it runs as it is: Triton compiles, cuBLAS
    picks its kernels. The second time it is recorded, from then on replayed. All graphs live and
    die together: torch may free what cuBLAS works in, which they share, when one of them goes.
    """
    graphs, pool = {}, torch.cuda.graph_pool_handle()

    def run(S):
        if S not in graphs:
            graphs[S] = None
            return step(S)
        if graphs[S] is None:
            graphs[S] = torch.cuda.CUDAGraph()
            # other threads (NCCL's, the grader's) may go about their business meanwhile
            with torch.cuda.graph(graphs[S], pool=pool, capture_error_mode="thread_local"):
                step(S)
        graphs[S].replay()

    return run


def batch_size(live, slots, device):
    """Rows to compute for so many live slots: on a GPU one of a few numbers, each with its graph.
    """
    if device != "cuda":
        return live
    unit = max(1, (1 << (live - 1).bit_length()) // 4)  # powers of two, and 3/4 of them
    return min(-(-live // unit) * unit, slots)


def completes(tokens, stop_strings, decode):
    """Whether the last token completes one of `stop_strings`."""
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

    int64, int64 of shapes that broadcast -> float64
    """
    def logical_shift(x, bits):
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping
    x = (x ^ logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return logical_shift(x ^ logical_shift(x, 31), 12).double() * 2.0 ** -52


def capacity(model, prompts, max_new_tokens, wanted, slots=0):
    """(slots, pages) for `wanted` sequences: at most `slots` (0: MOST_SLOTS) at a time, and on a
    GPU the pages that 9/10 of its free memory hold (elsewhere 0: enough for all at their longest).
    """
    kind = model.device.type
    slots = min(slots or MOST_SLOTS[kind], wanted)
    if kind != "cuda":
        return slots, 0
    longest, size = max(map(len, prompts)), mixing.PAGE[kind]
    length = longest + max_new_tokens
    parts = memory.sampling(model.config, slots, length, longest, tokens=slots)
    decoding.fuse(model)
    torch.cuda.empty_cache()  # what torch keeps for reuse is free, too
    free = 0.9 * torch.cuda.mem_get_info(model.device)[0] - (
        parts["peak"] - parts["weights"] - parts["reserve"])
    page = mixing.Cache.bytes(model.config, 0, size, torch.bfloat16)
    most = slots * -(-length // size)  # as many as can ever be needed
    pages = min(most, int(free / page)) if page else most
    if pages * size < length:
        raise ValueError(f"not even one sequence of {length} tokens fits this GPU's memory beside "
                         f"{slots} slots; lower max_new_tokens, or slots")
    return slots, pages


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
        for name, bounds in (("num_prompts", dict(least=0)), ("n", dict(least=1)),
                             ("max_new_tokens", dict(least=1)), ("temperature", dict(least=0)),
                             ("top_p", dict(above=0, most=1)), ("top_k", dict(least=0)),
                             ("min_p", dict(least=0, most=1)), ("slots", dict(least=0)),
                             ("prompts_per_shard", dict(least=1))):
            options.in_range(name, getattr(self, name), **bounds)


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


def context(path):
    """The number of tokens that a checkpoint is made for; inf where it does not say."""
    config = hf.read_json(Path(path) / "config.json")
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    return limit if durable.number(limit, 1) else math.inf


def check_prompts(rows, prompts, tokenizer, vocab, stop_tokens=()):
    """ValueError, before anything is sampled, where the tokenizer is not the model's, a prompt is
    longer than what the model is made for, or a stop token is none.
    """
    rollouts.check_tokens("stop_tokens", stop_tokens, vocab, tokenizer.path)
    limit = context(tokenizer.path)
    for row, tokens in zip(rows, prompts, strict=True):
        rollouts.check_tokens(row["place"], tokens, vocab, tokenizer.path)
        if len(tokens) >= limit:
            raise ValueError(f"{row['place']}: the prompt has {len(tokens)} tokens, "
                             f"and the model is made for {limit}")
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
    slots, pages = capacity(model, prompts, cfg.max_new_tokens, share, cfg.slots)
    longest = max(map(len, prompts))
    if longest + cfg.max_new_tokens > context(cfg.policy):
        ranks.print(f"note: sequences may have {longest + cfg.max_new_tokens} tokens, and the "
                    f"model is made for {context(cfg.policy)}: lower max_new_tokens")
    if not (tokenizer.stop or cfg.stop_tokens or cfg.stop_strings):
        ranks.print("note: the checkpoint names no token that ends a response (eos_token_id), and "
                    "neither does stop_tokens: all will be truncated")
    ranks.print(memory.text(memory.sampling(
        model.config, slots, longest + cfg.max_new_tokens, longest, device=ranks.device.type,
        tokens=pages * mixing.PAGE[ranks.device.type])))
    shard_of = {row: s for s in todo for row in shards[s]}
    journal, found = {}, {}  # of the shards that this rank has taken and not written yet
    rewards, writing, drawn, clipped = [], [], 0, 0
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
            [rows[row] for (row, _), _ in done],
            [rollouts.graded_text(tokenizer, prompts[q.prompt], q.tokens) for _, q in done],
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
                pages=pages, ids=order, feed=take):
            row = order[sequence.prompt]
            s = shard_of[row]
            journal[s].add(row, sample, *sequence[1:])
            add(s, row, sample, sequence)
            drawn, clipped = drawn + 1, clipped + (not sequence.finished)
            tokens += len(sequence.tokens)
            progress.update(seen - progress.n)
            progress.set_postfix_str(
                f"{tokens / (time.perf_counter() - began):.0f} tokens/s a rank, mean reward "
                f"{sum(rewards) / max(len(rewards), 1):.3f}, truncated {clipped / drawn:.1%}",
                refresh=False)
            while writing and writing[0].done():
                writing.pop(0).result()
    for written in writing:
        written.result()
    progress.update(total - progress.n)
    progress.close()


if __name__ == "__main__":
    runtime.command(main)
