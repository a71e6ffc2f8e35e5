# make demo: the whole story on handwritten digits.   make test: lint and all tests.   make clean: as after cloning.

PYTHON ?= python3
VENV := .venv

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/robustok demo

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pytest

# The stamps are older than what they depend on only when there is something to install again.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or \
	    sys.exit("robustok needs Python 3.11 to 3.13 and %s is %d.%d; run make PYTHON=python3.12, or another one" % ("$(PYTHON)", *v))'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
