"""runtime.py - what is mechanical in every run: torchrun, FSDP2, optimiser, metrics, checkpoint
and resume.

Nothing here knows the algorithm; stage1.py and stage2.py are the loops, these are the tools they
pick up.

Ranks     torchrun's environment (or one process on its own) -> process group, device, mesh.
Policy    weights in float32, sharded by FSDP2 over a node's ranks (replicated over nodes),
          computed in bfloat16 on a GPU and in float32 on a CPU. Gradients are summed over ranks,
          losses are divided by global counts: the number of ranks changes nothing but the speed.
Run       a folder: run.json (config, inputs, environment), config.toml, metrics.jsonl,
          step_000016/ ... (Hugging Face checkpoints), state/ (the latest resume state), done.json.
          Everything appears whole or not at all; a killed run started again goes on from its last
          checkpoint, at the same world size and on a CPU bit for bit.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import durable
import memory
import model as models
import options
import resume
from options import key

# keys of [train] that change how a result is computed, and nothing of it but rounding
FREE = ("max_tokens", "recompute", "keep_attention", "compile", "replicas")
SHOWN = ("loss", "p_positive", "p_negative", "kl_reverse", "entropy", "clip_low", "clip_high",
         "grad_norm", "tokens_per_second")  # a stage's console line; metrics.jsonl has them all

# ---------------------------------------------------------------- commands


def command(main):
    """Run a command's main(): bad input (ValueError), trouble with a file (OSError), too little
    memory and the loss of another rank become one clear line and exit status 2. What is none of
    these is a mistake of ours and keeps its traceback.
    """
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate mem" in str(error):
            text = (f"error: out of memory: {str(error).partition('. ')[0]}. Lower train.max_tokens"
                    " (in sampling slots or max_new_tokens, in an evaluation also max_tokens); "
                    "`python plan.py` says what fits")
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            text = "stopped: another rank is gone"
        elif isinstance(error, RuntimeError):
            raise
        else:
            text = f"error: {error}"
        if os.environ.get("ERPD_TRACEBACK"):
            raise
        print(f"{text}\n(ERPD_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # other ranks may be waiting in a collective: leave at once, torchrun ends them
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; torch's threads may abort while the interpreter is taken down


def end_with_parent():
    """Have the kernel send this process SIGTERM when the one that started it dies (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lock(folder, ranks):
    """Let one run at a time write into a folder; the kernel lets go when the process ends.

    An earlier run that was told to stop may still be saving: wait for it. ValueError after that.
    """
    if ranks.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "w")  # open until the process ends
        for second in range(LOCK_SECONDS + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == 0:
                    ranks.print(f"{folder}: another run writes here; waiting for it to end")
                if second == LOCK_SECONDS:
                    raise ValueError(f"{folder}: another run is writing here; stop it, or choose "
                                     "another output") from None
                time.sleep(1)
        _locks.append(file)
    dist.barrier()


def unlock():
    while _locks:
        _locks.pop().close()


LOCK_SECONDS, _locks = 120, []


@dataclass(frozen=True)
class Chat:
    """The [chat] section of sample.py and evaluate.py: how a problem becomes a prompt."""

    template: str = key("{problem}", "text around the problem, the user's turn")
    system: str = key("", "system message; empty: what the chat template puts there, if anything")
    variables: dict[str, object] = key(
        {}, "the chat template's own switches, { enable_thinking = false } say")
    prefix: str = key("", "how every answer begins, '<think>\\n' say; part of the prompt, added "
                          "where the chat template does not put it there")


@dataclass(frozen=True)
class Grading:
    """The [grading] section of sample.py and evaluate.py: how responses become rewards."""

    workers: int = key(2, "processes that grade answers; 0: this one, without the last net")
    seconds: int = key(5, "CPU time of one answer in such a process; beyond it: undecided")
    code_seconds: float = key(6.0, "CPU time of one test of a program (LiveCodeBench)")
    code_memory_mb: int = key(1024, "memory of a program")
    code_workers: int = key(0, "programs a rank runs at a time; 0: its share of the node's cores")
    allow_unsandboxed: bool = key(False, "run programs where the kernel grants no isolation, too")

    def __post_init__(self):
        for name in ("workers", "code_workers"):
            options.in_range(f"grading.{name}", getattr(self, name), least=0, most=1024)
        for name in ("seconds", "code_seconds", "code_memory_mb"):
            options.in_range(f"grading.{name}", getattr(self, name), above=0, most=1e6)


@dataclass(frozen=True)
class Train:
    """The [train] section of both stages."""

    prompts_per_step: int = key(32, "prompts of a minibatch, with all their responses "
                                    "(paper: 32, 64 or 256)")
    lr: float = key(1e-6, "learning rate, constant after warm-up (paper, inferred)")
    warmup: int = key(5, "steps of linear warm-up (ours)")
    betas: list[float] = key([0.9, 0.95], "AdamW (ours)")
    weight_decay: float = key(0.0, "AdamW (ours)")
    clip: float = key(1.0, "largest gradient norm (ours)")
    spike: float = key(10.0, "report a step whose gradient norm is this many times the median of "
                             "the 16 before it; 0: never (ours)")
    skip_spikes: bool = key(False, "leave out the update of such a step")
    seed: int = key(0, "order of the prompts")
    max_tokens: int = key(32768, "tokens of a micro-batch on one rank; changes memory and speed, "
                                 "not the result")
    recompute: bool = key(True, "activation checkpointing by layer: keep a layer's input, run it "
                                "again for its gradient")
    keep_attention: bool = key(False, "recompute all of a layer but attention, whose inputs and "
                                      "output are kept: faster on long responses, more memory")
    compile: bool = key(False, "torch.compile what lies between a layer's matrix products: faster "
                               "on a GPU after a minute")
    replicas: int = key(0, "copies of the weights over all ranks; 0: one a node")
    checkpoint_every: int = key(16, "steps between checkpoints; the last step always has one")
    checkpoint_at: list[int] = key([], "further steps to keep a checkpoint of")

    def __post_init__(self):
        for name in ("prompts_per_step", "max_tokens", "checkpoint_every", "lr", "clip"):
            options.in_range(f"train.{name}", getattr(self, name), above=0)
        for name in ("warmup", "weight_decay", "replicas", "spike", "seed"):
            options.in_range(f"train.{name}", getattr(self, name), least=0)
        options.in_range("train.seed", self.seed, most=2**40)
        for step in self.checkpoint_at:
            options.in_range("train.checkpoint_at", step, least=1)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be two numbers in [0, 1), not {self.betas}")


def check_average(section, prefix):
    """ValueError unless the `average` and `fixed_length` keys of either stage fit together."""
    options.one_of(f"{prefix}.average", section.average, ("token", "sequence", "fixed"))
    if section.average == "fixed" and section.fixed_length < 1:
        raise ValueError(f"{prefix}.average = fixed needs {prefix}.fixed_length, "
                         "the constant number of tokens to divide by")


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: rank of world, its device, and the mesh FSDP2 shards over."""

    rank: int
    world: int
    device: torch.device
    mesh: object
    store: object  # keys and counters that all ranks share
    fingerprints: dict = dataclasses.field(default_factory=dict)  # of the folders asked for so far

    def print(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def note_unread(self, prefix, section, unread):
        """Say which given keys nothing looks at: no option is silently ignored."""
        for name in options.given_unread(section, unread):
            self.print(f"note: {prefix}.{name} is given, but these settings do not read it")

    def agree(self, value):
        """Rank 0's value, on every rank: what decides over a collective is decided once."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, tensor):
        """Concatenate a 1-D tensor of every rank (lengths may differ), in rank order,
        on this device.
        """
        if self.world == 1:
            return tensor
        sizes = torch.zeros(self.world, dtype=torch.long, device=self.device)
        sizes[self.rank] = len(tensor)
        dist.all_reduce(sizes)
        padded = tensor.new_zeros(int(sizes.max()))
        padded[:len(tensor)] = tensor
        pieces = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:n] for piece, n in zip(pieces, sizes.tolist(), strict=True)])


def start(replicas=0):
    """Join the process group that torchrun set up, or make one of a single process. Returns Ranks.

    `replicas` copies of the weights are kept, each sharded over world / replicas ranks;
    0: one a node.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local, per_node = (int(os.environ.get("LOCAL_RANK", 0)),
                       int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    unlock()  # of a command that this process ran before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # or a killed torchrun would leave its workers writing
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(143)  # it was killed before this process got here
    wait = timedelta(days=7)  # a rank that is done with its prompts waits for the slowest
    if world > 1:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        store.set_timeout(wait)
        if per_node == world:  # torchrun --max-restarts keeps the store, with the dead ranks' names
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=wait)
    replicas = replicas or world // per_node
    if world % replicas:
        raise ValueError(f"replicas = {replicas} does not divide {world} ranks")
    if replicas > 1:
        mesh = init_device_mesh(device.type, (replicas, world // replicas),
                                mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    ranks = Ranks(rank, world, device, mesh, store)
    start = ranks.agree(os.urandom(8).hex())  # a restart counts anew
    return dataclasses.replace(ranks, store=dist.PrefixStore(start, store))


# ---------------------------------------------------------------- policy and optimiser


def policy(path, ranks, train=None):
    """A checkpoint in float32, sharded as `shard` says; `train` is the [train] section of a policy
    that learns.

    A rank reads its own share of the weights and never holds more of them.
    """
    model = models.load(path, dtype=torch.float32, device=ranks.device,
                        shard=partial(shard, ranks=ranks))
    for block in model.model.layers if train else ():
        block.recompute, block.keep_attention = train.recompute, train.keep_attention
        if train.compile:
            block.fuse()
    return model


def shard(model, ranks):
    """Shard a float32 model block by block with FSDP2; it computes in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else None

    def split(module, dtype=dtype, **more):
        fully_shard(module, mesh=ranks.mesh, mp_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False), **more)

    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, models.Decay):
                split(module, dtype=None)  # stays float32
        split(block)
    if not model.config.tied:  # a large vocabulary is gathered only while it is used
        split(model.model.embed_tokens)
        split(model.lm_head)
    split(model, reshard_after_forward=False)
    for method in ("logp", "logp_kl", "states"):
        register_fsdp_forward_method(model, method)


def memory_bound(paths, batch, train, ranks, frozen=0):
    """Print the most memory that a rank will take while training any of the checkpoints on the
    batch (those that are only scored take less), so many frozen ones beside it; returns it in GiB.
    """
    prompts = torch.zeros(int(batch.prompt.max()) + 1, dtype=torch.long).index_add(
        0, batch.prompt.long(), batch.lengths.long())
    step = int(prompts.topk(min(train.prompts_per_step, len(prompts))).values.sum())
    parts = max((memory.training(
        models.read_config(path), train.max_tokens, ranks.mesh["shard"].size(),
        device=ranks.device.type, batch=len(batch.tokens), step=step, recompute=train.recompute,
        keep_attention=train.keep_attention, frozen=frozen) for path in paths),
        key=lambda parts: parts["peak"])
    ranks.print(memory.text(parts))
    return parts["peak"] / 2**30


def fingerprint(path, ranks):
    """model.fingerprint, its bytes read by one rank only, and once."""
    path = str(path)
    if path not in ranks.fingerprints:
        ranks.fingerprints[path] = ranks.agree(
            models.fingerprint(path) if ranks.rank == 0 else None)
    return ranks.fingerprints[path]


def adamw(model, lr, betas, weight_decay):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=tuple(betas),
                             weight_decay=weight_decay, fused=True)


def warmup(lr, step, steps):
    """Learning rate of step 0, 1, ...: linear over the first `steps`, then constant."""
    return lr * min(1.0, (step + 1) / max(steps, 1))


def updates(optimizer):
    """How many updates it has made, in this run and those that it was taken over from."""
    return int(next(iter(optimizer.state.values()), {"step": 0})["step"])


def minibatch(prompt, step, size, seed):
    """Rows of step 0, 1, ...: `size` prompts, all their responses,
    from epochs that follow one another without a seam.

    `prompt` [N] is each row's prompt. An epoch is a permutation drawn from (seed, epoch); a prompt
    that a seam puts into one minibatch twice counts once. A function of its arguments alone:
    resuming needs no state.
    """
    prompts = torch.unique(prompt)
    if size > len(prompts):
        raise ValueError(f"a minibatch of {size} prompts is larger than the batch, "
                         f"which has {len(prompts)}")
    chosen, place = [], step * size
    while len(chosen) < size:
        epoch, offset = divmod(place, len(prompts))
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        take = order[offset:offset + size - len(chosen)].tolist()
        chosen += take
        place += len(take)
    return torch.isin(prompt, prompts[chosen]).nonzero()[:, 0]


def trained_on(batch, keep, size):
    """Rows of a batch where `keep` [N], to make minibatches of `size` prompts of: [n].
    ValueError where there is none, or fewer prompts than that.
    """
    kept = keep.nonzero()[:, 0]
    if not len(kept):
        raise ValueError(f"{batch.folder}: no row is left to train on")
    minibatch(batch.prompt[kept], 0, size, 0)
    return kept


def clip_gradients(model, limit):
    """Scale the global gradient to norm at most `limit`; returns the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def require_finite(step, loss, grad_norm, row, logp):
    """Stop before the optimiser step if anything is not finite, naming the sequences.

    row, logp: of every token, [T].
    """
    if math.isfinite(loss) and math.isfinite(grad_norm) and bool(logp.isfinite().all()):
        return
    bad = torch.unique(row if logp.isfinite().all() else row[~logp.isfinite()]).tolist()
    shown = ", ".join(map(str, bad[:20])) + (" ..." if len(bad) > 20 else "")
    raise ValueError(f"step {step}: loss {loss} or gradient norm {grad_norm} is not finite; "
                     f"nothing was updated. Rows of the batch concerned: {shown}. "
                     "The last checkpoint is intact.")


def require_reproducible(logp, old_logp):
    """Stop if the policy, before any update, does not give the log-probs that were stored for it:
    rho would not start at 1. Returns the mean and the largest difference.
    """
    difference = (logp - old_logp).abs()
    if float(difference.mean()) > 0.01:
        raise ValueError("before any update the policy's log-probs differ from old_logp by "
                         f"{difference.mean():.3g} on average: the forward pass is not "
                         "reproducible; or those were kept (logp.* in the batch's folder) by "
                         "another kind of machine: delete them")
    return float(difference.mean()), float(difference.max())


# ---------------------------------------------------------------- log-probs under one checkpoint


def require_tokens(batch, path):
    """ValueError unless a checkpoint's vocabulary has every token of the batch."""
    if int(batch.tokens.max()) >= (vocab := models.read_config(path).vocab):
        raise ValueError(f"{batch.folder}: holds token {int(batch.tokens.max())}, "
                         f"the vocabulary of {path} has {vocab}: "
                         "another tokenizer made this batch")


def note_truncation(batch, ranks):
    """Say what log-probs of a batch leave out, if anything."""
    cut = [name for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0))
           if batch.header.get(name, off) != off]
    if cut:
        ranks.print(f"the batch was sampled with {', '.join(cut)}; rho = pi_theta / pi_old ignores "
                    "that truncation")


def batch_logp(batch, path, ranks, train, *, temperature):
    """log pi(y_t|s_t) of the whole batch under checkpoint `path`, by the trainer's own forward:
    [T] float32, 0 on prompts.

    Computed once, kept as a column of the batch, found again by fingerprint and temperature. The
    checkpoint is loaded, used and dropped. It computes as `train` has the policy compute that
    learns, compiled or not: the two round differently in bfloat16.
    """
    checkpoint = fingerprint(path, ranks)
    logp = batch.read_column(checkpoint, temperature)
    if ranks.agree(logp is None):
        require_tokens(batch, path)
        model = policy(path, ranks, train)
        logp = torch.zeros(len(batch.tokens), device=ranks.device)
        shares = list(batch.share(range(len(batch)), train.max_tokens, ranks.rank, ranks.world))
        for micro in tqdm(shares, desc=f"scoring under {path}", unit="micro-batch",
                          disable=ranks.rank != 0, mininterval=5):
            micro = micro.to(ranks.device)
            with torch.no_grad():
                logp[micro.place] = model.logp(*micro.packed, temperature=temperature)[0]
        dist.all_reduce(logp)  # every place was filled by one rank
        logp = logp.cpu()
        if not logp.isfinite().all():
            place = int((~logp.isfinite()).nonzero()[0, 0])
            row = int(torch.searchsorted(batch.cu_seqlens, place, right=True)) - 1
            raise ValueError(f"{path}: log-prob of row {row}, "
                             f"token {place - int(batch.cu_seqlens[row])} is not finite")
        if ranks.rank == 0:
            batch.write_column(checkpoint, temperature, logp, path)
        dist.barrier()
        del model
        gc.collect()
    return logp


# ---------------------------------------------------------------- the run folder


class Run:
    """A run's folder.

    `first` is the step to go on from (0 when fresh), `done` whether nothing is left to do.
    """

    def __init__(self, folder, config, inputs, ranks, *, free=FREE, may_grow=()):
        """ValueError if the folder holds a run of another config or other inputs, with the
        difference. `free` keys of [train] and the folder may differ, those of may_grow be larger.
        """
        self.folder, self.ranks = Path(folder), ranks
        self.free = {"output", *(f"train.{name}" for name in free)}
        self.listening = self.asked = False  # for SIGTERM, and whether it came
        self.bound = math.inf  # of a rank's memory, GiB
        asked = {"config": dataclasses.asdict(config), "inputs": inputs}
        lock(folder, ranks)
        if ranks.rank == 0:
            self._open(asked, may_grow)
        states = _states(self.folder)
        self.state = ranks.agree(states[-1] if states else None)
        self.first = int(self.state.name.removeprefix("step_")) if self.state else 0
        self.done = ranks.agree(self._done() == self._binding(asked))
        if ranks.rank == 0 and not self.done:
            durable.write_text(self.folder / "config.toml", options.to_toml(config))
            kept = [m for m in self._metrics() if m["step"] <= self.first]
            durable.write_text(self.folder / "metrics.jsonl",
                               "".join(json.dumps(m) + "\n" for m in kept))
        self.norms = ranks.agree([m["grad_norm"] for m in self._metrics()
                                  if durable.number(m.get("grad_norm"))])
        dist.barrier()

    def stop_if_asked(self, step, model, optimizer):
        """Between micro-batches: if any rank got SIGTERM, drop the step that has begun, save the
        state after `step` steps and exit with status 143. A collective, on the CPU.
        """
        if not self.listening:  # before this, SIGTERM just ends the process: nothing is at stake
            self.listening = True
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked)
        if not asked:
            return
        there = (self.folder / "state" / f"step_{step:06d}").exists()
        if not self.ranks.agree(there) and step > self.first:
            self.save_state(step, model, optimizer)
        self.ranks.print(f"stopped by SIGTERM after step {step}; the same command goes on there")
        sys.stdout.flush()
        os._exit(143)

    def spike(self, step, norm, train):
        """Report a gradient norm far above the recent ones; returns whether to skip the update."""
        recent, self.norms = sorted(self.norms[-16:]), [*self.norms, norm]
        usual = recent[len(recent) // 2] if len(recent) >= 4 else 0.0
        if not self.ranks.agree(usual > 0 and train.spike and norm > train.spike * usual):
            return False
        self.ranks.print(f"step {step + 1}: gradient norm {norm:.3g} is {norm / usual:.0f} times "
                         f"the usual{'; the update is left out' if train.skip_spikes else ''}")
        return train.skip_spikes

    def _open(self, asked, may_grow):
        file, environments = self.folder / "run.json", []
        if file.exists():
            was = durable.read_object(file, config=dict, inputs=dict, environments=list)
            done = self._done()
            # a run that saved nothing binds nobody
            if done or models.checkpoints(self.folder) or _states(self.folder):
                self._compare(was, asked, may_grow)
                environments = was["environments"]
                if done == self._binding(asked):
                    return
                if done and not _states(self.folder):
                    raise ValueError(f"{self.folder}: this run is complete and its resume state is "
                                     "gone: it cannot go on. Choose another output, or delete it")
        durable.write_text(file, json.dumps(
            {**asked, "environments": [*environments, environment(self.ranks)]}, indent=2))

    def _compare(self, was, asked, may_grow):
        old, new = self._binding(was), self._binding(asked)
        differ = [f"{k}: {old.get(k)!r:.80} -> {new.get(k)!r:.80}" for k in sorted({*old, *new})
                  if old.get(k) != new.get(k)
                  and not (k in may_grow and durable.number(old.get(k)) and old[k] < new[k])]
        if differ:
            raise ValueError(f"{self.folder}/run.json: {self.folder} holds a run with other "
                             "settings; choose another output or delete it. "
                             f"Different: {'; '.join(d[:200] for d in differ[:8])}")

    def _binding(self, made):
        """What a run is held to, by key, of its record {"config", "inputs"}."""
        flat = _flat(made["config"]) | _flat(made["inputs"])
        return {name: value for name, value in flat.items() if name not in self.free}

    def _done(self):
        """What binds a finished run; None of one that is not."""
        file = self.folder / "done.json"
        return (self._binding(durable.read_object(file, config=dict, inputs=dict))
                if file.exists() else None)

    def _metrics(self):
        return durable.read_lines(self.folder / "metrics.jsonl", ["grad_norm"], step=int)

    def log(self, step, metrics, show=None):
        """One line a step to metrics.jsonl, those named in `show` (default: all) to the console.

        nan becomes null. A peak of memory above the bound is said once.
        """
        if self.ranks.rank != 0:
            return
        if metrics.get("memory_gib", 0) > self.bound:
            print(f"note: peak memory {metrics['memory_gib']:.2f} GiB is above the bound of "
                  f"{self.bound:.2f} GiB that memory.py computes", flush=True)
            self.bound = math.inf
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                 for k, v in metrics.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        print(f"step {step:4d}  " + "  ".join(
            f"{k} {v:.3g}" for k, v in clean.items()
            if v is not None and (show is None or k in show)), flush=True)

    def checkpoint(self, step, model, optimizer):
        """The policy as a Hugging Face folder step_XXXXXX, then the resume state."""
        models.save(model, self.folder / f"step_{step:06d}")
        self.save_state(step, model, optimizer)

    def save_state(self, step, model, optimizer):
        """What the run goes on from; older states are dropped."""
        final = self.folder / "state" / f"step_{step:06d}"
        aside = final.with_name(final.name + ".tmp")
        if self.ranks.rank == 0:
            durable.clear(final)
        dist.barrier()
        resume.save(aside, model, optimizer)
        dist.barrier()
        if self.ranks.rank == 0:
            durable.publish(aside, final)
            for old in _states(self.folder)[:-1]:
                shutil.rmtree(old)
        dist.barrier()

    def restore(self, model, optimizer, other="", policy=""):
        """Load the latest state, if any; a fresh run takes over the optimiser's part of another
        run's last state, if that is given. Where `policy` is the checkpoint of that state, its
        weights too: they are float32, a checkpoint in bfloat16 would round small updates away.
        """
        if self.state:
            resume.load(self.state, model, optimizer)
            self.ranks.print(f"resumed from {self.state}")
        elif other:
            state = last_state(other)
            same = (Path(other) / state.name).resolve() == Path(policy).resolve()
            resume.load(state, model, optimizer, weights=same)
            self.ranks.print(f"{'weights and optimiser go' if same else 'the optimiser goes'} "
                             f"on from {state}")

    def finish(self, **summary):
        if self.ranks.rank == 0:
            made = durable.read_object(self.folder / "run.json", config=dict, inputs=dict)
            durable.write_text(self.folder / "done.json", json.dumps(
                {"config": made["config"], "inputs": made["inputs"], **summary}, indent=2))


def last_state(folder):
    """The last resume state of a run's folder. ValueError if it left none."""
    states = _states(folder)
    if not states:
        raise ValueError(f"optimizer = {folder}: there is no resume state of a run in it")
    return states[-1]


def _states(folder):
    """Resume states of a run, oldest first; none that is half-written."""
    return sorted(p for p in Path(folder).glob("state/step_*")
                  if p.name.removeprefix("step_").isdigit())


def _flat(data, prefix=""):
    flat = {}
    for name, value in data.items():
        flat |= (_flat(value, f"{prefix}{name}.") if isinstance(value, dict)
                 else {prefix + name: value})
    return flat


def environment(ranks):
    """What a run needs to be reconstructed: versions, machine, commit, command."""
    device = (torch.cuda.get_device_name() if ranks.device.type == "cuda"
              else platform.processor() or platform.machine())
    return {"command": " ".join(sys.argv), **versions(), "device": device,
            "ranks": ranks.world, "threads": torch.get_num_threads(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def versions():
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    return {"commit": git.stdout.strip(), "python": platform.python_version(),
            "torch": torch.__version__}


def memory_gib(ranks):
    """Peak memory of this process so far: on the GPU where there is one, else resident."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
