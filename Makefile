# make demo | make test : everything else is a part of these two.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help venv demo federation bench bench-peers test test-rooms test-deployment test-pacs lint lock bundle sbom audit-deps clean
help:
	@echo "make demo   four virtual hospitals train one model under differential privacy (half a minute after the install)"
	@echo "make federation  a deployed federation of real processes on this machine: TLS, approvals, a site killed and back"
	@echo "make bench  the benchmarks, and docs/benchmarks.md from them"
	@echo "make bench-peers  the same federation through Flower's Ray simulation, NVFLARE and pfl, each installed beside it"
	@echo "make test   lint, types, contracts between the rooms, tests; these are its parts:"
	@echo "  make lint             ruff, mypy, import-linter"
	@echo "  make test-rooms       every room by itself, and the simulation end to end"
	@echo "  make test-deployment  real processes on loopback, killed and cut off"
	@echo "make test-pacs    pulls from a real Orthanc, installed from Debian's packages where it is missing"
	@echo "make bundle sbom audit-deps   offline bundle, bill of materials (CycloneDX), known weaknesses of what is installed"
	@echo "make lock   write requirements.lock anew from pyproject.toml"
	@echo "make clean  remove the environment and what demo and federation made"

venv: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Fedicom needs Python 3.11, 3.12 or 3.13, got " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/fedicom simulate recipe=phantom_2d out=runs/demo overwrite=true

federation: $(READY)
	$(BIN)/fedicom rehearse --out runs/federation

bench: $(READY)
	$(BIN)/python benchmarks/suite.py

bench-peers: $(READY)
	$(BIN)/python benchmarks/peers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint test-rooms test-deployment

# One thread a process: two with two threads each would fight over two cores. Three, for a quarter of the time a test waits.
test-rooms: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal --ignore tests/deployment

# A file has one federation for all its tests, so it stays in one process; there are five files.
test-deployment: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 5 --dist loadfile --timeout 900 tests/deployment

# tests/orthanc.sh installs without starting. Each server runs in a network namespace of its own.
test-pacs: $(READY)
	tests/orthanc.sh
	OMP_NUM_THREADS=1 FEDICOM_TEST_PACS=required $(BIN)/python -m pytest tests/client/test_pacs_orthanc.py

bundle: $(READY)
	PYTHON=$(BIN)/python CYCLONEDX=$(CURDIR)/$(BIN)/cyclonedx-py deploy/bundle/bundle.sh

sbom: $(READY)
	deploy/bundle/sbom.sh

audit-deps: $(READY)
	$(BIN)/python deploy/bundle/audit_deps.py

lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet 'torch==2.13.0' 'torchvision==0.28.0'
	$(VENV)-lock/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable --exclude fedicom \
		| sed 's/+cpu$$//; /^nvidia-/d; /^triton==/d; /^cuda-/d' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) runs/demo runs/federation
