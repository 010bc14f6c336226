# The book's commands; `make help` lists them. All that they install or build lies in this folder:
# .venv (packages), .cache (downloads), _build (the book).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book serve test notebooks sync lab clean

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
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

book: $(BUILT) ## build the book from the stored outputs
	@echo "The book: $(CURDIR)/_build/html/index.html (open it in a browser, or: make serve)"

serve: $(BUILT) ## show the book at http://127.0.0.1:8000 (another port: PORT=9000)
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: $(INSTALLED) ## check everything: style, types, sync, tests, every notebook, the book in a browser
	$(PY) -m ruff check helpers experiments tests tools notebooks
	$(PY) -m ruff format --check --quiet helpers experiments tests tools notebooks
	$(PY) -m mypy
	$(PY) -m tools.sync --check
	@$(MAKE) book
	@BOOK_CHROMIUM="$$($(PY) -m tools.chromium)"; export BOOK_CHROMIUM; \
	$(TEST) -m "not colab" --cov --cov-report term --cov-fail-under 90; \
	$(TEST) --no-loadscope-reorder tests/test_colab.py notebooks --nbval --nbval-current-env \
		--nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg; \
	test -n "$$BOOK_CHROMIUM" \
		|| echo "!!! THE BROWSER TESTS WERE SKIPPED: no Chromium could be had !!!"

# Two at a time, each in one thread, without progress bars; what is in one file, or in one notebook, stays together.
# In the order given: the chapters alone (test_colab.py) take as long as all notebooks, and start beside them.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TQDM_DISABLE=1 $(PY) -m pytest -q -rs -n 2 --dist loadscope

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

$(INSTALLED): $(REQUIREMENTS) | $(VENV)/bin/uv
	@install="$(VENV)/bin/uv pip install --python $(PY) -r $(REQUIREMENTS)"; $$install \
	|| { echo "Trying again with this system's certificates."; $$install --system-certs; } \
	|| { echo "Trying again with pip."; $(PY) -m pip install -r $(REQUIREMENTS); }
	@touch $@

$(VENV)/bin/uv:
	@for python in python3 python3.13 python3.12 python3.11 python3.10 none; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; \
	done; \
	test "$$python" != none || { echo "Python 3.10 or newer is needed; found: $$(python3 --version 2>&1)"; exit 1; }; \
	"$$python" -m venv $(VENV) || { echo "$$python cannot make a virtual environment." \
		"On Debian and Ubuntu: apt-get install python3-venv. Then run make again."; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.txt uv
