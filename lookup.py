"""lookup.py - how well any policy at all could fit the outcomes of a batch.

MSE fits pi(y_t | s_t) to the outcome R of the whole response (Eq. 10), and is judged by the
variance of R that these probabilities explain. But responses to one prompt begin alike, and while
they do nobody can tell which will be right; nor do the probabilities of a state add up to more than
1. The best there is is a table with a row for every prefix s of the batch: with n_y responses that
go on with y there, S_y of them right,

    min_p  sum_y n_y p_y^2 - 2 S_y p_y    s.t.  p_y >= 0, sum_y p_y <= 1
    p_y = max(0, S_y - c) / n_y,          c = 0, or such that they add up to 1.

Such a table has learnt the batch by heart. A long response tells itself from the others early, so
the ceiling rises with the length.

    python lookup.py runs/toy/batch
"""

import argparse
import sys

import torch

import losses
import rollouts


def best_fit(batch):
    """p [T'] and outcome [T'], float64, of the T' response tokens of a Batch: the probabilities
    that minimise sum (p - outcome)^2. Responses without a reward are left out.
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
    n = torch.bincount(visited, minlength=len(prefixes)).double()
    right = torch.zeros_like(n).index_add(0, visited, outcome)
    p = right / n
    choices = {}  # prefix -> the numbers of what follows it
    for (prefix, _), number in prefixes.items():
        choices.setdefault(prefix, []).append(number)
    for numbers in choices.values():
        if len(numbers) > 1 and p[numbers].sum() > 1:
            p[numbers] = _project(right[numbers], n[numbers])
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
          f"than {losses.explained_variance(p, outcome):.3f} of their variance; the best gives "
          f"{p[outcome > 0].mean():.3f} to tokens of right responses, "
          f"{p[outcome == 0].mean():.3f} to tokens of wrong ones")


if __name__ == "__main__":
    main()
