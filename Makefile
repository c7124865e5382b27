# Everything here makes its own .venv first; nothing has to be installed by hand but Python 3.11 or newer.
PYTHON ?= python3
RUN := .venv/bin
# as many as there are cores, but no more than 4: each takes about 1 GB
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

.PHONY: demo test integration check slow extras docs mutants format clean

demo: .venv/installed
	$(RUN)/midskip demo

test: .venv/installed
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadscope

# what starts processes, trains, or runs the examples of the docs: about as long again
integration: .venv/installed
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadscope -m 'integration and not slow and not long and not gpu and not extras'

slow: .venv/installed
	$(RUN)/python -m pytest -m slow

# the site of the docs, into site/; open site/index.html
docs: .venv/installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet --strict

# tests that need the optional packages; those of a browser also need chromium
extras: .venv/extras-installed
	$(RUN)/python -m pytest -m extras

# where code may be changed and no test fails: hours; stopped and called again, it goes on. ONLY='midskip.cost*' for a part
mutants: .venv/installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 nice -n 15 $(RUN)/mutmut run --max-children $(WORKERS) $(ONLY)
	$(RUN)/python benchmarks/mutants.py

check: .venv/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python

format: .venv/installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf .venv runs site

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "midskip needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/extras-installed: .venv/installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,app,serving]' playwright
	@touch $@
