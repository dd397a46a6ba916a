# Two commands: `make demo` and `make test`. Both make the environment they need, and both may be run again.
PYTHON ?= python3
SEEDS ?= 1
OUTPUT ?= runs/demo
KILLS ?= 50
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo paper test test-slow chaos lint clean

demo: .venv/run.done
	$(BIN)/python erpd.py --config configs/toy/erpd.toml --set seeds=$(SEEDS) output=$(OUTPUT)

paper: .venv/run.done  # the core of RESULTS.md
	for name in table1 table5 table7 figure4 figure5 figure6 table2; do \
		$(BIN)/python erpd.py --config configs/toy/paper/$$name.toml --set seeds=$(SEEDS) || exit 2; done
	$(BIN)/python paper.py

test: .venv/dev.done lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

test-slow: .venv/dev.done
	$(BIN)/python -m pytest -q --runslow --durations=20

chaos: .venv/dev.done
	$(BIN)/python tests/chaos.py --kills $(KILLS)

lint: .venv/dev.done
	$(BIN)/ruff check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/run.done: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/dev.done: requirements-dev.txt .venv/run.done
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
