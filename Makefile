# make install | demo | demo-emoji | test | test-slurm | fuzz | lint | docs   (each installs first when needed; VENV=/path chooses the environment)
VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

.PHONY: install demo demo-emoji test test-slurm fuzz lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	VENV=$(VENV) bash demo.sh

# The same in colour, on 4,009 emoji.
demo-emoji: $(STAMP)
	VENV=$(VENV) bash demo.sh emoji

# Two workers run complete test files. The tests on a real Slurm follow: run together on two cores, both take longer.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm"
	$(VENV)/bin/python -m pytest -m slurm tests/slurm

# Only the tests on a real Slurm, one line each: a throw-away cluster of ten nodes on this machine.
test-slurm: $(STAMP)
	$(VENV)/bin/python -m pytest -vv --durations=10 -m slurm tests/slurm

# Hostile and damaged inputs, the long form: FUZZ_CASES cases of each family. Each cause of failure is listed once.
FUZZ_CASES ?= 20000
fuzz: $(STAMP)
	rm -f fuzz.txt
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_COLLECT=$(CURDIR)/fuzz.txt \
	  $(VENV)/bin/python -m pytest -n 2 --dist load -p no:cacheprovider tests/fuzz

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The pages of docs/ as a site, in docs/_build; a broken link or a page outside the contents is an error.
docs: $(STAMP)
	$(VENV)/bin/python -m ecar_dist.config.reference > docs/config.md
	$(VENV)/bin/sphinx-build -W --keep-going -n -q -b html docs docs/_build

clean:
	rm -rf demo runs docs/_build
