"""lookup.py - how well any policy at all could fit the outcomes of a batch.

The loss `mse` (losses.py, the paper's Eq. 10) fits the probability p of every response token to the
outcome R of its response, and is judged by the share of R's variance over these tokens that p
explains, 1 - Var(R - p) / Var(R). But responses to one prompt begin alike, and while they do nobody
can tell which will be right; nor do the probabilities of a state add up to more than 1. The most
that can be explained, of this very batch, is explained by a table that has learnt it by heart: a
row for every prefix s, in which n_y responses go on with token y and S_y is the sum of their
outcomes. With b the mean of R - p,

    min_p  sum_y n_y (p_y + b)^2 - 2 S_y (p_y + b)    s.t.  p_y >= 0, sum_y p_y <= 1
    p_y = max(0, S_y - b n_y - c) / n_y,              c = 0, or such that they add up to 1,

b and p in turns until neither moves (the problem is convex in both). A long response tells itself
from the others early, so the ceiling rises with the length.

    python lookup.py runs/toy/batch
"""

import argparse
import sys

import torch

import losses
import rollouts


def best_fit(batch):
    """p [T'] and outcome [T'], float64, of the T' response tokens of a Batch: the probabilities
    that explain most of the outcomes' variance. Responses without a reward are left out; ValueError
    if the others all have the same.
    """
    prefixes, visited = {}, []  # (prefix, token) -> number, also that of the longer prefix
    outcome = []
    for row in torch.arange(len(batch))[~batch.reward.isnan()].tolist():
        prefix = -1 - int(batch.prompt[row])
        start, end = batch.cu_seqlens[row:row + 2].tolist()
        for token in batch.tokens[start + int(batch.prompt_length[row]):end].tolist():
            prefix = prefixes.setdefault((prefix, token), len(prefixes))
            visited.append(prefix)
            outcome.append(float(batch.reward[row]))
    visited, outcome = torch.tensor(visited, dtype=torch.long), torch.tensor(outcome).double()
    if len(set(outcome.tolist())) < 2:
        raise ValueError(f"{batch.folder}: no two responses differ in their outcome, so there is "
                         "nothing to explain")
    n = torch.bincount(visited, minlength=len(prefixes)).double()
    right = torch.zeros_like(n).index_add(0, visited, outcome)
    choices = {}  # prefix -> the numbers of what follows it
    for (prefix, _), number in prefixes.items():
        choices.setdefault(prefix, []).append(number)
    choices = [torch.tensor(numbers) for numbers in choices.values() if len(numbers) > 1]
    b, before = 0.0, float("inf")
    while abs(b - before) > 1e-9:
        p = (right / n - b).clamp(0, 1)
        for numbers in choices:
            if p[numbers].sum() > 1:
                p[numbers] = _project(right[numbers] - b * n[numbers], n[numbers])
        b, before = float((outcome - p[visited]).mean()), b
    return p[visited], outcome


def _project(right, n):
    """max(0, right - c) / n with the c for which they add up to 1: from the largest down, as many
    are kept as stay above it.
    """
    order = right.argsort(descending=True)
    c = ((right / n)[order].cumsum(0) - 1) / (1 / n)[order].cumsum(0)  # if the first k are kept
    kept = int((right[order] > c).sum())
    return (right - c[kept - 1]).clamp(min=0) / n


def main():
    parser = argparse.ArgumentParser(description="How well any policy could fit a batch.")
    parser.add_argument("batch", help="folder of rollouts")
    try:
        p, outcome = best_fit(rollouts.load(parser.parse_args().batch))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(p)} response tokens, mean outcome {outcome.mean():.3f}: no policy explains more "
          f"than {losses.explained_variance(p, outcome):.3f} of the variance")


if __name__ == "__main__":
    main()
