# `make demo` serves the bundled model, `make test` runs every check. Both set up .venv first;
# `make gpu` takes the Python that is there, which a GPU machine has torch for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PATHS := .
FULL_SIZE := tests/workers/test_full_size.py
# PyTorch's own index of CPU builds. pip searches it besides the configured index if this machine has
# no GPU and the index answers within 3 seconds. A CPU build such as 2.13.0+cpu counts as newer than
# 2.13.0, so pip prefers it here, and also where the configured index itself offers both. In every
# other case pip installs what the configured index has. `make demo CPU_TORCH=` never asks.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
HAS_CPU_TORCH = ! nvidia-smi -L >/dev/null 2>&1 && timeout 8 $(PYTHON) -c 'import urllib.request; \
    assert b"cpu-cp3" in urllib.request.urlopen("$(CPU_TORCH)/torch/", timeout=3).read()' 2>/dev/null

# Programs that some tests need and `make test` does not install: one line for each installer. Such a
# test is skipped, with the reason, where its program is missing.
#   systemd: systemd-analyze. nginx, haproxy: rolling restarts. prometheus: promtool.
#   bubblewrap: a container. kubernetes-validate: the chart.
APT_TOOLS := systemd nginx-light haproxy prometheus bubblewrap
PIP_TOOLS := kubernetes-validate
NPM_TOOLS :=

.PHONY: help tools demo rolling test gpu check format docs constraints clean

help:
	@echo "make demo [ONCE=1]  serve the bundled model and ask it a first question"
	@echo "make test           formatting, lint, types, spelling, tests"
	@echo "make rolling        restart servers under load behind nginx and HAProxy"
	@echo "make check          the same without the tests"
	@echo "make tools          install programs that some tests need, as far as this machine lets it (root)"
	@echo "make gpu            tests that need a card (PYTHON=... for one that is not python3)"
	@echo "make format         fix formatting and lint where that is automatic"
	@echo "make docs           regenerate docs/configuration.md"
	@echo "make constraints    update all packages and write their versions to constraints.txt"

# Made anew when the dependencies may have changed. The link lets mypy see the repository root as
# the package `glimmer`.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else \
	    "glimmer needs Python 3.11 or 3.12, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Glimmer, PyTorch and the test tools into $(VENV). The first time this downloads about"
	@echo "0.6 GB (2.5 GB on disk) with a CPU build of PyTorch, 3 GB (8 GB on disk) with a CUDA build."
	@index=; if $(HAS_CPU_TORCH); then index="--extra-index-url $(CPU_TORCH)"; fi; \
	$(BIN)/python -m pip install $$index --constraint constraints.txt --editable ".[dev]" || { \
	    echo "This index lacks a version that constraints.txt names. Installing without that file."; \
	    $(BIN)/python -m pip install $$index --editable ".[dev]"; }
	mkdir -p $(VENV)/src
	ln -sfn "$(CURDIR)" $(VENV)/src/glimmer
	touch $@

# Never fails: a test whose program is missing is skipped.
tools:
	@.ci/tools apt $(APT_TOOLS)
	@.ci/tools pip $(PIP_TOOLS)
	@.ci/tools npm $(NPM_TOOLS)
	@.ci/kubernetes-tools

demo: $(INSTALLED)
	$(BIN)/glimmer demo $(if $(ONCE),--once)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Restarts servers under load behind nginx and HAProxy; no request may fail. ROLLING=--help lists options.
rolling: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python tests/deploy/test_rolling.py $(ROLLING)

# Two processes, the second one whatever became of the first: the full-size model wants the whole
# card, and what other tests leave on it stays until their process ends.
gpu:
	mkdir -p $(VENV)/src
	ln -sfn "$(CURDIR)" $(VENV)/src/glimmer
	export PYTHONPATH="$(CURDIR)/$(VENV)/src$${PYTHONPATH:+:$$PYTHONPATH}"; failed=0; \
	for part in "--ignore=$(FULL_SIZE)" $(FULL_SIZE); do \
	    $(PYTHON) -m pytest -m gpu $$part || failed=1; \
	done; exit $$failed

check: $(INSTALLED)
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/ruff check $(PATHS)
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p glimmer --exclude /tests/
	$(BIN)/codespell $(PATHS)

format: $(INSTALLED)
	$(BIN)/ruff format $(PATHS)
	$(BIN)/ruff check --fix $(PATHS)

docs: $(INSTALLED)
	$(BIN)/python -m glimmer.deploy.config_docs > docs/configuration.md

# torch is left at its range: a machine needs the build for its GPU, or the one for CPUs, and each
# brings its own triton and CUDA libraries.
constraints: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	{ echo "# The versions that are tested. Written by \`make constraints\`; run \`make test\` after it."; \
	    grep -oE '(torch|triton)>=[^"]*' pyproject.toml; \
	    $(BIN)/python -m pip freeze --exclude-editable | grep -Ev '^(torch|triton|nvidia|cuda)[-_=]'; \
	} > constraints.txt
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
