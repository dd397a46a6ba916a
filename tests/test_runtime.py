"""runtime.py: the floors of the house, warm-up; files that are whole (durable.py)."""

import re

from conftest import ROOT

import durable
import runtime


def test_files_are_whole_or_absent(tmp_path):
    durable.write_text(tmp_path / "a/b.json", "one")
    durable.write_text(tmp_path / "a/b.json", "two")
    assert (tmp_path / "a/b.json").read_text() == "two" and len(
        list((tmp_path / "a").iterdir())
    ) == 1


def test_lower_floors_do_not_import_higher_ones():
    floors = [
        ("kernels", "losses", "values", "deltanet", "hf", "durable", "sandbox", "options"),
        ("latex", "judge", "results", "mixing"),
        ("answers",),
        ("grade",),
        ("model",),
        ("memory", "rollouts", "resume"),
        ("runtime",),
        ("critic",),
        ("problems", "sample", "stage1", "stage2"),
        ("responses", "divergence"),
        ("evaluate", "toy", "sharpen", "claims"),
        ("erpd",),
        ("plan", "paper"),
    ]
    floor = {name: i for i, names in enumerate(floors) for name in names}
    for name in floor:
        imported = re.findall(
            r"^\s*(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), flags=re.M
        )
        for other in set(imported) & set(floor):
            assert floor[other] < floor[name], f"{name}.py imports {other}.py"


def test_warmup_is_linear_then_constant():
    assert [runtime.warmup(1.0, s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert runtime.warmup(1.0, 0, 0) == 1.0
