# make demo    install, then train and evaluate a small T5 on data that every Python carries
# make test    install, then run the tests
# make soak    kill training runs twenty times of each kind and compare every bit of what they become (an hour)
# make lint    formatting, lint, types
# make test-beam   install Apache Beam in an environment of its own, then run its tests there
# make lock    pin today's versions of all dependencies in requirements.lock and requirements-beam.lock

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BEAM := .venv-beam
DEMO := runs/demo

.PHONY: install demo test soak test-beam lint lock

install: $(INSTALLED)

# Made anew when the lock or the package's metadata change.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"mtjax needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(INSTALLED)

# Each line is a command to try by itself; a second `make demo` goes on from where the first one stopped.
demo: $(INSTALLED) $(DEMO)/vocab.model
	$(BIN)/mtjax cache --mixture=python_docs --vocabulary=$(DEMO)/vocab.model --cache_dir=$(DEMO)/cache
	$(BIN)/mtjax train --gin_file=runs/python_docs.gin --cache_dir=$(DEMO)/cache --gin.MODEL_DIR=$(DEMO)/model
	$(BIN)/mtjax eval --model_dir=$(DEMO)/model --split=test

$(DEMO)/vocab.model: | $(INSTALLED)
	$(BIN)/mtjax vocab --mixture=python_docs --size=4000 --output=$@

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

soak: $(INSTALLED)
	MTJAX_KILLS=20 $(BIN)/python -m pytest -rA -p no:cacheprovider tests/test_soak.py

# Its own environment: Beam wants an older protobuf.
$(BEAM)/.installed: requirements-beam.lock pyproject.toml
	test -x $(BEAM)/bin/python || $(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-beam.lock
	$(BEAM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-beam: $(BEAM)/.installed
	$(BEAM)/bin/python -m pytest tests/test_beam.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --fork-strategy=fewest --python-version=3.11 --extra=dev --upgrade --quiet \
		--no-header --no-annotate --output-file=requirements.lock pyproject.toml
	cp requirements.lock requirements-beam.lock
	$(BIN)/uv pip compile --universal --fork-strategy=fewest --python-version=3.11 --extra=dev --extra=beam --quiet \
		--no-header --no-annotate --output-file=requirements-beam.lock pyproject.toml
