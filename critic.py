"""critic.py - PPO's value network: V(s_t), the chance of a right answer as seen from within it.

Group advantages give every token of a response the same credit. PPO asks a second network how
likely success is before and after each token, and credits a token with the difference:

    value pretraining     a Transformer of the policy's shape, started from its weights, with a
                          scalar head; (V(s_t) - R)^2 / 2 over the response tokens of the batch
                          (the return with lambda = 1 is the reward, at every token)
    V(s_t)                of every response token, once, kept in critic/values.safetensors
    A_t                   losses.gae of these, lambda = 1 - 1 / (alpha length) clamped to [0, 1],
                          whitened over all response tokens that are trained on

All of this comes before the policy is loaded, and the value network is dropped at its end: PPO
takes no more memory than another stage 1. A_t is then as fixed as the batch: pi_old drew the
tokens, so V is pi_old's, and there is no new one to be learnt without new rollouts. (The paper does
not say whether it goes on training V; this is ours.)

`explained_variance` in critic/metrics.jsonl says what V knows before it sees the end: 0 is no more
than the mean reward, and 1 would be every outcome by heart, with nothing left to be credited. Stop
where it flattens.

Value pretraining is a run of its own in <output>/critic: killed, it goes on from its last state.
The state holds the value network, its head beside the checkpoints and never in one; once the values
are there it may be deleted.
"""

import gc
import json
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import durable
import hf
import losses
import options
import rollouts
import runtime
from options import key

FREE = (*runtime.FREE, "checkpoint_every", "checkpoint_at")  # keys of [train]: values stay
SHOWN = ("loss", "explained_variance", "value_positive", "value_negative", "grad_norm",
         "tokens_per_second")  # the console line; critic/metrics.jsonl has them all


@dataclass(frozen=True)
class Value:
    """The [value] section of stage 1."""

    steps: int = key(64, "ppo: optimiser steps of value pretraining (ours: two epochs of 1000 "
                         "prompts, 32 a step; the paper gives none)")
    lr: float = key(2e-6, "ppo: learning rate of the value network, constant after "
                          "train.warmup (VAPO)")
    prompts_per_step: int = key(0, "ppo: prompts of its minibatch; 0: as train.prompts_per_step")
    alpha: float = key(0.05, "ppo: lambda = 1 - 1 / (alpha length), clamped to [0, 1] (VAPO; "
                             "responses of up to 1 / alpha tokens get 0: short ones need more)")
    whiten: bool = key(True, "ppo: advantages of the batch get mean 0 and variance 1")

    def __post_init__(self):
        for name in ("steps", "lr", "alpha"):
            options.in_range(f"value.{name}", getattr(self, name), above=0)
        options.in_range("value.prompts_per_step", self.prompts_per_step, least=0)


@dataclass(frozen=True)
class Config:
    """The config of value pretraining, as its run folder records it."""

    steps: int
    train: runtime.Train


def values(folder, settings, train, policy, batch, kept, ranks):
    """V(s_t) of the whole batch by a value network trained on rows `kept`: [T] float32, 0 on
    prompts. V(s_t) stands at token t, which is chosen in s_t.

    settings: the [value] section; train: [train], but V has its own learning rate and perhaps
    minibatch. Values that were made from the same before are found again in the folder.
    """
    config = Config(settings.steps, replace(
        train, lr=settings.lr,
        prompts_per_step=settings.prompts_per_step or train.prompts_per_step))
    inputs = {"policy": runtime.fingerprint(policy, ranks), "batch": batch.digest,
              "rows": len(kept)}  # of a given batch, their number tells which
    made_from = {**inputs, "steps": config.steps, **{
        name: value for name, value in asdict(config.train).items() if name not in FREE}}
    value = read(Path(folder) / "values.safetensors", made_from, batch)
    if ranks.agree(value is None):
        run = runtime.Run(folder, config, inputs, ranks, free=FREE)
        model = network(policy, ranks, config.train, float(batch.reward[kept].mean()))
        optimizer = runtime.adamw(model, config.train.lr, config.train.betas,
                                  config.train.weight_decay)
        run.restore(model, optimizer)
        pretrain(run, config, model, optimizer, batch, kept, ranks)
        value = score(run, config, model, optimizer, batch, ranks)
        if ranks.rank == 0:  # the file is the mark of completion, too
            durable.write_tensors(run.folder / "values.safetensors", {"value": value},
                                  {"made_from": json.dumps(made_from)})
        dist.barrier()
        del model, optimizer
        gc.collect()
    return value


def network(path, ranks, train, mean):
    """A checkpoint with a scalar head in the place of its output projection, sharded like the
    policy. V is the mean reward to begin with: steps are few, and it is the larger part.
    """
    model = runtime.policy(path, ranks, train)
    if not model.config.tied:
        del model.lm_head  # it would have no gradient
    model.add_value_head(mean)
    fully_shard(model.value_head, mesh=ranks.mesh)  # in float32 everywhere
    register_fsdp_forward_method(model, "value")
    return model


def pretrain(run, config, model, optimizer, batch, kept, ranks):
    """Value pretraining: stage 1's loop with a regression for its loss."""
    settings = config.train
    if run.first < config.steps:
        ranks.print(f"value pretraining: steps {run.first + 1} to {config.steps} of "
                    f"{settings.prompts_per_step} prompts")
    for step in range(run.first, config.steps):
        began = time.perf_counter()
        rows = kept[runtime.minibatch(
            batch.prompt[kept], step, settings.prompts_per_step, settings.seed)]
        tokens = int(batch.response_length[rows].sum())  # of the global minibatch
        total, seen = torch.zeros((), device=ranks.device), []
        for micro in batch.share(rows, settings.max_tokens, ranks.rank, ranks.world):
            run.stop_if_asked(step, model, optimizer)
            target = rollouts.send(batch.reward[micro.row][micro.segment], ranks.device)  # [T]
            micro = micro.to(ranks.device)
            value = model.value(*micro.packed)  # [T]
            loss = losses.aggregate(losses.value_loss(value, target), micro.segment, tokens=tokens)
            (loss * ranks.world).backward()  # FSDP2 averages over ranks, this is to be summed
            total += loss.detach()
            seen.append((value.detach(), target, micro.row[micro.segment]))

        dist.all_reduce(total)
        value, target, row = (ranks.gather(torch.cat(column)).cpu()
                              for column in zip(*seen, strict=True))
        grad_norm = runtime.clip_gradients(model, settings.clip)
        runtime.require_finite(step, float(total), grad_norm, row, value)
        for group in optimizer.param_groups:
            group["lr"] = runtime.warmup(settings.lr, runtime.updates(optimizer), settings.warmup)
        if not run.spike(step, grad_norm, settings):
            optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - began
        run.log(step + 1, {
            "loss": float(total),
            "explained_variance": float(losses.explained_variance(value, target)),
            "value_positive": float(value[target > 0].mean()),
            "value_negative": float(value[target == 0].mean()),
            "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
            "tokens_per_second": int(batch.lengths[rows].sum()) / seconds,
            "memory_gib": runtime.memory_gib(ranks)}, SHOWN)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == config.steps:
            run.save_state(step + 1, model, optimizer)  # no checkpoint: nobody samples from it


@torch.no_grad()
def score(run, config, model, optimizer, batch, ranks):
    """V(s_t) of every response token of the batch: [T] float32, 0 on prompts."""
    value = torch.zeros(len(batch.tokens), device=ranks.device)
    for micro in batch.share(range(len(batch)), config.train.max_tokens, ranks.rank, ranks.world):
        run.stop_if_asked(config.steps, model, optimizer)
        micro = micro.to(ranks.device)
        value[micro.place] = model.value(*micro.packed)
    dist.all_reduce(value)  # every place was filled by one rank
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until stage 1 listens, it just ends the process
    run.stop_if_asked(config.steps, model, optimizer)
    if not value.isfinite().all():
        raise ValueError(f"{run.folder}: after {config.steps} steps some values are not finite; "
                         "lower value.lr")
    return value.cpu()


def read(file, made_from, batch):
    """The values kept in a file, or None where there is none. ValueError if it is damaged or was
    made from something else.
    """
    if not file.is_file():
        return None
    remedy = "delete its folder to have it made again, or choose another output"
    with durable.reading(file, remedy):
        with hf.tensors(file) as tensors:
            was, value = json.loads(tensors.metadata()["made_from"]), tensors.get_tensor("value")
        differ = [f"{name}: {was.get(name)} -> {now}" for name, now in made_from.items()
                  if was.get(name) != now]
        durable.require(not differ, f"was made from something else ({'; '.join(differ)})")
        durable.require(value.shape == batch.tokens.shape and value.dtype == torch.float32
                        and bool(value.isfinite().all()), "value must be float32, one a token")
    return value


def advantage(value, batch, kept, settings, ranks):
    """A_t of rows `kept` at its place in the batch's token columns, 0 elsewhere: [T] -> [T].

    settings: the [value] section.
    """
    used = torch.isin(torch.arange(len(batch)), kept).repeat_interleave(batch.lengths)
    token = (batch.response & used).nonzero()[:, 0]  # places, row by row
    length = batch.response_length[kept]
    lam = losses.adaptive_lambda(length, settings.alpha)  # one a response
    segment = torch.arange(len(kept)).repeat_interleave(length)
    A, target = losses.gae(value[token], batch.reward[kept], segment, lam=lam)
    ranks.print(f"values explain {losses.explained_variance(value[token], target):.3f} of the "
                f"rewards' variance; lambda {lam.min():.3g} to {lam.max():.3g}, 0 for "
                f"{(lam == 0).float().mean():.0%} of the responses; advantages before whitening "
                f"{A.mean():.3g} +- {A.std():.3g}")
    if (lam == 0).all():
        ranks.print("note: every lambda is 0, no token is credited with more than the next value: "
                    "raise value.alpha")
    result = torch.zeros(len(batch.tokens))
    result[token] = losses.whiten(A) if settings.whiten else A
    return result
