# make venv: everything a plan needs; make test; make demo; make serve; make pretrace: the usual jobs, traced ahead
PYTHON ?= python3
VENV := .venv

.PHONY: venv test demo serve pretrace
venv: $(VENV)/ready

$(VENV)/ready: requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test: venv
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

demo: venv
	$(VENV)/bin/vramplan demo

serve: venv
	$(VENV)/bin/vramplan serve

pretrace: venv
	$(VENV)/bin/python -m vramplan.planning.pretrace
