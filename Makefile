# make book   the book: _build/html/index.html
# make test   every check: make checks (linter, types, tests), make notebooks (executed, numbers compared)
# make test-book  the rendered book in a browser, after make book
# make pdf    the book as one page, _build/singlehtml/index.html, and as _build/book.pdf, by CHROMIUM
# make bench  time and memory on the CPU, in one table
# make stress 20 kills of workers and driver during a run on Ray
# A Python other than python3:  make book PYTHON=python3.11    More processes than two:  make test WORKERS=8
# The book is built in _build/site, a copy with notebooks executed once for it and for the check. What git tracks changes
# by `dgkit book accept` and `dgkit results accept` alone.

PYTHON ?= python3
CHROMIUM ?= chromium
WORKERS ?= 2
EXTRAS := book,pages,test,reference,scores,cluster
BIN := .venv/bin
ENVIRONMENT := .venv/installed
SITE := _build/site
EXECUTED := $(SITE)/executed
SOURCES := $(shell find dgkit dgbook notebooks data -type f -not -name '*.pyc' -not -path '*/.*')
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile
# the models of the live page, exported: what is there for the same weights and code stays
LIVE := _build/live/models.js
BUILD := rm -rf $(SITE)/book && cp -r _config.yml _toc.yml book data $(SITE) && \
    cp -r _build/live $(SITE)/book/_static/live/data && \
    $(BIN)/jupyter-book build $(SITE) --path-output . --all -W -n --keep-going

# idle OpenMP threads must not spin; "python3" kernels are this environment's, whatever the user has registered
export OMP_WAIT_POLICY := PASSIVE
export JUPYTER_PREFER_ENV_PATH := 1

# as many processes as WORKERS, of one thread each
checks $(EXECUTED): export OMP_NUM_THREADS := 1

.PHONY: book test test-book checks notebooks pdf bench stress clean

book: $(EXECUTED) $(LIVE)
	$(BUILD)

test: checks notebooks

checks: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
	$(PYTEST) tests

notebooks: $(EXECUTED)
	$(BIN)/dgkit results check

$(EXECUTED): $(ENVIRONMENT) $(SOURCES)
	rm -rf $(SITE) _build/results # what is shown and compared has to come from this run
	$(PYTEST) notebooks --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
	    -p tests.keep_notebooks --keep-in $(SITE)/notebooks
	touch $@

$(LIVE): $(ENVIRONMENT) $(shell find dgkit dgbook/live data/models data/prompts -type f -not -name '*.pyc')
	OMP_NUM_THREADS=1 $(BIN)/python -m dgbook.live $(@D)
	touch $@

test-book: $(ENVIRONMENT)
	$(BIN)/pytest tests/site/rendered_book.py tests/site/live_page.py

pdf: $(EXECUTED) $(LIVE)
	$(BUILD) --builder singlehtml
	$(CHROMIUM) --headless --no-sandbox --no-pdf-header-footer --generate-pdf-document-outline \
	    --virtual-time-budget=60000 --print-to-pdf=_build/book.pdf file://$(CURDIR)/_build/singlehtml/index.html

bench: $(ENVIRONMENT)
	$(BIN)/python -m benchmarks

stress: $(ENVIRONMENT)
	DGKIT_KILLS=20 $(BIN)/pytest tests/dgbook/test_generate_cluster.py -k kills

$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis
