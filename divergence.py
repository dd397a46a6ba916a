"""divergence.py - how far a policy went from its base: KL and entropy at every token of its own
samples.

    KL(pi || base) = sum_v pi(v|s) log pi(v|s) / base(v|s)       exact, over the vocabulary, at s_t
    estimate       = log pi(y_t|s_t) / base(y_t|s_t)             of the token drawn there

The estimate is the same in the mean, and noisier the more the smaller KL is. Both need samples that
were drawn at the temperature of the scoring and without truncation: else they speak of another
distribution.

Policy and base are scored pack by pack. Where a GPU has no room for both they take turns: the
policy's hidden states (H numbers a token) wait on the host, up to WAITING bytes of them, until it
has made room for the base.
"""

from itertools import accumulate
from typing import NamedTuple

import torch

import kernels
import memory
import model as models

SUMS = ("kl", "kl_sampled", "entropy")
WAITING = 16e9  # bytes; more means fewer turns, each of which loads both models


class Pack(NamedTuple):
    """Sequences that are scored together: the problem of each, its number of response tokens [B],
    all tokens [T] with their bounds [B+1], and the places [N] before the response tokens.
    """

    problem: list[int]
    size: list[int]
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    before: torch.Tensor


def packs(sequences, max_tokens, device):
    """[(problem, prompt tokens, response tokens)] -> Packs of at most `max_tokens`, or of one.
    """
    waiting = sorted(sequences, key=lambda s: len(s[1]) + len(s[2]))
    while waiting:
        taken = [waiting.pop()]
        lengths = [len(taken[0][1]) + len(taken[0][2])]
        while waiting and sum(lengths) + len(waiting[-1][1]) + len(waiting[-1][2]) <= max_tokens:
            taken.append(waiting.pop())
            lengths.append(len(taken[-1][1]) + len(taken[-1][2]))
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=device)
        tokens = torch.tensor([t for _, prompt, response in taken for t in (*prompt, *response)],
                              device=device)
        before = torch.cat([torch.arange(end - len(response), end) - 1 for end, (_, _, response)
                            in zip(accumulate(lengths), taken, strict=True)]).to(device)
        yield Pack([problem for problem, _, _ in taken], [len(r) for _, _, r in taken],
                   tokens, cu_seqlens, before)


@torch.no_grad()
def hidden(model, pack):
    """The hidden states that predict a pack's response tokens, [N, H]."""
    return model(pack.tokens, pack.cu_seqlens)[pack.before]


@torch.no_grad()
def sums(scored, p, head_p, q, head_q, temperature):
    """KL(p || q), its estimate and the entropy of p, summed over the response tokens of each
    problem's samples: {problem: dict}.

    p, q: hidden states of each pack in turn, [N, H]; q None: p is q.
    """
    cells = {}
    for pack, h in zip(scored, p, strict=True):
        h, target = h.to(head_p.device), pack.tokens[pack.before + 1]
        logp, entropy = kernels.linear_logp(h, head_p, target, temperature=temperature)
        kl = sampled = torch.zeros_like(entropy)
        if q is not None:
            h_q = next(q)
            kl = kernels.linear_kl(h, head_p, h_q, head_q, temperature=temperature)
            sampled = logp - kernels.linear_logp(
                h_q, head_q, target, temperature=temperature, entropy=False)[0]
        columns = [x.double().split(pack.size) for x in (kl, sampled, entropy)]
        for problem, *parts in zip(pack.problem, *columns, strict=True):
            cell = cells.setdefault(problem, dict.fromkeys(SUMS, 0.0)
                                    | {"tokens": 0, "sequences": 0})
            for name, x in zip(SUMS, parts, strict=True):
                cell[name] += float(x.sum())
            cell["tokens"] += len(parts[0])
            cell["sequences"] += 1
    return cells


def together(config, tokens, device):
    """Whether the base has room beside the policy, which is loaded, in packs of `tokens`."""
    if device.type != "cuda":
        return True  # what would wait on the host is on the host anyway
    torch.cuda.empty_cache()
    parts = memory.scoring(config, tokens, both=True)
    needed = parts["peak"] - parts["reserve"] - parts["weights"] // 2
    return needed < 0.9 * torch.cuda.mem_get_info(device)[0]


def score(policy, path, base, jobs, *, max_tokens, temperature):
    """Of each job {name: [(problem, prompt tokens, response tokens)]} the sums of each problem.

    policy: a list that holds the model, and is emptied where the base needs its place; path, base:
    the folders of both, base None where the policy is the base.
    """
    model = policy[0]
    dtype, device, head = model.head.dtype, model.device, model.head
    longest = max((len(prompt) + len(response) for sequences in jobs.values()
                   for _, prompt, response in sequences), default=0)

    def scored(name):
        return packs(jobs[name], max_tokens, device)

    def states(model, name):
        return (hidden(model, pack) for pack in scored(name))

    if base is None:
        return {name: sums(scored(name), states(model, name), head, None, None, temperature)
                for name in jobs}
    if together(model.config, max(longest, max_tokens), device):
        other = models.load(base, dtype=dtype, device=device)
        return {name: sums(scored(name), states(model, name), head, states(other, name),
                           other.head, temperature) for name in jobs}
    cells = {name: {} for name in jobs}
    todo = [(name, pack) for name in jobs for pack in scored(name)]
    size = head.shape[1] * head.element_size()  # of a token's hidden state
    while todo:
        turn, waiting = [], 0
        while todo and (not turn or waiting < WAITING):
            turn.append(todo.pop())
            waiting += len(turn[-1][1].before) * size
        model = policy.pop() if policy else models.load(path, dtype=dtype, device=device)
        kept = [hidden(model, pack).cpu() for _, pack in turn]
        head, model = model.head, None  # only the head stays beside the base
        torch.cuda.empty_cache()
        other = models.load(base, dtype=dtype, device=device)
        for (name, pack), h in zip(turn, kept, strict=True):
            found = sums([pack], [h], head, iter([hidden(other, pack)]), other.head, temperature)
            for problem, cell in found.items():
                known = cells[name].setdefault(problem, dict.fromkeys(cell, 0))
                known.update({key: known[key] + x for key, x in cell.items()})
        other = head = kept = h = None  # before the next turn's are made
    return cells
