# `make demo` and `make test` need Python 3.11 or later, pip and make; each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast coverage lint format docs test-tgi test-vllm bench clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(BIN)/preft demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -q

test: .venv/dev.stamp lint
	$(PYTEST)

# for the inner loop: the rule, the format, the ops, the pool, PEFT's face and every decoding mode
FAST := tests/core/rule tests/core/format tests/core/ops tests/core/pool tests/core/test_*.py tests/hf/tuner \
	tests/hf/forward/test_modes.py tests/hf/forward/test_decode_is_base.py tests/hf/forward/test_caches.py \
	tests/hf/training/test_labels.py tests/test_layout.py
test-fast: .venv/dev.stamp
	$(PYTEST) -m "not slow" $(FAST) --ignore tests/hf/tuner/test_wrapped_models.py \
		--ignore tests/hf/tuner/test_fresh_process.py --ignore tests/hf/tuner/test_failed_loads.py

# the tests again, counting lines, which takes a third longer
coverage: .venv/dev.stamp
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --level error

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-tgi: .venv/dev.stamp
	$(BIN)/pytest -m tgi -q

test-vllm: .venv/dev.stamp
	$(BIN)/pytest -m vllm -q

# the site, in build/site; index.html opens from the disk too, but for its search
docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/demo.stamp
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv build dist *.egg-info

# torch comes first and pinned: left to a dependency, pip would take its newest build.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable ".[demo]"
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable ".[dev]"
	touch $@
