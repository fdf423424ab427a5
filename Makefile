# make demo: the main question, answered in seconds from what the package brings along; needs no torch
# make venv: everything, as a developer needs it      make serve: the page and the HTTP API
# make test: all tests      make test-fast: those without torch      make lint      make pretrace: trace the usual jobs
PYTHON ?= python3
VENV := .venv
CORE := .venv-core
DEMO := $(if $(wildcard $(VENV)/ready),$(VENV),$(CORE))
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: venv core test test-fast lint demo serve pretrace
venv: $(VENV)/ready

$(VENV)/ready: requirements.lock requirements-core.lock requirements-nodeps.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) install -r requirements.lock
	$(VENV)/bin/python $(PIP) install --no-deps -r requirements-nodeps.lock -e .
	touch $@

core: $(CORE)/ready

# Every package is pinned: nothing is to be resolved. What is imported is compiled when it is.
$(CORE)/ready: requirements-core.lock
	test -x $(CORE)/bin/python || $(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python $(PIP) install --no-deps --no-compile -r requirements-core.lock
	touch $@

test: venv
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-fast: venv
	$(VENV)/bin/python -m pytest --fast -n 2 --dist loadfile -m "not slow and not gpu"

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(DEMO)/ready
	@$(DEMO)/bin/python -m app demo

serve: venv
	$(VENV)/bin/vramplan serve

pretrace: venv
	$(VENV)/bin/python -m vramplan.planning.pretrace
