# make demo | make test : everything else is a part of these two.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help venv demo test lint lock clean
help:
	@echo "make demo   four virtual hospitals train one model under differential privacy (two minutes after the install)"
	@echo "make test   lint, types, contracts between the rooms, tests"
	@echo "make lint   the first three of these"
	@echo "make lock   write requirements.lock anew from pyproject.toml"
	@echo "make clean  remove the environment and the demo"

venv: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Fedicom needs Python 3.11 or newer, got " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/fedicom simulate recipe=phantom_2d out=runs/demo overwrite=true

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a process: two processes with two threads each would fight over two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet 'torch==2.13.0' 'torchvision==0.28.0'
	$(VENV)-lock/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable --exclude fedicom \
		| sed 's/+cpu$$//; /^nvidia-/d; /^triton==/d; /^cuda-/d' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) runs/demo
