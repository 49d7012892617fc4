#!/bin/sh
# What `make test` runs once .venv is there: the sync check, every notebook, then pytest, each whatever the one before
# gave. pytest reports the outcome of the first two as tests of its own, so its last line speaks for all.
cd "$(dirname "$0")/.." || exit 1
PATH="$(pwd)/.venv/bin:$PATH"
export PATH OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
echo 'test: notebooks, library and README in sync?'
sh tools/check.sh
export STEP_CHECK=$?
echo 'test: every notebook'
nbdev_test --n_workers 2
export STEP_NOTEBOOKS=$?
exec python -m pytest -n 2 --dist loadfile tests
