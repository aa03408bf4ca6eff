# make demo · make test · make test-slow. PYTHON names the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?=
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check --quiet
WORKDIR ?= runs/demo

.PHONY: demo test test-fast test-slow lint types lock clean

demo: $(VENV)/installed$(ACCELERATOR)
	$(RUN) train.py --config=configs/demo.py --workdir=$(WORKDIR)
	$(RUN) eval.py --workdir=$(WORKDIR) --checkpoint=best

test: lint types test-fast

test-fast: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -m slow

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/installed-dev
	$(RUN) -m mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); set PYTHON=python3.12, say" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

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
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header -o requirements.txt
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header \
		-c requirements.txt -o requirements-dev.txt

clean:
	rm -rf $(VENV) runs
