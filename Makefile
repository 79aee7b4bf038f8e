# make demo | test | test-all | check | data. Each makes what it needs; VENV names the environment.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
DATA ?= data

.PHONY: demo test test-all check data install
demo: $(INSTALLED)
	$(PY) train.py

test: $(INSTALLED)
	$(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-all: $(INSTALLED)
	$(PY) -m pytest

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(PY) scripts/check_packaging.py

data: $(INSTALLED)
	$(PY) -c "from lottery_lightning.data import CIFAR10, MNIST; [d('$(DATA)').prepare_data() for d in (MNIST, CIFAR10)]"
	@echo "MNIST and CIFAR-10 are in $(DATA)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python >= 3.11 is needed: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $(INSTALLED)
