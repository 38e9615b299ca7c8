# Two commands work on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test slow lint types fmt bench docs

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/unbatch demo

test: lint types
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make bench DATA=folder: what the stored results were measured on; without it the bundled photographs are used.
BENCH := $(BIN)/unbatch bench
TO := $(if $(DATA),,--out bench)
ON := $(if $(DATA),--data $(DATA),$(TO))

bench: export OMP_NUM_THREADS := 1
bench: $(READY)
	$(BENCH) matching $(ON)
	$(BENCH) tensor $(ON)
	$(BENCH) unmix --seconds 300 $(ON)
	$(BENCH) layers $(ON)
	$(BENCH) metric $(ON)
	$(BENCH) bounds $(TO)
	$(BENCH) adaptive $(TO)
	$(BENCH) defences $(TO)

# Write the pages that come from the code, then build the site to site/ (open site/index.html).
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m mkdocs build --strict
