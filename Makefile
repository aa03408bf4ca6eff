# make demo · make test · make test-all · make lint · make faults · make test-tpu · make test-gpu · make plan.
# PYTHON names the interpreter, VENV the environment, TESTS some files of tests instead of all, TIERS some tiers of
# test-all (slow, hosts, faults, demos). QUICK=1 makes faults as short as in make test-all, ROWS picks rows of it.
PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?=
TESTS ?=
TIERS ?=
QUICK ?=
ROWS ?=
PLAN_CONFIG ?= configs/wmt14.py:en_de_big
PLAN_TOPOLOGY ?= v5e:4x4,v5e:16x16,v5p:4x4x8,v6e:4x4
PLAN_FLAGS ?= --config.model.dtype=bfloat16
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check --quiet
WORKDIR ?= runs/demo
OTHER_TIERS = slow or hosts or faults or tpu or gpu

.PHONY: demo test test-all lint faults test-tpu test-gpu tpu-compiler plan lock clean

demo: $(VENV)/installed$(ACCELERATOR)
	$(RUN) train.py --config=configs/demo.py "--workdir=$(WORKDIR)"
	$(RUN) eval.py "--workdir=$(WORKDIR)" --checkpoint=best

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal -m "not ($(OTHER_TIERS) or demos)" $(TESTS)

# Every other tier but demos, or those that TIERS names; what needs the compiler of an accelerator is skipped, with a reason.
test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --dist worksteal -m "$(or $(TIERS),$(OTHER_TIERS))" $(TESTS)

faults: $(VENV)/installed-dev
	$(RUN) -m tests.faults $(if $(QUICK),--quick) --only=$(ROWS)

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

# The TPU compiler has an environment of its own: on a machine without a TPU nothing else should find it.
tpu-compiler:
	@$(MAKE) --no-print-directory VENV=$(VENV)-plan ACCELERATOR=tpu $(VENV)-plan/installedtpu

plan: tpu-compiler
	$(VENV)-plan/bin/python -m transformer.plan --config=$(PLAN_CONFIG) --topology=$(PLAN_TOPOLOGY) $(PLAN_FLAGS)

# Tests of what is compiled for TPUs; no TPU is needed.
test-tpu: tpu-compiler
	@$(MAKE) --no-print-directory VENV=$(VENV)-plan $(VENV)-plan/installed-dev
	$(VENV)-plan/bin/python -m pytest -n 2 -m tpu

# Tests of what is compiled for GPUs, and where there is one of what it computes; cuda12 for older drivers.
test-gpu: CUDA = $(or $(ACCELERATOR),cuda13)
test-gpu:
	@$(MAKE) --no-print-directory VENV=$(VENV)-gpu ACCELERATOR=$(CUDA) $(VENV)-gpu/installed$(CUDA)
	@$(MAKE) --no-print-directory VENV=$(VENV)-gpu $(VENV)-gpu/installed-dev
	$(VENV)-gpu/bin/python -m pytest -m gpu

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=python3.12, say" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -f $(VENV)/bin/python; exit 2; } # half of one would be taken for a whole

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	@echo "installing into $(VENV)"
	$(PIP) install --require-hashes -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt | $(VENV)/bin/python
	@echo "installing into $(VENV)"
	$(PIP) install --require-hashes -r requirements-dev.txt
	@touch $@

# cuda13, cuda12 or tpu: the same jax with its accelerator's libraries.
$(VENV)/installed$(ACCELERATOR): $(if $(ACCELERATOR),$(VENV)/installed)
ifneq ($(ACCELERATOR),)
	$(PIP) install "jax[$(ACCELERATOR)]==$$($(RUN) -c 'import jax; print(jax.__version__)')"
	@touch $@
endif

# For maintainers, with uv: new versions within the ranges of pyproject.toml.
lock:
	uv pip compile pyproject.toml --upgrade --universal --python-version 3.11 --generate-hashes --no-header -o requirements.txt
	uv pip compile pyproject.toml --upgrade --extra dev --universal --python-version 3.11 --generate-hashes --no-header \
		-c requirements.txt -o requirements-dev.txt

# Environments and caches; what was trained in runs stays.
clean:
	rm -rf $(VENV) $(VENV)-plan $(VENV)-gpu .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
