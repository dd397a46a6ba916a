"""toy.py: the task, its corrupted table, demonstrations, exact success, prompts, base policy."""

import json
import math
import random
import re
import signal
import sys
import zlib
from itertools import product

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import model as models
import options
import rollouts
import toy

RULES, FACTS = toy.Task(kind="rules"), toy.Task(kind="facts")
SHAPE = toy.Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48)
FACT_LIST = list(product(range(10), toy.OPERATIONS))
EQUATION = re.compile(r"([hmw]{0,3})(\d)([-+*])(\d)=(\d)(?:([,;|.])|:(\d(?:[-+*]\d)+)[,;])")


def clean():
    """A table without errors."""
    return {(a, op, b): ((toy.truth(a, op, b) + 1) % 10, 0.0) for a, (op, b) in FACT_LIST}


def answer(start, operations):
    for op, b in operations:
        start = toy.truth(start, op, b)
    return start


def read(text, start, operations, table):
    """Parse a demonstration strictly -> (its last written value, how many equations restate)."""
    value, place, restated = start, 0, 0
    for i, (op, b) in enumerate(operations):
        match = EQUATION.match(text, place)
        assert match, f"{text!r} breaks off at {place}"
        _, left, sign, right, result, end, rest = match.groups()
        operands = (int(left), int(right))
        assert sign == op and operands in ({(value, b)} if op == "-" else {(value, b), (b, value)})
        assert int(result) in (toy.truth(value, op, b), table[value, op, b][0])
        value, place = int(result), match.end()
        assert (end == ".") == (i == len(operations) - 1)
        if rest is not None:
            restated += 1
            assert rest + "=" == toy.problem_text(value, operations[i + 1:])
    assert place == len(text)
    return value, restated


# ---------------------------------------------------------------- the truth and the corrupted table


def test_truth():
    """A wrong truth would reward errors; minus must stay within 0 .. 9."""
    assert [toy.truth(*fact) for fact in ((7, "+", 5), (3, "-", 9), (9, "*", 9), (0, "-", 1))] \
        == [2, 4, 1, 9]
    for a, (op, b) in FACT_LIST:
        assert toy.truth(a, op, b) == {"+": a + b, "-": a - b, "*": a * b}[op] % 10
    for op, b in toy.OPERATIONS:  # errors never cancel by absorption
        assert len({toy.truth(a, op, b) for a in range(10)}) == 10


def test_there_are_210_facts():
    """The DP, the table and the docstring count the same facts."""
    assert len(toy.OPERATIONS) == len(set(toy.OPERATIONS)) == 21
    for task in (RULES, FACTS):
        table = toy.corrupted_table(task, 0)
        assert list(table) == [(a, op, b) for a, (op, b) in FACT_LIST] and len(table) == 210


@pytest.mark.parametrize("seed", range(5))
def test_rules_are_those_documented(seed):
    """Generalisation from fact to rule is what the task measures: no fact may leave its rule."""
    bad = 0
    for (a, op, b), (wrong, q) in toy.corrupted_table(RULES, seed).items():
        right = toy.truth(a, op, b)
        assert 0 <= wrong <= 9 and wrong != right
        concerned = (op == "-" and a < b and b >= 4) or (op == "*" and a >= 7) or \
            (op == "+" and a + b >= 15)
        bad += concerned
        assert (0.45 <= q <= 0.55) if concerned else (0 <= q <= 0.03)
        if concerned:
            said = {"-": (b - a) % 10, "*": (right + 5) % 10, "+": (right + 1) % 10}[op]
            assert wrong == said or (said == right and op == "-")
    assert bad == 58


@pytest.mark.parametrize("seed", range(5))
def test_facts_are_those_documented(seed):
    """About the share `bad` of the facts is believed wrong more often than not, the rest rarely."""
    table = toy.corrupted_table(FACTS, seed)
    assert all(wrong != toy.truth(*fact) and 0 <= wrong <= 9 for fact, (wrong, _) in table.items())
    assert all(0.5 <= q <= 0.65 or 0 <= q <= 0.06 for _, q in table.values())
    bad = sum(q >= 0.5 for _, q in table.values())
    assert abs(bad - 210 * 0.16) < 4 * math.sqrt(210 * 0.16 * 0.84)
    assert not any(q >= 0.5 for _, q in toy.corrupted_table(toy.Task("facts", bad=0.0), 0).values())


@pytest.mark.parametrize("task", [RULES, FACTS], ids=["rules", "facts"])
def test_the_table_is_a_function_of_its_seed(task):
    """A resumed run must go on with the same demonstrators, another seed have others."""
    assert toy.corrupted_table(task, 3) == toy.corrupted_table(task, 3)
    assert toy.corrupted_table(task, 3) != toy.corrupted_table(task, 4)


# ---------------------------------------------------------------- demonstrations and success


@pytest.mark.parametrize("task", [RULES, FACTS], ids=["rules", "facts"])
def test_success_is_that_of_the_demonstrators(task):
    """The exact line of every plot rests on it: Monte Carlo within four standard errors."""
    table, rng = toy.corrupted_table(task, 1), random.Random(0)
    for _ in range(6):
        start, operations = toy.problem(rng, 5)
        exact, n, right = toy.success(table, start, operations), 3000, answer(start, operations)
        hits = sum(int(toy.demonstration(rng, task, table, start, operations)[-2]) == right
                   for _ in range(n))
        assert abs(hits / n - exact) <= 4 * math.sqrt(exact * (1 - exact) / n) + 1e-9


def test_success_by_hand():
    """One doubtful fact; then two errors that lead back to the right answer."""
    table = clean()
    table[1, "+", 1] = (5, 0.25)
    assert toy.success(table, 1, [("+", 1)]) == 0.75
    assert toy.success(table, 1, [("+", 1), ("*", 3)]) == 0.75
    table[5, "*", 3] = (6, 0.5)  # 1 + 1 = 5, 5 * 3 = 6: right by luck
    assert toy.success(table, 1, [("+", 1), ("*", 3)]) == 0.75 + 0.25 * 0.5
    assert toy.success(table, 4, []) == 1.0


def test_a_clean_table_always_succeeds():
    """Without errors every demonstration is right, and the programme says so."""
    rng, table = random.Random(1), clean()
    for steps in (1, 5, 8, 20):
        start, operations = toy.problem(rng, steps)
        assert toy.success(table, start, operations) == 1.0
        text = toy.demonstration(rng, RULES, table, start, operations)
        assert read(text, start, operations, table)[0] == answer(start, operations)


@pytest.mark.parametrize("filler, restate", [(0.0, 0.0), (0.25, 0.0), (0.35, 0.5), (1.0, 1.0)])
def test_demonstrations_follow_the_grammar(filler, restate):
    """A trace the reader cannot parse teaches the base policy noise."""
    task, rng = toy.Task("facts", filler=filler, restate=restate), random.Random(2)
    table, fillers, restated = toy.corrupted_table(task, 2), 0, 0
    for _ in range(300):
        start, operations = toy.problem(rng, 5)
        text = toy.demonstration(rng, task, table, start, operations)
        assert set(text) <= set(toy.CHARACTERS[1:])
        assert text.endswith(".") and text.count(".") == 1
        value, times = read(text, start, operations, table)
        assert text[:-1].rpartition("=")[2] == str(value)  # what the grader takes
        fillers += sum(text.count(c) for c in "hmw")
        restated += times
    for count, places, p in ((fillers, 300 * 15, filler), (restated, 300 * 4, restate)):
        assert abs(count - places * p) <= 4 * math.sqrt(places * p * (1 - p))


def test_operands_are_swapped_half_of_the_time():
    """Entropy that no reward depends on: absent, the task would be easier than described."""
    rng, table = random.Random(3), clean()
    task = toy.Task(filler=0.0)
    for op, b, share in (("+", 5, 0.5), ("*", 3, 0.5), ("-", 5, 0.0)):
        texts = [toy.demonstration(rng, task, table, 2, [(op, b)]) for _ in range(1000)]
        swapped = sum(text.startswith(f"{b}{op}2=") for text in texts)
        assert abs(swapped - 1000 * share) <= 4 * math.sqrt(1000 * share * (1 - share))


# ---------------------------------------------------------------- prompts


def test_split_is_stable():
    """Test prompts of one seed must never be training prompts of another, on any machine."""
    rng = random.Random(4)
    texts = [toy.problem_text(*toy.problem(rng, 5)) for _ in range(4000)]
    for text in texts:
        place = zlib.crc32(text.encode()) % 10
        assert toy.split(text) == ("test" if place == 0 else "validation" if place == 1
                                   else "train")
    for name, share in (("test", 0.1), ("validation", 0.1), ("train", 0.8)):
        count = sum(toy.split(text) == name for text in texts)
        assert abs(count - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))
    assert [toy.split(t) for t in ("0+8=", "0+9=", "1+5=")] == ["test", "validation", "train"]


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_files(tmp_path, seed):
    """Disjoint files of the sizes asked for, answers right, success that of the table."""
    task = toy.Task(steps=4, prompts=200, validation=30, test=40)
    cfg = toy.Config(output=str(tmp_path), seed=seed, task=task)
    table = toy.corrupted_table(task, seed)
    means = toy.write_prompts(cfg, table)
    seen = set()
    for name, size in (("train", 200), ("validation", 30), ("test", 40)):
        rows = rollouts.read_prompts(tmp_path / f"prompts_{name}.jsonl")
        assert [row["id"] for row in rows] == [f"{name}-{i}" for i in range(size)]
        for row in rows:
            text = row["problem"]
            assert re.fullmatch(r"\d([-+*]\d){4}=", text) and toy.split(text) == name
            start = int(text[0])
            operations = [(text[i], int(text[i + 1])) for i in range(1, len(text) - 1, 2)]
            assert set(operations) <= set(toy.OPERATIONS)
            assert toy.problem_text(start, operations) == text
            assert row["answer"] == str(answer(start, operations))
            assert row["success"] == pytest.approx(toy.success(table, start, operations), abs=1e-6)
        assert means[name] == pytest.approx(sum(row["success"] for row in rows) / size)
        problems = {row["problem"] for row in rows}
        assert len(problems) == size and not problems & seen
        seen |= problems
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    toy.write_prompts(cfg, table)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_more_prompts_than_there_are_is_refused(tmp_path):
    """Two operations make 4410 problems, some 441 for the test: 576 are not sought for ever."""
    def stop(*_):
        raise TimeoutError("still looking for prompts that do not exist")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        task = toy.Task(steps=2)
        with pytest.raises(ValueError, match="steps|test"):
            toy.write_prompts(toy.Config(output=str(tmp_path), task=task), clean())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- the base policy


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "initial"
    toy.write_initial_policy(folder, toy.Config(output="", shape=SHAPE))
    return folder


def test_tokenizer_round_trip(initial):
    """One character is one token, in every neighbourhood: lengths and answers depend on it."""
    tokenizer = models.Tokenizer(initial)
    assert tokenizer.template is None and tokenizer.stop == (toy.CHARACTERS.index("."),)
    assert len(set(toy.CHARACTERS)) == len(toy.CHARACTERS) <= 32
    for i, c in enumerate(toy.CHARACTERS):
        assert tokenizer.encode(c) == [i] and tokenizer.decode([i]) == c
    assert tokenizer.encode(toy.CHARACTERS * 2) == [*range(len(toy.CHARACTERS))] * 2
    rng, table = random.Random(5), toy.corrupted_table(RULES, 0)
    for _ in range(50):
        start, operations = toy.problem(rng, 8)
        text = toy.problem_text(start, operations) + toy.demonstration(
            rng, toy.Task(restate=0.5), table, start, operations)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_initial_policy(initial, tmp_path):
    """A checkpoint folder like any other, and the seed's weights."""
    model = models.load(initial, dtype=torch.float32)
    assert (model.config.vocab, model.config.hidden, model.config.layers) == (32, 32, 2)
    assert model.config.tied and model.config.qk_norm
    toy.write_initial_policy(tmp_path / "same", toy.Config(output="", shape=SHAPE))
    toy.write_initial_policy(tmp_path / "other", toy.Config(output="", shape=SHAPE, seed=1))
    assert models.fingerprint(tmp_path / "same") == models.fingerprint(initial)
    assert models.fingerprint(tmp_path / "other") != models.fingerprint(initial)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "same"]  # no leftovers


def test_traces_are_shared_over_ranks(initial):
    """Ranks together see each demonstration once; responses alone are scored, of no test prompt."""
    tokenizer = models.Tokenizer(initial)
    cfg = toy.Config(output="", train=toy.Train(traces=7))
    table = toy.corrupted_table(cfg.task, 0)
    texts = {}
    for world in (1, 2, 3):
        texts[world], totals, scored_tokens = [], set(), 0
        for rank in range(world):
            tokens, cu, scored, total = toy.traces(cfg, table, tokenizer, 4, rank, world)
            totals.add(total)
            scored_tokens += len(scored)
            is_scored = torch.zeros(len(tokens), dtype=torch.bool)
            is_scored[scored] = True
            for a, b in cu.unfold(0, 2, 1).tolist():
                text = tokenizer.decode(tokens[a:b].tolist())
                prompt = text[:2 * cfg.task.steps + 2]
                assert prompt.endswith("=") and toy.split(prompt) == "train"
                assert is_scored[a:b].tolist() == [i >= len(prompt) for i in range(b - a)]
                texts[world].append(text)
        assert totals == {scored_tokens}
    assert len(texts[1]) == 7 and sorted(texts[1]) == sorted(texts[2]) == sorted(texts[3])
    other = toy.traces(cfg, table, tokenizer, 5, 0, 1)[0].tolist()
    assert other != toy.traces(cfg, table, tokenizer, 4, 0, 1)[0].tolist()


def test_command(tmp_path, monkeypatch, capsys):
    """A few steps from nothing to a policy folder that is better than none; twice is once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = [f"shape.{name}={value}" for name, value in vars(SHAPE).items()]
    sizes = ["task.prompts=20", "task.validation=5", "task.test=5", "train.steps=30",
             "train.traces=16", "train.checkpoint_every=10"]
    monkeypatch.setattr(sys, "argv", ["toy.py", "--set", f"output={tmp_path}", *shape, *sizes])
    for turn in range(2):
        try:
            toy.main()
        finally:
            dist.destroy_process_group()
        assert ("already complete" in capsys.readouterr().out) == bool(turn)
    last = json.loads((tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 30 and last["nats_per_token"] < math.log(32)
    assert models.fingerprint(tmp_path / "policy") == \
        models.fingerprint(tmp_path / "sft" / "step_000030")
    models.load(tmp_path / "policy")


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["r5", "f5", "f8", "r8"])
def test_shipped_configs(name):
    """A config that a README names must parse, and be what its name says."""
    cfg = options.read_config(toy.Config, ROOT / "configs" / "toy" / f"{name}.toml")
    assert cfg.task.kind == {"r": "rules", "f": "facts"}[name[0]]
    assert cfg.task.steps == int(name[1])
    assert 10 * 21 ** cfg.task.steps > 100 * (cfg.task.prompts + cfg.task.test)


@pytest.mark.parametrize("override, message", [
    ("task.kind=words", "task.kind must be one of rules, facts"),
    ("task.step=5", r"unknown key task\.step; did you mean task\.steps\?")])
def test_bad_configs_are_refused(override, message):
    """A misspelt key must not silently train the default task."""
    with pytest.raises(ValueError, match=message):
        options.read_config(toy.Config, None, ["output=x", override])
