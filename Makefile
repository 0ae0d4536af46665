# make book   the book: _build/html/index.html
# make test   every check: make checks (linter, types, tests), make notebooks (run again, numbers compared)
# make test-book  the rendered book in a browser, after make book
# make pdf    the book as one page, _build/singlehtml/index.html, and as _build/book.pdf, by CHROMIUM
# make bench  time and memory on the CPU, in one table
# make stress 20 kills of workers and driver during a run on Ray
# A Python other than python3:  make book PYTHON=python3.11

PYTHON ?= python3
CHROMIUM ?= chromium
EXTRAS := book,test,reference,scores,cluster
BIN := .venv/bin
ENVIRONMENT := .venv/installed

# idle OpenMP threads must not spin; "python3" kernels are this environment's, whatever the user has registered
export OMP_WAIT_POLICY := PASSIVE
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: book test test-book checks notebooks pdf bench stress clean

book: $(ENVIRONMENT)
	$(BIN)/dgkit book execute
	$(BIN)/jupyter-book build . --all -W -n --keep-going

test: checks notebooks

checks: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests

notebooks: $(ENVIRONMENT)
	rm -rf _build/results # what is compared below has to come from this run
	$(BIN)/pytest notebooks --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg
	$(BIN)/dgkit results check

test-book: $(ENVIRONMENT)
	$(BIN)/pytest tests/site/rendered_book.py

pdf: $(ENVIRONMENT)
	$(BIN)/jupyter-book build . --all -W -n --keep-going --builder singlehtml
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
