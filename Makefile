# The book's commands; `make help` lists them. All that they install or build lies in this folder:
# .venv (packages), .cache (downloads), _build (the book).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book serve check fix test test-all style types synced notebooks sync lab clean

# Programs keep caches and settings in HOME: where there is none, they get one here.
ifneq ($(shell test -d "$(HOME)" -a -w "$(HOME)" && echo yes),yes)
export HOME := $(CURDIR)/.cache/home
$(shell mkdir -p "$(HOME)")
endif
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH

VENV := .venv
REQUIREMENTS ?= requirements.txt
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MATHJAX := .cache/static/vendor/mathjax/.complete
BUILT := _build/.built
SOURCES := _config.yml _toc.yml Makefile tools/book_extension.py \
	$(shell find book notebooks results -type f -not -path '*/.*' -not -name '*.py')
CHAPTERS ?=
PORT ?= 8000

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

book: $(BUILT) ## build the book from the stored outputs
	@echo "The book: $(CURDIR)/_build/html/index.html (open it in a browser, or: make serve)"

serve: $(BUILT) ## show the book at http://127.0.0.1:8000 (another port: PORT=9000)
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

check: $(INSTALLED) ## style, types, sync and the quick tests, in two minutes
	@$(MAKE) --jobs 2 style types synced
	$(PYTEST) -m "not slow and not full" tests

fix: $(INSTALLED) ## format, and mend what can be mended
	-$(PY) -m ruff check --quiet --fix $(PYTHON)
	$(PY) -m ruff format --quiet $(PYTHON)

test: $(INSTALLED) ## check everything: style, types, sync, tests, every notebook, the book in a browser
	@$(MAKE) --jobs 2 style types synced
	@$(MAKE) book
	@$(BROWSER) $(PYTEST) $(TESTS) && $(PYTEST) $(NOTEBOOKS) && $(SKIPPED)

test-all: $(INSTALLED) ## the same at full length: an hour
	@$(MAKE) --jobs 2 style types synced
	@$(MAKE) book
	@$(BROWSER) $(PYTEST) -m "" --hypothesis-profile full $(TESTS) \
		&& $(PYTEST) -m "" $(NOTEBOOKS) && $(SKIPPED)

style:
	$(PY) -m ruff check --quiet $(PYTHON)
	$(PY) -m ruff format --check --quiet $(PYTHON)

types:
	$(PY) -m mypy

synced:
	$(PY) -m tools.sync --check

PYTHON := helpers experiments tests tools notebooks
# Two at a time, each in one thread, without progress bars; what is in one file, or in one notebook,
# stays together.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TQDM_DISABLE=1 \
	$(PY) -m pytest -q -rs -n 2 --dist loadscope
# In the order given, those first that take long by themselves.
TESTS := --no-loadscope-reorder tests/experiments tests/site tests/contract tests/helpers \
	$(wildcard tests/test_*.py) --cov --cov-report term --cov-fail-under 90
# A run of their own: nbval starts no kernel where coverage is measured. In the order given: the
# chapters alone take longest, and start beside the notebooks.
NOTEBOOKS := --no-loadscope-reorder tests/notebooks notebooks --nbval --nbval-current-env \
	--nbval-cell-timeout 1800 --nbval-kernel-startup-timeout 600 \
	--nbval-sanitize-with tests/notebooks/nbval.cfg
BROWSER := BOOK_CHROMIUM="$$($(PY) -m tools.chromium)" && export BOOK_CHROMIUM &&
SKIPPED := { test -n "$$BOOK_CHROMIUM" \
	|| echo "!!! THE BROWSER TESTS WERE SKIPPED: no Chromium could be had !!!"; }

notebooks: sync ## run all chapters again and store their outputs (one: CHAPTERS=01_encoder)
	@$(PY) -m tools.run_notebooks $(CHAPTERS)

sync: $(INSTALLED) ## carry the chapters' text into their notebooks and helpers/bridges
	@$(PY) -m tools.sync

lab: $(INSTALLED) ## open the chapters in JupyterLab
	@$(PY) -m jupyterlab notebooks

clean: ## remove what was built; packages and downloads stay
	rm -rf _build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- what the commands need -------------------------------------------------------------------

$(BUILT): $(INSTALLED) $(MATHJAX) $(SOURCES)
	@rm -rf _build
	$(VENV)/bin/jupyter-book build . --all -W -n --keep-going --quiet
	@touch $@

$(MATHJAX): tools/vendor.py | $(INSTALLED)
	@$(PY) -m tools.vendor

# What is needed, at the versions that are pinned: torch for CPUs needs less than is pinned for GPUs.
$(INSTALLED): requirements.in $(REQUIREMENTS) | $(VENV)/bin/uv
	@packages="-r requirements.in --constraint $(REQUIREMENTS)"; \
	install="$(VENV)/bin/uv pip install --python $(PY) $$packages"; $$install \
	|| { echo "Trying again with this system's certificates."; $$install --system-certs; } \
	|| { echo "Trying again with pip."; $(PY) -m pip install $$packages; }
	@touch $@

$(VENV)/bin/uv:
	@for python in python3 python3.14 python3.13 python3.12 python3.11 none; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	test "$$python" != none || { echo "Python 3.11 or newer is needed; found: $$(python3 --version 2>&1)"; exit 1; }; \
	"$$python" -m venv $(VENV) || { echo "$$python cannot make a virtual environment." \
		"On Debian and Ubuntu: apt-get install python3-venv. Then run make again."; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.txt uv
