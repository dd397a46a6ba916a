"""lookup.py against outcomes known by hand, and against policies that try to do better."""

import random

import pytest
import torch

import lookup
import losses
import rollouts


def batch(*rows):
    """A batch of (prompt number, response, reward); every prompt is one token long."""
    tokens, lengths = [], []
    for prompt, response, _ in rows:
        tokens += [prompt, *response]
        lengths.append(1 + len(response))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    n = len(rows)
    return rollouts.Batch(
        folder=None, header={}, tokens=torch.tensor(tokens), cu_seqlens=cu_seqlens,
        prompt_length=torch.ones(n, dtype=torch.long),
        prompt=torch.tensor([prompt for prompt, _, _ in rows]),
        reward=torch.tensor([reward for _, _, reward in rows]),
        finished=torch.ones(n, dtype=torch.bool), sampler_logp=torch.zeros(len(tokens)))


def test_by_hand():
    """A shared token is right half the time; after it the two part ways; another prompt is another
    state though its tokens are the same; what has no reward is left out."""
    p, outcome = lookup.best_fit(batch((0, [5, 6], 1.0), (0, [5, 7], 0.0), (1, [5, 6], 0.0),
                                       (1, [5, 6], float("nan"))))
    assert p.tolist() == [0.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert outcome.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_right_ways_share_a_state():
    """Two right tokens cannot both have probability 1: by their numbers, 3 and 1, they get
    p = (S - c) / n with 2 - 4 c / 3 = 1. Nor can they in a batch, and there none explains less than
    a constant."""
    right, n = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0])
    assert lookup._project(right, n).tolist() == pytest.approx([0.75, 0.25])
    rows = [(0, [5], 1.0)] * 3 + [(0, [6], 1.0), (1, [5], 1.0), (1, [5], 0.0)]
    p, outcome = lookup.best_fit(batch(*rows))
    assert p[0] + p[3] == pytest.approx(1.0)
    assert losses.explained_variance(p, outcome) > 0


def test_nothing_to_explain():
    """Outcomes that are all the same have no variance."""
    with pytest.raises(ValueError, match="no two responses differ"):
        lookup.best_fit(batch((0, [5], 1.0), (0, [6], 1.0), (0, [6], float("nan"))))


def test_no_policy_does_better():
    """The variance explained of random batches, against random tables and small changes."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    draw, _ = random.Random(seed), torch.manual_seed(seed)
    rows = [(draw.randrange(2), [draw.randrange(4) for _ in range(3)], float(draw.random() < 0.7))
            for _ in range(40)]
    p, outcome = lookup.best_fit(batch(*rows))
    states = [(prompt, *response[:k]) for prompt, response, _ in rows for k in range(3)]
    taken = [token for _, response, _ in rows for token in response]
    best = {s: torch.zeros(4, dtype=torch.double) for s in states}
    for s, token, value in zip(states, taken, p.tolist(), strict=True):
        assert best[s][token] in (0.0, value)  # one probability for one choice
        best[s][token] = value
    assert all(x.sum() < 1 + 1e-9 and (x >= 0).all() for x in best.values())
    ceiling = losses.explained_variance(p, outcome)
    for size in (1e-3, 0.03, 1.0):
        for _ in range(200):
            other = {s: x + size * (torch.rand(4).double().softmax(0) - x) * torch.rand(1).double()
                     for s, x in best.items()}
            q = torch.stack([other[s][token] for s, token in zip(states, taken, strict=True)])
            assert losses.explained_variance(q, outcome) <= ceiling + 1e-7


def test_command(tmp_path, capsys, monkeypatch):
    """The line that python lookup.py prints: a ceiling below 1 where prefixes are shared."""
    b = batch((0, [5, 6], 1.0), (0, [5, 7], 0.0))
    monkeypatch.setattr("sys.argv", ["lookup.py", str(tmp_path)])
    monkeypatch.setattr(rollouts, "load", lambda folder: b)
    lookup.main()
    shown = capsys.readouterr().out
    ceiling = losses.explained_variance(*lookup.best_fit(b))
    assert f"more than {ceiling:.3f} of" in shown and 0 < ceiling < 1
