# make demo    train, post-train and evaluate on handwritten digits, with a report
# make quick   lint and the fast tests, one to two minutes, for daily work
# make test    lint and all tests
# make docs    the documentation as a site, build/site/index.html; a broken link is an error
# make clean   remove everything that these make

PYTHON ?= python3
VENV := .venv
# In two processes, as most tests use one core; a file's tests share fixtures and stay together.
PYTEST = $(VENV)/bin/pytest -n 2 --dist loadfile

.PHONY: demo quick test lint docs clean

demo: $(VENV)/installed
	$(VENV)/bin/robustok demo

quick: lint
	$(PYTEST) -m "not slow and not multiprocess"

test: lint
	$(PYTEST)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

# These stamps are older than pyproject.toml or constraints.txt when packages have to be installed again.
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
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
