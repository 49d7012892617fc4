# make tables   rebuild Tables 3 to 7, results in runs/PROFILE/; PROFILE=tiny, SEED=the profile's own (0)
#               PROFILE=smol DATA=DIR: real weights and the published rows in DIR (solar_repro.core.data_files says how it is laid out)
# make demo     two trainings, their average, a DPO step and their answers side by side, in minutes; PROFILE, SEED and
#               DATA as for make tables
# make test     notebooks in sync with the library, every notebook, the tests
# make test-all make test, and the tests that take minutes
# make lab      explore in JupyterLab; ROOT=1 lets root start it, in a container
# make docs     the documentation site, in _docs/, with the outputs of runs/PROFILE/ where that was run
# make notebooks  make tables, then the machinery's notebooks, too; keeps the outputs of all in nbs/
# make record   record the finished run of SEED=0; the tiny world's recorded runs go onto the front page and into README.md;
#               KIND=NAME: the kind of processor, where its instructions alone do not tell it from one recorded before
# make check    only: are notebooks, library and README in sync?
# make clean    remove .venv, the site and caches; results in runs/ stay
# Each sets up what it needs in .venv, on a machine with no more than make and a Python, 3.11 to 3.13.

PYTHON  ?=
PROFILE ?= tiny
SEED    ?=
DATA    ?=
BIN     := .venv/bin
CHOSEN   = --profile '$(PROFILE)' $(if $(SEED),--seed '$(SEED)')

# Set-up compiles nothing: what is imported is compiled then, and kept. Where the environment forbids to keep it, as
# images of containers do, each process would compile torch and its like again, for a minute.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := tables
.PHONY: setup tables demo test test-all lab docs notebooks record check clean

setup:
	@PYTHON='$(PYTHON)' sh tools/setup.sh

tables demo: export SOLAR_DATA := $(or $(DATA),$(SOLAR_DATA))
tables: setup
	@$(BIN)/solar-repro fetch-base $(CHOSEN)
	@$(BIN)/python -m solar_repro.reports.notebooks $(CHOSEN)

demo: setup
	@$(BIN)/solar-repro fetch-base $(CHOSEN)
	@$(BIN)/solar-repro demo $(CHOSEN)

test: setup
	@sh tools/test.sh

test-all: setup
	@sh tools/test.sh all

lab: setup
	@if [ "$$(id -u)" = 0 ] && [ -z '$(ROOT)' ]; then \
		echo 'make lab: Jupyter does not start for root by itself. Use another account, or, in a container that'; \
		echo 'only you reach, say so: make lab ROOT=1'; exit 1; fi
	@$(BIN)/python -m jupyterlab nbs/06_tables.ipynb $(if $(ROOT),--allow-root)

docs: setup
	@$(BIN)/python tools/build_docs.py --profile '$(PROFILE)'

notebooks: tables
	@$(BIN)/python -m solar_repro.reports.notebooks --all $(CHOSEN)
	@$(BIN)/python tools/keep_outputs.py $(CHOSEN)

record: setup
	@$(BIN)/python tools/record_run.py --profile '$(PROFILE)' --seeds '$(or $(SEED),0)' $(if $(KIND),--kind '$(KIND)')
	@[ '$(PROFILE)' != tiny ] || $(BIN)/python tools/record_answers.py --seed '$(or $(SEED),0)'

check: setup
	@sh tools/check.sh

clean:
	rm -rf .venv _docs _proc build .pytest_cache *.egg-info nbs/nbdev.yml nbs/sidebar.yml
	find nbs solar_repro tests tools -name __pycache__ -prune -exec rm -rf {} +
