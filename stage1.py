"""stage1.py - the teacher: many off-policy steps on one fixed batch, pushed into an extreme region.

Every row of the batch was sampled once, by pi_old. Stage 1 walks over it again and again with a
loss that holds the policy back only weakly, and keeps a checkpoint every few steps:

    old_logp            log pi_old of the batch, by this trainer's own forward pass, once
    for step in steps:
        minibatch       `prompts_per_step` prompts, all their responses, packed into micro-batches
        logp, entropy   of the response tokens under pi_theta
        loss            one of losses.py, averaged over the global minibatch (all ranks, all
                        micro-batches)
        AdamW           float32 weights, clipped gradient

    loss.name   objective, per token (per response for ce)                       what it needs
    ce          cross-entropy of the implicit reward beta * sum log pi/pi_ref    beta, aggregate,
                                                                                 reference
    sapo        soft-gated policy gradient                                       tau_pos, tau_neg
    grpo        PPO clip with group advantages (normalize = false: Dr.GRPO)      clip_low, clip_high
    ppo         PPO clip with the advantage of a value network, critic.py        clip_low, clip_high
                                                                                 and [value]
    cispo       truncated importance weights                                     cispo_clip
    vespo       importance weights of whole responses, softly bounded            c1_pos, c2_pos,
                                                                                 c1_neg, c2_neg
    mse         probability of each token fitted to the outcome: unlearns first  negative_weight
    sft         log-likelihood of the responses with reward 1                    -
    rwr         likelihood weighted by exp(tilt R): the KL-optimal target        tilt
    each plus   kl_coef * KL_t - entropy_coef * H_t                              kl: estimated from
                                                                                 the token, or exact

What to look for in metrics.jsonl: fast gains for dozens of steps (seen by evaluating the
checkpoints with evaluate.py), p_positive and p_negative drifting apart, entropy falling, kl_reverse
growing without bound. The last policy is not the product: stage2.py starts from pi_old again and
uses a checkpoint of this run only as a signal.

    python stage1.py --config configs/toy/stage1.toml
    torchrun --nproc-per-node 8 stage1.py --config configs/qwen3_4b/stage1_ce.toml
"""

import time
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

import critic
import losses
import options
import rollouts
import runtime
from options import key, section

# the keys of [loss] that only some objectives read
READS = {"ce": {"beta", "aggregate", "reference"},
         "sapo": {"tau_pos", "tau_neg", "normalize"},
         "grpo": {"clip_low", "clip_high", "normalize"},
         "ppo": {"clip_low", "clip_high"},
         "cispo": {"cispo_clip", "normalize"},
         "vespo": {"c1_pos", "c2_pos", "c1_neg", "c2_neg", "normalize"},
         "mse": {"negative_weight"},
         "sft": set(),
         "rwr": {"tilt"}}


@dataclass(frozen=True)
class Loss:
    name: str = key("ce", "ce, sapo, grpo, ppo, cispo, vespo, mse, sft or rwr")
    beta: float = key(
        0.05, "ce: scale of the implicit reward = strength of the KL constraint "
        "(the paper tunes 0.001-0.05)")
    aggregate: str = key("sum", "ce: log-ratios of a response are summed or averaged (sum, mean)")
    reference: str = key(
        "old", "ce: pi_ref, 'old', 'start' (the policy trained from) or a checkpoint folder")
    clip_low: float = key(0.2, "grpo, ppo: lower clip (paper)")
    clip_high: float = key(0.28, "grpo, ppo: upper clip (paper)")
    cispo_clip: float = key(4.0, "cispo: cap on rho - 1 (ours; no paper setting)")
    c1_pos: float = key(
        2.0, "vespo: tokens weigh W^c1 exp(c2 (1 - W)), W the ratio of the whole response; "
        "c1 where the advantage is positive (the VESPO paper's constants)")
    c2_pos: float = key(3.0, "vespo: c2 where it is positive")
    c1_neg: float = key(3.0, "vespo: c1 where it is negative")
    c2_neg: float = key(2.0, "vespo: c2 where it is negative")
    tau_pos: float = key(1.0, "sapo: temperature where the advantage is positive (paper)")
    tau_neg: float = key(1.05, "sapo: temperature where it is negative (paper)")
    negative_weight: float = key(
        1.0, "mse: weight on tokens of responses with reward 0; more unlearns more")
    tilt: float = key(
        2.0, "rwr: responses weigh exp(tilt R), normalised per prompt (a control, ours)")
    normalize: bool = key(
        True, "grpo, sapo, cispo, vespo: divide the group advantage by its std; false is Dr.GRPO")
    average: str = key(
        "token", "token (each token weighs the same), sequence (each response) or fixed "
        "(Dr.GRPO); ce itself is always the mean over responses, its penalties follow this key")
    fixed_length: int = key(0, "average = fixed: the constant number of tokens to divide by")
    kl: str = key(
        "reverse", "penalty on pi_old's tokens: reverse, forward or k3 (chi^2 - KL); or exact: "
        "KL(pi_theta || pi_old) over the vocabulary, pi_old beside pi_theta in memory")
    kl_coef: float = key(
        0.0, "weight of the penalty; 0: weakly constrained, which is the point of stage 1")
    entropy_coef: float = key(0.0, "weight of the entropy bonus")

    def __post_init__(self):
        options.one_of("loss.name", self.name, READS)
        options.one_of("loss.aggregate", self.aggregate, ("sum", "mean"))
        options.one_of("loss.kl", self.kl, (*losses.PENALTIES, "exact"))
        runtime.check_average(self, "loss")
        for name in ("beta", "tau_pos", "tau_neg"):
            options.in_range(f"loss.{name}", getattr(self, name), above=0)
        for name in ("clip_low", "clip_high", "cispo_clip", "c1_pos", "c2_pos", "c1_neg", "c2_neg",
                     "negative_weight", "tilt", "kl_coef"):
            options.in_range(f"loss.{name}", getattr(self, name), least=0)
        options.in_range("loss.entropy_coef", self.entropy_coef)

    @property
    def unread(self):
        """The keys that this objective does not look at."""
        names = set.union(*READS.values()) - READS[self.name]
        names |= set() if self.average == "fixed" else {"fixed_length"}
        names |= set() if self.kl_coef else {"kl"}
        penalised = self.kl_coef or self.entropy_coef
        return names if self.name != "ce" or penalised else names | {"average", "fixed_length"}


@dataclass(frozen=True)
class Config:
    policy: str = key(
        help="checkpoint folder to train from; pi_old itself, or an unlearned one to recover")
    batch: str = key(help="folder of rollouts (sample.py, or rollouts.py import)")
    output: str = key(help="run folder")
    old: str = key(
        "", "checkpoint folder that sampled the batch, if it has moved since; "
        "default: the one its header names")
    logprob_temperature: float = key(
        0.0, "temperature of all log-probs; 0: the one the batch was sampled at")
    drop_unfinished: bool = key(False, "leave out truncated responses")
    optimizer: str = key("", "run folder whose optimiser is taken over at the start, and its "
                             "float32 weights if policy is its last checkpoint: for on-policy "
                             "rounds of a step each; empty: a fresh one")
    steps: int = key(64, "optimiser steps; may be raised to go on from a finished run")
    loss: Loss = section(Loss)
    value: critic.Value = section(critic.Value)
    train: runtime.Train = section(runtime.Train)

    def __post_init__(self):
        options.in_range("steps", self.steps, above=0)
        options.in_range("logprob_temperature", self.logprob_temperature, least=0)

    @property
    def frozen(self):
        """The policies that an exact KL keeps in memory beside the one that learns."""
        return ["old"] if self.loss.kl == "exact" and self.loss.kl_coef else []


def main():
    cfg = options.parse(Config, __doc__)
    ranks = runtime.start(cfg.train.replicas)
    batch = rollouts.load(cfg.batch)
    rollouts.require_fit(batch, range(len(batch)), cfg.train.max_tokens)
    old = cfg.old or batch.header["policy"]
    temperature = cfg.logprob_temperature or batch.temperature
    reference = {"old": old, "start": cfg.policy}.get(cfg.loss.reference, cfg.loss.reference)
    if "reference" in cfg.loss.unread:
        reference = old
    inputs = {"batch": batch.digest, **{name: runtime.fingerprint(path, ranks) for name, path in (
        ("policy", cfg.policy), ("old", old), ("reference", reference))}}
    if inputs["old"] != batch.header["fingerprint"]:
        raise ValueError(f"{old} is not the policy that sampled {cfg.batch}: fingerprints differ; "
                         "set old to the one that is")
    runtime.require_tokens(batch, cfg.policy)

    # which rows are trained on: a reward the grader could not decide teaches nothing
    undecided, truncated = batch.reward.isnan(), ~batch.finished
    kept = runtime.trained_on(batch, ~undecided & ~(truncated & cfg.drop_unfinished), max(
        cfg.train.prompts_per_step, cfg.value.prompts_per_step if cfg.loss.name == "ppo" else 0))

    run = runtime.Run(cfg.output, cfg, inputs, ranks, may_grow=("steps",))
    if run.done:
        return ranks.print(f"{cfg.output}: already complete")
    if cfg.optimizer and not run.state:
        runtime.last_state(cfg.optimizer)  # it is there
    ranks.note_unread("loss", cfg.loss, cfg.loss.unread)
    if cfg.loss.name != "ppo":
        ranks.note_unread("value", cfg.value, {f.name for f in fields(cfg.value)})
    ranks.print(f"{len(kept)} of {len(batch)} rollouts ({int(undecided.sum())} undecided left out, "
                f"{int(truncated.sum())} truncated{' left out' if cfg.drop_unfinished else ''}), "
                f"mean reward {batch.reward[kept].mean():.3f}")
    runtime.note_truncation(batch, ranks)

    run.bound = runtime.memory_bound({cfg.policy, old, reference}, batch, cfg.train, ranks,
                                     frozen=len(cfg.frozen))
    old_logp = runtime.batch_logp(batch, old, ranks, cfg.train, temperature=temperature)
    if batch.header["source"] == "sample" and temperature == batch.temperature:
        gap = (old_logp - batch.sampler_logp)[batch.response].abs()
        ranks.print(f"sampler and trainer log-probs differ by {gap.mean():.2g} on average, "
                    f"{gap.max():.2g} at most")
    ref_logp = old_logp if inputs["reference"] == inputs["old"] else runtime.batch_logp(
        batch, reference, ranks, cfg.train, temperature=temperature)

    # A_t at its place in the batch's token columns
    if cfg.loss.name == "ppo":
        value = critic.values(run.folder / "critic", cfg.value, cfg.train, cfg.policy, batch, kept,
                              ranks)
        advantage = critic.advantage(value, batch, kept, cfg.value, ranks)
    else:
        group = torch.zeros(len(batch))
        reward, prompt = batch.reward[kept], batch.prompt[kept]
        group[kept] = (losses.tilted_weight(reward, prompt, cfg.loss.tilt)
                       if cfg.loss.name == "rwr" else
                       losses.group_advantage(reward, prompt, normalize=cfg.loss.normalize))
        advantage = group.repeat_interleave(batch.lengths)

    model = runtime.policy(cfg.policy, ranks, cfg.train)
    optimizer = runtime.adamw(model, cfg.train.lr, cfg.train.betas, cfg.train.weight_decay)
    run.restore(model, optimizer, cfg.optimizer, cfg.policy)
    frozen = {name: runtime.policy(old, ranks, cfg.train) for name in cfg.frozen}
    prompts = len(torch.unique(batch.prompt[kept]))
    ranks.print(f"steps {run.first + 1} to {cfg.steps} of {cfg.train.prompts_per_step} "
                f"prompts on {ranks.world} rank(s); an epoch of {prompts} prompts is "
                f"{prompts / cfg.train.prompts_per_step:.1f} steps")

    for step in range(run.first, cfg.steps):
        began = time.perf_counter()
        rows = kept[runtime.minibatch(
            batch.prompt[kept], step, cfg.train.prompts_per_step, cfg.train.seed)]
        count = {"tokens": int(batch.response_length[rows].sum()),  # of the global minibatch
                 "sequences": len(rows)}
        total, seen = torch.zeros((), device=ranks.device), []

        # every rank has the same number of micro-batches, at least one (perhaps empty)
        for micro in batch.share(rows, cfg.train.max_tokens, ranks.rank, ranks.world):
            run.stop_if_asked(step, model, optimizer)
            old_t, ref_t, A = (rollouts.send(column[micro.place], ranks.device)
                               for column in (old_logp, ref_logp, advantage))  # [T]
            reward = rollouts.send(batch.reward[micro.row], ranks.device)  # [B]
            micro = micro.to(ranks.device)
            logp, entropy, kl = model.logp_kl(
                *micro.packed, {name: other.states(*micro.packed)
                                for name, other in frozen.items()}, temperature=temperature)
            loss = objective(cfg.loss, logp, old_t, ref_t, entropy, A, reward, micro.segment,
                             count, kl.get("old"))
            # a micro-batch's loss is its share of the minibatch's mean, to be summed over ranks;
            # FSDP2 averages gradients over ranks, hence the factor
            (loss * ranks.world).backward()
            total += loss.detach()
            # for the diagnostics: per token, its place and its sequence's row in the batch
            seen.append((logp.detach(), entropy.detach(), micro.place, micro.row[micro.segment]))

        dist.all_reduce(total)
        logp, entropy, place, row = (ranks.gather(torch.cat(column)).cpu()
                                     for column in zip(*seen, strict=True))
        grad_norm = runtime.clip_gradients(model, cfg.train.clip)
        runtime.require_finite(step, float(total), grad_norm, row, logp)
        if step == 0 and inputs["policy"] == inputs["old"]:
            ranks.print("before any update log-probs differ from old_logp by {:.2g} on average, "
                        "{:.2g} at most".format(*runtime.require_reproducible(
                            logp, old_logp[place])))
        for group in optimizer.param_groups:
            group["lr"] = runtime.warmup(cfg.train.lr, runtime.updates(optimizer), cfg.train.warmup)
        if not run.spike(step, grad_norm, cfg.train):
            optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - began
        run.log(step + 1, {
            "loss": float(total), **losses.diagnostics(
                logp, old_logp[place], entropy,
                advantage[place] if "clip_low" in READS[cfg.loss.name] else None, batch.reward, row,
                clip_low=cfg.loss.clip_low, clip_high=cfg.loss.clip_high),
            "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
            "tokens_per_second": int(batch.lengths[rows].sum()) / seconds,
            "memory_gib": runtime.memory_gib(ranks)}, runtime.SHOWN)
        if ((step + 1) % cfg.train.checkpoint_every == 0
                or step + 1 in (*cfg.train.checkpoint_at, cfg.steps)):
            run.checkpoint(step + 1, model, optimizer)
    run.finish(steps=cfg.steps)


def objective(c, logp, old_logp, ref_logp, entropy, advantage, reward, segment, count,
              exact_kl=None):
    """One micro-batch's share of the global loss.

    Token columns [T]; reward [B]; count: the global minibatch's sizes; exact_kl [T]: to pi_old.
    """
    match c.name:
        case "ce":
            loss = losses.ce(logp, ref_logp, reward, segment, beta=c.beta,
                             aggregate=c.aggregate).sum() / count["sequences"]
        case "sapo":
            loss = losses.sapo(logp, old_logp, advantage, tau_pos=c.tau_pos, tau_neg=c.tau_neg)
        case "grpo" | "ppo":  # they differ in the advantage
            loss = losses.grpo(logp, old_logp, advantage,
                               clip_low=c.clip_low, clip_high=c.clip_high)
        case "cispo":
            loss = losses.cispo(logp, old_logp, advantage, clip_high=c.cispo_clip)
        case "vespo":
            loss = losses.vespo(logp, old_logp, advantage, segment,
                                c_pos=(c.c1_pos, c.c2_pos), c_neg=(c.c1_neg, c.c2_neg))
        case "mse":
            loss = losses.mse(logp, reward, segment, negative_weight=c.negative_weight)
        case "sft":
            loss = losses.sft(logp, reward, segment)
        case "rwr":  # the advantage column holds the weight
            loss = losses.rwr(logp, advantage)

    def average(x):
        return losses.aggregate(x, segment, c.average, length=c.fixed_length, **count)

    loss = loss if c.name == "ce" else average(loss)
    if c.kl_coef:
        loss = loss + c.kl_coef * average(
            exact_kl if c.kl == "exact" else losses.PENALTIES[c.kl](logp, old_logp))
    if c.entropy_coef:
        loss = loss - c.entropy_coef * average(entropy)
    return loss


if __name__ == "__main__":
    runtime.command(main)
