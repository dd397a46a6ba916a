"""stage2.py - the student: the teacher's token signal, distilled into pi_old inside a trust region.

The teacher (stage1.py) spent its divergence freely. Stage 2 starts again from pi_old and follows
only what the teacher says about the tokens of the same fixed batch:

    r_t = log pi_num(y_t|s_t) - log pi_den(y_t|s_t)  scored before training; no teacher in memory
                                                     after that
    mask                                             optional, by sign, on responses with reward 1
                                                     (Table 12)
    A_t = whiten(r_t)                                over all response tokens of the batch
    minimise -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t),
                                                     rho_t = pi_theta / pi_old   (Eq. 9)

The clip and a small number of steps (10, 16 or 32) are the trust region: with pi_old as denominator
the signal is fixed, and nothing else limits the student. A [[signal]] names its pair,
numerator / denominator:

    strategy 1    teacher / "old"        strong teacher, the default
    evolving      teacher / "evolving"   pi_theta at this step, detached; whitened per minibatch.
                                         The direction of -KL(theta || teacher): costs less
                                         KL, turns back past the teacher; zero where only rounding
                                         is left of it
    strategy 2    MSE late / MSE early   weak teacher: away from the unlearned policy
    strategy 3    teacher / earlier      away from an earlier, weaker policy, in late rounds
    single terms  "none" on one side     ablation
    full          teacher                KL(theta || teacher) of whole distributions, exact, in the
                                         place of signal, whitening and clip: what the sampled
                                         tokens of `evolving` estimate (ours)

"old" is the student's start. Several [[signal]] sections follow one another on the same student and
optimiser (the paper's teacher ensemble).

    python stage2.py --config configs/toy/stage2.toml
    torchrun --nproc-per-node 8 stage2.py --config configs/qwen3_4b/stage2_strong.toml
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

import losses
import options
import rollouts
import runtime
from options import key, section


@dataclass(frozen=True)
class Signal:
    numerator: str = key(help="checkpoint folder, 'old' or 'none'")
    denominator: str = key("old", "checkpoint folder, 'old', 'evolving' or 'none'")
    steps: int = key(32, "optimiser steps on this signal (paper: 16 or 32; 10 in iterated rounds)")
    keep: str = key(
        "both", "on responses with reward 1 keep: both signs, positive or negative (Table 12)")
    shift_mean: bool = key(
        True, "whitening subtracts the mean (ours; the paper says only 'whitening')")
    full: bool = key(
        False, "minimise KL(pi_theta || numerator) over the whole vocabulary at every token; the "
        "numerator stays in memory (ours)")

    def __post_init__(self):
        options.one_of("signal.keep", self.keep, ("both", "positive", "negative"))
        options.in_range("signal.steps", self.steps, above=0)
        if self.numerator == "evolving":
            raise ValueError("signal.numerator cannot be 'evolving'; "
                             "the current policy can only be the denominator")
        if self.numerator == self.denominator == "none":
            raise ValueError("signal: numerator and denominator cannot both be 'none'")
        if self.full and self.numerator in ("old", "none"):
            raise ValueError("signal.full needs a checkpoint as the numerator, "
                             f"not {self.numerator!r}")

    @property
    def unread(self):
        """The keys that this signal does not look at."""
        return {"denominator", "keep", "shift_mean"} if self.full else set()


@dataclass(frozen=True)
class Trust:
    clip_low: float = key(0.2, "lower clip (paper)")
    clip_high: float = key(0.28, "upper clip (paper)")
    average: str = key("token", "token, sequence or fixed, as in stage 1")
    fixed_length: int = key(0, "average = fixed: the constant number of tokens to divide by")
    kl: str = key("reverse", "penalty on pi_old's tokens: reverse, forward, k3 or exact, as in "
                             "stage 1")
    kl_coef: float = key(0.0, "weight of the penalty (Table 5: 0.001, 0.05, 0.2)")
    entropy_coef: float = key(0.0, "weight of the entropy bonus (Table 6b: 0.5)")

    def __post_init__(self):
        options.one_of("trust.kl", self.kl, (*losses.PENALTIES, "exact"))
        runtime.check_average(self, "trust")
        for name in ("clip_low", "clip_high", "kl_coef"):
            options.in_range(f"trust.{name}", getattr(self, name), least=0)
        options.in_range("trust.entropy_coef", self.entropy_coef)

    @property
    def unread(self):
        """The keys that these settings do not look at."""
        return ((set() if self.kl_coef else {"kl"})
                | (set() if self.average == "fixed" else {"fixed_length"}))


@dataclass(frozen=True)
class Config:
    batch: str = key(help="folder of rollouts, the one stage 1 used")
    output: str = key(help="run folder")
    policy: str = key(
        "", "pi_old: the student's start and the clip's anchor; "
        "default: the policy the batch's header names")
    logprob_temperature: float = key(
        0.0, "temperature of all log-probs; 0: the one the batch was sampled at")
    drop_unfinished: bool = key(False, "leave out truncated responses")
    signal: list[Signal] = key([], "one or more [[signal]] sections, followed one after another")
    trust: Trust = section(Trust)
    train: runtime.Train = section(runtime.Train)

    def __post_init__(self):
        if not self.signal:
            raise ValueError("at least one [[signal]] section is needed, "
                             "with its numerator and denominator")
        options.in_range("logprob_temperature", self.logprob_temperature, least=0)

    @property
    def frozen(self):
        """The policies that an exact KL keeps in memory beside the one that learns."""
        exact = self.trust.kl == "exact" and self.trust.kl_coef
        return [*dict.fromkeys(s.numerator for s in self.signal if s.full), *["old"] * bool(exact)]


def main():
    cfg = options.parse(Config, __doc__)
    ranks = runtime.start(cfg.train.replicas)
    batch = rollouts.load(cfg.batch)
    rollouts.require_fit(batch, range(len(batch)), cfg.train.max_tokens)
    old = cfg.policy or batch.header["policy"]
    temperature = cfg.logprob_temperature or batch.temperature
    names = {name for s in cfg.signal for name in (s.numerator, s.denominator)} - {
        "old", "evolving", "none"}
    inputs = {"policy": runtime.fingerprint(old, ranks), "batch": batch.digest,
              "signals": {name: runtime.fingerprint(name, ranks) for name in sorted(names)}}
    if inputs["policy"] != batch.header["fingerprint"]:
        raise ValueError(f"{old} is not the policy that sampled {cfg.batch}: fingerprints differ; "
                         "set policy to the one that is")
    runtime.require_tokens(batch, old)
    # the signal needs no reward: rows that the grader could not decide stay in
    kept = runtime.trained_on(batch, batch.finished | (not cfg.drop_unfinished),
                              cfg.train.prompts_per_step)
    run = runtime.Run(cfg.output, cfg, inputs, ranks)
    if run.done:
        return ranks.print(f"{cfg.output}: already complete")

    clips = set() if any(not s.full for s in cfg.signal) else {"clip_low", "clip_high"}
    ranks.note_unread("trust", cfg.trust, cfg.trust.unread | clips)
    for i, s in enumerate(cfg.signal):
        ranks.note_unread(f"signal.{i}", s, s.unread)

    run.bound = runtime.memory_bound({old, *names}, batch, cfg.train, ranks,
                                     frozen=len(cfg.frozen))
    # log-probs of the batch under every checkpoint that a signal needs, one in memory at a time
    logp_of = {"none": None, "evolving": None}
    for name in ("old", *sorted(names)):
        logp_of[name] = runtime.batch_logp(batch, old if name == "old" else name, ranks, cfg.train,
                                           temperature=temperature)
    old_logp = logp_of["old"]

    used = torch.isin(torch.arange(len(batch)), kept).repeat_interleave(batch.lengths)
    token = (batch.response & used).nonzero()[:, 0]  # places of the response tokens
    owner = torch.arange(len(batch)).repeat_interleave(batch.lengths)[token]  # row of each token
    ranks.print(f"{len(kept)} of {len(batch)} rollouts, {len(token)} response tokens, "
                f"{int((~batch.finished).sum())} truncated"
                f"{' (left out)' if cfg.drop_unfinished else ''}")
    runtime.note_truncation(batch, ranks)

    model = runtime.policy(old, ranks, cfg.train)
    optimizer = runtime.adamw(model, cfg.train.lr, cfg.train.betas, cfg.train.weight_decay)
    schedule = [signal for signal in cfg.signal for _ in range(signal.steps)]  # one a step
    last = len(schedule)
    # while the model still is pi_old: restore() may put a later student in its place
    noise = rescoring_noise(model, batch, kept, old_logp, ranks, temperature, cfg.train)

    def fixed(signal):
        """The signal of every response token, which no step changes."""
        denominator = logp_of[signal.denominator]
        return raw_signal(signal, logp_of[signal.numerator], token,
                          None if denominator is None else denominator[token], batch.reward, owner)

    for signal in cfg.signal:
        if not signal.full and signal.denominator != "evolving":
            sides = [{"old": inputs["policy"], **inputs["signals"]}.get(side)
                     for side in (signal.numerator, signal.denominator)]
            report(ranks, signal, fixed(signal), noise, identical=sides[0] == sides[1])
    run.restore(model, optimizer)
    frozen = {name: runtime.policy(old if name == "old" else name, ranks, cfg.train)
              for name in cfg.frozen}
    prompts = len(torch.unique(batch.prompt[kept]))
    ranks.print(f"steps {run.first + 1} to {last} of {cfg.train.prompts_per_step} prompts "
                f"on {ranks.world} rank(s); an epoch of {prompts} prompts is "
                f"{prompts / cfg.train.prompts_per_step:.1f} steps")
    advantage, current = torch.zeros(len(batch.tokens)), None  # A_t at its place in the batch
    arrived = False  # at the teacher

    for step in range(run.first, last):
        began = time.perf_counter()
        signal = schedule[step]
        rows = kept[runtime.minibatch(
            batch.prompt[kept], step, cfg.train.prompts_per_step, cfg.train.seed)]
        count = {"tokens": int(batch.response_length[rows].sum()),  # of the global minibatch
                 "sequences": len(rows)}
        micros = list(batch.share(rows, cfg.train.max_tokens, ranks.rank, ranks.world))

        numerator = logp_of[signal.numerator]
        compared = [name for name in frozen
                    if name == "old" or signal.full and name == signal.numerator]
        if signal.full:
            pass  # the micro-batches compare whole distributions
        elif signal.denominator == "evolving":  # this minibatch's signal, pi_theta as it is now
            place, theta, row = current_logp(model, micros, ranks, temperature)
            raw = raw_signal(signal, numerator, place, theta, batch.reward, row)
            before, arrived = arrived, float(raw.std()) <= 2 * noise  # rounding is all that is left
            if arrived and not before:
                ranks.print(f"step {step + 1}: the student cannot be told from {signal.numerator}; "
                            "the signal is zero")
            advantage[place] = 0.0 if arrived else losses.whiten(raw, shift_mean=signal.shift_mean)
            right = batch.reward[row] > 0
        elif signal is not current:  # a fixed signal, over the whole batch, once
            raw = fixed(signal)
            advantage[token] = losses.whiten(raw, shift_mean=signal.shift_mean)
            right = batch.reward[owner] > 0
        current = signal

        total, seen = torch.zeros((), device=ranks.device), []
        for micro in micros:
            run.stop_if_asked(step, model, optimizer)
            old_t, A = (rollouts.send(column[micro.place], ranks.device)
                        for column in (old_logp, advantage))  # [T]
            micro = micro.to(ranks.device)
            logp, entropy, kl = model.logp_kl(
                *micro.packed, {name: frozen[name].states(*micro.packed) for name in compared},
                temperature=temperature)
            per_token = kl[signal.numerator] if signal.full else losses.grpo(
                logp, old_t, A, clip_low=cfg.trust.clip_low, clip_high=cfg.trust.clip_high)
            if cfg.trust.kl_coef:
                penalty = (kl["old"] if cfg.trust.kl == "exact" else
                           losses.PENALTIES[cfg.trust.kl](logp, old_t))
                per_token = per_token + cfg.trust.kl_coef * penalty
            if cfg.trust.entropy_coef:
                per_token = per_token - cfg.trust.entropy_coef * entropy
            loss = losses.aggregate(per_token, micro.segment, cfg.trust.average,
                                    length=cfg.trust.fixed_length, **count)
            # a micro-batch's loss is its share of the minibatch's mean, to be summed over ranks;
            # FSDP2 averages gradients over ranks, hence the factor
            (loss * ranks.world).backward()
            total += loss.detach()
            seen.append((logp.detach(), entropy.detach(), micro.place, micro.row[micro.segment]))

        dist.all_reduce(total)
        logp, entropy, place, row = (ranks.gather(torch.cat(column)).cpu()
                                     for column in zip(*seen, strict=True))
        grad_norm = runtime.clip_gradients(model, cfg.train.clip)
        runtime.require_finite(step, float(total), grad_norm, row, logp)
        for group in optimizer.param_groups:
            group["lr"] = runtime.warmup(cfg.train.lr, runtime.updates(optimizer), cfg.train.warmup)
        if not run.spike(step, grad_norm, cfg.train):
            optimizer.step()
        optimizer.zero_grad()

        if signal.full:  # for the record
            raw, right = numerator[place] - logp, batch.reward[row] > 0
        seconds = time.perf_counter() - began
        run.log(step + 1, {
            "loss": float(total), **losses.diagnostics(
                logp, old_logp[place], entropy, None if signal.full else advantage[place],
                batch.reward, row, clip_low=cfg.trust.clip_low, clip_high=cfg.trust.clip_high),
            "signal_std": float(raw.std()),
            "signal_negative": float((raw[right] < 0).double().mean()), "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
            "tokens_per_second": int(batch.lengths[rows].sum()) / seconds,
            "memory_gib": runtime.memory_gib(ranks)}, runtime.SHOWN)
        if ((step + 1) % cfg.train.checkpoint_every == 0
                or step + 1 in (*cfg.train.checkpoint_at, last)):
            run.checkpoint(step + 1, model, optimizer)
    run.finish(steps=last)


def raw_signal(signal, numerator, place, denominator, reward, row):
    """The masked signal of some response tokens, before whitening: [T].

    numerator: log-probs of the whole batch, of which those at place [T]; denominator [T]; either
    may be None. reward of all rows, row [T] of each token.
    """
    numerator = None if numerator is None else numerator[place]
    return losses.sign_mask(losses.token_signal(numerator, denominator), reward, row, signal.keep)


@torch.no_grad()
def current_logp(model, micros, ranks, temperature):
    """log pi_theta of a minibatch's response tokens, of all ranks: place [T], logp [T], row [T]."""
    seen = []
    for micro in micros:
        micro = micro.to(ranks.device)
        logp, _ = model.logp(*micro.packed, temperature=temperature)
        seen.append((micro.place, logp, micro.row[micro.segment]))
    model.reshard()  # backward would do it; else the gathered weights outlive the next update
    return tuple(ranks.gather(torch.cat(column)).cpu() for column in zip(*seen, strict=True))


def rescoring_noise(model, batch, kept, old_logp, ranks, temperature, train):
    """Std of log pi_old scored again, in another packing, minus log pi_old.

    At least float32's rounding of a log-prob. A few sequences show it; a signal below it means
    nothing.
    """
    rows = kept[runtime.minibatch(
        batch.prompt[kept], 0, train.prompts_per_step, train.seed)][:16]
    place, logp, _ = current_logp(
        model, list(batch.share(rows, train.max_tokens, ranks.rank, ranks.world)),
        ranks, temperature)
    runtime.require_reproducible(logp, old_logp[place])
    return max(float((logp - old_logp[place]).std()), 2.0 ** -23 * float(logp.abs().mean()))


def report(ranks, signal, raw, noise, identical):
    """Say what the signal looks like; stop at rounding noise, which whitening would blow up."""
    std = float(raw.std())
    quantiles = raw.sort().values[
        [int(q * (len(raw) - 1)) for q in (0, 0.01, 0.5, 0.99, 1)]].tolist()
    ranks.print(f"signal log({signal.numerator} / {signal.denominator}): std {std:.3g}, "
                f"min / 1 % / median / 99 % / max {' / '.join(f'{q:.3g}' for q in quantiles)}; "
                f"re-scoring noise {noise:.2g}")
    if identical:
        ranks.print("numerator and denominator are the same checkpoint: the signal is zero")
    elif std <= 2 * noise:
        raise ValueError(f"the signal's std {std:.3g} is within the re-scoring noise "
                         f"{noise:.3g}: numerator and denominator cannot be told apart; "
                         "train the teacher further, or choose another pair")


if __name__ == "__main__":
    runtime.command(main)
