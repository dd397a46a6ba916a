"""claims.py: quantities, intervals and verdicts; records."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import claims


def row(policy, step, accuracy, kl, round=1, role="teacher", entropy=0.5):
    return {"policy": policy, "round": round, "role": role, "step": step, "kl": kl,
            "entropy": entropy, "sampling": {"T=1": {"accuracy": accuracy, "accuracy_se": 0.01}}}


ENTRY = {"experiment": "x", "seed": 0, "rows": [
    row("base", None, 0.5, 0.0, 0, "base"), row("ce", 8, 0.6, 0.01), row("ce", 16, 0.7, 0.04),
    row("ce", 32, 0.65, 0.09, entropy=0.25), row("s", 10, 0.68, 0.0225, role="student"),
    row("p.s", 10, 0.8, 0.16, 2, "student"), row("idle", 8, 0.5, 0.0)],
    "selection": [{"run": "ce", "rule": "best", "step": 16}],
    "curves": {"ce": {"step": [1, 2], "explained_variance": [0.1, 0.95]}}}


def claim(**keys):
    return claims.Claim(text="t", **{"least": 0.0} | keys)


@pytest.mark.parametrize("ref, step", [
    ("base", None), ("ce", 16), ("ce@8", 8), ("s", 10), ("p.s (round 2)", 10),
    ("p.s (round 2)@10", 10)])  # fmt: skip
def test_find(ref, step):
    assert claims.find(ENTRY, ref)["step"] == step


@pytest.mark.parametrize("ref", ["x", "ce@9", "p.s", "base@3x", "p.s (round 3)"])
def test_find_nothing(ref):
    with pytest.raises(ValueError, match="no such row in x, seed 0; there are base, ce"):
        claims.find(ENTRY, ref)


@pytest.mark.parametrize("keys, value, note", [
    ({"of": "s"}, 0.18, ""), ({"of": "s", "against": "ce"}, -0.02, ""),
    ({"of": "s", "against": "ce", "measure": "kl"}, 0.5625, ""),
    ({"of": "ce", "against": "idle", "measure": "kl"}, None, ""),
    ({"of": "ce@32", "measure": "entropy"}, -0.25, ""),
    ({"of": "ce", "measure": "explained_variance"}, 0.95, ""),
    # between sqrt(.01) and sqrt(.04) half-way: .65
    ({"of": "s", "against": "ce", "measure": "equal_kl"}, 0.03, ""),
    ({"of": "p.s (round 2)", "against": "ce", "measure": "equal_kl"}, 0.1, "its best, at less KL"),
])  # fmt: skip
def test_values(keys, value, note):
    found = claims.value(claim(**keys), ENTRY)
    assert found == (pytest.approx(value), note)


@pytest.mark.parametrize("keys, words", [
    ({"measure": "colour"}, "measure must be one of"),
    ({"measure": "equal_kl", "against": "ce@16"}, "whole run"),
    ({"measure": "kl"}, "base's KL to itself is 0"),
    ({"measure": "explained_variance", "of": "ce@16"}, "names a step"),
    ({"most": 1.0}, "one of least and most")])  # fmt: skip
def test_claims_that_cannot_be(keys, words):
    with pytest.raises(ValueError, match=words):
        claim(**{"of": "ce", **keys})


@pytest.mark.parametrize("values, keys, verdict", [
    ([1, 1.1], {"least": 0.5}, "too few seeds"), ([1, 1.1, 0.9], {"least": 0.5}, "holds"),
    ([1, 1.1, 0.9], {"least": 1.5}, "fails"), ([1, 2, 0], {"least": 0.5}, "undecided"),
    ([1, 1, 1], {"least": 1.0}, "holds"), ([1, 1.1, 0.9], {"least": None, "most": 0.5}, "fails"),
    ([1, 1.1, 0.9], {"least": None, "most": 1.5}, "holds"),
    ([], {"least": 1.0}, "too few seeds")])  # fmt: skip
def test_verdicts(values, keys, verdict):
    keys = {k: v for k, v in keys.items() if v is not None}
    assert claims.verdict(claims.Claim(text="t", of="ce", **keys), values) == verdict


def test_interval_is_students():
    """By hand: 1, 2, 3 has mean 2, standard error 1 / sqrt(3), t = 4.303."""
    mean, half = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    assert claims.interval([1.0]) == (1.0, float("inf"))


def test_students_quantiles():
    """Against the density of Student's t, integrated."""
    import math

    for n, t in enumerate(claims.STUDENT, 1):
        c = math.gamma((n + 1) / 2) / math.sqrt(n * math.pi) / math.gamma(n / 2)
        steps = 20000
        inside = sum(c * (1 + ((i + 0.5) * t / steps) ** 2 / n) ** (-(n + 1) / 2)
                     for i in range(steps)) * t / steps
        assert inside == pytest.approx(0.475, abs=4e-5)


def test_table_names_what_was_measured():
    text = claims.table([claim(of="s", against="ce", paper="1 vs 2"),
                         claim(of="ce", measure="explained_variance")],
                        {seed: ENTRY for seed in (0, 1, 2)})
    assert "T=1: s - ce | ≥ +0 | -0.020 ± 0.000 (-0.020, -0.020, -0.020) | **fails** |" in text
    assert "| 1 vs 2 |" in text and "explained_variance of ce" in text


def test_table_says_of_how_many_seeds_a_value_is():
    """A ratio to a KL of 0 is none."""
    moved = {**ENTRY, "rows": [{**r, "kl": r["kl"] or 0.01} for r in ENTRY["rows"]]}
    text = claims.table([claim(of="ce", against="idle", measure="kl")],
                        {0: ENTRY, 1: moved, 2: moved})
    assert "KL of ce / idle (2 of 3 seeds have one) " in text and "too few seeds" in text


def test_two_drivers_may_share_a_record(tmp_path):
    def write(seeds):
        for seed in seeds:
            claims.append(tmp_path / "x.jsonl", {**ENTRY, "settings": "s", "seed": seed, "wall": {},
                                                 "machine": {}})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (range(15), range(15, 30))))
    assert list(claims.read(tmp_path / "x.jsonl")) == [*range(30)]


def test_records(tmp_path):
    """The last of a seed counts, settings are not mixed, the same is not written twice."""
    file = tmp_path / "a/x.jsonl"
    base = {**ENTRY, "settings": "s1", "wall": {"task": 1.0}, "machine": {}}
    for entry in (base, {**base, "wall": {"task": 2.0}}, {**base, "seed": 1},
                  {**base, "seed": 1, "settings": "s2"}, {**base, "seed": 2, "settings": "s2"}):
        claims.append(file, entry)
    assert len(file.read_text().splitlines()) == 4
    assert list(claims.read(file)) == [1, 2]
    claims.append(file, base)  # the first settings again: they count again
    assert list(claims.read(file)) == [0, 1]
    with open(file, "a") as out:
        out.write('{"experiment": "x"')  # a kill
    assert list(claims.read(file)) == [0, 1]
    claims.append(file, {**base, "seed": 7})  # on a line of its own
    assert list(claims.read(file)) == [0, 1, 7]
    file.write_text("")
    with pytest.raises(ValueError, match="holds no record"):
        claims.read(file)
    file.write_text(json.dumps({**base, "rows": 5}) + "\n" + json.dumps(base) + "\n")
    with pytest.raises(ValueError, match="x.jsonl, line 1"):
        claims.read(file)
