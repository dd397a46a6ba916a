"""paper.py: RESULTS.md is what the recorded seeds say, and nothing else."""

import json
import random
import re

import pytest
from conftest import ROOT

import claims
import erpd
import options
import paper


def invented(name, seed):
    """A record of an experiment with all the rows that its claims name."""
    cfg = options.read_config(erpd.Config, ROOT / paper.CONFIGS / f"{name}.toml")
    rng = random.Random(f"{name} {seed}")
    wanted = {"base"} | {ref for c in cfg.claim for ref in (c.of, c.against)}
    for path, goals in cfg.paths:
        for k, goal in enumerate(goals, 1):
            run, at, step = goal.partition("@")
            wanted |= {f"{path}.{run} (round {k}){at}{step}" if k > 1 else goal} - {""}
    rows, curves = {}, {}
    for ref in sorted(wanted, key=lambda ref: (ref != "base", ref)):
        run, number, at = re.fullmatch(r"(.*?)(?: \(round (\d+)\))?(?:@(\d+))?", ref).groups()
        number = int(number or (ref != "base"))
        for step in ({int(at)} if at else {8, 16}) if ref != "base" else {None}:
            role = "base" if ref == "base" else "student" if run in [
                s.name for s in cfg.stage2] else "teacher"
            rows[run, number, step] = {
                "policy": run, "round": 0 if ref == "base" else number, "role": role, "step": step,
                "kl": 0.0 if ref == "base" else rng.uniform(0.001, 0.1), "kl_efficiency": None,
                "entropy": rng.uniform(0.3, 0.6), "length": 34.0, "seconds": 1.0, "sampling": {
                    column: {"accuracy": rng.random(), "accuracy_se": 0.01, "truncated": 0.0}
                    for column in paper.COLUMNS}}
        curves[run] = {"step": [1, 2, 4], **{c: [0.1, None, 0.3] for c in claims.CURVES}}
    for run in cfg.stage1:  # pictures show some that no claim is about
        curves.setdefault(run.name, curves["base"])
    return {"experiment": name, "seed": seed, "settings": "s", "machine": {
        "cpu": "a chip", "cores": 2, "processes": 1, "torch": "2"},
        "wall": {"task": 60.0, "sample": 30.0}, "rows": list(rows.values()), "curves": curves,
        "selection": [{"run": "ce", "rule": "best", "step": 16}]}


EXPERIMENTS = sorted(p.stem for p in (ROOT / paper.CONFIGS).glob("*.toml")
                     if p.stem.split("_")[0] not in ("sample", "stage1"))


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RECORDS", tmp_path)
    monkeypatch.setattr(paper, "CONFIGS", ROOT / paper.CONFIGS)
    for name in EXPERIMENTS:
        for seed in range(3):
            claims.append(tmp_path / f"{name}.jsonl", invented(name, seed))
    return tmp_path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_claim_can_be_held_against_rows(name, records):
    """A claim's names and columns fit together, and its row has a verdict."""
    text = paper.block(f"{name} claims")
    asked = paper.config_of(name).claim
    assert text.count("| **") == len(asked) > 0
    assert set(re.findall(r"\*\*(.*?)\*\*", text)) <= {"holds", "fails", "undecided"}
    assert paper.block(f"{name} run").startswith(f"`python erpd.py --config {paper.CONFIGS}/{name}")
    assert paper.block(f"{name} rows").count("\n") >= 4


def test_an_efficiency_is_that_of_every_seed_or_none():
    """The seeds on which a gain was clear are not the mean of all."""
    entries = {seed: invented("table1", seed) for seed in range(3)}
    for seed, entry in entries.items():
        entry["rows"][1]["kl_efficiency"] = None if seed == 1 else 0.25
        entry["rows"][2]["kl_efficiency"] = 0.75
    line = paper.rows(entries).splitlines()[3:5]
    assert [cells.split(" | ")[-2] for cells in line] == ["", "0.75"]


def test_a_control_stands_beside_students_of_the_same_batch_only(records):
    """Of another record too, where base policy, batch and seed are the same; paired by seed. Its
    teacher's path is the first of them."""
    def shared(name, seeds, rows):
        (records / f"{name}.jsonl").unlink(missing_ok=True)
        for seed in seeds:
            entry = invented(name, seed)
            base = {**entry["rows"][0], "sampling": {
                c: {"accuracy": 0.4 + seed / 10, "accuracy_se": 0.0, "truncated": 0.0}
                for c in paper.COLUMNS}}
            like = entry["rows"][1]
            entry["rows"] = [base, *({**like, **row, "step": 16, "sampling": {
                c: {"accuracy": row["accuracy"], "accuracy_se": 0.0, "truncated": 0.0}
                for c in paper.COLUMNS}} for row in rows)]
            claims.append(records / f"{name}.jsonl", entry)

    for name in EXPERIMENTS:
        (records / f"{name}.jsonl").unlink()
    sapo = {"policy": "sapo", "round": 1, "role": "teacher", "kl": 0.04, "accuracy": 0.7}
    rwr = {"policy": "rwr", "round": 1, "role": "control", "kl": 0.01, "accuracy": 0.6}
    student = {"policy": "keep_both", "round": 1, "role": "student", "kl": 0.01, "accuracy": 0.65}
    shared("table1", (0, 1), [sapo])
    mse = {"policy": "mse", "round": 1, "role": "teacher", "kl": 0.01, "accuracy": 0.62}
    shared("table12", (0, 1, 2), [student, rwr, mse])
    shared("scarce", (0, 1, 2), [{**sapo, "policy": "ce2_fast"}])  # another batch
    # sqrt(KL) is half of SAPO's: half of its way up from 0.4 and 0.5, so 0.55 and 0.6
    assert paper.block("controls greedy").splitlines()[2:] == [
        "| table12 | keep_both@16 | 0.0100 | +0.030 ± 0.000 | +0.075 (2 seeds) |  "
        "| +0.050 ± 0.000 |  |  |"]
    shared("table12", (0, 1, 2), [{**student, "kl": 0.0441}, rwr])
    assert "| -0.050 (2 seeds)* |" in paper.block("controls T=1")  # SAPO's last, at less KL


def test_pictures(records):
    for name, (experiment, draw) in paper.FIGURES.items():
        draw(claims.read(records / f"{experiment}.jsonl"), records / f"{name}.png")
        assert (records / f"{name}.png").stat().st_size > 5000, name


def test_a_page_keeps_what_is_written_by_hand(records):
    text = ("# A\n\n<!-- table7 claims -->\nstale\n<!-- end -->\nby hand\n"
            "<!-- summary -->\n<!-- end -->")
    page = paper.page(text)
    assert "stale" not in page and "\nby hand\n" in page and paper.page(page) == page
    assert "| table7 | 3 | " in page
    assert page.count("<!-- end -->") == 2


def test_results_are_what_the_records_say(monkeypatch):
    """RESULTS.md in the repository: run `python paper.py` after recording a seed."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "RESULTS.md").read_text()
    recorded = {p.stem for p in (ROOT / "docs/results").glob("*.jsonl")}
    shown = set(re.findall(r"<!-- (\w+) claims -->", text))
    assert shown == recorded
    assert paper.page(text) == text
    for file in (ROOT / "docs/results").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line)["experiment"] == file.stem
