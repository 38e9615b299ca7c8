# Two commands work on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test suite elsewhere slow slow-part coverage lint types pages hooks fmt bench docs house

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[all,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/unbatch demo

test: lint types suite

suite: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

# The suite with the roundings of another processor, on which no test may rest.
elsewhere: export ATEN_CPU_CAPABILITY = avx2
elsewhere: export MKL_ENABLE_INSTRUCTIONS = SSE4_2
elsewhere: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: $(READY)
	$(BIN)/python -m pytest -m slow

# A tenth of the slow suite, another one every day and all of it in ten days; out of time is no failure.
DAY ?= $(shell echo $$(($$(date +%s) / 86400)))
MINUTES ?= 15

slow-part: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --part $(DAY)/10 --minutes $(MINUTES)

coverage: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow' --cov --cov-report=term --cov-report=xml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

pages: $(READY)
	$(BIN)/python docs/generate.py --check

hooks: $(READY)
	$(BIN)/pre-commit install

# How large the house is, and what its public docstrings show.
house: $(READY)
	$(BIN)/python docs/house.py

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
	$(BENCH) descend $(ON)
	$(BENCH) text $(ON)
	$(BENCH) vit $(ON)
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
